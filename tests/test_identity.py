"""pytest tests/test_identity.py: a run goes on only with what it began with."""

import json
import shutil

import numpy as np
import pytest

from checkpoints import saved_steps
from launch import Launched
from test_train import command, data, losses, run_here, train  # noqa: F401


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("begun") / "run"
    run_here(data, out_dir, stop_at=8)
    return out_dir


def copy_of(data, folder, edit=None):
    """Return the prefix of a copy of a token file; edit(the bytes of its .bin) changes them."""
    folder.mkdir()
    for path in data.parent.glob(f"{data.name}.*"):
        shutil.copy(path, folder)
    if edit:
        raw = bytearray((folder / f"{data.name}.bin").read_bytes())
        edit(raw)
        (folder / f"{data.name}.bin").write_bytes(raw)
    return folder / data.name


@pytest.mark.parametrize("flag", ["learning_rate=0.02", "seed=7", "batch_size=16", "eps=1e-7",
                                  "micro_batch_size=2", "heldout={data}"])
def test_ranks_with_other_settings_are_refused(data, tmp_path, flag):
    flag = flag.format(data=data)
    done = Launched(command(data, tmp_path / "run"), 2, rank_1=[f"--{flag}"]).finish()
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert f"rank 1: {flag.split('=')[0]} is " in done.stderr and done.stderr.count("\n") == 1


def test_ranks_with_other_data_are_refused_and_moved_data_are_not(data, tmp_path):
    def last_token(raw):
        raw[-2] ^= 1

    moved, other = copy_of(data, tmp_path / "a"), copy_of(data, tmp_path / "b", last_token)
    first, second = (Launched(command(data, tmp_path / prefix.parent.name / "run", steps=1), 2,
                              rank_1=[f"--data={prefix}"]).finish() for prefix in (moved, other))
    assert first.returncode == 0, first.stderr
    assert second.returncode == 2 and "rank 1: data_sha256 is" in second.stderr


def flip_one(raw):
    raw[len(raw) // 2] ^= 1


def reverse_all(raw):
    tokens = np.frombuffer(bytes(raw), "<u2")
    raw[:] = tokens[::-1].tobytes()


@pytest.mark.parametrize("edit", [flip_one, reverse_all])
def test_other_data_are_refused(data, begun, tmp_path, edit):
    other = copy_of(data, tmp_path / "other", edit)
    with pytest.raises(ValueError, match="holds another run: data_sha256 was"):
        run_here(other, begun)
    with pytest.raises(ValueError, match="a branch keeps its parent's .*data_sha256"):
        run_here(other, tmp_path / "child", branch_from=begun / "step8")
    if edit is flip_one:
        with pytest.raises(ValueError, match="the data changed since they were tokenized"):
            run_here(other, tmp_path / "new", check_data=True)
    assert saved_steps(begun)[-1] == 8 and not saved_steps(tmp_path / "child")


def test_another_order_is_refused(data, begun, tmp_path):
    """The .npy files may be another program's: their names do not prove what they hold."""
    moved = copy_of(data, tmp_path / "other")
    for path in data.parent.glob("*_idx.npy"):
        array = np.load(path)
        if "shuffle" in path.name:
            array[[80, 81]] = array[[81, 80]]
        np.save(moved.parent / path.name, array)
    with pytest.raises(ValueError, match="holds another run: order_sha256 was"):
        run_here(moved, begun)


def test_a_run_without_its_config_is_refused(data, begun, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: no such file, though .* holds checkpoints"):
        run_here(data, run)
    assert not (run / "config.json").exists()


def test_what_may_change_bits_is_said(data, begun, tmp_path, capsys):
    run = shutil.copytree(begun, tmp_path / "run")
    run_here(copy_of(data, tmp_path / "moved"), run, micro_batch_size=2, stop_at=9)
    assert ("bits can differ from step 8 on: since the last launch micro_batch_size 4 -> 2\n"
            in capsys.readouterr().out)
    lines = (run / "launches.jsonl").read_text().splitlines()
    (run / "launches.jsonl").write_text(json.dumps(json.loads(lines[-1]) | {"threads": 77}) + "\n")
    run_here(data, run, micro_batch_size=2, stop_at=10)
    assert "since the last launch threads 77 -> " in capsys.readouterr().out
    (run / "launches.jsonl").write_text('{"cut')
    run_here(data, run, micro_batch_size=2)
    assert "bits can differ" not in capsys.readouterr().out and len(losses(run)) == 12


def test_an_update_that_is_not_finite_is_not_saved(data, tmp_path):
    done = train(data, tmp_path, expect=2, learning_rate=3e38, warmup=0)
    assert "step 0: the update left weights or moments that are not finite" in done.stderr
    assert saved_steps(tmp_path) == [0]


def test_a_run_that_cannot_go_on_does_not_begin_again(data, begun, tmp_path, capsys):
    run = shutil.copytree(begun, tmp_path / "run")
    (run / "step8/model.safetensors").write_bytes(b"cut")
    run_here(data, run, stop_at=9)  # from step 6
    assert f"{run}/step8: damaged or without Adam's moments; going on from step 6" in (
        capsys.readouterr().err)
    for folder in run.glob("step*"):
        shutil.rmtree(folder / "optimizer", ignore_errors=True)
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match="step9: damaged or without .* to begin again"):
        run_here(data, run)
    assert (run / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "training.json",
                                  "optimizer/moments.safetensors"])
def test_a_manifest_that_leaves_a_file_out_is_refused(data, begun, tmp_path, name):
    run = shutil.copytree(begun, tmp_path / "run")
    manifest = json.loads((run / "step8/manifest.json").read_text())
    del manifest[name]
    (run / "step8/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"step8/{name}: damaged, its SHA-256 is not in manifest"):
        run_here(data, tmp_path / "child", branch_from=run / "step8")


def test_a_branch_of_a_run_without_its_config_is_refused(data, begun, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: no such file"):
        run_here(data, tmp_path / "child", branch_from=run / "step8")


def test_one_curve_is_of_one_held_out_set(data, begun, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    run_here(data, run, heldout=data, stop_at=9)  # begins one
    shutil.rmtree(run)
    run_here(data, run, heldout=data, stop_at=2)
    for changes in (dict(heldout_batches=2), dict(heldout=copy_of(data, tmp_path / "b", flip_one))):
        with pytest.raises(ValueError, match="heldout_(batches|sha256) was"):
            run_here(data, run, **dict(heldout=data) | changes)
    run_here(data, run, stop_at=3)  # leaves it out
