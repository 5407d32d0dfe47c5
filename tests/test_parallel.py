"""pytest tests/test_parallel.py"""

import functools
import math
import signal
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import checkpoints
from checkpoints import fill, load_training, saved_steps
from config import parse
from conftest import ROOT, TORCHRUN, run
from launch import Launched
from model import ModelConfig, Pythia
from parallel import LaunchConfig, Processes, memory_per_process, rehearse
from test_train import (SHAPE, argv, assert_same_bits, data, losses, parent,  # noqa: F401
                        published, run_here, train)
from train import TrainConfig, Training, make_optimizer

RUN = dict(steps=10, learning_rate=1e-3)  # Pythia's highest rate


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    """A run of one process with one micro-batch per step."""
    folder = tmp_path_factory.mktemp("single")
    train(data, folder, **RUN, micro_batch_size=8)
    return folder


def assert_same_steps(first, second, step=10):
    """Losses and weights to 1e-6: sums over processes and micro-batches round in another order."""
    for ours, theirs in zip(losses(first), losses(second), strict=True):
        assert ours[0] == theirs[0] and math.isclose(ours[1], theirs[1], rel_tol=1e-6)
    ours, theirs = (load_file(folder / f"step{step}/model.safetensors")
                    for folder in (first, second))
    for name, tensor in ours.items():
        if name.endswith("query_key_value.bias"):
            # Except in rotary dimensions, a key's bias adds the same to all scores of a query:
            # its gradient is 0 but for rounding, which Adam scales up to whole steps.
            tensor, theirs[name] = (t.view(2, 3, 16)[:, [0, 2]] for t in (tensor, theirs[name]))
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6,
                                   msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("processes, changes", [
    (1, {}), (2, {}), (2, dict(sharding="fsdp")),
    (2, dict(sharding="fsdp", activation_checkpointing=True)),
    *(pytest.param(2, dict(sharding=sharding, compile=True, activation_checkpointing=True),
                   marks=pytest.mark.proof) for sharding in ("ddp", "fsdp"))])
def test_micro_batches_and_processes_take_the_same_steps(data, tmp_path, single, processes,
                                                         changes):
    """The gradients of all micro-batches are exchanged at once."""
    train(data, tmp_path, processes, **RUN, micro_batch_size=2, **changes)
    assert_same_steps(single, tmp_path)
    config = tmp_path / "step10/config.json"
    assert config.read_bytes() == (single / "step10/config.json").read_bytes()
    assert not (tmp_path / "step10/model.safetensors.index.json").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
def test_compiled_blocks_take_the_same_steps(data, tmp_path, single):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_here(data, tmp_path, **RUN, micro_batch_size=8, compile=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert_same_steps(single, tmp_path)  # under the same names


@pytest.mark.parametrize("before, after", [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp"))])
def test_a_run_goes_on_with_other_processes_and_sharding(data, tmp_path, single, before, after):
    (count, sharding), (count_after, sharding_after) = before, after
    train(data, tmp_path, count, **RUN, stop_at=5, micro_batch_size=4, sharding=sharding)
    assert saved_steps(tmp_path) == [0, 1, 2, 4, 5]
    train(data, tmp_path, count_after, **RUN, micro_batch_size=4, sharding=sharding_after)
    assert_same_steps(single, tmp_path)


def test_a_mistake_of_one_or_of_all_processes_is_one_line(data, single, parent, tmp_path):
    for words, changes in (
            ("nowhere.idx: no such file", dict(data="nowhere")),
            ("learning_rate was 0.001, is 0.5", dict(learning_rate=0.5)),
            ("holds weights only and warm_moments = 0",
             dict(out_dir=tmp_path / "run", branch_from=published(parent, 8, tmp_path)))):
        settings = RUN | dict(out_dir=single, micro_batch_size=4) | changes
        assert words in train(data, single, 2, expect=2, **settings).stderr


def test_checkpoints_are_spread_over_files_and_processes(data, tmp_path, single):
    """Files of 20 kB, written by 2 processes under torchrun, have one process's bits."""
    flags = argv(data, tmp_path / "run", **RUN, stop_at=1, micro_batch_size=4, sharding="fsdp",
                    async_save=True)[1:]
    run(*TORCHRUN, "tests/launch.py", "small_files", *flags)
    files = sorted(path.name for path in (tmp_path / "run/step1").glob("model-*"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    ours = checkpoints.load_model(tmp_path / "run/step1")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/step1")
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    _, stored = checkpoints.open_any(tmp_path / "run/step1")
    for name, tensor in load_file(single / "step1/model.safetensors").items():
        assert torch.equal(stored[name], tensor)  # step 1 had learning rate 0
    model = Pythia(ModelConfig(**SHAPE))
    optimizer = make_optimizer(model, TrainConfig(data="", learning_rate=1e-3))
    assert load_training(tmp_path / "run", 1, model, optimizer)["updates"] == 1
    moments = load_file(single / "step1/optimizer/moments.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"],
                                   moments[f"exp_avg.{name}"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("sharding, kind, messages, backend, store, count", [
    ("ddp", "allreduce", 1, "gloo", dist.HashStore, 1),
    ("fsdp", "_reduce_scatter_base", 3, "fake", FakeStore, 2)])  # of two blocks and the root
def test_gradients_are_sent_after_the_last_micro_batch_alone(request, sharding, kind, messages,
                                                             backend, store, count):
    dist.init_process_group(backend, store=store(), rank=0, world_size=count)
    request.addfinalizer(dist.destroy_process_group)
    training = Training(ModelConfig(**SHAPE), TrainConfig(data="", learning_rate=1e-3),
                        LaunchConfig(sharding=sharding),
                        SimpleNamespace(count=2, device=torch.device("cpu")))
    training.model.init_weights(0, fill)
    rehearse(training, 2, 8)
    for _ in range(2):
        with torch.profiler.profile() as calls:
            training.gradients(torch.randint(500, (3, 2, 9)))
        training.update(1e-3, None)
        assert messages == sum(event.name == f"c10d::{kind}_" for event in calls.events())


# ---------------------------------------------------------------------------- signals during saves


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """Return a function: number of processes -> settings and folder of an uninterrupted run."""
    @functools.cache
    def unbroken(processes):
        # A save takes as long as a step. With three processes, sums depend on how DDP groups them.
        settings = dict(vocab_size=20000, steps=12, checkpoint_every=4, learning_rate=1e-3,
                        batch_size=12, micro_batch_size=2)
        settings |= {2: dict(sharding="fsdp"), 3: dict(compile=True, deterministic=True)}.get(
            processes, {})
        folder = tmp_path_factory.mktemp("unbroken")
        train(data, folder, processes, **settings)
        return settings, folder
    return unbroken


@pytest.mark.parametrize("processes, number, moment, changes", [
    *((1, number, 5, {}) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
    (1, signal.SIGKILL, 8, dict(async_save=True)), (2, signal.SIGTERM, 7, {}),
    (2, signal.SIGKILL, 8, {}), *(pytest.param(*case, marks=pytest.mark.proof) for case in (
        (1, signal.SIGTERM, 8, dict(async_save=True)), (1, signal.SIGTERM, 8, {}),
        (1, signal.SIGKILL, 8, {}), (3, signal.SIGTERM, 7, {}), (3, signal.SIGKILL, 8, {})))])
def test_a_signal_loses_no_bit(data, tmp_path, unbroken, processes, number, moment, changes):
    """One process gets it between saves (after step 5), before one (7), or during it (8)."""
    settings, whole = unbroken(processes)
    killed = number == signal.SIGKILL
    run = Launched(argv(data, tmp_path, **settings, **changes), processes)
    run.wait_until(run.printed(f"step {min(moment, 7):6}/"))
    if moment == 8:
        run.wait_until(lambda: (tmp_path / ".step8.tmp").exists() or 8 in saved_steps(tmp_path))
    run.send(number, rank=processes - 1)
    done, stopped = run.finish(), saved_steps(tmp_path)[-1]
    assert stopped < 12 and (killed or stopped >= moment)
    assert killed or "interrupted: saved step" in done.stdout
    assert processes > 1 or done.returncode == (-number if killed else 128 + number)
    done = train(data, tmp_path, processes, **settings, **changes)
    assert f"going on from step {stopped}" in done.stdout
    assert_same_bits(whole, tmp_path)
    assert not list(tmp_path.glob(".step*"))


# ---------------------------------------------------------------------------- the plan


# number of 40 GB A100s, sequences per GPU
PUBLISHED = {"14m": (32, 32), "31m": (32, 32), "70m": (32, 32), "160m": (32, 32), "410m": (32, 32),
             "1b": (64, 16), "1_4b": (64, 16), "2_8b": (64, 16), "6_9b": (128, 8), "12b": (256, 4)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_plan_fits_every_size_on_the_gpus_that_trained_it(size, command):
    """With activation checkpointing as in the published YAML files: for all but 14m and 31m."""
    gpus, sequences = PUBLISHED[size]
    printed = command("train.py", f"{ROOT}/configs/pythia_{size}.py", "--plan=True",
                      f"--gpus={gpus}", "--gpu_memory=40",
                      f"--activation_checkpointing={size not in ('14m', '31m')}").stdout
    assert int(printed.split("--micro_batch_size=")[1].split()[0]) >= sequences
    assert f"on each of {gpus} GPUs: 1024 sequences a step" in printed


def test_the_plans_command_is_the_given_one_with_what_was_chosen(command, refused):
    given = "train.py", f"{ROOT}/configs/pythia_12b.py", "--plan=True"
    printed = command(*given, "--gpus=64").stdout
    [line] = [line for line in printed.splitlines() if line.startswith("torchrun ")]
    assert "--nnodes=8 --nproc_per_node=8 " in line and line.endswith(
        f"train.py {ROOT}/configs/pythia_12b.py --gpus=64 --micro_batch_size=16 --out_dir=RUN")
    for flag, words in (("--sharding=ddp", "no micro-batch fits"),
                        ("--gpus=3", "gpus = 3 does not divide batch_size = 1024")):
        assert words in refused(*given, flag)


@pytest.mark.parametrize("size, accumulation, flags", [
    ("14m", 1, []), ("14m", 2, []),
    pytest.param("70m", 1, ["--activation_checkpointing=True"], marks=pytest.mark.proof),
    pytest.param("70m", 1, [], marks=pytest.mark.proof),
    pytest.param("70m", 2, [], marks=pytest.mark.proof)])
def test_planned_memory_is_the_tensors_peak(monkeypatch, size, accumulation, flags):
    """The peak of a step and of the next one's backward pass, beside Adam's moments."""
    monkeypatch.chdir(ROOT)
    shape, config, launch = parse(
        [f"configs/pythia_{size}.py", "--seq_length=256", "--micro_batch_size=4", *flags],
        ModelConfig, TrainConfig, LaunchConfig)
    training = Training(shape, config, launch, Processes("cpu"))
    training.model.init_weights(0)
    rows, tracker = torch.randint(500, (accumulation, 4, 257)), MemTracker()
    tracker.track_external(training.model, training.optimizer)
    loss = training.loss  # the tracker tracks modules for one pass only
    monkeypatch.setattr(training, "loss", lambda rows: tracker.reset_mod_stats() or loss(rows))
    with tracker:
        training.gradients(rows)
        training.update(0.0, training.clip())
        training.gradients(rows)
    planned = memory_per_process(shape, launch, 1, 4, accumulation > 1, 4, 512)["peak"]
    [peak] = tracker.get_tracker_snapshot("peak").values()
    assert 0.85 < planned / peak["Total"] < 1.15
