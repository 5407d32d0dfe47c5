"""python -m pytest tests/test_term_frequency.py"""

import math
import random
import re
import string
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from conftest import table
from test_data import write

from checkpoints import load_model
from config import write_json
from data import OrderedData
from launch import Saver
from model import ModelConfig
from studies.term_frequency import (
    HEADER, Analyse, Compare, Count, Evaluate, analyse, answer_all, binned, compare, count,
    evaluate, first_number, gap, numbers_near_numbers, prompts, seen, tidy)
from studies.results import student_quantile


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_path):
    save = Saver(tmp_path_factory.mktemp("terms") / "run",
                 ModelConfig(1, 32, 2, vocab_size=50304, seq_length=64))
    save.run.mkdir()
    for step in (0, 2):
        save(step, tokenizer=tokenizer_path)
    return save.run


def test_shots_are_drawn_as_lm_eval_drew_them():
    documents = [f"Q:What is 24 plus {x2}? A:" for x2 in range(1, 51)]
    pool = [f"Q:What is {a} plus {b}? A:{a + b}\n\n"
            for a in range(100) if a != 24 for b in range(1, 51)]
    generator = random.Random(42)
    generator.shuffle(documents)
    expected = ["".join(generator.sample(pool, 3)[:2]) + document for document in documents]
    assert [prompt for _, _, prompt, _ in prompts("plus", 2, [24])] == expected
    assert (7, 12, "Q:What is 7 times 12? A:", "84") in prompts("times", 0)


@pytest.mark.parametrize("said, answer", [
    (" 84 is right", "84"), ("no 1234567", "12345"), (" none", ""), ("1,000", "1")])
def test_given_answers(said, answer):
    assert first_number(said) == answer


@torch.no_grad()
def test_answers_are_the_models_greedy_ones(run, tokenizer):
    model = load_model(run / "step2", "cpu")
    asked = [*prompts("plus", 0, [3])[:2], *prompts("plus", 2, [4])[:2]]
    results = answer_all(model, tokenizer, asked)
    for (_, _, prompt, answer), (right, logprob) in zip(asked, results):
        tokens, total = tokenizer.encode(prompt), 0.0
        for said in (answer, " " + answer):
            whole = tokenizer.encode(prompt + said)
            logprobs = model(torch.tensor([whole]))[0].double().log_softmax(-1)
            total += math.exp(sum(float(logprobs[i - 1, whole[i]])
                                  for i in range(len(tokens), len(whole))))
        assert logprob == pytest.approx(math.log(total), abs=1e-4)
        new = []
        for _ in range(16):
            new.append(int(model(torch.tensor([(tokens + new)[-64:]]))[0, -1].argmax()))
        said = tokenizer.decode(new).split("\n")[0].split("<|endoftext|>")[0]
        assert right == (first_number(said) == answer)


def test_evaluation_goes_on_where_it_stopped(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("studies.term_frequency.prompts", partial(prompts, x1s=[5]))
    options = Evaluate(model=str(run), tasks="plus", shots="0,1", results=str(tmp_path / "r"))
    evaluate(options)
    rows = table(tmp_path / "r/run_step2_plus_0.csv")
    assert tuple(rows[0]) == HEADER and {row["tokens"] for row in rows} == {"128"}
    assert sorted((row["term"], row["item"]) for row in rows) == [
        ("5", x2) for x2 in sorted(map(str, range(1, 51)))]
    whole = {path: path.read_text() for path in (tmp_path / "r").glob("*.csv")}
    assert len(whole) == 4
    (tmp_path / "r/run_step2_plus_0.csv").unlink()
    capsys.readouterr()
    evaluate(options)
    assert capsys.readouterr().out.count("\n") == 1  # the other three were there
    assert whole == {path: path.read_text() for path in whole}


def naive(text):
    """Return numbers_near_numbers, sorted, by one pattern that looks ahead from every space."""
    word = rf"[\w{re.escape(string.punctuation)}]+\s+"
    windows = re.findall(rf"(?=( \d{{1,5}} (?:{word}){{1,3}}\d{{1,5}}))", " " + text)
    return sorted(int(number) for window in windows for number in re.findall(r"\d{1,5}", window))


PIECES = st.sampled_from([
    "1", "23", "007", "99999", "123456", "\u0663", "\u00b2", "word", "a_b", "_", "x86", "1,000",
    "3-4", "5th", "\u2014", "\u201cq\u201d", "\u00e9t\u00e9", "\ufffd", "<|endoftext|>", "\n", "\t",
    "\u00a0", "\x1c", "\x00", "", "$", "(12)"])
SPACES = st.sampled_from([" ", " ", " ", "  ", "\n", " \n", "", "\u00a0"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(PIECES, SPACES), max_size=14))
# No way of reading this may take long.
@example([("5", " "), ("_" * 200, ""), ("\u2014", " "), ("6", " ")])
def test_counts_are_those_of_a_naive_reader(pieces):
    text = "".join(piece + space for piece, space in pieces)
    assert sorted(numbers_near_numbers(text)) == naive(tidy(text))


def test_a_worked_example():
    # Windows: " 3 apples and 12" and " 4 days or 5" (the 12 ends with a comma, so it begins none).
    assert numbers_near_numbers("3 apples and 12, then 4 days or 5") == [3, 12, 4, 5]
    # As many words as possible: from 7 on over 8 to 9; then " 8 x 9" once more.
    assert numbers_near_numbers("7 8 x 9") == [7, 8, 9, 8, 9]


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from(" .?!,'ntsmverx5"), max_size=40))
def test_text_is_tidied_as_transformers_decoded_it(text):
    base = pytest.importorskip("transformers").PreTrainedTokenizerBase
    assert tidy(text) == base.clean_up_tokenization(None, text)


@pytest.fixture
def corpus(tmp_path, tokenizer, tokenizer_path):
    """Settings of a count over 24 rows of numbers, and what the naive reader finds in each."""
    generator = np.random.RandomState(1)
    words = "1 2 3 17 42 apples day , . 5 x9 1,000 hours \u2014 \u00e9".split(" ")
    texts = [" ".join(generator.choice(words, 60)) for _ in range(40)]
    write(tmp_path / "data", [[*tokenizer.encode(text), 0] for text in texts])
    options = {"data": str(tmp_path / "data"), "steps": 8, "batch_size": 3, "seq_length": 32,
               "tokenizer": str(tokenizer_path)}
    data = OrderedData(options["data"], 32, 25, 1234)
    rows = [naive(tidy(tokenizer.decode(row.tolist()))) for row in data.rows(range(24))]
    assert any("<|endoftext|>" in tokenizer.decode(row.tolist()) for row in data.rows(range(24)))
    return options, rows


def test_counts_accumulate_in_training_order_on_any_number_of_processes(corpus, tmp_path, capsys):
    options, rows = corpus
    for workers in (1, 2):
        count(Count(**options, output=f"{tmp_path}/{workers}", at="2,5,8", workers=workers))
    assert seen(tmp_path / "1") == {
        step: Counter(str(number) for row in rows[:step * 3] for number in row)
        for step in (0, 2, 5, 8)}
    files = lambda folder: {path.name: path.read_bytes()
                            for path in (tmp_path / folder).glob("*_*.json")}
    assert len(files("1")) == 3 and files("1") == files("2")
    capsys.readouterr()
    (tmp_path / "1/0000002_0000005.json").unlink()
    count(Count(**options, output=f"{tmp_path}/1", at="2,5,8", workers=1))
    assert capsys.readouterr().out == f"{tmp_path}/1/0000002_0000005.json\n"
    assert files("1") == files("2")
    with pytest.raises(ValueError, match="at = -5,2: expected steps from 0 to --steps="):
        count(Count(**options, output=f"{tmp_path}/3", at="-5,2", workers=1))
    assert not (tmp_path / "3").exists()
    with pytest.raises(ValueError, match="seed was 1234, is 1; name another folder"):
        count(Count(**options, output=f"{tmp_path}/1", at="2,5,8", workers=1, seed=1))


def test_the_gap_by_hand():
    # 20 terms: a tenth is 2. The rarest have accuracies 0.1 and 0.3, the most frequent 0.9 and 0.5.
    means = np.array([[100 + i, 0.4, -5.0] for i in range(20)])
    means[3] = 1, 0.1, -9.0
    means[7] = 2, 0.3, -7.0
    means[11] = 9000, 0.9, -1.0
    means[2] = 8000, 0.5, -2.0
    _, (*_, acc, acc_low, _, _), (least, most, _, logprob, logprob_low, _, _) = gap(means)
    assert (least, most, acc, logprob) == pytest.approx((1.5, 8500, 0.5, 6.5))
    # Without one of the four terms an end moves by 0.1 or 0.2, by 1 or 0.5; 3/4 of the squares.
    reach = student_quantile(3)
    assert (acc - acc_low, logprob - logprob_low) == pytest.approx(
        (reach * (0.75 * 0.1)**0.5, reach * (0.75 * 2.5)**0.5))


def test_bins_hold_every_term_once():
    means = np.array([[0, 0, -3.0], [0, 1, -2.0], [140_000, 0.5, -1.0], [3e8, 1, 0.0]])
    first, second, third = binned(means)
    assert first == pytest.approx((0, 0, 0, 2, 0.5, 0.5, -2.5, 0.5))
    assert second[:4] == (140_000, 140_000, 140_000, 1) and third[:4] == (3e8, 3e8, 3e8, 1)


def counts_folder(tmp_path, tables):
    folder = tmp_path / "counts"
    for (first, last), counts in tables.items():
        write_json(folder / f"{first:07}_{last:07}.json", counts)
    write_json(folder / "counts.json", {"batch_size": 3, "seq_length": 5})
    return str(folder)


def results_folder(tmp_path, rows):
    (tmp_path / "r").mkdir(exist_ok=True)
    (tmp_path / "r/all.csv").write_text("".join(
        ",".join(map(str, row)) + "\n" for row in (HEADER, *rows)))
    return str(tmp_path / "r")


def test_analysis_takes_frequencies_up_to_the_checkpoint(tmp_path):
    counts = counts_folder(tmp_path, {(0, 2): {"5": 10, "6": 1}, (2, 4): {"6": 100}})
    row = lambda step, tokens, term: ("m", step, tokens, "plus", 0, term, 1, 0, -int(term))
    results = results_folder(tmp_path, [row(step, 15 * step, term)
                                      for step in (2, 4) for term in "56"])
    analyse(Analyse(counts, results, str(tmp_path / "out")))
    rows = table(tmp_path / "out_gaps.csv")
    columns = "least_frequency", "most_frequency", "value"
    assert [tuple(float(row[name]) for name in columns) for row in rows
            if row["what"] == "nats, most - least"] == [(1, 10, 1), (10, 101, -1)]
    assert {row["low"] for row in rows if "most" in row["what"]} == {""}  # one term has no interval
    with pytest.raises(ValueError, match="no counts before m's step 3 of 45 tokens"):
        analyse(Analyse(counts, results_folder(tmp_path, [row(3, 45, 5)])))
    analyse(Analyse(counts, results_folder(tmp_path, [row(2, 30, 7), row(2, 30, 8)]),
                    str(tmp_path / "out")))
    assert (tmp_path / "out_gaps.csv").read_text().endswith(',2,0,0,"nats, most - least",,,,\n')
    for odd in ({"5": "x"}, {"5": [1]}, {"5": None}):
        with pytest.raises(ValueError, match="counts: not written by `count`"):
            analyse(Analyse(counts_folder(tmp_path, {(0, 2): odd}), results))


def test_branches_are_compared_with_their_twins_term_by_term(tmp_path):
    # Two seeds. The chosen 24 gains 3 and 1 with its two prompts, so 2, and 4; 30 gains 0, 31 2.
    gains = [("more", 24, 1, 3), ("more", 24, 2, 1), ("more", 30, 1, 0), ("more", 31, 1, 2),
             ("more2", 24, 1, 4), ("more2", 24, 2, 4), ("more2", 30, 1, 0), ("more2", 31, 1, 2)]
    rows = [(model + side, 8, 0, "plus", 0, term, item, 0, -9 + (gain if side == "" else 0))
            for model, term, item, gain in gains for side in ("", "_twin")]
    results = results_folder(tmp_path, rows)
    options = Compare("runs/more/,runs/more2", "24,99", results=results,
                      output=str(tmp_path / "c.csv"))
    compare(options)
    found = table(tmp_path / "c.csv")
    assert [(row["model"], row["terms"], row["seeds"], row["n"]) for row in found] == [
        ("more+more2", "chosen", "2", "1"), ("more+more2", "others", "2", "2"),
        ("more+more2", "chosen minus others", "2", "3")]
    assert [float(row["difference"]) for row in found] == [3, 1, 2]
    assert found[0]["low"] == ""  # of one term there is no interval
    # 0 and 2 in both seeds: mean 1, standard error 1, a Student's t of one degree.
    assert (float(found[1]["low"]), float(found[1]["high"])) == pytest.approx((-11.71, 13.71), 1e-3)
    results_folder(tmp_path, [row for row in rows if row[0] != "more2" or row[5] != 31])
    with pytest.raises(ValueError, match="not answers of more, .* to the same prompts"):
        compare(options)
