"""Checkpoints of a run, in Hugging Face's layout, never half-written; published ones in and out.

    python checkpoints.py list runs/mini
    python checkpoints.py fetch pythia-70m-deduped --steps=0,1,512,143000
    python checkpoints.py import SOURCE runs/pythia-70m/step512
    python checkpoints.py export runs/mini/step512 OUT --dtype=float16 --shard_size=5e9 --push

    RUN/step64/model.safetensors    float32 weights under the published names
               optimizer/moments.safetensors   Adam's: exp_avg.NAME and exp_avg_sq.NAME, float32;
                                    apart, since most readers take every *.safetensors of a folder
               training.json        the step, its place in the data, the loss scaler
               config.json          GPTNeoXForCausalLM's, naming the GELU the run is trained with
               generation_config.json, tokenizer.json, tokenizer_config.json
               manifest.json        bytes and SHA-256 of every file above, written last

Checkpoint N is the weights after N updates; step 0 is the initialisation. A checkpoint is written
in a folder .stepN.tmp, brought to the disk and then renamed, so that a killed process leaves either
the whole of stepN or nothing by that name.

Files come from strangers: tensors are read by the safetensors library, or by torch.load with
weights_only, so that nothing in a file runs. Sources: transformers' GPTNeoXForCausalLM, 4.24 to 5;
gpt-neox v1.0, tools/convert_to_hf.py, for its layer_XX-model_YY-model_states.pt files.
"""

import errno
import functools
import math
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import config
from config import command, file_size, read_json, read_lines, sha256_of, write_json
from model import ModelConfig, Pythia, hf_config, hf_name, parameter_shapes, read_config
from tokenizer import N_TOKENS, load_tokenizer

UMASK = os.umask(0)
os.umask(UMASK)
READABLE = 0o666 & ~UMASK  # what any new file of this process may be
SHARD_BYTES = 5_000_000_000  # of a tensor file at most, unless one tensor is larger
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what weights and moments are stored as
# Files of 2023 also hold the causal mask, its value and rotary frequencies, which are not needed.
LEGACY_BUFFERS = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")


def checkpoint_steps(steps, every=1000):
    """Return a run's scheduled steps: 0, 1, 2, 4, ..., 512, the multiples of `every`, the last.

    checkpoint_steps(143000) is Pythia's 154.
    """
    scheduled = {0, steps} | {2**i for i in range(10)} | set(range(0, steps, every))
    return sorted(step for step in scheduled if step <= steps)


# ---------------------------------------------------------------------------- tensor files


class Stored(NamedTuple):
    """A tensor that is still in its file: dtype and shape are known, read() returns it."""
    path: Path
    dtype: torch.dtype
    shape: tuple
    read: Callable

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def open_file(path):
    """Return {name: Stored} of a safetensors file, or raise ValueError naming the file."""
    file_size(path)
    try:
        file = safe_open(path, framework="pt")
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {check_name(name): Stored(path, DTYPES[part.get_dtype()], tuple(part.get_shape()),
                                         functools.partial(file.get_tensor, name))
                for name, part in parts.items()}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {one_line(error)}") from None


def open_pickle(path):
    """Return {name: Stored} of a torch.save file, mapped and not yet read, or raise ValueError."""
    file_size(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(tensors, dict):
            raise ValueError(f"holds a {type(tensors).__name__}, expected a dict of tensors")
        for name, tensor in tensors.items():
            check_name(name)
            if not (isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
                    and tensor.is_contiguous()):
                raise ValueError(f"{name} is not a plain tensor")
    except Exception as error:  # a broken or hostile file raises whatever it likes
        raise ValueError(f"{path}: not a file of torch.save with tensors alone: {one_line(error)}"
                         ) from None
    return {name: Stored(path, tensor.dtype, tuple(tensor.shape), tensor.detach)
            for name, tensor in tensors.items()}


def check_name(name):
    """Return a tensor's name, or raise ValueError: a message could not show every stranger's."""
    if type(name) is not str or not name.isprintable() or not 0 < len(name) <= 200:
        raise ValueError(f"{repr(name)[:50]} is no name of a tensor")
    return name


def one_line(error):
    """Return the beginning of an error's words, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def open_folder(folder, name="model.safetensors"):
    """Return {name: Stored} of folder/NAME, or of the shards that NAME.index.json lists."""
    open_one = open_file if name.endswith(".safetensors") else open_pickle
    single, index = Path(folder) / name, Path(folder) / f"{name}.index.json"
    if single.exists() or not index.exists():
        return open_one(single)
    weight_map, tensors = read_index(index), {}
    for file in sorted(set(weight_map.values())):
        tensors |= open_one(index.parent / file)
    if other := sorted(tensors.keys() ^ weight_map.keys()):
        raise ValueError(f"{index}: its shards hold other tensors than it says: {other[0][:200]!r}")
    return tensors


def read_index(index):
    """Return {tensor: the name of a file beside the index}, or raise ValueError."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map or type(weight_map) is not dict:
        raise ValueError(f"{index}: no weight_map")
    for file in weight_map.values():
        if type(file) is not str or not re.fullmatch(r"\w[\w.-]*", file, re.ASCII):
            raise ValueError(f"{index}: {repr(file)[:100]} is not the name of a file beside it")
    return weight_map


def check_tensors(where, tensors, shapes):
    """Raise ValueError naming 20 tensors at most that are missing, extra, misshapen, no floats."""
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"unexpected {name}")
        elif tensor.shape != tuple(shapes[name]):
            problems.append(f"{name} is {tensor.shape}, expected {tuple(shapes[name])}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected "
                            "float32, float16 or bfloat16")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems[:20])}" + "; ..." * (len(problems) > 20))


def published_only(tensors):
    """Return the tensors that a forward pass needs, under their published names."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(LEGACY_BUFFERS)}
    # What transformers 5 calls the head in memory, and accelerate and huggingface_hub in files.
    if "lm_head.weight" in kept and "embed_out.weight" not in kept:
        kept["embed_out.weight"] = kept.pop("lm_head.weight")
    return kept


def split(stem, tensors, shard_size):
    """Return {file name: {name: tensor}} and {index name: object}, as Hugging Face names them.

    One file and no index, or shards of at most shard_size bytes, but for tensors larger than that.
    """
    shards, room = [{}], shard_size
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": tensors}, {}
    files = {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard
             for i, shard in enumerate(shards, 1)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: Path(file).name for file, shard in files.items() for name in shard}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return files, {f"{stem}.safetensors.index.json": index}


def write_files(folder, files):
    """Write {file: {name: tensor or Stored}}; return {file: its bytes and sha256}.

    One file's tensors at a time are in memory. A thread hashes a file while the next one is
    written, and the last ones while the system brings them to the disk.
    """
    with ThreadPoolExecutor(2) as hashers:
        hashing = {}
        for name, tensors in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            whole = {key: (tensor.read() if isinstance(tensor, Stored) else tensor).contiguous()
                     for key, tensor in tensors.items()}
            try:
                save_file(whole, folder / name, metadata={"format": "pt"})
            except SafetensorError as error:  # "... (os error 28)": a full disk
                code = int(re.search(r"os error (\d+)|$", str(error))[1] or errno.EIO)
                raise OSError(code, os.strerror(code), str(folder / name)) from None
            (folder / name).chmod(READABLE)  # the library lets nobody else read it
            hashing[name] = hashers.submit(describe_file, folder / name)
        for name in files:
            sync(folder / name)
        return {name: entry.result() for name, entry in hashing.items()}


def describe_file(path):
    """Return a file's entry in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sync(path):
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---------------------------------------------------------------------------- what is in a run


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

    Raises ValueError on what no run can have saved, and if it is of another step.
    """
    path = folder / "training.json"
    if not os.path.lexists(path):
        return {}
    training = read_json(path)
    if training.get("step") != step:
        raise ValueError(f"{path}: is of step {repr(training.get('step'))[:20]}; was {folder.name} "
                         "copied or renamed? Move it away")
    for name, most in (("updates", step), ("tokens", 1 << 62)):
        if type(training.get(name)) is not int or not 0 <= training[name] <= most:
            raise ValueError(f"{path}: {name} is {repr(training.get(name))[:50]}, expected an "
                             f"integer from 0 to {most:,}; move {folder.name} away")
    scaler = training.get("scaler")
    if type(scaler) is not dict or not all(type(value) in (int, float) and abs(value) < 1 << 50
                                           for value in scaler.values()):
        raise ValueError(f"{path}: scaler is {repr(scaler)[:50]}, expected an object of numbers")
    return training


def manifest_of(folder):
    """Return {file: {"bytes", "sha256"}} of a checkpoint, an empty one if it has no manifest.

    Raises ValueError on a name that is no file's in the folder.
    """
    path = folder / "manifest.json"
    entries = read_json(path) if os.path.lexists(path) else {}
    for name, entry in entries.items():
        if type(entry) is not dict or not re.fullmatch(r"(optimizer/)?\w[\w.-]{0,99}", name,
                                                       re.ASCII):
            raise ValueError(f"{path}: {repr(name)[:50]} is no name of a file here")
    return entries


def check_hashes(folder):
    """Raise ValueError unless every file that a checkpoint's manifest lists has its SHA-256.

    The processes of a run share the files. Training goes on only from what has been checked, for a
    changed bit would spread to every later checkpoint. Evaluation and the studies do without: it
    reads all bytes once more (0.9 s on two cores for the 1.95 GB of a 160m).
    """
    entries = manifest_of(folder)
    for name in files_of(folder) if entries else ():
        if name not in entries and re.match(r"model|optimizer/|(training|config)\.json", name):
            raise ValueError(f"{folder / name}: its manifest.json does not list it; restore that, "
                             f"or move {folder.name} away")
    rank, count = process_place()
    names = list(entries)[rank::count]
    with ThreadPoolExecutor() as hashers:
        for name, found in zip(names, hashers.map(sha256_of, [folder / name for name in names])):
            if found != entries[name].get("sha256"):
                raise ValueError(f"{folder / name}: damaged, its SHA-256 is not the manifest's; "
                                 f"restore it, or move {folder.name} away to go on from the "
                                 "checkpoint before it")


def files_of(folder):
    """Return {name in a manifest: path} of what lies in a checkpoint, but for hidden files."""
    return {str(path.relative_to(folder)): path
            for path in (*folder.iterdir(), *folder.glob("optimizer/*"))
            if path.name[0] != "." and not path.is_dir()}


def has_state(folder):
    """Tell whether a run can go on from a checkpoint: whether its manifest has Adam's moments."""
    return any(name.startswith("optimizer/") for name in manifest_of(folder))


def lost_moments(folder):
    """Tell whether a run saved this checkpoint and later removed its moments (make_room)."""
    return (folder / "training.json").exists() and not has_state(folder)


def is_whole(folder):
    """Tell whether all files are there: a manifest's with their bytes, or those of a download."""
    try:
        if (folder / "manifest.json").exists():
            entries = manifest_of(folder)
            return bool(entries) and all(file_size(folder / name) == entry["bytes"]
                                         for name, entry in entries.items())
        indices = list(folder.glob("*.index.json"))
        singles = [folder / "model.safetensors", folder / "pytorch_model.bin",
                   *folder.glob("layer_*.pt")]
        shards = [folder / file for index in indices for file in read_index(index).values()]
        return any(map(Path.is_file, indices + singles)) and all(map(Path.is_file, shards))
    except (ValueError, KeyError, OSError):
        return False


# ---------------------------------------------------------------------------- load


def load_model(folder, device="cpu"):
    """Return the Pythia of a folder (ours, or a published one in any form), in float32."""
    config, tensors = open_any(folder)
    with torch.device("meta"):
        model = Pythia(config)
    state = {name: tensors[hf_name(name)].read().to(device, torch.float32, copy=True)
             for name, _ in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    return model


def load_training(run, step, model, optimizer):
    """Fill model and optimizer from RUN/step{N}, every bit as it was, however either is sharded.

    Return the saved training object; None, with the weights alone filled, if no moments lie there.
    Tensors are read one at a time. Raises ValueError naming those that are missing, extra or
    misshapen, a file that has changed (see check_hashes), and a folder that is another step's.
    """
    folder = Path(run) / f"step{step}"
    training = read_training(folder, step)
    check_hashes(folder)
    parameters = dict(model.named_parameters())
    found, weights = open_any(folder)
    if found.n_heads != model.config.n_heads:
        raise ValueError(f"{folder}: n_heads is {found.n_heads}, the run's {model.config.n_heads}")
    check_tensors(folder, weights, {hf_name(n): p.shape for n, p in parameters.items()})
    for name, parameter in parameters.items():
        fill(parameter, weights[hf_name(name)].read())
    if not training or not has_state(folder):
        return None
    if training["updates"] == 0:  # before the first one Adam has no moments
        return training
    moments = open_folder(folder / "optimizer", "moments.safetensors")
    check_tensors(folder / "optimizer", moments,
                  {f"{kind}.{name}": p.shape for name, p in parameters.items()
                   for kind in ("exp_avg", "exp_avg_sq")})
    for name, parameter in parameters.items():
        state = {kind: torch.empty_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        for kind in state:
            fill(state[kind], moments[f"{kind}.{name}"].read())
        optimizer.state[parameter] = state | {
            "step": torch.tensor(float(training["updates"]), device=parameter.device)}
    return training


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


# ---------------------------------------------------------------------------- save


def save(run, step, model, optimizer, training, tokenizer=None, scheduled=True, asynchronous=False,
         state_every=None):
    """Write RUN/step{N} whole or not at all. Every process calls.

    training: the object that load_training gives back, with updates, tokens and the loss scaler's
    state. An unscheduled checkpoint (of an interrupted run) is removed when the next one is saved.
    A whole one that is there already is kept, but one without moments is written again: a run that
    resumed before it may be interrupted there. asynchronous: return once the tensors are copied to
    host memory; the next call or finish_writing waits for the rest. state_every: Adam's moments
    stay only in checkpoints of its multiples and in the newest.
    """
    finish_writing()
    folder = Path(run) / f"step{step}"
    if not Path(run).is_dir():  # for instance an unmounted disk: no new run begins in its place
        raise FileNotFoundError(errno.ENOENT, "the run folder has vanished", str(run))
    exists = is_whole(folder) and not lost_moments(folder)
    exchange()  # all processes must have looked before the first one makes the folder
    if exists:
        return
    parameters = dict(model.named_parameters())
    # There are no moments before the first update.
    moments = {f"{kind}.{name}": optimizer.state[p][kind] for name, p in parameters.items()
               for kind in ("exp_avg", "exp_avg_sq") if optimizer.state}
    files, notes = split("optimizer/moments", moments, SHARD_BYTES)
    weight_files, weight_index = split(
        "model", {hf_name(name): p.detach() for name, p in parameters.items()}, SHARD_BYTES)
    notes |= weight_index | {"training.json": {"step": step, "scheduled": scheduled, **training}}
    mine = own_share(files | weight_files, asynchronous)

    def write():
        first = process_place()[0] == 0
        with writing(folder) if first else nullcontext(temporary_of(folder)) as temporary:
            exchange()  # the first process has made the folder
            entries = {}
            for part in exchange(write_files(temporary, mine)):
                entries |= part
            if first:
                write_notes(temporary, notes, hf_config(model.config), tokenizer, entries)
        if first:
            make_room(run, step, state_every)
        exchange()

    if asynchronous:
        _WRITING.append(_WRITER.submit(write))
    else:
        write()


_WRITER, _WRITING = ThreadPoolExecutor(1), []


def finish_writing():
    """Wait for the checkpoint that is being written in the background; raise what went wrong."""
    while _WRITING:
        _WRITING.pop().result()


def process_place():
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@functools.cache
def _group():
    return dist.new_group(backend="gloo")  # another than training's, for a thread


def exchange(value=None):
    """Return every process's value, by rank, once all of them have come here."""
    values = [value] * process_place()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=_group())
    return values


def own_share(files, copy):
    """Return the files that this process writes, {file name: {name: whole tensor}}.

    Every process calls. Files are dealt to the processes in turn. Sharded tensors are gathered one
    at a time and kept, in host memory, only by the process that writes them, so that no process
    holds a whole model that has several files.
    """
    rank, count = process_place()
    mine = {name: {} for i, name in enumerate(files) if i % count == rank}
    for file, contents in files.items():
        for name, tensor in contents.items():
            sharded = is_shard(tensor)
            if sharded:
                tensor = tensor.full_tensor()
            if file in mine:
                mine[file][name] = tensor.to("cpu", copy=not sharded) if copy or sharded else tensor
    return mine


def write_notes(folder, notes, spec, tokenizer, entries):
    """Write what lies beside the tensors: {name: object}, config.json (spec), and the manifest.

    entries: the manifest's for the tensors. With clean_up_tokenization_spaces, transformers 4's
    default, "Hello , world" would be decoded as "Hello, world".
    """
    end = "<|endoftext|>"
    notes = notes | {"config.json": spec, "generation_config.json": {
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}}
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        notes["tokenizer_config.json"] = {
            "bos_token": end, "eos_token": end, "unk_token": end,
            "tokenizer_class": "GPTNeoXTokenizer", "pad_token": "<|padding|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": spec["max_position_embeddings"]}
    for name, note in notes.items():
        write_json(folder / name, note)
    write_manifest(folder, entries)


def write_manifest(folder, known=()):
    """Write folder/manifest.json: bytes and sha256 of every file; `known` has some already."""
    entries = dict(known) | {name: describe_file(path) for name, path in files_of(folder).items()
                             if name not in ("manifest.json", *known)}
    write_json(folder / "manifest.json", dict(sorted(entries.items())))


def make_room(run, step, state_every):
    """Remove what no later step needs: unscheduled checkpoints before `step`, moments off the grid.

    Links, which lead to another run, and damaged or published checkpoints are left alone.
    """
    for other, folder in step_folders(run):
        if other >= step or folder.is_symlink() or not is_whole(folder):
            continue
        try:
            scheduled = read_training(folder, other).get("scheduled")
        except ValueError:
            continue
        if scheduled is False:
            # Renamed before it is removed, so that no half checkpoint has the name at any moment.
            temporary = temporary_of(folder)
            os.rename(folder, temporary)
            shutil.rmtree(temporary)
        elif scheduled and state_every and other % state_every:
            if has_state(folder):  # the manifest first: it never lists a file that is gone
                write_json(folder / "manifest.json", {
                    name: entry for name, entry in manifest_of(folder).items()
                    if not name.startswith("optimizer/")})
                sync(folder)
            shutil.rmtree(folder / "optimizer", ignore_errors=True)


def lock(run):
    """Keep other processes from writing to a run folder until this one ends, or raise ValueError.

    Removes the checkpoint that a killed process left half-written.
    """
    Path(run).mkdir(parents=True, exist_ok=True)
    config.lock(Path(run) / ".lock", f"{run}: another process is writing this run; wait for it or "
                "name another --out_dir")
    for path in Path(run).glob(".step*.tmp"):
        remove(path)


def temporary_of(folder):
    return folder.with_name(f".{folder.name}.tmp")


def remove(path):
    """Remove a folder, or a link without what it leads to."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(folder):
    """Give a new folder that takes the name `folder` only once all of it is on the disk.

    A folder that has the name already is kept as NAME.broken, unless the new one has all its bytes.
    """
    temporary, before = temporary_of(folder), None
    remove(temporary)  # a killed process may have left it
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if os.path.lexists(folder):  # a damaged checkpoint, or one without moments
            before, number = folder.with_name(f"{folder.name}.broken"), 0
            while os.path.lexists(before):
                number += 1
                before = folder.with_name(f"{folder.name}.broken{number}")
            os.rename(folder, before)
        os.rename(temporary, folder)
        sync(folder.parent)
        if before and is_whole(before) and lost_moments(before) and (
                manifest_of(before).items() <= manifest_of(folder).items()
                and files_of(before).keys() <= {*manifest_of(before), "manifest.json"}):
            remove(before)
    finally:  # after an error, such as a full disk, the room is free again
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------------------- published forms


def open_any(source):
    """Return the ModelConfig and {published name: Stored} of a checkpoint in any published form.

    Nothing of the weights is read yet. Raises ValueError naming tensors that do not fit.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    layers = sorted(source.glob("layer_*-model_*-model_states.pt"))
    names = [name for name in ("model.safetensors", "pytorch_model.bin")
             if list(source.glob(f"{name}*"))]
    if layers and "model.safetensors" not in names:
        config, tensors = open_neox(source, layers)
    elif names:
        config, tensors = read_config(source), open_folder(source, names[0])
    else:
        raise ValueError(f"{source}: no checkpoint; expected model.safetensors, pytorch_model.bin, "
                         "the index of their shards, or layer_XX-model_YY-model_states.pt of "
                         "gpt-neox")
    tensors = published_only(tensors)
    check_tensors(source, tensors, parameter_shapes(config))
    return config, tensors


def open_neox(folder, paths):
    """Return the ModelConfig, {published name: Stored} of gpt-neox's layer files, ranks merged."""
    files = {}  # by layer and tensor-parallel rank
    for path in paths:
        match = re.fullmatch(r"layer_(\d{2,3})-model_(\d{2,3})-model_states\.pt", path.name)
        if not match:
            raise ValueError(f"{path}: expected a name like layer_00-model_00-model_states.pt")
        files[int(match[1]), int(match[2])] = path
    layers = sorted({layer for layer, _ in files})
    ranks = range(max(rank for _, rank in files) + 1)
    missing = [f"layer_{layer:02}-model_{rank:02}-model_states.pt" for layer in layers
               for rank in ranks if (layer, rank) not in files]
    if missing:
        raise ValueError(f"{folder}: no {', no '.join(missing[:20])}")
    # Layer 0 is the embedding, 1 and L + 2 have no weights, L + 3 is the norm, L + 4 the head.
    head, tensors, rotary = layers[-1], {}, None
    ends = {(0, "word_embeddings.weight"): "gpt_neox.embed_in.weight",
            (head - 1, "norm.weight"): "gpt_neox.final_layer_norm.weight",
            (head - 1, "norm.bias"): "gpt_neox.final_layer_norm.bias",
            (head, "final_linear.weight"): "embed_out.weight"}
    for layer in layers:
        parts = [open_pickle(files[layer, rank]) for rank in ranks]
        rotary = parts[0].get("attention.rotary_emb.inv_freq", rotary)
        for name in published_only(parts[0]):
            published = ends.get((layer, name), f"gpt_neox.layers.{layer - 2}.{name}")
            tensors[published] = merged(parts, name, published)
    if absent := [name for name in ends.values() if name not in tensors or not tensors[name].shape]:
        raise ValueError(f"{folder}: missing {', '.join(absent)} (layers {layers[0]} to {head} are "
                         "there)")
    vocab_size = tensors["gpt_neox.embed_in.weight"].shape[0]
    d_model = tensors["gpt_neox.final_layer_norm.weight"].shape[0]
    if not rotary or not math.prod(rotary.shape):
        raise ValueError(f"{folder}: no attention.rotary_emb.inv_freq, which says how many heads "
                         "there are")
    # Each frequency turns two dims, and a quarter of a head's dims are turned.
    n_heads = d_model // (8 * math.prod(rotary.shape))
    return ModelConfig(head - 4, d_model, n_heads, vocab_size=vocab_size, gelu="tanh"), tensors


def merged(parts, name, published):
    """Return the whole of a tensor of which each of `parts`, a rank's {name: Stored}, has a part.

    As gpt-neox does, in its dtype: row parallel layers are split over inputs, the others over
    outputs (whole heads, or rows of the vocabulary). The biases of row parallel ones add up. Every
    rank has a copy of each LayerNorm; the copies differ by rounding, and the whole is their mean.
    """
    first, shape, dim = parts[0][name], list(parts[0][name].shape), 0
    copies = published.endswith(("norm.weight", "norm.bias"))
    if published.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        dim = 1
    elif copies or published.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
        dim = None
    for part in parts:
        if name not in part:
            raise ValueError(f"{next(iter(part.values())).path}: missing {name}")
        own = part[name]
        if (own.shape, own.dtype) != (first.shape, first.dtype) or len(shape) <= (dim or 0):
            raise ValueError(f"{own.path}: {name} is {own.shape} {own.dtype}, of rank 0 "
                             f"{first.shape} {first.dtype}")
        if copies and own is not first:
            a, b = own.read().double(), first.read().double()
            # Rounding changes copies little (weights begin at 1, biases at 0); those of another
            # step or another run are far apart.
            if (a - b).norm() > 0.1 * b.norm() + 0.01 * math.sqrt(b.numel()):
                raise ValueError(f"{own.path}: {name} is not that of {first.path.name}, of which "
                                 "it should be a copy: these files do not belong together")
    if dim is not None:
        shape[dim] *= len(parts)

    def read():
        tensors = [part[name].read() for part in parts]
        if dim is not None:
            return torch.cat(tensors, dim)
        total = functools.reduce(torch.add, tensors)
        return total / len(parts) if copies else total.clone()

    return Stored(first.path, first.dtype, tuple(shape), read)


# ---------------------------------------------------------------------------- known bad uploads

EARLY = {0, *(2**i for i in range(10))}
FINAL_2_8B = EARLY | {*range(1000, 65001, 1000), 70000, 80000, 90000, 100000, 103000, 110000,
                      120000, 130000, 140000}
# Repositories (a regular expression), steps (None: any), what is wrong and its issue in
# EleutherAI/pythia.
KNOWN_BAD = (
    ("pythia-2.8b", FINAL_2_8B, "serves weights of the end of training (#205, #195)"),
    ("pythia-2.8b(-deduped)?", EARLY | {1000},
     "up to step 1000 the published evaluations of 2.8b and 2.8b-deduped are equal: one is a copy"),
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
    return [f"warning: {name} step {step}: {words}" for repository, steps, words in KNOWN_BAD
            if re.fullmatch(repository, name) and (steps is None or step in steps)]


def identify(source):
    """Return the published name and step that a path speaks of, as pythia-12b/step50000 does."""
    name = re.search(r"(?:^|/)((?:neox-ckpt-)?pythia-[\w.-]+)(?=/|$)", str(source))
    step = re.search(r"(?:^|/)(?:global_)?step(\d+)/?$", str(source))
    return name[1] if name else "", int(step[1]) if step else None


COMPARED = set()  # SHA-256 of tokenizer files that were found to be GPT-NeoX-20B's


def folder_tokenizer(folder, named=None):
    """Return the tokenizer.json of a model: `named`, or its folder's own, or the one beside us.

    Raises ValueError if the folder's own is not GPT-NeoX-20B's, and if the model has fewer ids.
    """
    own = Path(folder) / "tokenizer.json"
    if named is None and os.path.lexists(own):
        named = own
        file_size(own)  # refuses a pipe, whose hash would never end
        digest = sha256_of(own)
        if digest not in COMPARED:
            load_tokenizer(own)
            COMPARED.add(digest)
    others = [name for name in ("vocab.json", "tokenizer.model") if (Path(folder) / name).exists()]
    if named is None and others:
        raise ValueError(f"{folder}: {others[0]} without a tokenizer.json, which alone is known "
                         "here; name one with --tokenizer")
    size = open_any(folder)[0].vocab_size
    if size < N_TOKENS:
        raise ValueError(f"{folder}: vocab_size is {size:,}, but GPT-NeoX-20B's tokenizer, the "
                         f"only one that is known here, has {N_TOKENS:,} ids")
    return named or "20B_tokenizer.json"


# ---------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Import:
    source: str  # folder of a checkpoint: ours, or a published one as it was downloaded
    output: str  # folder to write, e.g. runs/pythia-70m/step512
    dtype: str | None = None  # float32, float16 or bfloat16; default: as stored
    shard_size: int = SHARD_BYTES  # bytes of a file at most, e.g. 5e8
    tokenizer: str | None = "20B_tokenizer.json"  # where the source has none; None: leave it out

    def __post_init__(self):
        config.check(self, "float32, float16 or bfloat16",
                     ("float32", "float16", "bfloat16").__contains__, "dtype")
        config.check(self, "at least 1", lambda value: value >= 1, "shard_size")


@dataclass(frozen=True)
class Export(Import):
    push: bool = False  # also print the command that uploads it


def import_(options):
    """Turn a published checkpoint of any form into a folder that everything here reads."""
    for line in known_bad(*identify(options.source)):
        print(line, file=sys.stderr)
    model_config, tensors = open_any(options.source)
    output, tokenizer = Path(options.output), options.tokenizer
    if output.exists():
        raise ValueError(f"{output}: is there already; nothing was written")
    if tokenizer:
        own = Path(options.source) / "tokenizer.json"
        tokenizer = own if os.path.lexists(own) else tokenizer
        load_tokenizer(tokenizer)  # a stranger's may be a link to any file of this machine
    if options.dtype:
        dtype = getattr(torch, options.dtype)
        tensors = {name: cast(name, stored, dtype) for name, stored in tensors.items()}
    files, notes = split("model", tensors, options.shard_size)
    dtypes = {str(stored.dtype).removeprefix("torch.") for stored in tensors.values()}
    spec = hf_config(model_config)
    if len(dtypes) == 1:
        spec["torch_dtype"] = dtypes.pop()
    with writing(output) as folder:
        entries = write_files(folder, files)
        if isinstance(options, Export):
            (folder / "README.md").write_text(model_card(Path(options.source).resolve(), spec))
        write_notes(folder, notes, spec, tokenizer, entries)
    size = sum(stored.nbytes for stored in tensors.values())
    print(f"{output}: {len(tensors)} tensors, {size:,} bytes in {len(files)} file(s), "
          f"gelu {model_config.gelu}, {'a' if tokenizer else 'no'} tokenizer")


def cast(name, stored, dtype):
    """Return a Stored in another dtype, whose read() raises ValueError on an overflow."""
    def read():
        tensor = stored.read()
        result = tensor.to(dtype)
        if result.isinf().sum() > tensor.isinf().sum():
            raise ValueError(f"{name}: {tensor.abs().max():g} overflows {dtype}; choose bfloat16 "
                             "or float32")
        return result
    return stored._replace(dtype=dtype, read=read)


def model_card(source, spec):
    """Return a README.md for the Hub: the model's config.json and how a run of ours trained it."""
    facts, step, run = dict(spec), identify(source)[1], source.parent / "config.json"
    del facts["architectures"], facts["model_type"]  # the sentence below says them
    if step is not None and (training := read_training(source, step)):
        facts |= {"step": step, "tokens": training["tokens"]}
        if run.exists():
            facts |= {name: value for name, value in read_json(run).items()
                      if type(value) in (int, float)}
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return ("---\nlibrary_name: transformers\ntags: [gpt_neox, pythia]\n---\n\n"
            f"# {source.parent.name} {source.name}\n\nA language model of the architecture of "
            f"Pythia, for transformers' `GPTNeoXForCausalLM`.\n\n| | |\n|---|---|\n{rows}")


def export(options):
    """Write a checkpoint for Hugging Face: dtype, shards, card; --push says how to upload it."""
    import_(options)
    if options.push:
        step = Path(options.source).resolve()
        print(shlex.join(["hf", "upload", step.parent.name, options.output, ".",
                          f"--revision={step.name}"]))


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
    steps = (checkpoint_steps(143000) if options.steps == "all" else
             list(map(int, options.steps.split(","))))
    repository = options.name if "/" in options.name else f"EleutherAI/{options.name}"
    name = repository.split("/")[1]
    run = Path(options.out_dir or name)
    for step in tqdm(steps, unit="checkpoint", disable=None):
        for line in known_bad(name, step):
            tqdm.write(line, file=sys.stderr)
        folder = run / f"step{step}"
        if (folder / "manifest.json").exists() and is_whole(folder):
            continue
        try:
            info = huggingface_hub.HfApi().model_info(repository, revision=folder.name,
                                                      files_metadata=True)
            files = {file.rfilename: file.lfs for file in info.siblings}
            weights = r"model[\w.-]*\.safetensors[\w.]*"
            if not any(re.fullmatch(weights, file) for file in files):
                weights = r"pytorch_model[\w.-]*\.bin[\w.]*"
            wanted = [file for file in files if re.fullmatch(
                rf"{weights}|config\.json|tokenizer\.json|tokenizer_config\.json", file)]
            for file in wanted:  # by commit: all of one upload, whatever is pushed meanwhile
                huggingface_hub.hf_hub_download(repository, file, revision=info.sha,
                                                local_dir=folder)
        except Exception as error:  # whatever the network and its client raise
            raise ValueError(f"{repository} step{step}: {one_line(error)}; the same command goes "
                             "on where it stopped") from None
        entries = {file: describe_file(folder / file) for file in wanted}
        for file, entry in entries.items():
            if files[file] and files[file].sha256 != entry["sha256"]:
                raise ValueError(f"{folder / file}: its SHA-256 is not the Hub's; remove it and "
                                 "fetch again")
        write_json(folder / "manifest.json", entries)  # last: with it the checkpoint is whole
    print(f"{run}: {len(steps)} checkpoints; python verify.py verify {run} compares them")


@dataclass(frozen=True)
class List:
    run: str  # run folder


def list_(options):
    """List a run's checkpoints: step, tokens, loss there, size, what is in them."""
    folders = step_folders(options.run)
    if not folders:
        raise ValueError(f"{options.run}: no step0, step1, ... in it")
    losses, total, metrics = {}, 0, Path(options.run) / "metrics.csv"
    if metrics.exists():
        losses = {cells[0]: cells[2] for _, cells in read_lines(metrics) if len(cells) > 2}
    print(f"{'step':>7} {'tokens':>15} {'loss':>8} {'size':>11}  contents")
    for step, folder in folders:
        training, damage = {}, ""
        try:
            training = read_training(folder, step)
        except (ValueError, OSError) as error:
            damage = f" ({config.explain(error)})"
        files = {name: path.stat().st_size for name, path in files_of(folder).items()
                 if path.is_file()}
        held = [word for word, start in (("weights", ("model", "pytorch_model", "layer_")),
                                         ("state", "optimizer/"), ("tokenizer", "tokenizer.json"),
                                         ("manifest", "manifest.json"))
                if any(name.startswith(start) for name in files)]
        total += sum(files.values())
        tokens = f"{training['tokens']:,}" if training else "-"
        loss = losses.get(str(step)) or "-"  # of the batch that these weights met next
        print(f"{step:7} {tokens:>15} {loss[:7]:>8} {sum(files.values()) / 1e6:8,.1f} MB  "
              f"{', '.join(held)}{'' if is_whole(folder) else ': NOT WHOLE'}{damage}")
    print(f"{len(folders)} checkpoints, {total / 1e9:,.2f} GB")


if __name__ == "__main__":
    command(sys.argv[1:], {
        "list": (List, list_, "run"), "import": (Import, import_, "source output"),
        "export": (Export, export, "source output"), "fetch": (Fetch, fetch, "name")})
