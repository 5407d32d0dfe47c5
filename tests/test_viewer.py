"""pytest tests/test_viewer.py"""

import json
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from batch_viewer import IDS, Pattern, Provenance, document_at, search
from conftest import run
from data import MASKED, OrderedData, TokenFile, TokenWriter, samples_needed, times_seen

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
    (folder / "a.jsonl").write_text("".join(
        json.dumps({"text": text, "meta": {"pile_set_name": f"set {i % 2}"}}) + "\n"
        for i, text in enumerate(texts)))
    run("tokenize", f"--input={folder}/a.jsonl", f"--output={folder}/d")
    run("shuffle", f"--data={folder}/d", f"--output={folder}/baked", *FLAGS)
    return folder


@pytest.fixture(scope="module")
def data(corpus):
    data = OrderedData(corpus / "d", SEQ, samples_needed(STEPS, BATCH), 1234)
    assert len(data.order[0]) == 2 * len(data.tokens)
    return data


# ---------------------------------------------------------------------------- how often, and when


def rows_of_every_copy(data):
    """{(document, place in the order): rows with tokens of that copy}, by walking every row."""
    doc_idx, sample_idx, shuffle_idx = data.order
    rows = {}
    for row, sample in enumerate(shuffle_idx.tolist()):
        for place in range(sample_idx[sample, 0], sample_idx[sample + 1, 0] + 1):
            rows.setdefault((int(doc_idx[place]), place), []).append(row)
    return rows


def test_every_documents_copies_and_their_rows(data):
    provenance, expected = Provenance(data), {}
    for (document, _), rows in sorted(rows_of_every_copy(data).items()):
        expected.setdefault(document, []).append(rows)
    assert {d: provenance.appearances(d) for d in range(len(data.tokens))} == expected


@pytest.mark.parametrize("n_rows", [0, 1, 57, 160])
def test_report_counts_the_copies_seen(data, n_rows):
    seen = [0] * len(data.tokens)
    for (document, _), rows in rows_of_every_copy(data).items():
        seen[document] += rows[0] < n_rows
    assert times_seen(data, n_rows).tolist() == np.bincount(seen).tolist()


# ---------------------------------------------------------------------------- view


def test_view_shows_every_row_of_the_steps_named_and_says_so(corpus, data, tokenizer):
    shown = run("view", f"--data={corpus}/d", *FLAGS, "--step=38:39", "--rows=0:4").stdout
    assert "steps 38 to 39, rows 152 to 159 (all included)" in shown
    assert re.findall(r"=== row (\d+)", shown) == [str(row) for row in range(152, 160)]
    for row in range(152, 160):
        for document, start, stop in data.pieces(row):
            assert tokenizer.decode(data.tokens.read(document, start, stop).tolist()) in shown
    document, start, stop = data.pieces(152)[0]
    copies = Provenance(data).appearances(document)
    seen = sum(rows[0] < 152 for rows in copies)
    assert (f"document {document} (set {document % 2}, {corpus}/a.jsonl:{document + 1}), "
            f"tokens {start} to {stop - 1} of {data.tokens.sizes[document]}; "
            f"seen before: {seen} of 2 copies") in shown


def test_a_baked_order_still_knows_its_documents(corpus):
    views = [run("view", f"--data={corpus}/{name}", *FLAGS, "--step=7").stdout
             for name in ("d", "baked")]
    assert views[0] == views[1] and "seen before" in views[0]


def test_saved_batches_are_the_trained_rows(corpus, data, tmp_path):
    run("view", f"--data={corpus}/d", *FLAGS, "--step=3:5", f"--save={tmp_path}/batch.npy")
    saved = np.load(tmp_path / "batch.npy")
    assert saved.dtype == np.uint16 and saved.shape == (3 * BATCH, SEQ + 1)
    assert np.array_equal(saved, np.concatenate([data.batch(step, BATCH)[0] for step in (3, 4, 5)]))
    run("view", f"--data={corpus}/d", *FLAGS, "--step=3", f"--save={tmp_path}/dropped.npy",
        "--intervention=term_drop", "--terms=banana")
    dropped = np.load(tmp_path / "dropped.npy")
    assert set(map(tuple, dropped.tolist())) <= {
        *map(tuple, saved[:BATCH].tolist()), (MASKED,) * (SEQ + 1)}
    assert (dropped == MASKED).any()


@pytest.mark.parametrize("flags, words", [
    (["--step=40"], "step = '40', expected a number from 0 to 39 or first:last"),
    (["--step=5:3"], "step = '5:3'"), (["--step=-1"], "step = '-1'"),
    (["--step=0:40"], "step = '0:40'"), (["--rows=3:1"], "rows = '3:1'"),
    (["--rows=0:9"], "rows = '0:9', expected a number from 0 to 3 or first:last+1")])
def test_steps_and_rows_that_are_not_there(corpus, flags, words):
    assert words in run("view", f"--data={corpus}/d", *FLAGS, *flags, expect=2).stderr


def test_saving_never_writes_over_a_file(corpus):
    before = {path: path.read_bytes() for path in corpus.iterdir()}
    (corpus / "link.npy").symlink_to(corpus / "d.bin")
    for name in ("d.bin", "d.json", "d_documents.npy", "baked.idx", "a.jsonl", "link.npy",
                 "new.bin"):
        path = corpus / name
        done = run("view", f"--data={corpus}/d", *FLAGS, f"--save={path}", expect=2)
        assert f"save = {path}, expected the name of a new BATCH.npy" in done.stderr
    (corpus / "link.npy").unlink()
    assert {path: path.read_bytes() for path in corpus.iterdir()} == before


# ---------------------------------------------------------------------------- find


@pytest.fixture(scope="module")
def token_bytes(tokenizer):
    return tokenizer.token_bytes()


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
@given(st.one_of(st.sampled_from(["banana", "a", "an", " a", "anas\n", "é", "nana world", "12",
                                  "zebra", "  "]),
                 st.text("ban é12\n", min_size=1, max_size=8)), st.sampled_from([160, 1 << 24]))
def test_a_text_is_found_however_it_was_tokenised(corpus, tokenizer, token_bytes, text, block):
    text, tokens = tokenizer.normalize(text).encode(), TokenFile(corpus / "d")
    pattern = Pattern(text, token_bytes, tokens)
    found = search(tokens.prefix, tokens.n_tokens, pattern, workers=1, block=block)
    assert found == places_by_decoding(tokens, text, token_bytes)


def test_two_processes_find_what_one_finds(corpus, tokenizer, token_bytes):
    tokens = TokenFile(corpus / "d")
    pattern = Pattern(b"an", token_bytes, tokens)
    one, two = (search(tokens.prefix, tokens.n_tokens, pattern, workers, block=1600)
                for workers in (1, 2))
    assert one == two == places_by_decoding(tokens, b"an", token_bytes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_tokens_are_found_in_every_row_that_holds_them(corpus, data, where, length):
    tokens = data.tokens
    document = where % len(tokens)
    ids = tokens.read(document)[where % max(1, tokens.sizes[document] - length):][:length].tolist()
    pattern = Pattern("".join(map(chr, ids)), IDS, tokens)
    found = search(tokens.prefix, tokens.n_tokens, pattern, workers=1)
    provenance, rows = Provenance(data), data.rows(range(len(data)))
    places = sorted((row, offset) for first, n in found
                    for row, offset in provenance.rows_of(*document_at(tokens, first), n))
    windows = np.lib.stride_tricks.sliding_window_view(rows, len(ids), axis=1)
    within = [(row, offset) for row, offset in np.argwhere((windows == ids).all(-1)).tolist()
              if inside_one_document(data, row, offset, len(ids))]
    assert places == within


def inside_one_document(data, row, offset, length):
    ends = np.cumsum([stop - start for _, start, stop in data.pieces(row)])
    return (np.searchsorted(ends, offset, side="right")
            == np.searchsorted(ends, offset + length - 1, side="right"))


def test_find_from_the_shell_agrees_with_the_baked_rows(corpus):
    found = [run("find", f"--data={corpus}/{name}", *FLAGS, "--text= banana",
                 "--limit=1000").stdout.splitlines() for name in ("d", "baked")]
    assert [line.split(";")[0] for line in found[0][:-1]] == found[1][:-1] and len(found[0]) > 5


@pytest.mark.parametrize("flags, words", [
    ([], "find takes one of"), (["--text=a", "--tokens=1"], "find takes one of"),
    (["--tokens=1,x"], "invalid literal for int()"), (["--limit=-1", "--tokens=1"], "limit = -1"),
    (["--text=a<|endoftext|>"], "which is a token of its own: --tokens=0")])
def test_find_needs_one_pattern(corpus, flags, words):
    assert words in run("find", f"--data={corpus}/d", *FLAGS, *flags, expect=2).stderr


# ---------------------------------------------------------------------------- shards and hashes


def shard(prefix, size):
    content = open(f"{prefix}.bin", "rb").read()
    last = (len(content) - 1) // size
    for i in range(last + 1):
        with open(f"{prefix}-{i:05}-of-{last:05}.bin", "wb") as file:
            file.write(content[i * size:(i + 1) * size])
    return last


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 700))
def test_shards_read_as_one_file(tmp_path_factory, half):
    prefix = tmp_path_factory.mktemp("s") / "document"
    sizes = np.random.RandomState(half).randint(1, 60, 40)
    writer = TokenWriter(prefix, "test")
    writer.append(np.arange(sizes.sum()), sizes)
    writer.finish({})
    whole = [TokenFile(prefix).read(i).tolist() for i in range(40)]
    shard(prefix, 2 * half)
    prefix.with_suffix(".bin").unlink()
    assert [TokenFile(prefix).read(i).tolist() for i in range(40)] == whole


def test_a_missing_shard_is_missed_only_where_it_is_needed(tmp_path):
    writer = TokenWriter(tmp_path / "d", "test")
    writer.append(np.arange(100), np.full(10, 10))
    writer.finish({})
    last = shard(tmp_path / "d", 60)
    (tmp_path / "d.bin").unlink()
    (tmp_path / "d-00001-of-00003.bin").unlink()
    assert last == 3
    tokens = TokenFile(tmp_path / "d")
    assert (tokens.read(0).tolist() == list(range(10))
            and tokens.read(9).tolist() == list(range(90, 100)))
    with pytest.raises(ValueError, match="d-00001-of-00003.bin: not there"):
        tokens.read(4)
    (tmp_path / "d-00002-of-00003.bin").write_bytes(b"short!")
    with pytest.raises(ValueError,
                       match="d-00002-of-00003.bin: 6 bytes, but .* describes 60: truncated"):
        TokenFile(tmp_path / "d")


def test_any_step_of_600_gigabytes_in_a_second(tmp_path):
    """The published form: 146,432,000 rows in 21 shards, here sparse; a mark begins one row."""
    rows, row_bytes, shard_bytes = 146_432_000, 2 * 2049, 30_000_000_000
    with open(tmp_path / "document.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, rows, rows + 1))
        for start in range(0, rows, 1 << 22):
            file.write(np.full(min(1 << 22, rows - start), 2049, dtype="<i4").data)
        for start in range(0, rows, 1 << 22):
            file.write((row_bytes * np.arange(start, min(start + (1 << 22), rows),
                                              dtype="<i8")).data)
        file.truncate(34 + 12 * rows + 8 * (rows + 1))
    total = rows * row_bytes
    for i in range(total // shard_bytes + 1):
        with open(tmp_path / f"document-{i:05}-of-{total // shard_bytes:05}.bin", "wb") as file:
            file.truncate(min(shard_bytes, total - i * shard_bytes))
    at = 142_999 * 1024 * row_bytes
    with open(tmp_path / f"document-{at // shard_bytes:05}-of-{total // shard_bytes:05}.bin",
              "r+b") as file:
        file.seek(at % shard_bytes)
        file.write(struct.pack("<3H", 11, 22, 33))
    data = OrderedData(tmp_path / "document", 2048, samples_needed(143000, 1024), 1234)
    last, crossing = data.batch(142_999, 1024), data.batch(shard_bytes // row_bytes // 1024, 1024)
    assert data.preshuffled and last.shape == crossing.shape == (1, 1024, 2049)
    assert last[0, 0, :4].tolist() == [11, 22, 33, 0] and not crossing.any()
