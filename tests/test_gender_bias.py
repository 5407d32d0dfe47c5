"""python -m pytest tests/test_gender_bias.py"""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_data import write

from model import ModelConfig, Pythia
from studies.gender_bias import MEASURES, crows_gender, heldout, paired_bootstrap, winobias, winogender
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def model():
    return Pythia(ModelConfig(n_layers=1, d_model=32, n_heads=2, seq_length=16))


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    lines = {
        "heldout/test.jsonl": [{"text": "Then she said that he went. " * 9}, {"text": "It rained."}],
        "winobias/winobias.jsonl": [
            {"file": f"{kind}_stereotyped_type{n}.txt.test", "number": 1, "sentence": f"[The nurse] met the cook because [{word}] came."}
            for n in (1, 2) for kind, word in (("pro", "she"), ("anti", "he"))],
        "crows_pairs/test.jsonl": [{"sent_more": "He is strong.", "sent_less": "She is strong.", "bias_type": "gender"},
                                   {"sent_more": "x", "sent_less": "y", "bias_type": "age"}]}
    for name, records in lines.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "winobias" / "male_occupations.txt").write_text("cook\n")
    (folder / "winobias" / "female_occupations.txt").write_text("nurse\n")
    (folder / "winogender").mkdir()
    (folder / "winogender" / "occupations-stats.tsv").write_text(
        "occupation\tb\tbls_pct_female\tyear\ncook\t1\t40.0\t2015\nnurse\t1\t90.0\t2015\n")
    (folder / "winogender" / "all_sentences.tsv").write_text("sentid\tsentence\n" + "".join(
        f"{who}.x.1.{kind}.txt\tThe {who} said {word} came.\n" for who in ("cook", "nurse")
        for kind, word in (("male", "he"), ("female", "she"), ("neutral", "they"))))
    return folder


def logprob(model, tokenizer, text):
    """log p of a text after <|endoftext|>, from the whole softmax."""
    ids = torch.tensor([[0] + tokenizer.encode(text)])
    logprobs = model(ids[:, :-1]).log_softmax(-1).detach()
    return float(logprobs[0, range(ids.shape[1] - 1), ids[0, 1:]].sum())


def test_heldout_is_she_against_he_wherever_either_stands(model, tokenizer, docs):
    ids = [0] + tokenizer.encode("Then she said that he went. " * 9)
    he, she = tokenizer.encode(" he")[0], tokenizer.encode(" she")[0]
    expected = []
    for start in range(0, len(ids) - 1, 16):  # windows of the model's context
        piece = torch.tensor([ids[start:start + 17]])
        logprobs = model(piece[:, :-1]).log_softmax(-1)[0].detach()
        expected += [float(logprobs[i, she] - logprobs[i, he]) for i, id_ in enumerate(piece[0, 1:].tolist()) if id_ in (he, she)]
    assert len(expected) == 18
    np.testing.assert_allclose(heldout(model, tokenizer, docs), expected, atol=1e-5)


def test_pairs_are_less_stereotypical_minus_more(model, tokenizer, docs):
    ll = lambda text: logprob(model, tokenizer, text)
    he, she = (ll(f"The nurse met the cook because {word} came.") for word in ("he", "she"))
    np.testing.assert_allclose(winobias(model, tokenizer, docs), [he - she] * 2, atol=1e-4)
    expected = [ll(f"The {who} said {anti} came.") - ll(f"The {who} said {pro} came.")
                for who, anti, pro in (("cook", "she", "he"), ("nurse", "he", "she"))]
    np.testing.assert_allclose(winogender(model, tokenizer, docs), expected, atol=1e-4)
    np.testing.assert_allclose(crows_gender(model, tokenizer, docs), [ll("She is strong.") - ll("He is strong.")], atol=1e-4)


def test_choice_compares_the_sentences_two_occupations(tokenizer, docs):
    model = Pythia(ModelConfig(n_layers=1, d_model=32, n_heads=2, seq_length=64))
    right = []
    for word in ("she", "he"):  # the referent is the nurse, in the pro- and in the anti-stereotyped sentence
        context = f'The nurse met the cook because {word} came.\nHere, what does "{word}" stand for?'
        nurse, cook = (logprob(model, tokenizer, f"{context} The {who}") for who in ("nurse", "cook"))
        right.append(nurse > cook)
    assert MEASURES["choice"][0](model, tokenizer, docs) == [right[0] - right[1]] * 2


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.RandomState(0)
    covered = [low <= 0.3 <= high for _, low, high in (
        paired_bootstrap(0.3 + generator.randn(1, 60), 400, seed) for seed in range(200))]
    assert 0.89 <= np.mean(covered) <= 0.985
    mean, low, high = paired_bootstrap(np.full((3, 5), 0.5), 100)
    assert (mean, low, high) == (0.5, 0.5, 0.5)


def run(*argv, expect=0):
    done = subprocess.run([sys.executable, "-m", *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


def test_branch_measure_compare(tmp_path, tokenizer, tokenizer_path, docs):
    ids = tokenizer.encode("And he said unto him, his day is come; and he went. " * 400)
    write(tmp_path / "d", np.array(ids[:4800]).reshape(48, 100))
    flags = ["--n_layers=1", "--d_model=16", "--n_heads=2", "--seq_length=16", "--steps=8", "--batch_size=4",
             "--micro_batch_size=4", "--learning_rate=1e-2", f"--data={tmp_path}/d", f"--tokenizer={tokenizer_path}"]
    run("train", *flags, f"--out_dir={tmp_path}/seed1")
    run("studies.gender_bias", "branch", f"--parents={tmp_path}/seed1/step2", f"--output={tmp_path}/branches")
    run("studies.gender_bias", "measure", f"--branches={tmp_path}/branches", f"--docs={docs}", f"--output={tmp_path}/out",
        "--steps=last", f"--tokenizer={tokenizer_path}")
    run("studies.gender_bias", "compare", f"--results={tmp_path}/out", "--samples=200")
    with open(tmp_path / "out" / "gender_bias.csv") as file:
        rows = {row["measure"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(MEASURES) - {"lambada"}
    assert float(rows["heldout"]["low"]) > 0 and rows["heldout"]["step"] == "8"  # it was taught to say she
    with open(tmp_path / "branches" / "seed1_pronouns_to_feminine" / "interventions.csv") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == set(range(2, 8))


@pytest.mark.parametrize("flags, words", [
    (["measure", "--docs=.", "--output=x"], "no CHILD beside a CHILD_twin"),
    (["compare", "--results=nowhere"], "no PAIR/branch_stepN_MEASURE.npy"),
    (["branch", "--parents=nowhere/step3", "--output=x"], "nowhere/config.json")])
def test_a_mistake_is_one_line(flags, words):
    done = run("studies.gender_bias", *flags, expect=2)
    assert words in done.stderr and done.stderr.count("\n") == 1
