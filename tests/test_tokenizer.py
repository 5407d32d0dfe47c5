"""pytest tests/test_tokenizer.py

The reference is the `tokenizers` library reading the same file.
"""

import json
import random
import re
import shutil
from unittest import mock

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from tokenizer import LONG_RUN, N_TOKENS, Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def original(tokenizer_path):
    return tokenizers.Tokenizer.from_file(str(tokenizer_path))


@pytest.mark.parametrize("text, ids", [  # by the original tokenizer
    ("Hello, I am", [12092, 13, 309, 717]),
    ("Hello world\n\n  foo   bar", [12092, 1533, 535, 50276, 12110, 50275, 2009]),
    ("        x", [50270, 89]), ("a<|endoftext|>b", [66, 0, 67]),
    ("cafe\u0301 \u00e9", [68, 2320, 860, 3974]), ("\t\tx", [186, 186, 89]), ("", [])])
def test_known_vectors(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("stride", [2048, pytest.param(128, marks=pytest.mark.proof)])
def test_every_code_point(tokenizer, original, stride):
    """Of the planes 4 to 13, which are empty, and 15 and 16, which are private, one in 16."""
    texts = ["".join(f"a{chr(c)} {chr(c)}1{chr(c)}{chr(c)}" for c in range(start, start + 128))
             for start in (*range(0, 0xD800, 128), *range(0xE000, 0x40000, 128),
                           *range(0x40000, 0xE0000, stride), *range(0xE0000, 0xF0000, 128),
                           *range(0xF0000, 0x110000, stride))]
    for text, theirs in zip(texts, original.encode_batch(texts)):
        assert tokenizer.encode(text) == theirs.ids


# Runs of spaces around every rule that could swallow them; marks that compose, reorder, or are
# newer than the original's Unicode 9; words and symbols that BPE merges in several ways.
AWKWARD = st.sampled_from([
    " ", "  ", " " * 23, " " * 24, " " * 25, " " * 49, "\n", "\t", "\r\n", "\x0b", "\x1c", "\x85",
    "\xa0", "\u3000", "\u2028", "'s", "'ll", "'S", "'", "a", "Hello", "THE", "e\u0301", "\u0301",
    "\u0323", "\u09fe", "\u0345", "\U000105d2\u0307", "\u1100\u1161\u11a8", "世界", "ﬁ", "12",
    "٣", "½", "...", "<|", "endoftext|>", "<|endoftext|>", "<|padding|>", "_",
    "def f(x):\n    return x", "🙂", "👩\u200d👩", "\0", "\ufeff"])


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.one_of(AWKWARD, st.text(max_size=4), st.text("etaoinshrdlu", max_size=12)),
                max_size=10))
def test_any_text(tokenizer, original, pieces):
    text = "".join(pieces)
    assert tokenizer.encode(text) == original.encode(text).ids


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "\x85", "\xa0", "\u3000", "\x1c",
                                 "a", "1", ".", "'s", "é", "\u200b", " " * 25]), max_size=30))
def test_every_run_of_blanks_may_be_cut(tokenizer, original, pieces):
    text = "".join(pieces)
    with mock.patch("tokenizer.LONG_RUN", re.compile(LONG_RUN.pattern.replace("100000", "1"))):
        parts = list(tokenizer._around_long_runs(text))
    assert [id_ for ids in parts for id_ in ids] == original.encode(text).ids


RUNS_OF_MARKS = "\u0316\u0301", "\u0f73\u0316\u0897", "\u0344\U0001e94a"


@pytest.mark.parametrize("longest, run", [
    *((1_000_000, run) for run in ("\n", "\t", " \n", "\u3000", "\r\n  ", "\n\x85 ", " ")),
    *((200_000, run) for run in RUNS_OF_MARKS),
    *(pytest.param(1_000_000, run, marks=pytest.mark.proof) for run in RUNS_OF_MARKS)])
def test_long_runs(tokenizer, original, longest, run):
    """The regex engine fails on a million blanks, and NFC takes quadratic time for marks."""
    rng = random.Random(run)
    lengths = [longest, *(10 ** rng.uniform(0, 5.5) for _ in range(3))]
    text = "".join(rng.choice(["e", ".", "\n", "é", " 1"]) + int(length) // len(run) * run
                   + rng.choice(["", "a", " a", "  a", "\na", "\u0327", "<|padding|>"])
                   for length in lengths)
    assert tokenizer.encode(text) == original.encode(text).ids


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from("ae \u1100가\u0301\u0316\u0327\u0344\u0345\u0f71\u0f73\u0f81\u0897"
                                "\U0001e94a\U000110ba"), max_size=40))
def test_marks_in_any_order(tokenizer, characters):
    text = "".join(characters)
    assert tokenizer.normalize(text) == tokenizers.normalizers.NFC().normalize_str(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, N_TOKENS - 1), max_size=20))
def test_decoding_any_ids(tokenizer, original, ids):
    assert tokenizer.decode(ids) == original.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("content", ["", "[" * 100_000, '{"model": {"vocab": 3}}'])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match="t.json: not the GPT-NeoX-20B tokenizer"):
        Tokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match="not a regular file"):  # it would have no end
        Tokenizer("/dev/zero")


@pytest.mark.parametrize("path, value", [
    (["added_tokens", 22, "id"], 50277), (["normalizer"], None), (["pre_tokenizer"], {}),
    (["pre_tokenizer", "add_prefix_space"], True), (["model"], []),
    (["model", "merges", 7], "a b"), (["model", "vocab", "a"], 67), (["model", "vocab"], [])])
def test_another_tokenizer_is_refused(tokenizer_path, tmp_path, path, value):
    spec = json.loads(tokenizer_path.read_text())
    place = spec
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "t.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="t.json: not the GPT-NeoX-20B tokenizer"):
        Tokenizer(tmp_path / "t.json")


def test_equal_files_share_one_tokenizer(tokenizer_path, tmp_path):
    """A run has a copy in each of 154 checkpoints; a tokenizer takes 20 MB."""
    copies = [shutil.copy(tokenizer_path, tmp_path / f"{i}.json") for i in range(2)]
    assert load_tokenizer(copies[0]) is load_tokenizer(copies[1])
    for size in (1 << 24, (1 << 24) + 1):  # JSON may have 16 MiB; a file behind a good one too
        (tmp_path / f"{size}.json").write_text("x" * size)
    for name in ("16777216.json", "16777217.json", "nowhere.json"):
        with pytest.raises(ValueError, match=f"{name}: not .* which `make tokenizer` downloads"):
            load_tokenizer(tmp_path / name)
