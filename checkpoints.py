"""Checkpoints in Hugging Face's layout: save, load, list; import, export and fetch published ones.

    python checkpoints.py list runs/mini
    python checkpoints.py fetch pythia-70m-deduped --steps=0,1,512,143000
    python checkpoints.py import SOURCE runs/pythia-70m/step512
    python checkpoints.py export runs/mini/step512 OUT --dtype=float16 --shard_size=5e9 --push

    RUN/step64/model.safetensors    float32 weights under the published names
               optimizer/moments.safetensors   Adam's exp_avg.NAME and exp_avg_sq.NAME, float32; in
                                    a folder of their own, since most programs that read a
                                    checkpoint load every *.safetensors beside config.json
               training.json        step, tokens, updates, the state of the loss scaler
               config.json          of transformers' GPTNeoXForCausalLM
               generation_config.json, tokenizer.json, tokenizer_config.json
               manifest.json        bytes and SHA-256 of each file above; "chain": the digest of
                                    the step before (see metrics.csv) and one hash of all tensors

A checkpoint is written into .step64.tmp, flushed to the disk and then renamed. Whenever the process
is killed or the power fails, step64 is therefore either complete or absent. Nothing in it changes
later, except that --state_every may remove optimizer/.

Published files are not trusted: tensors are read by the safetensors library, or by torch.load with
weights_only, so that no code in a file is executed. Sources: transformers' GPTNeoXForCausalLM, 4.24
to 5; tools/convert_to_hf.py of gpt-neox v1.0 for its layer_XX-model_YY-model_states.pt files.
"""

import functools
import hashlib
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from config import (LOCKS, check, command, expecting, file_size, lock as lock_file, note, read_csv,
                    read_json, sha256_of, write_json)
from model import ModelConfig, Pythia, hf_config, hf_name, parameter_shapes, read_config
from tokenizer import N_TOKENS, load_tokenizer

FIRST_DIGEST = "0" * 64  # the digest before the first step
SHARD_BYTES = 5_000_000_000  # largest tensor file, unless a single tensor is larger
_WRITER, _WRITING = ThreadPoolExecutor(1), []  # the background thread and its unfinished save
_group = functools.cache(lambda: dist.new_group(backend="gloo"))  # used by that thread
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, of each parameter
FLOATS = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
# File names of published weights in order of preference; gpt-neox's own come last. An index of
# shards is not needed, since each shard lists its tensors.
FORMS = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin",
         "pytorch_model-*-of-*.bin", "layer_[0-9][0-9]-model_[0-9][0-9]-model_states.pt")
# Uploads of 2023 also contain the causal mask, its fill value and the rotary frequencies.
LEGACY_BUFFERS = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")


def checkpoint_steps(steps, every=1000):
    """Return 0, 1, 2, 4, ..., 512, the multiples of `every`, and `steps`: for Pythia, 154 steps."""
    scheduled = {0, steps} | {2**i for i in range(10)} | set(range(0, steps, every))
    return sorted(step for step in scheduled if step <= steps)


# ---------------------------------------------------------------------------- tensor files


def open_file(path):
    """Return {name: tensor} of a safetensors or torch.save file; mapped, so read only when used."""
    file_size(path)  # refuses a pipe
    with expecting(path, "a complete file of plain tensors"):
        if path.suffix in (".bin", ".pt"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            file = safe_open(path, framework="pt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        for name, tensor in tensors.items():
            if not (name.isprintable() and tensor.layout is torch.strided and not tensor.is_nested
                    and tensor.device.type == "cpu" and tensor.is_contiguous()):
                raise ValueError(f"{name!r:.50} is not a plain tensor")
    return tensors


def weight_files(folder):
    """Return the files of a checkpoint's weights; ValueError if there are none or one is absent."""
    for form in FORMS:
        if paths := sorted(folder.glob(form)):
            count = re.search(r"-of-(\d+)", paths[0].name)  # of shards
            if count and len(paths) != int(count[1]):
                raise ValueError(f"{folder}: found {len(paths)} of {int(count[1])} files {form}")
            return paths
    raise ValueError(f"{folder}: no checkpoint; expected {', '.join(FORMS)}")


def check_tensors(where, tensors, shapes):
    """Raise ValueError naming up to 20 missing or unexpected tensors, wrong shapes and dtypes."""
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"unexpected {name:.200}")
        elif tensor.shape != shapes[name] or tensor.dtype not in FLOATS.values():
            problems.append(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                            f"{tuple(shapes[name])} in float32, float16 or bfloat16")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems[:20])}")


def split(stem, tensors, shard_size):
    """Return {file name: {name: tensor}} and {index name: index}, as Hugging Face names them.

    If all tensors fit into shard_size bytes, that is one file and no index; else each shard holds
    at most shard_size bytes, or one tensor that is larger.
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
    """Write a safetensors file."""
    path.parent.mkdir(exist_ok=True)
    with expecting(path, "written"):  # a full disk is an error of the library's own kind
        save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes it readable by its owner only


def sync(path):
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---------------------------------------------------------------------------- files of a run


def step_folders(run):
    """Return [(step, folder)] of the folders named step0, step1, ... in a run folder, in order."""
    return sorted((int(path.name[4:]), path) for path in Path(run).glob("step*")
                  if re.fullmatch(r"step(0|[1-9]\d*)", path.name) and path.is_dir())


def saved_steps(run, state=False):
    """Return the steps of all complete checkpoints; state=True: of those with Adam's moments."""
    return [step for step, folder in step_folders(run)
            if is_whole(folder) and ((folder / "optimizer").exists() or not state)]


def read_training(folder, step):
    """Return the object in training.json, {} without one; ValueError if it is of another step."""
    path = folder / "training.json"
    training = read_json(path) if path.exists() else {}
    kinds = [type(training.get(name)) for name in ("updates", "tokens", "scaler")]
    if training and (training.get("step") != step or kinds != [int, int, dict]
                     or not 0 <= training["updates"] <= step or training["tokens"] < 0):
        raise ValueError(f"{path}: is not what a run saves at step {step}; was {folder.name} "
                         "copied or renamed? Move it away")
    return training


def read_manifest(folder):
    """Return {file: {"bytes", "sha256"}}, the digest of the step before, one hash of all tensors.

    Moments that --state_every has removed are left out. Without a manifest: {}, FIRST_DIGEST, None.
    """
    path = folder / "manifest.json"
    entries = read_json(path) if path.exists() else {}
    with expecting(path, "a checkpoint's manifest"):
        chain = {"digest": FIRST_DIGEST, "state_sha256": None} | entries.pop("chain", {})
        "".join(filter(None, chain.values()))  # they must be texts
    there = {name: entry for name, entry in entries.items()
             if not name.startswith("optimizer/") or (folder / "optimizer").exists()}
    return there, chain["digest"], chain["state_sha256"]


def write_manifest(folder, digest=None, known={}):
    """Write and return the manifest of a folder (see describe). digest: of the step before."""
    entries = describe(folder, known)
    tensors = "".join(entry["sha256"] for name, entry in entries.items()
                      if name.endswith(".safetensors"))
    state = hashlib.sha256(tensors.encode()).hexdigest()
    chain = {"chain": {"digest": digest, "state_sha256": state}} if digest else {}
    write_json(folder / "manifest.json", entries | chain)
    return entries


def manifest_entry(path):
    """Return a file's entry in a manifest, {"bytes", "sha256"}."""
    with expecting(path, "readable"):  # an I/O error does not name its file
        return {"bytes": file_size(path), "sha256": sha256_of(path)}


def describe(folder, known={}):
    """Return {file: its entry, from `known` if there} of a checkpoint's files, hidden ones not."""
    names = sorted(str(path.relative_to(folder))
                   for path in (*folder.glob("*"), *folder.glob("optimizer/*"))
                   if path.is_file() and path.name[0] != "." and path.name != "manifest.json")

    def look(name):
        return known.get(name) or manifest_entry(folder / name)

    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(look, names)))


def compare_with_manifest(folder):
    """Return the number of files that agree with the manifest, and {file: what is wrong with it}.

    The number is None if there is no manifest.
    """
    if not (folder / "manifest.json").exists():
        return None, {}
    expected, found, problems = read_manifest(folder)[0], describe(folder), {}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems[name] = "no such file"
        elif name not in expected:
            problems[name] = "not in the manifest"
        elif found[name] != expected[name]:
            problems[name] = "its SHA-256 is not the manifest's"
    return len(expected.keys() | found.keys()) - len(problems), problems


def is_whole(folder):
    """Tell whether a checkpoint is complete, by its manifest's sizes or by its weight files."""
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
    """Return the Pythia in a checkpoint folder (ours, or any published form), in float32."""
    config, tensors = open_any(folder)
    with torch.device("meta"):
        model = Pythia(config)
    model.load_state_dict({name: tensors[hf_name(name)].to(device, torch.float32, copy=True)
                           for name, _ in model.named_parameters()}, assign=True)
    return model


def moments_of(folder):
    """Return {exp_avg.NAME or exp_avg_sq.NAME: tensor} of a checkpoint, {} if it has no moments."""
    return {name: tensor for path in folder.glob("optimizer/*.safetensors")
            for name, tensor in open_file(path).items()}


def load_training(run, step, model, optimizer):
    """Load RUN/step{N} into a model and optimizer, bit for bit, however they are sharded.

    Returns the object in training.json, {} without one.
    """
    folder = Path(run) / f"step{step}"
    training = read_training(folder, step)
    if process_place()[0] == 0:  # a flipped bit would spread to every later checkpoint
        saved = read_manifest(folder)[0]
        for name, problem in compare_with_manifest(folder)[1].items():
            if name in saved or re.match("model|optimizer/", name):  # other files do no harm
                raise ValueError(f"{folder / name}: {problem}; restore or remove it, or move "
                                 f"{folder.name} away to go on from the checkpoint before it")
    config, weights = open_any(folder)
    if config.n_heads != model.config.n_heads:  # which no shape depends on
        raise ValueError(f"{folder}: n_heads is {config.n_heads}, the run's {model.config.n_heads}")
    parameters = dict(model.named_parameters())
    check_tensors(folder, weights, {hf_name(n): p.shape for n, p in parameters.items()})
    for name, parameter in parameters.items():
        fill(parameter, weights[hf_name(name)])
    if not training.get("updates") or not (folder / "optimizer").exists():
        return training  # Adam has no moments before the first update
    moments = moments_of(folder)
    check_tensors(folder / "optimizer", moments, {
        f"{kind}.{name}": p.shape for name, p in parameters.items() for kind in MOMENTS})
    for name, parameter in parameters.items():
        updates = torch.tensor(float(training["updates"]), device=parameter.device)
        optimizer.state[parameter] = {"step": updates} | {
            kind: fill(torch.empty_like(parameter), moments[f"{kind}.{name}"]) for kind in MOMENTS}
    return training


def is_shard(tensor):
    """Tell whether a tensor is a DTensor, of which each process holds a shard."""
    return hasattr(tensor, "full_tensor")  # importing DTensor to ask takes a second


@torch.no_grad()
def fill(tensor, whole):
    """Copy a whole tensor into `tensor`, which may be this process's shard of it; return that."""
    if is_shard(tensor):  # every process has the whole tensor, so nothing is sent
        from torch.distributed.tensor import distribute_tensor
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements,
                                  src_data_rank=None)
    return tensor.copy_(whole)


def save(run, step, model, optimizer, training, tokenizer=None, scheduled=True, asynchronous=False,
         state_every=None, digest=None):
    """Write RUN/step{N}, complete or not at all. All processes call it; the first one writes.

    training: the object for load_training to return. scheduled: False for the checkpoint of an
    interrupted run, which is removed when the next one is saved. asynchronous: return as soon as
    the tensors are copied to host memory; a thread writes them, and the next call or finish_writing
    waits for it. state_every: keep moments only at multiples of this step and in the newest
    checkpoint. digest: of the step before.
    """
    finish_writing()
    parameters = dict(model.named_parameters())
    moments = {f"{kind}.{name}": optimizer.state[p][kind] for name, p in parameters.items()
               for kind in MOMENTS if optimizer.state}  # empty before the first update
    weights = {hf_name(name): p.detach() for name, p in parameters.items()}
    files, notes = split("model", weights, SHARD_BYTES)
    files |= split("optimizer/moments", moments, SHARD_BYTES)[0]
    notes |= {"training.json": {"step": step, "scheduled": scheduled, **training},
              "config.json": hf_config(model.config)}
    whole = gathered(files, copy=asynchronous)
    if asynchronous:
        whole = list(whole)
    group = _group() if dist.is_initialized() else None  # not to be made in the thread

    def write():
        if process_place()[0] == 0:
            write_checkpoint(Path(run) / f"step{step}", whole, notes, tokenizer, digest)
            make_room(run, step, state_every)
        for _ in whole:  # every process takes part in gathering
            pass
        if group:  # no process ends, or reads the folder, before it is written
            dist.barrier(group)

    if asynchronous:
        _WRITING.append(_WRITER.submit(write))
    else:
        write()


def finish_writing():
    """Wait for the checkpoint being written in the background; raise the error if it failed."""
    while _WRITING:
        _WRITING.pop().result()


def process_place():
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(files, copy):
    """Yield (file name, {name: whole tensor in host memory}); outside the first process {}.

    All processes must iterate to the end, since all take part in gathering a sharded tensor.
    """
    for file, tensors in files.items():
        whole = {}
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if is_shard(tensor) else tensor
            if process_place()[0] == 0:
                whole[name] = tensor.to("cpu", copy=copy)
        yield file, whole


def write_checkpoint(folder, files, notes, tokenizer=None, digest=None):
    """Write a checkpoint folder; a kill at any moment leaves it complete or absent.

    files: iterator of (file name, {name: tensor}); notes: {file name: JSON object}, with
    config.json. A folder that is there already (damaged, or without its moments) is kept as
    NAME.broken, unless the new one has all its files bit for bit.
    """
    temporary, aside = folder.with_name(f".{folder.name}.tmp"), Path(f"{folder}.broken")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    temporary.mkdir()  # without parents: the run folder is absent if its disk was unmounted
    try:
        # 1. Write everything under a name that no reader looks for, and flush it to the disk.
        with ThreadPoolExecutor() as threads:  # a file is hashed while the next one is written
            hashed = {}
            for file, tensors in files:
                write_file(temporary / file, tensors)
                hashed[file] = threads.submit(manifest_entry, temporary / file)
            write_notes(temporary, notes, tokenizer)
            for path in temporary.rglob("*"):
                sync(path)
        entries = write_manifest(temporary, digest, {file: of.result()
                                                     for file, of in hashed.items()})
        sync(temporary)
        # 2. Give it its name in one rename, which the file system does entirely or not at all.
        while os.path.lexists(aside):
            aside = Path(f"{aside}1")
        if os.path.lexists(folder):
            os.rename(folder, aside)
        os.rename(temporary, folder)
        sync(folder.parent)
        # 3. Only now remove anything.
        with suppress(ValueError):  # a file on a broken disk may be unreadable
            if describe(aside).items() <= entries.items():
                shutil.rmtree(aside, ignore_errors=True)
    finally:  # after an error such as a full disk, free the space
        shutil.rmtree(temporary, ignore_errors=True)


def write_notes(folder, notes, tokenizer):
    """Write {file name: JSON object}, and the tokenizer (a path or None) with its settings."""
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
    """Remove unscheduled checkpoints before `step`, and moments that state_every does not keep.

    Links (to another run's checkpoint) and damaged or published checkpoints are left alone.
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
            # Renamed first, so that a kill while files are removed leaves no half checkpoint.
            temporary = folder.with_name(f".{folder.name}.tmp")
            os.rename(folder / "optimizer" if off_grid else folder, temporary)
            shutil.rmtree(temporary)


def lock(run):
    """Create a run folder, lock it until this process ends, remove what a killed one left."""
    Path(run).mkdir(parents=True, exist_ok=True)
    LOCKS.append(lock_file(Path(run) / ".lock"))
    for path in Path(run).glob(".step*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------- published forms


def open_any(source):
    """Return the ModelConfig and {published name: tensor} of a checkpoint, ours or published."""
    paths = weight_files(Path(source))
    if paths[0].suffix == ".pt":
        with expecting(source, "gpt-neox's layer files of one checkpoint"):
            config, tensors = open_neox(paths)
    else:
        config = read_config(source)
        tensors = {name: tensor for path in paths for name, tensor in open_file(path).items()}
    # transformers 5, and so accelerate and huggingface_hub, call the output layer lm_head.
    tensors = {"embed_out.weight" if name == "lm_head.weight" else name: tensor
               for name, tensor in tensors.items() if not name.endswith(LEGACY_BUFFERS)}
    check_tensors(source, tensors, parameter_shapes(config))
    return config, tensors


def open_neox(paths):
    """Return the ModelConfig and {published name: tensor} of gpt-neox's layer files, ranks merged.

    Of a model of L blocks, file 0 holds the embedding, 2 to L + 1 the blocks, L + 3 the final
    LayerNorm and L + 4 the output layer.
    """
    ends = {"word_embeddings.weight": "gpt_neox.embed_in.weight",
            "norm.weight": "gpt_neox.final_layer_norm.weight",
            "norm.bias": "gpt_neox.final_layer_norm.bias",
            "final_linear.weight": "embed_out.weight"}
    ranks = sorted({path.name[15:17] for path in paths})  # of layer_XX-model_YY-model_states.pt
    tensors = {}
    for layer in sorted({path.name[6:8] for path in paths}):
        parts = [open_file(paths[0].with_name(f"layer_{layer}-model_{rank}-model_states.pt"))
                 for rank in ranks]
        for name in parts[0]:
            published = ends.get(name, f"gpt_neox.layers.{int(layer) - 2}.{name}")
            tensors[published] = merged(published, [part[name] for part in parts])
    vocab_size, d_model = tensors["gpt_neox.embed_in.weight"].shape
    # Each rotary frequency rotates two of a head's dimensions, and a quarter of them are rotated.
    frequencies = tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"].numel()
    n_heads = d_model // (8 * max(1, frequencies))
    return ModelConfig(int(layer) - 4, d_model, n_heads, vocab_size, gelu="tanh"), tensors


def merged(name, parts):
    """Return a whole tensor from the parts that tensor-parallel ranks saved.

    Weights of row-parallel layers are split along inputs, all others along outputs (whole heads,
    or rows of the vocabulary). As in gpt-neox, biases of row-parallel layers are summed, and
    LayerNorms, of which each rank has a slightly different copy, are averaged, in their own dtype.
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
# (regular expression of repositories, steps or None for all, defect and EleutherAI/pythia's issue)
KNOWN_BAD = (
    ("pythia-2.8b", FINAL_2_8B, "serves weights of the end of training (#205, #195)"),
    ("pythia-2.8b(-deduped)?", EARLY | {1000},
     "this step of 2.8b or of 2.8b-deduped is a copy: their published scores are equal"),
    ("pythia-12b", {50000, 58000}, "its first shard is the final checkpoint's (#206)"),
    ("pythia-12b-deduped", {32000}, "was the final model until June 2023: is yours older? (#108)"),
    ("neox-ckpt-pythia-6.9b-deduped.*", None, "several steps may hold the same weights (#195)"),
    ("pythia-160m-weight-seed[12]", None, "later steps do not descend from its step 0 (#203)"),
    ("pythia-410m-seed(9|6|2)", {40000, 88000, 111000},
     "weights of seeds 9, 6, 2 are reported missing at steps 40000, 88000, 111000 (#202)"),
    ("pythia-.*", {0, 1, 2}, "steps 0 and 1 are equal (#83); float16 hides most of step 2 (#198)"))


def known_bad(name, step):
    """Return a warning for each known defect of a published checkpoint."""
    return [f"warning: {name} step {step}: {words}" for repository, steps, words in KNOWN_BAD
            if re.fullmatch(repository, name) and (steps is None or step in steps)]


def identify(source):
    """Return the published name ("" if none) and step (or None) in a path: pythia-12b/step50000."""
    name = re.search(r"(?:^|/)((?:neox-ckpt-)?pythia-[\w.-]+)(?=/|$)", str(source))
    step = re.search(r"(?:^|/)(?:global_)?step(\d+)/?$", str(source))
    return name[1] if name else "", int(step[1]) if step else None


def folder_tokenizer(folder, named=None):
    """Return the tokenizer to use: `named`, else the checkpoint's own, else 20B_tokenizer.json."""
    own = Path(folder) / "tokenizer.json"
    if named is None and os.path.lexists(own):
        load_tokenizer(own)  # raises ValueError unless it is GPT-NeoX-20B's
        named = own
    size = open_any(folder)[0].vocab_size
    if size < N_TOKENS:
        raise ValueError(f"{folder}: vocab_size is {size}, but the tokenizer has {N_TOKENS:,} ids")
    return named or "20B_tokenizer.json"


# ---------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Import:
    source: str  # checkpoint folder: ours, or a published one as downloaded
    output: str  # folder to write, e.g. runs/pythia-70m/step512
    dtype: str | None = None  # float32, float16 or bfloat16; default: as stored
    shard_size: int = SHARD_BYTES  # largest file, in bytes, e.g. 5e8
    push: bool = False  # also print the command that uploads the output

    def __post_init__(self):
        check(self, "float32, float16 or bfloat16", FLOATS.__contains__, "dtype")
        check(self, "at least 1", lambda value: value >= 1, "shard_size")


def import_(options):
    """Copy a checkpoint of any form, with its tokenizer, into a folder in Hugging Face's layout."""
    source, output = Path(options.source), Path(options.output)
    for line in known_bad(*identify(source)):
        note(line)
    model_config, tensors = open_any(source)
    if output.exists():
        raise ValueError(f"{output}: already exists; nothing was written")
    tokenizer = source / "tokenizer.json" if os.path.lexists(source / "tokenizer.json") else None
    if tokenizer:
        load_tokenizer(tokenizer)  # a published folder's may be a link to a private file
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
    steps: str = "143000"  # numbers separated by commas, or all: Pythia's 154
    out_dir: str | None = None  # run folder for step0, step1, ...; default: NAME

    def __post_init__(self):
        check(self, "all, or numbers with commas", re.compile(r"all|\d+(,\d+)*").fullmatch, "steps")


def fetch(options):
    """Download published checkpoints; those that are complete are not downloaded again."""
    # Not snapshot_download: offline it returns a folder that is half filled as if it were complete.
    from huggingface_hub import HfApi, hf_hub_download
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
        with expecting(f"{repository} step{step}", "complete; the same command resumes"):
            info = HfApi().model_info(repository, revision=folder.name, files_metadata=True)
            files = {file.rfilename: file.lfs for file in info.siblings}
            weights = r"model[^/]*\.safetensors[^/]*"
            if not any(re.fullmatch(weights, file) for file in files):
                weights = r"pytorch_model[^/]*\.bin[^/]*"
            for file, lfs in files.items():
                if re.fullmatch(rf"{weights}|(config|tokenizer|tokenizer_config)\.json", file):
                    # By commit: all files belong together even if one is uploaded meanwhile.
                    path = hf_hub_download(repository, file, revision=info.sha, local_dir=folder)
                    if lfs and lfs.sha256 != sha256_of(path):
                        raise ValueError(f"{path}: its SHA-256 is not the Hub's; remove it")
            weight_files(folder)  # the Hub may lack some or all
        write_manifest(folder)
    print(f"{run}: {len(steps)} checkpoints; python verify.py verify {run} compares them")


@dataclass(frozen=True)
class List:
    run: str  # run folder


def list_(options):
    """List a run's checkpoints: step, tokens seen, loss, size, contents."""
    folders, metrics = step_folders(options.run), Path(options.run) / "metrics.csv"
    if not folders:
        raise ValueError(f"{options.run}: no step0, step1, ... in it")
    rows = read_csv(metrics, torn=True) if metrics.exists() else ()
    losses = {row.get("step"): row.get("loss") for row in rows}
    print(f"{'step':>7} {'tokens':>15} {'loss':>8} {'size':>11}  contents")
    for step, folder in folders:
        tokens, contents = "-", [] if is_whole(folder) else ["NOT WHOLE"]
        try:
            if training := read_training(folder, step):
                tokens = f"{training['tokens']:,}"
        except (ValueError, OSError) as error:
            contents.append(str(error))
        contents += [name for name in ("optimizer", "tokenizer.json", "manifest.json")
                     if (folder / name).exists()]
        loss = losses.get(str(step)) or "-"  # of the next batch, before the update
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        print(f"{step:7} {tokens:>15} {loss[:7]:>8} {size:8,.1f} MB  {', '.join(contents)}")


if __name__ == "__main__":
    command(sys.argv[1:], {
        "list": (List, list_, "run"), "import": (Import, import_, "source output"),
        "export": (Import, import_, "source output"), "fetch": (Fetch, fetch, "name")})
