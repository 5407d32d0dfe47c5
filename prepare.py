"""Text to token files on all cores; duplicates removed; the order baked into a file.

    python prepare.py tokenize --input=a.jsonl,b.txt --output=data/train
    python prepare.py dedup    --input='pile/*.jsonl.zst' --output=deduped.jsonl
    python prepare.py shuffle  --data=data/train --output=data/preshuffled --steps=143000

Long jobs build PREFIX.partial and move its files into place only when they are whole; a job that
was killed goes on from its last commit. `dedup` removes equal documents and nearly equal ones by
MinHash at Jaccard 0.87, as the deduplicated Pile. It works in memory, about 1 kB a document that
stays; for more see datatrove's MinHash, whose .jsonl.gz are an --input of `tokenize`.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import command, csv_lines, file_size, replacing
from data import Order, TokenWriter, fingerprint, ordered
from tokenizer import ENDOFTEXT, load_tokenizer

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
LONGEST = 64 << 20  # bytes of a line or a .txt file; a single word of so many takes 3.5 GB

# ---------------------------------------------------------------------------- reading text


def input_files(spec):
    """Return the files that comma-separated files, folders and globs name, each once, in order."""
    paths = {}
    for item in spec.split(","):
        path = Path(item)
        if os.path.isdir(item):
            found = path.rglob("*")
        elif os.path.exists(item):
            found = [path]
        else:  # pathlib's ** follows no links, which may form circles
            found = Path(path.anchor).glob(str(path.relative_to(path.anchor))) if item else ()
        found = sorted(str(file) for file in found
                       if file.name.endswith(SUFFIXES) and not file.is_dir())
        if not found:
            raise ValueError(f"{item}: no {', '.join(SUFFIXES)} files there")
        for path in found:
            file_size(path)  # raises now if it is no file, not hours later
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def uncompressed(path, raw):
    """Yield an open file's bytes, uncompressed, in bounded pieces."""
    if path.endswith(".gz"):
        new_frame = partial(zlib.decompressobj, zlib.MAX_WBITS | 16)
    elif path.endswith(".zst"):
        from zstandard import ZstdDecompressor
        new_frame = ZstdDecompressor().decompressobj
    else:
        yield from iter(partial(raw.read, 1 << 20), b"")
        return
    frame = None
    while block := raw.read(1 << 10):  # of zeros, 1 kB of zstandard holds 32 MB
        while block:
            frame = frame or new_frame()
            try:
                yield frame.decompress(block)
            except Exception as error:  # zlib.error or zstandard.ZstdError
                raise ValueError(f"damaged ({error})") from None
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise ValueError("cut off: its last frame is incomplete")


def blocks(pieces, size):
    """Cut pieces into blocks of whole lines; each ends with the first line after `size` bytes."""
    block = bytearray()
    for piece in pieces:
        searched = len(block)
        block += piece
        while end := block.find(b"\n", max(searched, size)) + 1:
            yield bytes(block[:end])
            del block[:end]
            searched = 0
        if len(block) > LONGEST:
            raise ValueError(f"a document of over {LONGEST >> 20} MiB; cut it into several")
    if block:
        yield bytes(block)


def chunks(paths, position=(0, 0), size=1 << 19):
    """Yield (chunk, position after it, compressed bytes read): whole lines of `size` bytes or more.

    chunk: (file number, path, number of its first line, bytes). position: (file number, chunks of
    it that are done) to go on from. A .txt file is one chunk and one document.
    """
    first, done = position
    read = sum(map(os.path.getsize, paths[:first]))
    for number, path in enumerate(paths[first:], first):
        line, least = 1, sys.maxsize if path.endswith(".txt") else size
        try:
            with open(path, "rb") as raw:
                for i, block in enumerate(blocks(uncompressed(path, raw), least), 1):
                    if i > done:
                        yield (number, path, line, block), (number, i), read + raw.tell()
                    line += block.count(b"\n")
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read from line {line} on: {error}") from None
        read, done = read + os.path.getsize(path), 0


def documents(chunk, skip_malformed=False):
    """Yield (line number, record with a string "text") of a chunk; None for a record to skip."""
    _, path, first, block = chunk
    is_text = path.endswith(".txt")
    for number, line in enumerate([block] if is_text else block.split(b"\n"), first):
        try:
            text = line.decode("utf-8-sig")
            if not is_text and not text.strip():
                continue
            record = {"text": text} if is_text else json.loads(text)
            record["text"].encode()  # a lone surrogate, which JSON can name, is no text
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if not skip_malformed:
                raise ValueError(
                    f"{path}, line {number}: expected UTF-8, and in .jsonl an object with a string "
                    f'"text" ({error}); tokenize --skip_malformed=True leaves it out') from None
            record = None
        yield number, record


def subset_name(record):
    """Return a record's pile_set_name, where the Pile ("meta"), datatrove ("metadata") puts it."""
    meta = record.get("meta") or record.get("metadata")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) and name.isprintable() else "unnamed"


progress = partial(tqdm, unit="B", unit_scale=True, disable=None)  # of bytes, on a terminal

# ---------------------------------------------------------------------------- worker processes


def in_workers(function, tasks, workers, start, *arguments):
    """Yield function(*task) of each task, in order, from `workers` processes (0: one a core).

    start(*arguments) comes first in each. They are a bounded number of tasks ahead. One worker is
    this process.
    """
    workers = workers or os.cpu_count()
    if workers == 1:
        start(*arguments)
        for task in tasks:
            yield function(*task)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (start, *arguments))
    ahead = deque()
    try:
        for task in tasks:
            ahead.append(pool.submit(function, *task))
            if len(ahead) > 3 * workers:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()
    except BrokenExecutor:
        raise ValueError("a worker process was killed: fewer --workers take less memory") from None
    finally:
        # Wait for the tasks at work. If Python exits before them, it can write to a closed pipe.
        pool.shutdown(cancel_futures=True)


def _begin(start, *arguments):
    """Begin a worker process, which leaves Ctrl-C to its parent and ends whenever that is gone."""
    def end_with_parent():
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    start(*arguments)


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


def tokenize(options):
    """Turn text into a token file, a sequence a document, in order; same bytes for any workers."""
    load_tokenizer(options.tokenizer)
    paths = input_files(options.input)
    files = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]
    writer = TokenWriter(options.output, {"input": files, "append_eod": options.append_eod})
    done = writer.position or {"at": (0, 0), "subsets": [], "skipped": {}}
    subsets = {name: i for i, name in enumerate(done["subsets"])}
    skipped = Counter(done["skipped"])
    tasks = ((*task, options) for task in chunks(paths, done["at"]))
    with progress(total=sum(map(os.path.getsize, paths))) as bar:
        for at, read, tokens, sizes, places, more_skipped in in_workers(
                encode_chunk, tasks, options.workers, load_tokenizer, options.tokenizer):
            documents = [(file, line, subsets.setdefault(name, len(subsets)))
                         for file, line, name in places]
            skipped.update(more_skipped)
            writer.append(tokens, sizes, documents,
                          {"at": at, "subsets": list(subsets), "skipped": skipped})
            bar.update(read - bar.n)
    empty, malformed = skipped["empty"], skipped["malformed"]
    summary = writer.finish({
        "empty_documents": empty, "malformed_lines": malformed, "append_eod": options.append_eod,
        "subsets": list(subsets), "files": paths})
    print(f"{options.output}.bin: {summary['tokens']:,} tokens of {summary['documents']:,} "
          f"documents in {len(subsets)} subsets; skipped {empty:,} empty documents, "
          f"{malformed:,} bad lines")


def encode_chunk(chunk, at, read, options):
    """Return (at, read, tokens, sizes, [(file number, line, subset's name)], what was skipped)."""
    tokenizer, end = load_tokenizer(options.tokenizer), [ENDOFTEXT] * options.append_eod
    encoded, places, skipped = [np.empty(0, np.uint16)], [], Counter()
    for line, record in documents(chunk, options.skip_malformed):
        ids = tokenizer.encode_array(record["text"]) if record else []
        if len(ids):
            encoded.append(np.concatenate((ids, end)).astype(np.uint16))
            places.append((chunk[0], line, subset_name(record)))
        else:
            skipped["empty" if record else "malformed"] += 1
    return at, read, np.concatenate(encoded), list(map(len, encoded[1:])), places, skipped


# ---------------------------------------------------------------------------- shuffle


@dataclass(frozen=True, kw_only=True)
class Shuffle(Order):
    output: str  # PREFIX of the token file to write


def shuffle(options):
    """Bake the order: write all steps' rows, in training order, as a token file of their own."""
    data = ordered(options, unshuffled=True)
    if os.path.realpath(options.output) == os.path.realpath(data.tokens.prefix):
        raise ValueError(f"output = {options.output}: that is the input, name another")
    n_rows = min(options.steps * options.batch_size, len(data))
    job = {"data": data.tokens.prefix, "tokens": data.tokens.n_tokens, "order": data.settings,
           "rows": n_rows, "sha256": fingerprint(data.tokens.paths)}
    writer = TokenWriter(options.output, job)
    for start in tqdm(range(writer.position or 0, n_rows, 4096), unit=" * 4096 rows", disable=None):
        rows = data.rows(range(start, min(start + 4096, n_rows)))
        writer.append(rows, np.full(len(rows), rows.shape[1]), position=start + len(rows))
    writer.finish({"baked_from": job})
    print(f"{options.output}.bin: {n_rows:,} rows of {options.seq_length + 1} tokens in "
          "training order")


# ---------------------------------------------------------------------------- dedup

NGRAM = 5  # words
PERMUTATIONS = 128  # of MinHash: the similarity's standard error is at most 1 / (2 sqrt(128))


@dataclass(frozen=True)
class Dedup:
    input: str  # as for tokenize
    output: str  # .jsonl of the documents that stay; OUTPUT.removed.csv says what was removed
    # Jaccard similarity of the sets of words' 5-grams, as the deduplicated Pile's; 1: equal only
    threshold: float = 0.87


def dedup(options):
    """Remove equal and nearly equal documents; the first of each cluster stays."""
    paths, report = input_files(options.input), f"{options.output}.removed.csv"
    inputs = set(map(os.path.realpath, paths))
    if (not options.output.endswith(".jsonl") or os.path.realpath(options.output) in inputs
            or os.path.exists(options.output) and not os.path.exists(report)):
        raise ValueError(f"output = {options.output}, expected a .jsonl, none of the inputs, that "
                         "is new or was written by this command (with a .removed.csv)")
    known, counts = {}, Counter()  # known: {digest of a text that stays: its place}
    near = Near(options.threshold) if options.threshold != 1 else None
    with (replacing(options.output) as output, replacing(report) as file,
          progress(total=sum(map(os.path.getsize, paths))) as bar):
        file.write(b"removed,stands_for_it,kind,similarity\n")
        for chunk, _, read in chunks(paths):
            for line, record in documents(chunk):
                place = f"{chunk[1]}:{line}"
                digest = hashlib.sha256(record["text"].encode()).digest()
                first, kind, similarity = known.get(digest), "equal", 1.0
                if not first and near:
                    (first, similarity), kind = near.find_or_add(place, record["text"]), "near"
                if first:
                    file.write(csv_lines([(place, first, kind, f"{similarity:.3f}")]))
                    counts[kind] += 1
                else:
                    known[digest] = place
                    output.write(json.dumps(record).encode() + b"\n")
                    counts["stay"] += 1
            bar.update(read - bar.n)
        if not counts:
            raise ValueError(f"{options.input}: holds no documents")
    print(f"{options.output}: {counts['stay']:,} documents stay; removed {counts['equal']:,} equal "
          f"and {counts['near']:,} nearly equal ones, see {report}")


class Near:
    """MinHash LSH over documents that stay, by datasketch; candidates are held to the threshold."""

    def __init__(self, threshold):
        from datasketch import MinHash, MinHashLSH
        self.threshold, self.hashes = threshold, {}
        self.new_hash = partial(MinHash, PERMUTATIONS, seed=1)
        # These weights find 88 % of the pairs of similarity 0.87 (datasketch's own balance: 45 %).
        self.index = MinHashLSH(threshold, PERMUTATIONS, weights=(0.1, 0.9))

    def find_or_add(self, place, text, block=10_000):
        """Return (most similar document that stays, similarity), or (None, 0): this one stays."""
        words, minhash = text.split(), self.new_hash()
        count = max(1, len(words) - NGRAM + 1)
        for start in range(0, count, block):  # each n-gram takes 1 kB
            minhash.update_batch({" ".join(words[i:i + NGRAM]).encode()
                                  for i in range(start, min(start + block, count))})
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
