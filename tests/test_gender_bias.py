"""python -m pytest tests/test_gender_bias.py"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch, table, train, write_jsonl
from test_data import write

from model import ModelConfig, Pythia
from studies.gender_bias import (
    MEASURES, Branch, Compare, Measure, ask, branch, compare, measure)


@pytest.fixture(scope="module")
def model():
    return Pythia(ModelConfig(n_layers=1, d_model=32, n_heads=2, seq_length=16))


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    lines = {
        "heldout/test.jsonl": [{"text": "Then she said that he went. " * 9},
                               {"text": "It rained."}],
        "winobias/winobias.jsonl": [
            {"file": f"{kind}_stereotyped_type{n}.txt.test", "number": 1, "sentence": sentence}
            for n in (1, 2) for kind, he, his, other in (("pro", "she", "her", "The cook"),
                                                         ("anti", "he", "his", "A cook"))
            for sentence in (f"[The nurse] met the cook because [{he}] came.",
                             # 57 have three
                             f"The cook met [the nurse] as [{he}] lost [{his}] key.",
                             f"{other} met [the nurse] because [{he}] came.")],  # 9 are no pairs
        "crows_pairs/test.jsonl": [
            {"sent_more": "He is strong.", "sent_less": "She is strong.", "bias_type": "gender"},
            {"sent_more": "x", "sent_less": "y", "bias_type": "age"}]}
    for name, records in lines.items():
        write_jsonl(folder / name, records)
    (folder / "winogender").mkdir()
    (folder / "winogender" / "occupations-stats.tsv").write_text(
        "occupation\tb\tbls_pct_female\tyear\ncook\t1\t40.0\t2015\nnurse\t1\t90.0\t2015\n")
    (folder / "winogender" / "all_sentences.tsv").write_text("sentid\tsentence\n" + "".join(
        f"{who}.x.{answer}.{kind}.txt\tThe {who} {said} {word} came.\n" for who in ("cook", "nurse")
        for answer, said in ((0, "said"), (1, "told the guest that"))  # 1: the guest came
        for kind, word in (("male", "he"), ("female", "she"), ("neutral", "they"))))
    return folder


def test_heldout_is_she_against_he_wherever_either_stands(model, tokenizer, docs):
    ids = [0] + tokenizer.encode("Then she said that he went. " * 9)
    he, she = tokenizer.encode(" he")[0], tokenizer.encode(" she")[0]
    expected = []
    for start in range(0, len(ids) - 1, 16):  # windows of the model's context
        piece = torch.tensor([ids[start:start + 17]])
        logprobs = model(piece[:, :-1]).log_softmax(-1)[0].detach()
        expected += [float(logprobs[i, she] - logprobs[i, he])
                     for i, id_ in enumerate(piece[0, 1:].tolist()) if id_ in (he, she)]
    values, documents, x = ask("heldout", model, tokenizer, docs)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert x.tolist() == [0.5, -0.5] * 9 and not documents.any()


def test_pairs_are_less_stereotypical_minus_more(model, tokenizer, docs):
    def ll(text):
        """log p of a text after <|endoftext|>, from the whole softmax."""
        ids = torch.tensor([[0] + tokenizer.encode(text)])
        logprobs = model(ids[:, :-1]).log_softmax(-1).detach()
        return float(logprobs[0, range(ids.shape[1] - 1), ids[0, 1:]].sum())

    nurse, key = (ll(text.format("he", "his")) - ll(text.format("she", "her")) for text in (
        "The nurse met the cook because {} came.", "The cook met the nurse as {} lost {} key."))
    for name, expected, documents, x in (
            ("winobias", [nurse, key] * 2, [0, 0, 1, 1], [-1, -2] * 2),  # he; then he and his
            ("winogender", [ll("The cook said she came.") - ll("The cook said he came."),
                            ll("The nurse said he came.") - ll("The nurse said she came.")],
             [0, 1], [1, -1]),
            ("crows_gender", [ll("She is strong.") - ll("He is strong.")], [0], [1])):
        values, *items = ask(name, model, tokenizer, docs)
        np.testing.assert_allclose(values, expected, atol=1e-4)
        np.testing.assert_array_equal(items, [documents, x])
    values, *items = ask("cost", model, tokenizer, docs)
    bits = -ll("It rained.") / math.log(2) / len("It rained.")
    assert values[1] == pytest.approx(bits, abs=1e-5)
    np.testing.assert_array_equal(items, [[0, 1], [0, 0]])


def test_a_shift_is_no_bias_and_context_no_shift(tmp_path):
    """A branch that says "she" 2 nats more, and lets what stands there mean 1 nat less."""
    generator = np.random.RandomState(0)
    for name, x in (("winogender", generator.choice([-1, 1], 60)),
                    ("heldout", np.tile([-0.5, 0.5], 30)), ("cost", np.zeros(60))):
        for seed in "ab":
            (tmp_path / seed).mkdir(exist_ok=True)
            twin = generator.randn(60)
            change = {"winogender": 2 * x, "heldout": 2 - x, "cost": 0.1 + 0 * x}[name]
            branch = twin + change + 0.01 * generator.randn(60)
            for side, values in (("twin", twin), ("branch", branch)):
                np.save(tmp_path / seed / f"{side}_step8_{name}.npy",
                        [values, np.arange(60) // 3, x])
    compare(Compare(str(tmp_path)))
    rows = {row["measure"]: row for row in table(tmp_path / "gender_bias.csv")}
    for measure_, value in {"winogender bias": 0, "winogender shift": 2, "heldout shift": 2,
                            "heldout context": -1, "cost": 0.1}.items():
        row = rows[measure_]
        assert float(row["difference"]) == pytest.approx(value, abs=0.02)
        assert float(row["low"]) < float(row["difference"]) < float(row["high"])
        assert (row["seeds"], row["documents"]) == ("2", "20")
    assert float(rows["winogender bias"]["p"]) > 0.05 > float(rows["heldout context"]["p"])
    (tmp_path / "a/twin_step8_cost.npy").unlink()  # `measure` was stopped
    with pytest.raises(ValueError, match="a/twin_step8_cost.npy: no such file"):
        compare(Compare(str(tmp_path)))


def test_branch_measure_compare(tmp_path, monkeypatch, tokenizer, docs, capsys):
    monkeypatch.setattr("studies.gender_bias.subprocess", SimpleNamespace(
        run=lambda words: launch(*words[1:])))  # train.py
    ids = tokenizer.encode("And he said unto him, his day is come; and he went. " * 400)
    write(tmp_path / "d", np.array(ids[:4800]).reshape(48, 100))
    flags = f"--data={tmp_path}/d", f"--out_dir={tmp_path}/seed1"
    train(*flags, "--stop_at=2")
    capsys.readouterr()
    branch(Branch(f"{tmp_path}/seed1/step2", f"{tmp_path}/branches"))
    child = tmp_path / "branches" / "seed1_pronouns_to_feminine"
    pairs = capsys.readouterr().out.strip().removeprefix("--pairs=")
    assert pairs == f"{child}:{child}_twin"
    options = Measure(str(docs), f"{tmp_path}/out", pairs, steps="last")
    measure(options)
    assert "twin_step8: heldout, winogender, winobias, crows_gender, cost\n" in (
        capsys.readouterr().out)
    compare(Compare(f"{tmp_path}/out", plot=f"{tmp_path}/b.png"))
    rows = {row["measure"]: row for row in table(tmp_path / "out" / "gender_bias.csv")}
    assert set(rows) == {name + what for name, (*_, whats) in MEASURES.items()
                         for what in whats}
    assert float(rows["heldout shift"]["difference"]) > 0  # taught to say she
    assert rows["heldout shift"]["step"] == "8"
    assert {row["step"] for row in table(child / "interventions.csv")} == set("234567")

    train(*flags)  # the parent's own continuation is the twin, which need not be trained
    branch(Branch(f"{tmp_path}/seed1/step2", f"{tmp_path}/again"))
    assert [path.name for path in (tmp_path / "again").iterdir()] == [child.name]
    pairs = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("--pairs=")
    assert pairs == f"{tmp_path}/again/{child.name}:{tmp_path}/seed1"
    measure(replace(options, pairs=pairs, output=f"{tmp_path}/out_again"))
    for name in ("branch_step8_heldout", "twin_step8_heldout", "twin_step8_cost"):
        first, second = (np.load(tmp_path / out / child.name / f"{name}.npy")
                         for out in ("out", "out_again"))
        assert (first == second).all()

    with pytest.raises(ValueError, match="docs was .* name another folder"):
        measure(replace(options, docs=f"{docs}/."))
    # A published pair is two checkpoint folders: its name is the model's, not the step's.
    at = lambda step: f"{child}/step{step}:{child}_twin/step{step}"
    pairs = replace(options, pairs=f"{at(4)},{at(8)}", output=f"{tmp_path}/pairs")
    measure(pairs)
    assert {path.name for path in (tmp_path / "pairs" / child.name).glob("*_cost.npy")} == {
        f"{side}_step{step}_cost.npy" for side in ("branch", "twin") for step in (4, 8)}
    other = f"{tmp_path}/again/{child.name}/step8:{child}_twin/step8"
    with pytest.raises(ValueError, match=f"two children are called {child.name} step 8; rename"):
        measure(replace(pairs, pairs=f"{at(8)},{other}"))
    write_jsonl(tmp_path / "docs/heldout/test.jsonl", [])
    with pytest.raises(ValueError, match="docs/heldout: not documents of the measure heldout"):
        measure(replace(options, docs=f"{tmp_path}/docs", output=f"{tmp_path}/out2"))
