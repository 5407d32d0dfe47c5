"""pytest tests/test_record.py"""

import json
import math
import os
import re
import shutil
from pathlib import Path

import torch

from checkpoints import load_model, saved_steps
from data import OrderedData, samples_needed
from test_train import assert_same_bits, data, losses, parent, run_here, table, train  # noqa: F401
from interventions import InterventionConfig
from train import TrainConfig
from parallel import Processes
from train import Log
from config import open_table


def opened(folder, start, may_overflow=False):
    config = TrainConfig(data="", learning_rate=1e-3, out_dir=str(folder), steps=400, batch_size=8)
    return Log(config, start, 256, may_overflow, InterventionConfig(), Processes("cpu"))


def test_a_spike_is_named_and_nothing_else_happens(tmp_path):
    log = opened(tmp_path, 0)
    noise = torch.randn(150, generator=torch.Generator().manual_seed(0)) / 100
    for step, loss in enumerate(4 + noise):
        log.note(step, loss + (step == 140), torch.tensor(1.0), 1e-3, 1.0, ())
    log.flush()
    [line] = (tmp_path / "log.txt").read_text().splitlines()
    assert re.match(r"spike at step 140 \(rows 1,120 to 1,127\): loss (4.9|5.0)\d+, "
                    r"\d+.\d standard deviations", line)


def test_a_spike_is_seen_after_overflows_and_a_resume(tmp_path):
    """float16: a loss that is not finite is none of the 128 that the next are held against."""
    log = opened(tmp_path, 0, may_overflow=True)
    noise = torch.randn(260, generator=torch.Generator().manual_seed(0)) / 100
    for step, loss in enumerate(4 + noise[:200]):
        log.note(step, loss * (math.nan if step % 3 == 1 else 1), torch.tensor(1.0), 1e-3, 1.0, ())
    log.flush()
    again = opened(tmp_path, 200, may_overflow=True)
    assert list(again.recent) == list(log.recent) and len(log.recent) == 128
    again.note(200, torch.tensor(5.0), torch.tensor(1.0), 1e-3, 1.0, ())
    again.flush()
    [line] = (tmp_path / "log.txt").read_text().splitlines()
    assert line.startswith("spike at step 200 ")


def test_a_line_that_was_cut_anywhere_is_forgotten(tmp_path):
    """As a full disk or a power failure leaves it, in its last cell too."""
    path = tmp_path / "table.csv"
    whole = "step,tokens,loss\n8,2048,4.25\n9,2304,4.125\n"
    for cut in range(1, len("9,2304,4.125\n") + 1):
        path.write_text(whole[:-cut])
        file, rows = open_table(path, ("step", "tokens", "loss"), 12)
        file.close()
        assert rows == [{"step": "8", "tokens": "2048", "loss": "4.25"}]
        assert path.read_text() == "step,tokens,loss\n8,2048,4.25\n"


def test_without_git_a_run_starts(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run_here(data, tmp_path, steps=1)
    assert json.loads((tmp_path / "launches.jsonl").read_text())["git_commit"] is None


def test_the_folder_explains_the_run(parent):
    [launch] = [json.loads(line) for line in (parent / "launches.jsonl").read_text().splitlines()]
    assert launch["packages"]["torch"] == torch.__version__ and "--steps=12" in launch["command"]
    assert launch["launch"]["micro_batch_size"] == 4 and launch["processes"] == 1 and launch["cpu"]
    assert "step     11/12 | loss" in (parent / "log.txt").read_text()


def test_heldout_loss_is_the_checkpoints_own(data, tmp_path):
    train(data, tmp_path, heldout=data, heldout_every=6)
    rows = {int(row["step"]): float(row["loss"]) for row in table(tmp_path / "heldout.csv")}
    assert list(rows) == [6, 12]
    order = OrderedData(data, 32, samples_needed(1, 8), 1234)
    tokens = torch.from_numpy(order.batch(0, 8)[0])
    for step, loss in rows.items():
        with torch.no_grad():
            expected = load_model(tmp_path / f"step{step}")(tokens[:, :-1], tokens[:, 1:])
            assert math.isclose(loss, expected, rel_tol=1e-6)


# ---------------------------------------------------------------------------- power failures


class Disk:
    """What would be left without power: bytes as they were when their file was last synced.

    It learns that from this process's os.fsync. When a checkpoint has got its name, the whole run
    folder is copied as it would be found then: every name there is, with the synced bytes alone.
    """

    def __init__(self, run, images, monkeypatch):
        self.run, self.images, self.bytes, self.events = run, images, {}, []
        self.real = {name: getattr(os, name) for name in ("fsync", "rename")}
        for name in self.real:
            monkeypatch.setattr(os, name, getattr(self, name))

    def fsync(self, descriptor):
        self.real["fsync"](descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_file():
            self.bytes[path.stat().st_ino] = path.read_bytes()
        else:
            self.events.append(path.resolve())

    def rename(self, before, after):
        self.real["rename"](before, after)
        self.events.append(Path(after))
        if re.fullmatch(r"step\d+", Path(after).name):
            def synced(source, target):
                Path(target).write_bytes(self.bytes.get(os.stat(source).st_ino, b""))
            shutil.copytree(self.run, self.images / Path(after).name, copy_function=synced)


def test_a_run_goes_on_to_the_same_bits_after_a_power_failure(data, tmp_path, monkeypatch):
    """Whenever a checkpoint has got its name, all of it and of the tables is on the disk."""
    settings = dict(heldout=data, heldout_every=2, intervention="term_drop", terms="e,t,a")
    run, images = tmp_path / "run", tmp_path / "images"
    with monkeypatch.context() as patch:
        disk = Disk(run, images, patch)
        run_here(data, run, **settings)
    assert saved_steps(run) == [0, 1, 2, 4, 6, 8, 12]
    for step in saved_steps(run):
        image, folder = images / f"step{step}", run / f"step{step}"
        for path in folder.iterdir():
            assert (image / folder.name / path.name).read_bytes() == path.read_bytes()
        assert losses(image) == losses(run)[:step]
        assert table(image / "interventions.csv") == [
            row for row in table(run / "interventions.csv") if int(row["step"]) < step]
        assert table(image / "heldout.csv") == [
            row for row in table(run / "heldout.csv") if int(row["step"]) <= step]
        # The name itself is on the disk before training goes on.
        assert disk.events[disk.events.index(folder) + 1] == run
    assert table(run / "interventions.csv") and len(table(run / "heldout.csv")) == 6
    shutil.copytree(images / "step8", tmp_path / "again")
    run_here(data, tmp_path / "again", **settings)
    assert_same_bits(run, tmp_path / "again")
    for name in ("interventions.csv", "heldout.csv"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
