"""The write side of data.py: text to token files on all cores, and baked orders.

Long jobs build PREFIX.partial and move its files into place only when they are whole; a job that
was killed goes on from its last commit, and a file that exists is complete.

Equal and nearly equal documents removed, as the deduplicated Pile: MinHash LSH at Jaccard 0.87.

The command `dedup` of data.py. On one machine and in memory (about 1 kB a document that stays); the
README names a pipeline for more.
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

from config import command, replacing
from data import Order, ordered, OrderedData, PROVENANCE, TokenWriter
from tokenizer import ENDOFTEXT, load_tokenizer, Tokenizer


# ------------------------------------------------------------ pile/prepare.py


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
        os.stat(path)  # a missing file is known before the first one is read
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


def chunks(paths, position, size=1 << 20):
    """Yield (chunk, position after it, compressed bytes read) of whole lines, about `size` bytes.

    chunk: (file number, path, number of its first line, bytes). position: [file number, offset in
    the uncompressed text, line number] to go on from, or None. A .txt file is one chunk and one
    document.
    """
    first, offset, line = position or [0, 0, 1]
    for number in range(first, len(paths)):
        path = paths[number]
        stream, raw = open_text(path)
        try:
            with raw, stream:
                # A compressed file is read again up to where it goes on.
                skip = 0 if stream is raw else offset
                raw.seek(offset - skip)
                while skip and (skipped := len(stream.read(min(skip, size)))):
                    skip -= skipped
                if skip:
                    raise EOFError("shorter than when it was read before")
                before = raw.tell() if offset else 0
                while block := stream.read() if path.endswith(".txt") else (
                        stream.read(size) + stream.readline()):
                    chunk = (number, path, line, block)
                    offset, line = offset + len(block), line + block.count(b"\n")
                    before, advance = raw.tell(), raw.tell() - before
                    yield chunk, [number, offset, line], advance
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged or cut off near line {line} ({error})") from None
        offset, line = 0, 1


def documents(chunk, on_malformed):
    """Yield (line number, record with a string "text") of a chunk; on_malformed(message) is told of
    bad lines.
    """
    _, path, first, block = chunk
    if path.endswith(".txt"):
        lines = [(1, block)]
    else:
        lines = ((first + i, line) for i, line in enumerate(block.split(b"\n")) if line.strip())
    for number, line in lines:
        where = path if path.endswith(".txt") else f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf8")
            record = {"text": text} if path.endswith(".txt") else json.loads(text)
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
        if self.workers < 0:
            raise ValueError(f"workers = {self.workers}, expected 0 or more")


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
    with tqdm(total=sum(stat.st_size for stat in stats), initial=done["read"], unit="B",
              unit_scale=True, disable=None) as bar:
        results = encoded(chunks(paths, done["at"]), options)
        for (tokens, sizes, lines, names, empty, malformed), file_number, at, advance in results:
            if malformed and not options.skip_malformed:
                writer.commit(done)
                raise ValueError(f"{malformed[0]} (mend it, or pass --skip_malformed=True; what "
                                 f"was done before it is kept in {writer.folder})")
            provenance = np.empty(len(sizes), dtype=PROVENANCE)
            provenance["file"], provenance["line"] = file_number, lines
            provenance["subset"] = [subsets.setdefault(name, len(subsets)) for name in names]
            writer.append(tokens, sizes, provenance)
            done = {"at": at, "read": done["read"] + advance, "subsets": list(subsets),
                    "empty": done["empty"] + empty, "malformed": done["malformed"] + len(malformed)}
            bar.update(advance)
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


def encoded(tasks, options):
    """Yield (encode_chunk's result, file number, position, advance) of each chunk, in order.

    Workers run ahead by a bounded number of chunks, and results are taken in the chunks' order.
    """
    workers = options.workers or os.cpu_count()
    if workers == 1:
        _start_worker(options.tokenizer)
        for chunk, at, advance in tasks:
            yield encode_chunk(chunk, options.append_eod), chunk[0], at, advance
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (options.tokenizer,))
    waiting = deque()
    try:
        for chunk, at, advance in tasks:
            waiting.append((pool.submit(encode_chunk, chunk, options.append_eod),
                            chunk[0], at, advance))
            if len(waiting) > 3 * workers:
                future, *rest = waiting.popleft()
                yield future.result(), *rest
        while waiting:
            future, *rest = waiting.popleft()
            yield future.result(), *rest
    finally:
        # Waits for the chunks at work: Python's exit, coming first, can hit a closed pipe.
        pool.shutdown(cancel_futures=True)


def serve_parent():
    """Make a worker process leave Ctrl-C to its parent, and end when that is gone in any way."""
    if parent := parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        watch = lambda: (wait([parent.sentinel]), os._exit(1))
        threading.Thread(target=watch, daemon=True).start()


def _start_worker(path):
    global _tokenizer  # one a process: a Tokenizer cannot be sent between processes
    _tokenizer = Tokenizer(path)
    serve_parent()


def encode_chunk(chunk, append_eod):
    """Return a chunk's (tokens uint16, sizes int32, lines, subset names, empty documents, malformed
    lines).
    """
    end = [ENDOFTEXT] if append_eod else []
    tokens, lines, names, malformed, empty = [], [], [], [], 0
    for line, record in documents(chunk, malformed.append):
        try:
            ids = _tokenizer.encode_array(record["text"])
        # A million blanks in a row are more than tiktoken's pattern can take.
        except ValueError as error:
            malformed.append(f"{chunk[1]}, line {line}: cannot be tokenized ({error})")
            continue
        if not len(ids):
            empty += 1
            continue
        tokens.append(np.concatenate((ids, end)).astype(np.uint16))
        lines.append(line)
        names.append(subset_name(record))
    sizes = np.array([len(ids) for ids in tokens], dtype=np.int32)
    flat = np.concatenate(tokens) if tokens else np.empty(0, np.uint16)
    return flat, sizes, lines, names, empty, malformed


# ---------------------------------------------------------------------------- shuffle


@dataclass(frozen=True, kw_only=True)
class Shuffle(Order):
    output: str  # PREFIX of the token file to write
    check: bool = True  # afterwards read everything back and compare it with the order


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
    if options.check:
        baked = OrderedData(options.output, options.seq_length, n_rows, options.seed)
        for start, rows in _row_blocks(data, 0, n_rows, "check"):
            wrong = np.flatnonzero((baked.rows(range(start, start + len(rows)))
                                    != rows).any(axis=1))
            if len(wrong):
                raise ValueError(f"{options.output}.bin: row {start + int(wrong[0]):,} is not the "
                                 "order's: was a file changed meanwhile, or is the disk failing? "
                                 "Delete it and try again")
    print(f"{options.output}.bin: {n_rows:,} rows of {options.seq_length + 1} tokens in "
          "training order" + (", read back and equal" if options.check else ""))


def _row_blocks(data, first, stop, what, block=4096):
    """Yield (first row, rows) of a range in blocks, with a progress bar."""
    with tqdm(total=stop, initial=first, desc=what, unit="row", unit_scale=True,
              disable=None) as bar:
        for start in range(first, stop, block):
            rows = data.rows(range(start, min(start + block, stop)))
            yield start, rows
            bar.update(len(rows))


# ------------------------------------------------------------ pile/dedup.py


@dataclass(frozen=True)
class Dedup:
    input: str  # as for tokenize
    output: str  # .jsonl of the documents that stay, in their order
    # CSV of what was removed and which document stands for it; default OUTPUT.removed.csv
    report: str = ""
    near: bool = True  # also near duplicates; False: equal texts only
    # Jaccard similarity of the sets of words' n-grams, as the deduplicated Pile's
    threshold: float = 0.87
    ngram: int = 5  # words
    # of MinHash: the similarity's standard error is at most 1 / (2 sqrt(permutations))
    permutations: int = 128

    def __post_init__(self):
        if not (0 < self.threshold <= 1 and self.ngram >= 1 and self.permutations >= 16):
            raise ValueError(f"threshold = {self.threshold}, ngram = {self.ngram}, permutations = "
                             f"{self.permutations}: expected 0 < threshold <= 1, ngram >= 1, "
                             "permutations >= 16")


def dedup(options):
    """Remove equal and nearly equal documents; the first of each cluster stays."""
    # exact: digest of a text -> (who stands for it, kind, similarity)
    exact, kept, rows, clusters = {}, 0, [], {}
    similar = _Near(options) if options.near else None
    paths = input_files(options.input)
    report = options.report or f"{options.output}.removed.csv"
    if ({os.path.realpath(options.output), os.path.realpath(report)}
            & set(map(os.path.realpath, paths))):
        raise ValueError(f"output = {options.output}, report = {report}: one of the inputs, name "
                         "another")
    with (replacing(options.output) as output,
          tqdm(total=sum(map(os.path.getsize, paths)), unit="B", unit_scale=True,
               disable=None) as bar):
        for chunk, _, advance in chunks(paths, None):
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


class _Near:
    """MinHash LSH over documents that stay, by datasketch; candidates are held to the threshold.

    The weights prefer candidates too many to candidates missed: at similarity 0.87 it finds 88 % of
    the pairs, at 0.9 96 % (datasketch's own balance: 45 % and 68 %).
    """

    def __init__(self, options):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ValueError("near duplicates need datasketch: pip install datasketch; or "
                             "--near=False") from None
        self.options, self.hashes = options, {}
        self.minhash = lambda: MinHash(num_perm=options.permutations, seed=1)
        self.index = MinHashLSH(threshold=options.threshold, num_perm=options.permutations,
                                weights=(0.1, 0.9))

    def find_or_add(self, place, text):
        """Return (place of the most similar document that stays, similarity), or (None, 0) and keep
        this one.
        """
        words, n = text.split(), self.options.ngram
        minhash = self.minhash()
        minhash.update_batch({" ".join(words[i:i + n]).encode("utf8", "surrogatepass")
                              for i in range(max(1, len(words) - n + 1))})
        candidates = [(minhash.jaccard(self.hashes[key]), key) for key in self.index.query(minhash)]
        similarity, first = max(candidates, default=(0.0, None))
        if similarity >= self.options.threshold:
            return first, similarity
        self.index.insert(place, minhash)
        self.hashes[place] = minhash
        return None, 0.0


if __name__ == "__main__":
    command(sys.argv[1:], {"tokenize": (Tokenize, tokenize), "dedup": (Dedup, dedup),
                           "shuffle": (Shuffle, shuffle)})
