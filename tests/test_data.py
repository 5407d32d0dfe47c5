"""pytest tests/test_data.py"""

import hashlib
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from conftest import run
from data import (OrderedData, TokenFile, TokenWriter, batch_rows, build_order, check_whole,
                  fingerprint, order_paths, samples_needed, write_index)

# Of gpt-neox's own helpers.cpp: documents, low, high, sizes_seed, seq_length, num_samples, seed;
# epochs, samples, rows; the first 64 bits of the sha256 of doc_idx, sample_idx, shuffle_idx and of
# the first rows, where token p of document d is (7919 d + p) mod 50254.
GOLDEN = [
    (2294, 1, 300, 887852006, 2048, 453, 1234, 3, 491, 63,
     "e21c567155838218 431bd5571d98db5a 15596f409e1b5529 360ef2a4e20bd935"),
    (1072, 1, 30, 479936231, 64, 678, 1234, 3, 739, 63,
     "1117ef2cbe12d531 9fe68d5ced556342 1ce704b50d431d5c 331c82125562da0e"),
    (3832, 1, 30, 806256527, 256, 314, 2, 2, 441, 63,
     "c15491cb231bd8f0 c2ef2c314015f40f 3dbde15cffd03990 de6010023f5c92fc"),
    (3192, 1, 30, 1041703117, 2048, 32, 7, 2, 45, 44,
     "5f9fef3db98640b9 9244214709e6ae79 9a2145d15769e0d9 84818876d35b5be7"),
    (3198, 1, 300, 511510674, 16, 80949, 2, 3, 89256, 63,
     "fde013350597c7d3 bbabad18be532db2 c35cd363a328cf7e 3c4df3750655f083"),
    (1426, 1, 300, 1039966185, 64, 9023, 2, 3, 10017, 63,
     "87f18c470867ef9e fe839953ba534b9c 20f34daafaa75108 6d8e6eab5115e317"),
]


def write(prefix, documents, **notes):
    writer = TokenWriter(prefix, "test")
    for document in documents:
        writer.append(document, [len(document)])
    writer.finish(notes)


def digest(prefix):
    return fingerprint(TokenFile(prefix).paths)


def random_documents(sizes, seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randint(0, 50277, size).astype(np.uint16) for size in sizes]


def test_files_are_byte_for_byte_megatron(tmp_path):
    documents = [[5, 6, 50276], [], [7], [65535, 0]]
    write(tmp_path / "d", documents)
    assert (tmp_path / "d.bin").read_bytes() == struct.pack("<6H", 5, 6, 50276, 7, 65535, 0)
    assert (tmp_path / "d.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 4, 5) + struct.pack("<4i", 3, 0, 1, 2)
        + struct.pack("<4q", 0, 6, 6, 8) + struct.pack("<5q", 0, 1, 2, 3, 4))
    assert [TokenFile(tmp_path / "d").read(i).tolist() for i in range(4)] == documents


def test_an_unfinished_write_is_no_token_file_and_goes_on_from_its_commit(tmp_path):
    writer = TokenWriter(tmp_path / "d", "job")
    writer.append([1, 2], [2], position="after the first")
    writer.commit()
    writer.append([3, 3, 3], [3])  # lost: never committed
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["d.partial"]
    writer = TokenWriter(tmp_path / "d", "job")
    assert writer.position == "after the first"
    writer.append([4], [1])
    writer.finish({})
    assert [TokenFile(tmp_path / "d").read(i).tolist() for i in (0, 1)] == [[1, 2], [4]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_a_kill_while_finishing_neither_doubles_nor_zeroes(tmp_path, monkeypatch):
    writer = TokenWriter(tmp_path / "d", "job")
    writer.append([1, 2, 3], [3], position="at the end")
    writer.commit()  # what finish does first
    writer.close()
    again = TokenWriter(tmp_path / "d", "job")
    assert again.position == "at the end" and again.files["bin"].tell() == 6

    def replace(source, target, real=os.replace):
        if str(target).endswith("d.idx"):  # the last
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        again.finish({})
    again.close()
    anew = TokenWriter(tmp_path / "d", "job")
    assert anew.position is None
    anew.append([1], [1], position="after the first")
    anew.commit()
    anew.close()
    assert TokenWriter(tmp_path / "d", "another job").position is None


def test_an_order_of_other_documents_is_refused(tmp_path):
    write(tmp_path / "d", random_documents([5, 9, 14, 2, 30]))
    OrderedData(tmp_path / "d", 4, 20, 1234)
    write(tmp_path / "other", random_documents([9, 5, 14, 2, 30]))
    for path in tmp_path.glob("d_train_0_*"):
        path.rename(tmp_path / path.name.replace("d_", "other_", 1))
    with pytest.raises(ValueError, match="not an order of .*other.idx"):
        OrderedData(tmp_path / "other", 4, 20, 1234)
    write(tmp_path / "d", random_documents([9, 5, 14, 2, 30]))
    OrderedData(tmp_path / "d", 4, 20, 1234)  # writing d anew removed its old order


def test_a_file_is_in_training_order_only_if_something_says_so(tmp_path):
    rows = random_documents([9] * 100)  # chunks of 9 tokens, as many corpora are
    write(tmp_path / "d", rows)
    data = OrderedData(tmp_path / "d", 8, 20, 1234)
    assert not data.preshuffled and "every document has 9 tokens: if this" in data.describe()[-1]
    write(tmp_path / "d", rows, preshuffled=True)
    data = OrderedData(tmp_path / "d", 8, 20, 1234)
    assert data.preshuffled
    with pytest.raises(ValueError, match="in training order already, in rows of 9 tokens"):
        OrderedData(tmp_path / "d", 4, 20, 1234)
    raw = (tmp_path / "d.bin").read_bytes()
    (tmp_path / "d.bin").rename(tmp_path / "whole")
    (tmp_path / "d.json").unlink()
    for i, part in enumerate((raw[:1000], raw[1000:])):  # as published: no .json, shards
        (tmp_path / f"d-{i:05}-of-00001.bin").write_bytes(part)
    data = OrderedData(tmp_path / "d", 8, 20, 1234)
    assert data.preshuffled and data.rows(range(100)).tobytes() == raw
    for i, words in ((1, "d-00001-of-00001.bin: no such file"), (0, "d-00000-.*: no such file")):
        (tmp_path / f"d-{i:05}-of-00001.bin").rename(tmp_path / "aside")
        with pytest.raises(ValueError, match=words):
            TokenFile(tmp_path / "d")
        (tmp_path / "aside").rename(tmp_path / f"d-{i:05}-of-00001.bin")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=20), st.data())
def test_a_fingerprint_sees_every_token_and_every_document(tmp_path_factory, sizes, draw):
    folder = tmp_path_factory.mktemp("d")
    documents = random_documents(sizes)
    joined = [np.concatenate(documents[:2]), *documents[2:]]  # the same tokens, cut otherwise
    for name, those in (("d", documents), ("moved", documents), ("joined", joined)):
        write(folder / name, those)
        check_whole(folder / name)
    before = digest(folder / "d")
    assert digest(folder / "moved") == before != digest(folder / "joined")
    raw = bytearray((folder / "d.bin").read_bytes())
    raw[draw.draw(st.integers(0, len(raw) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    (folder / "d.bin").write_bytes(raw)
    assert digest(folder / "d") != before
    with pytest.raises(ValueError, match="d.bin: SHA-256 .* the data changed since"):
        check_whole(folder / "d")


def test_a_large_file_is_known_by_its_blocks(tmp_path):
    def sparse(sizes):
        with open(tmp_path / "d.idx", "wb") as file:
            write_index(file, sizes)
        (tmp_path / "d.bin").touch()
        os.truncate(tmp_path / "d.bin", 2 * int(sizes.sum(dtype=np.int64)))
        return digest(tmp_path / "d")

    before = sparse(np.full(300_000, 1_000_000, dtype=np.int32))  # 600 GB
    assert sparse(np.tile(np.array([999_999, 1_000_001], dtype=np.int32), 150_000)) != before
    before = sparse(np.full(1000, 600_000, dtype=np.int32))  # 1.2 GB
    with open(tmp_path / "d.bin", "r+b") as file:  # 1 % of it becomes other text
        file.seek(700 * 10**6)
        file.write(b"x" * 12 * 10**6)
    assert digest(tmp_path / "d") != before


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=12), st.integers(0, 10**9), st.booleans())
def test_a_corrupted_index_is_a_value_error_or_reads_in_bounds(tmp_path_factory, noise, where, cut):
    prefix = tmp_path_factory.mktemp("d") / "d"
    write(prefix, random_documents([3, 1, 4, 1, 5]))
    raw = bytearray((prefix.parent / "d.idx").read_bytes())
    at = where % len(raw)
    raw[at:at + len(noise)] = b"" if cut else noise
    (prefix.parent / "d.idx").write_bytes(raw)
    try:
        tokens = TokenFile(prefix)
        for i in range(len(tokens)):
            assert len(tokens.read(i)) == tokens.sizes[i]
    except ValueError as error:
        assert str(prefix) in str(error)


def test_a_damaged_file_is_named(tmp_path):
    for name, damage in (
            ("d.idx", lambda raw: b"NOTANIDX\0" + raw[9:]),
            ("d.idx", lambda raw: raw[:17] + b"\6" + raw[18:]),  # another dtype
            ("d.idx", lambda raw: raw[:18] + b"\x09" + raw[19:]),  # more documents than there are
            ("d.bin", lambda raw: raw[:2])):
        write(tmp_path / "d", random_documents([3, 4]))
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
        with pytest.raises(ValueError, match=name):
            TokenFile(tmp_path / "d")
    write(tmp_path / "d", [[]])
    with pytest.raises(ValueError, match="d.bin: 0 bytes"):
        TokenFile(tmp_path / "d")


def test_beyond_four_gigabytes(tmp_path):
    """A sparse file of 2^31 + 7 tokens: byte offsets over 2^32, token positions over 2^31."""
    with open(tmp_path / "d.idx", "wb") as file:
        write_index(file, np.array([2**31 - 1, 8], dtype=np.int32))
    with open(tmp_path / "d.bin", "wb") as file:
        file.seek(2 * (2**31 - 1))
        file.write(np.arange(1, 9, dtype="<u2").tobytes())
    assert TokenFile(tmp_path / "d").read(1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    data = OrderedData(tmp_path / "d", 2**28, 7, 1234)
    at_the_end = [(start, stop) for row in range(len(data))
                  for document, start, stop in data.pieces(row) if document == 1]
    assert at_the_end and all(0 <= start < stop <= 8 for start, stop in at_the_end)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden[3]))
def test_order_equals_gpt_neox_golden_hashes(golden, tmp_path):
    (documents, low, high, sizes_seed, seq_length, num_samples, seed, epochs, samples, n_rows,
     hashes) = golden
    sizes = np.random.RandomState(sizes_seed).randint(low, high, documents).astype(np.int32)
    write(tmp_path / "d", [(7919 * d + np.arange(size)) % 50254 for d, size in enumerate(sizes)])
    data = OrderedData(tmp_path / "d", seq_length, num_samples, seed)
    assert (len(data.order[0]) // documents, len(data.order[2])) == (epochs, samples)
    for array, expected in zip((*data.order, data.rows(range(n_rows))), hashes.split()):
        assert hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16] == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda s: sum(s) > 1),
       st.integers(1, 60), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_a_sample_begins_at_the_last_token_of_the_one_before(
        sizes, seq_length, num_samples, seed):
    sizes = np.array(sizes, dtype=np.int32)
    doc_idx, sample_idx, shuffle_idx = build_order(sizes, seq_length, num_samples, seed)
    n_tokens, epochs = sizes.sum(), len(doc_idx) // len(sizes)
    assert (epochs * n_tokens - 1) // seq_length >= num_samples
    assert epochs == 1 or ((epochs - 1) * n_tokens - 1) // seq_length < num_samples
    tokens = [(place, offset) for place, document in enumerate(doc_idx)
              for offset in range(sizes[document])]
    assert sorted(doc_idx) == sorted([*range(len(sizes))] * epochs)
    begins = tokens[:len(shuffle_idx) * seq_length + 1:seq_length]
    assert sample_idx.tolist() == list(map(list, begins))
    assert sorted(shuffle_idx.tolist()) == list(range((epochs * n_tokens - 1) // seq_length))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20).filter(lambda s: sum(s) > 60),
       st.integers(1, 30), st.integers(2, 40))
def test_rows_are_the_shuffled_documents_cut_every_seq_length(
        tmp_path_factory, sizes, seq_length, n):
    prefix = tmp_path_factory.mktemp("d") / "d"
    documents = random_documents(sizes)
    write(prefix, documents)
    data = OrderedData(prefix, seq_length, n, 7)
    doc_idx, _, shuffle_idx = data.order
    stream = np.concatenate([documents[d] for d in doc_idx])
    expected = [stream[s * seq_length:(s + 1) * seq_length + 1]
                for s in shuffle_idx[:-1].astype(int)]
    assert len(data) == len(expected)
    assert np.array_equal(data.rows(range(len(data))), np.array(expected).reshape(len(data), -1))
    for row in range(len(data)):
        pieces = [documents[d][start:stop] for d, start, stop in data.pieces(row)]
        assert np.array_equal(np.concatenate(pieces), expected[row])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_ranks_and_micro_batches_partition_every_step(step, world_size, micro, accumulation):
    batch_size = world_size * micro * accumulation
    parts = [batch_rows(step, batch_size, rank, world_size, micro) for rank in range(world_size)]
    assert all(part.shape == (accumulation, micro) for part in parts)
    # gpt-neox: consecutive rows, a contiguous slice a rank.
    micro_steps = np.stack(parts, axis=1).ravel()
    assert micro_steps.tolist() == list(range(step * batch_size, (step + 1) * batch_size))


def test_baked_rows_equal_index_rows_for_every_step_rank_and_world_size(tmp_path):
    write(tmp_path / "d", random_documents(np.random.RandomState(3).randint(1, 90, 200)))
    run("prepare.py", "shuffle", f"--data={tmp_path}/d", f"--output={tmp_path}/baked",
        "--seq_length=16", "--steps=20", "--batch_size=8")
    num_samples = samples_needed(20, 8)
    first, second = (OrderedData(tmp_path / name, 16, num_samples, 1234) for name in ("d", "baked"))
    assert second.preshuffled and not first.preshuffled and len(second) == 160
    for step in (*range(20), 3, 0):  # whatever was read before
        for world_size in (1, 2, 4):
            for rank in range(world_size):
                batch = first.batch(step, 8, rank, world_size, 2)
                assert batch.dtype == np.int64 and batch.shape == (4 // world_size, 2, 17)
                assert np.array_equal(batch, second.batch(step, 8, rank, world_size, 2))


def test_order_writes_gpt_neoxs_files(tmp_path):
    write(tmp_path / "d", random_documents([30, 40, 50]))
    run("data.py", "order", f"--data={tmp_path}/d", "--seq_length=32", "--steps=10",
        "--batch_size=4")
    arrays = build_order(np.array([30, 40, 50], dtype=np.int32), 32, samples_needed(10, 4), 1234)
    for path, array in zip(order_paths(tmp_path / "d", 32, samples_needed(10, 4), 1234), arrays):
        assert np.array_equal(np.load(path), array) and np.load(path).dtype == array.dtype
    assert order_paths("p", 2048, samples_needed(143000, 1024), 1234)[0] == (  # Pythia's
        "p_train_0_indexmap_147164160ns_2048sl_1234s_doc_idx.npy")
