"""pytest tests/test_parallel.py"""

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import checkpoints
from checkpoints import load_training, saved_steps
from conftest import ROOT
from model import ModelConfig, Pythia
from test_train import ENVIRONMENT, SHAPE, assert_same_bits, command, data, losses, train  # noqa: F401
from train import TrainConfig, make_optimizer


RUN = dict(steps=10, learning_rate=1e-3)  # Pythia's highest rate


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    """A run of one process that takes each batch whole."""
    folder = tmp_path_factory.mktemp("single")
    train(data, folder, **RUN, micro_batch_size=8)
    return folder


def assert_same_steps(first, second, step=10):
    """Losses and weights to 1e-6: sums over processes and micro-batches round in another order."""
    for ours, theirs in zip(losses(first), losses(second), strict=True):
        assert ours[0] == theirs[0] and math.isclose(ours[1], theirs[1], rel_tol=1e-6)
    ours, theirs = (load_file(folder / f"step{step}/model.safetensors") for folder in (first, second))
    for name, tensor in ours.items():
        if name.endswith("query_key_value.bias"):
            # A key's bias adds the same to all logits of a query, so but for rotary dims its gradient is
            # zero, and Adam makes steps of what rounding leaves of it.
            tensor, theirs[name] = (t.view(2, 3, 16)[:, [0, 2]] for t in (tensor, theirs[name]))
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("sharding, changes", [
    ("ddp", {}), ("fsdp", {}), ("ddp", dict(compile=True, activation_checkpointing=True)),
    ("fsdp", dict(compile=True, activation_checkpointing=True))])
def test_two_processes_take_the_steps_of_one(data, tmp_path, single, sharding, changes):
    """With accumulation: the gradients of both micro-batches travel together."""
    train(data, tmp_path, 2, **RUN, micro_batch_size=2, sharding=sharding, **changes)
    assert_same_steps(single, tmp_path)
    config = tmp_path / "step10/config.json"
    assert config.read_bytes() == (single / "step10/config.json").read_bytes()
    assert not (tmp_path / "step10/model.safetensors.index.json").exists()


def test_recomputation_changes_no_bit(data, tmp_path, single):
    train(data, tmp_path, **RUN, micro_batch_size=8, activation_checkpointing=True)
    assert_same_bits(single, tmp_path)


@pytest.mark.parametrize("before, after", [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp"))])
def test_a_run_goes_on_with_other_processes_and_sharding(data, tmp_path, single, before, after):
    (count, sharding), (count_after, sharding_after) = before, after
    train(data, tmp_path, count, **RUN, stop_at=5, micro_batch_size=4, sharding=sharding)
    assert saved_steps(tmp_path) == [0, 1, 2, 4, 5]
    train(data, tmp_path, count_after, **RUN, micro_batch_size=4, sharding=sharding_after)
    assert_same_steps(single, tmp_path)
