"""pytest tests/test_files.py

Tensor files of strangers: read bit for bit, or refused in one line that names them. Nothing runs.
"""

import json
import os
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoints import open_file, open_files, split, weight_files, write_file

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.full((5,), 0.1, dtype=torch.float16),
           "scalar": torch.tensor(3, dtype=torch.int64), "empty": torch.zeros(0, 7),
           "c": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_safetensors_of_every_dtype_are_read_and_written(tmp_path):
    tensors = TENSORS | {str(dtype): torch.ones(3).to(dtype) for dtype in (
        torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}
    write_file(tmp_path / "x", tensors)
    assert same(load_file(tmp_path / "x"), tensors)
    assert same(open_file(tmp_path / "x"), tensors)


@pytest.mark.parametrize("shard_size, shards", [(10**9, 1), (48, 2), (1, 5)])
def test_shards_hold_the_same_bits(tmp_path, shard_size, shards):
    tensors = TENSORS | {"empty": torch.ones(1)}
    files, notes = split("model", tensors, shard_size)
    for name, some in files.items():
        write_file(tmp_path / name, some)
    assert len(files) == shards == len(weight_files(tmp_path))
    assert same(open_files(weight_files(tmp_path)), tensors)
    for index in notes.values():
        assert index["weight_map"] == {name: file for file in files for name in files[file]}


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("header, data", [
    (b"[1]", b""), (b"{", b""), (b"\xff{}", b""), ({"a": 3}, b""), ({"a": entry("F31")}, bytes(8)),
    ({"a": entry(shape=(-2,))}, bytes(8)), ({"a": entry(shape=(3,))}, bytes(8)),
    ({"a": entry(offsets=(8, 0))}, bytes(8)), ({"a": entry(shape=(1 << 60,))}, bytes(8)),
    ({"a": entry(), "b": entry()}, bytes(8)), ({"a": entry(offsets=(4, 12))}, bytes(12)),
    ({"a": entry()}, bytes(9)), ({"a": entry()}, bytes(7)), ({"a\n\x1b[31mb": entry()}, bytes(8)),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"")])
def test_a_file_that_lies_is_named(tmp_path, header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(ValueError, match="not a whole file of tensors alone") as error:
        open_file(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value) and len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "not a regular file"),
                        (tmp_path / "none", "no such file")):
        with pytest.raises(ValueError, match=words):
            open_file(path)


# ---------------------------------------------------------------------------- torch.save's files


class Run:
    """Unpickling this runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("hidden", [lambda run: run, lambda run: {"a": run},
                                    lambda run: {"a": torch.ones(2), "b": [run]}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, hidden, zipped):
    torch.save(hidden(Run(tmp_path / "ran")), tmp_path / "x.bin",
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="x.bin: not a whole file of tensors alone") as error:
        open_file(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("value, words", [
    ([torch.ones(2)], "'list' object"), ({"a": 3}, "'int' object"),
    ({3: torch.ones(2)}, "'int' object"),
    ({"a": torch.ones(1).expand(1 << 40)}, "'a' is not a plain tensor"),
    ({"a": torch.ones(2, 3).T}, "not a plain"), ({"a": torch.ones(2).to_sparse()}, "'a' is not")])
def test_what_is_no_state_dict_is_named(tmp_path, value, words):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=words):
        open_file(tmp_path / "x.bin")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "honest.bin")
    with (zipfile.ZipFile(tmp_path / "honest.bin") as old,
          zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as new):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="bomb.bin: "):
        open_file(tmp_path / "bomb.bin")


@settings(max_examples=200, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
       cut=st.integers(0, 10**6) | st.none(), pickled=st.booleans())
def test_random_corruption_is_an_error_or_other_numbers(tmp_path_factory, edits, cut, pickled):
    """Whatever happens to a file, it is refused with a ValueError or read as what it says."""
    path = tmp_path_factory.getbasetemp() / ("x.bin" if pickled else "x.safetensors")
    (torch.save if pickled else save_file)(TENSORS, path)
    data = bytearray(path.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path.write_bytes(data[:None if cut is None else cut % len(data)])
    try:
        tensors = open_file(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 500
        return
    for tensor in tensors.values():
        assert tensor.clone().shape == tensor.shape
