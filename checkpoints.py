"""Checkpoints of a run, in Hugging Face's layout, never half-written and never pickled.

    RUN/config.json                 every setting of the run
    RUN/metrics.csv                 one line a step
    RUN/step64/model.safetensors    float32 weights under the published names
               config.json          GPTNeoXForCausalLM's, naming the GELU the run was trained with
               tokenizer.json       so that AutoTokenizer works too
               tokenizer_config.json
               optimizer.safetensors  Adam's moments: exp_avg.NAME and exp_avg_sq.NAME, float32
               training.json        the step, its place in the data, the loss scaler
               manifest.json        bytes and SHA-256 of every file above, written last

Checkpoint N is the weights after N updates; step 0 is the initialisation. (Pythia's update 0 has
learning rate 0, so step 0 and step 1 are equal: that is how the originals are.)

    AutoModelForCausalLM.from_pretrained("RUN/step64")

Safetensors files: checked before they are believed, read and written one tensor at a time.

    bytes 0-7   N, the header's length, little-endian
    N bytes     the header, JSON:
                {name: {"dtype": "F16", "shape": [3, 4], "data_offsets": [0, 24]}, ...}
    the rest    the data, every tensor at its offsets, without holes

The safetensors package reads the same format, but maps whole files (a truncated one then ends the
process with SIGBUS), and writes only what is all in memory at once. Files come from strangers: a
file that is not whole, or lies about itself, ends in a ValueError that names it.

The published layout: a Pythia's tensor names and config.json as Hugging Face has them.

Source: transformers' GPTNeoXForCausalLM, 4.24 to 5.

Files of torch.save: looked through, then read with weights_only, so nothing in them runs.

Published checkpoints: every form they come in, conversion both ways, the Hub.

    python checkpoints.py fetch pythia-70m-deduped --steps=0,1,512,143000
    python checkpoints.py import pythia-70m-deduped/step512 runs/pythia-70m-deduped/step512
    python checkpoints.py import global_step143000 runs/mine/step143000
    python checkpoints.py export runs/mine/step143000 OUT --dtype=float16 --shard_size=5GB --push

What is read: model.safetensors or its shards, pytorch_model.bin or its shards, gpt-neox's
global_stepN/layer_XX-model_YY-model_states.pt of any number of tensor-parallel ranks. The last two
are pickles: they are looked through first and then read with weights_only, so nothing in them runs.

Source of the NeoX layout: gpt-neox v1.0 tools/convert_to_hf.py.

What two checkpoints differ in, and what a run holds.

    python verify.py diff runs/mini/step512 OTHER
    python checkpoints.py list runs/mini
"""

import csv
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import pickletools
import re
import shlex
import shutil
import struct
import sys
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import command, file_size, read_json, write_json
from model import ModelConfig, Pythia


# ------------------------------------------------------------ checkpoints.py


SHARD_BYTES = 5_000_000_000  # of a tensor file at most, unless one tensor is larger


def is_shard(tensor):
    """Return whether a tensor is a DTensor, a process's shard of a whole one."""
    return hasattr(tensor, "full_tensor")  # importing DTensor takes a second


@torch.no_grad()
def fill(tensor, whole):
    """Copy a whole tensor into `tensor`, which may be a process's shard of it."""
    if is_shard(tensor):  # every process has the whole, so none is sent
        from torch.distributed.tensor import distribute_tensor
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements,
                                  src_data_rank=None)
    tensor.copy_(whole)


def checkpoint_steps(steps, every=1000):
    """Return a run's scheduled steps: 0, 1, 2, 4, ..., 512, the multiples of `every`, the last.

    checkpoint_steps(143000) is Pythia's 154.
    """
    scheduled = {0, steps} | {2**i for i in range(10)} | set(range(0, steps, every))
    return sorted(step for step in scheduled if step <= steps)


def load_model(folder, device="cpu"):
    """Return the Pythia of a folder (ours, or a published one in safetensors), in float32."""
    config, tensors = open_model(folder)
    with torch.device("meta"):
        model = Pythia(config)
    names = [name for name, _ in model.named_parameters()]
    with ThreadPoolExecutor(2) as readers:  # one converts while the other reads: 1.6 times as fast
        state = readers.map(lambda name: tensors[hf_name(name)].read(torch.float32).to(device),
                            names)
        model.load_state_dict(dict(zip(names, state)), assign=True)
    return model


def save(run, step, model, optimizer, training, tokenizer=None, scheduled=True, asynchronous=False,
         state_every=None):
    """Write RUN/step{N} whole or not at all; return a Future that is done when it is on the disk.

    Every process calls. asynchronous: return once the tensors are copied to host memory; wait for
    the Future before the next call. training: a JSON object to come back from load_training, with
    the number of successful updates and the loss scaler's state. An unscheduled checkpoint (of an
    interrupted run) gives way to the next one. A checkpoint that is already there, whole, is left
    alone, but for one of ours without moments: a run that went back behind it passes it again, and
    may be interrupted there. state_every: Adam's moments stay only in checkpoints of its multiples
    and in the newest.
    """
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    folder = Path(run) / f"step{step}"
    if not Path(run).is_dir():  # an unmounted disk: do not begin another run in its place
        raise FileNotFoundError(errno.ENOENT, "the run folder has vanished", str(run))
    exists = is_whole(folder) and not lost_moments(folder)
    _meet()  # nobody makes the folder before all have looked
    if exists:
        return
    parameters = dict(model.named_parameters())
    weights = {hf_name(name): p.detach() for name, p in parameters.items()}
    # There are none before the first update.
    moments = {f"{kind}.{name}": optimizer.state[p][kind] for name, p in parameters.items()
               for kind in ("exp_avg", "exp_avg_sq") if optimizer.state}
    (shards, notes), (others, more) = (split(stem, contents, SHARD_BYTES) for stem, contents in
                                       (("model", weights), ("optimizer", moments)))
    shards |= others
    mine = own_share(shards, rank, count, asynchronous)
    notes |= more | {"training.json": {"step": step, "scheduled": scheduled, **training},
                     "config.json": hf_config(model.config)}

    def write(temporary):
        written = {name: write_file(temporary / name, shard) for name, shard in mine.items()}
        if rank > 0:
            write_json(temporary / f".written{rank}", written)
        _meet()  # all files of all processes are written
        return written

    def finish():
        if rank > 0:
            _meet()  # the temporary folder is there
            write(folder.with_name(f".{folder.name}.tmp"))
        else:
            with writing(folder) as temporary:
                _meet()
                written = write(temporary)
                for other in temporary.glob(".written*"):
                    written |= read_json(other)
                    other.unlink()
                for name, note in notes.items():
                    write_json(temporary / name, note)
                if tokenizer:
                    write_tokenizer(temporary, tokenizer, model.config.seq_length)
                write_manifest(temporary, written)
            make_room(run, step, state_every)
        _meet()

    finish_writing()
    _PENDING.append(_WRITER.submit(finish))
    if not asynchronous:
        finish_writing()


_WRITER = ThreadPoolExecutor(1)
_PENDING = []


def finish_writing():
    """Wait until the checkpoint under way is on the disk; its processes still need each other."""
    while _PENDING:
        _PENDING.pop().result()


@functools.cache
def _group():
    return dist.new_group(backend="gloo")  # of its own: a thread waits in it while training goes on


def _meet():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier(_group())


def own_share(files, rank, count, copy):
    """Return the files that this process writes, {file name: {name: whole tensor}}.

    Every process calls. The files go round the processes. Sharded tensors are gathered one at a
    time and kept, in host memory, by the process that writes them, so that none of several ever
    holds a whole copy of a model of several files.
    """
    mine = {name: {} for i, name in enumerate(files) if i % count == rank}
    for file, contents in files.items():
        for name, tensor in contents.items():
            sharded = is_shard(tensor)
            if sharded:
                tensor = tensor.full_tensor()
            if file in mine:
                mine[file][name] = tensor.to("cpu", copy=not sharded) if copy or sharded else tensor
    return mine


def make_room(run, step, state_every):
    """Remove what no later step needs: unscheduled checkpoints before `step`, moments off the grid.

    Left alone: links, which lead to another run, and what is damaged.
    """
    for other, folder in step_folders(run):
        try:
            training = read_training(folder, other)
        except ValueError:
            continue
        if other >= step or folder.is_symlink() or not training or not is_whole(folder):
            continue
        if not training.get("scheduled", True):
            temporary = folder.with_name(f".{folder.name}.tmp")  # no half checkpoint at any moment
            os.rename(folder, temporary)
            shutil.rmtree(temporary)
        elif state_every and other % state_every:
            moments = list(folder.glob("optimizer*.safetensors*"))
            if has_state(folder):
                names = {path.name for path in moments}
                write_json(folder / "manifest.json", {
                    name: entry for name, entry in read_json(folder / "manifest.json").items()
                    if name not in names})
                _sync(folder)  # before the files go: what the manifest lists is there at any moment
            for path in moments:
                path.unlink()


def lock(run):
    """Keep other processes from writing to a run folder until this one ends, or raise ValueError.

    Removes what a killed process left half-written.
    """
    Path(run).mkdir(parents=True, exist_ok=True)
    file = open(Path(run) / ".lock", "a")
    _LOCKS.append(file)  # open for as long as the process lives, however it ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(f"{run}: another process is writing this run; wait for it or name "
                             "another --out_dir") from None
        # What remains is a file system without locks.
    for path in Path(run).glob(".step*.tmp"):
        _remove(path)
    folders = [folder for _, folder in step_folders(run) if not folder.is_symlink()]
    for path in (path for folder in (Path(run), *folders) for path in folder.iterdir()):
        if HALF_WRITTEN.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


# What the holder of the lock alone writes, by config.replacing. An evaluation or `verify` may be
# writing its CSV here at this moment, on another machine that shares the disk.
HALF_WRITTEN = re.compile(
    r"(config\.json|manifest\.json|(metrics|heldout|interventions)\.csv)\.\d+\.tmp")
_LOCKS = []


def _remove(path):
    path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(folder):
    """Give a new folder that takes the name `folder` only once all of it is on the disk.

    What had the name stays as NAME.broken, unless the new folder has all of its bytes.
    """
    folder, before = Path(folder), None
    temporary = folder.with_name(f".{folder.name}.tmp")
    _remove(temporary)  # what a killed process left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if os.path.lexists(folder):  # damaged or without moments: else it had been left alone
            before = next(path for i in itertools.count() if not os.path.lexists(
                path := folder.with_name(f"{folder.name}.broken{i or ''}")))
            os.rename(folder, before)
        os.rename(temporary, folder)
        _sync(folder.parent)
        if before and is_whole(before) and lost_moments(before) and (
                manifest_of(before).items() <= manifest_of(folder).items()):
            _remove(before)
    finally:  # a full disk gets its room back
        shutil.rmtree(temporary, ignore_errors=True)


def write_tokenizer(folder, tokenizer, seq_length):
    """Copy a tokenizer.json into a checkpoint, with what AutoTokenizer wants beside it."""
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "GPTNeoXTokenizer", "model_max_length": seq_length,
        **{f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk")}})


def write_manifest(folder, known=()):
    """Write folder/manifest.json: bytes and sha256 of every file; `known` has some already."""
    known = dict(known)
    entries = {path.name: known.get(path.name)
               or {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
               for path in sorted(Path(folder).iterdir()) if path.name != "manifest.json"}
    write_json(Path(folder) / "manifest.json", entries)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def step_folders(run):
    """Return [(step, folder)] of all in a run folder that is named like a checkpoint, in order."""
    names = os.listdir(run) if os.path.isdir(run) else []
    return sorted((int(name[4:]), Path(run) / name) for name in names
                  if re.fullmatch(r"step(0|[1-9]\d*)", name) and os.path.isdir(Path(run) / name))


def saved_steps(run, state=False):
    """Return a run's steps with a whole checkpoint, in order; `state`: those to go on from."""
    return [step for step, folder in step_folders(run)
            if is_whole(folder) and (has_state(folder) or not state)]


def read_training(folder, step):
    """Return the object in a checkpoint's training.json, an empty one for a published checkpoint.

    Raises ValueError if it is of another step: the folder was copied or renamed.
    """
    path = folder / "training.json"
    if not path.exists():
        return {}
    training = read_json(path)
    for name, kind, words in (("updates", int, "an integer"), ("scaler", dict, "an object"),
                              ("step", int, "an integer")):
        if type(training.get(name)) is not kind:
            raise ValueError(f"{path}: {name} is {repr(training.get(name))[:50]}, expected {words}")
    if training["step"] != step:
        raise ValueError(f"{path}: is of step {training['step']}; was {folder.name} copied or "
                         "renamed? Move it away")
    return training


def manifest_of(folder):
    """Return {file: its bytes and sha256} of a checkpoint, an empty one if it has no manifest."""
    path = folder / "manifest.json"
    return read_json(path) if path.exists() else {}


def has_state(folder):
    """Tell whether a run can go on from a checkpoint: whether its manifest has Adam's moments."""
    return any(name.startswith("optimizer") for name in manifest_of(folder))


def lost_moments(folder):
    """Tell whether a checkpoint was saved here with moments that it has no more: see make_room."""
    return (folder / "training.json").exists() and not has_state(folder)


def is_whole(folder):
    """Tell whether all files are there: a manifest's with their bytes, or those of a download."""
    try:
        if (folder / "manifest.json").exists():
            entries = read_json(folder / "manifest.json")
            return bool(entries) and all(
                (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
                for name, entry in entries.items())
        indices = list(folder.glob("*.index.json"))
        singles = [folder / "model.safetensors", folder / "pytorch_model.bin",
                   *folder.glob("layer_*.pt")]
        return any(map(Path.is_file, indices + singles)) and all(
            (folder / file).is_file() for index in indices for file in read_index(index).values())
    except (ValueError, KeyError, TypeError):
        return False


def load_training(run, step, model, optimizer):
    """Fill model and optimizer from RUN/step{N}, every bit as it was, however either is sharded.

    Return the saved training object; None, with the weights alone filled, if no moments lie there.
    Tensors are read one at a time. Raises ValueError naming those that are missing, extra or
    misshapen, the first 20 of many, and on a folder that is another step's.
    """
    folder = Path(run) / f"step{step}"
    training = read_training(folder, step)
    parameters = dict(model.named_parameters())
    weights = without_legacy_buffers(open_folder(folder))
    check_tensors(folder, weights, {hf_name(n): p.shape for n, p in parameters.items()})
    for name, parameter in parameters.items():
        fill(parameter, weights[hf_name(name)].read())
    if not training or not has_state(folder):
        return None
    moments = open_folder(folder, "optimizer")
    if training["updates"] == 0:  # before the first one Adam has no moments
        return training
    check_tensors(folder / "optimizer.safetensors", moments,
                  {f"{kind}.{name}": p.shape for name, p in parameters.items()
                   for kind in ("exp_avg", "exp_avg_sq")})
    for name, parameter in parameters.items():
        state = {kind: torch.empty_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        for kind in state:
            fill(state[kind], moments[f"{kind}.{name}"].read())
        optimizer.state[parameter] = state | {
            "step": torch.tensor(float(training["updates"]), device=parameter.device)}
    return training


# ------------------------------------------------------------ weights/tensors.py


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


def open_file(path):
    """Return {name: Stored} of a safetensors file, in the order of its bytes.

    Raises ValueError if the header is not exactly a description of this file.
    """
    path = Path(path)
    size = file_size(path)
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
    weight_map = read_json(index).get("weight_map")
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


# ------------------------------------------------------------ weights/layout.py


# What files of 2023 carry and no forward pass needs: causal mask, its value, rotary frequencies.
LEGACY_BUFFERS = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")


def hf_name(name):
    """Return the published name of one of our parameters: the head has no prefix."""
    return name if name.startswith("embed_out") else f"gpt_neox.{name}"


def hf_config(config):
    """Return the config.json that makes GPTNeoXForCausalLM compute what our model does."""
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox",
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "intermediate_size": 4 * config.d_model,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.seq_length,
        "hidden_act": {"tanh": "gelu_pytorch_tanh", "erf": "gelu"}[config.gelu],
        "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "tie_word_embeddings": False, "initializer_range": 0.02,
        "bos_token_id": 0, "eos_token_id": 0, "use_cache": True, "torch_dtype": "float32",
    }


def read_config(folder):
    """Return the ModelConfig of folder/config.json: ours, or one of transformers 4.24 to 5.

    Raises ValueError naming whatever makes it another architecture than Pythia's.
    """
    path = Path(folder) / "config.json"
    spec = read_json(path)
    rope = spec.get("rope_parameters") or {}  # transformers 5 keeps the rotary settings here
    if type(rope) is not dict:
        raise ValueError(f"{path}: rope_parameters is {repr(rope)[:100]}, expected an object")
    expected = {"model_type": ("gpt_neox", spec.get("model_type")),
                "rotary_pct": (0.25, rope.get("partial_rotary_factor",
                                              spec.get("rotary_pct", 0.25))),
                "rotary_emb_base": (10000, rope.get("rope_theta",
                                                    spec.get("rotary_emb_base", 10000))),
                "rope_type": ("default", rope.get("rope_type", "default")),
                "rope_scaling": (None, spec.get("rope_scaling")),
                "use_parallel_residual": (True, spec.get("use_parallel_residual", True)),
                "attention_bias": (True, spec.get("attention_bias", True)),
                "tie_word_embeddings": (False, spec.get("tie_word_embeddings", False)),
                "layer_norm_eps": (1e-5, spec.get("layer_norm_eps", 1e-5)),
                "quantization_config": (None, spec.get("quantization_config"))}
    for name, (wanted, found) in expected.items():
        if found != wanted:
            raise ValueError(f"{path}: {name} is {repr(found)[:100]}, Pythia's is {wanted!r}")
    gelus = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
    if str(spec.get("hidden_act")) not in gelus:
        raise ValueError(f"{path}: hidden_act is {repr(spec.get('hidden_act'))[:100]}, "
                         f"expected one of {list(gelus)}")
    sizes = {}
    for ours, theirs, most in (  # the limits keep a hostile file from making a model of 2^60 layers
            ("n_layers", "num_hidden_layers", 1 << 10), ("d_model", "hidden_size", 1 << 17),
            ("n_heads", "num_attention_heads", 1 << 10), ("vocab_size", "vocab_size", 1 << 20),
            ("seq_length", "max_position_embeddings", 1 << 20)):
        sizes[ours] = spec.get(theirs)
        if type(sizes[ours]) is not int or not 1 <= sizes[ours] <= most:
            raise ValueError(f"{path}: {theirs} is {repr(sizes[ours])[:100]}, "
                             f"expected a positive integer up to {most:,}")
    if spec.get("intermediate_size", 4 * sizes["d_model"]) != 4 * sizes["d_model"]:
        raise ValueError(f"{path}: intermediate_size is {str(spec['intermediate_size'])[:100]}, "
                         f"expected 4 * hidden_size = {4 * sizes['d_model']}")
    try:
        return ModelConfig(**sizes, gelu=gelus[spec["hidden_act"]])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parameter_shapes(config):
    """Return {published name: shape} of every parameter of a Pythia."""
    with torch.device("meta"):
        return {hf_name(name): tuple(p.shape) for name, p in Pythia(config).named_parameters()}


def open_model(folder):
    """Return the ModelConfig and {published name: Stored} of model.safetensors or its shards.

    Nothing of the weights is read yet. The legacy buffers are left out. Raises ValueError naming
    the tensors that are missing, extra or misshapen, the first 20 of many.
    """
    config = read_config(folder)
    tensors = without_legacy_buffers(open_folder(folder))
    check_tensors(folder, tensors, parameter_shapes(config))
    return config, tensors


def without_legacy_buffers(tensors):
    """Return the tensors that a forward pass needs."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(LEGACY_BUFFERS)}


# ------------------------------------------------------------ weights/pickles.py


# What the pickle of a state dict names. Anything else would be code.
HARMLESS = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|"
                      r"torch \w+Storage")


@contextmanager
def open_archive(path):
    """Give the ZipFile of a file of torch.save, or raise ValueError.

    It is of one pickle, no bomb, and the same to every reader: PyTorch has one of its own, which
    finds the directory by other rules and takes upper for lower case.
    """
    size = file_size(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read().rjust(98, b"\0")
        end, (length, start) = size - 22, struct.unpack("<2L", tail[88:96])
        if tail[56:60] == b"PK\6\7":  # the 64-bit form, which torch.save writes
            end, (length, start) = size - 98, struct.unpack("<2Q", tail[40:56])
            if tail[:4] != b"PK\6\6" or int.from_bytes(tail[64:72], "little") != end:
                raise ValueError("the end of the directory is not at the end")
        if tail[76:80] != b"PK\5\6" or tail[96:] != b"\0\0" or start + length != end:
            raise ValueError("no directory at the end: cut off, or torch.save's old form (load and "
                             "save it again with a newer torch)")
        if length > JSON_LIMIT:  # ZipFile reads it whole
            raise ValueError(f"a directory of {length:,} bytes")
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if (record.compress_type, record.compress_size) != (zipfile.ZIP_STORED,
                                                                    record.file_size):
                    raise ValueError("compressed records")
                if "/data/" not in record.orig_filename and record.file_size > JSON_LIMIT:
                    raise ValueError(f"{record.orig_filename[:50]!r} of {record.file_size:,} bytes")
            if sum(map(_is_pickle, archive.infolist())) != 1:
                raise ValueError("expected one data.pkl")
            yield archive


def _is_pickle(record):
    return record.orig_filename.lower().endswith("/data.pkl")


def look_through(pickle):
    """Raise ValueError if a pickle names more than tensors or has tuples torch.save never makes.

    Hashed as a key, a tuple that holds another twice, and that one another twice, takes 2^n steps;
    a million nested ones end the process.
    """
    stacks, memo = [[]], {}  # how deep tuples are nested in what is on the reader's stack, by mark
    for opcode, argument, _ in pickletools.genops(pickle):
        name, taken = opcode.name, opcode.stack_before
        if name == "STACK_GLOBAL" or (name in ("GLOBAL", "INST")
                                      and not HARMLESS.fullmatch(argument)):
            raise ValueError(f"the pickle wants to run {argument or 'code'}; refused")
        if name == "MARK":
            stacks.append([])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stacks[-1][-1]
        else:
            items = stacks.pop() if pickletools.markobject in taken else []
            items += [stacks[-1].pop() for what in taken
                      if what not in (pickletools.markobject, pickletools.stackslice)]
            depth = 1 + max(items, default=0) if "TUPLE" in name else 0
            if depth > 4 or name in ("BINGET", "LONG_BINGET") and memo[argument]:
                raise ValueError("the pickle nests tuples or uses one twice")
            stacks[-1] += [depth] * len(opcode.stack_after)


def load_pickle(path):
    """Return {name: tensor} of a torch.save file, mapped and not yet read, or raise ValueError."""
    file_size(path)
    try:
        with open_archive(path) as archive:
            pickle = next(record for record in archive.infolist() if _is_pickle(record))
            look_through(archive.read(pickle))
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken archive or pickle raises whatever it likes
        words = str(error).split()
        if len(words) < 2:  # KeyError: 3
            words.insert(0, type(error).__name__)
        raise ValueError(f"{path}: not a whole file of torch.save: {' '.join(words)[:200]}"
                         ) from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: holds a {type(tensors).__name__}, expected a dict of tensors")
    for name, tensor in tensors.items():
        if not is_name(name):
            shown = repr(name)[:50] if type(name) in (str, int) else f"a {type(name).__name__}"
            raise ValueError(f"{path}: {shown} is no name of a tensor")
        if not (isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
                and tensor.dtype in CODES and tensor.device.type == "cpu"
                and tensor.is_contiguous()):
            raise ValueError(f"{path}: {name} is not a plain tensor")
    return tensors


class Mapped:
    """The tensors of a torch.save file.

    Pages that it has shown count as memory, so it is mapped anew every GB.
    """

    def __init__(self, path):
        self.path, self.shown, self.tensors = path, 0, load_pickle(path)

    def read(self, name):
        """Return a copy of a tensor."""
        if self.shown > 1 << 30:
            self.tensors = None
            self.shown, self.tensors = 0, load_pickle(self.path)
        tensor = self.tensors[name].detach()
        self.shown += tensor.nbytes
        return allocate(self.path, name, tensor.shape, tensor.dtype).copy_(tensor)


def open_pickle(path):
    """Return {name: Stored} of a torch.save file."""
    mapped = Mapped(path)
    return {name: Stored(path, tensor.dtype, tuple(tensor.shape),
                         lambda name=name: mapped.read(name))
            for name, tensor in mapped.tensors.items()}


# ------------------------------------------------------------ weights/huggingface.py


def open_any(source, gelu=None, n_heads=None):
    """Return the ModelConfig and {published name: Stored} of a checkpoint in any published form.

    gelu, n_heads: what NeoX files do not say. Raises ValueError naming the tensors that are
    missing, extra or misshapen, the first 20 of many.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    if any((source / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        config, tensors = open_model(source)
    elif layers := sorted(source.glob("layer_*-model_*-model_states.pt")):
        config, tensors = open_neox(source, layers, n_heads)
    else:
        single, index = source / "pytorch_model.bin", source / "pytorch_model.bin.index.json"
        if not single.exists() and not index.exists():
            raise ValueError(f"{source}: no checkpoint; expected model.safetensors, "
                             "pytorch_model.bin, the index of their shards, or "
                             "layer_XX-model_YY-model_states.pt of gpt-neox")
        config = read_config(source)
        tensors = open_pickle(single) if single.exists() else open_shards(index, open_pickle)
        tensors = without_legacy_buffers(tensors)
        check_tensors(source, tensors, parameter_shapes(config))
    if n_heads not in (None, config.n_heads):
        raise ValueError(f"{source}: n_heads = {n_heads}, the checkpoint says {config.n_heads}")
    return replace(config, gelu=gelu or config.gelu), tensors


# --------------------------------------------------------------------------- gpt-neox's layer files


def open_neox(folder, paths, n_heads=None):
    """Return the ModelConfig, {published name: Stored} of gpt-neox's layer files, ranks merged."""
    ranks = {}  # layer -> its files, by tensor-parallel rank
    for path in paths:
        match = re.fullmatch(r"layer_(\d{2,3})-model_(\d{2,3})-model_states\.pt", path.name)
        if match:
            ranks.setdefault(int(match[1]), {})[int(match[2])] = path
        else:
            raise ValueError(f"{path}: expected a name like layer_00-model_00-model_states.pt")
    count = max(max(files) for files in ranks.values()) + 1
    problems = [f"no layer_{layer:02}-model_{rank:02}-model_states.pt" for layer in sorted(ranks)
                for rank in range(count) if rank not in ranks[layer]]
    if problems:
        raise ValueError(f"{folder}: {listing(problems)}")
    # Layer 0 is the embedding, 1 and L + 2 have no weights, L + 3 is the norm, L + 4 the head.
    head = max(ranks)
    tensors, rotary = {}, None
    for layer, files in sorted(ranks.items()):
        files = [files[rank] for rank in range(count)]
        first = load_pickle(files[0])
        rotary = first.get("attention.rotary_emb.inv_freq", rotary)
        for name in without_legacy_buffers(first):
            published = _published(layer, name, head)
            tensors[published] = _merging(files, name, published)
    ends = ("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.weight", "embed_out.weight")
    if missing := [name for name in ends if name not in tensors or not tensors[name].shape]:
        raise ValueError(f"{folder}: missing {', '.join(missing)} (layers {min(ranks)} to {head} "
                         "are there)")
    d_model, vocab_size = tensors[ends[1]].shape[0], tensors[ends[0]].shape[0]
    if rotary is not None and rotary.numel():
        # One frequency for two dims of the first quarter of a head.
        n_heads = d_model // (8 * rotary.numel())
    if not n_heads:
        raise ValueError(f"{folder}: these files do not say how many heads there are; import them "
                         "with --n_heads=N")
    config = ModelConfig(head - 4, d_model, n_heads, vocab_size=vocab_size, gelu="tanh")
    check_tensors(folder, tensors, parameter_shapes(config))
    return config, tensors


def _published(layer, name, head):
    """Return the published name of a tensor of gpt-neox's layer file."""
    if layer == 0:
        return {"word_embeddings.weight": "gpt_neox.embed_in.weight"}.get(name, f"layer_00 {name}")
    if layer == head:
        return {"final_linear.weight": "embed_out.weight"}.get(name, f"layer_{layer:02} {name}")
    if layer == head - 1:
        return f"gpt_neox.final_layer_norm.{name.removeprefix('norm.')}"
    return f"gpt_neox.layers.{layer - 2}.{name}"


def _merging(files, name, published):
    """Return the Stored of a tensor of which every tensor-parallel rank's file holds a part."""
    def parts():
        loaded = [load_pickle(file) for file in files]
        for file, tensors in zip(files, loaded):
            if name not in tensors:
                raise ValueError(f"{file}: missing {name}")
            if ((tensors[name].shape, tensors[name].dtype)
                    != (loaded[0][name].shape, loaded[0][name].dtype)):
                raise ValueError(f"{file}: {name} is {tuple(tensors[name].shape)} "
                                 f"{tensors[name].dtype}, of rank 0 {tuple(loaded[0][name].shape)} "
                                 f"{loaded[0][name].dtype}")
            if _is_norm(published):
                own, first = tensors[name].double(), loaded[0][name].double()
                # Copies of one tensor with equal gradients: rounding takes them little apart
                # (weights begin at 1, biases at 0), another step or another run takes them far.
                if (own - first).norm() > 0.1 * first.norm() + 0.01 * math.sqrt(first.numel()):
                    raise ValueError(f"{file}: {name} is not that of {files[0].name}, of which it "
                                     "should be a copy: these files do not belong together")
        return [tensors[name] for tensors in loaded]

    try:
        whole = merge(published, [part.to("meta") for part in parts()])
    except (RuntimeError, IndexError) as error:  # parts that do not fit, dimensions missing
        raise ValueError(f"{files[0]}: {name} cannot be merged ({error})") from None
    return Stored(files[0], whole.dtype, tuple(whole.shape), lambda: merge(published, parts()))


def _is_norm(name):
    return name.endswith(("norm.weight", "norm.bias"))


def merge(name, parts):
    """Return a whole tensor from its tensor-parallel parts, in their dtype, as gpt-neox does."""
    if len(parts) == 1:
        return parts[0].detach().clone()
    # Row parallel: split over inputs.
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return torch.cat(parts, 1)
    if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):  # every rank adds its own
        return sum(parts)
    if _is_norm(name):  # every rank has all of it, drifted apart by rounding
        return sum(parts) / len(parts)
    # Column parallel: split over outputs, whole heads and rows of the vocabulary.
    return torch.cat(parts, 0)


# ---------------------------------------------------------------------------- known bad uploads

EARLY = {0, *(2**i for i in range(10))}
FINAL_2_8B = EARLY | {*range(1000, 65001, 1000), 70000, 80000, 90000, 100000, 103000, 110000,
                      120000, 130000, 140000}
# Repositories (a regular expression), steps (None: any), what is wrong and its issue in
# EleutherAI/pythia.
KNOWN_BAD = (
    ("pythia-2.8b", FINAL_2_8B, "serves weights of the end of training (#205, #195)"),
    ("pythia-2.8b(-deduped)?", EARLY | {1000},
     "2.8b and 2.8b-deduped have equal published evaluations up to step 1000: one is a copy of the "
     "other"),
    ("pythia-12b", {50000, 58000}, "its first shard is the final checkpoint's (#206)"),
    ("pythia-12b-deduped", {32000}, "was the final model until June 2023: is yours older? (#108)"),
    ("neox-ckpt-pythia-6.9b-deduped.*", None,
     "several steps are reported to hold the same weights (#195)"),
    ("pythia-160m-weight-seed[12]", None, "later steps do not descend from its step 0 (#203)"),
    ("pythia-410m-seed9", {40000}, "weights reported missing (#202)"),
    ("pythia-410m-seed6", {88000}, "weights reported missing (#202)"),
    ("pythia-410m-seed2", {111000}, "weights reported missing (#202)"),
    ("pythia-.*", {0, 1, 2}, "steps 0 and 1 are equal (the first update has rate 0, #83); float16 "
     "hides most of the second update (#198)"))


def known_bad(name, step):
    """Return a line for everything known to be wrong with a published checkpoint."""
    return [f"{name} step {step}: {words}" for repository, steps, words in KNOWN_BAD
            if re.fullmatch(repository, name) and (steps is None or step in steps)]


def identify(source):
    """Return the published name and step that a path speaks of: ("", None) if it does not.

    pythia-12b/step50000, or the Hub's cache, models--EleutherAI--pythia-12b/snapshots/COMMIT.
    """
    path = Path(source).absolute()
    names = [match[1] for part in path.parts
             if (match := re.fullmatch(
                 r"(?:models--EleutherAI--)?((?:neox-ckpt-)?pythia-[\w.-]+)", part))]
    steps = [int(match[1]) for part in path.parts
             if (match := re.fullmatch(r"(?:global_)?step(\d+)", part))]
    if path.parent.name == "snapshots" and (path.parent.parent / "refs").is_dir():
        steps = [int(ref.name[4:]) for ref in (path.parent.parent / "refs").glob("step*")
                 if ref.name[4:].isdigit() and ref.read_text().strip() == path.name]
    return (names or [""])[-1], (steps or [None])[-1]


# ---------------------------------------------------------------------------- import and export


@dataclass(frozen=True)
class Import:
    source: str  # folder of a published checkpoint, as it was downloaded
    output: str  # folder to write, e.g. runs/pythia-70m/step512
    dtype: str | None = None  # float32, float16 or bfloat16; default: as stored
    shard_size: str = "50GB"  # bytes of a file at most, also as 500MB, 5GB
    # erf or tanh; default: config.json's, or tanh, as trained, for NeoX files
    gelu: str | None = None
    n_heads: int | None = None  # for NeoX files without rotary frequencies
    # where the source has no tokenizer.json; None: leave it out
    tokenizer: str | None = "20B_tokenizer.json"

    def __post_init__(self):
        if self.dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(f"dtype = {self.dtype!r}, expected float32, float16 or bfloat16")
        if self.gelu not in (None, "erf", "tanh"):
            raise ValueError(f"gelu = {self.gelu!r}, expected erf (as published) or tanh (as "
                             "trained)")
        parse_size(self.shard_size)


@dataclass(frozen=True)
class Export:
    source: str  # checkpoint, e.g. runs/pythia-70m/step512
    output: str  # folder to write
    dtype: str | None = None  # float32, float16 or bfloat16; default: as stored
    shard_size: str = "5GB"  # bytes of a file at most, also as 500MB
    gelu: str | None = None  # erf or tanh; default: the checkpoint's
    tokenizer: str | None = "20B_tokenizer.json"  # if it has no tokenizer.json; None: leave it out
    push: bool = False  # also print the command that uploads it


def parse_size(text):
    """Return the bytes that 500MB, 5GB or 123456 mean."""
    match = re.fullmatch(r"(\d+)(|KB|MB|GB)", text)
    if not match or int(match[1]) == 0:
        raise ValueError(f"shard_size = {text!r}, expected bytes, also as 500MB or 5GB")
    return int(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def import_(options):
    """Turn a published checkpoint of any form into a folder that everything here reads."""
    for line in known_bad(*identify(options.source)):
        print(f"warning: {line}", file=sys.stderr)
    config, tensors = open_any(options.source, options.gelu, options.n_heads)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    output = Path(options.output)
    size = sum(math.prod(stored.shape) * (dtype or stored.dtype).itemsize
               for stored in tensors.values())
    if output.exists():
        raise ValueError(f"{output}: is there already; nothing was written")
    output.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(output.parent).free < size:
        raise ValueError(f"{output}: {size:,} bytes to write, "
                         f"{shutil.disk_usage(output.parent).free:,} free")
    tokenizer = Path(options.source) / "tokenizer.json"
    tokenizer = tokenizer if tokenizer.exists() else options.tokenizer
    if tokenizer and not os.path.exists(tokenizer):
        raise ValueError(f"{tokenizer}: no such tokenizer; `make tokenizer` gets it, "
                         "--tokenizer=PATH names it, --tokenizer=None leaves it out")
    # A stranger's tokenizer.json may be a link to any file of ours, which would be published next.
    if tokenizer and type(read_json(tokenizer, 16 << 20).get("added_tokens")) is not list:
        raise ValueError(f"{tokenizer}: no tokenizer: it has no added_tokens")
    with (writing(output) as folder,
          tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar):
        tensors = {name: _cast(name, stored, dtype, bar) for name, stored in tensors.items()}
        written = write_folder(folder, tensors, shard_size=parse_size(options.shard_size))
        dtypes = {str(stored.dtype).removeprefix("torch.") for stored in tensors.values()}
        write_json(folder / "config.json", hf_config(config) | {
            "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32"})
        if tokenizer:
            write_tokenizer(folder, tokenizer, config.seq_length)
        write_manifest(folder, written)
    print(f"{output}: {len(tensors)} tensors, "
          f"{sum(entry['bytes'] for entry in written.values()):,} bytes in {len(written)} file(s), "
          f"gelu {config.gelu}, {'a' if tokenizer else 'no'} tokenizer")


def export(options):
    """Write a checkpoint for Hugging Face: dtype, shards, tokenizer; --push says how to upload."""
    fields = asdict(options)
    push = fields.pop("push")
    import_(Import(**fields))
    if push:
        step = Path(options.source).resolve()
        print(shlex.join(["hf", "upload", step.parent.name, options.output, ".",
                          f"--revision={step.name}"]))


def _cast(name, stored, dtype, bar):
    """Return a Stored in another dtype; reading moves the bar. Raises ValueError on an overflow."""
    def read():
        tensor = stored.read()
        cast = tensor.to(dtype or tensor.dtype)
        if cast.dtype != tensor.dtype and cast.isinf().sum() > tensor.isinf().sum():
            raise ValueError(f"{name}: {tensor.abs().max():g} overflows {dtype}; choose bfloat16 "
                             "or float32")
        bar.update(cast.nbytes)
        return cast
    return replace(stored, dtype=dtype or stored.dtype, read=read)


# ---------------------------------------------------------------------------- the Hub


@dataclass(frozen=True)
class Fetch:
    name: str  # a published repository: pythia-70m-deduped, pythia-160m-seed3, or OWNER/NAME
    steps: str = "143000"  # numbers with commas, or all: Pythia's 154
    out_dir: str | None = None  # run folder to fill with step0, step1, ...; default: NAME here


def fetch(options):
    """Download published checkpoints; what is already whole is not downloaded again."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError("fetch needs huggingface_hub: pip install huggingface_hub") from None
    if not re.fullmatch(r"all|\d+(,\d+)*", options.steps):
        raise ValueError(f"steps = {options.steps!r}, expected numbers with commas, or all")
    steps = checkpoint_steps(143000) if options.steps == "all" else [
        int(s) for s in options.steps.split(",")]
    repository = options.name if "/" in options.name else f"EleutherAI/{options.name}"
    name = repository.split("/")[1]
    for step in tqdm(steps, unit="checkpoint", disable=None):
        for line in known_bad(name, step):
            tqdm.write(f"warning: {line}", file=sys.stderr)
        folder = Path(options.out_dir or name) / f"step{step}"
        if (folder / "manifest.json").exists() and is_whole(folder):
            continue
        try:
            info = huggingface_hub.HfApi().model_info(
                repository, revision=f"step{step}", files_metadata=True)
            files = wanted({file.rfilename: file for file in info.siblings})
            for file in files:  # by commit: all of one upload, whatever is pushed meanwhile
                huggingface_hub.hf_hub_download(repository, file, revision=info.sha,
                                                local_dir=folder)
        except Exception as error:  # whatever the network and its client raise
            raise ValueError(f"{repository} step{step}: {' '.join(str(error).split())[:200]}; the "
                             "same command goes on where it stopped") from None
        if not files:
            raise ValueError(f"{repository} step{step}: no weights there")
        entries = {file: {"bytes": (folder / file).stat().st_size,
                          "sha256": sha256_of(folder / file)}
                   for file in files}
        for file, entry in entries.items():
            if files[file].lfs and files[file].lfs.sha256 != entry["sha256"]:
                raise ValueError(f"{folder / file}: its SHA-256 is not the Hub's; remove it and "
                                 "fetch again")
        write_json(folder / "manifest.json", entries)  # last: with it the checkpoint is whole
    print(f"{options.out_dir or name}: {len(steps)} checkpoints; python verify.py verify "
          "compares them")


def wanted(files):
    """Return config, tokenizer and one form of the weights out of a repository's {name: file}."""
    for weights in (r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
                    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"):
        if any(re.fullmatch(weights, name) for name in files):
            return {name: file for name, file in files.items()
                    if re.fullmatch(rf"{weights}|(tokenizer_)?config\.json|tokenizer\.json", name)}
    return {}


# ------------------------------------------------------------ weights/compare.py


@dataclass(frozen=True)
class List:
    run: str  # run folder


def list_(options):
    """List a run's checkpoints: step, tokens, loss there, size, what is in them."""
    if not Path(options.run).is_dir():
        raise ValueError(f"{options.run}: no such folder")
    folders = step_folders(options.run)
    if not folders:
        raise ValueError(f"{options.run}: no step0, step1, ... in it")
    losses = read_losses(Path(options.run) / "metrics.csv")
    print(f"{'step':>7} {'tokens':>15} {'loss':>8} {'size':>11}  contents")
    total = 0
    for step, folder in folders:
        try:
            training, damage = read_training(folder, step), ""
        except ValueError as error:
            training, damage = {}, f" ({error})"
        files = [path for path in folder.iterdir() if path.is_file()]
        bytes_ = sum(path.stat().st_size for path in files)
        total += bytes_
        loss = losses.get(str(step))  # of the batch that these weights met next
        tokens = f"{training['tokens']:,}" if type(training.get("tokens")) is int else "-"
        print(f"{step:7} {tokens:>15} {f'{loss:.4f}' if loss is not None else '-':>8} "
              f"{bytes_ / 1e6:8,.1f} MB  {contents(folder, files)}{damage}")
    print(f"{len(folders)} checkpoints, {total / 1e9:,.2f} GB")


def read_losses(path):
    """Return {step: loss} of a run's metrics.csv, but for lines that a crash left unreadable."""
    losses = {}
    if path.exists():
        with open(path, newline="", errors="replace") as file:
            for row in csv.DictReader(file):
                try:
                    losses[row["step"]] = float(row["loss"])
                except (KeyError, TypeError, ValueError):
                    pass
    return losses


def contents(folder, files):
    """Return what a checkpoint holds, in words."""
    names = [path.name for path in files]
    held = [word for word, start in (
                ("weights", ("model", "pytorch_model", "layer_")), ("state", "optimizer"),
                ("tokenizer", "tokenizer.json"), ("manifest", "manifest.json"))
            if any(name.startswith(start) for name in names)]
    return ", ".join(held) + ("" if is_whole(folder) else ": NOT WHOLE")


if __name__ == "__main__":
    command(sys.argv[1:], {
        "list": (List, list_, "run"), "import": (Import, import_, "source output"),
        "export": (Export, export, "source output"), "fetch": (Fetch, fetch, "name")})
