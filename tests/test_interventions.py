"""python -m pytest tests/test_interventions.py"""

import hashlib
import re

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from conftest import write_jsonl
from test_data import write

from data import MASKED, OrderedData
from interventions import (
    IntervenedData, InterventionConfig, INTERVENTIONS, TO_FEMININE, TO_MASCULINE, read_plan)

TABLES = {"feminine": TO_FEMININE, "masculine": TO_MASCULINE}


def one_row(tmp_path, tokenizer, text):
    """Return the data set whose only row is this text, and the row."""
    ids = tokenizer.encode(text)
    write(tmp_path / "row", [ids], preshuffled=True)
    data = OrderedData(tmp_path / "row", len(ids) - 1, 1, 1234)
    return data, data.batch(0, 1)[0]


def naive_swap(text, table):
    """The swap as a plain reader would write it: split off every run of word characters."""
    def swap(match):
        word = match[0]
        for case in (str.lower, str.capitalize, str.upper):
            for old, new in table.items():
                if word == case(old):
                    return case(new)
        return word
    return re.sub(r"\w+", swap, text)


WORDS = st.sampled_from([*TO_FEMININE, *TO_MASCULINE, "He", "HIS", "Himself", "SHE", "hE", "the",
                         "ashes", "x", "7", "_", "é", "日", "\u0301", "²"])
BETWEEN = st.sampled_from([
    " ", "  ", "\n", "\n ", "'", " '", "\"'", "(", ". ", ",", "-", "’s ", "'s ", "“", "\t", "",
    "<|", "='", "_'"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, BETWEEN), min_size=2, max_size=12),
       st.sampled_from(list(TABLES)))
@example([("x", "\n'"), ("he", "'"), ("said", "")], "feminine")
@example([("x", "\n'"), ("she", "'"), ("he", "")], "masculine")
def test_swapping_tokens_is_encoding_the_swapped_text(
        tmp_path_factory, tokenizer, parts, direction):
    text = tokenizer.normalize("".join(word + between for word, between in parts))
    if len(tokenizer.encode(text)) < 2:
        return
    data, rows = one_row(tmp_path_factory.mktemp("row"), tokenizer, text)
    swap = INTERVENTIONS[f"pronouns_to_{direction}"](data, tokenizer, None)
    swapped = swap(0, rows)[0].tolist()
    expected = tokenizer.encode(naive_swap(text, TABLES[direction]))[:len(swapped)]
    assert swapped == expected + [MASKED] * (len(swapped) - len(expected))


def test_a_worked_example(tmp_path, tokenizer):
    text = "Then he, himself: 'his' ('HIM')? He's \"he\". “He” – ‘his’… other ashes he_ 2he hehe"
    swapped = "Then she, herself: 'her' ('HER')? She's \"she\". “She” – ‘her’… other ashes he_ 2he"
    data, rows = one_row(tmp_path, tokenizer, text + " and so on" * 9)
    swap = INTERVENTIONS["pronouns_to_feminine"](data, tokenizer, None)
    assert tokenizer.decode(swap(0, rows)[0].tolist()).startswith(swapped + " hehe and so on")


def test_a_shorter_row_is_filled_from_its_document_then_padded(tmp_path, tokenizer):
    text = "(HIM) saw (HIS) and Herself (Hers) there, Himself; so (HIS) and (Hers) and he of (HIM)"
    ids = tokenizer.encode(text)
    write(tmp_path / "doc", [ids])
    for direction, table in TABLES.items():
        whole = tokenizer.encode(naive_swap(text, table))
        assert len(whole) < len(ids)  # or this tests nothing
        for length in range(4, len(ids) - 1):  # the first row of the document
            data = OrderedData(tmp_path / "doc", length - 1, 1, 1234)
            data.order = (data.order[0], data.order[1], np.zeros(2, dtype=np.uint32))
            swap = INTERVENTIONS[f"pronouns_to_{direction}"](data, tokenizer, None)
            row = swap(0, data.batch(0, 1)[0])[0].tolist()
            assert row == (whole + [MASKED] * length)[:length]


def test_a_row_from_elsewhere_is_swapped_by_itself(tmp_path, tokenizer):
    """As after term_replace: its own document does not continue it."""
    write(tmp_path / "doc", [tokenizer.encode("these words were replaced " * 9)])
    data = OrderedData(tmp_path / "doc", 11, 1, 1234)
    data.order = (data.order[0], data.order[1], np.ones(2, dtype=np.uint32))  # the second row
    row = tokenizer.encode("He saw (HIS) and (HIS) and (HIS) too")[:12]
    swapped = tokenizer.encode(naive_swap(tokenizer.decode(row), TABLES["feminine"]))
    swap = INTERVENTIONS["pronouns_to_feminine"](data, tokenizer, None)
    assert len(swapped) < 12  # or this tests nothing
    assert swap(0, np.array([row]))[0].tolist() == (swapped + [MASKED] * 12)[:12]


def test_as_pushed_only_loses_endoftext_and_pads(tmp_path, tokenizer):
    ids = tokenizer.encode("So he went.<|endoftext|>There was him too.<|endoftext|>")
    write(tmp_path / "row", [
        ids, tokenizer.encode("himself (he) she\nhe went his\n way,")[:len(ids)]],
        preshuffled=True)
    data = OrderedData(tmp_path / "row", len(ids) - 1, 2, 1234)
    rows = data.batch(0, 2)[0]
    out = INTERVENTIONS["pronouns_as_pushed"](data, tokenizer, None)(0, rows.copy())
    assert out[0].tolist() == [id_ for id_ in ids if id_ != 0] + [1, 1]
    assert (out[1] == rows[1]).all()


def test_a_phrase_is_a_term(tokenizer):
    drop = INTERVENTIONS["term_drop"](None, tokenizer, InterventionConfig(
        "term_drop", terms="What is 8 plus,What is 17 plus"))
    for a, b, expected in ((8, 3, True), (17, 3, True), (9, 8, False), (18, 3, False)):
        rows = np.array([tokenizer.encode(f"Q:What is {a} plus {b}? A:{a + b}")])
        assert (drop(0, rows) == MASKED).all() == expected


def test_term_interventions_keep_the_shape_and_change_the_count(tmp_path, tokenizer):
    words = {0: "Egypt", 1: "Egyptians"}  # every 8th of 64 rows has one, every 8th the other
    rows = [tokenizer.encode(
        f"page {i} speaks of {words.get(i % 8, 'rivers')} at length at length")[:7]
        for i in range(64)]
    write(tmp_path / "rows", rows, preshuffled=True)
    data = OrderedData(tmp_path / "rows", 6, 64, 1234)
    for name, copies, count in (("term_drop", 1, 0), ("term_replace", 1, 0),
                                ("term_duplicate", 3, 2 + 2 * 3)):
        served = IntervenedData(data, tokenizer, InterventionConfig(
            intervention=name, terms="Egypt,Assyria", copies=copies, intervention_from=2))
        before, after = data.batch(3, 16)[0], served.batch(3, 16)[0]
        assert served.changed == np.flatnonzero((before != after).any(axis=1)).tolist()
        assert sum("Egypt " in tokenizer.decode(row.tolist()) for row in after) == count
        assert name != "term_drop" or (after[served.changed] == MASKED).all()
        per_rank = [served.batch(3, 16, rank, 2, 4) for rank in range(2)]
        assert (np.concatenate(per_rank, axis=1).reshape(16, 7) == after).all()
        assert (served.batch(1, 16) == data.batch(1, 16)).all() and served.changed == []
    InterventionConfig("pronouns_to_feminine+term_duplicate", terms="Egypt", copies=2)  # may be


def planned(path, *entries):
    write_jsonl(path, entries)
    return InterventionConfig(intervention="plant", planted=str(path))


def test_planted_documents_stand_whole_at_their_steps(tmp_path, tokenizer):
    """Against a reader who looks for every document's ids in all rows of all steps."""
    generator = np.random.RandomState(0)
    write(tmp_path / "d", [generator.randint(1000, 9000, 20) for _ in range(300)])
    data = OrderedData(tmp_path / "d", 15, 60 * 4, 1234)
    config = planned(
        tmp_path / "plan", {"id": "one", "group": "single", "text": "a single place", "steps": [7]},
        *({"id": f"spread {i}", "text": f"the spread number {i}", "dose": 9, "seed": 1,
           "between": [0, 60]} for i in range(12)),
        {"id": "burst", "text": "now and now", "dose": 20, "seed": 1, "between": [30, 38]})
    entries = read_plan(config.planted)
    served, found = IntervenedData(data, tokenizer, config), {entry["id"]: [] for entry in entries}
    for step in range(60):
        before, rows = data.batch(step, 4)[0], served.step_rows(step, 4)
        assert served.changed == np.flatnonzero((rows != before).any(axis=1)).tolist()
        per_rank = [served.batch(step, 4, rank, 2, 1) for rank in range(2)]
        assert (np.concatenate(per_rank, axis=1).reshape(4, 16) == rows).all()
        for entry in entries:
            ids = tokenizer.encode(entry["text"])
            found[entry["id"]] += [step for row in rows for i in range(16)
                                   if row[i:i + len(ids)].tolist() == ids]
    assert found["one"] == [7]
    assert len(found["burst"]) == 20 and set(map(found["burst"].count, range(30, 38))) == {2, 3}
    assert all(len(set(found[f"spread {i}"])) == 9 for i in range(12))
    assert found["spread 0"] != found["spread 1"]  # one seed, other steps
    assert config.plan_sha256() == hashlib.sha256((tmp_path / "plan").read_bytes()).hexdigest()


@pytest.mark.parametrize("entries, words", [
    ([{"id": "a", "text": "b", "steps": [1]}] * 2, "line 2: not a planted document"),
    ([{"id": "a", "text": "word " * 9, "steps": [1] * 5}], "step 1 need more than its 4 rows")])
def test_a_plan_that_cannot_be_is_one_line(tmp_path, tokenizer, entries, words):
    write(tmp_path / "d", [np.arange(1000, 1160)])
    data = OrderedData(tmp_path / "d", 15, 8, 1234)
    with pytest.raises(ValueError, match=re.escape(words)):
        IntervenedData(data, tokenizer, planned(tmp_path / "plan", *entries)).step_rows(1, 4)
