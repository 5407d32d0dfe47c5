"""pytest tests/test_record.py"""

import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from checkpoints import saved_steps
from config import COUNT, NUMBER, TEXT, Table, explain
from conftest import table
from interventions import InterventionConfig
from parallel import Processes
from test_train import assert_same_bits, data, run_here  # noqa: F401
from train import Log, TrainConfig


def test_a_spike_is_named_after_overflows_and_a_resume(tmp_path):
    """float16: a loss that is not finite is none of the 128 that the next are held against."""
    config = TrainConfig(data="", learning_rate=1e-3, out_dir=str(tmp_path), steps=400,
                         batch_size=8)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)) / 100
    losses = [loss * (math.nan if i % 3 == 1 else 1) for i, loss in enumerate(4 + noise)]
    for start, noted in ((0, losses), (200, [torch.tensor(5.0)])):
        log = Log(config, start, 256, InterventionConfig(), Processes("cpu"), "0" * 64)
        for step, loss in enumerate(noted, start):
            log.note(step, loss, torch.tensor(1.0), 1e-3, 2.0, (), [b"ids"])
        log.flush()
        log.tables["metrics"].file.close()
    [line] = (tmp_path / "log.txt").read_text().splitlines()
    assert line.startswith("spike at step 200 (rows 1,600 to 1,607): loss 5.0000")


COLUMNS = {"step": COUNT, "loss": NUMBER, "name": TEXT}
WHOLE = b"step,loss,name\n8,4.25,r2\n9,1e-05,\"a, b\"\n10,nan,\xc3\xa9\n"


def reopened(path, text):
    """Return the rows of a table with these bytes, and its lines afterwards."""
    path.write_bytes(text)
    table = Table(path, COLUMNS)
    table.file.close()
    return table.rows, path.read_bytes().splitlines(True)


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_a_table_cut_anywhere_keeps_its_whole_lines(tmp_path, ends, monkeypatch):
    """As a full disk or a power failure leaves it, in its last cell too."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes most of the time
    whole = WHOLE.replace(b"\n", ends)
    for cut in range(len(whole) + 1):
        rows, lines = reopened(tmp_path / "t.csv", whole[:cut])
        assert len(rows) == max(whole[:cut].count(b"\n") - 1, 0)
        assert lines == WHOLE.splitlines(True)[:len(rows) + 1]


def test_a_flipped_bit_takes_one_row_and_is_said(tmp_path, capsys, monkeypatch):
    """Or two, if it joins them; none if what it makes is a row."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path, good = tmp_path / "t.csv", WHOLE.splitlines(True)
    for place, bit in itertools.product(range(len(WHOLE)), range(8)):
        text = bytearray(WHOLE)
        text[place] ^= 1 << bit
        if place < len(good[0]):
            with pytest.raises(ValueError, match="t.csv, line 1: found .* expected step,loss,name"):
                reopened(path, text)
            assert path.read_bytes() == text
            continue
        rows, lines = reopened(path, text)
        said, most = capsys.readouterr().err, 1 + (WHOLE[place] == 10)
        assert 3 >= len(rows) == len(lines) - 1 >= 3 - most and lines[0] == good[0]
        assert len(set(good) - set(lines)) <= most
        assert not any('"' in row["name"] for row in rows)
        if len(rows) < 3:
            assert re.search(rf"^{path}, line [234] is damaged and goes.*: b", said)
            assert Path(f"{path}.damaged").read_bytes() == text


def test_what_is_appended_can_be_read(tmp_path):
    table, good = Table(tmp_path / "t.csv", COLUMNS), (7, -1.5e-7, 'a "b", c')
    for bad in (("1=cmd", 0.5, ""), (8, "x", ""), (8, 0.5, "a\nb"), (8, 0.5, os.fsdecode(b"\xff"))):
        with pytest.raises(ValueError, match="t.csv: cannot hold (step|loss|name) = '"):
            table.append(good, bad)
    table.append(good, (8, float("inf"), None))
    table.file.close()
    rows, _ = reopened(table.path, table.path.read_bytes())
    assert [list(row.values()) for row in rows] == [["7", "-1.5e-07", 'a "b", c'], ["8", "inf", ""]]
    table.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError) as full:
        table.append(good)
    assert explain(full.value) == "/dev/full: No space left on device"


def test_the_folder_explains_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without git, too
    run_here(data, tmp_path)
    launch = json.loads((tmp_path / "launches.jsonl").read_text())
    assert launch["torch"] == torch.__version__ and launch["git_commit"] is None and launch["cpu"]
    assert "step     11/12 | loss" in (tmp_path / "log.txt").read_text()


class Disk:
    """What would be left without power: bytes as they were when their file was last synced.

    It learns that from this process's os.fsync. When a checkpoint has got its name, the whole run
    folder is copied as it would be found then: every name there is, with the synced bytes alone.
    """

    def __init__(self, run, images, monkeypatch):
        self.run, self.images, self.bytes, self.events = run, images, {}, []
        self.real_rename = os.rename
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "rename", self.rename)

    def fsync(self, descriptor):
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_file():
            self.bytes[path.stat().st_ino] = path.read_bytes()
        else:
            self.events.append(path.resolve())

    def rename(self, before, after):
        self.real_rename(before, after)
        self.events.append(Path(after))
        if re.fullmatch(r"step\d+", Path(after).name):
            def synced(source, target):
                Path(target).write_bytes(self.bytes.get(os.stat(source).st_ino, b""))
            shutil.copytree(self.run, self.images / Path(after).name, copy_function=synced)


def test_a_run_goes_on_to_the_same_bits_after_a_power_failure(data, tmp_path, monkeypatch):
    """Whenever a checkpoint has got its name, all of it and of the tables is on the disk."""
    settings = dict(intervention="term_drop", terms="e,t,a")
    run, images = tmp_path / "run", tmp_path / "images"
    with monkeypatch.context() as patch:
        disk = Disk(run, images, patch)
        run_here(data, run, **settings)
    for step in saved_steps(run):
        image, folder = images / f"step{step}", run / f"step{step}"
        for path in (path for path in folder.rglob("*") if path.is_file()):
            assert (image / path.relative_to(run)).read_bytes() == path.read_bytes()
        for name in ("metrics", "interventions"):
            assert table(image / f"{name}.csv") == [
                row for row in table(run / f"{name}.csv") if int(row["step"]) < step]
        # The name itself is on the disk before training goes on.
        assert disk.events[disk.events.index(folder) + 1] == run
    assert table(run / "interventions.csv")
    shutil.copytree(images / "step8", tmp_path / "again")
    run_here(data, tmp_path / "again", **settings)
    assert_same_bits(run, tmp_path / "again")
    noted, again = (folder / "interventions.csv" for folder in (run, tmp_path / "again"))
    assert noted.read_bytes() == again.read_bytes()
