"""The Pile's order: Megatron token files, gpt-neox's shuffle, batches as functions of the step.

    python data.py order --data=data/train --steps=143000 --batch_size=1024 [--report=71500]

PREFIX.bin holds the tokens of all documents, little-endian, one after the other, with no header;
or, as published, in pieces PREFIX-00000-of-000NN.bin, of which there are NN + 1.
PREFIX.idx, little-endian, unaligned (gpt-neox v1.0, megatron/data/indexed_dataset.py):

    offset   bytes  content
    0        9      "MMIDIDX" and two zero bytes
    9        8      uint64 version, 1
    17       1      uint8 dtype code, 8: uint16, as vocabularies of under 65,500 entries have it
    18       8      uint64 S, number of sequences (documents)
    26       8      uint64 Dn, number of doc_idx entries, S + 1
    34       4 S    int32 sizes, tokens of each sequence
    34+4S    8 S    int64 pointers, byte offset of each sequence in PREFIX.bin
    34+12S   8 Dn   int64 doc_idx, first sequence of each document: 0, 1, ..., S

Beside them `prepare.py tokenize` leaves PREFIX.json (names, counts) and PREFIX_documents.npy (each
document's subset, source file and line). `prepare.py shuffle` bakes the order into a token file
whose every sequence is one row of seq_length + 1 tokens, already in training order, as the
published "preshuffled" Pile.
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
from bisect import bisect_right
from dataclasses import dataclass
from glob import escape, glob
from itertools import accumulate
from pathlib import Path

import numpy as np

from config import check, command, file_size, lock, read_json, replacing, sha256_of, write_json

MAGIC = b"MMIDIDX\0\0" + struct.pack("<QB", 1, 8)  # with the version and the dtype code
HEADER_BYTES = 34
MASKED = -100  # the id of padding in a row that an intervention made: no input, nothing to learn
# What PREFIX_documents.npy holds of each document: names of subsets and files are in PREFIX.json.
PROVENANCE = np.dtype([("file", "<u4"), ("line", "<u4"), ("subset", "<u4")])

# ---------------------------------------------------------------------------- reading token files


class TokenFile:
    """Memory-mapped reader of PREFIX.idx and .bin: len() documents, read(document, start, stop).

    Raises ValueError, naming the file and what is wrong with it, or OSError if it cannot be opened.
    """

    def __init__(self, prefix):
        self.prefix = str(prefix).removesuffix(".bin").removesuffix(".idx")
        idx = f"{self.prefix}.idx"
        found = file_size(idx)
        with open(idx, "rb") as file:
            header = file.read(HEADER_BYTES).ljust(HEADER_BYTES)
        if not header.startswith(MAGIC):
            raise ValueError(f"{idx}: starts with {header[:len(MAGIC)]!r}, expected {MAGIC!r}: a "
                             "Megatron index of version 1 and uint16 tokens")
        count, doc_count = struct.unpack("<QQ", header[len(MAGIC):])
        if not 0 < found - HEADER_BYTES == 12 * count + 8 * doc_count or not count:
            raise ValueError(f"{idx}: {found:,} bytes, but its header tells of {count:,} sequences "
                             f"in {doc_count:,} documents: truncated, damaged or empty")
        self.sizes = np.memmap(idx, "<i4", "r", HEADER_BYTES, (count,))
        self.pointers = np.memmap(idx, "<i8", "r", HEADER_BYTES + 4 * count, (count,))
        # Python's ints and int64 are used throughout: 600 GB of tokens are beyond 2^31 and 2^32.
        self.n_tokens = int(self.pointers[-1]) // 2 + int(self.sizes[-1])
        self.shards = self._shards()  # paths
        n_bytes = list(map(file_size, self.shards))
        if sum(n_bytes) != 2 * self.n_tokens or any(size % 2 for size in n_bytes):
            raise ValueError(f"{self.shards[-1]}: {sum(n_bytes):,} bytes, with all before it, but "
                             f"{idx} describes {2 * self.n_tokens:,}: truncated, or not of it")
        self.bounds = [0, *accumulate(size // 2 for size in n_bytes)]  # where shards begin and end
        self.maps = [_mapped(path) for path in self.shards]

    def _shards(self):
        """Return PREFIX.bin, or the paths of the pieces 00000-of-000NN to 000NN-of-000NN."""
        digits = 5 * "[0-9]"
        pieces = sorted(glob(f"{escape(self.prefix)}-{digits}-of-{digits}.bin"))
        if not pieces or os.path.exists(f"{self.prefix}.bin"):
            return [f"{self.prefix}.bin"]
        last = pieces[-1][-9:-4]
        return [f"{self.prefix}-{i:05}-of-{last}.bin" for i in range(int(last) + 1)]

    def scatter(self):
        """Say that tokens will be read here and there.

        Otherwise every row makes the system read 128 KB around it: with a file larger than memory
        a step of 1024 rows took 14 s instead of 0.04.
        """
        for memory in self.maps:
            memory.madvise(mmap.MADV_RANDOM)

    def __len__(self):
        return len(self.sizes)

    def equal_length(self):
        """Return all documents' length, judged by 1000 of them and the sum; 0 if they differ."""
        length = int(self.sizes[0])
        some_equal = (self.sizes[::len(self) // 1000 + 1] == length).all()
        return length if some_equal and self.n_tokens == len(self) * length else 0

    def paths(self):
        """Return the files that hold the index and the tokens, in order."""
        return [f"{self.prefix}.idx", *self.shards]

    def read(self, document, start=0, stop=None):
        """Return tokens start..stop (None: the end) of a document, without copying where it can."""
        size, first = int(self.sizes[document]), int(self.pointers[document]) // 2
        stop = size if stop is None else stop
        if not (0 <= start <= stop <= size and 0 <= first <= self.n_tokens - size):
            raise ValueError(f"{self.prefix}.idx: document {document} (pointer {2 * first}, size "
                             f"{size}) cannot give tokens {start}..{stop}: damaged index")
        return self.slice(first + start, first + stop)

    def slice(self, first, stop):
        """Return tokens first..stop of the whole file, whatever shards they lie in."""
        shard = bisect_right(self.bounds, first, hi=len(self.maps)) - 1
        begin, end = self.bounds[shard:shard + 2]
        tokens = np.frombuffer(self.maps[shard], "<u2")[first - begin:stop - begin]
        return tokens if stop <= end else np.concatenate((tokens, self.slice(end, stop)))


def _mapped(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_notes(prefix):
    """Return the object in PREFIX.json, which names every input file; an empty one without it."""
    path = f"{prefix}.json"
    return read_json(path, 64 << 20) if os.path.exists(path) else {}


def fingerprint(paths):
    """Return the SHA-256 of files in hex: equal for equal files, wherever they lie.

    Every byte of a file under 1 GB counts. Of larger ones 2048 blocks of 4 KB do, spread evenly:
    they see that a file was replaced, tokenized anew, shifted or cut, not an edit between them.
    (`train.py --check_data=True` reads all of it.)
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
    expected = read_notes(prefix).get("sha256")
    if not isinstance(expected, dict):
        raise ValueError(f"{prefix}.json: no sha256 to compare the data with; `sha256sum -c` "
                         "checks published files")
    for suffix, wanted in expected.items():
        if sha256_of(f"{prefix}.{suffix}") != wanted:
            raise ValueError(f"{prefix}.{suffix}: SHA-256 is not that of {prefix}.json, {wanted}: "
                             "the data changed since they were tokenized")


# ---------------------------------------------------------------------------- writing token files


class TokenWriter:
    """Builds PREFIX.bin, .idx, .json and _documents.npy in PREFIX.partial.

    job: a JSON object that says what is being written. What PREFIX.partial holds of another job is
    deleted; the same job goes on from `position`, which its last commit was given (at first None).
    """

    PARTS = {"bin": np.dtype("<u2"), "sizes": np.dtype("<i4"), "documents": PROVENANCE}

    def __init__(self, prefix, job):
        self.prefix, self.folder = str(prefix), Path(f"{prefix}.partial")
        if self.prefix.endswith(("/", ".bin", ".idx")):
            raise ValueError(f"output = {prefix}: expected a PREFIX, to which .bin is added")
        self._refuse_strangers()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder / "progress.lock")
        self.progress = self.folder / "progress.json"
        self.job = hashlib.sha256(json.dumps(job).encode()).hexdigest()
        state = read_json(self.progress) if self.progress.exists() else {}
        if state.get("job") != self.job:
            state = {"position": None, "bytes": dict.fromkeys(self.PARTS, 0)}
        self.files = {name: open(self.folder / name, "ab") for name in self.PARTS}
        for name, file in self.files.items():
            file.seek(file.truncate(state["bytes"][name]))
        self.commit(state["position"])

    def _refuse_strangers(self):
        """Raise ValueError if files that no TokenWriter wrote lie where one writes or deletes."""
        ours = {"documents", "tokens"} <= read_notes(self.prefix).keys()
        ends = () if ours else (".json", ".bin", ".idx", "_documents.npy")
        taken = [f"{self.prefix}{end}" for end in ends if os.path.lexists(f"{self.prefix}{end}")]
        inside = os.listdir(self.folder) if os.path.lexists(self.folder) else ()
        if inside and not any(name.startswith("progress.") for name in inside):
            taken.append(self.folder)
        if taken:
            raise ValueError(f"{taken[0]}: there already, and not written by this command; move it "
                             "away or name another output")

    def close(self):
        """Leave what was committed to whoever goes on with this job."""
        for file in (*self.files.values(), self.lock):
            file.close()

    def append(self, tokens, sizes, documents=np.empty(0, PROVENANCE)):
        """Add documents: tokens one after the other, size of each, PROVENANCE of each or none."""
        for (name, dtype), values in zip(self.PARTS.items(), (tokens, sizes, documents)):
            self.files[name].write(np.ascontiguousarray(values, dtype=dtype).data)

    def commit(self, position):
        """Make what was appended survive a kill, with a JSON note of where in the input it ends."""
        self.position = position
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.progress, {
            "job": self.job, "position": position,
            "bytes": {name: file.tell() for name, file in self.files.items()}})

    def finish(self, summary):
        """Write the index, move all into place, the index last: then the token file exists."""
        self.commit(self.position)
        sizes = np.fromfile(self.folder / "sizes", dtype="<i4")
        if not len(sizes):
            shutil.rmtree(self.folder)
            raise ValueError(f"{self.prefix}.bin: nothing to write, the input holds no documents")
        summary = {"documents": len(sizes), "tokens": int(sizes.sum(dtype=np.int64)), **summary}
        with replacing(self.folder / "idx") as file:
            write_index(file, sizes)
        summary["sha256"] = {name: sha256_of(self.folder / name) for name in ("bin", "idx")}
        # An order that was built for an earlier file of this name does not belong to the new one.
        stale = glob(f"{escape(self.prefix)}_train_0_indexmap_*_idx.npy")
        for path in [f"{self.prefix}.idx", *stale]:
            Path(path).unlink(missing_ok=True)
        write_json(f"{self.prefix}.json", summary)  # first: it says that the others are ours
        if os.path.getsize(self.folder / "documents"):
            with replacing(f"{self.prefix}_documents.npy") as file:
                np.save(file, np.fromfile(self.folder / "documents", dtype=PROVENANCE))
        self.progress.unlink()  # after a kill between the next two lines the job begins again
        os.replace(self.folder / "bin", f"{self.prefix}.bin")
        os.replace(self.folder / "idx", f"{self.prefix}.idx")
        shutil.rmtree(self.folder)
        self.close()
        return summary


def write_index(file, sizes):
    """Write the .idx of consecutive uint16 documents (the bytes are drawn atop this file)."""
    n, pointers = len(sizes), 2 * (np.cumsum(sizes, dtype="<i8") - sizes)
    file.write(MAGIC + struct.pack("<QQ", n, n + 1))
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
        raise ValueError(f"the data hold {total} tokens, expected at least 2")
    epochs = -(-(num_samples * seq_length + 1) // total)  # smallest with enough samples
    rng = np.random.RandomState(seed)
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    rng.shuffle(doc_idx)
    n_samples = (epochs * total - 1) // seq_length
    begins = np.cumsum(np.append(0, sizes[doc_idx]), dtype=np.int64)  # of documents, and the end
    tokens = np.arange(n_samples + 1) * seq_length
    sample_idx = np.empty((n_samples + 1, 2), dtype=np.int32)
    sample_idx[:, 0] = np.searchsorted(begins, tokens, side="right") - 1
    sample_idx[:, 1] = tokens - begins[sample_idx[:, 0]]
    sample_idx[0] = 0  # even if that document is empty
    shuffle_idx = np.arange(n_samples, dtype=np.uint32 if n_samples < 2**32 - 2 else np.int64)
    rng.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def order_paths(prefix, seq_length, num_samples, seed):
    """Return the three .npy paths under gpt-neox's own cache names."""
    stem = f"{prefix}_train_0_indexmap_{num_samples}ns_{seq_length}sl_{seed}s"
    return [f"{stem}_{name}_idx.npy" for name in ("doc", "sample", "shuffle")]


def load_npy(path):
    """Return a memory-mapped .npy file; never unpickles. Raises ValueError naming the file."""
    file_size(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header raises whatever it likes
        raise ValueError(f"{path}: not a whole .npy file ({error}); delete it to rebuild") from None


def samples_needed(steps, batch_size):
    """Return gpt-neox's num_samples: 0.5 % more than the run consumes (147,164,160 for Pythia)."""
    return math.ceil(steps * batch_size * 1.005)


class OrderedData:
    """Rows of seq_length + 1 tokens in training order. No state: the same call, the same rows.

    Row i of step s is row s * batch_size + i of the order; the update of step s makes checkpoint
    s + 1. A file in training order already ("preshuffled": baked by `shuffle`, or published so) is
    served as it lies; any other is served through its order, which is built if need be.

    What `shuffle` baked says so in PREFIX.json, and what was published lies in pieces. Where this
    misleads, {"preshuffled": true} or false in PREFIX.json decides: joined pieces look like any
    corpus cut into equally long documents.
    """

    def __init__(self, prefix, seq_length, num_samples, seed):
        self.tokens, self.seq_length = TokenFile(prefix), seq_length
        prefix, length = self.tokens.prefix, self.tokens.equal_length()
        notes, published = read_notes(prefix), length and len(self.tokens.shards) > 1
        self.preshuffled = bool(notes.get("preshuffled", "baked_from" in notes or published))
        if not self.preshuffled:
            self.tokens.scatter()
            self.settings = {"seq_length": seq_length, "num_samples": num_samples, "seed": seed}
            self.paths = order_paths(prefix, **self.settings)
            self.misfit = (f"{self.paths[0]} and its two siblings do not belong to {prefix}.idx "
                           "or are damaged; delete them to rebuild")
            self._open_order(num_samples, seed)
        elif length != seq_length + 1:
            raise ValueError(f"{prefix}: in training order already, in rows of "
                             f"{length or 'unequal'} tokens; seq_length = {seq_length} needs rows "
                             f"of {seq_length + 1}")

    def _open_order(self, num_samples, seed):
        """Map the order's files, built if need be; compare lengths and 300 rows with the tokens."""
        if not all(map(os.path.exists, self.paths)):
            arrays = build_order(self.tokens.sizes, self.seq_length, num_samples, seed)
            stem = self.paths[0].removesuffix("_doc_idx.npy")
            for stale in glob(f"{escape(stem)}_inverse_*_idx.npy"):  # batch_viewer.py's, of another
                os.unlink(stale)
            for path, array in zip(self.paths, arrays):
                with replacing(path) as file:
                    np.save(file, array)
        self.order = doc_idx, sample_idx, shuffle_idx = tuple(map(load_npy, self.paths))
        n_samples = (len(doc_idx) // len(self.tokens) * self.tokens.n_tokens - 1) // self.seq_length
        some = range(0, len(self), len(self) // 300 + 1)
        if (len(shuffle_idx) != n_samples or sample_idx.shape != (n_samples + 1, 2)
                or len(set(shuffle_idx[some].tolist())) < len(some)):
            raise ValueError(self.misfit)
        for row in some:
            self.pieces(row)

    def describe(self):
        """Return the lines that say where rows come from, and what is unusual about the data."""
        n, length = len(self.tokens), self.seq_length + 1
        if self.preshuffled:
            return [f"{n:,} rows of {length} tokens in training order already, served as they lie"]
        lines = [f"{n:,} documents, {len(self.order[0]) // n} epochs in one shuffle, "
                 f"{len(self.order[2]):,} samples of {length} tokens"]
        if self.tokens.equal_length() == length:
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
        try:
            (first, start), (last, stop) = sample_idx[sample:sample + 2].tolist()
            documents = doc_idx[first:last + 1].tolist()
            ends = self.tokens.sizes[documents].tolist()
            ends[-1] = stop + 1  # this sample's last token is the next one's first
            if sum(ends) - start != self.seq_length + 1:
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(self.misfit) from None
        starts = [start] + [0] * (len(documents) - 1)
        return [piece for piece in zip(documents, starts, ends) if piece[1] < piece[2]]

    def rows(self, numbers):
        """Return the rows (n, seq_length + 1) of these numbers, uint16."""
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
    """Return the row numbers (A, micro_batch_size) that a rank sees at a step.

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
    # +1 where a served sample begins, -1 after its end.
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
        # A run's config.json, from which they may come, holds what a stranger has written.
        whole = lambda value: type(value) is int and 0 <= value < 2**32
        check(self, "at least 1", lambda value: whole(value) and value, "steps", "batch_size",
              "seq_length")
        check(self, "0 to 2^32 - 1", whole, "seed")


@dataclass(frozen=True)
class OrderReport(Order):
    report: int | None = None  # a step: also count the documents seen 0, 1, 2, ... times before it


def ordered(options):
    """Return the OrderedData of an Order's settings."""
    return OrderedData(options.data, options.seq_length,
                       samples_needed(options.steps, options.batch_size), options.seed)


def unshuffled(options):
    """Return the OrderedData of an Order's settings, or raise ValueError if it needs no order."""
    data = ordered(options)
    if data.preshuffled:
        raise ValueError(f"{options.data}: already in training order, every sequence is one row")
    return data


def span(name, text, n, end=0):
    """Return the range that is "3", or "3:5" with its `end` (0 or 1) included, out of n."""
    if match := re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text):
        first = int(match[1])
        stop = int(match[2]) + end if match[2] else first + 1
        if first < stop <= n:
            return range(first, stop)
    raise ValueError(f"{name} = {text!r}, expected a number from 0 to {n - 1:,} or first:last"
                     + ("" if end else "+1"))


def trained_with(model):
    """Return what a run of ours, or the run of a step's folder, was trained with; else nothing."""
    paths = Path(model).absolute().parent / "config.json", Path(model) / "config.json"
    found = [read_json(path) for path in paths if path.exists()]
    return next((settings for settings in found if "batch_size" in settings), {})


def order_of(model, data=None):
    """Return the Order that a run was trained in, of other data if given; Pythia's without one."""
    settings = trained_with(model)
    if settings.get("data_seed") is not None:
        settings["seed"] = settings["data_seed"]
    if not (data or settings.get("data")):
        raise ValueError(f"{model}: not a run of ours, so --data=PREFIX has to name what it was "
                         "trained on")
    names = settings.keys() & {"steps", "batch_size", "seq_length", "seed"}
    return Order(data or settings["data"], **{name: settings[name] for name in names})


def order(options):
    """Fix the training order: write the three index arrays under gpt-neox's cache names."""
    data = unshuffled(options)
    print(*data.describe(), *data.paths, sep="\n")
    if options.report is not None:
        n_rows = options.report * options.batch_size
        if not 0 <= n_rows <= len(data):
            raise ValueError(f"report = {options.report}, expected a step from 0 to "
                             f"{len(data) // options.batch_size}")
        print(f"before step {options.report:,} ({n_rows:,} rows):")
        for times, documents in enumerate(times_seen(data, n_rows)):
            share = documents / len(data.tokens)
            print(f"{documents:12,} documents seen {times} times ({share:.1%})")


if __name__ == "__main__":
    command(sys.argv[1:], {"order": (OrderReport, order)})
