"""Turn text into token files on all cores, remove duplicates, write the order out as a file.

    python prepare.py tokenize --input=a.jsonl,b.txt --output=data/train
    python prepare.py dedup    --input='pile/*.jsonl.zst' --output=deduped.jsonl
    python prepare.py shuffle  --data=data/train --output=data/preshuffled --steps=143000

`tokenize` and `shuffle` build their files in PREFIX.partial and move them into place when they are
whole; the same command continues a job that was killed. `dedup` removes equal documents, and nearly
equal ones by MinHash at a Jaccard similarity of 0.87, as for the deduplicated Pile. Each document
that stays takes about 1 kB of memory; if that is too much, use datatrove's MinHash, whose .jsonl.gz
files `tokenize` reads.
"""

import gzip
import hashlib
import io
import json
import os
import signal
import sys
import threading
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from config import check, command, csv_lines, file_size, replacing
from data import Order, TokenWriter, fingerprint, ordered
from tokenizer import ENDOFTEXT, load_tokenizer

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
LONGEST = 64 << 20  # bytes of a line or a .txt file; to tokenize a word of that length takes 3.5 GB

# ---------------------------------------------------------------------------- reading text


def input_files(spec):
    """Return the files that comma-separated files, folders and globs name, each once, in order."""
    paths = {}
    for item in spec.split(","):
        path = Path(item)
        if os.path.isdir(item):
            found = path.rglob("*")
        elif os.path.exists(item) or not item:
            found = [path]
        else:  # unlike glob's, pathlib's ** follows no links, which may form circles
            found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        found = sorted(str(file) for file in found
                       if file.name.endswith(SUFFIXES) and not file.is_dir())
        if not found:
            raise ValueError(f"{item}: no {', '.join(SUFFIXES)} files there")
        for path in found:
            file_size(path)  # if it is not a file, this raises now instead of hours later
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def read_pieces(path, bar):
    """Yield the bytes of a file, uncompressed, in pieces of at most 32 MB."""
    with open(path, "rb") as file:
        raw = CallbackIOWrapper(bar.update, file)
        if not path.endswith(".zst"):
            file = gzip.open(raw) if path.endswith(".gz") else raw
            yield from iter(partial(file.read, 1 << 20), b"")
            return
        from zstandard import ZstdDecompressor
        frame = None  # a file may have several; zstandard's own reader accepts one that is cut off
        while data := raw.read(1 << 10):  # 1 kB can hold 32 MB of zeros
            while data:
                frame = frame or ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
                if frame.eof:
                    frame = None
        if frame:
            raise ValueError("cut off: its last frame is incomplete")


def read_lines(path, bar):
    """Yield (number, line) of a file, uncompressed; all of a .txt file is one line."""
    number, line, is_text = 1, bytearray(), path.endswith(".txt")
    try:
        for piece in read_pieces(path, bar):
            for part in [piece] if is_text else io.BytesIO(piece):
                line += part
                if len(line) > LONGEST:
                    raise ValueError(f"a document of over {LONGEST >> 20} MiB; cut it into several")
                if part.endswith(b"\n") and not is_text:
                    yield number, line
                    number, line = number + 1, bytearray()
        if line:
            yield number, line
    except Exception as error:  # OSError, or whatever a decompressor raises
        raise ValueError(f"{path}: cannot be read from line {number} on: {error}") from None


def read_all(paths, done=(0, 0)):
    """Yield (file number, path, line number, line) of all files, with a progress bar.

    done: (file number, line number) of the last line to skip.
    """
    first, sizes = done[0], list(map(os.path.getsize, paths))
    with progress(total=sum(sizes), initial=sum(sizes[:first])) as bar:
        for file, path in enumerate(paths[first:], first):
            for number, line in read_lines(path, bar):
                if (file, number) > tuple(done):
                    yield file, path, number, line


def documents(lines, skip_malformed=False):
    """Yield (file number, path, line number, record) of read_all's lines; None if malformed."""
    for file, path, number, line in lines:
        try:
            text = line.decode("utf-8-sig")
            record = {"text": text} if path.endswith(".txt") else json.loads(text)
            record["text"].encode()  # fails if it is no string or has a lone surrogate
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if not line.strip():
                continue
            if not skip_malformed:
                raise ValueError(f"{path}, line {number}: expected UTF-8, and in .jsonl an object "
                                 f'with a string "text" ({error}); tokenize leaves it out with '
                                 "--skip_malformed=True") from None
            record = None
        yield file, path, number, record


def subset_name(record):
    """Return a record's pile_set_name, where the Pile ("meta"), datatrove ("metadata") puts it."""
    meta = record.get("meta") or record.get("metadata")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) and name.isprintable() else "unnamed"


progress = partial(tqdm, unit="B", unit_scale=True, disable=None)  # shown on a terminal only

# ---------------------------------------------------------------------------- worker processes


def in_workers(function, tasks, workers, start, *arguments):
    """Yield function(*task) of each task, in order, computed by worker processes.

    workers: how many; 0: one a core; 1: this process does it all. Each first calls
    start(*arguments). Only a few tasks a worker are read ahead, which bounds the memory.
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
        # This waits for running tasks, which could write to a closed pipe if Python exited first.
        pool.shutdown(cancel_futures=True)


def _begin(start, *arguments):
    """Start a worker process, which ignores Ctrl-C and ends when its parent process is gone."""
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
    # <|endoftext|> after every document; the published deduplicated Pile has none
    append_eod: bool = True
    skip_malformed: bool = False  # count and skip malformed lines instead of stopping at the first
    workers: int = 0  # processes; 0: one a core


def tokenize(options):
    """Turn text into a token file: a sequence a document, in the order of the input."""
    load_tokenizer(options.tokenizer)
    paths = input_files(options.input)
    files = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]
    writer = TokenWriter(options.output, {"input": files, "append_eod": options.append_eod})
    done, subsets, skipped = writer.position or ((0, 0), {}, {})  # subsets: {name: number}
    skipped = Counter(skipped)
    tasks = ((chunk, options) for chunk in chunks(read_all(paths, done)))
    for done, tokens, sizes, places, more_skipped in in_workers(
            encode_chunk, tasks, options.workers, load_tokenizer, options.tokenizer):
        places = [(file, line, subsets.setdefault(name, len(subsets)))
                  for file, line, name in places]
        skipped.update(more_skipped)
        writer.append(tokens, sizes, places, (done, subsets, skipped))
    summary = writer.finish({
        "empty_documents": skipped["empty"], "malformed_lines": skipped["malformed"],
        "append_eod": options.append_eod, "subsets": list(subsets), "files": paths})
    print(f"{options.output}.bin: {summary['tokens']:,} tokens of {summary['documents']:,} "
          f"documents in {len(subsets)} subsets; skipped {skipped['empty']:,} empty documents, "
          f"{skipped['malformed']:,} malformed lines")


def chunks(lines, size=1 << 19):
    """Yield lists of read_all's lines, of at least `size` bytes each."""
    chunk, n_bytes = [], 0
    for line in lines:
        chunk.append(line)
        n_bytes += len(line[-1])
        if n_bytes >= size:
            yield chunk
            chunk, n_bytes = [], 0
    if chunk:
        yield chunk


def encode_chunk(lines, options):
    """Return (last line's place, tokens, sizes, [(file number, line, subset)], skipped lines)."""
    tokenizer, end = load_tokenizer(options.tokenizer), [ENDOFTEXT] * options.append_eod
    encoded, places, skipped = [np.empty(0, np.uint16)], [], Counter()
    for file, _, number, record in documents(lines, options.skip_malformed):
        ids = tokenizer.encode_array(record["text"]) if record else []
        if len(ids):
            encoded.append(np.concatenate((ids, end)).astype(np.uint16))
            places.append((file, number, subset_name(record)))
        else:
            skipped["empty" if record else "malformed"] += 1
    file, _, number, _ = lines[-1]
    return (file, number), np.concatenate(encoded), list(map(len, encoded[1:])), places, skipped


# ---------------------------------------------------------------------------- shuffle


@dataclass(frozen=True, kw_only=True)
class Shuffle(Order):
    output: str  # PREFIX of the token file to write


def shuffle(options):
    """Bake the order: write the rows of all steps, in training order, as a token file."""
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
    # Jaccard similarity of two documents' sets of 5-grams of words; 1: only equal documents
    threshold: float = 0.87

    def __post_init__(self):
        check(self, "more than 0, at most 1", lambda value: 0 < value <= 1, "threshold")


def dedup(options):
    """Remove equal and nearly equal documents; the first of each cluster stays."""
    paths, report = input_files(options.input), f"{options.output}.removed.csv"
    if not options.output.endswith(".jsonl") or any(map(os.path.lexists, (options.output, report))):
        raise ValueError(f"output = {options.output}, expected a .jsonl that does not exist yet, "
                         f"nor {report}; move what is there away or name another")
    kept, counts = Kept(options.threshold), Counter()
    with replacing(options.output) as output, replacing(report) as file:
        file.write(b"removed,stands_for_it,kind,similarity\n")
        for _, path, line, record in documents(read_all(paths)):
            place = f"{path}:{line}"
            first, kind, similarity = kept.find_or_add(place, record["text"])
            counts[kind] += 1
            if first:
                file.write(csv_lines([(place, first, kind, f"{similarity:.3f}")]))
            else:
                output.write(json.dumps(record).encode() + b"\n")
        if not counts:
            raise ValueError(f"{options.input}: holds no documents")
    print(f"{options.output}: {counts['new']:,} documents stay; removed {counts['equal']:,} equal "
          f"and {counts['near']:,} nearly equal ones, see {report}")


class Kept:
    """The documents that stay, indexed by SHA-256 and by datasketch's MinHash LSH."""

    def __init__(self, threshold):
        self.threshold, self.places, self.hashes = threshold, {}, {}
        if threshold != 1:
            from datasketch import MinHash, MinHashLSH
            self.new_hash = partial(MinHash, PERMUTATIONS, seed=1)
            # With these weights 88 % of the pairs of similarity 0.87 become candidates
            # (datasketch's own weights: 45 %); the threshold then decides.
            self.index = MinHashLSH(threshold, PERMUTATIONS, weights=(0.1, 0.9))

    def find_or_add(self, place, text, block=10_000):
        """Return (place of the document that this one repeats, "equal" or "near", similarity).

        A document that repeats none is added: (None, "new", 0).
        """
        digest = hashlib.sha256(text.encode()).digest()
        if digest in self.places:
            return self.places[digest], "equal", 1.0
        if self.threshold != 1:
            words, minhash = text.split(), self.new_hash()
            count = max(1, len(words) - NGRAM + 1)
            for start in range(0, count, block):  # each n-gram takes 1 kB
                minhash.update_batch({" ".join(words[i:i + NGRAM]).encode()
                                      for i in range(start, min(start + block, count))})
            candidates = [(minhash.jaccard(self.hashes[key]), key)
                          for key in self.index.query(minhash)]
            similarity, first = max(candidates, default=(0.0, None))
            if similarity >= self.threshold:
                return first, "near", similarity
            self.index.insert(place, minhash)
            self.hashes[place] = minhash
        self.places[digest] = place
        return None, "new", 0.0


if __name__ == "__main__":
    command(sys.argv[1:], {"tokenize": (Tokenize, tokenize), "dedup": (Dedup, dedup),
                           "shuffle": (Shuffle, shuffle)})
