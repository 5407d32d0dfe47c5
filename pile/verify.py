"""Whether token files are the right ones: the command `verify` of data.py."""

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import replacing
from data import TokenFile, check_index, read_json

@dataclass(frozen=True)
class Verify:
    data: str  # PREFIX of a token file
    # lines of "name sha256" or "sha256 name"; without: print the files' own hashes
    hashes: str = ""


def verify(options):
    """Check that an index is sound and that files have the SHA-256 they should have."""
    tokens = TokenFile(options.data)
    check_index(tokens)
    folder, prefix = os.path.split(tokens.prefix)
    last = len(tokens.shards) - 2
    shards = [f"{prefix}-{shard:05}-of-{last:05}.bin" for shard in range(last + 1)] if last else [
        f"{prefix}.bin"]
    expected = read_hashes(options.hashes) if options.hashes else dict.fromkeys(
        [f"{prefix}.idx", *shards])
    paths = {name: os.path.join(folder, name) for name in expected}
    known_path = f"{tokens.prefix}.verified.json"  # so that 600 GB are read once
    known = {name: seal for name, seal in (
                 read_json(known_path) if os.path.exists(known_path) else {}).items()
             if isinstance(seal, list) and len(seal) == 3}
    present = [name for name in expected if os.path.exists(paths[name])]
    wrong = []
    with tqdm(total=sum(os.path.getsize(paths[name]) for name in present), unit="B",
              unit_scale=True, disable=None) as bar:
        for name in expected:
            if name not in present:
                print(f"missing  {name}")
                continue
            stat = os.stat(paths[name])
            seal = [stat.st_size, stat.st_mtime_ns]
            if known.get(name, [])[:2] != seal:
                known[name] = [*seal, sha256_of(paths[name], bar)]
                with replacing(known_path) as file:
                    file.write(json.dumps(known, indent=2).encode())
            else:
                bar.update(stat.st_size)
            found = known[name][2]
            if expected[name] is None:
                print(f"{found}  {name}")
            elif found == expected[name]:
                print(f"ok       {name}")
            else:
                wrong.append(name)
                print(f"WRONG    {name}: {found}, expected {expected[name]}")
    print(f"{len(tokens):,} documents, {tokens.n_tokens:,} tokens, sizes and pointers sound; "
          f"{len(present)} files read, {len(expected) - len(present)} missing, {len(wrong)} wrong")
    if wrong or len(present) < len(expected) or not present:
        sys.exit(1)


def read_hashes(path):
    """Return {file name: SHA-256} of a list in either column order."""
    hashes = {}
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
        words = line.split()
        digests = [word for word in words if re.fullmatch(r"[0-9a-fA-F]{64}", word)]
        if words and (len(words) != 2 or len(digests) != 1):
            raise ValueError(f"{path}, line {number}: expected a file name and a SHA-256, found "
                             f"{line[:80]!r}")
        if words:
            [name] = [word for word in words if word not in digests]
            hashes[os.path.basename(name.lstrip("*"))] = digests[0].lower()
    return hashes


def sha256_of(path, bar):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece), bar.update(len(piece))
    return digest.hexdigest()
