"""python -m pytest tests/test_memorization.py"""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import launch, table, train
from test_data import write
from test_model import transformers_twin

from config import write_json
from data import order_of
from model import ModelConfig, Pythia
from plots import poisson_quantiles
from studies.memorization import (
    Analyse, Position, Score, analyse, matched_lengths, poisson_tests, position, score,
    window_counts)

CONFIG = ModelConfig(n_layers=2, d_model=64, n_heads=2, vocab_size=96, seq_length=40)


@pytest.fixture(scope="module")
def learnt():
    """A model that has learnt some rows better than others, and all rows (64, 40)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(96, (64, 40), generator=generator)
    model = Pythia(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i in range(80):
        chosen = rows[:48] if i % 4 == 0 else rows[:24]  # 24 rows often, 24 seldom, 16 never
        model(chosen[:, :-1], chosen[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, rows


@pytest.mark.parametrize("context, stages", [(8, (1, 4, 16)), (1, ()), (16, (3,)), (39, (1, 4))])
def test_lengths_equal_greedy_decoding_with_transformers(learnt, context, stages):
    model, rows = learnt
    twin, _ = transformers_twin(model)
    prompt = rows[:, :context]  # without a mask transformers would take token 0 for padding
    out = twin.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40 - context,
                        do_sample=False, eos_token_id=None, pad_token_id=0)
    right = out[:, context:] == rows[:, context:]
    expected = right.long().cumprod(1).sum(1)
    lengths = matched_lengths(model, rows, context, stages)
    assert lengths.tolist() == expected.tolist()
    if context == 8:  # or this tests little
        assert len(set(lengths.tolist())) > 5 and 32 in lengths


def test_poisson_tests_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    memorized = np.random.RandomState(0).rand(40 * 64) < 0.03
    counts = window_counts(memorized, 64)
    tests = poisson_tests(counts, 64)
    expected = stats.chi2.sf(((counts - counts.mean())**2).sum() / counts.mean(), 39)
    assert tests["dispersion"][1] == pytest.approx(2 * min(expected, 1 - expected), rel=1e-6)
    x = np.arange(40) - 19.5
    z = (x * counts).sum() / np.sqrt(counts.var(ddof=1) * (x**2).sum())
    assert tests["trend"][1] == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-6)


@pytest.mark.parametrize("n, mean", [(9, 0.0), (400, 0.3), (400, 30.0), (300_000, 3.0), (99, 2e4)])
def test_poisson_quantiles_equal_scipys(n, mean):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.poisson.ppf((np.arange(n) + 0.5) / n, mean)
    assert poisson_quantiles(n, mean).tolist() == expected.tolist()


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tokenizer_path):
    """Settings of a score, whose results are there: every other row is the same."""
    folder, generator = tmp_path_factory.mktemp("run"), np.random.RandomState(0)
    repeated = generator.randint(96, size=17)
    write(folder / "rows", [repeated if i % 2 else generator.randint(96, size=17)
                            for i in range(280)], preshuffled=True)
    train("--d_model=64", "--vocab_size=96", "--steps=64", f"--data={folder}/rows",
          f"--out_dir={folder}/run")
    options = Score(model=f"{folder}/run", output=f"{folder}/one", context=8, continuation=8,
                    batch=16, steps="1,64")
    score(options)
    return options


def lengths(folder, name="run_step64"):
    return np.load(f"{folder}/{name}.npy").tolist()


def test_scoring_goes_on(scored, tmp_path):
    whole = lengths(scored.output)
    assert whole[1:260:2] == [8] * 130 and max(whole[::2]) < 8 and len(whole) == 280
    partial = np.array(whole, dtype=np.uint8)
    partial[16:99], partial[200] = 255, 77  # rows that are to do, and one that no model would give
    np.save(tmp_path / "partial", partial)
    (tmp_path / "partial.npy").rename(tmp_path / "run_step64.npy.partial")
    score(replace(scored, output=str(tmp_path)))
    assert lengths(tmp_path) == whole[:200] + [77] + whole[201:]
    assert lengths(tmp_path, "run_step1") == lengths(scored.output, "run_step1")
    with pytest.raises(ValueError, match="context was 8, is 4; name another folder"):
        score(replace(scored, output=str(tmp_path), context=4))
    with pytest.raises(ValueError):  # what failed before it began leaves its folder to others
        score(replace(scored, output=f"{tmp_path}/failed", device="none"))
    assert not (tmp_path / "failed").exists()


def test_processes_share_the_rows_and_one_of_them_speaks(scored, tmp_path):
    flags = [f"--{name}={value}"
             for name, value in asdict(replace(scored, output=tmp_path)).items()]
    done = launch("studies/memorization.py", "score", *flags, count=2)
    names = ["run_step1", "run_step64"]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        f"{tmp_path}/{name}.npy" for name in names]
    assert all(lengths(tmp_path, name) == lengths(scored.output, name) for name in names)


def test_analysis_by_hand(scored):
    np.save(f"{scored.output}/my_step_by_step.npy", 0)  # is not of `score`
    analyse(Analyse(scored.output, window=8, plot=f"{scored.output}/m.png"))
    rates = {(row["step"], row["rows"]): row for row in table(f"{scored.output}/rates.csv")}
    assert rates["64", "seen"]["memorized"] == "128" and rates["64", "seen"]["n"] == "256"
    assert rates["1", "seen"]["n"] == "4" and rates["1", "not seen yet"]["n"] == "276"
    counts = {(row["step"], row["window"], row["test"]): row for row in
              table(f"{scored.output}/poisson.csv")}
    # Every other row is memorized: each window of 8 has 4, which is less than chance would spread.
    row = counts["64", "8", "dispersion"]
    assert (row["n"], row["mean"], row["share"], row["statistic"]) == ("32", "4", "0.5", "0")
    assert row["permutation_p"] == "0.002"
    assert counts["1", "8", "dispersion"]["mean"] == ""  # four rows are no window


def test_runs_of_different_orders_are_refused(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_json(tmp_path / name / "config.json", {
            "data": "d", "steps": 8, "batch_size": 4, "seq_length": 16, "seed": seed})
    with pytest.raises(ValueError, match="/a,.*/b were trained in different orders"):
        score(Score(model=f"{tmp_path}/a,{tmp_path}/b", output=f"{tmp_path}/out"))


def test_position_is_tested_on_losses_of_rows(scored, tmp_path):
    """With losses made by hand: what the run learnt late in training it knows better."""
    generator = np.random.default_rng(0)
    order = asdict(order_of(scored.model))
    values = generator.standard_normal((3, 40, 5)).astype(np.float32)
    values[1] -= 9  # an earlier checkpoint, which is not the last
    values[2] = values[0] - np.linspace(0, 3, 40)[:, None] + 0.1 * values[2]
    np.save(tmp_path / "rows.npy", values)
    write_json(tmp_path / "rows.json", {
        "order": order, "rows": [0, 40],
        "checkpoints": [["other", "8"], ["run", "4"], ["run", "8"]]})
    position(Position(f"{tmp_path}/rows", "run", "other", f"{tmp_path}/rows.csv"))
    line, hump = table(tmp_path / "rows.csv")
    assert line["n"] == "40" and float(line["permutation_p"]) < 0.01
    assert float(line["value"]) == pytest.approx(3, abs=0.2) and abs(float(hump["value"])) < 0.2
    with pytest.raises(ValueError, match="not losses of rows of run and third, .*'third'"):
        position(Position(f"{tmp_path}/rows", "run", "third"))
