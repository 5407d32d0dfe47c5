"""pytest tests/test_faults.py; pytest tests/test_faults.py -m proof -s prints the table of faults.

Real processes and real file systems: after every fault each listed checkpoint is whole to the hash,
the newest whole one can be gone on from, and nothing else was touched.
"""

import os
import subprocess
import sys

import pytest
import torch

import config
from checkpoints import (load_model, load_training, lock, manifest_of, saved_steps, sha256_of,
                         step_folders)
from conftest import ROOT
from launch import ENVIRONMENT
from saver import Saver


def saver(*arguments, mounts=None, expect=0):
    """Run saver.py in a process of its own, after mounts that it alone sees."""
    command = [sys.executable, "tests/saver.py", *map(str, arguments)]
    if mounts:
        command = ["unshare", "-m", "sh", "-ec", f"{mounts}\nexec \"$@\"", "sh", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == expect, done.stderr
    return done


needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="mounting a small disk takes root")


def hashes(folder):
    return {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [15, pytest.param(100, marks=pytest.mark.proof)])
def test_a_kill_at_a_random_moment_loses_at_most_the_save_under_way(tmp_path, count):
    """`-m proof -s` prints what a hundred kills lost: the most of any one of them."""
    done = saver("kill_often", tmp_path, count, count)
    rows = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    begun, saved, lost = zip(*rows, strict=True)
    print({"tried": len(rows), "saves begun": sum(begun), "saved": sum(saved), "lost": max(lost)})
    assert len(rows) == count and max(lost) <= 1 and sum(saved) > 0


@needs_mounts
def test_a_full_disk_loses_the_new_checkpoint_only(tmp_path):
    """A disk of 3 MB: saving stops with an OSError that says so; made larger, the run goes on."""
    done = saver("fill_disk", tmp_path, mounts=f"mount -t tmpfs -o size=3m tmpfs {tmp_path}")
    assert "No space left on device" in done.stdout


@needs_mounts
def test_a_read_only_folder_is_an_error_and_nothing_else(tmp_path, save):
    save(0)
    before, run = hashes(tmp_path), tmp_path / "run"
    done = saver("save_once", run, expect=2,
                 mounts=f"mount --bind {run} {run}\nmount -o remount,bind,ro {run}")
    assert "Read-only file system" in done.stderr and len(done.stderr.splitlines()) == 1
    assert hashes(tmp_path) == before


def test_a_vanished_folder_is_not_made_again(tmp_path, save, capsys):
    save(0)
    os.rename(tmp_path / "run", tmp_path / "gone")
    with pytest.raises(SystemExit, match="2"):
        config.run(save, 1)
    assert capsys.readouterr().err == f"{tmp_path / 'run/.step1.tmp'}: No such file or directory\n"
    assert os.listdir(tmp_path) == ["gone"] and saved_steps(tmp_path / "gone") == [0]


def test_two_processes_cannot_write_one_run(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import checkpoints, sys; checkpoints.lock(sys.argv[1]); print(1, flush=True); input()",
         tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    with pytest.raises(ValueError, match="another process is writing there"):
        lock(tmp_path)
    holder.kill()  # however it ends, the next one may write
    holder.wait()
    lock(tmp_path)


@pytest.fixture
def save(tmp_path):
    (tmp_path / "run").mkdir()
    return Saver(tmp_path / "run")


def test_links_lead_nowhere(tmp_path, save):
    """Neither another run's checkpoint linked into this one is emptied, nor what .step9.tmp is."""
    run = tmp_path / "run"
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


def test_a_damaged_checkpoint_is_passed_over_and_kept_aside(tmp_path, save):
    run = tmp_path / "run"
    save(0), save(1), save(2)
    os.truncate(run / "step2/optimizer/moments.safetensors", 100)
    (run / "step5").mkdir()  # empty
    assert saved_steps(run) == [0, 1]
    save(2)
    assert saved_steps(run) == [0, 1, 2]
    assert (run / "step2.broken/optimizer/moments.safetensors").stat().st_size == 100
    os.truncate(run / "step2/optimizer/moments.safetensors", 50)
    save(2)
    assert saved_steps(run) == [0, 1, 2]
    assert (run / "step2.broken/optimizer/moments.safetensors").stat().st_size == 100
    assert (run / "step2.broken1/optimizer/moments.safetensors").stat().st_size == 50


def test_a_damaged_manifest_of_an_earlier_step_is_left_alone(tmp_path, save):
    run = tmp_path / "run"
    save(1), save(2)
    (run / "step1/manifest.json").write_text("5 {")
    before = hashes(run / "step1")
    save(3, state_every=4)
    assert saved_steps(run, state=True) == [3] and saved_steps(run) == [2, 3]
    assert hashes(run / "step1") == before


def test_moments_stay_on_the_grid_and_in_the_newest(tmp_path, save):
    run = tmp_path / "run"
    for step in range(11):
        save(step, state_every=4)
    assert saved_steps(run) == list(range(11)) and saved_steps(run, state=True) == [0, 4, 8, 10]
    assert [step for step, folder in step_folders(run)
            if (folder / "optimizer/moments.safetensors").exists()] == [0, 4, 8, 10]
    load_model(run / "step5")
    assert load_training(run, 5, save.model, save.optimizer) is None  # weights alone
    small, large = (sum(entry["bytes"] for entry in manifest_of(run / f"step{n}").values())
                    for n in (5, 8))
    assert 2.8 < large / small < 3.2


def test_a_run_that_goes_back_has_moments_in_its_newest_all_the_way(tmp_path, save):
    """Its newest is damaged, so it passes checkpoints again that have given up their moments."""
    run = tmp_path / "run"
    for step in range(7):
        save(step, state_every=4)
    os.truncate(run / "step6/optimizer/moments.safetensors", 100)
    assert saved_steps(run, state=True) == [0, 4]
    for step in (5, 6):
        save(step, state_every=4)
        assert saved_steps(run, state=True)[-1] == step
    assert saved_steps(run) == list(range(7))
    assert [path.name for path in run.glob("*.broken*")] == ["step6.broken"]  # 5 had equal bits


def test_a_checkpoint_of_other_bits_stays_beside_what_replaces_it(tmp_path, save):
    run = tmp_path / "run"
    for step in range(3):
        save(step, state_every=4)
    before = sorted(hashes(run / "step1").values())
    with torch.no_grad():
        save.model.embed_in.weight += 1
    save(1, state_every=4)
    assert sorted(hashes(run / "step1.broken").values()) == before
    assert saved_steps(run, state=True) == [0, 1, 2] == saved_steps(run)
