"""pytest tests/test_proof.py: digests of a run, what replays prove and find, exact sums.

pytest tests/test_proof.py -m proof plants 200 faults, stops 50 honest runs, restores 50 steps.
"""

import hashlib
import math
import random
import shutil
import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch

import train as train_module
from config import read_json, write_json
from conftest import launch, write_jsonl
from data import OrderedData
from interventions import InterventionConfig
from checkpoints import saved_steps
from launch import Launched
from model import ModelConfig, Pythia, hf_name
from parallel import ExactSums, Processes
from test_train import argv, as_a_process, data, run_here, SHAPE, table, train  # noqa: F401

EVERY = dict(checkpoint_every=1, steps=12)


@pytest.fixture
def proved(command):
    """Return a function: flags of a replay, in this process -> the last line that it prints."""
    def proved(*flags):
        with as_a_process():
            done = command("train.py", *flags, expect=None)
        assert done.returncode in (0, 1), done.stderr
        return done.stdout.splitlines()[-1]
    return proved


def test_digests_are_sha256_of_what_the_docstring_says(data, tmp_path):
    train(data, tmp_path / "one")
    train(data, tmp_path / "two", 2)
    order, before = OrderedData(data, 32, 96, 1234), "0" * 64
    for row, other in zip(table(tmp_path / "one/metrics.csv"), table(tmp_path / "two/metrics.csv")):
        step = int(row["step"])
        ids = order.rows(np.arange(8 * step, 8 * step + 8)).astype("<i4")
        of_rows = b"".join(hashlib.sha256(r.tobytes()).digest() for r in ids)
        assert row["batch_sha256"] == other["batch_sha256"] == hashlib.sha256(of_rows).hexdigest()
        text = ",".join([before, *(row[name] for name in (
            "step", "batch_sha256", "learning_rate", "loss_scale", "loss", "grad_norm"))])
        before = hashlib.sha256(text.encode()).hexdigest()
        assert row["digest"] == before
        folder = tmp_path / f"one/step{step + 1}"
        if folder.exists():
            entries = read_json(folder / "manifest.json")
            hashes = "".join(entries[name]["sha256"] for name in (
                "model.safetensors", "optimizer/moments.safetensors"))
            assert entries["chain"] == {
                "digest": before, "state_sha256": hashlib.sha256(hashes.encode()).hexdigest()}


# ---------------------------------------------------------------------------- replays find faults

# A fault is a function (monkeypatch, draw, k) -> settings of a run, what its replay has to say.


def shifted(monkeypatch, step_of):
    """Make a run take step_of(step, read) instead of read(step) as the batch of each step."""
    batch = OrderedData.batch
    monkeypatch.setattr(OrderedData, "batch", lambda self, step, **share: step_of(
        step, lambda other: batch(self, other, **share)))


def token(monkeypatch, draw, k):
    def flipped(step, read):
        rows = read(step)
        if step == k:
            rows.flat[draw.randrange(rows.size)] ^= 1
        return rows

    shifted(monkeypatch, flipped)
    return {}, f"step {k}: data differs"


def skipped_step(monkeypatch, draw, k):
    shifted(monkeypatch, lambda step, read: read(step + (step >= k)))
    return {}, f"step {k}: data differs"


def doubled_step(monkeypatch, draw, k):
    shifted(monkeypatch, lambda step, read: read(step - (step > k)))
    return {}, f"step {k + 1}: data differs"


def rate(monkeypatch, draw, k):
    rate_at = train_module.learning_rate_at
    monkeypatch.setattr(train_module, "learning_rate_at", lambda n, config: (
        math.nextafter(rate_at(n, config), 1) if n == k else rate_at(n, config)))
    return {}, f"step {k}: rate differs"


def weight(monkeypatch, draw, k, kind=""):
    """Flip a bit of the mantissa of one weight or moment after the update of step k."""
    names = [name for name, _ in Pythia(ModelConfig(**SHAPE)).named_parameters()]
    chosen, update = draw.randrange(len(names)), train_module.Training.update

    def wrong(self, rate, norm):
        update(self, rate, norm)
        if self.updates == k + 1:
            parameter = list(self.model.parameters())[chosen]
            tensor = parameter.detach() if kind == "" else self.optimizer.state[parameter][kind]
            bits = tensor.view(-1).view(torch.int32)
            bits[draw.randrange(tensor.numel())] ^= 1 << draw.randrange(23)

    monkeypatch.setattr(train_module.Training, "update", wrong)
    name = f"{kind}.{names[chosen]}" if kind else hf_name(names[chosen])
    return {}, f"step{k + 1}: weights or moments differ, first {name}"


def moment(monkeypatch, draw, k):
    return weight(monkeypatch, draw, k, draw.choice(["exp_avg", "exp_avg_sq"]))


def another_seed(monkeypatch, draw, k):
    return ({"seed": draw.randrange(1000), "data_seed": 1234},
            "step0: weights or moments differ, first ")


def another_order(monkeypatch, draw, k):
    return {"data_seed": draw.randrange(1000)}, "step 0: data differs"


def another_intervention(monkeypatch, draw, k):
    return {"intervention": "plant", "planted": "plan.jsonl"}, f"step {k}: data differs"


FAULTS = [token, skipped_step, doubled_step, rate, weight, moment, another_seed, another_order,
          another_intervention]


def check_fault(data, folder, monkeypatch, proved, fault, number):
    """Train a run with a fault that its folder does not show; a replay has to name it."""
    draw, run = random.Random(number), folder / f"run{number}"
    k = draw.randrange(1, 10)
    changes, expected = fault(monkeypatch, draw, k)
    if "planted" in changes:
        changes["planted"] = folder / "plan.jsonl"
        write_jsonl(changes["planted"], [{"id": "a", "text": "a b c", "steps": [k]}])
    run_here(data, run, **EVERY, **changes)
    monkeypatch.undo()
    honest = asdict(InterventionConfig()) | {
        "seed": 1234, "data_seed": None, "planted_sha256": None}
    write_json(run / "config.json", read_json(run / "config.json") | honest)
    last = proved(f"--replay={run}/step0:12")
    assert last.startswith(expected), f"{fault.__name__} {number}: {last}, expected {expected}"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_replay_names_every_fault(data, tmp_path, monkeypatch, proved, fault):
    check_fault(data, tmp_path, monkeypatch, proved, fault, 0)


@pytest.mark.proof
@pytest.mark.parametrize("number", range(200))
def test_200_faults(data, tmp_path, monkeypatch, proved, number):
    check_fault(data, tmp_path, monkeypatch, proved, FAULTS[number % len(FAULTS)], number)


# ---------------------------------------------------------------------------- honest runs


@pytest.mark.parametrize("number", [0, *(pytest.param(i, marks=pytest.mark.proof)
                                         for i in range(1, 50))])
def test_no_false_alarm_on_an_interrupted_run(data, tmp_path, proved, number):
    """A run that is stopped at two random moments, once by a kill."""
    draw = random.Random(number)
    for sent in (signal.SIGTERM, signal.SIGKILL):
        running = Launched(argv(data, tmp_path / "run", checkpoint_every=3))
        running.wait_until(running.printed(f"step {draw.randrange(1, 12):6}/"))
        running.send(sent)
        running.finish()
    train(data, tmp_path / "run", checkpoint_every=3)
    first = draw.choice([0, 1, 2, 3, 4, 6, 8, 9])
    last = proved(f"--replay={tmp_path}/run/step{first}:12")
    assert last == f"steps {first} to 12 proved: {12 - first} equal to the bit"


@pytest.fixture(scope="module")
def sparse(data, tmp_path_factory):
    """A run of 30 steps that keeps moments at steps 0, 20 and 30, and one that keeps all."""
    folder = tmp_path_factory.mktemp("sparse")
    train(data, folder / "every", steps=30, checkpoint_every=1)
    train(data, folder / "run", steps=30, checkpoint_every=10, state_every=20)
    return folder


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(i, marks=pytest.mark.proof)
                                            for i in range(2, 50))])
def test_any_step_is_restored(sparse, tmp_path, proved, number):
    step = random.Random(number).randrange(1, 30)
    last = proved(f"--restore={sparse}/run/step{step}/", f"--out_dir={tmp_path}/again")
    assert "equal to the bit" in last
    for name in ("model.safetensors", "optimizer/moments.safetensors"):
        first, second = (run / f"step{step}" / name
                         for run in (sparse / "every", tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_replayed_is_one_line(data, sparse, tmp_path):
    run = sparse / "run"
    shutil.copytree(run, tmp_path / "run")
    train(data, tmp_path / "child", steps=30, branch_from=run / "step20", stop_at=25)
    lines = (run / "metrics.csv").read_text().splitlines()
    lines[13] = lines[13].replace("12,3072,", "12,3072,1")  # another loss
    (tmp_path / "run/metrics.csv").write_text("\n".join(lines) + "\n")
    for flags, words in (
            (f"--restore={run}/step8:9", "expected one --replay=RUN/stepA:B or --restore"),
            (f"--replay={tmp_path}/child/step0:9", "what came before is in"),
            (f"--replay={tmp_path}/run/step0:20", "step 12 is not there, or does not follow"),
            (f"--replay={run}/step0:20 --beta1=0.5", "beta1 was 0.9, is 0.5")):
        assert words in launch("train.py", *flags.split(), expect=2).stderr
    said = launch("train.py", f"--replay={tmp_path}/child/step20:25").stdout
    assert "proved: 5 equal" in said.splitlines()[-1]


def test_a_checkpoint_that_was_changed_is_not_proved(data, sparse, tmp_path, proved, refused):
    """Even if only the sign of a zero was changed, and also on other hardware."""
    run = tmp_path / "run"
    shutil.copytree(sparse / "run", run)
    path = run / "step20/optimizer/moments.safetensors"
    whole = path.read_bytes()
    zero = whole.rindex(bytes(4))  # a moment of a token that never came
    path.write_bytes(whole[:zero + 3] + b"\x80" + whole[zero + 4:])
    flag = f"--replay={run}/step0:21"
    assert proved(flag).startswith("step20: weights or moments differ, first exp_avg")
    shutil.rmtree(tmp_path / "run_replay_step0_21")
    launches = run / "launches.jsonl"
    launches.write_text(launches.read_text().replace(torch.__version__, "1.0.0"))
    path.write_bytes(whole[:-9])
    with as_a_process():
        assert "step20: damaged, a file is missing or cut" in refused("train.py", flag)


def test_a_chain_ends_where_the_manifests_say(sparse, tmp_path, command):
    lines = (sparse / "run/metrics.csv").read_text().splitlines(keepends=True)
    for name, text, words in (
            ("first", "".join([lines[0], lines[1].replace("0,0,", "0,0,1"), *lines[2:]]),
             "step 0 is not there"),
            ("end", "".join(lines[:25]), "step 24 is not there"),
            ("middle", "".join(lines[:5] + lines[6:]), "step 4 is not there"),
            ("torn", "".join(lines) + "30,77", "0 problems")):
        shutil.copytree(sparse / "run", tmp_path / name)
        (tmp_path / name / "metrics.csv").write_text(text)
        done = command("verify.py", "verify", tmp_path / name, expect=None)
        assert words in done.stdout, (name, done)


def test_other_hardware_is_compared_within_a_tolerance(data, tmp_path):
    train(data, tmp_path / "run", **EVERY)
    launches = tmp_path / "run/launches.jsonl"
    launches.write_text(launches.read_text().replace(torch.__version__, "1.0.0"))
    flag = f"--replay={tmp_path}/run/step0:12"
    assert "proved" in launch("train.py", flag).stdout.splitlines()[-1]  # the bits are the same
    # It is not compared again with what is there.
    assert "already has step12" in launch("train.py", flag, expect=2).stderr
    shutil.rmtree(tmp_path / "run_replay_step0_12")
    said = launch("train.py", flag, "--micro_batch_size=2").stdout
    assert "losses within" in said and f"torch was '1.0.0', is '{torch.__version__}'" in said


# ---------------------------------------------------------------------------- exact sums


def test_sums_are_the_means_of_float64(monkeypatch):
    """In any order, at any loss scale, equal to the float64 mean rounded once."""
    monkeypatch.setattr(ExactSums, "BLOCK", 1000)
    draw, n = torch.Generator().manual_seed(0), 12
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((70, 33), (33,))]
    gradients = [[10.0**-(i % 5) * torch.randn(p.shape, generator=draw) for p in parameters]
                 for i in range(n)]
    losses = 10 + torch.rand(n, generator=draw)
    sums = ExactSums(parameters, n, Processes("cpu"))

    def add(order, scale):
        for i in order:
            for p, gradient in zip(parameters, gradients[i]):
                p.grad = gradient * scale
            sums.add(losses[i], scale)
        return sums.mean()

    for order, scale in ((range(n), 1.0), (reversed(range(n)), 4096.0)):
        assert add(order, scale) == losses.double().mean().float()
        for p, each in zip(parameters, zip(*gradients)):
            expected = torch.stack(each).double().mean(0).float()
            # Rounding to a multiple of 2**-54 may end at the float32 next to the exact mean.
            assert torch.allclose(p.grad, expected, rtol=2**-23, atol=2**-53)
    for wrong in (17.0, math.nan, -math.inf):
        gradients[5][1][7] = wrong
        add(range(n), 1.0)
        assert parameters[0].grad.norm() == math.inf


EXACT = dict(exact_sums=True, threads=1, batch_size=12, micro_batch_size=1)


@pytest.mark.parametrize("counts, killed", [
    ((2, 3), ((3, 3), (1, 7))),
    pytest.param((2, 3, 4), ((4, 3), (1, 7), (3, 10)), marks=pytest.mark.proof)])
def test_bits_do_not_depend_on_the_number_of_processes(data, tmp_path, counts, killed):
    train(data, tmp_path / "one", **EXACT)
    for count in counts:
        train(data, tmp_path / f"{count}", count, **EXACT)
    for count, step in killed:  # and goes on with another number
        running = Launched(argv(data, tmp_path / "mixed", **EXACT), count)
        running.wait_until(running.printed(f"step {step:6}/"))
        for rank in range(count):
            running.send(signal.SIGKILL, rank)
        running.finish()
    train(data, tmp_path / "mixed", 2, **EXACT)
    for other in (*counts, "mixed"):
        for step in saved_steps(tmp_path / "one"):
            first, second = (tmp_path / f"{run}/step{step}/manifest.json" for run in ("one", other))
            assert first.read_bytes() == second.read_bytes()  # the hashes of all files
    done = train(data, tmp_path / "one", expect=2, **EXACT | {"threads": 2})
    assert "threads was 1, is 2" in done.stderr
    train(data, tmp_path / "plain", **EXACT | {"exact_sums": False})
    exact, plain = (table(tmp_path / f"{name}/metrics.csv") for name in ("one", "plain"))
    assert [float(row["loss"]) for row in exact] == pytest.approx(
        [float(row["loss"]) for row in plain], rel=1e-6)
