"""What all evaluation tasks share: documents, prompts with their shots, metrics. No model, no single task.

Style "v0.4" is lm-evaluation-harness 0.4 (api/task.py, api/samplers.py, api/metrics.py); style "v0.3" is
the harness of early 2023, with which the paper's files were made. Both are exact, down to the draws of
the shots and of the bootstrap.
"""

import hashlib
import json
import math
import random
import re
import statistics
import string
from collections import defaultdict
from dataclasses import dataclass, field as default
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable

import numpy as np

STYLES = ("v0.4", "v0.3")


@dataclass
class Question:
    """What one document asks of a model, before any shots."""
    requests: list  # (context, continuation) texts; contexts if the task generates, texts if it rolls
    shot: str = ""  # the document with its answer, as an example for another
    gold: object = None  # position of the right choice, accepted answers, or a subset's name
    lengths: list = default(default_factory=list)  # of the choices, in code points


@dataclass(frozen=True)
class Task:
    folder: str  # below DOCS
    question: Callable  # document -> Question
    measure: Callable  # (questions, results of each, style) -> rows
    split: str = "test"  # what is scored
    pool: str | None = "train"  # split of the shots: train if the set has one, else validation, else test
    n: int = 0  # documents in the whole split
    prepare: Callable = list  # documents of a split -> those of the task
    prepare_pool: Callable | None = None  # if not the same
    files: tuple = ()  # if they are not called after the split; the first there is
    description: str = ""  # before everything, at 0 shots too
    kind: str = "loglikelihood"  # or "generate", "rolling"
    stops: tuple = ("\n",)  # where a generated text ends
    n_tokens: int = 0  # most tokens to generate


# ---------------------------------------------------------------------------- documents


class Document(dict):
    """One line of a JSON Lines file, which knows where it stands; equal if its fields are."""
    where = ""


def field(doc, name, kind):
    """Return doc[name] ("a.b" for doc["a"]["b"]), or raise ValueError if it is missing or no `kind`.

    kind: a type, or [a type] for a list of it.
    """
    value = doc
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(kind, list):
        if type(value) is not list or not all(type(item) is kind[0] for item in value):
            raise ValueError(f"{doc.where}: {name} is {_short(value)}, expected a list of {kind[0].__name__}")
    elif type(value) is not kind:
        raise ValueError(f"{doc.where}: {name} is {_short(value)}, expected a {kind.__name__}")
    return value


text, texts = partial(field, kind=str), partial(field, kind=[str])


def position(doc, name, options):
    """Return doc[name] as an index into `options`: a number, a digit or a truth value."""
    value = doc.get(name)
    if not re.fullmatch("[0-9]+|True|False", str(value)) or not int(value) < len(options):
        raise ValueError(f"{doc.where}: {name} is {_short(value)}, expected 0 to {len(options) - 1}")
    return int(value)


def member(doc, name, options):
    """Return the index of doc[name] in the list `options`."""
    if doc.get(name) not in options:
        raise ValueError(f"{doc.where}: {name} is {_short(doc.get(name))}, expected one of {options}")
    return options.index(doc[name])


def _short(value):
    shown = repr(value)
    return shown if len(shown) < 80 else shown[:77] + "..."


@lru_cache(maxsize=8)
def read_jsonl(path):
    """Return the Documents of a JSON Lines file."""
    documents = []
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
            f"no such file, and {len(near)} others could be it: {', '.join(p.name for p in near)}" if near
            else "no such file; --docs=DIR expects the task's documents there (`eval.py tasks` lists them)"))
    return (there or near)[0]


def read_split(docs, task, split):
    """Return the task's Documents of a split, prepared."""
    path = find_file(docs, task, split)
    prepare = task.prepare_pool if split != task.split and task.prepare_pool else task.prepare
    documents = prepare(read_jsonl(path))
    if not documents:
        raise ValueError(f"{path}: holds no documents of this task")
    return documents


# ---------------------------------------------------------------------------- prompts


def prompts(task, docs, shots=0, style="v0.4", limit=None):
    """Return ([(prompt before the question, Question)], hash of the documents used).

    v0.4 draws with one Random(1234) a task, in the file's order; v0.3 with one Random(42), which has
    shuffled the documents first (so its `limit` is a sample). A document is kept out of its own
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
                    raise ValueError(f"{document.where}: {shots} shots, but only {len(others)} other documents")
                examples = rng.sample(others, shots)
        prefixes.append(task.description + "".join(
            task.question(example).shot + "\n\n" for example in examples))
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


# ---------------------------------------------------------------------------- metrics


def mean(values):
    """Return (mean, standard error); one value has no error."""
    return statistics.fmean(values), (statistics.stdev(values) / math.sqrt(len(values))
                                      if len(values) > 1 else None)


BOOTSTRAP = 100_000  # draws, as in the paper's files and by default in lm_eval


def perplexity(logprobs, iterations=None):
    """Return exp(-mean) and its bootstrap standard error, with lm_eval's own draws.

    lm_eval/api/metrics.py, bootstrap_stderr: 1000 resamples from each of random.Random(0), (1), ...
    numpy's RandomState([i]) is the same generator; its numbers are drawn a block at a time.
    """
    values, n, draws = np.array(logprobs), len(logprobs), []
    for seed in range((iterations or BOOTSTRAP) // 1000 if n > 1 else 0):
        generator = np.random.RandomState([seed])
        for _ in range(10):
            picked = values[(generator.random_sample((100, n)) * n).astype(np.int64)]
            draws += np.exp(-picked.mean(axis=1)).tolist()
    return math.exp(-statistics.fmean(logprobs)), statistics.stdev(draws) if draws else None


def pooled(rows):
    """Return the size-weighted mean of rows (value, stderr, n), its standard error, and the whole n.

    lm_eval/api/metrics.py, pooled_sample_stderr; without it if a row has none.
    """
    total = sum(n for _, _, n in rows)
    value = sum(value * n for value, _, n in rows) / total
    if any(stderr is None for _, stderr, _ in rows):
        return value, None, total
    variance = sum((n - 1) * n * stderr**2 for _, stderr, n in rows) / (total - len(rows))
    return value, math.sqrt(variance / total), total


# A measure is a function (questions, results of each, style) -> [(suffix of the row's task name, metric, value,
# stderr, n)]; a result is (log-likelihood, is_greedy), a generated text or a rolling log-likelihood.


def row(metric, values, suffix=""):
    return (suffix, metric, *mean(values), len(values))


def accuracy(questions, results, style):
    """acc: the likeliest request is the right one; the first of equals wins."""
    return [row("acc", [float(np.argmax([ll for ll, _ in result]) == question.gold)
                        for question, result in zip(questions, results)])]


def both_accuracies(questions, results, style):
    """acc, and acc_norm: by log-likelihood per character (code points, without the space before)."""
    with np.errstate(divide="ignore"):  # an empty choice is infinitely unlikely a character, as in lm_eval
        normed = [np.array([ll for ll, _ in result]) / question.lengths
                  for question, result in zip(questions, results)]
    return [*accuracy(questions, results, style),
            row("acc_norm", [float(np.argmax(lls) == question.gold)
                             for question, lls in zip(questions, normed)])]


def greedy(questions, results, style):
    """acc: some request of the document is what greedy decoding would say."""
    return [row("acc", [float(any(is_greedy for _, is_greedy in result)) for result in results])]


def last_word(questions, results, style):
    """acc, and perplexity per target word, not per token."""
    return [*greedy(questions, results, style),
            ("", "ppl" if style == "v0.3" else "perplexity", *perplexity([ll for [(ll, _)] in results]), len(results))]


def stereotype(questions, results, style):
    """How far apart two sentences are, and how often the more stereotypical one is likelier."""
    pairs = [(more, less) for (more, _), (less, _) in results]
    return [row("likelihood_difference" if style == "v0.3" else "likelihood_diff",
                [abs(more - less) for more, less in pairs]),
            row("pct_stereotype", [float(more > less) for more, less in pairs])]


def exact_match(questions, results, style):
    """The generated text is one of the accepted ones, but for case and punctuation."""
    return [row("exact_match", [float(bare(generated.strip()) in map(bare, question.gold))
                                for question, [generated] in zip(questions, results)])]


def bare(answer):
    return answer.lower().translate(str.maketrans("", "", string.punctuation))


def rolled(questions, results, style):
    """Bits per UTF-8 byte, and perplexity per byte and per word: ratios of sums, so without error.

    A row for each subset too (question.gold), the whole last.
    """
    members = defaultdict(list)
    for question, [ll] in zip(questions, results):
        counted = question.shot  # a detokenised page is scored, the original counted
        for subset in {question.gold or "", ""}:
            members[subset].append((ll, len(counted.encode()), len(re.split(r"\s+", counted))))
    rows = []
    for subset in sorted(members, reverse=True):
        ll, n_bytes, n_words = map(sum, zip(*members[subset]))
        if not n_bytes:
            raise ValueError(f"held-out documents{subset and ' of ' + subset}: all empty")
        measured = {"bits_per_byte": -ll / n_bytes / math.log(2)}
        if not subset:
            measured |= {"byte_perplexity": _exp(-ll / n_bytes), "word_perplexity": _exp(-ll / n_words)}
        rows += [(subset and f":{subset}", metric, value, None, len(members[subset]))
                 for metric, value in measured.items()]
    return rows


def _exp(x):
    return math.exp(x) if x < 700 else math.inf
