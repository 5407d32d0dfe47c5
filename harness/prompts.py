"""What all evaluation tasks share: documents, prompts with their shots. No model, no single task.

Style "v0.4" is lm-evaluation-harness 0.4 (api/task.py, api/samplers.py); style "v0.3" is the
harness of early 2023, with which the paper's files were made. Both are exact, down to the draws of
the shots.
"""

import hashlib
import json
import os
import random
import re
from dataclasses import dataclass, field as default
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable

STYLES = ("v0.4", "v0.3")


@dataclass
class Question:
    """What one document asks of a model, before any shots."""
    # (context, continuation) texts; contexts if the task generates, texts if it rolls
    requests: list
    shot: str = ""  # the document with its answer, as an example for another
    gold: object = None  # position of the right choice, accepted answers, or a subset's name
    lengths: list = default(default_factory=list)  # of the choices, in code points


@dataclass(frozen=True)
class Task:
    folder: str  # below DOCS
    question: Callable  # document -> Question
    measure: Callable  # (questions, results of each, style) -> rows
    split: str = "test"  # what is scored
    # split of the shots: train if the set has one, else validation, else test
    pool: str | None = "train"
    n: int = 0  # documents in the whole split
    prepare: Callable = list  # documents of a split -> those of the task
    prepare_pool: Callable | None = None  # if not the same
    files: tuple = ()  # if they are not called after the split; the first there is
    description: str = ""  # before everything, at 0 shots too
    kind: str = "loglikelihood"  # or "generate", "rolling"
    stops: tuple = ("\n",)  # where a generated text ends
    n_tokens: int = 0  # most tokens to generate


# ---------------------------------------------------------------------------- documents


class NoDocuments(ValueError):
    """A file of documents is there, but holds none of the task."""


class Document(dict):
    """One line of a JSON Lines file, which knows where it stands; equal if its fields are."""
    where = ""


def field(doc, name, kind):
    """Return doc[name] ("a.b" for doc["a"]["b"]); raise ValueError if it is missing or no `kind`.

    kind: a type, or [a type] for a list of it.
    """
    value = doc
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(kind, list):
        if type(value) is not list or not all(type(item) is kind[0] for item in value):
            raise ValueError(f"{doc.where}: {name} is {_short(value)}, expected a list of "
                             f"{kind[0].__name__}")
    elif type(value) is not kind:
        raise ValueError(f"{doc.where}: {name} is {_short(value)}, expected a {kind.__name__}")
    return value


text, texts = partial(field, kind=str), partial(field, kind=[str])


def position(doc, name, options):
    """Return doc[name] as an index into `options`: a number, a digit or a truth value."""
    value = doc.get(name)
    number = str(int(value) if isinstance(value, bool) else value)
    if not re.fullmatch("[0-9]{1,9}", number) or not int(number) < len(options):
        raise ValueError(f"{doc.where}: {name} is {_short(value)}, expected 0 to "
                         f"{len(options) - 1}")
    return int(number)


def member(doc, name, options):
    """Return the index of doc[name] in the list `options`."""
    if doc.get(name) not in options:
        raise ValueError(f"{doc.where}: {name} is {_short(doc.get(name))}, expected one of "
                         f"{options}")
    return options.index(doc[name])


def _short(value):
    shown = repr(value)
    return shown if len(shown) < 80 else shown[:77] + "..."


@lru_cache(maxsize=8)
def read_jsonl(path):
    """Return the Documents of a JSON Lines file."""
    documents = []
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may have no end
        raise ValueError(f"{path}: not a regular file")
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            document = Document(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from None
        document.where = f"{path}, line {number}"
        documents.append(document)
    if not documents:
        raise ValueError(f"{path}: holds no documents")
    return tuple(documents)


def find_file(docs, task, split):
    """Return the path of a task's split below `docs`, or raise ValueError.

    It is SPLIT.jsonl, or else the one file whose name has the split's in it (xl_validation.jsonl).
    """
    folder, names = Path(docs) / task.folder, task.files or (f"{split}.jsonl",)
    there = [folder / name for name in names if (folder / name).exists()]
    short = "val" if split == "validation" else split  # SuperGLUE's name for it
    near = [] if task.files else sorted(folder.glob(f"*{short}*.jsonl"))
    if not there and len(near) != 1:
        raise ValueError(f"{folder / names[0]}: " + (
            f"no such file, and {len(near)} others could be it: "
            f"{', '.join(p.name for p in near)}" if near
            else "no such file; --docs=DIR expects the task's documents there (`eval.py tasks` "
            "lists them)"))
    return (there or near)[0]


def read_split(docs, task, split):
    """Return the task's Documents of a split, prepared."""
    path = find_file(docs, task, split)
    prepare = task.prepare_pool if split != task.split and task.prepare_pool else task.prepare
    documents = prepare(read_jsonl(path))
    if not documents:
        raise NoDocuments(f"{path}: holds no documents of this task")
    return documents


# ---------------------------------------------------------------------------- prompts


def prompts(task, docs, shots=0, style="v0.4", limit=None):
    """Return ([(prompt before the question, Question)], hash of the documents used).

    v0.4 draws with one Random(1234) a task, in the file's order; v0.3 with one Random(42), which
    has shuffled the documents first (so its `limit` is a sample). A document is kept out of its own
    shots where each harness keeps it out. Raises ValueError if the pool is too small.
    """
    documents = list(read_split(docs, task, task.split))
    rng = random.Random(1234 if style == "v0.4" else 42)
    if style == "v0.3":
        rng.shuffle(documents)
    documents = documents[:limit]
    pool = read_split(docs, task, task.pool) if shots else []
    own = task.split == "validation" if style == "v0.4" else task.pool != "train"
    drawn = shots and shots + own
    if len(pool) < drawn:
        raise ValueError(f"{task.folder}: {shots} shots need {drawn} documents of {task.pool}, "
                         f"there are {len(pool)}")
    prefixes = []
    for document in documents:
        examples = pool[:shots] if task.pool == "dev" else rng.sample(pool, drawn)
        if own:
            examples = [example for example in examples if example != document][:shots]
            if len(examples) < shots and style == "v0.4":  # the pool has copies of this document
                others = [example for example in pool if example != document]
                if len(others) < shots:
                    raise ValueError(f"{document.where}: {shots} shots, "
                                     f"but only {len(others)} other documents")
                examples = rng.sample(others, shots)
        shown = "\n\n".join(task.question(example).shot for example in examples)
        # v0.3 has the blank line too if no shot is left.
        prefixes.append(task.description + (shown + "\n\n" if shots else ""))
    return ([(prefix, task.question(document)) for prefix, document in zip(prefixes, documents)],
            digest([documents, pool]))


def digest(value):
    """Return 12 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def choose(question, choices, gold, delimiter=" "):
    """One context, several continuations."""
    return Question([(question, delimiter + choice) for choice in choices],
                    question + delimiter + choices[gold], gold, [len(choice) for choice in choices])


def fill(beginnings, rest, gold):
    """Several contexts, one continuation (partial scoring, Trinh and Le 2018)."""
    return Question([(beginning, rest) for beginning in beginnings], beginnings[gold] + rest, gold)
