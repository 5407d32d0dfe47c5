"""python -m pytest tests/test_term_counts.py"""

import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data import write as write_tokens

from data import OrderedData
from studies.term_counts import count, Count, NEAR, numbers_near_numbers, seen, tidy
from studies.term_questions import Question, QuestionIndex
from tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


def naive(text):
    """Return numbers_near_numbers, sorted, of a tidy text, read one character at a time."""
    text, found = " " + text, []

    def digits(at):
        """Return where a number of at most five digits ends that begins here, if any."""
        end = at
        while end < min(at + 5, len(text)) and text[end].isdecimal():
            end += 1
        return end

    def words(at):
        """Return where one, two and three words with the white space behind them end."""
        ends = []
        while len(ends) < 3:
            end = at
            while end < len(text) and (text[end].isalnum() or text[end] in string.punctuation):
                end += 1
            space = end
            while space < len(text) and text[space].isspace():
                space += 1
            if end == at or space == end:
                break
            at = space
            ends.append(at)
        return ends

    for at in (i for i, character in enumerate(text) if character == " "):
        end = digits(at + 1)
        if end > at + 1 and text[end:end + 1] == " ":
            stops = [digits(e) for e in words(end + 1) if digits(e) > e]
            inside = at
            while stops and inside < stops[-1]:  # every number of the longest window
                if text[inside].isdecimal():
                    after = min(digits(inside), stops[-1])
                    found.append(int(text[inside:after]))
                    inside = after
                else:
                    inside += 1
    return sorted(found)


PIECES = st.sampled_from([
    "1", "23", "007", "99999", "123456", "\u0663", "\u00b2", "word", "a_b", "_", "x86", "1,000",
    "3-4", "5th", "\u2014", "\u201cq\u201d",
    "\u00e9t\u00e9", "\ufffd", "<|endoftext|>", "\n", "\t", "\u00a0", "\x1c", "\x00", "", "$",
    "(12)"])
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
    """Settings of a count over 24 rows of numbers, and what the naive reader finds in each."""
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


def test_counts_accumulate_in_training_order(corpus, tmp_path):
    options, rows = corpus
    count(Count(**options, output=str(tmp_path / "out"), at="2,5,8", workers=1))
    found = {step: dict(zip(keys.tolist(), counts.tolist()))
             for step, keys, counts in seen(tmp_path / "out", NEAR)}
    assert found == {step: Counter(number for row in rows[:step * 3] for number in row)
                     for step in (0, 2, 5, 8)}


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
    with pytest.raises(ValueError, match="no counts from step 0"):
        list(seen(tmp_path, NEAR))
