"""pytest tests/test_tensors.py"""

import json
import math
import os
import tracemalloc

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from checkpoints import (
    DTYPES, JSON_LIMIT, open_file, open_folder, sha256_of, Stored, write_file, write_folder)

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.full((5,), 0.1, dtype=torch.float16),
           "scalar": torch.tensor(3, dtype=torch.int64), "empty": torch.zeros(0, 7),
           "c": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()}


def read_all(tensors):
    return {name: stored.read() for name, stored in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def a_file(path, header, data=b"", length=None):
    """Write a safetensors file of any header (an object, or bytes), honest or not."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little")
                     + header + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_safetensors_writes(tmp_path):
    tensors = TENSORS | {code: torch.ones(3).to(dtype) for code, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "x")
    assert same(read_all(open_file(tmp_path / "x")), tensors)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3000, 3000)])
def test_a_tensor_is_converted_while_it_is_read(tmp_path, shape):
    """9 million elements take more than one chunk."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    save_file({"a": tensor}, tmp_path / "x")
    assert torch.equal(open_file(tmp_path / "x")["a"].read(torch.float32), tensor.float())


def test_safetensors_reads_what_is_written(tmp_path):
    written = write_file(tmp_path / "x", TENSORS)
    assert same(load_file(tmp_path / "x"), TENSORS)
    assert written == {"bytes": (tmp_path / "x").stat().st_size,
                       "sha256": sha256_of(tmp_path / "x")}


@pytest.mark.parametrize("shard_size, shards", [(math.inf, 1), (10**9, 1), (48, 2), (1, 5)])
def test_shards_hold_the_same_bits(tmp_path, shard_size, shards):
    tensors = TENSORS | {"empty": torch.ones(1)}
    written = write_folder(tmp_path, tensors, shard_size=shard_size)
    assert len(written) == shards == len(list(tmp_path.glob("*.safetensors")))
    assert same(read_all(open_folder(tmp_path)), tensors)
    again = tmp_path / "again"  # from one file to the next without holding it all
    again.mkdir()
    write_folder(again, open_folder(tmp_path))
    assert same(load_file(again / "model.safetensors"), tensors)


@pytest.mark.parametrize("header, data, words", [
    (b"[1]", b"", "no object"), (b"{", b"", "Expecting"), (b"\xff{}", b"", "decode"),
    ({"a": 3}, b"", "expected dtype"), ({"a": entry() | {"more": 1}}, bytes(8), "expected dtype"),
    ({"a": entry("F31")}, bytes(8), "no dtype 'F31'"),
    ({"a": entry(["F32"])}, bytes(8), "no dtype"),
    ({"a": entry(shape=(-2,))}, bytes(8), "found"), ({"a": entry(shape=(2.0,))}, bytes(8), "found"),
    ({"a": entry(shape=(True,), offsets=(0, 4))}, bytes(4), "found"),
    ({"a": entry(shape=(3,))}, bytes(8), "are 12 bytes"),
    ({"a": entry(offsets=(0, 8, 8))}, bytes(8), "found"),
    ({"a": entry(offsets=(0,))}, bytes(8), "data_offsets"),
    ({"a": entry(offsets=(8, 0))}, bytes(8), "bytes"),
    ({"a": entry(shape=(1 << 60,), offsets=(0, 1 << 62))}, bytes(8), "found"),
    ({"a": entry(shape=(1 << 40,), offsets=(0, 1 << 42))}, bytes(8), "expected 4,398,046,511,104"),
    ({"a": entry(shape=[1 << 47] * 8)}, bytes(8), "of F32 are"),
    ({"a": entry(shape=[1] * 9)}, bytes(8), "found"),
    ({"a": entry(), "b": entry()}, bytes(8), "b begins at 0, the tensor before it ends at 8"),
    ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "begins at 12"),
    ({"a": entry(offsets=(4, 12))}, bytes(12), "begins at 4"),
    ({"a": entry()}, bytes(9), "expected 8"), ({"a": entry()}, bytes(7), "holds 7 bytes"),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":'
     + json.dumps(entry()).encode() + b"}", bytes(8), "twice"),
    ({"a\n\x1b[31mb": entry()}, bytes(8), "no name of a tensor"),
    ({"a" * 999: entry()}, bytes(8), "no name"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"", "not a whole safetensors"),
    (b'{"a":' + b"9" * 5000 + b"}", b"", "not a whole safetensors")])
def test_a_file_that_lies_is_named(tmp_path, header, data, words):
    with pytest.raises(ValueError, match=words) as error:
        open_file(a_file(tmp_path / "x", header, data))
    assert str(tmp_path / "x") in str(error.value) and len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, 100, 3])
def test_a_header_longer_or_shorter_than_it_says(tmp_path, length):
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_file(a_file(tmp_path / "x", {"a": entry()}, bytes(8), length))


def test_large_headers_take_no_memory(tmp_path):
    """A header of 2^40 bytes in a sparse file, and the widest JSON under the limit."""
    with open(tmp_path / "sparse", "wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate((1 << 40) + 8)
    wide = b'{"a":[' + b"{}," * ((JSON_LIMIT - 20) // 3) + b"{}]}"
    tracemalloc.start()
    for path in (tmp_path / "sparse", a_file(tmp_path / "wide", wide)):
        with pytest.raises(ValueError):
            open_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_a_tensor_larger_than_the_memory_is_named(tmp_path):
    """A sparse file: its 16 TB are zeros that take no room on the disk."""
    header = json.dumps({"a": entry("F16", (1 << 42,), (0, 1 << 43))}).encode()
    with open(a_file(tmp_path / "x", header), "r+b") as file:
        file.truncate(8 + len(header) + (1 << 43))
    with pytest.raises(ValueError, match="x: no memory for the 17,592,186,044,416 bytes of a"):
        open_file(tmp_path / "x")["a"].read(torch.float32)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "not a regular file"),
                        (tmp_path / "none", "no such file")):
        with pytest.raises(ValueError, match=words):
            open_file(path)


@pytest.mark.parametrize("where", ["../x.safetensors", "/etc/passwd", "a/b", "", ".hidden", "x\n",
                                   3, None, "x\0"])
def test_an_index_stays_in_its_folder(tmp_path, where):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": where}}))
    with pytest.raises(ValueError, match="not the name of a file beside it"):
        open_folder(tmp_path / "in")


@pytest.mark.parametrize("index, words", [
    ({}, "no weight_map"), ({"weight_map": []}, "no weight_map"),
    ({"weight_map": {"a": "y"}}, "no such"),
    ({"weight_map": {"a": "x", "b": "x", "z": "x"}},
     "missing z; unexpected c; unexpected empty; unexpected scalar")])
def test_an_index_and_its_shards_agree(tmp_path, index, words):
    save_file(TENSORS, tmp_path / "x")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        open_folder(tmp_path)


def test_a_file_cut_after_opening_is_an_error_not_a_crash(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    tensors = open_file(tmp_path / "x")
    os.truncate(tmp_path / "x", os.path.getsize(tmp_path / "x") - 30)
    with pytest.raises(ValueError, match="whole when it was opened"):
        read_all(tensors)


@settings(max_examples=400, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
       cut=st.integers(0, 10**6) | st.none(), extra=st.binary(max_size=20))
def test_random_corruption_is_an_error_or_other_numbers(tmp_path_factory, edits, cut, extra):
    """Whatever happens to a file, it is refused with a ValueError or read as what its header
    says.
    """
    path = tmp_path_factory.getbasetemp() / "corrupt"
    save_file(TENSORS, path)
    data = bytearray(path.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path.write_bytes(data[:None if cut is None else cut % len(data)] + extra)
    try:
        tensors = open_file(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    for stored in tensors.values():
        assert isinstance(stored, Stored) and stored.read().shape == stored.shape
