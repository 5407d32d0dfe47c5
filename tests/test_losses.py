"""python -m pytest tests/test_losses.py: eval.py losses, and the place that they are asked by."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_data import random_documents, write

from checkpoints import load_model
from eval import LossesConfig, loglikelihood, losses, score
from data import order_of, ordered
from studies.memorization import Position, position
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_path):
    """Two runs of other orders on the same documents."""
    folder = tmp_path_factory.mktemp("losses")
    write(folder / "d", random_documents(np.random.RandomState(0).randint(5, 60, 60)))
    for seed in (1, 2):
        subprocess.run([
            sys.executable, "train.py", "--n_layers=1", "--d_model=16", "--n_heads=2",
            "--seq_length=16", "--steps=8", "--batch_size=8", "--micro_batch_size=8",
            "--learning_rate=1e-2", "--vocab_size=50304",
            f"--seed={seed}", f"--data={folder}/d", f"--tokenizer={tokenizer_path}",
            f"--out_dir={folder}/seed{seed}"], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def whole(runs):
    losses(LossesConfig(f"{runs}/whole", model=f"{runs}/seed1,{runs}/seed2", rows="3:20"))
    return np.load(f"{runs}/whole.npy"), json.loads((runs / "whole.json").read_text())


def test_losses_are_the_evaluations_loglikelihoods(runs, whole):
    values, what = whole
    assert what["checkpoints"] == [[f"seed{seed}", str(step)] for seed in (1, 2)
                                   for step in (0, 1, 2, 4, 8)]
    assert values.shape == (10, 17, 16) and values.dtype == np.float32
    rows = ordered(order_of(f"{runs}/seed1")).rows(range(3, 20)).tolist()
    model = load_model(runs / "seed2" / "step4", "cpu")
    expected = [-ll for ll, _ in score(model, [(row, 16) for row in rows])]
    np.testing.assert_allclose(values[8].sum(axis=1), expected, rtol=1e-6)
    # A token's alone: the last of a row, behind all others.
    alone = [-ll for ll, _ in score(model, [(row[:6], 1) for row in rows])]
    np.testing.assert_allclose(values[8, :, 4], alone, atol=1e-5)


def test_texts_are_rows_of_their_own_length(runs, tokenizer_path):
    texts = ["one two three", "a", "four five six seven eight nine"]
    (runs / "t.jsonl").write_text("".join(
        json.dumps({"id": f"text {i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    losses(LossesConfig(f"{runs}/t", model=f"{runs}/seed1", text=f"{runs}/t.jsonl", steps="4,8",
                        tokenizer=str(tokenizer_path)))
    values, tokenizer = np.load(runs / "t.npy"), Tokenizer(tokenizer_path)
    assert np.isfinite(values).sum(axis=2).tolist() == [
        [len(tokenizer.encode(text)) for text in texts]] * 2
    model = load_model(runs / "seed1" / "step8", "cpu")
    expected = [-ll for ll, _ in loglikelihood(model, tokenizer, [("", text) for text in texts])]
    np.testing.assert_allclose(np.nansum(values[1], axis=1), expected, rtol=1e-6)
    assert json.loads((runs / "t.json").read_text())["documents"] == ["text 0", "text 1", "text 2"]


def test_rows_of_other_data_say_what_the_run_was_trained_on(runs, whole):
    write(runs / "other", random_documents([300, 200], seed=1))
    losses(LossesConfig(f"{runs}/o", model=f"{runs}/seed1", data=f"{runs}/other", rows="0:2", steps="8"))
    what = json.loads((runs / "o.json").read_text())
    assert what["order"]["data"] == f"{runs}/other" and what["trained_on"] == f"{runs}/d"
    assert "trained_on" not in whole[1]


def test_losses_go_on_whatever_the_batch_or_the_processes(runs, whole, tmp_path):
    values, what = whole
    model, flags = f"{runs}/seed1,{runs}/seed2", dict(rows="3:20", batch_tokens=40)
    losses(LossesConfig(f"{tmp_path}/small", model=model, **flags))
    np.testing.assert_allclose(np.load(tmp_path / "small.npy"), values, atol=1e-5)
    partial = values.copy()
    partial[5:] = 0  # a kill
    partial[4] += 7  # a number that no model would give: it is there, so it stays
    np.save(tmp_path / "cut.npy", partial)
    (tmp_path / "cut.json").write_text(json.dumps(what | {"checkpoints": what["checkpoints"][:5]}))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", "eval.py", "losses", f"--model={model}",
                    f"--output={tmp_path}/cut", "--rows=3:20"], cwd=ROOT, check=True)
    values = values.copy()
    values[4] += 7
    np.testing.assert_allclose(np.load(tmp_path / "cut.npy"), values, atol=1e-5)
    with pytest.raises(ValueError, match="of other checkpoints or rows; name another --output"):
        losses(LossesConfig(f"{tmp_path}/cut", model=model, rows="3:21"))
    with pytest.raises(ValueError, match="rows = '0:9999', expected a number from 0 to "):
        losses(LossesConfig(f"{tmp_path}/none", model=model, rows="0:9999"))


def test_position_is_tested_on_rows_and_on_planted_documents(runs, whole, tmp_path):
    """With losses made by hand: what the run learnt late in training it knows better."""
    generator = np.random.default_rng(0)
    order = whole[1]["order"]
    plan = [{"id": str(i), "group": "early" if i < 20 else "late", "text": "x", "steps": [i]}
            for i in range(40)] + [{"id": "never", "text": "x", "steps": []}]
    (tmp_path / "plan").write_text("".join(json.dumps(entry) + "\n" for entry in plan))
    for name, what, n in (("rows", {"order": order, "rows": [0, 40]}, 40),
                          ("plan", {"text": f"{tmp_path}/plan"}, 41)):
        values = generator.standard_normal((3, n, 5)).astype(np.float32)
        values[1] -= 9  # an earlier checkpoint, which is not the last
        values[2] = values[0] - np.linspace(0, 3, n)[:, None] + 0.1 * values[2]
        values[:, :3, 3:] = np.nan
        np.save(tmp_path / f"{name}.npy", values)
        (tmp_path / f"{name}.json").write_text(json.dumps(
            what | {"checkpoints": [["other", "8"], ["run", "4"], ["run", "8"]]}))
        position(Position(f"{tmp_path}/{name}", "run", "other", f"{tmp_path}/{name}.csv"))
        with open(tmp_path / f"{name}.csv") as file:
            line, hump, *rest = csv.DictReader(file)
        assert (line["subset"], line["n"]) == ("all", "40") and float(line["permutation_p"]) < 0.01
        assert float(line["value"]) == pytest.approx(3, abs=0.2) and abs(float(hump["value"])) < 0.2
        assert {row["subset"] for row in rest} == ({"unnamed"} if name == "rows" else
                                                   {"early", "late"})
    with pytest.raises(ValueError, match="no third among other, run"):
        position(Position(f"{tmp_path}/plan", "run", "third"))
