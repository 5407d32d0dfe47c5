"""Published checkpoints: every form they come in, conversion both ways, the Hub.

    python checkpoints.py fetch pythia-70m-deduped --steps=0,1,512,143000
    python checkpoints.py import pythia-70m-deduped/step512 runs/pythia-70m-deduped/step512
    python checkpoints.py import global_step143000 runs/mine/step143000
    python checkpoints.py export runs/mine/step143000 OUT --dtype=float16 --shard_size=5GB --push

What is read: model.safetensors or its shards, pytorch_model.bin or its shards, gpt-neox's
global_stepN/layer_XX-model_YY-model_states.pt of any number of tensor-parallel ranks. The last two
are pickles: they are looked through first and then read with weights_only, so nothing in them runs.

Source of the NeoX layout: gpt-neox v1.0 tools/convert_to_hf.py.
"""

import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import (checkpoint_steps, is_whole, write_json, write_manifest, write_tokenizer,
                         writing)
from model import ModelConfig
from weights.layout import (hf_config, open_model, parameter_shapes, read_config,
                            without_legacy_buffers)
from weights.pickles import load_pickle, open_pickle
from weights.tensors import (Stored, check_tensors, listing, open_shards, read_small_json,
                             sha256_of, write_folder)


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
    if tokenizer and type(read_small_json(tokenizer, 16 << 20).get("added_tokens")) is not list:
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
    print(f"{options.out_dir or name}: {len(steps)} checkpoints; python checkpoints.py verify "
          "compares them")


def wanted(files):
    """Return config, tokenizer and one form of the weights out of a repository's {name: file}."""
    for weights in (r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
                    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"):
        if any(re.fullmatch(weights, name) for name in files):
            return {name: file for name, file in files.items()
                    if re.fullmatch(rf"{weights}|(tokenizer_)?config\.json|tokenizer\.json", name)}
    return {}
