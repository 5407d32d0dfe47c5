"""The Pile's order: Megatron token files, gpt-neox's shuffle, batches as functions of the step.

    python data.py order --data=data/train --steps=143000 --batch_size=1024 [--report=71500]

PREFIX.bin holds the tokens of all documents, little-endian, one after the other, with no header;
or, as published, in pieces PREFIX-00000-of-000NN.bin, of which there are NN + 1.
PREFIX.idx, little-endian, unaligned (gpt-neox v1.0, megatron/data/indexed_dataset.py):

    offset   bytes  content
    0        9      "MMIDIDX" and two zero bytes
    9        8      uint64 version, 1
    17       1      uint8 dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16 (Pythia: 8)
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
import struct
import sys
from bisect import bisect_right
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path

import numpy as np

from config import check, command, file_size, lock, read_json, replacing, sha256_of, write_json
from tokenizer import ENDOFTEXT

MAGIC = b"MMIDIDX\0\0" + struct.pack("<Q", 1)  # with the version
HEADER_BYTES = 34
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
MASKED = -100  # the id of padding in a row that an intervention made: no input, nothing to learn
# What PREFIX_documents.npy holds of each document: names of subsets and files are in PREFIX.json.
PROVENANCE = np.dtype([("file", "<u4"), ("line", "<u4"), ("subset", "<u4")])

# ---------------------------------------------------------------------------- reading token files


class TokenFile:
    """Memory-mapped reader of PREFIX.idx and .bin: len() documents, read(document, start, stop).

    scattered: set it before reading here and there. Raises ValueError, naming the file and what is
    wrong with it, or OSError if it cannot be opened.
    """

    def __init__(self, prefix):
        self.scattered, self.maps = False, {}
        self.prefix = str(prefix).removesuffix(".bin").removesuffix(".idx")
        idx = f"{self.prefix}.idx"
        found = file_size(idx)
        with open(idx, "rb") as file:
            header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
            raise ValueError(f"{idx}: not a Megatron index of version 1 (it starts with "
                             f"{header[:17]!r}, expected {MAGIC!r})")
        code, count, doc_count = struct.unpack("<BQQ", header[len(MAGIC):])
        if code not in DTYPES:
            raise ValueError(f"{idx}: dtype code {code}, expected one of {sorted(DTYPES)}")
        expected = HEADER_BYTES + 12 * count + 8 * doc_count
        if found != expected:
            raise ValueError(f"{idx}: {found:,} bytes, its header expects {expected:,} ({count:,} "
                             f"sequences, {doc_count:,} doc_idx entries): truncated or damaged")
        if count == 0:
            raise ValueError(f"{idx}: holds no documents")
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self.sizes = np.memmap(idx, "<i4", "r", HEADER_BYTES, (count,))
        self.pointers = np.memmap(idx, "<i8", "r", HEADER_BYTES + 4 * count, (count,))
        # Python's ints and int64 are used throughout: 600 GB of tokens are beyond 2^31 and 2^32.
        self.n_tokens = int(self.pointers[-1]) // self.dtype.itemsize + int(self.sizes[-1])
        self.bounds, self.shard_paths = self._find_shards()

    def _find_shards(self):
        """Return where shards begin and the last one ends, in tokens; {shard: path} of those there.

        The published pieces are called 00000-of-000NN to 000NN-of-000NN. All but the last are
        equally long, so a piece that is not there need not be: its tokens alone are out of reach.
        """
        n_bytes, itemsize = self.n_tokens * self.dtype.itemsize, self.dtype.itemsize
        single, paths, lasts = f"{self.prefix}.bin", {}, set()
        for path in glob(f"{escape(self.prefix)}-*-of-*.bin"):
            match = re.fullmatch(r"-(\d{5})-of-(\d{5})\.bin", path[len(self.prefix):])
            if match:
                paths[int(match[1])] = path
                lasts.add(int(match[2]))
        if os.path.exists(single) or not paths:
            self._check_size(single, n_bytes)
            return [0, self.n_tokens], {0: single}
        last = max(lasts)
        if len(lasts) > 1 or max(paths) > last:
            raise ValueError(f"{self.prefix}-*-of-*.bin: pieces of {len(lasts)} different sets")
        some = min(paths)
        length = os.path.getsize(paths[some])
        if some == last > 0:  # only the last, shorter piece is there
            length = (n_bytes - length) // last
        if length % itemsize:
            raise ValueError(f"{paths[some]}: {length:,} bytes do not hold whole tokens")
        bounds = [min(i * length, n_bytes) for i in range(last + 1)] + [n_bytes]
        for number, path in paths.items():
            self._check_size(path, bounds[number + 1] - bounds[number])
        return [bound // itemsize for bound in bounds], paths

    def _check_size(self, path, expected):
        found = os.path.getsize(path)
        if found != expected:
            raise ValueError(f"{path}: {found:,} bytes, but {self.prefix}.idx describes "
                             f"{expected:,}: "
                             + ("truncated" if found < expected else "not the file of this index"))

    def __len__(self):
        return len(self.sizes)

    def notes(self):
        return read_notes(self.prefix)

    def equal_length(self):
        """Return the length of all documents, by 1000 and the sum of all; 0 if they differ."""
        some = self.sizes[::len(self) // 1000 + 1]
        equal = (some == some[0]).all() and self.n_tokens == len(self) * int(some[0])
        return int(some[0]) if equal else 0

    def paths(self):
        """Return the files that hold the index and the tokens, in order."""
        return [f"{self.prefix}.idx", *(path for _, path in sorted(self.shard_paths.items()))]

    def require_uint16(self):
        if self.dtype != np.dtype("<u2"):
            raise ValueError(f"{self.prefix}.idx: tokens are {self.dtype}, expected uint16")

    def read(self, document, start=0, stop=None):
        """Return tokens start..stop (None: the end) of a document, without copying where it can."""
        size, pointer = int(self.sizes[document]), int(self.pointers[document])
        stop = size if stop is None else stop
        first, rest = divmod(pointer, self.dtype.itemsize)
        if rest or not (0 <= start <= stop <= size
                        and 0 <= first and first + size <= self.n_tokens):
            raise ValueError(f"{self.prefix}.idx: document {document} (pointer {pointer}, size "
                             f"{size}) cannot give tokens {start}..{stop}: damaged index")
        return self.slice(first + start, first + stop)

    def slice(self, first, stop):
        """Return tokens first..stop of the whole file, whatever shards they lie in."""
        shard = bisect_right(self.bounds, first, hi=len(self.bounds) - 1) - 1
        begin, end = self.bounds[shard], self.bounds[shard + 1]
        if shard not in self.maps:
            self.maps[shard] = self._map(shard)
        if stop <= end:
            return self.maps[shard][first - begin:stop - begin]
        return np.concatenate((self.slice(first, end), self.slice(end, stop)))

    def _map(self, shard):
        if shard not in self.shard_paths:
            raise ValueError(f"{self.prefix}-{shard:05}-of-{len(self.bounds) - 2:05}.bin: not "
                             "there, and what was asked for lies in it")
        with open(self.shard_paths[shard], "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.scattered:
            # Otherwise every row makes the system read 128 KB around it: with a file larger than
            # memory a step of 1024 rows took 14 s instead of 0.04.
            memory.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(memory, self.dtype)


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
    tokens = TokenFile(prefix)
    expected = tokens.notes().get("sha256")
    if not isinstance(expected, dict):
        raise ValueError(f"{tokens.prefix}.json: no sha256 to compare the data with; "
                         "`sha256sum -c` checks published files")
    for suffix in ("bin", "idx"):
        path, wanted = f"{tokens.prefix}.{suffix}", expected.get(suffix)
        if (found := sha256_of(path)) != wanted:
            raise ValueError(f"{path}: SHA-256 {found}, expected {wanted} of {tokens.prefix}.json: "
                             "the data changed since they were tokenized")


# ---------------------------------------------------------------------------- writing token files


class TokenWriter:
    """Builds PREFIX.bin, .idx, .json and _documents.npy in PREFIX.partial.

    job: a JSON object that says what is being written. What PREFIX.partial holds of another job is
    deleted; the same job goes on from `position`, which its last commit was given (at first None).
    """

    PARTS = {"bin": np.dtype("<u2"), "sizes": np.dtype("<i4"), "documents": PROVENANCE}
    NAMES = re.compile(r"bin|sizes|documents|lock|(idx|progress\.json)(\.\d+\.tmp)?")

    def __init__(self, prefix, job):
        self.prefix, self.folder = str(prefix), Path(f"{prefix}.partial")
        if not os.path.basename(self.prefix) or self.prefix.endswith((".bin", ".idx")):
            raise ValueError(f"output = {self.prefix!r}, expected the PREFIX of files, not a "
                             "folder or one of them")
        self._refuse_strangers()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder / "lock", f"{self.folder}: another process is writing there")
        self.job = hashlib.sha256(json.dumps(job).encode()).hexdigest()
        state = self._committed()
        if state is None:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
            state = {"position": None, "bytes": dict.fromkeys(self.PARTS, 0)}
        self.position = state["position"]
        self.files = {name: open(self.folder / name, "ab") for name in self.PARTS}
        for name, file in self.files.items():
            file.truncate(state["bytes"][name])

    def _refuse_strangers(self):
        """Raise ValueError if files that no TokenWriter wrote lie where one writes or deletes."""
        files = list(os.scandir(self.folder)) if os.path.lexists(self.folder) else []
        names = sorted(file.name for file in files)
        ours = "lock" in names and all(self.NAMES.fullmatch(file.name)
                                       and file.is_file(follow_symlinks=False) for file in files)
        if files and not ours:
            raise ValueError(f"{self.folder}: holds {', '.join(names[:3])}, not an unfinished job; "
                             "move it away or name another output")
        if "progress.json" in names or {"documents", "tokens"} <= read_notes(self.prefix).keys():
            return
        for suffix in (".json", ".bin", ".idx", "_documents.npy"):
            if os.path.lexists(f"{self.prefix}{suffix}"):
                raise ValueError(f"{self.prefix}{suffix}: there already, and not written by this "
                                 "command; name another output")

    def _clear(self):
        """Delete what TokenWriters leave in the folder, and the folder if nothing else is there."""
        for path in self.folder.iterdir():
            if self.NAMES.fullmatch(path.name):
                path.unlink()
        if not os.listdir(self.folder):
            self.folder.rmdir()

    def _committed(self):
        """Return what the last commit of this very job noted, None if all of it is not there."""
        try:
            state = read_json(self.folder / "progress.json")
            whole = all((self.folder / name).stat().st_size >= state["bytes"][name]
                        for name in self.PARTS)
            return state if whole and state["job"] == self.job else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

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
        write_json(self.folder / "progress.json", {
            "job": self.job, "position": position,
            "bytes": {name: file.tell() for name, file in self.files.items()}})

    def finish(self, summary):
        """Write the index, move all into place, the index last: then the token file exists."""
        self.commit(self.position)
        sizes = np.fromfile(self.folder / "sizes", dtype="<i4")
        if not len(sizes):
            self._clear()
            raise ValueError(f"{self.prefix}.bin: nothing to write, the input holds no documents")
        summary = {"documents": len(sizes), "tokens": int(sizes.sum(dtype=np.int64)), **summary}
        with replacing(self.folder / "idx") as file:
            write_index(file, sizes)
        summary["sha256"] = {name: sha256_of(self.folder / name) for name in ("bin", "idx")}
        # An order that was built for an earlier file of this name does not belong to the new one.
        stale = glob(f"{escape(self.prefix)}_train_0_indexmap_*_idx.npy")
        for path in [f"{self.prefix}.idx", *stale]:
            Path(path).unlink(missing_ok=True)
        if os.path.getsize(self.folder / "documents"):
            with replacing(f"{self.prefix}_documents.npy") as file:
                np.save(file, np.fromfile(self.folder / "documents", dtype=PROVENANCE))
        write_json(f"{self.prefix}.json", summary)
        os.replace(self.folder / "bin", f"{self.prefix}.bin")
        os.replace(self.folder / "idx", f"{self.prefix}.idx")
        self._clear()
        self.close()
        return summary


def write_index(file, sizes):
    """Write the .idx of consecutive uint16 documents (the bytes are drawn atop this file)."""
    n = len(sizes)
    pointers = np.cumsum(sizes, dtype="<i8")
    pointers -= sizes  # in place: the whole Pile's take 1.7 GB
    pointers *= 2
    file.write(MAGIC + struct.pack("<BQQ", 8, n, n + 1))
    file.write(np.asarray(sizes, dtype="<i4").data)
    file.write(pointers.data)
    file.write(np.arange(n + 1, dtype="<i8").data)


# ---------------------------------------------------------------------------- the order


def build_order(sizes, seq_length, num_samples, seed, block=1 << 24):
    """Return gpt-neox's (doc_idx, sample_idx, shuffle_idx) over documents of `sizes` tokens.

    doc_idx (epochs * documents,) int32: all epochs' copies of every document in ONE shuffle.
        gpt-neox v1.0 has no separate last epoch, so a run of 1.5 epochs is not "one pass, then half
        of another": some documents come twice before others come once (`order --report` counts
        them).
    sample_idx (samples + 1, 2) int32: where in doc_idx, and at which token of that document, each
        sample begins. A sample is seq_length + 1 tokens and the next one begins on its last.
    shuffle_idx (samples,) uint32: the order in which the samples are served.

    Source: megatron/data/gpt2_dataset.py and helpers.cpp (build_sample_idx), whose walk over tokens
    is here a search in the running sum of sizes, `block` documents at a time to bound the memory.
    """
    total = int(np.sum(sizes, dtype=np.int64))
    if total < 2:
        raise ValueError(f"the data hold {total} tokens, expected at least 2")
    epochs = -(-(num_samples * seq_length + 1) // total)  # smallest with enough samples
    rng = np.random.RandomState(seed)
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    rng.shuffle(doc_idx)
    n_samples = (epochs * total - 1) // seq_length
    sample_idx = np.zeros((n_samples + 1, 2), dtype=np.int32)
    sample, tokens_before = 1, 0  # sample 0 begins at (0, 0), even if that document is empty
    for start in range(0, len(doc_idx), block):
        ends = tokens_before + np.cumsum(sizes[doc_idx[start:start + block]], dtype=np.int64)
        # The samples that begin in this block.
        until = min(n_samples, (int(ends[-1]) - 1) // seq_length) + 1
        first_tokens = np.arange(sample, until, dtype=np.int64) * seq_length
        position = np.searchsorted(ends, first_tokens, side="right")
        sample_idx[sample:until, 0] = start + position
        sample_idx[sample:until, 1] = first_tokens - np.append(tokens_before, ends)[position]
        sample, tokens_before = max(sample, until), int(ends[-1])
    shuffle_idx = np.arange(n_samples, dtype=np.uint32 if n_samples < 2**32 - 2 else np.int64)
    rng.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def order_paths(prefix, seq_length, num_samples, seed):
    """Return the three .npy paths under gpt-neox's own cache names."""
    stem = f"{prefix}_train_0_indexmap_{num_samples}ns_{seq_length}sl_{seed}s"
    return [f"{stem}_{name}_idx.npy" for name in ("doc", "sample", "shuffle")]


def load_order(tokens, seq_length, num_samples, seed):
    """Return the memory-mapped order of a TokenFile and its three paths, built if need be."""
    paths = order_paths(tokens.prefix, seq_length, num_samples, seed)
    if not all(map(os.path.exists, paths)):
        check_index(tokens)
        if tokens.n_tokens + num_samples * seq_length > 10**9:
            print(f"building the order of {len(tokens):,} documents, {num_samples:,} samples: "
                  "about a minute for the whole Pile, once", file=sys.stderr)
        for path, array in zip(paths, build_order(tokens.sizes, seq_length, num_samples, seed)):
            with replacing(path) as file:
                np.save(file, array)
    return tuple(map(load_npy, paths)), paths


def check_index(tokens, block=1 << 24):
    """Raise ValueError unless each document of a TokenFile follows the one before, to the end."""
    end = 0
    for start in range(0, len(tokens), block):
        sizes = tokens.sizes[start:start + block].astype(np.int64)
        ends = end + np.cumsum(sizes) * tokens.dtype.itemsize
        bad = np.flatnonzero((sizes < 0) | (
            tokens.pointers[start:start + block] != ends - sizes * tokens.dtype.itemsize))
        if len(bad):
            document = start + int(bad[0])
            raise ValueError(f"{tokens.prefix}.idx: document {document:,} has size "
                             f"{tokens.sizes[document]} and pointer {tokens.pointers[document]}, "
                             "which do not follow the one before")
        end = int(ends[-1])


def load_npy(path):
    """Return a memory-mapped .npy file; never unpickles. Raises ValueError naming the file."""
    file_size(path)
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .npy file ({error}); delete it to rebuild") from None


def samples_needed(steps, batch_size):
    """Return gpt-neox's num_samples: 0.5 % more than the run consumes (147,164,160 for Pythia)."""
    return math.ceil(steps * batch_size * 1.005)


class OrderedData:
    """Rows of seq_length + 1 tokens in training order. No state: the same call, the same rows.

    Row i of step s is row s * batch_size + i of the order; the update of step s makes checkpoint
    s + 1. A file in training order already ("preshuffled": baked by `shuffle`, or published so) is
    served as it lies; any other is served through its order.

    What `shuffle` baked says so in PREFIX.json, and what was published lies in pieces. Where this
    misleads, {"preshuffled": true} or false in PREFIX.json decides: joined pieces look like any
    corpus cut into equally long documents.
    """

    def __init__(self, prefix, seq_length, num_samples, seed):
        self.tokens = TokenFile(prefix)
        self.seq_length = seq_length
        notes, length = self.tokens.notes(), self.tokens.equal_length()
        baked, in_pieces = bool(notes.get("baked_from")), len(self.tokens.bounds) > 2
        if notes.get("preshuffled", baked) and not length:
            raise ValueError(f"{self.tokens.prefix}.json says that it is in training order, but "
                             "its rows differ in length: not the file of this .json")
        self.preshuffled = bool(length and notes.get("preshuffled", baked or in_pieces))
        if self.preshuffled and length != seq_length + 1:
            raise ValueError(f"{self.tokens.prefix}: in training order already, in rows of "
                             f"{length} tokens; found seq_length = {seq_length}, expected "
                             f"{length - 1}")
        if not self.preshuffled:
            self.tokens.scattered = True
            self.order, self.paths = load_order(self.tokens, seq_length, num_samples, seed)
            self.settings = {"seq_length": seq_length, "num_samples": num_samples, "seed": seed}
            if not self._order_fits(num_samples):
                raise ValueError(f"{self.paths[0]} and its two siblings do not belong to "
                                 f"{self.tokens.prefix}.idx ({len(self.tokens):,} documents); "
                                 "delete them to rebuild")

    def _order_fits(self, num_samples):
        """Return whether the order is of this token file, by its lengths and 300 of its rows."""
        doc_idx, sample_idx, shuffle_idx = self.order
        n_samples, every = len(shuffle_idx), len(shuffle_idx) // 300 + 1
        epochs, rest = divmod(len(doc_idx), len(self.tokens))
        return (rest == 0 and n_samples == (epochs * self.tokens.n_tokens - 1) // self.seq_length
                and n_samples >= num_samples and sample_idx.shape == (n_samples + 1, 2)
                and len(set(shuffle_idx[::every].tolist())) == len(shuffle_idx[::every])
                and all(sum(stop - start for _, start, stop in self.pieces(row))
                        == self.seq_length + 1 for row in range(0, len(self), every)))

    def describe(self):
        """Return the lines that say where rows come from, and what is unusual about the data."""
        n, length = len(self.tokens), self.seq_length + 1
        if self.preshuffled:
            return [f"{n:,} rows of {length} tokens in training order already, served as they lie"]
        doc_idx, _, shuffle_idx = self.order
        epochs = len(doc_idx) // n
        lines = [f"{n:,} documents, {epochs} epochs"
                 + (" in one shuffle, so that no step ends an epoch" if epochs > 1 else "")
                 + f", {len(shuffle_idx):,} samples of {length} tokens"]
        some = range(0, n, n // 1000 + 1)
        last = [self.tokens.read(i)[-1:].tolist() == [ENDOFTEXT] for i in some]
        if not all(last):
            lines.append(f"{sum(last):,} of {len(some):,} documents looked at end in "
                         "<|endoftext|>: where they do not, nothing marks where the next begins")
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
            sizes = self.tokens.sizes[documents].tolist()
            sizes[-1] = stop + 1  # this sample's last token is the next one's first
        except (ValueError, IndexError, TypeError):
            raise ValueError(f"{self.paths[0]}: damaged, or one of its two siblings, at row "
                             f"{row:,}; delete them to rebuild") from None
        starts = [start] + [0] * (len(documents) - 1)
        return [piece for piece in zip(documents, starts, sizes) if piece[1] < piece[2]]

    def rows(self, numbers):
        """Return the rows (n, seq_length + 1) of these numbers, in the file's dtype."""
        out = np.empty((len(numbers), self.seq_length + 1), dtype=self.tokens.dtype)
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
        check(self, "the PREFIX of a token file", bool, "data")
        check(self, "at least 1", lambda value: value >= 1, "steps", "batch_size", "seq_length")
        check(self, f"0 to {2**32 - 1:,}", lambda value: 0 <= value < 2**32, "seed")


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
