"""Text to token files on all cores; duplicates removed; the order baked into a file.

    python prepare.py tokenize --input=a.jsonl,b.txt --output=data/train
    python prepare.py dedup    --input='pile/*.jsonl.zst' --output=deduped.jsonl
    python prepare.py shuffle  --data=data/train --output=data/preshuffled --steps=143000

Long jobs build PREFIX.partial and move its files into place only when they are whole; a job that
was killed goes on from its last commit, and a file that exists is complete. `dedup` removes equal
documents and nearly equal ones by MinHash at Jaccard 0.87, as the deduplicated Pile. It works on
one machine and in memory, about 1 kB a document that stays; for more see datatrove's MinHash, whose
.jsonl.gz are an --input of `tokenize`.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from glob import glob
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import check, command, replacing
from data import PROVENANCE, Order, OrderedData, TokenWriter, ordered
from tokenizer import ENDOFTEXT, Tokenizer, load_tokenizer

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")

# ---------------------------------------------------------------------------- reading text


def input_files(spec):
    """Return the files that comma-separated files, folders and globs name, in a fixed order."""
    paths = []
    for item in spec.split(","):
        if os.path.isdir(item):
            found = sorted(str(path) for path in Path(item).rglob("*")
                           if path.name.endswith(SUFFIXES))
        elif os.path.exists(item) or not any(c in item for c in "*?["):
            found = [item]
        else:
            found = sorted(glob(item, recursive=True))
        if not found:
            raise ValueError(f"{item}: no {', '.join(SUFFIXES)} files there")
        paths += found
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise ValueError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        os.stat(path)  # raises now if a file is missing, not hours later
    return paths


def open_text(path):
    """Return (stream of uncompressed bytes, the underlying file, whose tell() is the progress)."""
    raw = open(path, "rb")
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw), raw
    if path.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise ValueError(
                f"{path}: reading .zst needs zstandard: pip install zstandard") from None
        return io.BufferedReader(_ZstdStream(raw, zstandard)), raw
    return raw, raw


class _ZstdStream(io.RawIOBase):
    """Frames of zstandard, one after the other; unlike its own reader, it tells a file cut off."""

    def __init__(self, raw, zstandard):
        self.raw, self.zstandard, self.frame, self.ready = raw, zstandard, None, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            block = self.frame.unused_data if self.frame and self.frame.eof else b""
            block = block or self.raw.read(1 << 17)
            if not block:
                if self.frame and not self.frame.eof:
                    raise EOFError("the last frame is incomplete")
                return 0
            if not self.frame or self.frame.eof:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            try:
                self.ready = self.frame.decompress(block)
            except self.zstandard.ZstdError as error:
                raise EOFError(error) from None
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


def chunks(paths, position=None, size=1 << 20):
    """Yield (chunk, position after it, compressed bytes read) of whole lines, about `size` bytes.

    chunk: (file number, path, number of its first line, bytes). position: [file number, offset in
    the uncompressed text, line number] to go on from. A .txt file is one chunk and one document.
    """
    first, offset, line = position or [0, 0, 1]
    for number in range(first, len(paths)):
        path = paths[number]
        stream, raw = open_text(path)
        try:
            with raw, stream:
                if stream is raw:
                    raw.seek(offset)
                else:
                    read_up_to(stream, offset, size)
                before = raw.tell() if offset else 0
                while True:
                    whole = path.endswith(".txt")
                    block = stream.read() if whole else stream.read(size) + stream.readline()
                    if not block:
                        break
                    chunk = (number, path, line, block)
                    offset, line = offset + len(block), line + block.count(b"\n")
                    advance, before = raw.tell() - before, raw.tell()
                    yield chunk, [number, offset, line], advance
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged or cut off near line {line} ({error})") from None
        offset, line = 0, 1


def read_up_to(stream, offset, size):
    """Read a compressed stream again up to where a job goes on."""
    while offset:
        skipped = len(stream.read(min(offset, size)))
        if not skipped:
            raise EOFError("shorter than when it was read before")
        offset -= skipped


def documents(chunk, on_malformed):
    """Yield (line number, record with a string "text") of a chunk; tell on_malformed(message) of
    bad lines.
    """
    _, path, first, block = chunk
    is_text = path.endswith(".txt")
    lines = [block] if is_text else block.split(b"\n")
    for number, line in enumerate(lines, first):
        if not is_text and not line.strip():
            continue
        where = path if is_text else f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf8")
            record = {"text": text} if is_text else json.loads(text)
        except UnicodeDecodeError as error:
            on_malformed(f"{where}: not UTF-8 ({error.reason} at byte {error.start})")
            continue
        except (ValueError, RecursionError) as error:
            on_malformed(f"{where}: not JSON ({error})")
            continue
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            on_malformed(f'{where}: expected an object with a string "text"')
            continue
        yield number, record


def subset_name(record):
    """Return a record's pile_set_name, where the Pile ("meta"), datatrove ("metadata") puts it."""
    meta = record.get("meta") or record.get("metadata")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else "unnamed"


# ---------------------------------------------------------------------------- worker processes


def in_workers(function, tasks, workers, start, *arguments):
    """Yield function(*task) of each task, in order, from `workers` processes (0: one a core).

    start(*arguments) is called first in every process. They run ahead by a bounded number of tasks.
    With one worker all of it happens in this process.
    """
    workers = workers or os.cpu_count()
    if workers == 1:
        start(*arguments)
        for task in tasks:
            yield function(*task)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (start, arguments))
    waiting = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, *task))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Wait for the tasks at work. If Python exits before them, it can write to a closed pipe.
        pool.shutdown(cancel_futures=True)


def _start_worker(start, arguments):
    serve_parent()
    start(*arguments)


def serve_parent():
    """Make a worker process leave Ctrl-C to its parent, and end when that is gone in any way."""
    if parent_process():  # otherwise this process is alone
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent):
    wait([parent.sentinel])
    os._exit(1)


# ---------------------------------------------------------------------------- tokenize


@dataclass(frozen=True)
class Tokenize:
    input: str  # comma-separated .jsonl, .jsonl.gz, .jsonl.zst and .txt files, folders and globs
    output: str  # PREFIX: writes PREFIX.bin, PREFIX.idx, PREFIX.json and PREFIX_documents.npy
    tokenizer: str = "20B_tokenizer.json"
    # <|endoftext|> after every document; the published deduped file has none
    append_eod: bool = True
    skip_malformed: bool = False  # count and skip bad lines instead of stopping at the first
    workers: int = 0  # processes; 0: one a core

    def __post_init__(self):
        check(self, "0 or more", lambda value: value >= 0, "workers")


def tokenize(options):
    """Turn text into a token file, a sequence a document, in order; same bytes for any workers."""
    load_tokenizer(options.tokenizer)
    paths = input_files(options.input)
    stats = [os.stat(path) for path in paths]
    writer = TokenWriter(options.output, {
        "input": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats)],
        "tokenizer": hashlib.sha256(Path(options.tokenizer).read_bytes()).hexdigest(),
        "append_eod": options.append_eod})
    done = writer.position or {"at": None, "read": 0, "subsets": [], "empty": 0, "malformed": 0}
    subsets = {name: i for i, name in enumerate(done["subsets"])}
    last_commit = time.monotonic()
    tasks = ((chunk, at, advance, options.append_eod)
             for chunk, at, advance in chunks(paths, done["at"]))
    with tqdm(total=sum(stat.st_size for stat in stats), initial=done["read"], unit="B",
              unit_scale=True, disable=None) as bar:
        for part in in_workers(encode_chunk, tasks, options.workers, _load, options.tokenizer):
            if part["malformed"] and not options.skip_malformed:
                writer.commit(done)
                raise ValueError(f"{part['malformed'][0]} (mend it, or pass --skip_malformed=True; "
                                 f"what was done before it is kept in {writer.folder})")
            provenance = np.empty(len(part["sizes"]), dtype=PROVENANCE)
            provenance["file"], provenance["line"] = part["file"], part["lines"]
            provenance["subset"] = [subsets.setdefault(name, len(subsets))
                                    for name in part["names"]]
            writer.append(part["tokens"], part["sizes"], provenance)
            done = {"at": part["at"], "read": done["read"] + part["advance"],
                    "subsets": list(subsets), "empty": done["empty"] + part["empty"],
                    "malformed": done["malformed"] + len(part["malformed"])}
            bar.update(part["advance"])
            if time.monotonic() - last_commit > 5:
                writer.commit(done)
                last_commit = time.monotonic()
    writer.commit(done)
    summary = writer.finish({"empty_documents": done["empty"], "malformed_lines": done["malformed"],
                             "append_eod": options.append_eod,
                             "subsets": list(subsets), "files": paths})
    print(f"{options.output}.bin: {summary['tokens']:,} tokens of {summary['documents']:,} "
          f"documents in {len(subsets)} subsets; skipped {done['empty']:,} empty documents, "
          f"{done['malformed']:,} bad lines")


def _load(path):
    global _tokenizer  # one a process: a Tokenizer cannot be sent between processes
    _tokenizer = Tokenizer(path)


def encode_chunk(chunk, at, advance, append_eod):
    """Return a chunk's tokens (uint16) and, of each document, size, line and subset's name.

    Also how many documents were empty, a message for each malformed line, and what tells where in
    the input the chunk ends.
    """
    end = [ENDOFTEXT] if append_eod else []
    tokens, lines, names, malformed, empty = [], [], [], [], 0
    for line, record in documents(chunk, malformed.append):
        try:
            ids = _tokenizer.encode_array(record["text"])
        except ValueError as error:  # a million blanks in a row are too many for tiktoken's pattern
            malformed.append(f"{chunk[1]}, line {line}: cannot be tokenized ({error})")
            continue
        if not len(ids):
            empty += 1
            continue
        tokens.append(np.concatenate((ids, end)).astype(np.uint16))
        lines.append(line)
        names.append(subset_name(record))
    return {"tokens": np.concatenate(tokens) if tokens else np.empty(0, np.uint16),
            "sizes": np.array([len(ids) for ids in tokens], dtype=np.int32), "lines": lines,
            "names": names, "empty": empty, "malformed": malformed,
            "file": chunk[0], "at": at, "advance": advance}


# ---------------------------------------------------------------------------- shuffle


@dataclass(frozen=True, kw_only=True)
class Shuffle(Order):
    output: str  # PREFIX of the token file to write


def shuffle(options):
    """Bake the order: write all steps' rows, in training order, as a token file of their own."""
    data = ordered(options)
    if data.preshuffled:
        raise ValueError(f"{options.data}: already in training order, every sequence is one row")
    data.tokens.require_uint16()
    if os.path.realpath(options.output) == os.path.realpath(data.tokens.prefix):
        raise ValueError(f"output = {options.output}: that is the input, name another")
    n_rows = min(options.steps * options.batch_size, len(data))
    job = {"data": data.tokens.prefix, "tokens": data.tokens.n_tokens,
           "order": data.settings, "rows": n_rows}
    writer = TokenWriter(options.output, job)
    done = writer.position or 0
    for start, rows in _row_blocks(data, done, n_rows, "write"):
        writer.append(rows, np.full(len(rows), rows.shape[1]))
        writer.position = start + len(rows)
        if writer.position % (1 << 18) == 0:
            writer.commit(writer.position)
    writer.finish({"baked_from": job})
    baked = OrderedData(options.output, options.seq_length, n_rows, options.seed)
    for start, rows in _row_blocks(data, 0, n_rows, "check"):
        wrong = np.flatnonzero((baked.rows(range(start, start + len(rows))) != rows).any(axis=1))
        if len(wrong):
            raise ValueError(f"{options.output}.bin: row {start + int(wrong[0]):,} is not the "
                             "order's: was a file changed meanwhile, or is the disk failing? "
                             "Delete it and try again")
    print(f"{options.output}.bin: {n_rows:,} rows of {options.seq_length + 1} tokens in "
          "training order, read back and equal")


def _row_blocks(data, first, stop, what, block=4096):
    """Yield (first row, rows) of a range in blocks, with a progress bar."""
    with tqdm(total=stop, initial=first, desc=what, unit="row", unit_scale=True,
              disable=None) as bar:
        for start in range(first, stop, block):
            rows = data.rows(range(start, min(start + block, stop)))
            yield start, rows
            bar.update(len(rows))


# ---------------------------------------------------------------------------- dedup

NGRAM = 5  # words
PERMUTATIONS = 128  # of MinHash: the similarity's standard error is at most 1 / (2 sqrt(128))


@dataclass(frozen=True)
class Dedup:
    input: str  # as for tokenize
    output: str  # .jsonl of the documents that stay; OUTPUT.removed.csv says what was removed
    # Jaccard similarity of the sets of words' 5-grams, as the deduplicated Pile's; 1: equal only
    threshold: float = 0.87

    def __post_init__(self):
        check(self, "more than 0, at most 1", lambda value: 0 < value <= 1, "threshold")


def dedup(options):
    """Remove equal and nearly equal documents; the first of each cluster stays."""
    # exact: digest of a text -> (who stands for it, kind, similarity)
    exact, kept, rows, clusters = {}, 0, [], {}
    similar = Near(options.threshold) if options.threshold < 1 else None
    paths, report = input_files(options.input), f"{options.output}.removed.csv"
    written = {os.path.realpath(options.output), os.path.realpath(report)}
    if written & {os.path.realpath(path) for path in paths}:
        raise ValueError(f"output = {options.output}: one of the inputs, name another")
    with (replacing(options.output) as output,
          tqdm(total=sum(os.path.getsize(path) for path in paths), unit="B", unit_scale=True,
               disable=None) as bar):
        for chunk, _, advance in chunks(paths):
            for line, record in documents(chunk, _refuse):
                place = f"{chunk[1]}:{line}"
                digest = hashlib.sha256(record["text"].encode("utf8", "surrogatepass")).digest()
                first, kind, similarity = exact.get(digest, (None, "near", 0.0))
                if first is None and similar:
                    first, similarity = similar.find_or_add(place, record["text"])
                if first is None:
                    kept += 1
                    output.write(json.dumps(record).encode() + b"\n")
                    exact[digest] = place, "equal", 1.0
                else:
                    clusters[first] = clusters.get(first, 1) + 1
                    rows.append((place, first, kind, f"{similarity:.3f}"))
                    exact[digest] = first, kind, similarity
            bar.update(advance)
        if not kept:
            raise ValueError(f"{options.input}: holds no documents")
    with replacing(report) as file:
        text = io.StringIO()
        csv.writer(text).writerows([("removed", "stands_for_it", "kind", "similarity"), *rows])
        file.write(text.getvalue().encode())
    equal = sum(row[2] == "equal" for row in rows)
    print(f"{options.output}: {kept:,} documents stay, {len(rows):,} removed ({equal:,} of them "
          f"equal), {len(clusters):,} clusters, the largest of "
          f"{max(clusters.values(), default=1):,}; {report}")


def _refuse(message):
    raise ValueError(message)


class Near:
    """MinHash LSH over documents that stay, by datasketch; candidates are held to the threshold.

    The weights prefer candidates too many to candidates missed: at similarity 0.87 it finds 88 % of
    the pairs, at 0.9 96 % (datasketch's own balance: 45 % and 68 %).
    """

    def __init__(self, threshold):
        try:
            import datasketch
        except ImportError:
            raise ValueError("near duplicates need datasketch: pip install datasketch; or "
                             "--threshold=1") from None
        self.datasketch, self.threshold, self.hashes = datasketch, threshold, {}
        self.index = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS,
                                           weights=(0.1, 0.9))

    def find_or_add(self, place, text):
        """Return (place of the most similar document that stays, similarity), or (None, 0) and keep
        this one.
        """
        words = text.split()
        minhash = self.datasketch.MinHash(num_perm=PERMUTATIONS, seed=1)
        minhash.update_batch({" ".join(words[i:i + NGRAM]).encode("utf8", "surrogatepass")
                              for i in range(max(1, len(words) - NGRAM + 1))})
        candidates = [(minhash.jaccard(self.hashes[key]), key) for key in self.index.query(minhash)]
        similarity, first = max(candidates, default=(0.0, None))
        if similarity >= self.threshold:
            return first, similarity
        self.index.insert(place, minhash)
        self.hashes[place] = minhash
        return None, 0.0


if __name__ == "__main__":
    command(sys.argv[1:], {"tokenize": (Tokenize, tokenize), "dedup": (Dedup, dedup),
                           "shuffle": (Shuffle, shuffle)})
