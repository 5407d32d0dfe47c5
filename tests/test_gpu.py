"""pytest -m gpu: what a GPU computes is what the CPU does. It needs no tokenizer and no network."""

import pytest
import torch
import torch.nn.functional as F

import checkpoints
from eval import score
from model import HeadLoss, ModelConfig, Pythia, losses_and_gradient
from parallel import LaunchConfig, Processes
from studies.memorization import matched_lengths
from train import TrainConfig, Training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SMALL = ModelConfig(n_layers=2, d_model=128, n_heads=4, seq_length=128)


def training(dtype="float32", compiled=False):
    config = TrainConfig(data="none", learning_rate=1e-3, dtype=dtype)
    made = Training(SMALL, config, LaunchConfig(compile=compiled), Processes("cuda"))
    made.model.init_weights(0)
    return made


def batch(step):
    return torch.randint(50277, (1, 4, 129), generator=torch.Generator().manual_seed(step))


def losses(made, steps):
    found = []
    for step in steps:
        found.append(made.gradients(batch(step)).item())
        made.update(1e-3, made.clip())
    return torch.tensor(found)


def test_float32_equals_the_cpu():
    cpu, rows = Pythia(SMALL, seed=0), batch(0)[0]
    gpu = training().model
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        inputs = rows.to(device)
        model(inputs[:, :-1], inputs[:, 1:]).backward()
    for (name, a), b in zip(cpu.named_parameters(), gpu.parameters()):
        error = (a.grad - b.grad.cpu()).norm() / a.grad.norm()
        assert error < 1e-4, name
    with torch.no_grad():
        torch.testing.assert_close(gpu(rows.cuda()[:, :-1]).cpu(), cpu(rows[:, :-1]),
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_head_loss_in_bfloat16_is_near_cross_entropy(fused):
    hidden = torch.randn(3000, 128, device="cuda", requires_grad=True)
    weight = (torch.randn(50304, 128, device="cuda") / 11).requires_grad_()
    targets = torch.randint(50277, (3000,), device="cuda")
    act = torch.compile(losses_and_gradient) if fused else None
    with torch.autocast("cuda", torch.bfloat16):
        loss = HeadLoss.apply(hidden, weight, targets, True, act)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)),
                    torch.autograd.grad(expected, (hidden, weight))):
        assert (a - b).norm() / b.norm() < 2e-2


def test_compiled_steps_are_the_eager_ones_within_bfloat16():
    eager, compiled = (losses(training("bfloat16", on), range(20)) for on in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=5e-3, atol=0)


def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what --deterministic sets
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True)
    try:
        whole, first, second = (training("bfloat16") for _ in range(3))
        losses(whole, range(4))
        losses(first, range(2))
        checkpoints.save(str(tmp_path), 2, first.model, first.optimizer,
                         {"updates": 2, "tokens": 0, "scaler": first.scaler.state})
        checkpoints.load_training(tmp_path, 2, second.model, second.optimizer)
        losses(second, range(2, 4))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)


def test_evaluation_and_memorization_equal_the_cpus():
    model = Pythia(SMALL, seed=0).eval()
    rows = [(batch(i)[0, 0, :40 + i].tolist(), 3) for i in range(50)]
    tokens = batch(0)[0, :, :64]
    expected, lengths = score(model, rows), matched_lengths(model, tokens, 32)
    model = model.cuda()
    for (a, _), (b, _) in zip(score(model, rows), expected):
        assert abs(a - b) < 1e-3
    assert torch.equal(matched_lengths(model, tokens.cuda(), 32).cpu(), lengths)
