"""pytest tests/test_train.py"""

import csv
import gc
import json
import math
import re
import shutil
import signal
import traceback
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import config
import train as train_module
from checkpoints import saved_steps
from config import parse
from conftest import ROOT
from data import OrderedData, TokenWriter, samples_needed
from launch import Launched
from model import Block, ModelConfig, Pythia
from parallel import LaunchConfig, LossScaler, PlanConfig, flops_per_token
from interventions import IntervenedData, InterventionConfig
from test_model import transformers_twin
from tokenizer import load_tokenizer
from train import TrainConfig, learning_rate_at, make_optimizer

PYTHIA = TrainConfig(data="", out_dir="", learning_rate=1e-3)
SCHEMAS = ModelConfig, TrainConfig, InterventionConfig, LaunchConfig, PlanConfig
SHAPE = dict(n_layers=2, d_model=32, n_heads=2, vocab_size=512, seq_length=32)
SETTINGS = dict(SHAPE, steps=12, batch_size=8, micro_batch_size=4, learning_rate=1e-2,
                checkpoint_every=6, log_every=1, warmup=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    rng = np.random.RandomState(0)
    sizes = rng.randint(5, 60, 300)  # a few frequent tokens, so that there is something to learn
    writer = TokenWriter(prefix, "test")
    writer.append(np.minimum(rng.geometric(0.05, sizes.sum()), 511), sizes)
    writer.finish({})
    return prefix


def command(data, out_dir, /, **changes):
    settings = SETTINGS | dict(data=data, out_dir=out_dir) | changes
    settings.setdefault("tokenizer", ROOT / "20B_tokenizer.json")
    return ["train.py", *(f"--{name}={value}" for name, value in settings.items())]


def train(data, out_dir, processes=1, /, expect=0, **changes):
    done = Launched(command(data, out_dir, **changes), processes).finish()
    assert done.returncode == expect, done.stderr
    return done


def refused(data, out_dir, /, *words, processes=1, **changes):
    """Give a command that ends with one line, which has these words, and exit code 2."""
    error = train(data, out_dir, processes, expect=2, **changes).stderr
    assert error.count("\n") == 1 and all(some in error for some in words), error
    return error


def odd(name, data, out_dir, /, processes=1, **changes):
    """Run a command in which one thing is odd: a function of odd_runs.py."""
    script = [ROOT / "tests/odd_runs.py", name]
    return Launched(script + command(data, out_dir, **changes)[1:], processes).finish()


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def losses(out_dir):
    return [(int(row["step"]), float(row["loss"]), float(row["grad_norm"]))
            for row in table(out_dir / "metrics.csv")]


def assert_same_bits(first, second):
    assert saved_steps(first) == saved_steps(second)
    for step in saved_steps(first):
        for name in ("model.safetensors", "optimizer/moments.safetensors"):
            ours, theirs = (folder / f"step{step}" / name for folder in (first, second))
            assert ours.read_bytes() == theirs.read_bytes()
    assert losses(first) == losses(second)


# ---------------------------------------------------------------------------- parts


@pytest.mark.parametrize("k, rate", [  # pythia.md section 2, from gpt-neox v1.0's own function
    (0, 0.0), (1, 6.993007e-7), (715, 5e-4), (1430, 1e-3), (10000, 9.9116420e-4),
    (50000, 7.4135799e-4), (71500, 5.1570538e-4), (100000, 2.1986750e-4), (115138, 1.0000603e-4),
    (115139, 1e-4), (142999, 1e-4)])
def test_learning_rate_has_gpt_neox_values(k, rate):
    assert math.isclose(learning_rate_at(k, PYTHIA), rate, rel_tol=5e-8)


def test_decay_reaches_matrices_and_embeddings_only():
    model = Pythia(ModelConfig(**SHAPE))
    decayed, bare = make_optimizer(model, PYTHIA).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        "embed_in", "embed_out", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in bare["params"])
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.1, 0.0)
    assert len(names) == len(decayed["params"]) + len(bare["params"])


def test_flops_are_counted_from_the_matmuls():
    config = ModelConfig(2, 64, 2, vocab_size=512, seq_length=128)
    model, tokens = Pythia(config), torch.randint(512, (1, 128))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    attention = 6 * config.n_layers * config.d_model * config.seq_length
    # The counter sees attention's whole square, of which a causal model needs half.
    assert counter.get_total_flops() / 128 == flops_per_token(config) + attention


def test_loss_scaler_follows_deepspeeds_table():
    scaler = LossScaler(enabled=True)
    seen = []
    for iteration in range(4002):
        scaler.update(overflow=iteration in (1500, 1501, 1502, 3600))
        seen.append((scaler.state["scale"], scaler.state["hysteresis"]))
    assert seen[998] == (4096, 2) and seen[999] == (8192, 2)  # the 1000th good one doubles it
    assert seen[1500:1503] == [(8192, 1), (4096, 1), (2048, 1)]  # one forgiven, then halved
    assert seen[2501] == (2048, 1) and seen[2502] == (4096, 2)  # 1000 after the last overflow
    assert seen[3502] == (8192, 2) and seen[3600] == (8192, 1) and seen[4001] == (8192, 1)


def test_a_scale_rests_while_it_is_not_needed():
    """A run begun on a CPU or in bfloat16 goes on in float16 at 4096; the other way round at 1."""
    plain = LossScaler(enabled=False)
    plain.update(overflow=True)
    assert plain.scale == 1
    half = LossScaler(enabled=True)
    half.state = plain.state
    assert half.scale == 4096


# ---------------------------------------------------------------------------- whole runs


def test_trajectory_equals_a_plain_loop_with_transformers(data, tmp_path):
    train(data, tmp_path / "run", steps=20)
    config = ModelConfig(**SHAPE)
    settings = TrainConfig(data="", out_dir="", learning_rate=1e-2, steps=20, warmup=0.25)
    twin, _ = transformers_twin(Pythia(config))
    matrices = [p for p in twin.parameters() if p.dim() == 2]
    vectors = [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    rows = OrderedData(data, 32, samples_needed(20, 8), 1234)
    for step, loss, norm in losses(tmp_path / "run"):
        tokens = torch.from_numpy(rows.rows(range(8 * step, 8 * step + 8)).astype(np.int64))
        logits = twin(tokens[:, :-1]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        assert math.isclose(loss, expected.item(), rel_tol=1e-5)
        assert math.isclose(norm, expected_norm.item(), rel_tol=1e-4)
    assert loss < 0.8 * losses(tmp_path / "run")[0][1]  # it really learned


def test_steps_0_and_1_are_equal_and_the_schedule_is_kept(parent):
    assert saved_steps(parent) == [0, 1, 2, 4, 6, 8, 12]
    zero, one, two = (load_file(parent / f"step{n}/model.safetensors") for n in (0, 1, 2))
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    assert not torch.equal(one["embed_out.weight"], two["embed_out.weight"])


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "run"
    train(data, folder)
    return folder


@pytest.fixture(scope="module", params=[(8, signal.SIGTERM), (2, signal.SIGINT)],
                ids=["one micro-batch", "four micro-batches"])
def whole(data, tmp_path_factory, request):
    """The settings of a run, the folder in which it was never interrupted, a polite signal."""
    micro_batch_size, number = request.param
    settings = dict(steps=60, micro_batch_size=micro_batch_size, checkpoint_every=20)
    folder = tmp_path_factory.mktemp("whole")
    train(data, folder, **settings)
    return settings, folder, number


@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_run_ends_with_the_same_bits(data, tmp_path, whole, killed):
    """A real signal to a real process."""
    settings, folder, number = whole
    run = Launched(command(data, tmp_path, **settings))
    run.wait_until(run.printed("step     21/"))
    run.send(signal.SIGKILL if killed else number)
    done = run.finish()
    stopped = saved_steps(tmp_path)[-1]
    assert done.returncode == (-signal.SIGKILL if killed else 128 + number)
    assert killed or "interrupted: saved step" in done.stdout and stopped > 21
    assert stopped < 60
    assert f"going on from step {stopped}" in train(data, tmp_path, **settings).stdout
    assert_same_bits(folder, tmp_path)


def test_a_non_finite_loss_stops_and_names_step_and_rows(data, tmp_path):
    error = refused(data, tmp_path / "run", "Nothing was saved after it", learning_rate=1e38)
    assert re.match(r"step 2 \(rows 16 to 23\): loss nan|step 3 \(rows 24 to 31\)", error)
    assert saved_steps(tmp_path / "run")[-1] <= 2


@pytest.mark.parametrize("changes", [dict(vocab_size=100), dict(heldout="large")])
def test_a_token_outside_the_vocabulary_stops(data, tmp_path, changes):
    """Of the data or of the held-out ones, which are all looked at before the first step."""
    if "heldout" in changes:
        writer = TokenWriter(tmp_path / "large", "test")
        writer.append(np.full(400, 600), np.full(1, 400))
        writer.finish({})
        changes = dict(heldout=tmp_path / "large")
    error = refused(data, tmp_path / "run", **changes)
    assert re.fullmatch(r"/\S+/(tokens|large): token \d+ in step 0, but vocab_size is \d+\n", error)
    assert saved_steps(tmp_path / "run") == []


def test_another_run_in_the_same_folder_is_refused(data, tmp_path):
    train(data, tmp_path, steps=2)
    refused(data, tmp_path, "learning_rate was 0.01, is 0.5", "batch_size was 8, is 4",
            steps=2, learning_rate=0.5, batch_size=4)


@pytest.mark.parametrize("changes, words", [
    (dict(tokenizer="nowhere.json"), "nowhere.json: no such tokenizer"),
    (dict(data="nowhere"), "nowhere.idx: no such file"),
    (dict(out_dir="/proc/nowhere"), "/proc/nowhere: "),
    (dict(out_dir=__file__), "test_train.py: File exists"),
    (dict(out_dir=""), "out_dir = '', expected a name"),
    (dict(heldout=""), "heldout = '', expected a name"),
    (dict(stepz=3), "no setting called stepz, did you mean steps?"),
    (dict(device="gpu"), "device = 'gpu', expected auto, cpu or cuda"),
    (dict(n_heads=3), "d_model = 32 is not a multiple of n_heads = 3"),
    (dict(batch_size=7), "batch_size = 7 is not a multiple"),
    (dict(gpus=0), "gpus = 0, expected at least 1\n"),
    (dict(steps=0), "steps = 0, expected at least 1"),
    (dict(state_every=-1), "state_every = -1, expected at least 1\n"),
    (dict(stop_at=-1), "stop_at = -1, expected at least 1\n"),
    (dict(warmup=2), "warmup = 2.0, expected 0 to 1\n"),
    (dict(intervention="pronouns_to_feminine", intervention_from=12),
     "intervention_from = 12, but the last step is 11\n")])
def test_a_mistake_is_one_line_before_anything_is_trained(data, tmp_path, changes, words):
    refused(data, tmp_path / "run", words, **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_says_why_it_ends(data, tmp_path):
    for changes, words in ((dict(stop_at=2), "step 2 of 12, 3 checkpoints"),
                           (dict(stop_at=1), "step 2 of 12, 3 checkpoints"),
                           ({}, "step 12 of 12, 7 checkpoints"),
                           (dict(heldout=data), "step 12 of 12, 7 checkpoints")):
        assert f"done: {words}" in train(data, tmp_path, **changes).stdout


# ---------------------------------------------------------------------------- branches


def test_a_branch_departs_and_its_twin_is_the_parents_own_continuation(data, tmp_path, parent):
    out = train(data, tmp_path / "child", branch_from=parent / "step6", intervention="term_drop",
                terms="e,t,a", intervention_from=7, twin=True).stdout
    assert out.count("going on from step 6") == 2
    child, twin, whole = (losses(folder) for folder in
                          (tmp_path / "child", tmp_path / "child_twin", parent))
    assert twin == whole[6:] and saved_steps(tmp_path / "child_twin") == [8, 12]
    for step in (8, 12):
        for file in ("model.safetensors", "optimizer/moments.safetensors"):
            ours, theirs = (folder / f"step{step}" / file
                            for folder in (parent, tmp_path / "child_twin"))
            assert ours.read_bytes() == theirs.read_bytes()
    # Every changed row is noted under its own step, although the next batch is read before.
    config = InterventionConfig("term_drop", intervention_from=7, terms="e,t,a")
    rows = IntervenedData(OrderedData(data, 32, samples_needed(12, 8), 1234),
                          load_tokenizer(ROOT / "20B_tokenizer.json"), config)
    changed = []
    for step in range(6, 12):
        rows.batch(step, 8)
        changed += [(step, row) for row in rows.changed]
    noted = table(tmp_path / "child/interventions.csv")
    assert [(int(row["step"]), int(row["row"])) for row in noted] == changed
    first = changed[0][0]
    assert child[:first - 6] == whole[6:first] and child[first - 6][1] != whole[first][1]
    settings = json.loads((tmp_path / "child/config.json").read_text())
    assert settings["branch_from"] == str(parent / "step6")
    assert settings["differs_from_parent"] == {
        "intervention": [None, "term_drop"], "terms": ["", "e,t,a"], "intervention_from": [0, 7]}
    twin = json.loads((tmp_path / "child_twin/config.json").read_text())
    assert twin["differs_from_parent"] == {}


def test_a_branch_keeps_its_parents_order_and_schedule(data, tmp_path, parent):
    refused(data, tmp_path, "gelu was 'tanh', is 'erf'", "steps was 12, is 13",
            "batch_size was 8, is 4", "warmup was 0.25, is 0.5", "min_lr_ratio was 0.1, is 0.0",
            branch_from=parent / "step6", batch_size=4,
            steps=13, gelu="erf", warmup=0.5, min_lr_ratio=0.0)
    refused(data, tmp_path, "expected a whole checkpoint", branch_from=parent / "step12")


def test_a_branch_goes_on_with_what_its_parent_did(data, tmp_path):
    swap = dict(intervention="pronouns_to_feminine", intervention_from=2)
    train(data, tmp_path / "run", stop_at=4, **swap)
    train(data, tmp_path / "child", stop_at=5, branch_from=tmp_path / "run/step4", **swap)
    (tmp_path / "run/step4/optimizer/moments.safetensors").unlink()
    refused(data, tmp_path / "other", "expected a whole checkpoint",
            branch_from=tmp_path / "run/step4", warm_moments=2)


def test_a_branch_goes_on_with_another_spelling(data, tmp_path, parent):
    train(data, tmp_path, stop_at=8, branch_from=f"{parent}/step6/")
    train(data, tmp_path, branch_from=f"{parent}/step6")
    assert losses(tmp_path) == losses(parent)[6:] and saved_steps(tmp_path) == [8, 12]


def published(run, step, folder):
    """Return a folder with the weights of a checkpoint alone, as the published ones have them."""
    (folder / f"step{step}").mkdir(parents=True)
    for file in ("model.safetensors", "config.json"):
        shutil.copy(run / f"step{step}" / file, folder / f"step{step}")
    return folder / f"step{step}"


def test_replayed_batches_are_those_that_the_parent_saw(data, tmp_path, parent):
    """The child's moments come from plain batches: it is its twin until the first changed row."""
    rows = OrderedData(data, 32, samples_needed(12, 8), 1234)
    tokens = [set(rows.batch(step, 8).ravel().tolist()) for step in range(12)]
    # byte-level BPE: token 65 + i is the letter a + i, its own term
    term = next(i for i in range(65, 91) if any(i in batch for batch in tokens[2:6])
                and i not in tokens[6] | tokens[7])
    train(data, f"{tmp_path}/child/", branch_from=published(parent, 6, tmp_path), twin=True,
          intervention="term_drop", terms=chr(term + 32), warm_moments=4)
    child, twin = losses(tmp_path / "child"), losses(tmp_path / "child_twin")
    assert [row[0] for row in child] == list(range(6, 12)) and child[:2] == twin[:2]


def test_a_signal_ends_a_replay_at_once(data, tmp_path, parent):
    """Nothing but the replay is lost: the same command begins it again. Its time is no step's."""
    settings = dict(branch_from=published(parent, 6, tmp_path), warm_moments=6)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = odd("slow_replay", data, whole, **settings)
    assert done.returncode == 0, done.stderr
    assert float(table(whole / "metrics.csv")[0]["seconds"]) < 0.2
    done = odd("signal_in_replay", data, cut, **settings)
    assert done.returncode == 128 + signal.SIGTERM and "begins the replay again" in done.stdout
    assert losses(cut) == [] and saved_steps(cut) == []
    train(data, cut, **settings)
    assert_same_bits(whole, cut)


# ---------------------------------------------------------------------------- looked into


@contextmanager
def as_a_process():
    """Give back what a process that ends would leave: handlers, threads, the run folder's lock."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        config.LOCKS.clear()


def run_here(data, out_dir, **changes):
    """Train in this process, so that a test can look into it."""
    with as_a_process():
        train_module.main(*parse(command(data, out_dir, **changes)[1:], *SCHEMAS))


class Watch(TorchFunctionMode):
    """Calls `noticed` for every call that reads a tensor's value, for which the host waits."""

    waits = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__",
             "__index__"}

    def __init__(self, noticed):
        super().__init__()
        self.noticed = noticed

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in self.waits:
            self.noticed({frame.name for frame in traceback.extract_stack()})
        return function(*args, **(kwargs or {}))


def test_the_step_never_makes_the_host_wait(data, tmp_path):
    """Whatever reads a tensor's value comes from the log's flush, or from a save."""
    callers = []
    with Watch(callers.append):
        run_here(data, tmp_path, log_every=100)
    assert any("flush" in names for names in callers)
    allowed = {"claim", "flush", "save", "init_weights", "write_file"}  # claim: before step 0
    assert [names for names in callers if not names & allowed] == []


@pytest.fixture
def float16(monkeypatch):
    """float16 on a CPU, which main would not choose."""
    monkeypatch.setattr(train_module, "compute_dtype", lambda name, device: torch.float16)


def test_the_next_batch_is_read_before_the_host_waits(data, tmp_path, monkeypatch, float16):
    """In float16 the host asks once a step whether the gradient is finite."""
    events, read = [], OrderedData.batch

    def batch(self, step, *arguments, **settings):
        events.append(step)
        return read(self, step, *arguments, **settings)

    monkeypatch.setattr(OrderedData, "batch", batch)
    with Watch(lambda names: events.append("wait") if "update" in names else None):
        run_here(data, tmp_path, stop_at=4)
    assert events[events.index(1) - 1:] == [0, 1, "wait", 2, "wait", 3, "wait", "wait"]


def overflowing(enabled):
    scaler = LossScaler(enabled)
    scaler.state["scale"] = 2.0**26
    return scaler


def test_overflows_skip_the_update_and_hold_the_rate(data, tmp_path, monkeypatch, float16):
    """Training begins at a scale at which gradients overflow."""
    monkeypatch.setattr(train_module, "LossScaler", overflowing)
    run_here(data, tmp_path)
    rows = table(tmp_path / "metrics.csv")
    skipped = [not math.isfinite(float(row["grad_norm"])) for row in rows]
    assert skipped[:2] == [True, True] and not skipped[-1]
    scales = [float(row["loss_scale"]) for row in rows]
    assert scales[:3] == [2.0**26, 2.0**26, 2.0**25]
    assert scales[-1] == 2.0**(27 - sum(skipped))  # one was forgiven
    config = TrainConfig(data="", learning_rate=1e-2, steps=12, warmup=0.25)
    assert [float(row["learning_rate"]) for row in rows] == [
        learning_rate_at(step - sum(skipped[:step]), config) for step in range(12)]
    weights = load_file(tmp_path / "step12/model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all()
               for tensor in weights.values())


def test_a_branch_without_moments_keeps_rate_and_loss_scale(data, tmp_path, monkeypatch, float16):
    """--state_every took the parent's; its place in the schedule is in training.json."""
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "LossScaler", overflowing)
        run_here(data, tmp_path / "run", state_every=12)
    run_here(data, tmp_path / "child", branch_from=tmp_path / "run/step6", warm_moments=3)
    ours, theirs = ((tmp_path / name / "step12/training.json").read_text()
                    for name in ("child", "run"))
    assert ours == theirs and json.loads(ours)["updates"] < 10


def test_endless_overflow_stops_with_advice(data, tmp_path, float16):
    """Weights that overflow float16 in the forward pass: no step is taken, until the scale is 1."""
    run_here(data, tmp_path / "run", steps=40, stop_at=1)
    source = published(tmp_path / "run", 0, tmp_path / "published")
    weights = load_file(source / "model.safetensors")
    weights["gpt_neox.final_layer_norm.weight"] += 1e6
    save_file(weights, source / "model.safetensors")
    with pytest.raises(FloatingPointError, match="at loss scale 1.*--dtype=bfloat16"):
        run_here(data, tmp_path / "branch", steps=40, branch_from=source)
    rows = table(tmp_path / "branch/metrics.csv")
    scales = [float(row["loss_scale"]) for row in rows]
    assert scales == [4096, *(2**n for n in range(12, -1, -1))]  # one was forgiven
    assert not any(math.isfinite(float(row["loss"])) for row in rows)


def test_a_twin_has_its_parents_memory(data, tmp_path, parent):
    """The first run's blocks lie in cycles of references, which Python frees when it likes."""
    def blocks():
        return sum(type(thing) is Block for thing in gc.get_objects())

    gc.collect()
    before = blocks()
    gc.disable()
    try:
        run_here(data, tmp_path / "run", branch_from=parent / "step8", twin=True,
                 activation_checkpointing=True)
        assert blocks() - before <= SHAPE["n_layers"]
    finally:
        gc.enable()


def test_replayed_moments_come_near_the_parents(data, tmp_path):
    """From published weights alone: the more batches are replayed, the nearer the next steps."""
    settings = dict(steps=40, learning_rate=1e-3, checkpoint_every=32, log_every=100)
    run_here(data, tmp_path / "run", **settings)
    source = published(tmp_path / "run", 32, tmp_path / "published")
    with pytest.raises(ValueError, match="holds weights only.*--warm_moments=K"):
        run_here(data, tmp_path / "none", branch_from=source, **settings)
    start, whole = (load_file(tmp_path / f"run/step{step}/model.safetensors") for step in (32, 40))
    moved = sum((start[name] - whole[name]).square().sum() for name in whole)
    error = {}
    for k in (1, 4, 32):
        run_here(data, tmp_path / f"{k}", branch_from=source, warm_moments=k, **settings)
        # The replay itself moves nothing.
        assert losses(tmp_path / f"{k}")[0][1] == losses(tmp_path / "run")[32][1]
        branch = load_file(tmp_path / f"{k}/step40/model.safetensors")
        error[k] = sum((branch[name] - whole[name]).square().sum() for name in whole) / moved
    print(error)
    assert error[32] < error[4] < error[1] and error[32] < 0.1
