"""The Pile's order: Megatron token files, gpt-neox's shuffle, and batches that are functions of the step.

    python data.py tokenize --input=a.jsonl,b.txt --output=data/train
    python data.py order    --data=data/train --steps=143000 --batch_size=1024
    python data.py shuffle  --data=data/train --output=data/preshuffled --steps=143000
    python data.py view     --data=data/train --step=0

PREFIX.bin holds the tokens of all documents, little-endian, one after the other, with no header.
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

Beside them `tokenize` leaves PREFIX.json (subset names, counts) and PREFIX_subset_idx.npy (the subset
of each document). `shuffle` bakes the order into a token file of its own, whose every sequence is one
row of seq_length + 1 tokens, already in training order, as the published "preshuffled" Pile.
"""

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import command
from tokenizer import ENDOFTEXT, Tokenizer

MAGIC = b"MMIDIDX\0\0"
HEADER_BYTES = 34
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


# ---------------------------------------------------------------------------- token files


class TokenFile:
    """Memory-mapped reader of PREFIX.idx and PREFIX.bin: len() documents, read(document, start, stop).

    Raises ValueError, naming the file and what is wrong with it, OSError if it cannot be opened.
    """

    def __init__(self, prefix):
        self.prefix = str(prefix).removesuffix(".bin").removesuffix(".idx")
        idx, bin_ = f"{self.prefix}.idx", f"{self.prefix}.bin"
        idx_bytes = os.path.getsize(idx)
        with open(idx, "rb") as file:
            header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or header[:9] != MAGIC:
            raise ValueError(f"{idx}: not a Megatron index (it starts with {header[:9]!r}, "
                             f"expected {MAGIC!r})")
        version, count, doc_count = (int.from_bytes(header[a:b], "little")
                                     for a, b in ((9, 17), (18, 26), (26, 34)))
        if version != 1:
            raise ValueError(f"{idx}: version {version}, expected 1")
        if header[17] not in DTYPES:
            raise ValueError(f"{idx}: dtype code {header[17]}, expected one of {sorted(DTYPES)}")
        expected = HEADER_BYTES + 12 * count + 8 * doc_count
        if idx_bytes != expected:
            raise ValueError(f"{idx}: {idx_bytes:,} bytes, but its header ({count:,} sequences, "
                             f"{doc_count:,} doc_idx entries) wants {expected:,}: truncated or damaged")
        self.dtype = np.dtype(DTYPES[header[17]]).newbyteorder("<")
        if count == 0:
            raise ValueError(f"{idx}: holds no documents")
        self.sizes = np.memmap(idx, "<i4", "r", HEADER_BYTES, (count,))
        self.pointers = np.memmap(idx, "<i8", "r", HEADER_BYTES + 4 * count, (count,))
        bin_bytes = os.path.getsize(bin_)
        end = int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
        if bin_bytes != end:
            raise ValueError(f"{bin_}: {bin_bytes:,} bytes, but {idx} describes {end:,}: "
                             + ("truncated" if bin_bytes < end else "not the file of this index"))
        if bin_bytes == 0:
            raise ValueError(f"{bin_}: holds no tokens")
        self.tokens = np.memmap(bin_, self.dtype, "r")  # int64 positions throughout: over 2^32 bytes

    def __len__(self):
        return len(self.sizes)

    def read(self, document, start=0, stop=None):
        """Return tokens start..stop (to the end if None) of a document, without copying."""
        size = int(self.sizes[document])
        pointer = int(self.pointers[document])
        stop = size if stop is None else stop
        first = pointer // self.dtype.itemsize
        if not (0 <= start <= stop <= size and 0 <= pointer and first + size <= len(self.tokens)):
            raise ValueError(f"{self.prefix}.idx: document {document} (pointer {pointer}, size {size}) "
                             f"cannot give tokens {start}..{stop}: damaged index")
        return self.tokens[first + start:first + stop]


@contextmanager
def write_token_file(prefix):
    """Give an append(tokens) that adds one uint16 document; PREFIX.bin and .idx appear whole, or not at all."""
    prefix, sizes = str(prefix), []
    bin_ = f"{prefix}.bin"
    os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)

    with replacing(f"{prefix}.idx") as idx_file, replacing(bin_) as bin_file:
        def append(tokens):
            bin_file.write(np.asarray(tokens, dtype="<u2").data)
            sizes.append(len(tokens))

        yield append
        if not sizes:
            raise ValueError(f"{bin_}: nothing to write, the input holds no documents")
        sizes = np.array(sizes, dtype="<i4")
        pointers = 2 * (np.cumsum(sizes, dtype="<i8") - sizes)
        header = MAGIC + (1).to_bytes(8, "little") + bytes([8])
        for array in (header, len(sizes).to_bytes(8, "little"), (len(sizes) + 1).to_bytes(8, "little"),
                      sizes.data, pointers.astype("<i8").data, np.arange(len(sizes) + 1, dtype="<i8").data):
            idx_file.write(array)


@contextmanager
def replacing(path):
    """Open a file that takes the place of `path` only once it is complete and on the disk."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the order


def build_order(sizes, seq_length, num_samples, seed):
    """Return gpt-neox's (doc_idx, sample_idx, shuffle_idx) over documents of `sizes` tokens.

    doc_idx (epochs * documents,) int32: all epochs' copies of every document in ONE shuffle. gpt-neox
        v1.0 has no separate last epoch, so a run of 1.5 epochs is not "one pass, then half of
        another": some documents come twice before others come once.
    sample_idx (samples + 1, 2) int32: where in doc_idx, and at which token of that document, each
        sample begins. A sample is seq_length + 1 tokens and the next one begins on its last.
    shuffle_idx (samples,) uint32: the order in which the samples are served.

    Source: megatron/data/gpt2_dataset.py and helpers.cpp (build_sample_idx), here without a loop.
    """
    total = int(np.sum(sizes, dtype=np.int64))
    if total < 2:
        raise ValueError(f"the data hold {total} tokens, expected at least 2")
    epochs = -(-(num_samples * seq_length + 1) // total)  # smallest with enough samples
    rng = np.random.RandomState(seed)
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    rng.shuffle(doc_idx)
    n_samples = (epochs * total - 1) // seq_length
    starts = np.concatenate(([0], np.cumsum(sizes[doc_idx], dtype=np.int64)))  # of each document
    first_tokens = np.arange(n_samples + 1, dtype=np.int64) * seq_length
    position = np.searchsorted(starts, first_tokens, side="right") - 1
    sample_idx = np.stack((position, first_tokens - starts[position]), axis=1).astype(np.int32)
    sample_idx[0] = 0  # the walk starts at document 0 even if that is empty
    shuffle_idx = np.arange(n_samples, dtype=np.uint32 if n_samples < 2**32 - 2 else np.int64)
    rng.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def order_paths(prefix, seq_length, num_samples, seed):
    """Return the three .npy paths under gpt-neox's own cache names."""
    stem = f"{prefix}_train_0_indexmap_{num_samples}ns_{seq_length}sl_{seed}s"
    return [f"{stem}_{name}_idx.npy" for name in ("doc", "sample", "shuffle")]


def load_order(tokens, seq_length, num_samples, seed):
    """Return the memory-mapped order of a TokenFile, building its three .npy files if one is missing."""
    paths = order_paths(tokens.prefix, seq_length, num_samples, seed)
    if not all(map(os.path.exists, paths)):
        for path, array in zip(paths, build_order(tokens.sizes, seq_length, num_samples, seed)):
            with replacing(path) as file:
                np.save(file, array)
    try:
        doc_idx, sample_idx, shuffle_idx = (np.load(path, mmap_mode="r") for path in paths)
    except (ValueError, EOFError) as error:  # not an .npy file, or one that wants unpickling
        raise ValueError(f"{paths[0]} and its two siblings: {error}; delete them to rebuild") from None
    if (len(doc_idx) % len(tokens) or sample_idx.shape != (len(shuffle_idx) + 1, 2)
            or len(shuffle_idx) < num_samples):
        raise ValueError(f"{paths[0]} and its two siblings do not belong to {tokens.prefix}.idx "
                         f"({len(tokens):,} documents); delete them to rebuild")
    return doc_idx, sample_idx, shuffle_idx


def samples_needed(steps, batch_size):
    """Return gpt-neox's num_samples: half a percent more than the run consumes (147,164,160 for Pythia)."""
    return math.ceil(steps * batch_size * 1.005)


class OrderedData:
    """Rows of seq_length + 1 tokens in training order. Holds no state: the same call, the same rows.

    Row i of step s is row s * batch_size + i of the order; the update of step s makes checkpoint
    s + 1. A token file whose every sequence is one row long is served as it lies ("preshuffled",
    never shuffled again); any other is served through its order.
    """

    def __init__(self, prefix, seq_length, num_samples, seed):
        self.tokens = TokenFile(prefix)
        self.seq_length = seq_length
        self.preshuffled = bool((self.tokens.sizes == seq_length + 1).all())
        if not self.preshuffled:
            self.order = load_order(self.tokens, seq_length, num_samples, seed)

    def __len__(self):
        if self.preshuffled:
            return len(self.tokens)
        return len(self.order[2]) - 1  # gpt-neox never serves the last shuffled sample

    def pieces(self, row):
        """Return [(document, start, stop)]: the documents' tokens that make up a row."""
        if not 0 <= row < len(self):
            raise ValueError(f"row {row:,} of {len(self):,} (the first is 0)")
        if self.preshuffled:
            return [(row, 0, self.seq_length + 1)]
        doc_idx, sample_idx, shuffle_idx = self.order
        sample = int(shuffle_idx[row])
        (first, start), (last, stop) = sample_idx[sample:sample + 2].tolist()
        documents = doc_idx[first:last + 1].tolist()
        sizes = self.tokens.sizes[documents].tolist()
        begins, ends = [start] + [0] * (last - first), sizes[:-1] + [stop + 1]
        return [piece for piece in zip(documents, begins, ends) if piece[1] < piece[2]]

    def rows(self, numbers):
        """Return the rows (n, seq_length + 1) of these numbers, in the file's dtype."""
        out = np.empty((len(numbers), self.seq_length + 1), dtype=self.tokens.dtype)
        for row, number in zip(out, numbers):
            np.concatenate([self.tokens.read(*piece) for piece in self.pieces(int(number))], out=row)
        return out

    def batch(self, step, batch_size, rank=0, world_size=1, micro_batch_size=None):
        """Return this rank's rows of a step as micro-batches, (A, micro_batch_size, seq_length + 1) int64."""
        numbers = batch_rows(step, batch_size, rank, world_size, micro_batch_size)
        return self.rows(numbers.ravel()).astype(np.int64).reshape(*numbers.shape, -1)


def batch_rows(step, batch_size, rank=0, world_size=1, micro_batch_size=None):
    """Return the row numbers (A, micro_batch_size) that a rank sees at a step.

    As gpt-neox's DistributedBatchSampler: each of the A micro-steps takes the next
    micro_batch_size * world_size rows, and each rank a contiguous slice of those.
    """
    micro = micro_batch_size or batch_size // world_size
    if batch_size % (micro * world_size):
        raise ValueError(f"batch_size = {batch_size} is not a multiple of micro_batch_size * processes "
                         f"= {micro} * {world_size}")
    numbers = np.arange(step * batch_size, (step + 1) * batch_size)
    return numbers.reshape(-1, world_size, micro)[:, rank]


# ---------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Tokenize:
    input: str  # comma-separated .jsonl ({"text", optional "meta": {"pile_set_name"}}) and .txt files
    output: str  # writes OUTPUT.bin, OUTPUT.idx, OUTPUT.json and OUTPUT_subset_idx.npy
    tokenizer: str = "20B_tokenizer.json"
    append_eod: bool = True  # <|endoftext|> after every document


def tokenize(options):
    """Turn text files into PREFIX.bin and PREFIX.idx, one sequence a document, in the order given."""
    tokenizer = load_tokenizer(options.tokenizer)
    paths = options.input.split(",")
    total = sum(os.path.getsize(path) for path in paths)
    end = [ENDOFTEXT] if options.append_eod else []
    subsets, subset_idx, n_tokens, empty = {}, [], 0, 0
    with (write_token_file(options.output) as append, ThreadPoolExecutor() as pool,
          tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar):
        for batch in _batches(documents(paths, bar.update)):
            texts, names = zip(*batch)
            for ids, name in zip(pool.map(tokenizer.encode, texts), names):
                if not ids:
                    empty += 1
                    continue
                append(ids + end)
                n_tokens += len(ids + end)
                subset_idx.append(subsets.setdefault(name, len(subsets)))
    with replacing(f"{options.output}_subset_idx.npy") as file:
        np.save(file, np.array(subset_idx, dtype=np.uint16))
    summary = {"documents": len(subset_idx), "tokens": n_tokens, "empty_documents": empty,
               "append_eod": options.append_eod, "subsets": list(subsets)}
    with replacing(f"{options.output}.json") as file:
        file.write(json.dumps(summary, indent=2).encode())
    print(f"{options.output}.bin: {n_tokens:,} tokens of {len(subset_idx):,} documents in "
          f"{len(subsets)} subsets, {empty:,} empty documents skipped")


def load_tokenizer(path):
    """Return the Tokenizer at a path, or raise ValueError that says where to get one."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such tokenizer; `make tokenizer` gets it, --tokenizer=PATH names it")
    return Tokenizer(path)


def documents(paths, advance):
    """Yield (text, subset name) of every document; advance(bytes) reports progress."""
    for path in paths:
        if path.endswith(".txt"):
            raw = Path(path).read_bytes()
            yield _utf8(raw, path), "unnamed"
            advance(len(raw))
        elif path.endswith(".jsonl"):
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_document(_utf8(line, f"{path}, line {number}"), f"{path}, line {number}")
                    advance(len(line))
        else:
            raise ValueError(f"{path}: expected a .jsonl or .txt file")


def _utf8(raw, where):
    try:
        return raw.decode("utf8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _json_document(line, where):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected an object with a string "text"')
    meta = record.get("meta")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return text, name if isinstance(name, str) else "unnamed"


def _batches(items, size=1000):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(frozen=True)
class Order:
    data: str  # PREFIX of a token file
    steps: int = 143000
    batch_size: int = 1024  # rows of a step
    seq_length: int = 2048
    num_samples: int | None = None  # default: ceil(1.005 * steps * batch_size)
    seed: int = 1234


def order(options):
    """Fix the training order: write the three index arrays under gpt-neox's cache names."""
    num_samples = options.num_samples or samples_needed(options.steps, options.batch_size)
    tokens = TokenFile(options.data)
    doc_idx, sample_idx, shuffle_idx = load_order(tokens, options.seq_length, num_samples, options.seed)
    print(f"{len(tokens):,} documents, {len(doc_idx) // len(tokens)} epochs, "
          f"{len(shuffle_idx):,} samples of {options.seq_length + 1} tokens")
    for path in order_paths(tokens.prefix, options.seq_length, num_samples, options.seed):
        print(path)


@dataclass(frozen=True)
class Shuffle(Order):
    output: str = ""  # PREFIX of the token file to write


def shuffle(options):
    """Bake the order: write the rows of all steps, in training order, as a token file of their own."""
    if not options.output:
        raise ValueError("missing: --output (--help explains every setting)")
    num_samples = options.num_samples or samples_needed(options.steps, options.batch_size)
    data = OrderedData(options.data, options.seq_length, num_samples, options.seed)
    if data.preshuffled:
        raise ValueError(f"{options.data}: already in training order, every sequence is one row")
    n_rows = min(options.steps * options.batch_size, len(data))
    with write_token_file(options.output) as append:
        for start in tqdm(range(0, n_rows, 1024), unit="krow", disable=None):
            for row in data.rows(range(start, min(start + 1024, n_rows))):
                append(row)
    print(f"{options.output}.bin: {n_rows:,} rows of {options.seq_length + 1} tokens in training order")


@dataclass(frozen=True)
class View(Order):
    step: int = 0  # 0-based: the update of step 0 makes checkpoint step1
    rows: str = "0:4"  # which of the step's rows, first:last+1
    tokenizer: str = "20B_tokenizer.json"


def view(options):
    """Print what the model saw at a step: text, with document boundaries and subset names."""
    tokenizer = load_tokenizer(options.tokenizer)
    num_samples = options.num_samples or samples_needed(options.steps, options.batch_size)
    data = OrderedData(options.data, options.seq_length, num_samples, options.seed)
    try:
        first, last = (int(end) for end in options.rows.split(":"))
    except ValueError:
        raise ValueError(f"rows = {options.rows!r}, expected first:last+1, as in 0:4") from None
    subset_of = _subset_names(data)
    numbers = batch_rows(options.step, options.batch_size)[0]
    print(f"step {options.step:,} is rows {numbers[0]:,} to {numbers[-1]:,} (both included); "
          f"checkpoint step{options.step + 1} is the first to have seen them")
    for row in numbers[first:last]:
        print(f"\n=== row {row:,} (step {options.step:,}, row {row - numbers[0]})")
        for document, start, stop in data.pieces(int(row)):
            print(f"--- document {document:,}{subset_of(document)}, tokens {start:,} to {stop - 1:,}")
            print(tokenizer.decode(data.tokens.read(document, start, stop).tolist()))


def _subset_names(data):
    """Return a function from a document to ", its subset" ("" where nobody recorded one)."""
    if data.preshuffled or not os.path.exists(f"{data.tokens.prefix}.json"):
        return lambda document: ""
    names = json.loads(Path(f"{data.tokens.prefix}.json").read_text())["subsets"]
    subset_idx = np.load(f"{data.tokens.prefix}_subset_idx.npy", mmap_mode="r")
    return lambda document: f", {names[subset_idx[document]]}"


if __name__ == "__main__":
    command(sys.argv[1:], {"tokenize": (Tokenize, tokenize), "order": (Order, order),
                           "shuffle": (Shuffle, shuffle), "view": (View, view)})
