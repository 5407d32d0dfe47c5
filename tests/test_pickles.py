"""pytest tests/test_pickles.py"""

import os
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings, strategies as st

from checkpoints import open_pickle
from checkpoints import JSON_LIMIT
from verify import check_files, Scan


class Run:
    """Unpickling this runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("hidden", [lambda run: run, lambda run: {"a": run},
                                    lambda run: {"a": torch.ones(2), "b": [run]}])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, hidden):
    torch.save(hidden(Run(tmp_path / "ran")), tmp_path / "x.bin")
    with pytest.raises(ValueError, match="x.bin: .*wants to run (posix|os) system; refused"):
        open_pickle(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value, words", [
    ([torch.ones(2)], "holds a list"), ({"a": 3}, "a is not a plain tensor"),
    ({3: torch.ones(2)}, "3 is no name"), ({"a" * 999: torch.ones(2)}, "is no name"),
    ({torch.ones(1): torch.ones(2)}, "a Tensor is no name"),
    ({"a": torch.ones(1).expand(1 << 40)}, "a is not a plain tensor"),
    ({"a": torch.ones(2, 3).T}, "not a plain"),
    ({"a": torch.ones(2).to_sparse()}, "wants to run torch._utils _rebuild_sparse_tensor"),
    ({"a": torch.ones(2, dtype=torch.complex64)}, "not a plain tensor"),
    ({"a": torch.ones(2, device="meta")}, "wants to run")])
def test_what_is_no_state_dict_is_named(tmp_path, value, words):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=words):
        open_pickle(tmp_path / "x.bin")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "honest")
    with (zipfile.ZipFile(tmp_path / "honest") as old,
          zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as new):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="bomb: .*compressed records"):
        open_pickle(tmp_path / "bomb")


# 600 MB out of 40 bytes, were it loaded: weights_only allows bytearray.
BYTEARRAY = (b"\x80\2}X\1\0\0\0acbuiltins\nbytearray\nJ" + (600 << 20).to_bytes(4, "little")
             + b"\x85Rs.")


def archive(path, changes=(), before=(), directory=lambda tail: tail):
    """Write a file of torch.save with other records in place of its own or before them, another
    end.
    """
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as honest:
        records = {name.partition("/")[2]: honest.read(name) for name in honest.namelist()}
    writer = torch._C.PyTorchFileWriter(str(path))  # as torch.save does, but for the records
    for name, data in [*before, *(records | dict(changes)).items()]:
        if name not in ("version", ".data/serialization_id"):  # which it writes itself
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    data = path.read_bytes()
    path.write_bytes(data[:-98] + directory(data[-98:]))
    return path


def test_an_archive_is_looked_through_as_pytorch_reads_it(tmp_path):
    """What is looked through is what is loaded, and nothing in it is larger than a state dict's."""
    path = tmp_path / "x.bin"
    assert torch.equal(open_pickle(archive(path))["a"].read(), torch.ones(3))
    pickle = zipfile.ZipFile(path).read("x/data.pkl")
    for words, options in (
            ("builtins bytearray; refused", dict(changes={"data.pkl": BYTEARRAY})),
            ("expected one data.pkl", dict(changes={"data.pkl": BYTEARRAY},
                                           before=[("x/data.pkl", pickle)])),
            ("expected one data.pkl", dict(before=[("DATA.PKL", pickle)])),
            ("'x/byteorder' of 4,194,305 bytes",
             dict(changes={"byteorder": bytes(JSON_LIMIT + 1)})),
            ("'x/more' of 4,194,305 bytes", dict(before=[("more", bytes(JSON_LIMIT + 1))])),
            ("not at the end", dict(directory=lambda tail: bytes(4) + tail[4:])),
            ("not at the end", dict(directory=lambda tail: tail[:64] + bytes(8) + tail[72:])),
            ("no directory at the end", dict(directory=lambda tail: tail[:48] + bytes(8)
                                             + tail[56:])),
            ("no directory at the end", dict(directory=lambda tail: tail + b"PK"))):
        with pytest.raises(ValueError, match=words):
            open_pickle(archive(path, **options))


def test_the_old_form_of_torch_save_is_named(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch.save: no directory at the end: cut off, or .* old "
                                         r"form \(load and save it again with a newer torch"):
        open_pickle(tmp_path / "x.bin")


def test_a_directory_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(3 << 30)
        file.seek(3 << 30)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 3 << 30, 0, 0))
    with pytest.raises(ValueError, match="a directory of 3,221,225,472 bytes"):
        open_pickle(tmp_path / "x.bin")


def test_a_record_longer_than_it_says_is_refused(tmp_path):
    data = archive(tmp_path / "x.bin").read_bytes()
    place = data.index(b"PK\1\2") + 24  # its size once it is decompressed, in the directory
    (tmp_path / "x.bin").write_bytes(data[:place] + b"\1\0\0\0" + data[place + 4:])
    with pytest.raises(ValueError, match="compressed records"):
        open_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("key", [b")" + b"q\0h\0\x86" * 60, b")" + b"\x85" * 10**6,
                                 b")" + b"K\1\x86" * 10**6, b"(" * 6 + b"K\1" + b"t" * 6])
def test_a_key_of_nested_tuples_is_refused_at_once(tmp_path, key):
    """The first one takes 2^60 steps to hash, the next two end the process."""
    with pytest.raises(ValueError, match="nests tuples or uses one twice"):
        open_pickle(archive(tmp_path / "x.bin", {"data.pkl": b"\x80\2}" + key + b"K\1s."}))


@settings(max_examples=250, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)),
                      min_size=1, max_size=4), cut=st.integers(0, 10**6) | st.none())
def test_random_corruption_of_a_pickle_is_an_error_or_other_numbers(tmp_path_factory, edits, cut):
    path = tmp_path_factory.getbasetemp() / "corrupt_pickle/x.bin"
    path.parent.mkdir(exist_ok=True)
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}, path)
    data = bytearray(path.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path.write_bytes(data[:None if cut is None else cut % len(data)])
    try:
        for stored in open_pickle(path).values():
            assert stored.read().shape == stored.shape
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 400
    found = Scan(0, path.parent, 0)
    check_files(found)
    assert all(line.startswith("x.bin: ") and "\n" not in line for line in found.problems)
