"""Megatron token files, gpt-neox's order of the training data, and the batch of any step.

    python data.py order --data=data/train --steps=143000 --batch_size=1024 [--report=71500]

PREFIX.bin holds the tokens of all documents, little-endian, one after the other, without a header.
The published files are cut into NN + 1 shards, PREFIX-00000-of-000NN.bin and so on.
PREFIX.idx, little-endian, unaligned (gpt-neox v1.0, megatron/data/indexed_dataset.py):

    offset   bytes  content
    0        9      "MMIDIDX" and two zero bytes
    9        8      uint64 version, 1
    17       1      uint8 dtype code, 8 for uint16 (vocabularies of under 65,500 entries)
    18       8      uint64 S, number of sequences (documents)
    26       8      uint64 Dn, number of doc_idx entries, S + 1
    34       4 S    int32 sizes, tokens of each sequence
    34+4S    8 S    int64 pointers, byte offset of each sequence in PREFIX.bin
    34+12S   8 Dn   int64 doc_idx, first sequence of each document: 0, 1, ..., S

`prepare.py tokenize` also writes PREFIX.json (names, counts) and PREFIX_documents.npy (the subset,
source file and line of each document). `prepare.py shuffle` writes a "preshuffled" token file, as
the published one: each sequence is a row of seq_length + 1 tokens, and they are in training order.
"""

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import struct
import sys
import time
from bisect import bisect_right
from dataclasses import dataclass, fields
from functools import partial
from glob import escape, glob
from itertools import accumulate
from pathlib import Path

import numpy as np

from config import (check, command, expecting, file_size, lock, read_json, replacing, sha256_of,
                    write_json)

MAGIC = b"MMIDIDX\0\0" + struct.pack("<QB", 1, 8)  # including the version and the dtype code
HEADER = struct.Struct("<18sQQ")  # MAGIC, S, Dn
MASKED = -100  # marks padding in a row that an intervention changed; it has no loss
# An entry of PREFIX_documents.npy; the names of files and subsets are in PREFIX.json.
PROVENANCE = np.dtype([("file", "<u4"), ("line", "<u4"), ("subset", "<u4")])

# ---------------------------------------------------------------------------- reading token files


class TokenFile:
    """Memory-mapped reader of PREFIX.idx and .bin: len() documents, read(document, start, stop).

    paths: the index, then the files of tokens. n_tokens: in all documents together. equal_length:
    the length of every document, judged by 1000 of them and their sum, or 0 if lengths differ.
    Raises ValueError, naming the file, if one is missing, damaged or does not belong to the other.
    """

    def __init__(self, prefix):
        self.prefix = str(prefix).removesuffix(".bin").removesuffix(".idx")
        idx = f"{self.prefix}.idx"
        n_bytes = file_size(idx)
        with expecting(idx, "a whole Megatron index of version 1 and uint16 tokens"):
            with open(idx, "rb") as file:
                magic, n, doc_idx_entries = HEADER.unpack(file.read(HEADER.size))
            if magic != MAGIC or not n or n_bytes != HEADER.size + 12 * n + 8 * doc_idx_entries:
                raise ValueError(f"{n_bytes:,} bytes that start with {magic!r}")
            self.sizes = np.memmap(idx, "<i4", "r", HEADER.size, (n,))
            self.pointers = np.memmap(idx, "<i8", "r", HEADER.size + 4 * n, (n,))
        # Positions are Python integers or int64, since the Pile's 600 GB do not fit 32 bits.
        self.n_tokens = int(self.pointers[-1]) // 2 + int(self.sizes[-1])
        length = int(self.sizes[0])
        some_differ = (self.sizes[::n // 1000 + 1] != length).any()
        self.equal_length = 0 if some_differ or self.n_tokens != n * length else length
        shards = [f"{self.prefix}.bin"]
        some = glob(f"{escape(self.prefix)}-?????-of-{5 * '[0-9]'}.bin")
        if some and not os.path.exists(shards[0]):
            last = max(some)[-9:-4]  # every shard from 00000 to this one must be there
            shards = [f"{self.prefix}-{i:05}-of-{last}.bin" for i in range(int(last) + 1)]
        n_bytes = sum(map(file_size, shards))
        if not 0 < n_bytes == 2 * self.n_tokens:
            raise ValueError(f"{shards[-1]}: {n_bytes:,} bytes up to its end, but {idx} describes "
                             f"{2 * self.n_tokens:,}: truncated, incomplete or of another index")
        # Plain arrays over the memory maps: slicing a np.memmap takes ten times as long.
        self.shards = [np.asarray(np.memmap(path, "<u2", "r")) for path in shards]
        self.bounds = [0, *accumulate(map(len, self.shards))]  # first token of each shard; the end
        self.paths = [idx, *shards]

    def __len__(self):
        return len(self.sizes)

    def read(self, document, start=0, stop=None):
        """Return tokens start..stop (None: the end) of a document, uint16."""
        size, first = int(self.sizes[document]), int(self.pointers[document]) // 2
        stop = size if stop is None else stop
        if not (0 <= start <= stop <= size and 0 <= first <= self.n_tokens - size):
            raise ValueError(f"{self.prefix}.idx: damaged at document {document}: pointer "
                             f"{2 * first}, size {size}, but tokens {start}..{stop} are needed")
        return self.slice(first + start, first + stop)

    def slice(self, first, stop):
        """Return tokens first..stop of the whole file, whatever shards they lie in."""
        shard = bisect_right(self.bounds, first, hi=len(self.shards)) - 1
        begin, end = self.bounds[shard:shard + 2]
        tokens = self.shards[shard][first - begin:stop - begin]
        return tokens if stop <= end else np.concatenate((tokens, self.slice(end, stop)))


def read_notes(prefix):
    """Return the object in PREFIX.json, which names every input file; {} if there is none."""
    path = f"{prefix}.json"
    return read_json(path, 64 << 20) if os.path.exists(path) else {}


def fingerprint(paths):
    """Return one SHA-256 (hex) of several files: equal for equal files, wherever they are.

    Files under 1 GB are read whole. Of larger ones, 2048 blocks of 4 KB are read, spread evenly:
    enough to notice that a file was replaced, tokenized again, shifted or cut, but not that single
    tokens were edited (`train.py --check_data=True` reads all of it).
    """
    digest, n_blocks = hashlib.sha256(), 2048 // len(paths) + 1
    for path in paths:
        size, length = os.path.getsize(path), 1 << 20
        starts = range(0, size, length)
        if size >= 10**9:
            where = np.arange(n_blocks) + np.random.RandomState(0).rand(n_blocks)
            starts, length = (where / n_blocks * size).astype(np.int64).tolist(), 4096
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb", buffering=0) as file:
            for start in starts:
                digest.update(os.pread(file.fileno(), length, start))
    return digest.hexdigest()


def check_whole(prefix):
    """Raise ValueError unless every byte of PREFIX.bin and .idx is what `tokenize` wrote."""
    prefix = TokenFile(prefix).prefix
    with expecting(f"{prefix}.json", "what `prepare.py tokenize` wrote; published files are "
                                     "checked by `sha256sum -c`"):
        expected = [(name, read_notes(prefix)["sha256"][name]) for name in ("bin", "idx")]
    for name, digest in expected:
        if sha256_of(f"{prefix}.{name}") != digest:
            raise ValueError(f"{prefix}.{name}: SHA-256 is not that of {prefix}.json, {digest}: "
                             "the data changed since they were tokenized")


# ---------------------------------------------------------------------------- writing token files


class TokenWriter:
    """Writes PREFIX.bin, .idx, .json and _documents.npy, which are built in PREFIX.partial.

    job: a JSON value that describes the job. If a killed run of the same job left a PREFIX.partial,
    writing continues after its last commit, and `position` is the one recorded there. Otherwise
    writing starts from scratch, and `position` is None.
    """

    PARTS = {"bin": np.dtype("<u2"), "sizes": np.dtype("<i4"), "documents": PROVENANCE}

    def __init__(self, prefix, job):
        self.prefix, self.folder, self.job = str(prefix), Path(f"{prefix}.partial"), job
        if self.prefix.endswith(("/", ".bin", ".idx")):
            raise ValueError(f"output = {prefix}: expected a PREFIX, to which .bin is added")
        ours = {"documents", "tokens"} <= read_notes(prefix).keys()
        ends = () if ours else (".json", ".bin", ".idx", "_documents.npy")
        taken = [f"{prefix}{end}" for end in ends if os.path.lexists(f"{prefix}{end}")]
        inside = list(self.folder.glob("*"))
        if (inside and not any(path.name.startswith("progress.") for path in inside)
                or any(path.is_symlink() for path in inside)):  # a link leads to another file
            taken.append(self.folder)
        if taken:
            raise ValueError(f"{taken[0]}: exists and was not written by this command; move it "
                             "away or name another output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder / "progress.lock")
        self.progress = self.folder / "progress.json"
        self.files = {name: open(self.folder / name, "ab") for name in self.PARTS}
        state = read_json(self.progress) if self.progress.exists() else {}
        self.position, ends = state.get("position"), state.get("bytes")
        if (state.get("sha256") != self.digest(ends)  # of another job, or damaged
                or any(file.tell() < ends[name] for name, file in self.files.items())):
            self.position, ends = None, dict.fromkeys(self.PARTS, 0)
        for name, file in self.files.items():
            file.seek(file.truncate(ends[name]))
        self.commit()

    def digest(self, ends):
        """Return the SHA-256 that progress.json has if it is undamaged and of this job."""
        return hashlib.sha256(json.dumps([self.job, self.position, ends]).encode()).hexdigest()

    def append(self, tokens, sizes, documents=np.empty(0, PROVENANCE), position=None):
        """Add documents: their tokens in one array, the size of each, PROVENANCE of each or none.

        position: any JSON value that says how far the input is done. Commits every 5 seconds.
        """
        for (name, dtype), values in zip(self.PARTS.items(), (tokens, sizes, documents)):
            self.files[name].write(np.ascontiguousarray(values, dtype=dtype).data)
        self.position = position
        if time.monotonic() > self.committed + 5:
            self.commit()

    def commit(self):
        """Make what was appended so far survive a kill."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        ends = {name: file.tell() for name, file in self.files.items()}
        write_json(self.progress,
                   {"position": self.position, "bytes": ends, "sha256": self.digest(ends)})
        self.committed = time.monotonic()

    def finish(self, summary):
        """Write the index and move all files into place; the .idx, last, makes it a token file."""
        self.commit()
        sizes = np.fromfile(self.folder / "sizes", dtype="<i4")
        if not len(sizes):
            raise ValueError(f"{self.prefix}.bin: nothing to write, the input holds no documents")
        with replacing(self.folder / "idx") as file:
            write_index(file, sizes)
        summary = {"documents": len(sizes), "tokens": int(sizes.sum(dtype=np.int64)), **summary,
                   "sha256": {name: sha256_of(self.folder / name) for name in ("bin", "idx")}}
        # An order that was built for an earlier file of this name does not belong to the new one.
        stale = glob(f"{escape(self.prefix)}_train_0_indexmap_*_idx.npy")
        for path in [f"{self.prefix}.idx", *stale]:
            Path(path).unlink(missing_ok=True)
        write_json(f"{self.prefix}.json", summary)  # first: it marks the other files as ours
        documents = np.fromfile(self.folder / "documents", dtype=PROVENANCE)
        if len(documents):
            with replacing(f"{self.prefix}_documents.npy") as file:
                np.save(file, documents)
        self.progress.unlink()  # a job that is killed while moving the files starts from scratch
        for name in "bin", "idx":
            os.replace(self.folder / name, f"{self.prefix}.{name}")
        shutil.rmtree(self.folder, ignore_errors=True)  # NFS keeps names of files that are open
        self.close()
        return summary

    def close(self):
        """Close all files; the same job can go on from the last commit."""
        for file in (*self.files.values(), self.lock):
            file.close()


def write_index(file, sizes):
    """Write the .idx of documents that lie one after the other (layout: top of this file)."""
    n, pointers = len(sizes), 2 * (np.cumsum(sizes, dtype="<i8") - sizes)
    file.write(HEADER.pack(MAGIC, n, n + 1))
    for values in np.asarray(sizes, dtype="<i4"), pointers, np.arange(n + 1, dtype="<i8"):
        file.write(values.data)


# ---------------------------------------------------------------------------- the order


def build_order(sizes, seq_length, num_samples, seed):
    """Return gpt-neox's (doc_idx, sample_idx, shuffle_idx) over documents of `sizes` tokens.

    doc_idx (epochs * documents,) int32: all epochs' copies of every document in ONE shuffle.
        gpt-neox v1.0 has no separate last epoch, so a run of 1.5 epochs is not "one pass, then half
        of another": some documents come twice before others come once (`order --report` counts
        them).
    sample_idx (samples + 1, 2) int32: where in doc_idx, and at which token of that document, each
        sample begins. A sample is seq_length + 1 tokens and the next one begins on its last.
    shuffle_idx (samples,) uint32: the order in which the samples are served.

    Source: megatron/data/gpt2_dataset.py and helpers.cpp (build_sample_idx), whose walk over tokens
    is here a search in the running sum of sizes. The whole Pile takes about 8 GB of memory.
    """
    total = int(np.sum(sizes, dtype=np.int64))
    if total < 2:
        raise ValueError(f"the index's sizes add up to {total} tokens, expected at least 2")
    epochs = -(-(num_samples * seq_length + 1) // total)  # smallest with enough samples
    n_samples = (epochs * total - 1) // seq_length
    rng = np.random.RandomState(seed)
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    rng.shuffle(doc_idx)
    begins = np.zeros(len(doc_idx) + 1, dtype=np.int64)  # the first token of each copy; the end
    np.cumsum(sizes[doc_idx], out=begins[1:])
    tokens = np.arange(0, n_samples * seq_length + 1, seq_length)  # where samples begin
    places = np.searchsorted(begins, tokens, side="right") - 1
    places[0] = 0  # even if that document is empty
    tokens -= begins[places]
    sample_idx = np.stack((places, tokens), axis=1, dtype=np.int32, casting="unsafe")
    del begins, places, tokens  # most of the memory
    shuffle_idx = np.arange(n_samples, dtype=np.uint32 if n_samples < 2**32 - 2 else np.int64)
    rng.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def order_paths(prefix, seq_length, num_samples, seed):
    """Return the three .npy paths under gpt-neox's own cache names."""
    stem = f"{prefix}_train_0_indexmap_{num_samples}ns_{seq_length}sl_{seed}s"
    return [f"{stem}_{name}_idx.npy" for name in ("doc", "sample", "shuffle")]


def load_npy(path):
    """Return a memory-mapped .npy file; never unpickles."""
    file_size(path)  # refuses a pipe, which would never end
    with expecting(path, "a whole .npy file; delete it to rebuild"):
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))


def samples_needed(steps, batch_size):
    """Return gpt-neox's num_samples: 0.5 % more than the run consumes (147,164,160 for Pythia)."""
    return math.ceil(steps * batch_size * 1.005)


class OrderedData:
    """Rows of seq_length + 1 tokens in training order. No state: the same call, the same rows.

    Row i of step s is row s * batch_size + i of the order; the update of step s makes checkpoint
    s + 1. The order is built if its files are not there. A "preshuffled" token file is in training
    order already: its documents are the rows.

    A file is preshuffled if PREFIX.json says that `shuffle` wrote it, or if it comes in shards of
    equally long documents, as published. Where this is wrong, {"preshuffled": true} or false in
    PREFIX.json decides: published shards joined into one file look like any corpus that was cut
    into documents of one length.
    """

    def __init__(self, prefix, seq_length, num_samples, seed):
        self.tokens, self.seq_length = TokenFile(prefix), seq_length
        prefix, length = self.tokens.prefix, self.tokens.equal_length
        notes, published = read_notes(prefix), length and len(self.tokens.shards) > 1
        self.preshuffled = bool(notes.get("preshuffled", "baked_from" in notes or published))
        if self.preshuffled:
            if length != seq_length + 1:
                raise ValueError(f"{prefix}: in training order already, in rows of "
                                 f"{length or 'unequal'} tokens; seq_length = {seq_length} needs "
                                 f"rows of {seq_length + 1}")
            return
        # By default reading a row makes the system read 128 KB around it. With a file larger than
        # memory a step of 1024 rows then took 14 s instead of 0.04.
        for shard in self.tokens.shards:
            shard.base.base.madvise(mmap.MADV_RANDOM)
        self.settings = {"seq_length": seq_length, "num_samples": num_samples, "seed": seed}
        self.paths = order_paths(prefix, **self.settings)
        if not all(map(os.path.exists, self.paths)):
            stem = self.paths[0].removesuffix("_doc_idx.npy")
            for stale in glob(f"{escape(stem)}_inverse_*"):  # by batch_viewer.py, of an older order
                os.unlink(stale)
            for path, array in zip(self.paths, build_order(self.tokens.sizes, **self.settings)):
                with replacing(path) as file:
                    np.save(file, array)
        self.order = doc_idx, sample_idx, shuffle_idx = tuple(map(load_npy, self.paths))
        self.fits = partial(expecting, self.paths[0], f"an order of {prefix}.idx; delete it and its"
                            " two siblings to rebuild them")
        with self.fits():
            some = range(0, len(self), len(self) // 300 + 1)
            n_tokens = len(doc_idx) // len(self.tokens) * self.tokens.n_tokens
            n_samples = (n_tokens - 1) // seq_length
            if (len(shuffle_idx) != n_samples or sample_idx.shape != (n_samples + 1, 2)
                    or len(set(shuffle_idx[some].tolist())) < len(some)):
                raise ValueError(f"expected {n_samples:,} samples in random order")
        for row in some:  # this compares documents' lengths with those in the token file
            self.pieces(row)

    def describe(self):
        """Return lines that say where rows come from, and what is unusual about the data."""
        n, length = len(self.tokens), self.seq_length + 1
        if self.preshuffled:
            return [f"{n:,} rows of {length} tokens, already in training order"]
        lines = [f"{n:,} documents, {len(self.order[0]) // n} epochs in one shuffle, "
                 f"{len(self.order[2]):,} samples of {length} tokens"]
        if self.tokens.equal_length == length:
            lines.append(f"every document has {length} tokens: if this is the joined preshuffled "
                         f'Pile, put {{"preshuffled": true}} into {self.tokens.prefix}.json')
        return lines

    def __len__(self):
        if self.preshuffled:
            return len(self.tokens)
        return len(self.order[2]) - 1  # gpt-neox never serves the last shuffled sample

    def pieces(self, row):
        """Return [(document, start, stop)]: the documents' tokens that make up a row.

        With seq_length 6, a row that begins at token 3 of document 8 (5 tokens long), goes through
        document 2 (4 tokens) and ends in document 9:  [(8, 3, 5), (2, 0, 4), (9, 0, 1)].
        """
        if not 0 <= row < len(self):
            raise ValueError(f"row {row:,} of {len(self):,} (the first is 0)")
        if self.preshuffled:
            return [(row, 0, self.seq_length + 1)]
        doc_idx, sample_idx, shuffle_idx = self.order
        sample = int(shuffle_idx[row])
        with self.fits():
            (first, start), (last, stop) = sample_idx[sample:sample + 2].tolist()
            documents = doc_idx[first:last + 1].tolist()
            ends = self.tokens.sizes[documents].tolist()
            ends[-1] = stop + 1  # this sample's last token is the next one's first
            if sum(ends) - start != self.seq_length + 1:
                raise ValueError(f"sample {sample:,} has {sum(ends) - start} tokens")
        starts = [start] + [0] * (len(documents) - 1)
        return [piece for piece in zip(documents, starts, ends) if piece[1] < piece[2]]

    def rows(self, numbers):
        """Return the rows with these numbers, (n, seq_length + 1) uint16."""
        out = np.empty((len(numbers), self.seq_length + 1), dtype="<u2")
        for row, number in zip(out, numbers):
            np.concatenate([self.tokens.read(*piece) for piece in self.pieces(int(number))],
                           out=row)
        return out

    def batch(self, step, batch_size, rank=0, world_size=1, micro_batch_size=None):
        """Return a rank's micro-batches of a step, (A, micro_batch_size, seq_length + 1) int64."""
        numbers = batch_rows(step, batch_size, rank, world_size, micro_batch_size)
        return self.rows(numbers.ravel()).astype(np.int64).reshape(*numbers.shape, -1)


def batch_rows(step, batch_size, rank=0, world_size=1, micro_batch_size=None):
    """Return the numbers (A, micro_batch_size) of the rows that a rank sees at a step.

    As gpt-neox's DistributedBatchSampler: each of the A micro-steps takes the next
    micro_batch_size * world_size rows, and each rank a contiguous slice of those.
    """
    micro = micro_batch_size or batch_size // world_size
    if micro < 1 or batch_size % (micro * world_size):
        raise ValueError(f"batch_size = {batch_size} is not a multiple of micro_batch_size * "
                         f"processes = {micro} * {world_size}")
    numbers = np.arange(step * batch_size, (step + 1) * batch_size)
    return numbers.reshape(-1, world_size, micro)[:, rank]


def times_seen(data, n_rows):
    """Return how many documents had a token in 0, 1, 2, ... copies among the first n_rows rows."""
    doc_idx, sample_idx, shuffle_idx = data.order
    # +1 where a served sample begins, -1 after its end: the sum so far is above 0 inside samples.
    edges = np.zeros(len(doc_idx) + 1, dtype=np.int32)
    samples = shuffle_idx[:n_rows]
    np.add.at(edges, sample_idx[samples, 0], 1)
    np.add.at(edges, sample_idx[samples + 1, 0] + 1, -1)
    seen = np.cumsum(edges[:-1], dtype=np.int32) > 0
    return np.bincount(np.bincount(doc_idx[seen], minlength=len(data.tokens)))


# ---------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Order:
    data: str  # PREFIX of a token file
    steps: int = 143000
    batch_size: int = 1024  # rows of a step
    seq_length: int = 2048
    seed: int = 1234

    def __post_init__(self):
        # Types are checked as well, since values may come from a config.json that others wrote.
        check(self, "at least 1", lambda value: type(value) is int and value > 0, "steps",
              "batch_size", "seq_length")
        check(self, "0 to 2^32 - 1", lambda value: type(value) is int and 0 <= value < 2**32,
              "seed")


@dataclass(frozen=True)
class OrderReport(Order):
    report: int | None = None  # a step: count the documents seen 0, 1, 2, ... times before it


def ordered(options, unshuffled=False):
    """Return an Order's OrderedData; `unshuffled` refuses a file in training order already."""
    data = OrderedData(options.data, options.seq_length,
                       samples_needed(options.steps, options.batch_size), options.seed)
    if unshuffled and data.preshuffled:
        raise ValueError(f"{options.data}: already in training order, every sequence is one row")
    return data


def span(name, text, n, end=0):
    """Return the range that "3" or "3:5" names, out of n; the last number is included if end=1."""
    if match := re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text):
        first = int(match[1])
        stop = int(match[2]) + end if match[2] else first + 1
        if first < stop <= n:
            return range(first, stop)
    raise ValueError(f"{name} = {text!r}, expected a number from 0 to {n - 1:,} or first:last"
                     + ("" if end else "+1"))


def trained_with(model):
    """Return the config.json of a run, given its folder or a checkpoint in it; {} without one."""
    paths = Path(model).absolute().parent / "config.json", Path(model) / "config.json"
    found = [read_json(path) for path in paths if path.exists()]
    return next((settings for settings in found if "batch_size" in settings), {})


def order_of(model, data=None):
    """Return the Order of a run's training (Pythia's for other models), of `data` if given."""
    settings = trained_with(model)
    if settings.get("data_seed") is not None:
        settings["seed"] = settings["data_seed"]
    settings["data"] = data or settings.get("data")
    if not settings["data"]:
        raise ValueError(f"{model}: not a run of ours, so --data=PREFIX has to name what it was "
                         "trained on")
    return Order(**{field.name: settings[field.name] for field in fields(Order)
                    if settings.get(field.name) is not None})


def order(options):
    """Fix the training order: write the three index arrays under gpt-neox's cache names."""
    check(options, f"0 to {options.steps}", range(options.steps + 1).__contains__, "report")
    data = ordered(options, unshuffled=True)
    print(*data.describe(), *data.paths, sep="\n")
    if options.report is not None:
        n_rows = options.report * options.batch_size
        print(f"before step {options.report:,} ({n_rows:,} rows):")
        for times, documents in enumerate(times_seen(data, n_rows)):
            share = documents / len(data.tokens)
            print(f"{documents:12,} documents seen {times} times ({share:.1%})")


if __name__ == "__main__":
    command(sys.argv[1:], {"order": (OrderReport, order)})
