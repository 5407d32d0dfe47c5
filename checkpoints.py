"""Checkpoints of a run, in the layout that Hugging Face reads, never half-written and never pickled.

    RUN/config.json                 every setting of the run
    RUN/metrics.csv                 one line a step
    RUN/step64/model.safetensors    float32 weights under the published names
               config.json          GPTNeoXForCausalLM's, naming the GELU the run was trained with
               tokenizer.json       so that AutoTokenizer works too
               tokenizer_config.json
               optimizer.safetensors  Adam's moments: exp_avg.NAME and exp_avg_sq.NAME, float32
               training.json        the step, its place in the data, the loss scaler

Checkpoint N is the weights after N updates; step 0 is the initialisation. (Pythia's update 0 has
learning rate 0, so step 0 and step 1 are equal: that is how the originals are.)

    AutoModelForCausalLM.from_pretrained("RUN/step64")
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import replacing
from data import read_json
from model import ModelConfig, Pythia

# What files of 2023 still carry and no forward pass needs: the causal mask, its value, the frequencies.
LEGACY_BUFFERS = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")


def checkpoint_steps(steps, every=1000):
    """Return the scheduled steps of a run: 0, 1, 2, 4, ..., 512, then multiples of `every`, and the last.

    checkpoint_steps(143000) is Pythia's 154.
    """
    scheduled = {0, steps} | {2**i for i in range(10)} | set(range(0, steps, every))
    return sorted(step for step in scheduled if step <= steps)


def hf_name(name):
    """Return the published name of one of our parameters: the head has no prefix."""
    return name if name.startswith("embed_out") else f"gpt_neox.{name}"


def hf_config(config):
    """Return the config.json that makes transformers' GPTNeoXForCausalLM compute what our model does."""
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
    """Return the ModelConfig that folder/config.json describes, ours or a published one.

    Raises ValueError naming whatever makes it another architecture than Pythia's.
    """
    path = Path(folder) / "config.json"
    spec = read_json(path)
    rope = spec.get("rope_parameters") or {}  # transformers 5 keeps the rotary settings here
    expected = {"model_type": ("gpt_neox", spec.get("model_type")),
                "rotary_pct": (0.25, rope.get("partial_rotary_factor", spec.get("rotary_pct", 0.25))),
                "rotary_emb_base": (10000, rope.get("rope_theta", spec.get("rotary_emb_base", 10000))),
                "use_parallel_residual": (True, spec.get("use_parallel_residual", True)),
                "tie_word_embeddings": (False, spec.get("tie_word_embeddings", False)),
                "layer_norm_eps": (1e-5, spec.get("layer_norm_eps", 1e-5))}
    for name, (wanted, found) in expected.items():
        if found != wanted:
            raise ValueError(f"{path}: {name} is {found!r}, Pythia's is {wanted!r}")
    gelus = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
    if spec.get("hidden_act") not in gelus:
        raise ValueError(f"{path}: hidden_act is {spec.get('hidden_act')!r}, expected one of {list(gelus)}")
    sizes = {}
    for ours, theirs in (("n_layers", "num_hidden_layers"), ("d_model", "hidden_size"),
                         ("n_heads", "num_attention_heads"), ("vocab_size", "vocab_size"),
                         ("seq_length", "max_position_embeddings")):
        sizes[ours] = spec.get(theirs)
        if type(sizes[ours]) is not int or sizes[ours] < 1:
            raise ValueError(f"{path}: {theirs} is {sizes[ours]!r}, expected a positive integer")
    return ModelConfig(**sizes, gelu=gelus[spec["hidden_act"]])


def read_tensors(path):
    """Return the tensors of a safetensors file, or raise ValueError naming the file."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def load_model(folder, device="cpu"):
    """Return the Pythia in a checkpoint folder (ours, or a published one with model.safetensors), float32."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Pythia(config)
    path = Path(folder) / "model.safetensors"
    tensors = {name: tensor for name, tensor in read_tensors(path).items()
               if not name.endswith(LEGACY_BUFFERS)}
    check_tensors(path, tensors, {hf_name(n): p.shape for n, p in model.named_parameters()})
    state = {name.removeprefix("gpt_neox."): tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.to(device)


def check_tensors(path, tensors, shapes):
    """Raise ValueError naming every tensor that is missing, extra or of another shape than in `shapes`."""
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in shapes]
    problems += [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
                 for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))


def save(run, step, model, optimizer, training, tokenizer=None, scheduled=True):
    """Write RUN/step{N} whole or not at all: beside it first, on the disk, then renamed.

    training: a JSON object to come back from load_training. An unscheduled checkpoint (of an
    interrupted run) gives way to the next one. A checkpoint that is already there is left alone.
    """
    folder = Path(run) / f"step{step}"
    if folder.exists():
        return
    temporary = Path(run) / f".step{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    weights = {hf_name(name): p.detach().cpu() for name, p in model.named_parameters()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    moments = {f"{kind}.{name}": optimizer.state[p][kind].cpu() for name, p in model.named_parameters()
               for kind in ("exp_avg", "exp_avg_sq") if p in optimizer.state}
    save_file(moments, temporary / "optimizer.safetensors")
    _write_json(temporary / "training.json", {"step": step, "scheduled": scheduled, **training})
    _write_json(temporary / "config.json", hf_config(model.config))
    if tokenizer:
        shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        _write_json(temporary / "tokenizer_config.json", {
            "tokenizer_class": "GPTNeoXTokenizer", "model_max_length": model.config.seq_length,
            **{f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk")}})
    for path in temporary.iterdir():
        _sync(path)
    _sync(temporary)
    os.rename(temporary, folder)
    _sync(run)
    for other in saved_steps(run):
        if other < step and not read_json(Path(run) / f"step{other}" / "training.json")["scheduled"]:
            shutil.rmtree(Path(run) / f"step{other}")


def _write_json(path, value):
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def saved_steps(run):
    """Return the steps of the checkpoints in a run folder, in order."""
    names = os.listdir(run) if os.path.isdir(run) else []
    return sorted(int(name[4:]) for name in names if re.fullmatch(r"step(0|[1-9]\d*)", name))


def load_training(run, step, model, optimizer):
    """Fill model and optimizer from RUN/step{N}, every bit as it was; return the saved training object."""
    folder = Path(run) / f"step{step}"
    parameters = dict(model.named_parameters())
    weights = read_tensors(folder / "model.safetensors")
    check_tensors(folder / "model.safetensors", weights, {hf_name(n): p.shape for n, p in parameters.items()})
    training = read_json(folder / "training.json")
    moments = read_tensors(folder / "optimizer.safetensors")
    if training["updates"] > 0:  # before the first one Adam has no moments
        check_tensors(folder / "optimizer.safetensors", moments,
                      {f"{kind}.{name}": p.shape for name, p in parameters.items()
                       for kind in ("exp_avg", "exp_avg_sq")})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[hf_name(name)])
            if moments:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(training["updates"]), device=parameter.device),
                    **{kind: moments[f"{kind}.{name}"].to(parameter.device)
                       for kind in ("exp_avg", "exp_avg_sq")}}
    return training
