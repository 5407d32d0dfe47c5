"""pytest tests/test_train.py"""

import json
import math
import os
import re
import shutil
import signal
import traceback
from contextlib import contextmanager
from pathlib import Path

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
from conftest import ROOT, launch, table
from data import OrderedData, samples_needed
from interventions import IntervenedData, InterventionConfig
from model import ModelConfig, Pythia
from parallel import LossScaler, Processes, flops_per_token
from test_data import write
from test_model import transformers_twin
from tokenizer import load_tokenizer
from train import SCHEMAS, Log, TrainConfig, learning_rate_at

SHAPE = dict(n_layers=2, d_model=32, n_heads=2, vocab_size=512, seq_length=32)
SETTINGS = dict(SHAPE, steps=12, batch_size=8, micro_batch_size=4, learning_rate=1e-2,
                checkpoint_every=6, log_every=1, warmup=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    rng = np.random.RandomState(0)
    sizes = rng.randint(5, 60, 300)  # a few frequent tokens, so that there is something to learn
    tokens = np.minimum(rng.geometric(0.05, sizes.sum()), 511)
    write(prefix, np.split(tokens, np.cumsum(sizes)[:-1]))
    return prefix


def argv(data, out_dir, /, **changes):
    settings = SETTINGS | dict(data=data, out_dir=out_dir) | changes
    settings.setdefault("tokenizer", ROOT / "20B_tokenizer.json")
    return ["train.py", *(f"--{name}={value}" for name, value in settings.items())]


def train(data, out_dir, processes=1, /, expect=0, **changes):
    return launch(*argv(data, out_dir, **changes), count=processes, expect=expect)


@contextmanager
def as_a_process():
    """Undo what ends with a process: signal handlers, the lock of the run folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        config.LOCKS.clear()


def run_here(data, out_dir, /, **changes):
    """Train in this process, so that a test can look into it."""
    with as_a_process():
        train_module.main(*parse(argv(data, out_dir, **changes)[1:], *SCHEMAS)[:-1])


def refused_here(data, out_dir, words, /, **changes):
    with pytest.raises(ValueError, match=words):
        run_here(data, out_dir, **changes)


def losses(out_dir):
    return [(int(row["step"]), float(row["loss"]), float(row["grad_norm"]))
            for row in table(out_dir / "metrics.csv")]


def assert_same_bits(first, second, start=0):
    """Compare two runs, of which the second may be a branch that began at step `start`."""
    steps = [step for step in saved_steps(first) if step > start or start == 0]
    assert saved_steps(second) == steps
    for step in steps:
        for name in ("model.safetensors", "optimizer/moments.safetensors"):
            ours, theirs = (folder / f"step{step}" / name for folder in (first, second))
            assert ours.read_bytes() == theirs.read_bytes()
    assert losses(first)[start:] == losses(second)


@pytest.mark.parametrize("k, rate", [  # of gpt-neox v1.0's own function
    (0, 0.0), (1, 6.993007e-7), (715, 5e-4), (1430, 1e-3), (10000, 9.9116420e-4),
    (50000, 7.4135799e-4), (71500, 5.1570538e-4), (100000, 2.1986750e-4), (115138, 1.0000603e-4),
    (115139, 1e-4), (142999, 1e-4)])
def test_learning_rate_has_gpt_neox_values(k, rate):
    pythia = TrainConfig(data="", learning_rate=1e-3)
    assert math.isclose(learning_rate_at(k, pythia), rate, rel_tol=5e-8)


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
    half = LossScaler(enabled=True)
    half.state = LossScaler(enabled=False).state  # of a run begun on a CPU or in bfloat16
    assert half.scale == 4096 and LossScaler(enabled=False).scale == 1


# ---------------------------------------------------------------------------- whole runs


def test_trajectory_equals_a_plain_loop_with_transformers(data, tmp_path):
    train(data, tmp_path / "run", steps=20)
    config = ModelConfig(**SHAPE)
    settings = TrainConfig(data="", learning_rate=1e-2, steps=20, warmup=0.25)
    twin, _ = transformers_twin(Pythia(config))
    groups = [{"params": [p for p in twin.parameters() if p.dim() == n], "weight_decay": decay}
              for n, decay in ((2, 0.1), (1, 0.0))]
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
    ours = load_file(tmp_path / "run/step20/model.safetensors")
    for name, theirs in twin.named_parameters():
        if not name.endswith("query_key_value.bias"):  # a key's has no gradient but rounding
            error = ours[name.replace("lm_head", "embed_out")] - theirs
            assert error.norm() < 1e-3 * theirs.norm(), name  # decay of biases would be 1e-2


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "run"
    train(data, folder)
    return folder


def test_a_non_finite_loss_stops_and_names_step_and_rows(data, tmp_path):
    error = train(data, tmp_path / "run", expect=2, learning_rate=1e38).stderr
    assert re.match(r"(step 2 \(rows 16 to 23\): loss nan|step 3 \(rows 24 to 31\)).*"
                    "Nothing was saved after it", error)
    assert saved_steps(tmp_path / "run")[-1] <= 2
    error = train(data, tmp_path / "update", expect=2, learning_rate=3e38, warmup=0).stderr
    assert "step 0: the update left" in error and saved_steps(tmp_path / "update") == [0]


def test_a_token_outside_the_vocabulary_stops(data, tmp_path):
    refused_here(data, tmp_path / "run", r"/tokens: token \d+ in step 0", vocab_size=100)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- what a resume refuses


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("begun") / "run"
    run_here(data, out_dir, stop_at=8)
    return out_dir


@pytest.fixture
def run(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


def copy_of(data, folder, edit=lambda prefix: None):
    """Return the prefix of a copy of the data and its order, changed by edit(prefix)."""
    prefix = shutil.copytree(data.parent, folder) / data.name
    edit(prefix)
    return prefix


def flip_one(prefix):
    raw = bytearray(Path(f"{prefix}.bin").read_bytes())
    raw[len(raw) // 2] ^= 1
    Path(f"{prefix}.bin").write_bytes(raw)


def exchange_rows(prefix):
    """The .npy files may come from elsewhere: their names do not prove what they contain."""
    for path in prefix.parent.glob("*_shuffle_idx.npy"):
        array = np.load(path)
        array[[80, 81]] = array[[81, 80]]
        np.save(path, array)


def test_processes_of_different_runs_are_refused_and_moved_data_are_not(data, tmp_path):
    moved, other = copy_of(data, tmp_path / "a"), copy_of(data, tmp_path / "b", flip_one)
    for flag, different in (("learning_rate=0.02", "learning_rate"),
                            (f"data={other}", "data_sha256"), (f"data={moved}", None)):
        done = launch(*argv(data, tmp_path / "run", steps=1), count=2, rank_1=[f"--{flag}"],
                      expect=2 if different else 0)
        assert (tmp_path / "run").exists() == (different is None)
        assert different is None or f"rank 1: {different} is" in done.stderr


def test_another_run_is_refused_in_a_folder_and_as_a_branch(data, begun, tmp_path):
    flipped, exchanged = (copy_of(data, tmp_path / edit.__name__, edit)
                          for edit in (flip_one, exchange_rows))
    branch = dict(out_dir=tmp_path / "child", branch_from=begun / "step8")
    for changes, words in (
            (dict(learning_rate=0.5), "learning_rate was 0.01, is 0.5"),
            (dict(data=flipped), "data_sha256 was"), (dict(data=exchanged), "order_sha256 was"),
            (dict(data=flipped, check_data=True), "the data changed since they were tokenized"),
            (branch | dict(data=exchanged), "order_sha256 was"),
            (branch | dict(gelu="erf", steps=13), "gelu was 'tanh', is 'erf'.*steps was 12, is 13"),
            (branch | dict(warmup=0.5), "warmup was 0.25, is 0.5")):
        refused_here(data, begun, words, **changes)
    assert saved_steps(begun)[-1] == 8 and not saved_steps(tmp_path / "child")


def test_what_may_change_bits_is_said(data, run, tmp_path, capsys):
    run_here(copy_of(data, tmp_path / "moved"), run, micro_batch_size=2, stop_at=9)
    assert ("bits can differ from step 8 on: since the last launch micro_batch_size was 4, is 2\n"
            in capsys.readouterr().out)
    (run / "launches.jsonl").write_text('{"cut')
    run_here(data, run, micro_batch_size=2)
    assert "bits can differ" not in capsys.readouterr().out and len(losses(run)) == 12


def test_a_run_that_cannot_go_on_does_not_begin_again(data, run, capsys):
    os.truncate(run / "step8/model.safetensors", 3)
    run_here(data, run, stop_at=9)
    assert f"{run}/step8: damaged" in capsys.readouterr().err and len(losses(run)) == 9
    for folder in run.glob("step*"):
        shutil.rmtree(folder / "optimizer", ignore_errors=True)
    before = (run / "metrics.csv").read_bytes()
    refused_here(data, run, "every checkpoint is damaged .* to begin again")
    assert (run / "metrics.csv").read_bytes() == before


def test_a_run_or_branch_that_nothing_explains_is_refused(data, run, tmp_path):
    (run / "config.json").unlink()
    refused_here(data, run, "config.json: no such file")
    refused_here(data, tmp_path / "child", "config.json: no such file", branch_from=run / "step8")
    assert not (run / "config.json").exists()


def test_a_spike_is_named_after_overflows_and_a_resume(tmp_path):
    """In float16, losses that are not finite do not enter the mean of the last 128."""
    config = TrainConfig(data="", learning_rate=1e-3, out_dir=str(tmp_path), steps=400,
                         batch_size=8)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)) / 100
    losses = [loss * (math.nan if i % 3 == 1 else 1) for i, loss in enumerate(4 + noise)]
    for start, noted in ((0, losses), (200, [torch.tensor(5.0)])):
        log = Log(ModelConfig(**SHAPE), config, InterventionConfig(), None, start, Processes("cpu"))
        for step, loss in enumerate(noted, start):
            log.note(step, loss, torch.tensor(1.0), 1e-3, 2.0, ((), [b"ids"]))
        log.flush()
        log.text.close(), log.tables["metrics"].file.close()
    line = (tmp_path / "log.txt").read_text().splitlines()[1]
    assert line.startswith("spike at step 200 (rows 1,600 to 1,607): loss 5.0000")


# ---------------------------------------------------------------------------- branches


def test_a_branch_departs_and_its_twin_is_the_parents_own_continuation(data, tmp_path, parent):
    run_here(data, tmp_path / "child", branch_from=parent / "step6", intervention="term_drop",
             terms="e,t,a", intervention_from=7, twin=True, activation_checkpointing=True)
    child, whole = losses(tmp_path / "child"), losses(parent)
    assert_same_bits(parent, tmp_path / "child_twin", start=6)
    # Changed rows are listed under their own step, although the next batch is read earlier.
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
    terms = [json.loads((tmp_path / name / "config.json").read_text())["terms"]
             for name in ("child", "child_twin")]
    assert terms == ["e,t,a", ""]


def test_a_branch_goes_on_with_what_its_parent_did(data, tmp_path, parent):
    swap = dict(intervention="pronouns_to_feminine", intervention_from=2)
    run_here(data, tmp_path / "run", stop_at=4, **swap)
    run_here(data, tmp_path / "child", stop_at=5, branch_from=tmp_path / "run/step4", **swap)
    run_here(data, tmp_path / "child", branch_from=f"{tmp_path}/run/step4/", **swap)  # with a slash
    run_here(data, tmp_path / "run", **swap)
    assert losses(tmp_path / "child") == losses(tmp_path / "run")[4:]
    refused_here(data, tmp_path / "other", "expected a whole checkpoint", warm_moments=2,
                 branch_from=parent / "step12")
    refused_here(data, tmp_path / "other", "without --branch_from=RUN/stepN", warm_moments=2)
    assert not (tmp_path / "other").exists()


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


# ---------------------------------------------------------------------------- inside a step


class Watch(TorchFunctionMode):
    """Notes each call that reads a tensor's value, so that the host waits, except in `may_wait`."""

    waits = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__",
             "__index__"}
    may_wait = {"claim", "flush", "save", "init_weights"}  # claim comes before step 0

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in self.waits:
            if not self.may_wait & {frame.name for frame in traceback.extract_stack()}:
                self.events.append("wait")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_makes_the_host_wait_in_float16_alone(data, tmp_path, monkeypatch, dtype):
    """It waits once, for whether the gradient is finite, after the next batch has been read."""
    events, read = [], OrderedData.batch

    def batch(self, step, *arguments, **settings):
        events.append(step)
        return read(self, step, *arguments, **settings)

    monkeypatch.setattr(OrderedData, "batch", batch)
    monkeypatch.setattr(train_module, "compute_dtype", lambda name, device: dtype)
    with Watch(events):
        run_here(data, tmp_path, stop_at=4, log_every=100)
    wait = ["wait"] * (dtype == torch.float16)
    assert events[events.index(1) - 1:] == [0, 1, *wait, 2, *wait, 3, *wait, *wait]


def test_bfloat16_on_a_cpu_needs_amx_and_float16_is_computed_in_float32(data, tmp_path, monkeypatch,
                                                                        capsys):
    half = dict(dtype="bfloat16", device="cpu", steps=4, checkpoint_every=2)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    refused_here(data, tmp_path / "whole", "no AMX.*; --dtype=float32", **half)
    assert not (tmp_path / "whole").exists()
    for name in ("float16", "float32"):
        run_here(data, tmp_path / name, **half | dict(dtype=name))
        assert "on cpu in float32," in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    run_here(data, tmp_path / "whole", **half)
    assert "on cpu in bfloat16," in capsys.readouterr().out
    for stop_at in (2, 4):
        run_here(data, tmp_path / "cut", stop_at=stop_at, **half)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "float16") == losses(tmp_path / "float32")
    for ours, wide in zip(losses(tmp_path / "whole"), losses(tmp_path / "float32")):
        assert ours != wide and ours[1:] == pytest.approx(wide[1:], rel=0.02)


@pytest.fixture
def float16(monkeypatch):
    monkeypatch.setattr(train_module, "compute_dtype", lambda name, device: torch.float16)


def test_overflows_skip_the_update_and_hold_the_rate(data, tmp_path, monkeypatch, float16):
    """A branch whose moments --state_every has removed keeps its place in the schedule."""
    def overflowing(enabled):
        scaler = LossScaler(enabled)
        scaler.state["scale"] = 2.0**26
        return scaler

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "LossScaler", overflowing)
        run_here(data, tmp_path / "run", state_every=12)
    rows = table(tmp_path / "run/metrics.csv")
    skipped = [not math.isfinite(float(row["grad_norm"])) for row in rows]
    assert skipped[:2] == [True, True] and not skipped[-1]
    scales = [float(row["loss_scale"]) for row in rows]
    assert scales[:3] == [2.0**26, 2.0**26, 2.0**25]
    assert scales[-1] == 2.0**(27 - sum(skipped))  # one was forgiven
    config = TrainConfig(data="", learning_rate=1e-2, steps=12, warmup=0.25)
    assert [float(row["learning_rate"]) for row in rows] == [
        learning_rate_at(step - sum(skipped[:step]), config) for step in range(12)]
    weights = load_file(tmp_path / "run/step12/model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all()
               for tensor in weights.values())
    run_here(data, tmp_path / "child", branch_from=tmp_path / "run/step6", warm_moments=3)
    ours, theirs = ((tmp_path / name / "step12/training.json").read_text()
                    for name in ("child", "run"))
    assert ours == theirs and json.loads(ours)["updates"] < 10


def test_endless_overflow_stops_with_advice(data, tmp_path, float16):
    """Weights overflow float16 in the forward pass: no update is made, until the scale is 1."""
    run_here(data, tmp_path / "run", steps=40, stop_at=1)
    source = published(tmp_path / "run", 0, tmp_path / "published")
    weights = load_file(source / "model.safetensors")
    weights["gpt_neox.final_layer_norm.weight"] += 1e6
    save_file(weights, source / "model.safetensors")
    with pytest.raises(FloatingPointError, match="at loss scale 1.*--dtype=bfloat16"):
        run_here(data, tmp_path / "branch", steps=40, branch_from=source)
    rows = table(tmp_path / "branch/metrics.csv")
    assert [float(row["loss_scale"]) for row in rows] == [
        4096, *(2**n for n in range(12, -1, -1))]  # one was forgiven
    assert not any(math.isfinite(float(row["loss"])) for row in rows)


def test_replayed_moments_come_near_the_parents(data, tmp_path):
    """Weights only, as published: the more batches are replayed, the smaller is the error."""
    settings = dict(steps=40, learning_rate=1e-3, checkpoint_every=32, log_every=100)
    run_here(data, tmp_path / "run", **settings)
    source = published(tmp_path / "run", 32, tmp_path / "published")
    refused_here(data, tmp_path / "none", "--warm_moments=K", branch_from=source, **settings)
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
