"""Files of torch.save: looked through first and then read with weights_only, so nothing in them runs."""

import pickletools
import re
import zipfile

import torch

from weights.tensors import CODES, JSON_LIMIT, Stored, regular_size, size_of

# What the pickle of a state dict names. Anything else would be code.
HARMLESS = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


def load_pickle(path):
    """Return {name: tensor} of a torch.save file, mapped and not yet read, or raise ValueError naming it."""
    regular_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            # torch.save never compresses; a compressed record may be a bomb.
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("compressed records")
            pickle = next(record for record in records if record.filename.endswith("/data.pkl"))
            if pickle.file_size > JSON_LIMIT:
                raise ValueError(f"a pickle of {pickle.file_size:,} bytes")
            for opcode, argument, _ in pickletools.genops(archive.read(pickle)):
                if opcode.name == "STACK_GLOBAL" or (
                        opcode.name in ("GLOBAL", "INST") and not HARMLESS.fullmatch(argument)):
                    raise ValueError(f"the pickle wants to run {argument or 'code'}; refused")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken archive or pickle raises whatever it likes
        raise ValueError(f"{path}: not a whole file of torch.save: "
                         f"{' '.join(f'{type(error).__name__} {error}'.split())[:200]}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: holds a {type(tensors).__name__}, expected a dict of tensors")
    for name, tensor in tensors.items():
        if type(name) is not str or not name.isprintable():
            raise ValueError(f"{path}: {repr(name)[:50]} is no name of a tensor")
        if not (isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.dtype in CODES
                and tensor.device.type == "cpu" and tensor.is_contiguous()):
            raise ValueError(f"{path}: {name} is not a plain tensor")
    return tensors


class Mapped:
    """The tensors of a torch.save file; pages it has shown count as memory, so it is mapped anew every GB."""

    def __init__(self, path):
        self.path, self.shown, self.tensors = path, 0, load_pickle(path)

    def read(self, name):
        """Return a copy of a tensor."""
        if self.shown > 1 << 30:
            self.tensors = None
            self.shown, self.tensors = 0, load_pickle(self.path)
        self.shown += size_of(self.tensors[name])
        return self.tensors[name].detach().clone()


def open_pickle(path):
    """Return {name: Stored} of a torch.save file."""
    mapped = Mapped(path)
    return {name: Stored(path, tensor.dtype, tuple(tensor.shape), lambda name=name: mapped.read(name))
            for name, tensor in mapped.tensors.items()}
