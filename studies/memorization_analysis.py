"""What `score` of studies/memorization.py found, as tables: its command `analyse`.

rates.csv is by subset, of rows seen before the checkpoint and of those that come after it. The
latter are a control only in a corpus that does not repeat itself; rows scored with --control were
never trained on. Standard errors are over passages: copies of one are not independent.

poisson.csv tests the counts per window. If each row is memorized or not by itself, with one
probability, they are binomial, of dispersion 1 - mean / window: the Poisson's 1 only where few are.
Where repeated passages are what is memorized, it is the shuffle that spreads them over the windows,
and where a repeat stands says nothing on when it was learnt. So position is tested on text that
comes once, in position.csv: does the matched length of a subset's rows change with their place?

early.csv: of what a checkpoint has memorized, how much has the last one (precision), and how much
of the last one's had it (recall)? Where there is none to take a share of, the cell is empty.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batch_viewer import Provenance
from config import read_json
from data import load_npy, Order, ordered
from studies.poisson import poisson_tests, position_test, window_counts
from studies.results import write_csv, write_table

REST = "several documents"  # the subset of rows whose first tokens are of more than one


@dataclass(frozen=True)
class Analyse:
    results: str  # folder that score wrote
    windows: str = "512"  # rows a window, with commas
    length: int | None = None  # tokens right that make a row memorized; None: the continuation
    plot: str = ""  # PNG

    def __post_init__(self):
        if not all(window.isdigit() and int(window) for window in self.windows.split(",")):
            raise ValueError(f"windows = {self.windows!r}, expected numbers of rows with commas")


TABLES = {  # file: its columns behind model and step
    "rates.csv": ("subset", "rows", "n", "passages", "memorized", "rate", "mean_length", "stderr"),
    "position.csv": ("subset", "n", "slope", "stderr", "p"),
    "poisson.csv": ("window", "n", "mean", "binomial", "test", "statistic", "p"),
    "early.csv": ("memorized", "memorized_last", "both", "precision", "recall"),
    "windows.csv": ("window", "memorized", "windows")}


def analyse(options):
    """Print and write rates by subset, tests of counts and place, and how early predicts late."""
    folder = Path(options.results)
    settings, order, runs = read_results(folder)
    length = settings["continuation"] if options.length is None else options.length
    if not 1 <= length <= settings["continuation"]:
        raise ValueError(f"length = {length}, expected 1 to {settings['continuation']}, the tokens "
                         f"that {folder} decides")
    data, tables = ordered(order), {}
    n = {len(lengths) for by_step in runs.values() for lengths in by_step.values()}
    if len(n) > 1 or max(n) > len(data):
        raise ValueError(f"{folder}: results of {sorted(n)} rows, of an order of {len(data):,}")
    rows = settings["first_row"] + np.arange(n.pop())
    width = settings["context"] + settings["continuation"]
    names, codes, passages = describe_rows(data, rows, width)

    def add(name, found):
        tables.setdefault(name, []).extend((run, step, *row) for row in found)

    def by_subset(chosen):  # one mask at a time: the Pile has 22 subsets
        for code, subset in enumerate(["all", *names], -1):
            mine = chosen if code < 0 else chosen & (codes == code)
            if mine.any():
                yield subset, mine

    for run, by_step in sorted(runs.items()):
        last = by_step[max(by_step)] >= length
        for step, lengths in sorted(by_step.items()):
            memorized, seen = lengths >= length, rows < step * order.batch_size
            whiches = {"seen": seen, "after this checkpoint": ~seen}
            if settings.get("control"):
                whiches = {"never trained on": np.full(len(rows), True)}
            add("rates.csv", ((subset, which, *rate(lengths[mine], memorized[mine], passages[mine]))
                              for which, chosen in whiches.items()
                              for subset, mine in by_subset(chosen)))
            if settings.get("control"):
                continue
            add("position.csv", (
                (subset, int(mine.sum()), *position_test(rows[mine], lengths[mine].astype(float)))
                for subset, mine in by_subset(seen)))
            for window in map(int, options.windows.split(",")):
                counts = window_counts(memorized[seen], window)
                mean = float(counts.mean()) if len(counts) else None
                binomial = 1 - mean / window if len(counts) else None
                add("poisson.csv", ((window, len(counts), mean, binomial, test, *found)
                                    for test, found in poisson_tests(counts).items()))
                add("windows.csv", ((window, count, int((counts == count).sum()))
                                    for count in np.unique(counts).tolist() or [None]))
            ours, its, both = (int(part[seen].sum())
                               for part in (memorized, last, memorized & last))
            add("early.csv", [(ours, its, both, both / ours if ours else None,
                               both / its if its else None)])
    for name, found in tables.items():
        write = write_csv if name == "windows.csv" else write_table
        write(folder / name, ("model", "step", *TABLES[name]), found)
    if options.plot:
        import plots
        plots.memorization(folder, options.plot)


def read_results(folder):
    """Return (settings, Order, {model: {step: matched lengths}}) of a folder of `score`."""
    settings, runs = read_json(folder / "memorization.json"), {}
    try:
        order = Order(**settings["order"])
        for name in ("first_row", "context", "continuation"):
            if type(settings[name]) is not int:
                raise TypeError(name)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/memorization.json: {error} is missing or of the wrong type"
                         ) from None
    for path in folder.glob("*_step*.npy"):
        name, _, step = path.stem.rpartition("_step")
        if step.isdigit():
            runs.setdefault(name, {})[int(step)] = load_npy(path)
    if not runs:
        raise ValueError(f"{folder}: no NAME_stepN.npy there; `score` makes them")
    return settings, order, runs


def describe_rows(data, rows, width):
    """Return (subsets' names, subset (n,), passage (n,)) of rows, by the document they begin in.

    Rows whose first `width` tokens are not of one document are REST, each a passage of its own.
    Else a passage is all documents of one subset and one length: copies are equally long. (Others
    may be too, which makes the standard error a little large.)
    """
    provenance = Provenance(data)
    if not provenance.known:
        return ["unnamed"], np.zeros(len(rows), dtype=np.int64), np.arange(len(rows))
    doc_idx, sample_idx, shuffle_idx = provenance.data.order
    first, start = sample_idx[shuffle_idx[rows]].T
    documents = doc_idx[first]
    sizes = provenance.data.tokens.sizes[documents].astype(np.int64)
    names, subset = ["unnamed"], 0
    if provenance.names is not None:
        names = provenance.names["subsets"]
        subset = provenance.table["subset"][documents].astype(np.int64)
    whole = start + width <= sizes
    codes = np.where(whole, subset, len(names))
    keys = np.where(whole, codes << 32 | sizes, -1 - rows)
    return [*names, REST], codes, np.unique(keys, return_inverse=True)[1]


def rate(lengths, memorized, passages):
    """Return (rows, passages, memorized, their share, mean length, its stderr over passages)."""
    n, mean = len(lengths), float(np.mean(lengths))
    present = np.bincount(passages) > 0
    off = np.bincount(passages, weights=lengths - mean)[present]  # each passage in sum
    several = len(off) > 1
    error = math.sqrt((off @ off) * len(off) / (len(off) - 1)) / n if several else None
    return n, len(off), int(memorized.sum()), float(memorized.mean()), mean, error
