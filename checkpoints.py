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
               manifest.json        bytes and SHA-256 of every file above, written last; "chain":
                                    the digest of the step before (metrics.csv), one of all tensors

A checkpoint is written in a folder .stepN.tmp, brought to the disk and then renamed: a kill leaves
the whole of stepN or nothing by that name. Afterwards only optimizer/ may go (--state_every).

Files come from strangers: tensors are read by the safetensors library, or by torch.load with
weights_only, so that nothing in a file runs. Sources: transformers' GPTNeoXForCausalLM, 4.24 to 5;
gpt-neox v1.0, tools/convert_to_hf.py, for its layer_XX-model_YY-model_states.pt files.
"""

import errno
import functools
import hashlib
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import (LOCKS, check, command, expecting, file_size, lock as lock_file, note, read_csv,
                    read_json, sha256_of, write_json)
from model import ModelConfig, Pythia, hf_config, hf_name, parameter_shapes, read_config
from tokenizer import N_TOKENS, load_tokenizer

FIRST_DIGEST = "0" * 64  # before any step
SHARD_BYTES = 5_000_000_000  # of a tensor file at most, unless one tensor is larger
_WRITER, _WRITING = ThreadPoolExecutor(1), []  # a thread, and what it does: see save
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, of each parameter
# What weights are stored as.
FLOATS = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
# The forms of published weights, the preferred first, gpt-neox's last. Shards' index says no more
# than they do.
FORMS = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin",
         "pytorch_model-*-of-*.bin", "layer_[0-9][0-9]-model_[0-9][0-9]-model_states.pt")
# Files of 2023 also hold the causal mask, its value and rotary frequencies, which are not needed.
LEGACY_BUFFERS = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")


def checkpoint_steps(steps, every=1000):
    """Return 0, 1, 2, 4, ..., 512, the multiples of `every`, `steps`: of 143000, Pythia's 154."""
    scheduled = {0, steps} | {2**i for i in range(10)} | set(range(0, steps, every))
    return sorted(step for step in scheduled if step <= steps)


# ---------------------------------------------------------------------------- tensor files


def open_file(path):
    """Return {name: tensor} of a safetensors or torch.save file, mapped and not read until used."""
    file_size(path)  # refuses what is no file
    try:
        if path.suffix in (".bin", ".pt"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            file = safe_open(path, framework="pt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        for name, tensor in tensors.items():
            if not (name.isprintable() and tensor.layout is torch.strided and not tensor.is_nested
                    and tensor.device.type == "cpu" and tensor.is_contiguous()):
                raise ValueError(f"{name!r:.50} is not a plain tensor")
    except Exception as error:  # a broken or hostile file raises whatever it likes
        raise ValueError(f"{path}: not a whole file of tensors alone: {one_line(error)}") from None
    return tensors


def one_line(error):
    """Return the beginning of an error's words, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def weight_files(folder):
    """Return the files of a checkpoint's weights, or raise ValueError unless all are there."""
    for form in FORMS:
        if paths := sorted(folder.glob(form)):
            count = re.search(r"-of-(\d+)\.", paths[-1].name)
            if count and len(paths) != int(count[1]):
                raise ValueError(f"{folder}: {len(paths)} of {int(count[1])} files {form}")
            return paths
    raise ValueError(f"{folder}: no checkpoint; expected {', '.join(FORMS)}")


def check_tensors(where, tensors, shapes):
    """Raise ValueError naming 20 tensors at most that are missing, extra, misshapen, no floats."""
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"unexpected {name:.200}")
        elif tensor.shape != shapes[name]:
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(shapes[name])}")
        elif tensor.dtype not in FLOATS.values():
            problems.append(f"{name} is {tensor.dtype}, expected float32, float16 or bfloat16")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems[:20])}")


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
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
             "weight_map": {name: file for file, shard in files.items() for name in shard}}
    return files, {f"{stem}.safetensors.index.json": index}


def write_file(path, tensors):
    """Write a safetensors file; sync brings it to the disk."""
    path.parent.mkdir(exist_ok=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path,
                  metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for instance
        raise OSError(errno.EIO, one_line(error), str(path)) from None
    path.chmod(0o644)  # the library lets nobody else read it


def sync(path):
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---------------------------------------------------------------------------- what is in a run


def step_folders(run):
    """Return [(step, folder)] of all in a run folder that is named like a checkpoint, in order."""
    return sorted((int(path.name[4:]), path) for path in Path(run).glob("step*")
                  if re.fullmatch(r"step(0|[1-9]\d*)", path.name) and path.is_dir())


def saved_steps(run, state=False):
    """Return a run's steps with a whole checkpoint, in order; `state`: those to go on from."""
    return [step for step, folder in step_folders(run)
            if is_whole(folder) and ((folder / "optimizer").exists() or not state)]


def read_training(folder, step):
    """Return the object in training.json, {} without one; ValueError if it is of another step."""
    path = folder / "training.json"
    training = read_json(path) if os.path.lexists(path) else {}
    kinds = [type(training.get(name)) for name in ("updates", "tokens", "scaler")]
    if training and (training.get("step") != step or kinds != [int, int, dict]):
        raise ValueError(f"{path}: is not what a run saves at step {step}; was {folder.name} "
                         "copied or renamed? Move it away")
    return training


def read_manifest(folder):
    """Return a checkpoint's {file: {"bytes", "sha256"}}, digest and hash of all its tensors.

    Moments are left out if --state_every has removed them. Without a manifest there are no files;
    without a chain the digest is that before the first step, and the hash is None.
    """
    path = folder / "manifest.json"
    entries = read_json(path) if path.exists() else {}
    with expecting(path, "a checkpoint's manifest"):
        chain = {"digest": FIRST_DIGEST, "state_sha256": None} | entries.pop("chain", {})
    there = {name: entry for name, entry in entries.items()
             if not name.startswith("optimizer/") or (folder / "optimizer").exists()}
    return there, chain["digest"], chain["state_sha256"]


def write_manifest(folder, digest=None):
    """Write folder/manifest.json and return {file: entry}. digest: the last step's."""
    entries = describe(folder)
    tensors = "".join(entry["sha256"] for name, entry in entries.items()
                      if name.endswith(".safetensors"))
    state = hashlib.sha256(tensors.encode()).hexdigest()
    chain = {"chain": {"digest": digest, "state_sha256": state}} if digest else {}
    write_json(folder / "manifest.json", entries | chain)
    return entries


def describe(folder):
    """Return {file: {"bytes", "sha256"}} of what lies in a checkpoint, but for hidden files."""
    names = sorted(str(path.relative_to(folder))
                   for path in (*folder.glob("*"), *folder.glob("optimizer/*"))
                   if path.is_file() and path.name[0] != "." and path.name != "manifest.json")
    with ThreadPoolExecutor() as threads:
        hashes = threads.map(sha256_of, (folder / name for name in names))
        return {name: {"bytes": file_size(folder / name), "sha256": sha256}
                for name, sha256 in zip(names, hashes)}


def compare_with_manifest(folder):
    """Return how many files are as in the manifest, and a line for each that is not.

    Without a manifest: None and no lines.
    """
    if not (folder / "manifest.json").exists():
        return None, []
    expected, found, problems = read_manifest(folder)[0], describe(folder), []
    names = sorted(expected.keys() | found.keys())
    for name in names:
        shown = f"{name!a:.200}".strip("'")
        if name not in found:
            problems.append(f"{shown}: no such file")
        elif name not in expected:
            problems.append(f"{shown}: not in the manifest")
        elif expected[name] != found[name]:
            problems.append(f"{shown}: its SHA-256 is not the manifest's")
    return len(names) - len(problems), problems


def is_whole(folder):
    """Tell whether all files are there: a manifest's with their bytes, or those of a download."""
    try:
        if not (folder / "manifest.json").exists():
            return bool(weight_files(folder))
        entries = read_manifest(folder)[0]
        return bool(entries) and all(file_size(folder / name) == entry["bytes"]
                                     for name, entry in entries.items())
    except (ValueError, KeyError, TypeError, OSError):
        return False


# ---------------------------------------------------------------------------- load and save


def load_model(folder, device="cpu"):
    """Return the Pythia of a folder (ours, or a published one in any form), in float32."""
    config, tensors = open_any(folder)
    with torch.device("meta"):
        model = Pythia(config)
    model.load_state_dict({name: tensors[hf_name(name)].to(device, torch.float32, copy=True)
                           for name, _ in model.named_parameters()}, assign=True)
    return model


def moments_of(folder):
    """Return {exp_avg.NAME or exp_avg_sq.NAME: tensor} of what lies in a checkpoint."""
    return {name: tensor for path in folder.glob("optimizer/*.safetensors")
            for name, tensor in open_file(path).items()}


def load_training(run, step, model, optimizer):
    """Fill model and optimizer from RUN/step{N}, every bit as it was, however either is sharded.

    Return the saved training object; None, with the weights alone filled, if no moments lie there.
    """
    folder = Path(run) / f"step{step}"
    training = read_training(folder, step)
    if process_place()[0] == 0:  # a flipped bit would spread to every later checkpoint
        for problem in compare_with_manifest(folder)[1]:
            raise ValueError(f"{folder}/{problem}; move {folder.name} away to go on from the "
                             "checkpoint before it")
    parameters = dict(model.named_parameters())
    found, weights = open_any(folder)
    if found.n_heads != model.config.n_heads:
        raise ValueError(f"{folder}: n_heads is {found.n_heads}, the run's {model.config.n_heads}")
    check_tensors(folder, weights, {hf_name(n): p.shape for n, p in parameters.items()})
    for name, parameter in parameters.items():
        fill(parameter, weights[hf_name(name)])
    if not training or not (folder / "optimizer").exists():
        return None
    if not training["updates"]:
        return training  # there are no moments yet
    moments = moments_of(folder)
    check_tensors(folder / "optimizer", moments, {
        f"{kind}.{name}": p.shape for name, p in parameters.items() for kind in MOMENTS})
    for name, parameter in parameters.items():
        state = {"step": torch.tensor(float(training["updates"]), device=parameter.device)}
        for kind in MOMENTS:
            state[kind] = torch.empty_like(parameter)
            fill(state[kind], moments[f"{kind}.{name}"])
        optimizer.state[parameter] = state
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


def save(run, step, model, optimizer, training, tokenizer=None, scheduled=True, asynchronous=False,
         state_every=None, digest=None):
    """Write RUN/step{N} whole or not at all. Every process calls; the first one writes.

    training: the object that load_training gives back. scheduled: if not (an interrupted run's), it
    goes when the next is saved. asynchronous: return once the tensors are in host memory; the next
    call or finish_writing waits for the rest. state_every: moments stay only in checkpoints of its
    multiples and in the newest. digest: the last step's. What is there with its moments is kept.
    """
    finish_writing()
    folder = Path(run) / f"step{step}"
    parameters = dict(model.named_parameters())
    moments = {f"{kind}.{name}": optimizer.state[p][kind] for name, p in parameters.items()
               for kind in MOMENTS if optimizer.state}  # there are none before the first update
    weights = {hf_name(name): p.detach() for name, p in parameters.items()}
    files, notes = split("model", weights, SHARD_BYTES)
    files |= split("optimizer/moments", moments, SHARD_BYTES)[0]  # they are read without an index
    notes |= {"training.json": {"step": step, "scheduled": scheduled, **training},
              "config.json": hf_config(model.config)}
    whole = gathered(files, copy=asynchronous)
    if asynchronous:
        whole = list(whole)

    def write():
        if process_place()[0] == 0 and not (is_whole(folder) and (folder / "optimizer").exists()):
            write_checkpoint(folder, whole, notes, tokenizer, digest)
            make_room(run, step, state_every)
        for _ in whole:  # every process takes part in gathering
            pass
        if dist.is_initialized():  # no process ends, or reads the folder, before it is written
            dist.barrier(_group())

    if asynchronous:
        if dist.is_initialized():
            _group()  # made here, since the thread must not while this one trains
        _WRITING.append(_WRITER.submit(write))
    else:
        write()


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


def gathered(files, copy):
    """Yield (file name, {name: whole tensor}) one by one; the tensors to the first process only.

    Every process takes part in gathering the shards of a tensor, so each must take all files.
    """
    for file, tensors in files.items():
        whole = {}
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if is_shard(tensor) else tensor
            if process_place()[0] == 0:
                whole[name] = tensor.to("cpu", copy=copy)
        yield file, whole


def write_checkpoint(folder, files, notes, tokenizer=None, digest=None):
    """Write a folder that takes the name `folder` only once all of it is on the disk.

    files: (name, {name: tensor}) one by one. notes: {name: object}, config.json among them. What
    has the name already is kept as NAME.broken, unless it is the same but for its moments.
    """
    temporary, aside = folder.with_name(f".{folder.name}.tmp"), Path(f"{folder}.broken")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process may have left it
    temporary.mkdir()  # but no parent: it is gone if a disk was unmounted
    try:
        for file, tensors in files:
            write_file(temporary / file, tensors)
        write_notes(temporary, notes, tokenizer)
        entries = write_manifest(temporary, digest)
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        while os.path.lexists(aside):
            aside = Path(f"{aside}1")
        if os.path.lexists(folder):  # damaged, or without its moments
            os.rename(folder, aside)
        os.rename(temporary, folder)
        sync(folder.parent)
        if aside.exists() and describe(aside).items() <= entries.items():
            shutil.rmtree(aside, ignore_errors=True)
    finally:  # after an error, such as a full disk, the room is free again
        shutil.rmtree(temporary, ignore_errors=True)


def write_notes(folder, notes, tokenizer):
    """Write what lies beside the tensors, {name: object}, and the tokenizer with its settings."""
    notes = notes | {"generation_config.json": {
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}}
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        notes["tokenizer_config.json"] = special | {
            "tokenizer_class": "GPTNeoXTokenizer", "pad_token": "<|padding|>",
            "clean_up_tokenization_spaces": False,  # else "a , b" would be decoded as "a, b"
            "model_max_length": notes["config.json"]["max_position_embeddings"]}
    for name, value in notes.items():
        write_json(folder / name, value)


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
        off_grid = scheduled and state_every and other % state_every
        if scheduled is False or off_grid and (folder / "optimizer").exists():
            # Renamed before it is removed, so that nothing half has its name at any moment.
            temporary = folder.with_name(f".{folder.name}.tmp")
            os.rename(folder / "optimizer" if off_grid else folder, temporary)
            shutil.rmtree(temporary)


def lock(run):
    """Make a run folder, locked until this process ends; remove what a killed one left."""
    Path(run).mkdir(parents=True, exist_ok=True)
    LOCKS.append(lock_file(Path(run) / ".lock"))
    for path in Path(run).glob(".step*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------- published forms


def open_any(source):
    """Return the ModelConfig and {published name: tensor} of a checkpoint in any published form."""
    paths = weight_files(Path(source))
    if paths[0].suffix == ".pt":
        try:
            config, tensors = open_neox(Path(source), paths)
        except (KeyError, IndexError, RuntimeError) as error:  # parts are missing or do not fit
            raise ValueError(f"{source}: {one_line(error)}") from None
    else:
        config = read_config(source)
        tensors = {name: tensor for path in paths for name, tensor in open_file(path).items()}
    # accelerate and huggingface_hub write the head under the name it has in transformers 5.
    tensors = {"embed_out.weight" if name == "lm_head.weight" else name: tensor
               for name, tensor in tensors.items() if not name.endswith(LEGACY_BUFFERS)}
    check_tensors(source, tensors, parameter_shapes(config))
    return config, tensors


def open_neox(folder, paths):
    """Return the ModelConfig, {published name: tensor} of gpt-neox's layer files, ranks merged.

    Layer 0 is the embedding, 2 to L + 1 are the blocks, L + 3 is the last norm, L + 4 the head.
    """
    ends = {"word_embeddings.weight": "gpt_neox.embed_in.weight",
            "norm.weight": "gpt_neox.final_layer_norm.weight",
            "norm.bias": "gpt_neox.final_layer_norm.bias",
            "final_linear.weight": "embed_out.weight"}
    ranks = sorted({path.name[15:17] for path in paths})  # of layer_XX-model_YY-model_states.pt
    tensors = {}
    for layer in sorted({path.name[6:8] for path in paths}):
        parts = [open_file(folder / f"layer_{layer}-model_{rank}-model_states.pt")
                 for rank in ranks]
        for name in parts[0]:
            published = ends.get(name, f"gpt_neox.layers.{int(layer) - 2}.{name}")
            tensors[published] = merged(published, [part[name] for part in parts])
    vocab_size, d_model = tensors["gpt_neox.embed_in.weight"].shape
    # Each frequency turns two dims, and a quarter of a head's dims are turned.
    frequencies = tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"].numel()
    n_heads = d_model // (8 * max(1, frequencies))
    return ModelConfig(int(layer) - 4, d_model, n_heads, vocab_size, gelu="tanh"), tensors


def merged(name, parts):
    """Return the whole of a tensor of which each tensor-parallel rank has a part.

    Row parallel layers are split over inputs, others over outputs (whole heads, or rows of the
    vocabulary). As in gpt-neox, row parallel layers' biases add up, and LayerNorms, of which each
    rank has a copy that rounding has changed, are averaged, in their own dtype.
    """
    if len(parts) == 1 or name.endswith(LEGACY_BUFFERS):
        return parts[0]
    if name.endswith(("norm.weight", "norm.bias")):
        return functools.reduce(torch.add, parts) / len(parts)
    if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
        return functools.reduce(torch.add, parts)
    row_parallel = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
    return torch.cat(parts, dim=1 if row_parallel else 0)


EARLY = {0, *(2**i for i in range(10))}
FINAL_2_8B = EARLY | {*range(1000, 65001, 1000), *range(70000, 140001, 10000), 103000}
# Repositories (a regular expression), steps (None: any), what is wrong, EleutherAI/pythia's issue.
KNOWN_BAD = (
    ("pythia-2.8b", FINAL_2_8B, "serves weights of the end of training (#205, #195)"),
    ("pythia-2.8b(-deduped)?", EARLY | {1000}, "one is a copy: their published scores are equal"),
    ("pythia-12b", {50000, 58000}, "its first shard is the final checkpoint's (#206)"),
    ("pythia-12b-deduped", {32000}, "was the final model until June 2023: is yours older? (#108)"),
    ("neox-ckpt-pythia-6.9b-deduped.*", None, "several steps may hold the same weights (#195)"),
    ("pythia-160m-weight-seed[12]", None, "later steps do not descend from its step 0 (#203)"),
    ("pythia-410m-seed(9|6|2)", {40000, 88000, 111000},
     "of seeds 9, 6, 2 weights are reported missing at step 40000, 88000, 111000 (#202)"),
    ("pythia-.*", {0, 1, 2}, "steps 0 and 1 are equal (#83); float16 hides most of 2 (#198)"))


def known_bad(name, step):
    """Return a line for everything known to be wrong with a published checkpoint."""
    return [f"warning: {name} step {step}: {words}" for repository, steps, words in KNOWN_BAD
            if re.fullmatch(repository, name) and (steps is None or step in steps)]


def identify(source):
    """Return the published name and step that a path speaks of, as pythia-12b/step50000 does."""
    name = re.search(r"(?:^|/)((?:neox-ckpt-)?pythia-[\w.-]+)(?=/|$)", str(source))
    step = re.search(r"(?:^|/)(?:global_)?step(\d+)/?$", str(source))
    return name[1] if name else "", int(step[1]) if step else None


def folder_tokenizer(folder, named=None):
    """Return `named`, or a folder's own tokenizer.json if it is the 20B's, or this folder's."""
    own = Path(folder) / "tokenizer.json"
    if named is None and os.path.lexists(own):
        load_tokenizer(own)  # or refuse it
        named = own
    size = open_any(folder)[0].vocab_size
    if size < N_TOKENS:
        raise ValueError(f"{folder}: vocab_size is {size}, but the tokenizer has {N_TOKENS:,} ids")
    return named or "20B_tokenizer.json"


# ---------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Import:
    source: str  # folder of a checkpoint: ours, or a published one as it was downloaded
    output: str  # folder to write, e.g. runs/pythia-70m/step512
    dtype: str | None = None  # float32, float16 or bfloat16; default: as stored
    shard_size: int = SHARD_BYTES  # bytes of a file at most, e.g. 5e8
    push: bool = False  # print the command that uploads the output

    def __post_init__(self):
        check(self, "float32, float16 or bfloat16", FLOATS.__contains__, "dtype")


def import_(options):
    """Copy a checkpoint of any form, and its tokenizer, into a folder that everything reads."""
    source, output = Path(options.source), Path(options.output)
    for line in known_bad(*identify(source)):
        note(line)
    model_config, tensors = open_any(source)
    if output.exists():
        raise ValueError(f"{output}: is there already; nothing was written")
    tokenizer = source / "tokenizer.json" if os.path.lexists(source / "tokenizer.json") else None
    if tokenizer:
        load_tokenizer(tokenizer)  # a stranger's may be a link to any file of this machine
    for name, tensor in tensors.items() if options.dtype else ():
        tensors[name] = tensor.to(FLOATS[options.dtype])
        if tensors[name].isinf().sum() > tensor.isinf().sum():
            raise ValueError(f"{name}: {tensor.abs().max():g} overflows {options.dtype}")
    files, notes = split("model", tensors, options.shard_size)
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    notes["config.json"] = hf_config(model_config) | {
        "torch_dtype": str(dtype).removeprefix("torch.")}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(output, files.items(), notes, tokenizer)
    print(f"{output}: {len(tensors)} tensors in {len(files)} file(s), gelu {model_config.gelu}")
    if options.push:
        *_, run, step = source.resolve().parts
        print(shlex.join(["hf", "upload", run, options.output, ".", f"--revision={step}"]))


@dataclass(frozen=True)
class Fetch:
    name: str  # a published repository: pythia-70m-deduped, pythia-160m-seed3, or OWNER/NAME
    steps: str = "143000"  # numbers with commas, or all: Pythia's 154
    out_dir: str | None = None  # run folder to fill with step0, step1, ...; default: NAME here


def fetch(options):
    """Download published checkpoints; what is already whole is not downloaded again."""
    steps = checkpoint_steps(143000) if options.steps == "all" else options.steps.split(",")
    repository = options.name if "/" in options.name else f"EleutherAI/{options.name}"
    name = repository.split("/")[1]
    run = Path(options.out_dir or name)
    for step in map(int, steps):
        folder = run / f"step{step}"
        for line in known_bad(name, step):
            note(line)
        if (folder / "manifest.json").exists() and is_whole(folder):
            continue
        try:
            download(repository, folder)
        except Exception as error:  # whatever the network and its client raise, if it is installed
            raise ValueError(f"{repository} step{step}: {one_line(error)}; the same command goes "
                             "on where it stopped") from None
        write_manifest(folder)
    print(f"{run}: {len(steps)} checkpoints; python verify.py verify {run} compares them")


def download(repository, folder):
    """Fill RUN/stepN with weights, config and tokenizer of the revision stepN."""
    import huggingface_hub
    info = huggingface_hub.HfApi().model_info(repository, revision=folder.name, files_metadata=True)
    files = {file.rfilename: file.lfs for file in info.siblings}
    weights = r"model[\w.-]*\.safetensors[\w.]*"
    if not any(re.fullmatch(weights, file) for file in files):
        weights = r"pytorch_model[\w.-]*\.bin[\w.]*"
    for file, lfs in files.items():
        if re.fullmatch(rf"{weights}|(config|tokenizer|tokenizer_config)\.json", file):
            # By commit: all files are of one upload, whatever is pushed meanwhile.
            path = huggingface_hub.hf_hub_download(repository, file, revision=info.sha,
                                                   local_dir=folder)
            if lfs and lfs.sha256 != sha256_of(path):
                raise ValueError(f"{path}: its SHA-256 is not the Hub's; remove it and fetch again")


@dataclass(frozen=True)
class List:
    run: str  # run folder


def list_(options):
    """List a run's checkpoints: step, tokens, loss there, size, what is in them."""
    folders, metrics = step_folders(options.run), Path(options.run) / "metrics.csv"
    if not folders:
        raise ValueError(f"{options.run}: no step0, step1, ... in it")
    rows = read_csv(metrics, torn=True) if metrics.exists() else ()
    losses = {row.get("step"): row.get("loss") for row in rows}
    print(f"{'step':>7} {'tokens':>15} {'loss':>8} {'size':>11}  contents")
    for step, folder in folders:
        tokens, held = "-", [] if is_whole(folder) else ["NOT WHOLE"]
        try:
            if training := read_training(folder, step):
                tokens = f"{training['tokens']:,}"
        except (ValueError, OSError) as error:
            held.append(str(error))
        held += [name for name in ("optimizer", "tokenizer.json", "manifest.json")
                 if (folder / name).exists()]
        loss = losses.get(str(step)) or "-"  # of the batch that these weights met next
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        print(f"{step:7} {tokens:>15} {loss[:7]:>8} {size:8,.1f} MB  {', '.join(held)}")


if __name__ == "__main__":
    command(sys.argv[1:], {
        "list": (List, list_, "run"), "import": (Import, import_, "source output"),
        "export": (Import, import_, "source output"), "fetch": (Fetch, fetch, "name")})
