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
"""

import errno
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from config import command, replacing
from model import Pythia
from training.parallel import fill, is_shard
from weights.layout import hf_config, hf_name, open_model, without_legacy_buffers
from weights.tensors import (check_tensors, open_folder, read_index, read_small_json, sha256_of,
                             split, write_file)

SHARD_BYTES = 5_000_000_000  # of a tensor file at most, unless one tensor is larger


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
        return _WRITER.submit(lambda: None)
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
                    written |= read_small_json(other)
                    other.unlink()
                for name, note in notes.items():
                    write_json(temporary / name, note)
                if tokenizer:
                    write_tokenizer(temporary, tokenizer, model.config.seq_length)
                write_manifest(temporary, written)
            make_room(run, step, state_every)
        _meet()

    future = _WRITER.submit(finish)
    if not asynchronous:
        future.result()
    return future


_WRITER = ThreadPoolExecutor(1)


def finish_writing():
    """Wait until the checkpoint under way is on the disk; its processes still need each other."""
    _WRITER.shutdown()


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
                    name: entry for name, entry in read_small_json(folder / "manifest.json").items()
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


def write_json(path, value):
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


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
    training = read_small_json(path)
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
    return read_small_json(path) if path.exists() else {}


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
            entries = read_small_json(folder / "manifest.json")
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


if __name__ == "__main__":
    from weights import compare, huggingface, verify
    command(sys.argv[1:], {
        "verify": (verify.Verify, verify.verify, "folders..."),
        "diff": (compare.Diff, compare.diff, "a b"),
        "list": (compare.List, compare.list_, "run"),
        "import": (huggingface.Import, huggingface.import_, "source output"),
        "export": (huggingface.Export, huggingface.export, "source output"),
        "fetch": (huggingface.Fetch, huggingface.fetch, "name")})
