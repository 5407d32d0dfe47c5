"""Files of torch.save: looked through, then read with weights_only, so nothing in them runs."""

import pickletools
import re
import struct
import zipfile
from contextlib import contextmanager

import torch

from weights.tensors import CODES, JSON_LIMIT, Stored, allocate, is_name, regular_size

# What the pickle of a state dict names. Anything else would be code.
HARMLESS = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|"
                      r"torch \w+Storage")


@contextmanager
def open_archive(path):
    """Give the ZipFile of a file of torch.save, or raise ValueError.

    It is of one pickle, no bomb, and the same to every reader: PyTorch has one of its own, which
    finds the directory by other rules and takes upper for lower case.
    """
    size = regular_size(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read().rjust(98, b"\0")
        end, (length, start) = size - 22, struct.unpack("<2L", tail[88:96])
        if tail[56:60] == b"PK\6\7":  # the 64-bit form, which torch.save writes
            end, (length, start) = size - 98, struct.unpack("<2Q", tail[40:56])
            if tail[:4] != b"PK\6\6" or int.from_bytes(tail[64:72], "little") != end:
                raise ValueError("the end of the directory is not at the end")
        if tail[76:80] != b"PK\5\6" or tail[96:] != b"\0\0" or start + length != end:
            raise ValueError("no directory at the end: cut off, or torch.save's old form (load and "
                             "save it again with a newer torch)")
        if length > JSON_LIMIT:  # ZipFile reads it whole
            raise ValueError(f"a directory of {length:,} bytes")
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if (record.compress_type, record.compress_size) != (zipfile.ZIP_STORED,
                                                                    record.file_size):
                    raise ValueError("compressed records")
                if "/data/" not in record.orig_filename and record.file_size > JSON_LIMIT:
                    raise ValueError(f"{record.orig_filename[:50]!r} of {record.file_size:,} bytes")
            if sum(map(_is_pickle, archive.infolist())) != 1:
                raise ValueError("expected one data.pkl")
            yield archive


def _is_pickle(record):
    return record.orig_filename.lower().endswith("/data.pkl")


def look_through(pickle):
    """Raise ValueError if a pickle names more than tensors or has tuples torch.save never makes.

    Hashed as a key, a tuple that holds another twice, and that one another twice, takes 2^n steps;
    a million nested ones end the process.
    """
    stacks, memo = [[]], {}  # how deep tuples are nested in what is on the reader's stack, by mark
    for opcode, argument, _ in pickletools.genops(pickle):
        name, taken = opcode.name, opcode.stack_before
        if name == "STACK_GLOBAL" or (name in ("GLOBAL", "INST")
                                      and not HARMLESS.fullmatch(argument)):
            raise ValueError(f"the pickle wants to run {argument or 'code'}; refused")
        if name == "MARK":
            stacks.append([])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stacks[-1][-1]
        else:
            items = stacks.pop() if pickletools.markobject in taken else []
            items += [stacks[-1].pop() for what in taken
                      if what not in (pickletools.markobject, pickletools.stackslice)]
            depth = 1 + max(items, default=0) if "TUPLE" in name else 0
            if depth > 4 or name in ("BINGET", "LONG_BINGET") and memo[argument]:
                raise ValueError("the pickle nests tuples or uses one twice")
            stacks[-1] += [depth] * len(opcode.stack_after)


def load_pickle(path):
    """Return {name: tensor} of a torch.save file, mapped and not yet read, or raise ValueError."""
    regular_size(path)
    try:
        with open_archive(path) as archive:
            pickle = next(record for record in archive.infolist() if _is_pickle(record))
            look_through(archive.read(pickle))
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken archive or pickle raises whatever it likes
        words = str(error).split()
        if len(words) < 2:  # KeyError: 3
            words.insert(0, type(error).__name__)
        raise ValueError(f"{path}: not a whole file of torch.save: {' '.join(words)[:200]}"
                         ) from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: holds a {type(tensors).__name__}, expected a dict of tensors")
    for name, tensor in tensors.items():
        if not is_name(name):
            shown = repr(name)[:50] if type(name) in (str, int) else f"a {type(name).__name__}"
            raise ValueError(f"{path}: {shown} is no name of a tensor")
        if not (isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
                and tensor.dtype in CODES and tensor.device.type == "cpu"
                and tensor.is_contiguous()):
            raise ValueError(f"{path}: {name} is not a plain tensor")
    return tensors


class Mapped:
    """The tensors of a torch.save file.

    Pages that it has shown count as memory, so it is mapped anew every GB.
    """

    def __init__(self, path):
        self.path, self.shown, self.tensors = path, 0, load_pickle(path)

    def read(self, name):
        """Return a copy of a tensor."""
        if self.shown > 1 << 30:
            self.tensors = None
            self.shown, self.tensors = 0, load_pickle(self.path)
        tensor = self.tensors[name].detach()
        self.shown += tensor.nbytes
        return allocate(self.path, name, tensor.shape, tensor.dtype).copy_(tensor)


def open_pickle(path):
    """Return {name: Stored} of a torch.save file."""
    mapped = Mapped(path)
    return {name: Stored(path, tensor.dtype, tuple(tensor.shape),
                         lambda name=name: mapped.read(name))
            for name, tensor in mapped.tensors.items()}
