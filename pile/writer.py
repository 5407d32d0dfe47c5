"""Token files written whole or not at all, by jobs that go on where they were killed."""

import fcntl
import hashlib
import json
import os
import shutil
from glob import escape, glob
from pathlib import Path

import numpy as np

from config import replacing
from data import MAGIC, read_json

# What PREFIX_documents.npy holds of each document: names of subsets and files are in PREFIX.json.
PROVENANCE = np.dtype([("file", "<u4"), ("line", "<u4"), ("subset", "<u4")])


class TokenWriter:
    """Builds PREFIX.bin, .idx, .json and _documents.npy in PREFIX.partial.

    job: a JSON object that says what is being written; another one found in PREFIX.partial is
    thrown away, the same one is continued from `position`, what the last commit was given (None at
    first).
    """

    PARTS = {"bin": np.dtype("<u2"), "sizes": np.dtype("<i4"), "documents": PROVENANCE}

    def __init__(self, prefix, job):
        self.prefix, self.folder = str(prefix), Path(f"{prefix}.partial")
        if not os.path.basename(self.prefix):
            raise ValueError(f"output = {self.prefix!r}, expected the PREFIX of files, not a "
                             "folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        # Let go of when the process ends, however it ends.
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another process is writing there") from None
        self.job = hashlib.sha256(json.dumps(job).encode()).hexdigest()
        state = self._committed()
        if state is None:
            for path in self.folder.iterdir():
                path.unlink()
            state = {"position": None, "bytes": dict.fromkeys(self.PARTS, 0)}
        self.position = state["position"]
        self.files = {name: open(self.folder / name, "ab") for name in self.PARTS}
        for name, file in self.files.items():
            file.truncate(state["bytes"][name])

    def _committed(self):
        """Return what the last commit of this very job noted, None if all of it is not there."""
        try:
            state = read_json(self.folder / "progress.json")
            whole = all((self.folder / name).stat().st_size >= state["bytes"][name]
                        for name in self.PARTS)
            return state if whole and state["job"] == self.job else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def close(self):
        """Leave what was committed to whoever goes on with this job."""
        for file in self.files.values():
            file.close()
        os.close(self.lock)

    def append(self, tokens, sizes, documents=np.empty(0, PROVENANCE)):
        """Add documents: tokens one after the other, size of each, PROVENANCE of each or none."""
        for (name, dtype), values in zip(self.PARTS.items(), (tokens, sizes, documents)):
            self.files[name].write(np.ascontiguousarray(values, dtype=dtype).data)

    def commit(self, position):
        """Make what was appended survive a kill, with a JSON note of where in the input it ends."""
        self.position = position
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {"job": self.job, "position": position,
                 "bytes": {name: file.tell() for name, file in self.files.items()}}
        with replacing(self.folder / "progress.json") as file:
            file.write(json.dumps(state).encode())

    def finish(self, summary):
        """Write the index, move all into place, the index last: then the token file exists."""
        self.commit(self.position)
        for file in self.files.values():
            file.close()
        sizes = np.fromfile(self.folder / "sizes", dtype="<i4")
        if not len(sizes):
            shutil.rmtree(self.folder)
            raise ValueError(f"{self.prefix}.bin: nothing to write, the input holds no documents")
        summary = {"documents": len(sizes), "tokens": int(sizes.sum(dtype=np.int64)), **summary}
        with open(self.folder / "idx", "wb") as file:
            write_index(file, sizes)
            file.flush()
            os.fsync(file.fileno())
        # What was made from a file of the same name before does not belong to this one.
        for stale in [f"{self.prefix}.idx",
                      *glob(f"{escape(self.prefix)}_train_0_indexmap_*_idx.npy")]:
            Path(stale).unlink(missing_ok=True)
        if os.path.getsize(self.folder / "documents"):
            with replacing(f"{self.prefix}_documents.npy") as file:
                np.save(file, np.fromfile(self.folder / "documents", dtype=PROVENANCE))
        with replacing(f"{self.prefix}.json") as file:
            file.write(json.dumps(summary, indent=2).encode())
        os.replace(self.folder / "bin", f"{self.prefix}.bin")
        os.replace(self.folder / "idx", f"{self.prefix}.idx")
        shutil.rmtree(self.folder)
        os.close(self.lock)
        return summary


def write_index(file, sizes, block=1 << 24):
    """Write the .idx of consecutive uint16 documents (data.py draws its bytes)."""
    n = len(sizes)
    for part in (MAGIC, (1).to_bytes(8, "little"), bytes([8]), n.to_bytes(8, "little"),
                 (n + 1).to_bytes(8, "little"), np.asarray(sizes, dtype="<i4").data):
        file.write(part)
    pointer = 0
    for start in range(0, n, block):
        ends = pointer + 2 * np.cumsum(sizes[start:start + block], dtype="<i8")
        file.write(np.concatenate(([pointer], ends[:-1])).astype("<i8").data)
        pointer = int(ends[-1])
    for start in range(0, n + 1, block):
        file.write(np.arange(start, min(start + block, n + 1), dtype="<i8").data)
