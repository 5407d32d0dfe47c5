"""pytest tests/test_tokenizer.py

The reference is the `tokenizers` library reading the same file.
"""

import json

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from tokenizer import N_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def ours(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def original(tokenizer_path):
    return tokenizers.Tokenizer.from_file(str(tokenizer_path))


@pytest.mark.parametrize("text, ids", [  # pythia.md 3.4
    ("Hello, I am", [12092, 13, 309, 717]),
    ("Hello world\n\n  foo   bar", [12092, 1533, 535, 50276, 12110, 50275, 2009]),
    ("        x", [50270, 89]), ("a<|endoftext|>b", [66, 0, 67]),
    ("cafe\u0301 \u00e9", [68, 2320, 860, 3974]), ("\t\tx", [186, 186, 89]), ("", [])])
def test_known_vectors(ours, text, ids):
    assert ours.encode(text) == ids


def test_golden_texts(ours, pythia_data):
    path = pythia_data.parent / "reference/tokenizer_golden.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    golden = [json.loads(line) for line in path.open()]
    assert len(golden) == 300
    assert [ours.encode(record["text"]) for record in golden] == [
        record["ids"] for record in golden]


def test_every_code_point(ours, original):
    texts = ["".join(f"a{chr(c)} {chr(c)}1{chr(c)}{chr(c)}" for c in range(start, start + 16))
             for start in range(0, 0x110000, 16) if not 0xD800 <= start < 0xE000]
    for text, theirs in zip(texts, original.encode_batch(texts)):
        assert ours.encode(text) == theirs.ids


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
def test_any_text(ours, original, pieces):
    text = "".join(pieces)
    assert ours.encode(text) == original.encode(text).ids


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, N_TOKENS - 1), max_size=20))
def test_decoding_any_ids(ours, original, ids):
    assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_round_trip_is_nfc(ours, text):
    assert ours.decode(ours.encode(text)) == tokenizers.normalizers.NFC().normalize_str(text)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"model": {"vocab": 3}}'])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match="t.json: not a tokenizer.json"):
        Tokenizer(tmp_path / "t.json")


def test_another_vocabulary_is_refused(tokenizer_path, tmp_path):
    spec = json.loads(tokenizer_path.read_text())
    spec["added_tokens"].pop()
    (tmp_path / "t.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="not the GPT-NeoX-20B tokenizer"):
        Tokenizer(tmp_path / "t.json")
