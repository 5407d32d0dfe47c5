"""python -m pytest tests/test_term_counts.py"""

import json
import string
from collections import Counter
from contextlib import nullcontext
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data import write as write_tokens

from data import OrderedData
from tasks import read_jsonl
from studies.term_counts import (
    count, Count, count_numbers, merge, NEAR, NUMBERS, PAIR, PLAIN, seen, tidy, UNIT, UNITS)
from studies.term_questions import Question, QuestionIndex, read_questions
from tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


def counted(text):
    """Return our counts of a text as {"near 5": n, "plain 5": n, "5-6": n, "5-day": n}."""
    keys, named = [], Counter()
    count_numbers(text, keys)
    for key in keys:
        kind, a, b = key // 10**10, key % 10**10 // NUMBERS, key % NUMBERS
        names = {NEAR: f"near {b}", PLAIN: f"plain {b}", UNIT: f"{b}-{UNITS[a % 7]}",
                 PAIR: f"{a}-{b}"}
        named[names[kind]] += 1
    return named


def naive(text):
    """The same, read one character at a time, with no regular expression."""
    text, named = " " + text, Counter()

    def digits(at):
        end = at
        while end < min(at + 5, len(text)) and text[end].isdecimal():
            end += 1
        return end

    def after_words(at):
        """Return where 0, 1, 2, 3 words with their white space end."""
        ends = [at]
        while len(ends) < 4:
            end = ends[-1]
            while end < len(text) and (text[end].isalnum() or text[end] in string.punctuation):
                end += 1
            space = end
            while space < len(text) and text[space].isspace():
                space += 1
            if end == ends[-1] or space == end:
                break
            ends.append(space)
        return ends

    def numbers(window):
        found, run = [], ""
        for character in window + "x":
            if character.isdecimal() and len(run) < 5:
                run += character
            else:
                found += [int(run)] if run else []
                run = character if character.isdecimal() else ""
        return sorted(found)

    def with_units(window):
        places = [(at, unit) for at in range(len(window)) for unit in UNITS
                  if window.startswith(unit, at)]
        named.update(f"{number}-{unit}" for number in numbers(window) for _, unit in places)

    for at in (i for i, character in enumerate(text) if character == " "):
        end = digits(at + 1)
        if end > at + 1 and text[end:end + 1] == " ":
            ends = after_words(end + 1)
            far = [digits(e) for e in ends[1:] if digits(e) > e]
            if far:
                inside = numbers(text[at:far[-1]])
                named.update(f"near {number}" for number in inside)
                named.update(f"{a}-{b}" for a, b in combinations(inside, 2))
            reached = [e + len(unit) for e in ends for unit in UNITS if text.startswith(unit, e)]
            if reached:
                with_units(text[at:reached[0]])
        for unit in UNITS:
            if text.startswith(f" {unit} ", at):
                far = [digits(e) for e in after_words(at + len(unit) + 2) if digits(e) > e]
                if far:
                    with_units(text[at:far[0]])
    run = ""
    for character in text + "x":
        if character.isdecimal():
            run += character
        else:
            named.update([f"plain {int(run)}"] if 0 < len(run) <= 5 else [])
            run = ""
    return named


PIECES = st.sampled_from([
    "1", "23", "007", "99999", "123456", "\u0663", "\u00b2", "word", "a_b", "_", "x86", "1,000",
    "3-4", "5th", "day", "days", "today", "hour", "decade", "\u2014", "\u201cq\u201d",
    "\u00e9t\u00e9", "\ufffd", "<|endoftext|>", "\n", "\t", "\u00a0", "\x1c", "\x00", "", "$",
    "(12)"])
SPACES = st.sampled_from([" ", " ", " ", "  ", "\n", " \n", "", "\u00a0"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(PIECES, SPACES), max_size=14))
# No way of reading this may take long.
@example([("5", " "), ("_" * 200, ""), ("\u2014", " "), ("6", " ")])
def test_counts_are_those_of_a_naive_reader(pieces):
    text = "".join(piece + space for piece, space in pieces)
    assert counted(text) == naive(tidy(text))


def test_a_worked_example():
    # Windows: " 3 apples and 12" and " 4 days or 5" (the 12 ends with a comma, so it begins none).
    assert counted("3 apples and 12, then 4 days or 5") == Counter({
        "near 3": 1, "near 12": 1, "3-12": 1, "near 4": 1, "near 5": 1, "4-5": 1, "4-day": 1,
        "plain 3": 1, "plain 12": 1, "plain 4": 1, "plain 5": 1})
    # As many words as possible: from 7 on over 8 to 9; then " 8 x 9" once more.
    assert counted("7 8 x 9") == Counter({
        "near 7": 1, "near 8": 2, "near 9": 2, "7-8": 1, "7-9": 1, "8-9": 2, "plain 7": 1,
        "plain 8": 1, "plain 9": 1})


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from(" .?!,'ntsmverx5"), max_size=40))
def test_text_is_tidied_as_transformers_decoded_it(text):
    base = pytest.importorskip("transformers").PreTrainedTokenizerBase
    assert tidy(text) == base.clean_up_tokenization(None, text)


def test_merged_counts_add_up():
    generator = np.random.RandomState(0)
    tables, total = [], Counter()
    for size in (0, 1, 50, 300):
        keys = generator.randint(0, 200, size)
        total.update(keys.tolist())
        tables.append(np.stack(np.unique(keys, return_counts=True)))
    assert dict(merge(tables).T.tolist()) == total
    assert merge([np.empty((2, 0), dtype=np.int64)] * 2).shape == (2, 0)


QUESTIONS = [Question("a", "Which Lloyd Webber musical opened in the Battle of Hastings?",
                      "Sunset Boulevard", ("Sunset Blvd.", "SB")),
             Question("b", "what star sign is it?", "Leo", ()),
             Question("c", "Who is Leo?", "Lloyd Webber", ("the Lord",))]
WORDS = "lloyd Webber, battle of Hastings sunset boulevard BLVD. leo what the Lord leonard".split()


def test_terms_of_questions():
    assert QUESTIONS[0].terms == ["lloyd webber", "battle of hastings"]
    assert QUESTIONS[1].terms == ["what"]  # no name: its longest word, the first of equals
    assert QUESTIONS[2].terms == ["leo"]
    assert QUESTIONS[0].answers == ["sunset boulevard", "sunset blvd"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join))
def test_rows_with_term_and_answer_are_found(text):
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    has = lambda phrase: any(
        words[i:i + len(phrase.split())] == phrase.split() for i in range(len(words)))
    expected = {(q, b) for q, question in enumerate(QUESTIONS)
                for b, term in enumerate(question.terms)
                if has(term) and any(map(has, question.answers))}
    assert sorted(QuestionIndex(QUESTIONS).found(text)) == sorted(expected)


@pytest.fixture
def corpus(tmp_path, tokenizer, tokenizer_path):
    """Settings of a count over 24 rows of numbers, and the counts of each row by the naive
    reader.
    """
    generator = np.random.RandomState(1)
    words = "1 2 3 17 42 apples day , . 5 x9 1,000 hours \u2014 \u00e9".split(" ")
    texts = [" ".join(generator.choice(words, 60)) for _ in range(40)]
    write_tokens(tmp_path / "data", [[*tokenizer.encode(text), 0] for text in texts])
    options = {"data": str(tmp_path / "data"), "steps": 8, "batch_size": 3, "seq_length": 32,
               "tokenizer": str(tokenizer_path)}
    data = OrderedData(options["data"], 32, 25, 1234)
    rows = [naive(tidy(tokenizer.decode(row.tolist()))) for row in data.rows(range(24))]
    assert any("<|endoftext|>" in tokenizer.decode(row.tolist()) for row in data.rows(range(24)))
    return options, rows


def near(folder):
    return {step: dict(zip(keys.tolist(), counts.tolist()))
            for step, keys, counts in seen(folder, NEAR)}


def test_counts_accumulate_in_training_order(corpus, tmp_path):
    options, rows = corpus
    count(Count(**options, output=str(tmp_path / "out"), at="2,5,8", workers=1))
    for step, found in near(tmp_path / "out").items():
        total = sum(rows[:step * 3], Counter())
        assert found == {int(name[5:]): n for name, n in total.items() if name.startswith("near ")}
    assert list(near(tmp_path / "out")) == [0, 2, 5, 8]


def test_any_number_of_processes_writes_the_same_bytes_and_goes_on(corpus, tmp_path, capsys):
    options, _ = corpus
    for workers in (1, 2):
        count(Count(**options, output=str(tmp_path / str(workers)), at="1,8", workers=workers))
    files = lambda folder: {path.name: path.read_bytes()
                            for path in (tmp_path / folder).glob("*.npy")}
    assert len(files("1")) == 2 and files("1") == files("2")
    capsys.readouterr()
    (tmp_path / "1" / "0000001_0000008.npy").unlink()
    count(Count(**options, output=str(tmp_path / "1"), at="1,8", workers=1))
    assert "21 rows counted now, 3 were there" in capsys.readouterr().out
    assert files("1") == files("2")


def test_counts_of_other_data_are_refused(corpus, tmp_path):
    options, _ = corpus
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="step 99 is beyond --steps=8"):
        count(Count(**options, output=out, at="99", workers=1))
    count(Count(**options, output=out, at="2,8", workers=1))
    with pytest.raises(ValueError, match="seed was 1234, is 1; name another --output"):
        count(Count(**options, seed=1, output=out, at="2,8", workers=1))
    with pytest.raises(ValueError, match="holds counts of steps 0 to 2"):
        count(Count(**options, output=out, at="1,8", workers=1))
    out, questions = str(tmp_path / "asked"), tmp_path / "q.jsonl"
    for answer, refused in (("Leo", nullcontext()), (
            "Lio", pytest.raises(ValueError, match="questions_hash was '.*', is '.*'; name "))):
        questions.write_text(json.dumps({"question_id": "a", "question": "Who?", "answer": {
            "value": answer, "aliases": []}}))
        read_jsonl.cache_clear()
        with refused:
            count(Count(**options, output=out, at="2", workers=1, questions=str(questions)))
    with pytest.raises(ValueError, match="no counts from step 0"):
        list(seen(tmp_path, NEAR))


@pytest.mark.parametrize("line", ["", "{", "[]", '{"question_id": 1}', json.dumps(
    {"question_id": "a", "question": "b", "answer": {"value": "c", "aliases": [1]}})])
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="q.jsonl"):
        read_questions(tmp_path / "q.jsonl")
