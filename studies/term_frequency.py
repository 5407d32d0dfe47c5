"""Does a model do better on what it saw more often, and does seeing it more often cause that?

Biderman et al. 2023, section 3.3, compare accuracy on arithmetic with how often the operand x1 has
occurred in the training data so far. They find a correlation from 2.8B parameters and about step
65,000 on, and a gap between frequent and rare operands that grows. With the paper's models:

    python -m studies.term_frequency count --data=data/pile-deduped/document --output=counts \\
        --at=13000,39000,65000,91000,117000,143000
    python -m studies.term_frequency evaluate --model=pythia-160m-deduped/step13000 --results=R
    python -m studies.term_frequency analyse --counts=counts --results=R --output=terms
    python plots.py term_frequency --bins=terms_bins.csv --output=terms.png

For a run of your own give `count` the --steps, --batch_size, --seq_length and --seed (data_seed, if
set) of its config.json. The paper's other question, TriviaQA by the counts of a question's
entities, is left out: it needs texts with linked entities, and the authors published no code.

Small numbers are frequent, and their answers are short and easy, so a correlation proves no cause.
The experiment does: branch a checkpoint, let the branch see some sums more often than its twin, and
repeat this for several seeds:

    python train.py configs/mini.py --branch_from=RUN/step256 --out_dir=MORE --twin=True \\
        --intervention=term_duplicate --copies=4 --terms="What is 24 plus,What is 37 plus"
    python -m studies.term_frequency evaluate --model=MORE,MORE_twin --results=R
    python -m studies.term_frequency compare --branch=MORE --terms=24,37 --results=R

The prompt is `Q:What is {x1} times {x2}? A:` (or plus), x1 from 0 to 99, x2 from 1 to 50, after k
solved examples. As in the paper's code an answer is right if it is the first number of one to five
digits in 16 greedy tokens. The log-probability of the answer, `12` and ` 12` together, shows a
change long before accuracy does.

COUNTS/0000512_0001000.json has, for the rows of steps 512 to 999, the number of windows "number
near number" in which each number stands (counted twice if it stands there twice).

The primary outcome is the slope: nats of the right answer per doubling of (1 + count). The gap, the
most frequent tenth of the operands minus the rarest, is the paper's. Intervals are over operands,
in `compare` over seeds too.

Cost: a row of 2049 tokens takes 0.42 ms of a core to count, Pythia's 146,432,000 rows 17 core
hours. To evaluate the 50,000 prompts at 0, 2, 4, 8 and 16 shots takes a 70m 6.3 hours on two cores.
"""

import itertools
import operator
import os
import random
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoints
from config import command, expecting, read_csv, read_json, write_json
from data import Order, ordered
from eval import find_all, generate_until, loglikelihood, Models
from parallel import Processes
from prepare import in_workers
from studies.results import (Estimate, open_results, regression, tokenizer_of, write_csv,
                             write_table)
from tokenizer import load_tokenizer

# ---------------------------------------------------------------------------- count

# EleutherAI/pythia, case-studies/term_frequency/run_freq_count.py. A window begins at a space: a
# number of one to five digits, a space, one to three words (letters, digits and ASCII punctuation,
# followed by white space; as many as possible), and another number of one to five digits. The
# quantifiers are possessive (++), since backtracking into a word never helps.
_WORD = rf"[\w{re.escape(string.punctuation)}]++\s++"
_WINDOW = re.compile(rf"(?=( \d{{1,5}} (?:{_WORD}){{1,3}}\d{{1,5}}))")

# transformers 4, PreTrainedTokenizerBase.clean_up_tokenization, which decode called by default
_TIDY = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")

BLOCK_ROWS = 256  # rows that a worker counts at a time


def tidy(text):
    for spaced in _TIDY:
        text = text.replace(spaced, spaced.strip())
    return text


def numbers_near_numbers(text):
    """Return the numbers in every window of a row's text; windows may overlap."""
    return [int(number) for window in _WINDOW.findall(" " + tidy(text))
            for number in re.findall(r"\d{1,5}", window)]


@dataclass(frozen=True)
class Count(Order):
    output: str = "counts"  # folder
    at: str = ""  # steps to count up to, with commas; empty: the steps of Pythia's checkpoints
    workers: int = 0  # processes; 0: one a core
    tokenizer: str = "20B_tokenizer.json"


def count(options):
    """Count numbers near numbers in the rows seen before each checkpoint."""
    steps, size = checkpoints.checkpoint_steps(options.steps), options.batch_size
    if options.at:
        with expecting(f"at = {options.at!r}", "numbers with commas"):
            steps = sorted({0, *map(int, options.at.split(","))})
    start_worker(options)  # raises errors before anything is written
    if steps[0] < 0 or steps[-1] * size > len(_data):
        raise ValueError(f"at = {options.at}: expected steps from 0 to --steps={options.steps}, "
                         f"and no more rows than {options.data} has")
    open_results(Path(options.output) / "counts.json", {"at": steps} | {
        field.name: getattr(options, field.name) for field in fields(Order)})
    blocks = []  # a file, and some of the rows that are counted in it
    for a, b in itertools.pairwise(steps):
        path = f"{options.output}/{a:07}_{b:07}.json"
        if not os.path.exists(path):
            blocks += [(path, range(first, min(first + BLOCK_ROWS, b * size)))
                       for first in range(a * size, b * size, BLOCK_ROWS)]
    found = in_workers(count_rows, blocks, options.workers, start_worker, options)
    progress = tqdm(found, total=len(blocks), disable=None, unit="block")
    for path, counts in itertools.groupby(progress, key=operator.itemgetter(0)):
        total = Counter()
        for _, block in counts:
            total.update(block)
        write_json(path, dict(sorted(total.items())))
        print(path)


def start_worker(options):
    global _data, _tokenizer
    _data, _tokenizer = ordered(options), load_tokenizer(options.tokenizer)


def count_rows(path, rows):
    """Return the path, and the counts of a range of rows of the order."""
    found = Counter()
    for row in _data.rows(rows).tolist():
        found.update(map(str, numbers_near_numbers(_tokenizer.decode(row))))
    return path, found


def seen(folder):
    """Return {step: Counter} of how often each number was seen before it."""
    totals, total = {0: Counter()}, Counter()
    for path in sorted(Path(folder).glob("*_*.json")):
        first_step, last_step = map(int, path.stem.split("_"))
        if first_step not in totals:
            break  # `count` was stopped
        total = totals[last_step] = total + Counter(read_json(path))
    return totals


# ---------------------------------------------------------------------------- evaluate

WHERE = ("model", "step", "tokens", "task", "shots")
HEADER = (*WHERE, "term", "item", "correct", "logprob")
OPERATIONS = {"times": operator.mul, "plus": operator.add}


def prompts(task, shots, x1s=range(100)):
    """Return [(x1, x2, prompt, answer)], the prompt after `shots` solved problems of other x1.

    As in lm-eval 0.3, for each x1 a random.Random(42) shuffles its problems and then draws
    shots + 1 others for each, of which the last is dropped.
    """
    problems = [(x1, x2, f"Q:What is {x1} {task} {x2}? A:", str(OPERATIONS[task](x1, x2)))
                for x1 in range(100) for x2 in range(1, 51)]
    asked = []
    for x1 in x1s:
        generator = random.Random(42)
        mine = [problem for problem in problems if problem[0] == x1]
        others = [problem for problem in problems if problem[0] != x1]
        generator.shuffle(mine)
        for _, x2, question, answer in mine:
            drawn = generator.sample(others, shots + 1)[:shots]
            solved = "".join(f"{other}{its_answer}\n\n" for *_, other, its_answer in drawn)
            asked.append((x1, x2, solved + question, answer))
    return asked


@dataclass(frozen=True, kw_only=True)
class Evaluate(Models):
    tasks: str = "times,plus"
    shots: str = "0,2,4,8,16"
    results: str = "term_frequency"  # folder; results that are there are not computed again


def evaluate(options):
    """Ask each checkpoint all questions; note whether it is right, and log p of the answer."""
    with expecting(f"tasks = {options.tasks!r}, shots = {options.shots!r}",
                   "times or plus, and numbers"):
        asked = {(task, int(shots)): prompts(task, int(shots))
                 for task in options.tasks.split(",") for shots in options.shots.split(",")}
    folders = find_all(options.model, options.steps)
    tokenizer = tokenizer_of([folder for *_, folder in folders], options.tokenizer)
    device = Processes(options.device).device
    for name, step, tokens, folder in folders:
        model = None
        for (task, shots), questions in asked.items():
            path = Path(options.results) / f"{name}_step{step}_{task}_{shots}.csv"
            if path.exists():
                continue
            model = model or checkpoints.load_model(folder, device)
            answers = answer_all(model, tokenizer, questions)
            write_csv(path, HEADER, [
                (name, step, tokens, task, shots, x1, x2, int(right), logprob)
                for (x1, x2, *_), (right, logprob) in zip(questions, answers)])
            accuracy, logprob = np.mean(answers, axis=0)
            print(f"{path}: accuracy {accuracy:.4f}, log-probability {logprob:.4f} of "
                  f"{len(answers):,} answers", flush=True)


def answer_all(model, tokenizer, questions):
    """Return (right, log-probability of the right answer) of each of the prompts."""
    said = generate_until(model, tokenizer, [prompt for _, _, prompt, _ in questions], n_tokens=16)
    found = loglikelihood(model, tokenizer, [(prompt, before + answer) for _, _, prompt, answer in
                                             questions for before in ("", " ")])
    logprobs = np.array([logprob for logprob, _ in found]).reshape(-1, 2)
    right = [first_number(words) == answer for words, (*_, answer) in zip(said, questions)]
    return list(zip(right, np.logaddexp.reduce(logprobs, axis=1).tolist()))


def first_number(said):
    """Return the first number of one to five digits in a text, or nothing."""
    return re.search(r"\d{1,5}|$", said)[0]


# ---------------------------------------------------------------------------- analyse


@dataclass(frozen=True)
class Analyse:
    counts: str  # folder of `count`
    results: str = "term_frequency"  # folder of `evaluate`
    output: str = "term_frequency"  # OUTPUT_bins.csv and OUTPUT_gaps.csv are written


def grouped(folder):
    """Return {WHERE's cells: {(term, item): (correct, logprob)}} of what `evaluate` wrote."""
    groups = {}
    for path in sorted(Path(folder).glob("*.csv")):
        with expecting(path, "written by `evaluate`"):
            for row in read_csv(path):
                answers = groups.setdefault(tuple(row[name] for name in WHERE), {})
                answers[row["term"], row["item"]] = int(row["correct"]), float(row["logprob"])
    if not groups:
        raise ValueError(f"{folder}: holds no answers; `evaluate --results={folder}` makes them")
    return groups


def analyse(options):
    """Relate answers to counts: slope, tenths by frequency, most minus least frequent tenth."""
    groups, settings = grouped(options.results), read_json(Path(options.counts) / "counts.json")
    bins, gaps = [], []
    with expecting(options.counts, "written by `count`"):
        a_step = int(settings["batch_size"]) * int(settings["seq_length"])
        frequencies = seen(options.counts)
    for where, answers in groups.items():
        model, step, tokens, *_ = where
        if int(step or -1) not in frequencies or int(tokens or 0) not in (0, int(step) * a_step):
            raise ValueError(f"{options.counts}: no counts before {model}'s step {step} of "
                             f"{tokens} tokens; count --at it, in the order of its config.json")
        before, by_term = frequencies[int(step)], {}
        for (term, _), found in answers.items():
            by_term.setdefault(term, []).append((before[term], *found))
        means = np.array([np.mean(found, axis=0) for found in by_term.values()])
        bins += [(*where, *row) for row in binned(means)]
        gaps += [(*where, len(means), *row) for row in gap(means)]
    write_csv(f"{options.output}_bins.csv", (*WHERE, "from", "to", "frequency", "n", "acc",
                                             "acc_stderr", "logprob", "logprob_stderr"), bins)
    write_table(f"{options.output}_gaps.csv", (*WHERE, "n", "least_frequency", "most_frequency",
                                               "what", "value", "low", "high", "p"), gaps)


def tenths(frequency):
    """Return the indices of each tenth of the terms by frequency; ties stay in one tenth."""
    tenth = np.searchsorted(np.sort(frequency), frequency) * 10 // len(frequency)
    return [np.flatnonzero(tenth == i) for i in np.unique(tenth)]


def binned(means):
    """Yield a row of OUTPUT_bins.csv for each tenth of the terms by frequency.

    means (terms, 3): frequency, accuracy and log-probability of the right answer.
    """
    for part in tenths(means[:, 0]):
        frequency = means[part, 0]
        [acc], [logprob] = (regression(means[None, part, column]) for column in (1, 2))
        yield (frequency.min(), frequency.max(), frequency.mean(), len(part), acc.value,
               acc.stderr, logprob.value, logprob.stderr)


def gap(means):
    """Yield rows of OUTPUT_gaps.csv: the slope, and most minus least frequent tenth.

    Of 100 operands a tenth is 10, as in the paper.
    """
    frequency, parts = means[:, 0], tenths(means[:, 0])
    ends = np.concatenate((parts[0], parts[-1]))
    least, most = frequency[parts[0]].mean(), frequency[parts[-1]].mean()
    is_most = np.isin(ends, parts[-1]).astype(float)
    for what, column, part, x in (
            ("nats per doubling", 2, slice(None), np.log2(1 + frequency)),
            ("accuracy, most - least", 1, ends, is_most),
            ("nats, most - least", 2, ends, is_most)):
        found = regression(means[None, part, column], x)[1] if np.ptp(x) else Estimate(None)
        yield least, most, what, found.value, found.low, found.high, found.p


# ---------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Compare:
    branch: str  # runs that saw the terms more (or less) often; each has a BRANCH_twin beside it
    terms: str  # operands, with commas
    results: str = "term_frequency"  # folder of `evaluate`, all models
    output: str = "term_compare.csv"


def compare(options):
    """Compare branches with their twins: on the chosen terms, on others, and the difference."""
    groups, chosen, rows = grouped(options.results), options.terms.split(","), []
    branches = [Path(path).name for path in options.branch.split(",")]
    names = [branch + side for branch in branches for side in ("", "_twin")]
    for where in dict.fromkeys(key[1:] for key in groups):
        answers = [groups.get((name, *where)) for name in names]
        if None in answers:
            continue
        with expecting(options.results, f"answers of {', '.join(names)} to the same prompts"):
            logprobs = np.array([[found[prompt][1] for prompt in answers[0]] for found in answers])
        gains = logprobs[::2] - logprobs[1::2]  # (seeds, prompts)
        terms = np.array([term for term, _ in answers[0]])  # terms were treated, not prompts
        mine = np.isin(terms, chosen)
        if mine.all() or not mine.any():
            continue
        for which, which_terms, found in (
                ("chosen", terms[mine], regression(gains[:, mine], None, terms[mine])[0]),
                ("others", terms[~mine], regression(gains[:, ~mine], None, terms[~mine])[0]),
                ("chosen minus others", terms, regression(gains, mine, terms)[1])):
            rows.append(("+".join(branches), *where, which, len(branches), len(set(which_terms)),
                         found.value, found.low, found.high, found.p))
    if not rows:
        raise ValueError(f"{options.results}: no checkpoint of all of {', '.join(names)} has "
                         f"answers with and without {options.terms}")
    write_table(options.output, (
        *WHERE, "terms", "seeds", "n", "difference", "low", "high", "p"), rows)


if __name__ == "__main__":
    command(sys.argv[1:], {"count": (Count, count), "evaluate": (Evaluate, evaluate),
                           "analyse": (Analyse, analyse), "compare": (Compare, compare)})
