"""Safetensors files: checked before they are believed, read and written one tensor at a time.

    bytes 0-7   N, the header's length, little-endian
    N bytes     the header, JSON:
                {name: {"dtype": "F16", "shape": [3, 4], "data_offsets": [0, 24]}, ...}
    the rest    the data, every tensor at its offsets, without holes

The safetensors package reads the same format, but maps whole files (a truncated one then ends the
process with SIGBUS), and writes only what is all in memory at once. Files come from strangers: a
file that is not whole, or lies about itself, ends in a ValueError that names it.
"""

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from data import read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what weights and moments are stored as
# Parsed JSON takes up to 30 times its bytes; the header of a 12B model has 60 KB.
JSON_LIMIT = 4 << 20
CHUNK = 8 << 20  # bytes given to the disk at once: whole tensors of 100 MB took it 3 times as long


@dataclass(frozen=True)
class Stored:
    """A tensor that is still in its file: dtype and shape are known, read() returns it.

    Of a safetensors file, read(dtype) converts it on the way, without a copy in the stored dtype.
    """
    path: Path
    dtype: torch.dtype
    shape: tuple
    read: Callable


def read_small_json(path, limit=JSON_LIMIT):
    """Return the object in a JSON file of at most `limit` bytes, or raise ValueError naming it."""
    if regular_size(path) > limit:
        raise ValueError(f"{path}: {os.path.getsize(path):,} bytes, expected at most {limit:,}")
    return read_json(path)


def regular_size(path):
    """Return a regular file's bytes (a pipe or a device would never end), or raise ValueError."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file")
    return status.st_size


def open_file(path):
    """Return {name: Stored} of a safetensors file, in the order of its bytes.

    Raises ValueError if the header is not exactly a description of this file.
    """
    path = Path(path)
    size = regular_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: not a whole safetensors file: {size:,} bytes, the header "
                             f"alone claims {length:,}")
        if length > JSON_LIMIT:
            raise ValueError(f"{path}: a header of {length:,} bytes, expected at most "
                             f"{JSON_LIMIT:,}")
        header = file.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
        expect(type(entries) is dict, "the header is no object")
        entries.pop("__metadata__", None)
        entries = sorted((_entry(*item) for item in entries.items()), key=lambda entry: entry[3:])
        end = 0
        for name, _, _, start, stop in entries:
            expect(start == end,
                   f"{name} begins at {start:,}, the tensor before it ends at {end:,}")
            end = stop
        expect(end == size - 8 - length,
               f"holds {size - 8 - length:,} bytes of data, expected {end:,}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {str(error)[:300]}") from None
    return {name: Stored(path, dtype, shape, _reader(path, name, dtype, shape, 8 + length + start))
            for name, dtype, shape, start, _ in entries}


def expect(condition, otherwise):
    """Raise ValueError(otherwise) unless the condition holds."""
    if not condition:
        raise ValueError(otherwise)


def _unique(pairs):
    names = dict(pairs)
    expect(len(names) == len(pairs), "a name occurs twice")
    return names


def is_name(name):
    """Tell whether this can stand for a tensor in a message of one line."""
    return type(name) is str and name.isprintable() and len(name) < 200


def _entry(name, entry):
    """Return (name, dtype, shape, start, stop) of a header's entry, or raise ValueError."""
    expect(is_name(name), f"no name of a tensor: {name[:50]!r}")
    expect(type(entry) is dict and entry.keys() == {"dtype", "shape", "data_offsets"},
           f"{name}: expected dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    expect(type(entry["dtype"]) is str and entry["dtype"] in DTYPES,
           f"{name}: no dtype {entry['dtype']!r}")
    for numbers, most in ((shape, 8), (offsets, 2)):
        expect(type(numbers) is list and len(numbers) <= most
               and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers),
               f"{name}: found {numbers!r}")
    expect(len(offsets) == 2, f"{name}: data_offsets {offsets!r}")
    dtype = DTYPES[entry["dtype"]]
    span = math.prod(shape) * dtype.itemsize
    expect(offsets[1] - offsets[0] == span,
           f"{name}: {shape} of {entry['dtype']} are {span:,} bytes, the offsets {offsets} are not")
    return name, dtype, tuple(shape), *offsets


def allocate(path, name, shape, dtype):
    """Return an empty tensor, or raise ValueError saying whose bytes the memory cannot hold."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError:  # which is how PyTorch says it
        raise ValueError(f"{path}: no memory for the {math.prod(shape) * dtype.itemsize:,} bytes "
                         f"of {name}") from None


def _reader(path, name, dtype, shape, position):
    def read(wanted=dtype):
        tensor = allocate(path, name, shape, wanted)
        with open(path, "rb") as file:
            file.seek(position)
            if wanted == dtype:
                whole = file.readinto(raw(tensor)) == tensor.nbytes
            else:
                # Blocks of 1 MB, converted while the cache holds them: 15 % faster than of 8 MB.
                buffer = torch.empty(min((1 << 20) // dtype.itemsize, tensor.numel()), dtype=dtype)
                whole = True
                for part in tensor.reshape(-1).split(max(1, len(buffer))):
                    whole = whole and (file.readinto(raw(buffer[:len(part)]))
                                       == len(part) * dtype.itemsize)
                    part.copy_(buffer[:len(part)])
        if not whole:
            raise ValueError(f"{path}: ends inside {name}; it was whole when it was opened")
        return tensor
    return read


def raw(tensor):
    """Return the bytes of a contiguous tensor on the CPU, as a buffer without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def open_folder(folder, stem="model"):
    """Return {name: Stored} of folder/STEM.safetensors, or of the shards that its index names.

    Raises ValueError if a shard is missing, lies elsewhere or holds what the index does not say.
    """
    single = Path(folder) / f"{stem}.safetensors"
    index = Path(folder) / f"{stem}.safetensors.index.json"
    if single.exists() or not index.exists():
        return open_file(single)
    return open_shards(index, open_file)


def read_index(index):
    """Return {tensor: the name of a file beside the index}, or raise ValueError."""
    weight_map = read_small_json(index).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    for file in weight_map.values():
        if type(file) is not str or not re.fullmatch(r"\w[\w.-]*", file, re.ASCII):
            raise ValueError(f"{index}: {str(file)[:100]!r} is not the name of a file beside it")
    return weight_map


def open_shards(index, open_one):
    """Return {name: Stored} of the shards of an index file, each opened by open_one(path)."""
    weight_map, tensors = read_index(index), {}
    for file in sorted(set(weight_map.values())):
        shard = open_one(index.parent / file)
        listed = {name for name, where in weight_map.items() if where == file}
        problems = [f"missing {name}" for name in sorted(listed - shard.keys())]
        problems += [f"unexpected {name}" for name in sorted(shard.keys() - listed)]
        if problems:
            raise ValueError(f"{index.parent / file}: not what {index.name} says: "
                             f"{listing(problems)}")
        tensors |= shard
    return tensors


def listing(problems, most=20):
    """Return the problems in one line, the first of them if they are many."""
    return "; ".join(problems[:most]) + (
        f"; and {len(problems) - most} more" if len(problems) > most else "")


def check_tensors(where, tensors, shapes):
    """Raise ValueError if a tensor is missing, extra, of another shape or no float.

    It names them, the first 20 of many.
    """
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in shapes]
    problems += [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
                 for name, shape in shapes.items()
                 if name in tensors and tuple(tensors[name].shape) != tuple(shape)]
    problems += [f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected float32, float16 "
                 "or bfloat16" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if problems:
        raise ValueError(f"{where}: {listing(problems)}")


# ---------------------------------------------------------------------------- writing


def write_file(path, tensors):
    """Bring {name: tensor or Stored} to disk as a safetensors file; return its bytes and sha256.

    Three Stored at a time are in memory: while one is written, a thread hashes those before it.
    """
    # Wide elements first, as the safetensors package does: every tensor is aligned to its own size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + size_of(tensor)
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    sha256, hashing = hashlib.sha256(), deque()
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        for data in itertools.chain([len(header).to_bytes(8, "little") + header],
                                    map(_bytes_of, tensors.values())):
            hashing.append(hasher.submit(sha256.update, data))
            if len(hashing) > 2:
                hashing.popleft().result()
            for start in range(0, len(data), CHUNK):
                file.write(data[start:start + CHUNK])
        file.flush()
        os.fsync(file.fileno())  # which the rest is hashed beside
    return {"bytes": 8 + len(header) + end, "sha256": sha256.hexdigest()}


def _bytes_of(tensor):
    return raw(tensor.read() if isinstance(tensor, Stored) else tensor.detach().cpu().contiguous())


def size_of(tensor):
    """Return the bytes of a tensor or Stored."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def split(stem, tensors, shard_size):
    """Return {file name: {name: tensor}} and {index name: object}, as Hugging Face names them.

    One file and no index, or shards of at most shard_size bytes, but for tensors larger than that.
    """
    shards, room = [{}], shard_size
    for name, tensor in tensors.items():
        if shards[-1] and size_of(tensor) > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = tensor
        room -= size_of(tensor)
    if len(shards) == 1:
        return {f"{stem}.safetensors": tensors}, {}
    files = {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard
             for i, shard in enumerate(shards, 1)}
    return files, {f"{stem}.safetensors.index.json": {
        "metadata": {"total_size": sum(map(size_of, tensors.values()))},
        "weight_map": {name: file for file, shard in files.items() for name in shard}}}


def write_folder(folder, tensors, stem="model", shard_size=math.inf):
    """Write tensors or Stored as STEM.safetensors or its shards; return {file: bytes, sha256}."""
    files, indices = split(stem, tensors, shard_size)
    for name, index in indices.items():
        (Path(folder) / name).write_text(json.dumps(index, indent=2) + "\n")
    return {name: write_file(Path(folder) / name, shard) for name, shard in files.items()}


def sha256_of(path):
    """Return the SHA-256 of a file in hex, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
