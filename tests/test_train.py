"""pytest tests/test_train.py"""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import train as train_module
from checkpoints import load_model, saved_steps
from conftest import ROOT
from data import OrderedData, samples_needed
from model import ModelConfig, Pythia
from training.parallel import LaunchConfig, Processes
from training.plan import flops_per_token
from pile.writer import TokenWriter
from training.record import Log
from test_model import transformers_twin
from train import LossScaler, TrainConfig, learning_rate_at, make_optimizer

PYTHIA = TrainConfig(data="", out_dir="", learning_rate=1e-3)
# These models are too small for two threads. Empty, the other says that nobody flushes for us.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
SHAPE = dict(n_layers=2, d_model=32, n_heads=2, vocab_size=512, seq_length=32)
SETTINGS = dict(SHAPE, steps=12, batch_size=8, micro_batch_size=4, learning_rate=1e-2, checkpoint_every=6,
                log_every=1, warmup=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    rng = np.random.RandomState(0)
    sizes = rng.randint(5, 60, 300)  # a few frequent tokens, so that there is something to learn
    writer = TokenWriter(prefix, "test")
    writer.append(np.minimum(rng.geometric(0.05, sizes.sum()), 511), sizes)
    writer.finish({})
    return prefix


def command(data, out_dir, processes=1, /, **changes):
    settings = SETTINGS | dict(data=data, out_dir=out_dir) | changes
    settings.setdefault("tokenizer", ROOT / "20B_tokenizer.json")
    launch = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return launch + ["train.py"] + [f"--{name}={value}" for name, value in settings.items()]


def train(*arguments, expect=0, **changes):
    done = subprocess.run(command(*arguments, **changes), cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == expect, done.stderr
    return done


def losses(out_dir):
    with open(out_dir / "metrics.csv", newline="") as file:
        return [(int(row["step"]), float(row["loss"]), float(row["grad_norm"])) for row in csv.DictReader(file)]


def assert_same_bits(first, second):
    assert saved_steps(first) == saved_steps(second)
    for step in saved_steps(first):
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (first / f"step{step}" / name).read_bytes() == (second / f"step{step}" / name).read_bytes()
    assert losses(first) == losses(second)


# ---------------------------------------------------------------------------- parts


@pytest.mark.parametrize("k, rate", [  # pythia.md section 2, from gpt-neox v1.0's own function
    (0, 0.0), (1, 6.993007e-7), (715, 5e-4), (1430, 1e-3), (10000, 9.9116420e-4), (50000, 7.4135799e-4),
    (71500, 5.1570538e-4), (100000, 2.1986750e-4), (115138, 1.0000603e-4), (115139, 1e-4), (142999, 1e-4)])
def test_learning_rate_has_gpt_neox_values(k, rate):
    assert math.isclose(learning_rate_at(k, PYTHIA), rate, rel_tol=5e-8)


def test_floor_is_reached_at_115139_and_not_before():
    assert learning_rate_at(115138, PYTHIA) > 1e-4 == learning_rate_at(115139, PYTHIA)


def test_decay_reaches_matrices_and_embeddings_only():
    model = Pythia(ModelConfig(**SHAPE))
    decayed, bare = make_optimizer(model, PYTHIA).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        "embed_in", "embed_out", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in bare["params"])
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.1, 0.0)
    assert len(names) == len(decayed["params"]) + len(bare["params"])


def test_loss_scaler_follows_deepspeeds_table():
    scaler = LossScaler(enabled=True)
    seen = []
    for iteration in range(4002):
        scaler.update(overflow=iteration in (1500, 1501, 1502, 3600))
        seen.append((scaler.state["scale"], scaler.state["hysteresis"]))
    assert seen[998] == (4096, 2) and seen[999] == (8192, 2)  # the 1000th good one doubles it
    assert seen[1500:1503] == [(8192, 1), (4096, 1), (2048, 1)]  # one forgiven, then halved each time
    assert seen[2501] == (2048, 1) and seen[2502] == (4096, 2)  # 1000 after the last overflow
    assert seen[3502] == (8192, 2) and seen[3600] == (8192, 1) and seen[4001] == (8192, 1)


def test_overflow_at_scale_one_stops():
    scaler = LossScaler(enabled=True)
    with pytest.raises(FloatingPointError, match="diverged"):
        for _ in range(20):
            scaler.update(overflow=True)
    assert scaler.scale == 1


def test_a_scale_rests_while_it_is_not_needed():
    """A run begun on a CPU or in bfloat16 goes on in float16 at 4096, and the other way round at 1."""
    plain = LossScaler(enabled=False)
    plain.update(overflow=True)
    assert plain.scale == 1
    half = LossScaler(enabled=True)
    half.state = plain.state
    assert half.scale == 4096


def test_flops_are_counted_from_the_matmuls():
    config = ModelConfig(2, 64, 2, vocab_size=512, seq_length=128)
    model, tokens = Pythia(config), torch.randint(512, (1, 128))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    attention = 6 * config.n_layers * config.d_model * config.seq_length
    # The counter sees attention's whole square, of which a causal model needs half.
    assert counter.get_total_flops() / 128 == flops_per_token(config) + attention


# ---------------------------------------------------------------------------- whole runs


def test_trajectory_equals_a_plain_loop_with_transformers(data, tmp_path):
    train(data, tmp_path / "run", steps=20)
    config, settings = ModelConfig(**SHAPE), TrainConfig(data="", out_dir="", learning_rate=1e-2, steps=20,
                                                         warmup=0.25)
    twin, _ = transformers_twin(Pythia(config))
    matrices = [p for p in twin.parameters() if p.dim() == 2]
    vectors = [p for p in twin.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8)
    rows = OrderedData(data, 32, samples_needed(20, 8), 1234)
    for step, loss, norm in losses(tmp_path / "run"):
        tokens = torch.from_numpy(rows.rows(range(8 * step, 8 * step + 8)).astype(np.int64))
        expected = F.cross_entropy(twin(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        assert math.isclose(loss, expected.item(), rel_tol=1e-5) and math.isclose(norm, expected_norm.item(), rel_tol=1e-4)
    assert loss < 0.8 * losses(tmp_path / "run")[0][1]  # it really learned


def test_steps_0_and_1_are_equal_and_the_schedule_is_kept(data, tmp_path):
    train(data, tmp_path)
    assert saved_steps(tmp_path) == [0, 1, 2, 4, 6, 8, 12]
    zero, one, two = (load_file(tmp_path / f"step{n}/model.safetensors") for n in (0, 1, 2))
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    assert not torch.equal(one["embed_out.weight"], two["embed_out.weight"])


@pytest.fixture(scope="module", params=[8, 2], ids=["one micro-batch", "four micro-batches"])
def whole(data, tmp_path_factory, request):
    """The settings of a run, and the folder in which it was never interrupted."""
    settings = dict(steps=60, micro_batch_size=request.param, checkpoint_every=20)
    folder = tmp_path_factory.mktemp("whole")
    train(data, folder, **settings)
    return settings, folder


def test_an_interrupted_run_ends_with_the_same_bits(data, tmp_path, whole):
    """A real signal to a real process."""
    settings, folder = whole
    number = signal.SIGTERM if settings["micro_batch_size"] == 8 else signal.SIGINT
    process = subprocess.Popen(command(data, tmp_path / "cut", **settings), cwd=ROOT, text=True, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("step     21/"):
            process.send_signal(number)
            break
    out, _ = process.communicate()
    assert process.returncode == 128 + number and "interrupted: saved step" in out
    stopped = saved_steps(tmp_path / "cut")[-1]
    assert 21 < stopped < 60
    done = train(data, tmp_path / "cut", **settings)
    assert f"going on from step {stopped}" in done.stdout
    assert_same_bits(folder, tmp_path / "cut")


def test_a_killed_run_ends_with_the_same_bits(data, tmp_path, whole):
    settings, folder = whole
    process = subprocess.Popen(command(data, tmp_path, **settings), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    for line in process.stdout:
        if line.startswith("step     45/"):
            break
    process.kill()
    process.communicate()
    assert saved_steps(tmp_path)[-1] < 60
    train(data, tmp_path, **settings)
    assert_same_bits(folder, tmp_path)


def test_a_non_finite_loss_stops_and_names_step_and_rows(data, tmp_path):
    done = train(data, tmp_path, expect=2, learning_rate=1e38)
    assert "step 2 (rows 16 to 23): loss nan" in done.stderr or "step 3 (rows 24 to 31)" in done.stderr
    assert done.stderr.count("\n") == 1 and "last checkpoint is" in done.stderr


def test_a_token_outside_the_vocabulary_stops(data, tmp_path):
    done = train(data, tmp_path, expect=2, vocab_size=100)
    assert ", but vocab_size is 100" in done.stderr and done.stderr.count("\n") == 1


def test_another_run_in_the_same_folder_is_refused(data, tmp_path):
    train(data, tmp_path, steps=2)
    done = train(data, tmp_path, expect=2, steps=2, learning_rate=0.5, batch_size=4)
    assert "learning_rate was 0.01, is 0.5" in done.stderr and "batch_size was 8, is 4" in done.stderr


@pytest.mark.parametrize("changes, words", [
    (dict(tokenizer="nowhere.json"), "nowhere.json: no such tokenizer"),
    (dict(data="nowhere"), "nowhere.idx: No such file"),
    (dict(batch_size=7), "batch_size = 7 is not a multiple"),
    (dict(n_heads=3), "d_model = 32 is not a multiple of n_heads = 3"),
    (dict(stepz=3), "no setting called stepz, did you mean steps?"),
    (dict(out_dir="/proc/nowhere"), "/proc/nowhere: "),
    (dict(steps=0), "steps = 0, expected at least 1")])
def test_a_mistake_is_one_line_before_anything_is_trained(data, tmp_path, changes, words):
    done = train(data, tmp_path / "run", expect=2, **changes)
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert saved_steps(tmp_path / "run") == []


# ---------------------------------------------------------------------------- branches


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "run"
    train(data, folder)
    return folder


def test_a_branch_departs_and_its_twin_is_the_parents_own_continuation(data, tmp_path, parent):
    out = train(data, tmp_path / "child", branch_from=parent / "step6", intervention="term_drop", terms="e,t,a",
                intervention_from=7, twin=True).stdout
    assert out.count("going on from step 6") == 2
    child, twin, whole = (losses(folder) for folder in (tmp_path / "child", tmp_path / "child_twin", parent))
    assert twin == whole[6:] and saved_steps(tmp_path / "child_twin") == [8, 12]
    for step in (8, 12):
        for file in ("model.safetensors", "optimizer.safetensors"):
            bits = [(folder / f"step{step}" / file).read_bytes() for folder in (parent, tmp_path / "child_twin")]
            assert bits[0] == bits[1]
    with open(tmp_path / "child/interventions.csv", newline="") as file:
        changed = min(int(row["step"]) for row in csv.DictReader(file))
    assert 7 <= changed < 12
    assert child[:changed - 6] == whole[6:changed] and child[changed - 6][1] != whole[changed][1]
    settings = json.loads((tmp_path / "child/config.json").read_text())
    assert settings["branch_from"] == str(parent / "step6")
    assert settings["differs_from_parent"] == {"intervention": [None, "term_drop"], "terms": ["", "e,t,a"],
                                               "intervention_from": [0, 7]}
    assert json.loads((tmp_path / "child_twin/config.json").read_text())["differs_from_parent"] == {}


def test_a_branch_keeps_its_parents_order_and_schedule(data, tmp_path, parent):
    done = train(data, tmp_path, expect=2, branch_from=parent / "step6", batch_size=4, steps=13)
    assert "steps is 13, the parent's 12; batch_size is 4, the parent's 8" in done.stderr
    done = train(data, tmp_path, expect=2, branch_from=parent / "step12")
    assert "steps = 12: nothing is left to train" in done.stderr


def test_a_branch_that_diverges_at_once_names_what_it_branched_from(data, tmp_path, parent):
    done = train(data, tmp_path, expect=2, branch_from=parent / "step6", learning_rate=1e38)
    assert "the last checkpoint is the one it branched from" in done.stderr and done.stderr.count("\n") == 1


def test_replayed_batches_are_those_that_the_parent_saw(data, tmp_path, parent):
    """The child's moments come from plain batches: it is its twin until the first changed row."""
    published = tmp_path / "published/step6"
    published.mkdir(parents=True)
    for file in ("model.safetensors", "config.json"):
        shutil.copy(parent / "step6" / file, published)
    rows = OrderedData(data, 32, samples_needed(12, 8), 1234)
    tokens = [set(rows.batch(step, 8).ravel().tolist()) for step in range(12)]
    # byte-level BPE: token 65 + i is the letter a + i, its own term
    term = next(i for i in range(65, 91) if any(i in batch for batch in tokens[2:6]) and i not in tokens[6] | tokens[7])
    train(data, tmp_path / "child", branch_from=published, intervention="term_drop", terms=chr(term + 32), twin=True,
          warm_moments=4)
    child, twin = losses(tmp_path / "child"), losses(tmp_path / "child_twin")
    assert [row[0] for row in child] == list(range(6, 12)) and child[:2] == twin[:2]


# ---------------------------------------------------------------------------- one process, looked into


def run_here(data, out_dir, **changes):
    """Train in this process, so that a test can look into it."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = dict(SETTINGS, data=str(data), out_dir=str(out_dir), tokenizer=str(ROOT / "20B_tokenizer.json")) | changes
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        train_module.train(ModelConfig(**SHAPE), TrainConfig(**{k: v for k, v in settings.items() if k in fields}),
                           train_module.InterventionConfig(), LaunchConfig(micro_batch_size=4), Processes("cpu"),
                           train_module.Interrupt())
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)


def test_the_step_never_makes_the_host_wait(data, tmp_path):
    """Every call that reads a tensor's value is noted with where it comes from: the log's flush, or a save."""
    waits = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"}
    callers = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function.__name__ in waits:
                callers.append({frame.name for frame in traceback.extract_stack()})
            return function(*args, **(kwargs or {}))

    with Watch():
        run_here(data, tmp_path, log_every=100)
    assert any("flush" in names for names in callers)
    assert [names for names in callers if not names & {"flush", "save", "init_weights", "write_file"}] == []


def test_overflows_skip_the_update_and_hold_the_rate(data, tmp_path, monkeypatch):
    """float16 on a CPU, which main would not choose, from a loss scale at which gradients overflow."""
    monkeypatch.setattr(train_module, "compute_dtype", lambda name, device: torch.float16)
    scaler = LossScaler(enabled=True)
    scaler.state["scale"] = 2.0**26
    monkeypatch.setattr(train_module, "LossScaler", lambda enabled: scaler if enabled else None)
    run_here(data, tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    skipped = [not math.isfinite(float(row["grad_norm"])) for row in rows]
    assert skipped[:2] == [True, True] and not skipped[-1]
    scales = [float(row["loss_scale"]) for row in rows]
    assert scales[:3] == [2.0**26, 2.0**26, 2.0**25] and scales[-1] == 2.0**(27 - sum(skipped))  # one was forgiven
    config = TrainConfig(data="", learning_rate=1e-2, steps=12, warmup=0.25)
    assert [float(row["learning_rate"]) for row in rows] == [
        learning_rate_at(step - sum(skipped[:step]), config) for step in range(12)]
    weights = load_file(tmp_path / "step12/model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())


def test_endless_overflow_stops_with_advice(data, tmp_path, monkeypatch):
    """Weights that overflow float16 in the forward pass: each step is skipped, until the scale is 1."""
    monkeypatch.setattr(train_module, "compute_dtype", lambda name, device: torch.float16)
    published = tmp_path / "published/step0"
    run_here(data, tmp_path / "run", steps=40, stop_at=1)
    published.mkdir(parents=True)
    shutil.copy(tmp_path / "run/step0/config.json", published)
    weights = load_file(tmp_path / "run/step0/model.safetensors")
    weights["gpt_neox.final_layer_norm.weight"] += 1e6
    save_file(weights, published / "model.safetensors")
    with pytest.raises(FloatingPointError, match="at loss scale 1.*--dtype=bfloat16"):
        run_here(data, tmp_path / "branch", steps=40, branch_from=str(published))
    with open(tmp_path / "branch/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss_scale"]) for row in rows] == [4096, *(2**n for n in range(12, -1, -1))]  # one was forgiven
    assert not any(math.isfinite(float(row["loss"])) for row in rows)


def test_a_spike_is_named_and_nothing_else_happens(tmp_path):
    log = Log(tmp_path, 0, 200, 8, 256, False, False, Processes("cpu"))
    noise = torch.randn(150, generator=torch.Generator().manual_seed(0)) / 100
    for step, loss in enumerate(4 + noise):
        log.note(step, loss + (step == 140), torch.tensor(1.0), 1e-3, 1.0, ())
    log.flush()
    [line] = (tmp_path / "log.txt").read_text().splitlines()
    assert re.match(r"spike at step 140 \(rows 1,120 to 1,127\): loss (4.9|5.0)\d+, \d+.\d standard deviations", line)


def test_a_line_that_was_cut_is_forgotten(data, tmp_path):
    train(data, tmp_path, stop_at=6)
    text = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(text[:text.rindex("5,")] + "1")  # a full disk kept one byte
    train(data, tmp_path)
    assert [step for step, *_ in losses(tmp_path)] == [0, 1, 2, 3, 4, *range(6, 12)]


def test_without_git_a_run_starts(data, tmp_path):
    done = subprocess.run(command(data, tmp_path, steps=1), cwd=ROOT, env=ENVIRONMENT | {"PATH": ""})
    assert done.returncode == 0 and json.loads((tmp_path / "launches.jsonl").read_text())["git_commit"] is None


def test_the_folder_explains_the_run(parent):
    [launch] = [json.loads(line) for line in (parent / "launches.jsonl").read_text().splitlines()]
    assert launch["packages"]["torch"] == torch.__version__ and "--steps=12" in launch["command"]
    assert launch["launch"]["micro_batch_size"] == 4 and launch["processes"] == 1 and launch["cpu"]
    assert "step     11/12 | loss" in (parent / "log.txt").read_text()


def test_heldout_loss_is_the_checkpoints_own(data, tmp_path):
    train(data, tmp_path, heldout=data, heldout_every=6)
    with open(tmp_path / "heldout.csv", newline="") as file:
        rows = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert list(rows) == [6, 12]
    tokens = torch.from_numpy(OrderedData(data, 32, samples_needed(1, 8), 1234).batch(0, 8)[0])
    for step, loss in rows.items():
        with torch.no_grad():
            assert math.isclose(loss, load_model(tmp_path / f"step{step}")(tokens[:, :-1], tokens[:, 1:]), rel_tol=1e-6)


def test_replayed_moments_come_near_the_parents(data, tmp_path):
    """From published weights alone: the more batches are replayed, the nearer the next steps."""
    settings = dict(steps=40, learning_rate=1e-3, checkpoint_every=32)
    run_here(data, tmp_path / "run", **settings)
    published = tmp_path / "published/step32"
    published.mkdir(parents=True)
    for file in ("model.safetensors", "config.json"):
        shutil.copy(tmp_path / "run/step32" / file, published)
    with pytest.raises(ValueError, match="holds weights only.*--warm_moments=K"):
        run_here(data, tmp_path / "none", branch_from=str(published), **settings)
    start, whole = (load_file(tmp_path / f"run/step{step}/model.safetensors") for step in (32, 40))
    moved, error = sum((start[name] - whole[name]).square().sum() for name in whole), {}
    for k in (1, 4, 32):
        run_here(data, tmp_path / f"{k}", branch_from=str(published), warm_moments=k, **settings)
        assert losses(tmp_path / f"{k}")[0][1] == losses(tmp_path / "run")[32][1]  # the replay itself moves nothing
        branch = load_file(tmp_path / f"{k}/step40/model.safetensors")
        error[k] = sum((branch[name] - whole[name]).square().sum() for name in whole) / moved
    print(error)
    assert error[32] < error[4] < error[1] and error[32] < 0.1
