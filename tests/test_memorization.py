"""python -m pytest tests/test_memorization.py"""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import write
from test_model import transformers_twin

from model import ModelConfig, Pythia
from studies.memorization import generated_matches, matched_lengths
from studies.poisson import poisson_tests, window_counts

ROOT = Path(__file__).parent.parent
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
    assert generated_matches(model, rows, context).tolist() == right.sum(1).tolist()
    if context == 8:  # or this tests little
        assert len(set(lengths.tolist())) > 5 and 32 in lengths


def test_poisson_tests_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.RandomState(0)
    for rate in (0.3, 2.0, 30.0):
        counts = generator.poisson(rate, 400)
        tests = poisson_tests(counts)
        expected = stats.chi2.sf(((counts - counts.mean())**2).sum() / counts.mean(), 399)
        assert tests["dispersion"][1] == pytest.approx(2 * min(expected, 1 - expected), rel=1e-6)
        x = np.arange(400) - 199.5
        z = (x * counts).sum() / np.sqrt(counts.mean() * (x**2).sum())
        assert tests["trend"][1] == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-6)


@pytest.mark.parametrize("test", ["dispersion", "trend", "fit"])
def test_p_values_are_uniform_under_the_null_and_small_under_each_alternative(test):
    generator = np.random.RandomState(1)
    null = [poisson_tests(generator.poisson(3.0, 200))[test][1] for _ in range(400)]
    assert 0.02 <= np.mean(np.array(null) < 0.05) <= 0.085
    alternative = {"dispersion": lambda: generator.negative_binomial(3, 0.5, 200),
                   "trend": lambda: generator.poisson(np.linspace(2, 4, 200)),
                   "fit": lambda: 3 + (generator.rand(200) < 0.5) * generator.choice([-3, 3], 200)}[test]
    assert np.mean([poisson_tests(alternative())[test][1] < 0.05 for _ in range(20)]) > 0.9


def test_windows_are_whole():
    assert window_counts(np.array([1, 1, 0, 1, 1, 1, 1], dtype=bool), 3).tolist() == [2, 3]


def run(*argv, expect=0):
    done = subprocess.run([sys.executable, "-m", *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("run")
    generator = np.random.RandomState(0)
    repeated = generator.randint(96, size=17)
    write(folder / "rows", [repeated if i % 2 else generator.randint(96, size=17) for i in range(280)])
    run("train", "--n_layers=1", "--d_model=64", "--n_heads=2", "--seq_length=16", "--vocab_size=96", "--steps=64",
        "--batch_size=4", "--micro_batch_size=4", "--learning_rate=1e-2", f"--data={folder}/rows",
        f"--tokenizer={tokenizer_path}", f"--out_dir={folder}/run")
    return folder


def test_scoring_goes_on_and_splits_over_processes(trained, tmp_path):
    flags = ["studies.memorization", "score", f"--model={trained}/run", "--context=8", "--continuation=8",
             "--batch=16", "--steps=1,64", "--generate=True"]
    run(*flags, f"--output={tmp_path}/one")
    whole = np.load(tmp_path / "one" / "run_step64.npy")
    assert whole.tolist()[1:260:2] == [8] * 130 and (whole[::2] < 8).all() and len(whole) == 280
    (tmp_path / "one" / "run_step64.npy").rename(tmp_path / "one" / "run_step64.npy.partial")
    partial = np.load(tmp_path / "one" / "run_step64.npy.partial", mmap_mode="r+")
    partial[16:99] = 255
    partial.flush()
    run(*flags, f"--output={tmp_path}/one")
    assert np.load(tmp_path / "one" / "run_step64.npy").tolist() == whole.tolist()
    run("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", *flags, f"--output={tmp_path}/two")
    for name in ("run_step1", "run_step64", "run_step64_generated"):
        assert np.load(tmp_path / "two" / f"{name}.npy").tolist() == np.load(tmp_path / "one" / f"{name}.npy").tolist()
    assert "context was 8, is 4" in run(*flags, "--context=4", f"--output={tmp_path}/one", expect=2).stderr

    run("studies.memorization", "analyse", f"--results={tmp_path}/one", "--windows=8,32")
    with open(tmp_path / "one" / "rates.csv") as file:
        rates = {(row["step"], row["rows"]): row for row in csv.DictReader(file)}
    assert rates["64", "seen"]["memorized"] == "128" and rates["64", "seen"]["n"] == "256"
    assert rates["1", "seen"]["n"] == "4" and rates["1", "not seen"]["n"] == "276"


@pytest.mark.parametrize("flags, words", [
    (["score", "--model=nowhere", "--output=x"], "nowhere: neither a run folder"),
    (["analyse", "--results=nowhere"], "nowhere/memorization.json"),
    (["score", "--model=x", "--output=y", "--context=0"], "expected positive numbers")])
def test_a_mistake_is_one_line(flags, words):
    done = run("studies.memorization", *flags, expect=2)
    assert words in done.stderr and done.stderr.count("\n") == 1
