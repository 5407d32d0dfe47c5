"""python -m pytest tests/test_term_frequency.py"""

import csv
import json
import math
import random

import numpy as np
import pytest
import torch

from checkpoints import load_model, save
from config import command
from model import ModelConfig, Pythia
from studies.term_counts import NEAR, NUMBERS, QUESTION
from studies.term_evaluation import answer_all, evaluate, Evaluate, HEADER
from studies.term_frequency import Analyse, analyse, binned, COMMANDS, compare, Compare, gap
from studies.term_questions import arithmetic, given_answer, Question, trivia
from tasks import read_jsonl
from tokenizer import Tokenizer
from train import make_optimizer, TrainConfig

CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=50304, seq_length=64)
QUESTIONS = [Question(str(i), f"Who is {name}?", name, (name, f"The {name}!"))
             for i, name in enumerate("ABCDEF")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("terms") / "run"
    model = Pythia(CONFIG)
    optimizer = make_optimizer(model, TrainConfig(data="", out_dir="", learning_rate=1.0))
    folder.mkdir()
    for step in (0, 2):
        save(folder, step, model, optimizer, {"updates": 0, "tokens": 64 * step}, tokenizer_path)
    return folder


# ---------------------------------------------------------------------------- prompts


def test_shots_are_drawn_as_lm_eval_drew_them():
    documents = [f"Q:What is 24 plus {x2}? A:" for x2 in range(1, 51)]
    pool = [f"Q:What is {a} plus {b}? A:{a + b}\n\n"
            for a in range(100) if a != 24 for b in range(1, 51)]
    generator = random.Random(42)
    generator.shuffle(documents)
    expected = ["".join(generator.sample(pool, 3)[:2]) + document for document in documents]
    assert [prompt.text for prompt in arithmetic("plus", 2, 24)] == expected
    assert not any("What is 24 " in shot for text in expected for shot in text.split("\n\n")[:-1])
    without = {prompt.item: prompt for prompt in arithmetic("times", 0, 7)}
    assert without["12"] == ("7", "12", "Q:What is 7 times 12? A:", ("84",), ("84", " 84"))


def test_trivia_prompts_never_show_their_own_question():
    for prompt, question in zip(trivia(QUESTIONS, 4), QUESTIONS):
        *shots, last = prompt.text.split("\n\n")
        assert last == f"Q:{question.text} A:" and len(shots) == 4
        assert prompt.continuations == (" " + question.value,)
        assert set(shots) <= {f"Q:{other.text} A: {other.value}"
                              for other in QUESTIONS if other != question}
    with pytest.raises(ValueError, match="6 questions are too few for 6 shots"):
        trivia(QUESTIONS, 6)


@pytest.mark.parametrize("task, generated, answer", [
    ("times", " 84 is right", "84"), ("times", "no 1234567", "12345"), ("times", " none", ""),
    ("plus", "1,000", "1"),
    ("triviaqa", " The Beatles!", "beatles"), ("triviaqa", "an  A. B.", "b")])
def test_given_answers(task, generated, answer):
    assert given_answer(task, generated) == answer


@torch.no_grad()
def test_answers_are_the_models_greedy_ones(run, tokenizer_path):
    model, tokenizer = load_model(run / "step2", "cpu"), Tokenizer(tokenizer_path)
    prompts = [*arithmetic("plus", 0, 3)[:2], *arithmetic("plus", 2, 4)[:2]]
    results = answer_all(model, tokenizer, "plus", prompts)
    for prompt, (right, logprob) in zip(prompts, results):
        tokens, total = tokenizer.encode(prompt.text), 0.0
        for answer in prompt.continuations:
            whole = tokenizer.encode(prompt.text + answer)
            logprobs = model(torch.tensor([whole]))[0].double().log_softmax(-1)
            total += math.exp(sum(float(logprobs[i - 1, whole[i]])
                                  for i in range(len(tokens), len(whole))))
        assert logprob == pytest.approx(math.log(total), abs=1e-4)
        new = []
        for _ in range(16):
            new.append(int(model(torch.tensor([(tokens + new)[-64:]]))[0, -1].argmax()))
        digits = given_answer("plus",
                              tokenizer.decode(new).split("\n")[0].split("<|endoftext|>")[0])
        assert right == (digits == prompt.answers[0])


def test_evaluation_goes_on_where_it_stopped(run, tmp_path, tokenizer_path, capsys):
    options = Evaluate(str(run), "plus", "0", x1="5:7", results=str(tmp_path / "r.csv"),
                       tokenizer=str(tokenizer_path))
    evaluate(options)
    whole = (tmp_path / "r.csv").read_text()
    rows = list(csv.DictReader(whole.splitlines()))
    assert (tuple(rows[0]) == HEADER and len(rows) == 200
            and {row["tokens"] for row in rows} == {"0", "128"})
    lines = whole.splitlines(keepends=True)
    # Killed in the middle of a line.
    (tmp_path / "r.csv").write_text("".join(lines[:61]) + lines[61][:9])
    capsys.readouterr()
    evaluate(options)
    assert "140 prompts answered, 60 were there" in capsys.readouterr().out
    again = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    for before, after in zip(rows, again, strict=True):
        assert float(after.pop("logprob")) == pytest.approx(float(before.pop("logprob")), abs=1e-4)
        assert before == after


def test_other_questions_do_not_go_on(run, tmp_path, tokenizer_path, capsys):
    ask = Evaluate(str(run), "triviaqa", "1", steps="2", questions=str(tmp_path / "q.jsonl"),
                   results=str(tmp_path / "r.csv"), tokenizer=str(tokenizer_path))

    def write(answer):  # of the question that is the other's shot
        (tmp_path / "q.jsonl").write_text("".join(json.dumps({
            "question_id": id_, "question": "Who?", "answer": {"value": value, "aliases": []}
        }) + "\n" for id_, value in (("a", "Ann"), ("b", answer))))
        read_jsonl.cache_clear()

    write("Bob " * 40)  # more than the model's window
    evaluate(ask)
    assert "1 of 2 prompts are longer than the model's 64 tokens" in capsys.readouterr().out
    before = (tmp_path / "r.csv").read_text()
    evaluate(ask)
    write("Bert")
    with pytest.raises(ValueError, match="answers to other questions than .*q.jsonl has now; name"):
        evaluate(ask)
    assert (tmp_path / "r.csv").read_text() == before


# ---------------------------------------------------------------------------- analysis


def test_the_gap_by_hand():
    # 20 terms: a tenth is 2. The rarest have accuracies 0.1 and 0.3, the most frequent 0.9 and 0.5.
    means = np.array([[100 + i, 0.4, -5.0] for i in range(20)])
    means[3] = 1, 0.1, -9.0
    means[7] = 2, 0.3, -7.0
    means[11] = 9000, 0.9, -1.0
    means[2] = 8000, 0.5, -2.0
    n, least, most, acc, acc_low, acc_high, logprob, logprob_low, logprob_high = gap(means)
    assert ((n, least, most) == (20, 1.5, 8500)
            and acc == pytest.approx(0.5) and logprob == pytest.approx(6.5))
    # Of two terms a bootstrap draws each mean with 1/4, 1/2, 1/4: its 2.5 % point is the smallest.
    assert (acc_low, acc_high, logprob_low, logprob_high) == pytest.approx((0.2, 0.8, 5, 8))


def test_bins_hold_every_term_once():
    means = np.array([[0, 0, -3.0], [0, 1, -2.0], [140_000, 0.5, -1.0], [3e8, 1, 0.0]])
    rows = list(binned(means, "plus", tenths=2))
    paper, first, second = rows
    assert paper[0] == "paper" and paper[1] == pytest.approx(1e5) and paper[4:6] == (1, 0.5)
    assert (first[:5] == ("quantile", 0, 0, 0, 2)
            and first[5:] == pytest.approx((0.5, 0.5, -2.5, 0.5)))
    assert second[1:5] == (140_000, 3e8, 150_070_000, 2)


def counts_folder(tmp_path, tables, questions=()):
    folder = tmp_path / "counts"
    folder.mkdir()
    for (first, last), counts in tables.items():
        np.save(folder / f"{first:07}_{last:07}.npy",
                np.array(sorted(counts.items()), dtype=np.int64).T)
    (folder / "counts.json").write_text(json.dumps({
        "questions": list(questions), "batch_size": 3, "seq_length": 5}))
    return str(folder)


def results_file(tmp_path, rows):
    text = ",".join(HEADER) + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / "r.csv").write_text(text)
    return str(tmp_path / "r.csv")


def test_analysis_takes_frequencies_up_to_the_checkpoint(tmp_path, capsys):
    counts = counts_folder(tmp_path, {(0, 2): {NEAR + 5: 10, NEAR + 6: 1}, (2, 4): {NEAR + 6: 100}})
    row = lambda step, tokens, term: ("m", step, tokens, "plus", 0, term, 1, 0, -int(term))
    results = results_file(tmp_path, [row(step, 15 * step, term)
                                      for step in (2, 4) for term in "56"])
    analyse(Analyse(counts, results, str(tmp_path / "out")))
    rows = list(csv.DictReader((tmp_path / "out_gaps.csv").open()))
    columns = "least_frequency", "most_frequency", "logprob_gap"
    assert [tuple(float(row[name]) for name in columns) for row in rows] == [
        (1, 10, 1), (10, 101, -1)]
    assert {row["logprob_low"] for row in rows} == {""}  # a tenth of one term has no interval
    with pytest.raises(ValueError, match="does not count up to step 3 of m, only to 0, 2, 4"):
        analyse(Analyse(counts, results_file(tmp_path, [row(3, 45, 5)])))
    with pytest.raises(ValueError, match="counts 30 tokens up to step 2, m has seen 32; count in"):
        analyse(Analyse(counts, results_file(tmp_path, [row(2, 32, 5)])))
    analyse(Analyse(counts, results_file(tmp_path, [row(2, 30, 7), row(2, 30, 8)]),
                    str(tmp_path / "out")))
    assert (tmp_path / "out_gaps.csv").read_text().endswith(",2,0,0,,,,,,\n")
    assert "0.0 and 0.0 times | all terms were seen equally often (n 2)" in capsys.readouterr().out


def test_a_questions_salient_term_is_most_often_with_its_answer(tmp_path):
    key = lambda question, term: QUESTION * 10**10 + question * NUMBERS + term
    tables = {(0, 2): {key(0, 0): 3, key(0, 1): 2}, (2, 4): {key(0, 1): 5, key(1, 0): 4}}
    counts = counts_folder(tmp_path, tables, ["a", "b"])
    results = results_file(tmp_path, [("m", step, "", "triviaqa", 4, term, "", 0, -1.0)
                                      for step in (2, 4) for term in "ab"])
    analyse(Analyse(counts, results, str(tmp_path / "out")))
    rows = list(csv.DictReader((tmp_path / "out_gaps.csv").open()))
    assert [(row["least_frequency"], row["most_frequency"]) for row in rows] == [
        ("0", "2"), ("4", "7")]


def test_branches_are_compared_with_their_twins_term_by_term(tmp_path):
    # Two seeds. The chosen 24 gains 3 and 1 with its two prompts, so 2, and 4; 30 gains 0, 31 2.
    gains = {("more", "24", 1): 3, ("more", "24", 2): 1, ("more", "30", 1): 0,
             ("more", "31", 1): 2, ("more2", "24", 1): 4, ("more2", "24", 2): 4,
             ("more2", "30", 1): 0, ("more2", "31", 1): 2}
    rows = [(model + side, 8, 0, "plus", 0, term, item, 0, -9 + (gain if side == "" else 0))
            for (model, term, item), gain in gains.items() for side in ("", "_twin")]
    results = results_file(tmp_path, rows)
    options = Compare("runs/more/,runs/more2", "24,99", results=results,
                      output=str(tmp_path / "c.csv"))
    compare(options)
    found = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [(row["model"], row["terms"], row["seeds"], row["n"]) for row in found] == [
        ("more+more2", "chosen", "2", "1"), ("more+more2", "others", "2", "2"),
        ("more+more2", "chosen minus others", "2", "")]
    assert [float(row["difference"]) for row in found] == [3, 1, 2]
    # One term has no spread; what is left is that of two seeds, as a t of 1 degree.
    assert float(found[0]["low"]) < 3 - 10 and float(found[0]["high"]) > 3 + 10
    # Seeds that agree leave the terms': half of 0 and 2.
    assert (float(found[1]["low"]), float(found[1]["high"])) == (0, 2)
    with pytest.raises(ValueError, match="no checkpoint of all of more, none, .* has answers"):
        compare(Compare("more,none", "24", results=results))
    results_file(tmp_path, [row for row in rows if row[0] != "more2" or row[5] != "31"])
    with pytest.raises(ValueError, match="not the same terms for all of more, more2 at step 8"):
        compare(options)


@pytest.mark.parametrize("flags, words", [
    (["evaluate", "--model=RUN", "--tasks=minus"],
     "no task called minus; there are times, plus, triviaqa"),
    (["evaluate", "--model=RUN", "--x1=0:101"], "x1 = '0:101', expected FIRST:LAST+1 within 0:100"),
    (["analyse", "--counts=/nowhere", "--results=/nowhere"], "/nowhere: holds no answers"),
    (["compare", "--branch=b", "--terms=1", "--results=BAD"],
     "its first line is not model,step,tokens,")])
def test_a_mistake_is_one_line(run, tmp_path, flags, words, capsys):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    flags = [flag.replace("RUN", str(run)).replace("BAD", str(tmp_path / "bad.csv"))
             for flag in flags]
    with pytest.raises(SystemExit) as ended:
        command(flags, COMMANDS)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1
