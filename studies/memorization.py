"""Is memorization a Poisson process over training? (Biderman et al. 2023, section 3.2.)

A row of the training order is (k, l)-memorized, k = l = 32, if greedy decoding from its first k
tokens gives its next l tokens. The paper counts memorized rows in windows of 512 consecutive rows
and finds that the counts are Poisson distributed: when a row was seen does not matter.

    python -m studies.memorization score --model=RUN --output=OUT
    python -m studies.memorization analyse --results=OUT --plot=OUT/memorization.png

With a published model and its data, checkpoint folders are named step13000, step143000, ...:

    torchrun --nproc_per_node=8 -m studies.memorization score \\
        --model=pythia-12b-deduped/step143000 --data=data/pile-deduped/document --output=OUT

Cost (`python bench.py memorization`, float32): with a 70m, two CPU cores score 187 rows/s that are
wrong at once and 49 rows/s that are right to the end, an H100 25,157 of the former. The 146,432,000
rows of Pythia take the cores 9 to 35 days a checkpoint, --rows=0:1000000 1.5 to 6 hours.

`score` writes OUT/NAME_stepN.npy, uint8 (rows,): how many of the l tokens are right before the
first mistake. `analyse` writes three tables of them, where a model has the name of its folder:

poisson.csv, the primary outcome: dispersion (variance over mean, 1 for a Poisson process) and trend
of the counts per window. `p` is against a Poisson process of one rate, as in the paper.
`permutation_p` is against the same rows in random order, which is exact whatever the rates. Rows of
unequal rates in shuffled order are binomial with the mean rate, whose dispersion is 1 - share, so
read `p` only where the `share` memorized is under 4 %. If repeated passages are what is memorized,
the place of one repeat says nothing about when the passage was learnt.

rates.csv: the rows seen before the checkpoint beside those not seen yet, which are a control if the
corpus does not repeat itself. windows.csv: how many windows have how many memorized rows.

Most rows are seen once and never memorized. So whether a row's place in training matters for what
is learnt of it is tested on losses, minus those of a run that saw the rows in another order:

    python eval.py losses --model=RUN,OTHER --steps=last --rows=0:4096 --output=OUT/losses
    python -m studies.memorization position --losses=OUT/losses --model=RUN --reference=OTHER
"""

import math
import os
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
import plots
from config import check, command, expecting, read_json, replacing
from data import load_npy, order_of, ordered, span
from eval import find_all, Models
from model import Cache, head_blocks
from parallel import Processes, leave_processes
from studies.results import open_results, permutation_p, student_p, write_csv, write_table

UNKNOWN = 255  # in a .npy that is being made: a row that is not scored yet


@torch.no_grad()
def matched_lengths(model, rows, context, stages=(1, 4, 16)):
    """Return how many tokens after the first `context` greedy decoding gets right before a mistake.

    rows (n, context + l) int64 -> (n,) int64. Nothing needs to be generated: up to its first
    mistake greedy decoding reads the row itself, so the argmax at each position of the row decides
    (of equal logits the first, as in transformers). Most rows are wrong at once, so positions are
    scored in stages. Each stage continues from the keys and values of the one before, without the
    rows that were wrong.
    """
    (n, width), device = rows.shape, rows.device
    cache = [Cache(model.config, n, width - 1, model.embed_in.weight) for _ in model.layers]
    columns = torch.arange(width - 1, device=device)
    lengths = torch.zeros(n, dtype=torch.int64, device=device)
    alive = torch.arange(n, device=device)  # rows without a mistake so far
    read, done = 0, 0  # tokens in the cache, tokens decided
    for stop in sorted({stage for stage in stages if stage < width - context} | {width - context}):
        end = context + stop - 1  # the last token is only predicted
        ahead = torch.zeros(end - read, end, device=device).masked_fill_(
            columns[:end] > columns[read:end, None], -torch.inf)
        hidden = model.hidden(rows[alive, read:end], columns[read:end], ahead, cache,
                              wanted=np.s_[:, context - 1 + done - read:]).flatten(0, 1)
        predicted = torch.cat([logits.argmax(1) for _, logits in
                               head_blocks(hidden, model.embed_out.weight)])
        right = predicted.view(len(alive), -1) == rows[alive, context + done:context + stop]
        lengths[alive] += right.cumprod(1).sum(1)
        going, read, done = right.all(1), end, stop
        alive = alive[going]
        if not len(alive):
            break
        if not going.all():
            for layer in cache:
                layer.kv = layer.kv[:, going]
    return lengths


# ---------------------------------------------------------------------------- score


@dataclass(frozen=True, kw_only=True)
class Score(Models):
    output: str  # folder of the results
    data: str | None = None  # PREFIX; default: what the run was trained on
    rows: str = ""  # of the training order, first:last+1; default: all
    context: int = 32  # k
    continuation: int = 32  # l
    batch: int = 256  # rows at a time

    def __post_init__(self):
        check(self, f"1 to {UNKNOWN - 1}", lambda value: 0 < value < UNKNOWN, "continuation")
        check(self, "at least 1", lambda value: value >= 1, "context", "batch")


def score(options):
    """Score rows of the training order at each checkpoint; continues after an interruption."""
    # The first process to finish may have to wait for the others longer than gloo's 30 minutes.
    processes = Processes(options.device, timedelta(days=30))
    orders = {order_of(model, options.data) for model in options.model.split(",")}
    if len(orders) > 1:
        raise ValueError(f"{options.model} were trained in different orders; score each into its "
                         "own --output")
    [order], folders = orders, find_all(options.model, options.steps)
    data, width = ordered(order), options.context + options.continuation
    if width > data.seq_length + 1:
        raise ValueError(f"context + continuation = {width}: a row has {data.seq_length + 1}")
    numbers = span("rows", options.rows or f"0:{len(data)}", len(data))
    open_results(f"{options.output}/memorization.json", {
        "first_row": numbers[0], "last_row": numbers[-1], "context": options.context,
        "continuation": options.continuation, "order": asdict(order)})
    for name, step, _, folder in folders:
        path = f"{options.output}/{name}_step{step}.npy"
        if os.path.exists(path):  # it gets this name when all processes are done
            continue
        model = checkpoints.load_model(folder, processes.device)
        if processes.rank == 0 and not os.path.exists(f"{path}.partial"):
            with replacing(f"{path}.partial") as file:
                np.save(file, np.full(len(numbers), UNKNOWN, dtype=np.uint8))
        processes.gather(None)  # wait until it is there
        results = np.load(f"{path}.partial", mmap_mode="r+")  # all processes write to it
        mine = range(processes.rank * options.batch, len(numbers),
                     processes.count * options.batch)
        for start in tqdm(mine, unit=f"{options.batch} rows", disable=processes.rank > 0 or None):
            here = slice(start, start + options.batch)
            if UNKNOWN in results[here]:
                rows = torch.from_numpy(data.rows(numbers[here])[:, :width].astype(np.int64))
                lengths = matched_lengths(model, rows.to(processes.device), options.context)
                results[here] = lengths.cpu().numpy()
        results.flush()
        processes.gather(None)  # wait for all
        if processes.rank == 0:
            os.replace(f"{path}.partial", path)
            print(f"{path}: {len(results):,} rows, {np.mean(results == options.continuation):.3%} "
                  f"memorized, {np.mean(results):.3f} of {options.continuation} tokens right")
    leave_processes()


# ---------------------------------------------------------------------------- analyse


@dataclass(frozen=True)
class Analyse:
    results: str  # folder that score wrote
    window: int = 512  # rows
    plot: str = ""  # PNG

    def __post_init__(self):
        check(self, "at least 1", lambda value: value >= 1, "window")


def analyse(options):
    """Write tables of how many rows are memorized, and of the tests on counts per window."""
    folder, window = Path(options.results), options.window
    files = sorted((name, int(step), path) for path in folder.glob("*_step*.npy")
                   for name, _, step in [path.stem.rpartition("_step")] if step.isdigit())
    if not files:
        raise ValueError(f"{folder}: no NAME_stepN.npy there; `score` makes them")
    settings, rates, tests, windows = read_json(folder / "memorization.json"), [], [], []
    with expecting(folder / "memorization.json", "written by `score`"):
        first, whole = int(settings["first_row"]), int(settings["continuation"])
        batch_size = int(settings["order"]["batch_size"])
    for name, step, path in files:
        lengths, n_seen = load_npy(path), max(0, step * batch_size - first)
        if lengths.ndim != 1 or lengths.dtype != np.uint8:
            raise ValueError(f"{path}: not written by `score`; move it away")
        for which, part in (("seen", lengths[:n_seen]), ("not seen yet", lengths[n_seen:])):
            if len(part):
                memorized = part == whole
                rates.append((name, step, which, len(part), int(memorized.sum()),
                              float(memorized.mean()), float(part.mean())))
        counts = window_counts(lengths[:n_seen] == whole, window)
        mean, share = (counts.mean(), counts.mean() / window) if len(counts) else (None, None)
        tests += [(name, step, window, len(counts), mean, share, test, *found)
                  for test, found in poisson_tests(counts, window).items()]
        windows += [(name, step, window, count, int((counts == count).sum()))
                    for count in np.unique(counts).tolist() or [None]]
    write_table(folder / "rates.csv", (
        "model", "step", "rows", "n", "memorized", "share", "mean_length"), rates)
    write_table(folder / "poisson.csv", (
        "model", "step", "window", "n", "mean", "share", "test", "statistic", "p",
        "permutation_p"), tests)
    write_csv(folder / "windows.csv", ("model", "step", "window", "memorized", "windows"), windows)
    if options.plot:
        plots.memorization(folder, options.plot)


def window_counts(memorized, window):
    """Return how many of each whole window of consecutive rows are memorized."""
    return memorized[:len(memorized) // window * window].reshape(-1, window).sum(axis=1)


def poisson_tests(counts, window, draws=999):
    """Return {test: (statistic, p, permutation p)} of counts (n,) of memorized rows per window.

    dispersion: sum (c - mean)^2 / mean / (n - 1), its p from chi-square. trend: the score test of a
    rate that is linear in the window's number, its p from the normal distribution with the counts'
    own variance. If rows are shuffled, counts are multivariate hypergeometric, which is drawn from
    for the permutation p. Fewer than two windows, or no memorized row, cannot be tested: None.
    """
    n, mean = len(counts), counts.mean() if len(counts) else 0.0
    if n < 2 or mean == 0:
        return {"dispersion": (None, None, None)}
    place = np.arange(n) - (n - 1) / 2

    def statistics(counts):
        dispersion = ((counts - mean)**2).sum() / mean / (n - 1)
        variance = mean * dispersion * (place @ place)
        return dispersion, place @ counts / math.sqrt(variance) if variance else 0.0

    dispersion, trend = statistics(counts)
    generator = np.random.default_rng(0)
    null = np.array([statistics(generator.multivariate_hypergeometric(
        np.full(n, window), counts.sum(), method="marginals")) for _ in range(draws)])
    half = torch.tensor([(n - 1) / 2, (n - 1) / 2 * dispersion], dtype=torch.float64)
    above = float(torch.special.gammaincc(*half))
    return {"dispersion": (float(dispersion), min(1.0, 2 * min(above, 1 - above)),
                           permutation_p(dispersion, null[:, 0])),
            "trend": (float(trend), math.erfc(abs(trend) / math.sqrt(2)),
                      permutation_p(trend, null[:, 1]))}


# ---------------------------------------------------------------------------- position


@dataclass(frozen=True)
class Position:
    losses: str  # OUTPUT of `eval.py losses`, of the run and of the reference
    model: str  # the run's name there
    reference: str  # the name of a run that had another order
    output: str = "position.csv"  # in nats a token less than the reference's


def position(options):
    """Test whether what is learnt of a row depends on its place in training."""
    prefix = options.losses.removesuffix(".npy")
    what, values = read_json(f"{prefix}.json"), load_npy(f"{prefix}.npy")
    with expecting(f"{prefix}.json", f"losses of rows of {options.model} and {options.reference}, "
                                     "written by `eval.py losses`"):
        last = {name: i for i, (name, _) in enumerate(what["checkpoints"])}
        gain = (values[last[options.reference]] - values[last[options.model]]).mean(axis=1)
        tests = position_test(np.arange(*what["rows"]), gain)
    write_table(options.output, ("model", "reference", "n", "term", "value", "stderr", "p",
                                 "permutation_p"),
                [(options.model, options.reference, len(gain), *test) for test in tests])


def position_test(place, values, draws=999):
    """Return [(term, value, stderr, p, permutation p)] of values (n,) regressed on place (n,).

    "last minus first" is the linear term, "middle minus ends" the quadratic one beyond it: if the
    beginning is forgotten and the end not learnt yet there is a hump, which a slope misses. p is
    from Student's t with n - 3 degrees of freedom; the permutations shuffle values over places.
    Fewer than 4 values, or all equal ones, cannot be tested: [].
    """
    n = len(values)
    if n < 4 or np.ptp(values) == 0 or np.ptp(place) == 0:
        return []
    line = (place - np.mean(place)) / np.ptp(place)
    hump = line**2 - np.mean(line**2)
    hump = hump - hump @ line / (line @ line) * line
    terms = np.stack((line / (line @ line), -hump / (hump @ hump) / 4))  # from -1/2 to 1/2: 1/4
    y = values - np.mean(values)
    found = terms @ y
    rest = y - found[0] * line + 4 * found[1] * hump
    errors = np.sqrt(rest @ rest / (n - 3) * (terms**2).sum(axis=1))
    generator = np.random.default_rng(0)
    null = np.array([terms @ generator.permutation(y) for _ in range(draws)])
    return [(name, float(found[i]), float(errors[i]), student_p(found[i] / errors[i], n - 3),
             permutation_p(found[i], null[:, i]))
            for i, name in enumerate(("last minus first", "middle minus ends"))]


if __name__ == "__main__":
    command(sys.argv[1:], {"score": (Score, score), "analyse": (Analyse, analyse),
                           "position": (Position, position)})
