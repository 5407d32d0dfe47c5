"""pytest tests/test_model.py

The reference is transformers' GPTNeoXForCausalLM, float32 on the CPU. Every parameter is drawn at
random, biases and LayerNorms too, so that nothing hides behind a zero.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from config import parse
from conftest import ROOT
from model import HeadLoss, ModelConfig, Pythia, hf_config, hf_name, losses_and_gradient
from parallel import LaunchConfig
from train import TrainConfig

# The suite's table (README): layers, d, heads, padded vocabulary, parameters
SHAPES = {
    "14m": (6, 128, 4, 50304, 14_067_712), "31m": (6, 256, 8, 50304, 30_494_720),
    "70m": (6, 512, 8, 50304, 70_426_624), "160m": (12, 768, 12, 50304, 162_322_944),
    "410m": (24, 1024, 16, 50304, 405_334_016), "1b": (16, 2048, 8, 50304, 1_011_781_632),
    "1_4b": (24, 2048, 16, 50304, 1_414_647_808), "2_8b": (32, 2560, 32, 50304, 2_775_208_960),
    "6_9b": (32, 4096, 32, 50432, 6_857_302_016), "12b": (36, 5120, 40, 50688, 11_846_072_320)}
SMALL = ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=128, seq_length=16)


def randomized(config, seed=0):
    model = Pythia(config)
    generator = torch.Generator().manual_seed(seed)
    std = min(0.05, config.d_model**-0.5)  # activations of the size that training has
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def transformers_twin(model):
    """Return GPTNeoXForCausalLM with the same weights, and its name for each of our parameters."""
    with torch.device("meta"):
        twin = GPTNeoXForCausalLM(GPTNeoXConfig(**hf_config(model.config)))
    names = {name: hf_name(name).replace("embed_out", "lm_head")
             for name, _ in model.named_parameters()}
    weights = {names[name]: p.detach() for name, p in model.named_parameters()}
    twin.load_state_dict(weights, assign=True)
    # Buffers made on the meta device hold nothing; this one is the only one.
    rotary = twin.gpt_neox.rotary_emb
    rotary.inv_freq = type(rotary)(twin.config).inv_freq
    return twin, names


def assert_parity(config, B, T):
    model = randomized(config)
    twin, names = transformers_twin(model)
    tokens = torch.randint(config.vocab_size, (B, T + 1),
                           generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    theirs = twin(inputs).logits
    torch.testing.assert_close(model(inputs), theirs, rtol=1e-5, atol=1e-5)
    their_loss = F.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    their_loss.backward()
    loss = model(inputs, targets)
    with torch.no_grad():  # without gradients it is the same number
        assert model(inputs, targets) == loss
    loss.backward()
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)
    gradients = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = gradients[names[name]].grad
        # 1e-5 of the tensor's largest gradient: an absolute 1e-5 would pass a wrong small gradient.
        error = (parameter.grad - theirs).abs().max() / theirs.abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("size, gelu", [
    *itertools.product(("14m", "31m", "70m", "160m", "410m"), ("tanh", "erf")),
    ("1b", "tanh"), ("1_4b", "erf"), ("2_8b", "erf"),  # and in a minute, with 10 GB:
    *(pytest.param(size, "erf", marks=pytest.mark.proof) for size in ("6_9b", "12b"))])
def test_published_shapes_equal_transformers(size, gelu):
    _, D, H, V, _ = SHAPES[size]
    V = V if D <= 512 else 512  # the head's size changes nothing but the time this takes
    assert_parity(ModelConfig(2, D, H, vocab_size=V, gelu=gelu), B=2, T=24)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([8, 10, 16, 18, 24, 40, 56]),
       st.sampled_from(["tanh", "erf"]), st.integers(1, 3), st.integers(1, 33), st.integers(3, 700))
def test_random_shapes_equal_transformers(L, H, d_head, gelu, B, T, V):
    assert_parity(ModelConfig(L, H * d_head, H, vocab_size=V, gelu=gelu, seq_length=40), B, T)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 600), st.integers(1, 40), st.integers(2, 900),
       st.sampled_from([0.1, 1.0, 300.0]), st.sampled_from([0.0, 0.3, 1.0]))
def test_blocked_loss_is_cross_entropy_with_its_exact_gradients(N, D, V, spread, masked):
    generator = torch.Generator().manual_seed(N * D * V)
    hidden = torch.randn(N, D, dtype=torch.float64, generator=generator).requires_grad_()
    weight = (spread * torch.randn(V, D, dtype=torch.float64, generator=generator)).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < masked] = -100
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / N
    expected_grads = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = HeadLoss.apply(hidden, weight, targets, True)
    grads = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(grads, expected_grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("fused", [None, losses_and_gradient])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1, 30])
def test_blocked_loss_is_the_plain_one_whatever_computes_it(fused, dtype, spread):
    hidden = torch.randn(600, 64, requires_grad=True)  # two blocks
    weight = (spread * torch.randn(500, 64)).requires_grad_()
    targets = torch.randint(500, (600,))
    targets[::7] = -1
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-1,
                                   reduction="sum") / 600
        loss = HeadLoss.apply(hidden, weight, targets, True, fused)
    assert loss.dtype == torch.float32
    exact = dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5 if exact else 1e-3, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)),
                            torch.autograd.grad(expected, (hidden, weight))):
        assert ours.dtype == torch.float32  # bfloat16 has 8 bits: 2 % of the largest gradient
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(1e-5 if exact else 0.02) * largest)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("more", [[], ["configs/pile_deduped.py"]])
def test_configs_give_the_published_sizes(size, more, monkeypatch):
    monkeypatch.chdir(ROOT)
    L, D, H, V, parameters = SHAPES[size]
    config, training, _ = parse([f"configs/pythia_{size}.py", *more],
                                ModelConfig, TrainConfig, LaunchConfig)
    with torch.device("meta"):
        model = Pythia(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (config.n_layers, config.d_model, config.n_heads, config.vocab_size) == (L, D, H, V)
    assert parameters - 2 * V * D == L * (12 * D**2 + 13 * D) + 2 * D
    assert training.steps * training.batch_size * config.seq_length == 299_892_736_000
    assert ("deduped" in training.data) == bool(more)


@pytest.mark.parametrize("init, D, L, std, residual_std", [
    ("small", 128, 6, 0.055902, 0.029463), ("small", 512, 6, 0.027951, 0.014731),
    ("normal", 256, 32, 0.02, 0.0025)])  # 14m, 70m, 6.9b
def test_initialisation_has_gpt_neox_standard_deviations(init, D, L, std, residual_std):
    config = ModelConfig(L, D, D // 32, vocab_size=4096, init=init)
    for name, parameter in Pythia(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "layernorm" in name or "layer_norm" in name:
            assert (parameter == 1).all()
        else:
            writes_residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            expected = residual_std if writes_residual else std
            assert math.isclose(float(parameter.detach().std()), expected,
                                rel_tol=6 / math.sqrt(2 * parameter.numel())), name
    # A draw depends on the seed and the tensor's name alone.
    first, again, other = (Pythia(SMALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_in.weight"], other["embed_in.weight"])
    assert not torch.equal(first["embed_in.weight"], first["embed_out.weight"])


@pytest.mark.parametrize("wanted", [
    (slice(None), -1), ([0, 2, 2], [5, 0, 6]), (slice(None), slice(4, None)), (0, [])])
def test_wanted_states_are_those_of_all(wanted):
    model, tokens = Pythia(ModelConfig(2, 32, 2, vocab_size=90)), torch.arange(21).view(3, 7)
    torch.testing.assert_close(model.hidden(tokens, wanted=wanted), model.hidden(tokens)[wanted],
                               rtol=1e-5, atol=1e-5)


def test_greedy_generation_equals_transformers():
    model = randomized(SMALL)
    twin, _ = transformers_twin(model)
    prompts = torch.randint(128, (64, 5), generator=torch.Generator().manual_seed(0))
    # Without a mask generate() takes every token 0 of a prompt for padding.
    theirs = twin.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8,
                           do_sample=False, eos_token_id=None, pad_token_id=0)
    for ours, expected in zip(model.generate(prompts, 8, temperature=0), theirs, strict=True):
        different = torch.nonzero(ours != expected)[:, 0]
        if len(different):  # only where the two best logits tie in float32
            best = twin(ours[None, :different[0]]).logits[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-5
    assert (prompts == 0).any()


def test_generation_leaves_out_padding_and_ended_rows():
    model = randomized(SMALL)
    prompts = torch.randint(128, (6, 7), generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([0, 1, 2, 3, 4, 6])
    finished = lambda new: (new == 10).any(1) | (new == 94).any(1)
    for ours, prompt, missing in zip(
            model.generate(prompts, 6, 0, padding=padding, finished=finished), prompts, padding):
        alone = model.generate(prompt[None, missing:], 6, temperature=0)[0, 7 - missing:].tolist()
        end = min([alone.index(stop) + 1 for stop in (10, 94) if stop in alone], default=6)
        assert ours[7:7 + end].tolist() == alone[:end]
