"""Is memorization a Poisson process over training? (Biderman et al. 2023, section 3.2.)

A row of the training order is (k, l)-memorized, k = l = 32, if greedy decoding from its first k
tokens gives its next l. The paper counts memorized rows in windows of 512 consecutive rows and
finds the counts Poisson distributed: what is memorized does not depend on when it was seen.

    python -m studies.memorization score --model=RUN --output=OUT
    python -m studies.memorization analyse --results=OUT --plot=OUT/memorization.png

and with a published model and its data, checkpoint folders named step13000, step143000, ...:

    torchrun --nproc_per_node=8 -m studies.memorization score \\
        --model=pythia-12b-deduped/step143000 --data=data/pile-deduped/document --output=OUT

Cost: a 70m on two CPU cores decides 187 rows/s that miss at once, 49 that are right to the end, on
an H100 25,157 that miss at once, a 410m 2,152 (`python bench.py memorization`, float32). Pythia's
146,432,000 rows take 9 to 35 days a checkpoint on the cores, --rows=0:1000000 1.5 to 6 hours; with
the 12B at least 1.1e20 FLOPs, 7.6e11 for a row that misses at once.

OUT/NAME_stepN.npy is uint8 (rows,): how many of the l tokens are right before the first miss. With
--generate=True NAME_stepN_generated.npy is the original's score times l: how many of the l are
right when the model goes on from its own output (predictable-memorization/eval_memorization.py).
A model is known by its folder's name alone. `analyse` makes tables of them:

poisson.csv, the primary outcome, is of the counts per window: their dispersion (variance over mean,
1 for a Poisson process) and trend. `p` is against a Poisson process of one rate, as the paper asks.
`permutation_p` is against the same rows in any other order, which holds whatever the rates: the
rows were shuffled, so rows of unequal rates are binomial with the mean rate, of dispersion 1 -
share. So read `p` only where the `share` memorized is under 4 %. And where repeated passages are
what is memorized, where a repeat stands says nothing on when it was learnt.

rates.csv is by subset, of rows seen before the checkpoint and of those after it, a control in a
corpus that does not repeat itself; intervals are over passages, as copies are not independent.
early.csv: of what a checkpoint has memorized, how much has the last one (precision), and how much
of the last one's had it (recall)?

Does a row's place in training matter for what is learnt of it? Most rows come once and are never
memorized, so their losses are asked, less those of a run that had them in another order:

    python eval.py losses --model=RUN,OTHER --steps=last --rows=0:4096 --output=OUT/losses
    python -m studies.memorization position --losses=OUT/losses --model=RUN --reference=OTHER

With --text=PLAN.jsonl, the plan of planted documents (interventions.py), the same of its groups.
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
from batch_viewer import Provenance
from config import check, command, read_json, replacing
from data import Order, load_npy, order_of, ordered, span
from eval import find_all
from interventions import read_plan
from model import Cache, head_blocks
from parallel import Processes, leave_processes
from studies.results import (Checkpoints, open_results, permutation_p, regression, student_p,
                             write_csv, write_table)

UNKNOWN = 255  # in a .npy that is being made


@torch.no_grad()
def matched_lengths(model, rows, context, stages=(1, 4, 16)):
    """Return how many tokens behind the first `context` greedy decoding gets right until it misses.

    rows (n, context + l) int64 -> (n,) int64. Nothing is generated: until its first miss, greedy
    decoding reads the row itself, so argmax on the row decides (of equal logits the first, as in
    transformers). Most rows miss at once, so the positions are scored in stages, each reading on
    from the last one's keys and values, and a row is dropped at its miss.
    """
    (n, width), device = rows.shape, rows.device
    cache = [Cache(model.config, n, width - 1, model.embed_in.weight) for _ in model.layers]
    columns = torch.arange(width - 1, device=device)
    lengths = torch.zeros(n, dtype=torch.int64, device=device)
    alive, read, done = torch.arange(n, device=device), 0, 0  # tokens in the cache, tokens decided
    for stop in sorted({stage for stage in stages if stage < width - context} | {width - context}):
        end = context + stop - 1  # the last token is only predicted
        ahead = torch.zeros(end - read, end, device=device).masked_fill_(
            columns[:end] > columns[read:end, None], -torch.inf)
        hidden = model.hidden(rows[alive, read:end], columns[read:end], ahead, cache)
        hidden = hidden[:, context - 1 + done - read:].flatten(0, 1)
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


def generated_matches(model, rows, context):
    """Return how many tokens behind the first `context` equal what the model generates, (n,)."""
    out = model.generate(rows[:, :context], rows.shape[1] - context, temperature=0)
    return (out[:, context:] == rows[:, context:]).sum(1)


# ---------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Score(Checkpoints):
    model: str  # run folder, or checkpoint folders named stepN, with commas
    output: str  # folder of the results
    data: str | None = None  # PREFIX; None: what the run was trained on
    rows: str = "all"  # of the training order, first:last+1; all: as many as the order has
    context: int = 32  # k
    continuation: int = 32  # l
    generate: bool = False  # also the score of the model's own generation
    batch: int = 256  # rows at a time

    def __post_init__(self):
        check(self, f"1 to {UNKNOWN - 1}", lambda value: 0 < value < UNKNOWN, "continuation")
        check(self, "at least 1", lambda value: value >= 1, "context", "batch")


def score(options):
    """Score rows of the training order at each checkpoint; goes on where it was stopped."""
    # The first process to finish may wait for the last one longer than gloo's 30 minutes.
    processes = Processes(options.device, timedelta(days=30))
    orders = {order_of(model, options.data) for model in options.model.split(",")}
    if len(orders) > 1:
        raise ValueError(f"{options.model} were trained in different orders; score each into its "
                         "own --output")
    [order], folders = orders, find_all(options.model, options.steps)
    data, width = ordered(order), options.context + options.continuation
    if width > data.seq_length + 1:
        raise ValueError(f"context + continuation = {width}, but a row has {data.seq_length + 1} "
                         "tokens")
    numbers = range(len(data))
    if options.rows != "all":
        numbers = span("rows", options.rows, len(data))
    open_results(f"{options.output}/memorization.json", {
        "first_row": numbers[0], "last_row": numbers[-1], "context": options.context,
        "continuation": options.continuation, "order": asdict(order)})
    kinds = {"": matched_lengths} | ({"_generated": generated_matches} if options.generate else {})
    for name, step, _, folder in folders:
        model = None
        for kind, act in kinds.items():
            path = f"{options.output}/{name}_step{step}{kind}.npy"
            if os.path.exists(path):  # it is only once every process is through with it
                continue
            model = model or checkpoints.load_model(folder, processes.device)
            processes.together(lambda: begin(f"{path}.partial", len(numbers)), first_alone=True)
            results = np.load(f"{path}.partial", mmap_mode="r+")  # all processes write to it
            score_rows(lambda rows: act(model, rows, options.context), data, width, results,
                       numbers, options.batch, processes)
            results.flush()
            processes.gather(None)  # wait for all
            if processes.rank == 0:
                os.replace(f"{path}.partial", path)
                whole = np.mean(results == options.continuation)
                print(f"{path}: {len(results):,} rows, {whole:.3%} of which whole, "
                      f"{np.mean(results):.3f} of {options.continuation} tokens right on average")
    leave_processes()


def begin(partial, n):
    if not os.path.exists(partial):
        with replacing(partial) as file:
            np.save(file, np.full(n, UNKNOWN, dtype=np.uint8))


def score_rows(act, data, width, results, numbers, batch, processes):
    """Fill `results` where it is UNKNOWN with what act says of the first tokens of these rows.

    The processes take blocks of `batch` rows in turn.
    """
    mine = range(processes.rank * batch, len(numbers), processes.count * batch)
    for start in tqdm(mine, unit=f"{batch} rows", disable=processes.rank > 0 or None):
        here = slice(start, start + batch)
        if UNKNOWN in results[here]:
            tokens = torch.from_numpy(data.rows(numbers[here])[:, :width].astype(np.int64))
            results[here] = act(tokens.to(processes.device)).cpu().numpy()


# ---------------------------------------------------------------------------- analyse

@dataclass(frozen=True)
class Analyse:
    results: str  # folder that score wrote
    window: int = 512  # rows
    plot: str = ""  # PNG

    def __post_init__(self):
        check(self, "at least 1", lambda value: value >= 1, "window")


def analyse(options):
    """Print and write rates by subset, tests of counts per window, and how early predicts late."""
    folder, window, runs = Path(options.results), options.window, {}
    settings = read_json(folder / "memorization.json")
    for path in folder.glob("*_step*.npy"):
        name, _, step = path.stem.rpartition("_step")
        if step.isdigit():
            runs.setdefault(name, {})[int(step)] = load_npy(path)
    if not runs:
        raise ValueError(f"{folder}: no NAME_stepN.npy there; `score` makes them")
    order, length = Order(**settings["order"]), settings["continuation"]
    rows = np.arange(settings["first_row"], settings["last_row"] + 1)
    subsets = describe_rows(ordered(order), rows, settings["context"] + length)
    by_subset, tests, early, windows = [], [], [], []
    for run, by_step in sorted(runs.items()):
        last = by_step[max(by_step)] == length
        for step, lengths in sorted(by_step.items()):
            memorized, seen = lengths == length, rows < step * order.batch_size
            by_subset += [(run, step, *row) for row in rates(lengths, memorized, seen, *subsets)]
            counts = window_counts(memorized[seen], window)
            mean = counts.mean() if len(counts) else None
            share = mean / window if len(counts) else None
            tests += [(run, step, window, len(counts), mean, share, test, *found)
                      for test, found in poisson_tests(counts, window).items()]
            windows += [(run, step, window, count, int((counts == count).sum()))
                        for count in np.unique(counts).tolist() or [None]]
            ours, its = int(memorized[seen].sum()), int(last[seen].sum())
            both = int((memorized & last)[seen].sum())
            early.append((run, step, ours, its, both, both / ours if ours else None,
                          both / its if its else None))
    for name, columns, found in (
            ("rates", "subset rows n passages memorized rate mean_length stderr low high",
             by_subset),
            ("poisson", "window n mean share test statistic p permutation_p", tests),
            ("early", "memorized memorized_last both precision recall", early)):
        write_table(folder / f"{name}.csv", ("model", "step", *columns.split()), found)
    write_csv(folder / "windows.csv", ("model", "step", "window", "memorized", "windows"), windows)
    if options.plot:
        import plots
        plots.memorization(folder, options.plot)


def describe_rows(data, rows, width):
    """Return (subsets' names, subset (n,), passage (n,)) of rows, by the document they begin in.

    Rows whose first `width` tokens are of several are a subset, and each is a passage of its own.
    Else a passage is all documents of one subset and one length: copies are equally long. (Others
    may be too, which makes the standard error a little large.)
    """
    provenance, names, subset = Provenance(data), ["unnamed"], 0
    if not provenance.known:
        return names, np.zeros(len(rows), dtype=np.int64), np.arange(len(rows))
    doc_idx, sample_idx, shuffle_idx = provenance.data.order
    first, start = sample_idx[shuffle_idx[rows]].T
    documents = doc_idx[first]
    sizes = provenance.data.tokens.sizes[documents].astype(np.int64)
    if provenance.table is not None:
        names = provenance.subsets
        subset = provenance.table["subset"][documents].astype(np.int64)
    whole = start + width <= sizes
    codes = np.where(whole, subset, len(names))
    passages = np.where(whole, codes << 32 | sizes, -1 - rows)
    return [*names, "several documents"], codes, np.unique(passages, return_inverse=True)[1]


def rates(lengths, memorized, seen, names, codes, passages):
    """Yield rows of rates.csv: of all and of each subset, before and after the checkpoint."""
    for which, chosen in (("seen", seen), ("after this checkpoint", ~seen)):
        for code, subset in enumerate(["all", *names], -1):
            mine = chosen & ((codes == code) | (code < 0))
            if mine.any():
                [mean] = regression(lengths[None, mine].astype(np.float64),
                                    documents=passages[mine])
                yield (subset, which, int(mine.sum()), len(np.unique(passages[mine])),
                       int(memorized[mine].sum()), float(memorized[mine].mean()), mean.value,
                       mean.stderr, mean.low, mean.high)


def window_counts(memorized, window):
    """Return how many of each whole window of consecutive rows are memorized."""
    return memorized[:len(memorized) // window * window].reshape(-1, window).sum(axis=1)


def poisson_tests(counts, window, draws=999):
    """Return {test: (statistic, p, permutation p)} of counts (n,) of memorized rows per window.

    dispersion: sum (c - mean)^2 / mean / (n - 1); p from chi-square. trend: the score test of a
    rate that changes linearly with the window's number; p from the normal, with the counts' own
    variance. Counts of shuffled rows are hypergeometric, so that is what is drawn for the
    permutation p. Without two windows and a memorized row there is nothing to test: all is None.
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
    """Test whether the place in training decides what is learnt of a row or planted document."""
    prefix = options.losses.removesuffix(".npy")
    what, values = read_json(f"{prefix}.json"), load_npy(f"{prefix}.npy")
    last = {name: i for i, (name, _) in enumerate(what["checkpoints"])}
    if missing := {options.model, options.reference} - last.keys():
        raise ValueError(f"{prefix}.json: no {', '.join(missing)} among {', '.join(last)}")
    gain = np.nanmean(values[last[options.reference]] - values[last[options.model]], axis=1)
    if "order" in what:
        place, data = np.arange(*what["rows"]), ordered(Order(**what["order"]))
        names, codes, _ = describe_rows(data, place, 1)
        groups = np.array(names)[codes]
    else:  # the plan of planted documents
        plan = read_plan(what["text"])
        place = np.array([np.mean(entry["steps"] or np.nan) for entry in plan])
        groups = np.array([entry.get("group", "") for entry in plan])
    tests = [(options.model, options.reference, group, int(mine.sum()), *found)
             for group in ["all", *np.unique(groups)]
             for mine in [np.isfinite(place) & ((groups == group) | (group == "all"))]
             for found in position_test(place[mine], gain[mine])]
    write_table(options.output, ("model", "reference", "subset", "n", "term", "value", "stderr",
                                 "p", "permutation_p"), tests)


def position_test(place, values, draws=999):
    """Return [(term, value, stderr, p, permutation p)] of values (n,) on their place in the order.

    "last minus first" is the linear term, "middle minus ends" the quadratic one behind it: what is
    forgotten at the beginning and not yet learnt at the end makes a hump, which no line sees. p is
    a Student's t with n - 3 degrees of freedom; the permutations give the same values to other
    places. Of fewer than 4 values, or equal ones, there is nothing to test.
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


COMMANDS = {"score": (Score, score), "analyse": (Analyse, analyse),
            "position": (Position, position)}

if __name__ == "__main__":
    command(sys.argv[1:], COMMANDS)
