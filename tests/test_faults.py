"""pytest tests/test_faults.py; pytest tests/test_faults.py -m proof -s prints the table of faults.

Real processes and real file systems: after every fault each listed checkpoint agrees with its
hashes, training can resume from the newest, and nothing else was changed.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import config
from checkpoints import (is_whole, load_model, load_training, lock, read_manifest, saved_steps,
                         sha256_of, step_folders)
from conftest import ROOT, table
from launch import Launched, Saver
from test_train import assert_same_bits, data, run_here  # noqa: F401


def hashes(folder):
    return {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def save(run):
    return Saver(run)


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.proof)])
def test_a_kill_at_a_random_moment_loses_at_most_the_save_under_way(run, save, count):
    """`-m proof -s` prints what a hundred kills lost: the most of any one of them."""
    random.seed(count)
    n_saved = most_lost = 0
    for _ in range(count):
        saver = Launched(["tests/launch.py", "without_pause", run])
        saver.wait_until(saver.printed("begun"))
        time.sleep(random.uniform(0, 0.25))
        saver.send(signal.SIGKILL)
        lines = [line.split() for line in saver.finish().stdout.splitlines()]
        begun, saved = ([int(step) for said, step in lines if said == word]
                        for word in ("begun", "saved"))
        there = saved_steps(run)
        assert not saved or there[-1] >= saved[-1], (saved, there)
        if there:
            assert saved_steps(run, state=True)[-1] == there[-1]
            assert load_training(run, there[-1], save.model, save.optimizer)
        for _, folder in step_folders(run):
            assert is_whole(folder), folder
            for file, entry in read_manifest(folder)[0].items():
                assert sha256_of(folder / file) == entry["sha256"], (folder, file)
        # Scheduled ones stay, and so does the last: an unscheduled one gives way to the next.
        assert {step for step in range(max(there, default=0)) if step % 3} <= set(there)
        lost = [step for step in begun if step not in there and (step % 3 or step == begun[-1])]
        n_saved, most_lost = n_saved + len(saved), max(most_lost, len(lost))
    print({"tried": count, "saved": n_saved, "lost": most_lost})
    assert most_lost <= 1 and n_saved > 0


@pytest.mark.skipif(subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
                    reason="mounting a small disk takes root")
def test_a_full_disk_loses_the_new_checkpoint_only(run):
    """A disk of 3 MB, which the saver alone sees; made larger, the run goes on."""
    mount = f'mount -t tmpfs -o size=3m tmpfs {run}\nexec "$@"'
    done = subprocess.run(["unshare", "-m", "sh", "-ec", mount, "sh", sys.executable,
                           "tests/launch.py", "fill_disk", run], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "No space left on device" in done.stdout, done.stderr


def test_a_vanished_folder_is_not_made_again(run, save, capsys):
    save(0)
    gone = run.rename(run.with_name("gone"))
    with pytest.raises(SystemExit, match="2"):
        config.run(save, 1)
    assert f"{run}/.step1.tmp: No such file or directory" in capsys.readouterr().err
    assert not run.exists() and saved_steps(gone) == [0]


def test_two_processes_cannot_write_one_run(run):
    holder = Launched(["tests/launch.py", "without_pause", run])
    holder.wait_until(holder.printed("saved"))
    with pytest.raises(ValueError, match="another process is writing there"):
        lock(run)
    holder.send(signal.SIGKILL)  # however it ends, the next one may write
    holder.finish()
    lock(run)


def test_links_lead_nowhere(tmp_path, run, save):
    """Files of another run whose checkpoint is linked here stay, and .step9.tmp's target, too."""
    for name in ("other", "precious"):
        (tmp_path / name).mkdir()
    (tmp_path / "precious/file").write_text("mine")
    save(1, tmp_path / "other", scheduled=False)
    before = hashes(tmp_path / "other") | hashes(tmp_path / "precious")
    (run / "step1").symlink_to(tmp_path / "other/step1")
    (run / "step7").symlink_to(tmp_path / "nowhere")
    (run / ".step9.tmp").symlink_to(tmp_path / "precious")
    lock(run)
    save(2), save(3, state_every=4), save(7)
    assert hashes(tmp_path / "other") | hashes(tmp_path / "precious") == before
    assert saved_steps(run) == [1, 2, 3, 7]


def test_a_damaged_checkpoint_is_passed_over_and_kept_aside(run, save):
    moments = "optimizer/moments.safetensors"
    save(0), save(1), save(2)
    (run / "step5").mkdir()  # empty
    (run / "step2/unreadable").symlink_to("/proc/self/mem")
    for size, broken in ((100, "step2.broken"), (50, "step2.broken1")):
        os.truncate(run / "step2" / moments, size)
        assert saved_steps(run) == [0, 1]
        save(2)
        assert saved_steps(run) == [0, 1, 2]
        assert (run / broken / moments).stat().st_size == size
    assert (run / "step2.broken" / moments).stat().st_size == 100


def test_a_damaged_manifest_of_an_earlier_step_is_left_alone(run, save):
    save(1), save(2)
    (run / "step1/manifest.json").write_text("5 {")
    before = hashes(run / "step1")
    save(3, state_every=4)
    assert saved_steps(run, state=True) == [3] and saved_steps(run) == [2, 3]
    assert hashes(run / "step1") == before


def test_moments_stay_on_the_grid_and_in_the_newest_even_of_a_run_that_goes_back(run, save):
    """The newest is damaged, so the run saves steps again of which the moments were removed."""
    for step in range(11):
        save(step, state_every=4)
    assert saved_steps(run) == list(range(11)) and saved_steps(run, state=True) == [0, 4, 8, 10]
    assert [step for step, folder in step_folders(run)
            if (folder / "optimizer/moments.safetensors").exists()] == [0, 4, 8, 10]
    load_model(run / "step5")
    assert load_training(run, 5, save.model, None)["updates"] == 1  # weights alone
    os.truncate(run / "step10/optimizer/moments.safetensors", 100)
    assert saved_steps(run, state=True) == [0, 4, 8]
    for step in (9, 10):
        save(step, state_every=4)
        assert saved_steps(run, state=True)[-1] == step
    assert saved_steps(run) == list(range(11))
    assert [path.name for path in run.glob("*.broken*")] == ["step10.broken"]  # 9 had equal bits


def test_a_checkpoint_of_other_bits_stays_beside_what_replaces_it(run, save):
    for step in range(3):
        save(step, state_every=4)
    before = sorted(hashes(run / "step1").values())
    with torch.no_grad():
        save.model.embed_in.weight += 1
    save(1, state_every=4)
    assert sorted(hashes(run / "step1.broken").values()) == before
    assert saved_steps(run, state=True) == [0, 1, 2] == saved_steps(run)


class Disk:
    """A disk after a power failure: a file has the bytes that it had at its last os.fsync.

    Whenever a checkpoint is renamed to stepN, the run folder is copied as it would be found if the
    power failed then: with all its names, but only the bytes that were synced.
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
    """When a checkpoint is renamed, all its bytes and those of the tables are on the disk."""
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
        # The new name, too, is synced before training continues.
        assert disk.events[disk.events.index(folder) + 1] == run
    assert table(run / "interventions.csv")
    shutil.copytree(images / "step8", tmp_path / "again")
    run_here(data, tmp_path / "again", **settings)
    assert_same_bits(run, tmp_path / "again")
    noted, again = (folder / "interventions.csv" for folder in (run, tmp_path / "again"))
    assert noted.read_bytes() == again.read_bytes()
