"""The published layout: a Pythia's tensor names and config.json as Hugging Face has them.

Source: transformers' GPTNeoXForCausalLM, 4.24 to 5.
"""

from pathlib import Path

import torch

from model import ModelConfig, Pythia
from weights.tensors import check_tensors, open_folder, read_small_json

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
    spec = read_small_json(path)
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
