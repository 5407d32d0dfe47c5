"""pytest tests/test_viewer.py"""

import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from batch_viewer import Provenance, document_at, search
from conftest import run, write_jsonl
from data import MASKED, OrderedData, TokenFile, samples_needed, times_seen
from test_data import random_documents, write

SEQ, STEPS, BATCH = 16, 40, 4
FLAGS = [f"--seq_length={SEQ}", f"--steps={STEPS}", f"--batch_size={BATCH}"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """Documents of words that tokenise in several ways, in two epochs' order and as baked rows."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.RandomState(0)
    words = ["banana", " banana", "ban", "ana", " ananas", " an", "a", " a", "\n", "é", " 12",
             "  ", "world"]
    texts = ["".join(rng.choice(words, rng.randint(1, 40))) for _ in range(90)]
    write_jsonl(folder / "a.jsonl", [{"text": text, "meta": {"pile_set_name": f"set {i % 2}"}}
                                     for i, text in enumerate(texts)])
    run("prepare.py", "tokenize", f"--input={folder}/a.jsonl", f"--output={folder}/d")
    run("prepare.py", "shuffle", f"--data={folder}/d", f"--output={folder}/baked", *FLAGS)
    return folder


@pytest.fixture(scope="module")
def data(corpus):
    data = OrderedData(corpus / "d", SEQ, samples_needed(STEPS, BATCH), 1234)
    assert len(data.order[0]) == 2 * len(data.tokens)
    return data


@pytest.mark.parametrize("seq_length, samples", [(SEQ, 161), (300, 8)])
def test_every_documents_copies_and_their_rows(corpus, seq_length, samples):
    data = OrderedData(corpus / "d", seq_length, samples, 1234)
    doc_idx, sample_idx, shuffle_idx = data.order
    rows = [[] for _ in doc_idx]  # that have tokens of a copy, at each place in the order
    for row, sample in enumerate(shuffle_idx[:len(data)].tolist()):
        for place in range(sample_idx[sample, 0], sample_idx[sample + 1, 0] + 1):
            rows[place].append(row)
    expected = [[rows[place] for place in np.flatnonzero(doc_idx == document)]
                for document in range(len(data.tokens))]
    provenance = Provenance(data)
    assert [[sorted(row for row, _ in copy) for copy in provenance.rows_of(document)]
            for document in range(len(expected))] == expected
    assert (seq_length == 300) == ([] in sum(expected, []))  # after the last row of 301 tokens
    for n_rows in (0, 1, len(data) // 3, len(data)):
        seen = [sum(min(copy, default=n_rows) < n_rows for copy in copies) for copies in expected]
        assert times_seen(data, n_rows).tolist() == np.bincount(seen).tolist()


def view(corpus, *flags, name="d"):
    return run("batch_viewer.py", "view", f"--data={corpus}/{name}", *FLAGS, *flags).stdout


def test_view_shows_every_row_of_the_steps_named_and_says_so(corpus, data, tokenizer):
    shown = view(corpus, "--step=38:39", "--rows=0:4")
    assert "steps 38 to 39, rows 152 to 159 (all included)" in shown
    assert re.findall(r"=== row (\d+)", shown) == [str(row) for row in range(152, 160)]
    for row in range(152, 160):
        for document, start, stop in data.pieces(row):
            assert tokenizer.decode(data.tokens.read(document, start, stop).tolist()) in shown
    document, start, stop = data.pieces(152)[0]
    seen = sum(min(copy)[0] < 152 for copy in Provenance(data).rows_of(document))
    assert (f"document {document} (set {document % 2}, {corpus}/a.jsonl:{document + 1}), "
            f"tokens {start} to {stop - 1} of {data.tokens.sizes[document]}; "
            f"seen before: {seen} of 2 copies") in shown
    # A baked order still knows its documents.
    assert view(corpus, "--step=38:39", "--rows=0:4", name="baked") == shown


def test_a_wrong_table_of_documents_is_one_line(corpus, tmp_path, refused):
    shutil.copytree(corpus, tmp_path / "copy")
    tables = [np.load(corpus / "d_documents.npy") for _ in range(2)]
    tables[0]["subset"] = 9  # of 2
    for table in tables[0], tables[1][:-1]:
        np.save(tmp_path / "copy/d_documents.npy", table)
        assert "d_documents.npy: not the table of " in refused(
            "batch_viewer.py", "view", f"--data={tmp_path}/copy/d", *FLAGS)


def test_saved_batches_are_the_trained_rows(corpus, data, tmp_path):
    view(corpus, "--step=3:5", f"--save={tmp_path}/batch.npy")
    saved = np.load(tmp_path / "batch.npy")
    assert saved.dtype == np.uint16 and saved.shape == (3 * BATCH, SEQ + 1)
    assert np.array_equal(saved, np.concatenate([data.batch(step, BATCH)[0] for step in (3, 4, 5)]))
    view(corpus, "--step=3", f"--save={tmp_path}/dropped.npy", "--intervention=term_drop",
         "--terms=banana")
    dropped = np.load(tmp_path / "dropped.npy")
    masked = (dropped == MASKED).all(axis=1)
    assert masked.any() and np.array_equal(dropped[~masked], saved[:BATCH][~masked])


def test_saving_never_writes_over_a_file(corpus, refused):
    before = {path: path.read_bytes() for path in corpus.iterdir()}
    for name in ("d.bin", "a.jsonl", "new.bin"):
        assert "expected the name of a new BATCH.npy" in refused(
            "batch_viewer.py", "view", f"--data={corpus}/d", *FLAGS, f"--save={corpus}/{name}")
    assert {path: path.read_bytes() for path in corpus.iterdir()} == before


def places_by_decoding(tokens, text, token_bytes):
    """Every (first token, length) that holds a text, by decoding each document and looking."""
    found, before = set(), 0
    for document in range(len(tokens)):
        ids = tokens.read(document).tolist()
        ends = np.cumsum([len(token_bytes[id_]) for id_ in ids])
        joined = b"".join(token_bytes[id_] for id_ in ids)
        at = joined.find(text)
        while at >= 0:
            first, last = np.searchsorted(ends, (at, at + len(text) - 1), side="right")
            found.add((before + int(first), int(last - first + 1)))
            at = joined.find(text, at + 1)
        before += len(ids)
    return sorted(found)


@settings(max_examples=15, deadline=None)
@given(st.one_of(st.sampled_from(["banana", "a", " a", "anas\n", "nana world", "zebra", "  "]),
                 st.text("ban é12\n", min_size=1, max_size=8)),
       st.sampled_from([160, 1 << 24]), st.just(1))
@example("an", 1600, 2)
def test_a_text_is_found_however_it_was_tokenised(corpus, tokenizer, text, block, workers):
    text, tokens = tokenizer.normalize(text).encode(), TokenFile(corpus / "d")
    token_bytes = tokenizer.token_bytes()
    found = search(tokens, text, token_bytes, workers, block)
    assert found == places_by_decoding(tokens, text, token_bytes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_tokens_are_found_in_every_row_that_holds_them(corpus, data, where, length):
    tokens = data.tokens
    document = where % len(tokens)
    ids = tokens.read(document)[where % max(1, tokens.sizes[document] - length):][:length].tolist()
    found = search(tokens, "".join(map(chr, ids)), list(map(chr, range(1 << 16))), workers=1)
    provenance = Provenance(data)
    places = sorted(place for first, n in found
                    for copy in provenance.rows_of(*document_at(tokens, first), n)
                    for place in copy)
    expected = []
    for row in range(len(data)):
        before = 0
        for piece in data.pieces(row):  # within one document
            there = tokens.read(*piece).tolist()
            expected += [(row, before + i) for i in range(len(there))
                         if there[i:i + len(ids)] == ids]
            before += len(there)
    assert places == expected


def test_find_from_the_shell_agrees_with_the_baked_rows(corpus):
    found = [run("batch_viewer.py", "find", f"--data={corpus}/{name}", *FLAGS, "--text= banana"
                 ).stdout.splitlines() for name in ("d", "baked")]
    assert [line.split(";")[0] for line in found[0][:-1]] == found[1][:-1] and len(found[0]) > 5


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 700))
def test_shards_read_as_one_file(tmp_path_factory, half):
    prefix = tmp_path_factory.mktemp("s") / "document"
    write(prefix, random_documents(np.random.RandomState(half).randint(1, 60, 40)))
    whole = [TokenFile(prefix).read(i).tolist() for i in range(40)]
    content = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").unlink()
    starts = range(0, len(content), 2 * half)
    for i, start in enumerate(starts):
        Path(f"{prefix}-{i:05}-of-{len(starts) - 1:05}.bin").write_bytes(
            content[start:start + 2 * half])
    assert [TokenFile(prefix).read(i).tolist() for i in range(40)] == whole


def test_any_step_of_600_gigabytes(tmp_path):
    """The published form: 146,432,000 rows in 21 shards, here sparse; a mark begins one row."""
    rows, row_bytes, shard_bytes = 146_432_000, 2 * 2049, 30_000_000_000
    with open(tmp_path / "document.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, rows, rows + 1))
        for _ in range(0, rows, 1 << 20):
            file.write(np.full(1 << 20, 2049, dtype="<i4"))
        file.seek(34 + 4 * rows)
        for start in range(0, rows, 1 << 20):
            file.write(row_bytes * np.arange(start, start + (1 << 20), dtype="<i8"))
        file.truncate(34 + 12 * rows)
        file.truncate(34 + 12 * rows + 8 * (rows + 1))
    last_shard, rest = divmod(rows * row_bytes, shard_bytes)
    shards = [tmp_path / f"document-{i:05}-of-{last_shard:05}.bin" for i in range(last_shard + 1)]
    for path in shards:
        path.touch()
        os.truncate(path, shard_bytes if path != shards[-1] else rest)
    which, at = divmod(142_999 * 1024 * row_bytes, shard_bytes)
    with open(shards[which], "r+b") as file:
        file.seek(at)
        file.write(struct.pack("<3H", 11, 22, 33))
    data = OrderedData(tmp_path / "document", 2048, samples_needed(143000, 1024), 1234)
    last, crossing = data.batch(142_999, 1024), data.batch(shard_bytes // row_bytes // 1024, 1024)
    assert data.preshuffled and last.shape == crossing.shape == (1, 1024, 2049)
    assert last[0, 0, :4].tolist() == [11, 22, 33, 0] and not crossing.any()
