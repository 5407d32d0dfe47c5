"""How often each number, each question with its answer, was trained on up to each checkpoint.

    python -m studies.term_frequency count --data=PREFIX ORDER --output=counts \\
        [--questions=triviaqa.jsonl]

ORDER: --steps, --batch_size, --seq_length and --seed as in RUN/config.json; Pythia's if left out.

OUTPUT/0000512_0001000.npy holds what stood in the rows of steps 512 to 999: int64 (2, n), keys in
ascending order above, their counts below. Checkpoint 1000 has seen the sum of the files up to that
one (`seen`). A key is kind * 10**10 + a * 10**5 + b:

    kind 0  NEAR      a = 0, b = number: how many windows of "number near number" it is in; twice if
                      it is in one twice
    kind 1  QUESTION  a = question, b = which of its terms: rows that have that term and the answer

Windows are those of the paper's code (EleutherAI/pythia,
case-studies/term_frequency/run_freq_count.py): the text of a row with a space before it; from every
space, a number of one to five digits, a space, one to three words of letters, digits, underscores
and ASCII signs with white space behind each (as many as possible), and again up to five digits. All
numbers inside count, those within words too. The paper's frequency of x is NEAR, so a number counts
only with another one near it. The text is that of transformers' decode at the time, which spelled
<|endoftext|> out and took the space before . ? ! , and some apostrophes away.
"""

import itertools
import os
import re
import string
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import read_json, replacing
from data import load_npy, Order, ordered
from prepare import serve_parent
from studies.results import open_results
from studies.term_questions import hash_of, QuestionIndex, read_questions
from tokenizer import load_tokenizer, SPECIAL

NEAR, QUESTION = range(2)
KIND = 10**10
NUMBERS = 10**5  # a number has at most five digits
PILE_ROWS = 143000 * 1024
BLOCK_ROWS = 256  # what a worker counts at a time


# ---------------------------------------------------------------------------- numbers

# Possessive quantifiers: white space is no part of a word, so going back into one never helps.
_WORD = rf"[\w{re.escape(string.punctuation)}]++\s++"
_NUMBER = re.compile(r"\d{1,5}")
_WINDOW_START = re.compile(r" \d{1,5}(?= )")  # leaves the second space to the next number
_WINDOW = re.compile(rf" \d{{1,5}} (?:{_WORD}){{1,3}}\d{{1,5}}")

# transformers 4, PreTrainedTokenizerBase.clean_up_tokenization, which decode called unless told not
# to.
_TIDY = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def tidy(text):
    for spaced in _TIDY:
        text = text.replace(spaced, spaced.strip())
    return text


def numbers_near_numbers(text):
    """Return the numbers of every window in the text of one row; windows may overlap."""
    text, numbers = " " + tidy(text), []
    for start in _WINDOW_START.finditer(text):
        window = _WINDOW.match(text, start.start())
        if window:
            numbers += map(int, _NUMBER.findall(window[0]))
    return numbers


# -------------------------------------------------------------------------- over the training order


@dataclass(frozen=True)
class Count(Order):
    output: str = "counts"  # folder of the .npy files
    at: str = ""  # steps to count up to, with commas; empty: the steps of Pythia's checkpoints
    questions: str = ""  # TriviaQA's questions and answers, one JSON object a line
    workers: int = 0  # processes; 0: one a core
    tokenizer: str = "20B_tokenizer.json"


def count(options):
    """Count numbers near numbers, questions' terms with their answers, up to each checkpoint."""
    if options.at and not re.fullmatch(r"\d+(,\d+)*", options.at):
        raise ValueError(f"at = {options.at!r}, expected steps with commas")
    # Here: the workers, who import this file too, need no torch.
    from checkpoints import checkpoint_steps
    at = map(int, options.at.split(",")) if options.at else checkpoint_steps(options.steps)
    steps = sorted({0, *at})
    if steps[-1] > options.steps:
        raise ValueError(f"at = {options.at}: step {steps[-1]:,} is beyond --steps={options.steps}")
    data = ordered(options)
    if steps[-1] * options.batch_size > len(data):
        raise ValueError(f"step {steps[-1]:,} wants {steps[-1] * options.batch_size:,} rows "
                         f"({options.batch_size} a step), {options.data} has {len(data):,}")
    load_tokenizer(options.tokenizer)
    questions = read_questions(options.questions) if options.questions else []
    chunks, done = list(itertools.pairwise(steps)), counted(options.output)
    if others := sorted(done.keys() - chunks):
        raise ValueError(f"{options.output}: holds counts of steps {others[0][0]:,} to "
                         f"{others[0][1]:,}, which are not next to each other in --at; name "
                         "another --output")
    todo = [chunk for chunk in chunks if chunk not in done]
    rows = sum(b - a for a, b in todo) * options.batch_size
    workers = options.workers or os.cpu_count()
    if workers == 1:
        _start_worker(options, questions)
        pool, in_order = nullcontext(), map
    else:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker,
                                   (options, questions))
        in_order = pool.map
    settings = {field.name: getattr(options, field.name) for field in fields(Order)}
    open_results(Path(options.output) / "counts.json",
                 settings | {"questions": [question.id for question in questions],
                             "questions_hash": hash_of(questions) if questions else None})
    with tqdm(total=rows, unit="row", unit_scale=True, disable=None) as bar, pool:
        list(in_order(count_rows, (0,), (0,)))  # starting up is no part of the rate
        began = time.perf_counter()
        for a, b in todo:
            bar.set_description(f"to step {b:,}")
            table = count_chunk(a * options.batch_size, b * options.batch_size, in_order, bar)
            with replacing(os.path.join(options.output, f"{a:07}_{b:07}.npy")) as file:
                np.save(file, table)
        seconds = time.perf_counter() - began
    there = steps[-1] * options.batch_size - rows
    print(f"{options.output}: {rows:,} rows counted now, {there:,} were there")
    if rows:
        pile_hours = seconds * workers * PILE_ROWS * 2049 / (rows * (options.seq_length + 1)) / 3600
        print(f"{rows / seconds:,.0f} rows/s of {options.seq_length + 1} tokens, {workers} "
              f"process(es), {seconds:.1f} s; the Pile's {PILE_ROWS:,} rows of 2049 take "
              f"{pile_hours:,.1f} core hours")


def counted(folder):
    """Return {(first step, step after the last): path} of the files of counts in a folder."""
    files = {}
    for path in Path(folder).glob("*_*.npy"):
        match = re.fullmatch(r"(\d+)_(\d+)\.npy", path.name)
        if match:
            files[int(match[1]), int(match[2])] = path
    return files


def count_chunk(first, last, in_order, bar):
    """Return the table of rows first to last - 1, counted by blocks with the map `in_order`."""
    starts = range(first, last, BLOCK_ROWS)
    stops = [min(start + BLOCK_ROWS, last) for start in starts]
    tables = [np.empty((2, 0), dtype=np.int64)]
    for start, stop, table in zip(starts, stops, in_order(count_rows, starts, stops)):
        tables.append(table)
        # Merged only once they are as large as what they are merged into, so that it stays cheap.
        if sum(t.shape[1] for t in tables[1:]) > tables[0].shape[1]:
            tables = [merge(tables)]
        bar.update(stop - start)
    return merge(tables)


def _start_worker(options, questions):
    global _data, _token_bytes, _index
    serve_parent()
    _data, _index = ordered(options), QuestionIndex(questions)
    _token_bytes = load_tokenizer(options.tokenizer).token_bytes()
    for name, id_ in SPECIAL.items():
        _token_bytes[id_] = name.encode()


def count_rows(start, stop):
    """Return the table of rows start to stop - 1 of the order."""
    keys = []
    for row in _data.rows(range(start, stop)).tolist():
        text = b"".join([_token_bytes[id_] for id_ in row]).decode("utf8", "replace")
        keys.extend(NEAR * KIND + number for number in numbers_near_numbers(text))
        if _index.filed:
            keys.extend(QUESTION * KIND + question * NUMBERS + term
                        for question, term in _index.found(text))
    return np.stack(np.unique(np.array(keys, dtype=np.int64), return_counts=True))


def merge(tables):
    """Return the sum of tables (2, n) of ascending keys and their counts."""
    keys, counts = np.concatenate(tables, axis=1)
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return np.stack((keys[first], np.add.reduceat(counts, first) if len(first) else counts))


def seen(folder, kind):
    """Yield (step, keys, counts) of one kind, keys without it, summed up to each counted step."""
    chunks = dict(sorted((a, (b, path)) for (a, b), path in counted(folder).items()))
    if 0 not in chunks:
        raise ValueError(f"{folder}: holds no counts from step 0; `count --output={folder}` makes "
                         "them")
    total, reached = np.empty((2, 0), dtype=np.int64), 0
    yield reached, *total
    while reached in chunks:
        reached, path = chunks[reached]
        table = load_npy(path)
        if table.dtype != np.int64 or table.ndim != 2 or len(table) != 2:
            raise ValueError(f"{path}: not a table of counts; delete it and count again")
        first, last = np.searchsorted(table[0], (kind * KIND, (kind + 1) * KIND)).tolist()
        total = merge([total, table[:, first:last] - [[kind * KIND], [0]]])
        yield reached, *total


def number_frequencies(folder):
    """Return {step: {number as text: how often it was seen before}}."""
    return {step: dict(zip(map(str, keys.tolist()), counts.tolist()))
            for step, keys, counts in seen(folder, NEAR)}


def question_frequencies(folder):
    """Return {step: {question id: rows before it with the answer and the salient term}}.

    Salient is the term that is most often with the answer, over all that was counted.
    """
    ids = read_json(os.path.join(folder, "counts.json"))["questions"]
    if not ids:
        raise ValueError(f"{folder}: counts no questions; `count --questions=FILE` does")
    at = {step: dict(zip(keys.tolist(), counts.tolist()))
          for step, keys, counts in seen(folder, QUESTION)}
    salient = {}
    for key, _ in sorted(at[max(at)].items(), key=lambda pair: (-pair[1], pair[0])):
        salient.setdefault(ids[key // NUMBERS], key)
    return {step: {id_: found.get(key, 0) for id_, key in salient.items()}
            for step, found in at.items()}
