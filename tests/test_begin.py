"""pytest tests/test_begin.py"""

import pytest

from checkpoints import saved_steps
from launch import Launched
from test_train import command, data, losses, parent, published, run_here, train  # noqa: F401


@pytest.mark.parametrize("changes, words", [
    (dict(out_dir=""), "out_dir = '', expected a name"),
    (dict(heldout=""), "heldout = '', expected a name"),
    (dict(out_dir=__file__), "test_begin.py: File exists"),
    (dict(state_every=-1), "state_every = -1, expected at least 1\n"),
    (dict(warmup=2), "warmup = 2.0, expected at least 0, less than 1\n"),
    (dict(stop_at=-1), "stop_at = -1, expected at least 1\n"),
    (dict(stop_at=13), "stop_at = 13, but steps = 12\n"),
    (dict(gpus=0), "gpus = 0, expected at least 1\n"),
    (dict(intervention="pronouns_to_feminine", intervention_from=12),
     "intervention_from = 12, but the last step is 11\n")])
def test_a_mistake_is_one_line(data, tmp_path, changes, words):
    settings = dict(out_dir=tmp_path / "run") | changes
    done = Launched(command(data, settings.pop("out_dir"), **settings)).finish()
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_held_out_batches_are_not_repeated(data, tmp_path):
    with pytest.raises(ValueError, match=r"holds (\d+) rows of 33 tokens, too few for 1,000,000"
                       ) as error:
        run_here(data, tmp_path, heldout=data, heldout_batches=10**6)
    there = int(int(str(error.value).split("holds ")[1].split()[0]) / 1.005) // 8
    with pytest.raises(ValueError, match="too few"):
        run_here(data, tmp_path, heldout=data, heldout_batches=there + 1)
    run_here(data, tmp_path, heldout=data, heldout_batches=there, stop_at=1)


def test_a_run_says_why_it_ends(data, tmp_path, capsys):
    def said(**changes):
        run_here(data, tmp_path, **changes)
        return capsys.readouterr().out

    out = said(stop_at=2)
    assert "stopped at step 2 of 12 (--stop_at): the same command without it goes on" in out
    assert "done" not in out and "nothing is left" not in out
    out = said(stop_at=1)
    assert "step 2 is there already: nothing is left to train up to step 1\nstopped at" in out
    assert "done: 7 checkpoints" in said()
    assert "nothing is left to train up to step 12\ndone: 7" in said(heldout=data)


# ---------------------------------------------------------------------------- branches


def test_a_branch_that_cannot_begin_is_one_line(data, tmp_path, parent):
    def refused(words, **changes):
        with pytest.raises(ValueError, match=words):
            run_here(data, tmp_path / "child", **changes)

    swap = dict(intervention="pronouns_to_feminine", intervention_from=2)
    run_here(data, tmp_path / "swapped", stop_at=4, **swap)  # what the parent did goes on
    run_here(data, tmp_path / "on", stop_at=5, branch_from=tmp_path / "swapped/step4", **swap)
    (tmp_path / "swapped/step4/optimizer/moments.safetensors").unlink()
    refused("a file is missing or cut .*branch from another step",
            branch_from=tmp_path / "swapped/step4", warm_moments=2)


def test_a_branch_goes_on_with_another_spelling(data, tmp_path, parent):
    run_here(data, tmp_path, stop_at=8, branch_from=f"{parent}/step6/")
    run_here(data, tmp_path, branch_from=f"{parent}/step6")
    assert losses(tmp_path) == losses(parent)[6:] and saved_steps(tmp_path) == [8, 12]


def test_a_mistake_that_all_processes_meet_is_one_line(data, tmp_path, parent):
    for words, changes in (("batch_size = 7 is not a multiple", dict(batch_size=7)),
                           ("holds weights only and warm_moments = 0",
                            dict(branch_from=published(parent, 8, tmp_path)))):
        done = train(data, tmp_path / "run", 2, expect=2, **changes)
        assert words in done.stderr and done.stderr.count("\n") == 1
