"""Is memorization a Poisson process over training? (Biderman et al. 2023, section 3.2.)

A row of the training order is (k, l)-memorized, k = l = 32, if greedy decoding from its first k tokens
gives its next l. The paper counts memorized rows in windows of 512 consecutive rows and finds the
counts Poisson distributed: what is memorized does not depend on when it was seen.

    python -m studies.memorization score --model=RUN --output=OUT
    python -m studies.memorization analyse --results=OUT --plot=OUT/memorization.png

and with a published model and its data, checkpoint folders named step13000, step143000, ...:

    torchrun --nproc_per_node=8 -m studies.memorization score --model=pythia-12b-deduped/step143000 \\
        --data=data/pile-deduped/document --output=OUT

OUT/NAME_stepN.npy is uint8 (rows,): how many of the l tokens are right before the first miss. With
--generate=True NAME_stepN_generated.npy is the original's score times l: how many of the l are right
when the model goes on from its own output (predictable-memorization/eval_memorization.py).
"""

import csv
import io
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
from config import command, replacing
from data import Order, ordered, read_json
from eval import find, pick_device
from model import Cache, head_blocks
from studies.poisson import poisson_tests, window_counts
from pile.viewer import Provenance

UNKNOWN = 255  # in a .npy that is being made


@torch.no_grad()
def matched_lengths(model, rows, context, stages=(1, 4, 16)):
    """Return how many tokens behind the first `context` greedy decoding gets right before its first miss.

    rows (n, context + l) int64 -> (n,) int64. Nothing is generated: until its first miss, greedy decoding
    reads the row itself, so argmax on the row decides. Most rows miss at once, so the positions are
    scored in stages, each reading on from the last one's keys and values, and a row is dropped at its
    miss. Of equal logits the first is greedy, as in
    torch.argmax and so in transformers' generate.
    """
    (n, width), device = rows.shape, rows.device
    cache = [Cache(model.config, n, width - 1, model.embed_in.weight) for _ in model.layers]
    columns = torch.arange(width - 1, device=device)
    lengths = torch.zeros(n, dtype=torch.int64, device=device)
    alive, read, done = torch.arange(n, device=device), 0, 0  # tokens in the cache, tokens decided
    for stop in sorted({stage for stage in stages if stage < width - context} | {width - context}):
        end = context + stop - 1  # the last token is only predicted
        ahead = torch.zeros(end - read, end, device=device).masked_fill_(columns[:end] > columns[read:end, None], -torch.inf)
        hidden = model.hidden(rows[alive, read:end], columns[read:end], ahead, cache)
        hidden = hidden[:, context - 1 + done - read:].flatten(0, 1)
        predicted = torch.cat([logits.argmax(1) for _, logits in head_blocks(hidden, model.embed_out.weight)])
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
    """Return how many of the tokens behind the first `context` equal what the model generates greedily, (n,)."""
    out = model.generate(rows[:, :context], rows.shape[1] - context, temperature=0)
    return (out[:, context:] == rows[:, context:]).sum(1)


# ---------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Score:
    model: str  # run folder, or checkpoint folders named stepN, with commas
    output: str  # folder of the results
    steps: str = "all"  # of a run folder: all, last, or numbers with commas
    data: str | None = None  # PREFIX; None: what the run was trained on
    rows: str = "all"  # of the training order, first:last+1; all: as many as the order has
    context: int = 32  # k
    continuation: int = 32  # l
    generate: bool = False  # also the score of the model's own generation
    batch: int = 256  # rows at a time
    device: str = "auto"

    def __post_init__(self):
        if not (self.context > 0 and 0 < self.continuation < UNKNOWN and self.batch > 0):
            raise ValueError(f"context = {self.context}, continuation = {self.continuation}, batch = {self.batch}: "
                             f"expected positive numbers, continuation below {UNKNOWN}")


def training_order(model, data):
    """Return the Order that a run was trained in, or Pythia's if there is no run's config."""
    folder = Path(model.split(",")[0])
    path = next((p for p in (folder / "config.json", folder.parent / "config.json")
                 if p.exists() and "batch_size" in read_json(p)), None)
    settings = read_json(path) if path else {}
    if not (data or settings.get("data")):
        raise ValueError(f"{model}: not a run of ours, so --data=PREFIX has to name what it was trained on")
    try:
        return Order(data or settings["data"], **{name: settings[name] for name in (
            "steps", "batch_size", "seq_length", "seed") if name in settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def score(options):
    """Score rows of the training order at each checkpoint; goes on where it was stopped."""
    folders = [entry for model in options.model.split(",") for entry in find(model, options.steps)]
    order = training_order(options.model, options.data)
    data = ordered(order)
    width = options.context + options.continuation
    if width > data.seq_length + 1:
        raise ValueError(f"context + continuation = {width}, but a row has {data.seq_length + 1} tokens")
    first, last = (0, len(data)) if options.rows == "all" else _range(options.rows, len(data))
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    output = Path(options.output)
    open_results(output / "memorization.json", {
        "first_row": first, "last_row": last - 1, "context": options.context, "continuation": options.continuation,
        "order": asdict(order)})
    device = pick_device(options.device)
    kinds = {"": matched_lengths} | ({"_generated": generated_matches} if options.generate else {})
    blocks = range(first + rank * options.batch, last, world_size * options.batch)  # this process's share
    for name, step, _, folder in folders:
        todo = {kind: function for kind, function in kinds.items()
                if not (output / f"{name}_step{step}{kind}.npy").exists()}
        model = checkpoints.load_model(folder, device) if todo else None
        for kind, function in todo.items():
            path = output / f"{name}_step{step}{kind}.npy"
            results = open_partial(path, last - first)
            bar = tqdm(total=last - first, desc=path.stem, unit="row", unit_scale=True, disable=None)
            for start in blocks:
                stop = min(start + options.batch, last)
                if UNKNOWN in results[start - first:stop - first]:
                    rows = torch.from_numpy(data.rows(range(start, stop))[:, :width].astype(np.int64)).to(device)
                    results[start - first:stop - first] = function(model, rows, options.context).cpu().numpy()
                bar.update((stop - start) * world_size)
            bar.close()
            results.flush()
            if UNKNOWN not in results:  # whoever is last
                os.replace(f"{path}.partial", path)
                print(f"{path}: {last - first:,} rows, {np.mean(results == options.continuation):.3%} of which whole, "
                      f"{np.mean(results):.3f} of {options.continuation} tokens right on average")


def _range(text, n):
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last) <= n):
        raise ValueError(f"rows = {text!r}, expected first:last+1 within 0:{n}")
    return int(first), int(last)


def open_results(path, settings):
    """Write the settings of a results folder, or raise ValueError naming what differs from those it has."""
    if path.exists():
        before = read_json(path)
        differences = [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in settings.items()
                       if before.get(name) != value]
        if differences:
            raise ValueError(f"{path.parent} holds other results: {'; '.join(differences)}; name another --output")
        return
    with replacing(path) as file:
        file.write(json.dumps(settings, indent=2).encode())


def open_partial(path, n):
    """Return PATH.partial as a writable uint8 array (n,) that all processes share, UNKNOWN where nothing is."""
    partial = f"{path}.partial"
    if not os.path.exists(partial):
        mine = f"{partial}.{os.getpid()}"
        np.save(mine, np.full(n, UNKNOWN, dtype=np.uint8))  # numpy adds .npy
        try:
            os.link(f"{mine}.npy", partial)  # the first process's is everybody's
        except FileExistsError:
            pass
        os.remove(f"{mine}.npy")
    results = np.load(partial, mmap_mode="r+", allow_pickle=False)
    if results.shape != (n,) or results.dtype != np.uint8:
        raise ValueError(f"{partial}: {results.dtype} {results.shape}, expected uint8 ({n},); delete it")
    return results


# ---------------------------------------------------------------------------- analyse


@dataclass(frozen=True)
class Analyse:
    results: str  # folder that score wrote
    windows: str = "512"  # rows a window, with commas
    length: int | None = None  # tokens right that make a row memorized; None: all of the continuation
    plot: str = ""  # PNG

    def __post_init__(self):
        if not all(window.isdigit() and int(window) for window in self.windows.split(",")):
            raise ValueError(f"windows = {self.windows!r}, expected numbers of rows with commas")


def analyse(options):
    """Print and write rates by checkpoint and subset, the Poisson tests, and how early checkpoints predict."""
    folder = Path(options.results)
    settings = read_json(folder / "memorization.json")
    try:
        first, order = int(settings["first_row"]), Order(**settings["order"])
        length, batch_size = options.length or int(settings["continuation"]), order.batch_size
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/memorization.json: {error} is missing or of the wrong type") from None
    data, runs = ordered(order), {}
    for path in folder.glob("*_step*.npy"):
        name, _, step = path.stem.rpartition("_step")
        if step.isdigit():
            runs.setdefault(name, {})[int(step)] = np.load(path, allow_pickle=False)
    if not runs:
        raise ValueError(f"{folder}: no NAME_stepN.npy there; `score` makes them")
    sizes = {len(lengths) for checkpoints in runs.values() for lengths in checkpoints.values()}
    if len(sizes) > 1 or max(sizes) > len(data):
        raise ValueError(f"{folder}: results of {sorted(sizes)} rows, of an order of {len(data):,}")
    rows = first + np.arange(sizes.pop())
    subsets = subset_of(data, rows)
    rates, tests, histograms, early = [], [], [], []
    for name, by_step in sorted(runs.items()):
        last = by_step[max(by_step)] >= length
        for step, lengths in sorted(by_step.items()):
            seen = rows < step * batch_size
            for subset in ["all", *sorted(set(subsets))]:
                for which, chosen in (("seen", seen), ("not seen", ~seen)):
                    some = lengths[chosen & ((subset == "all") | (subsets == subset))]
                    if len(some):
                        rates.append((name, step, subset, which, len(some), int((some >= length).sum()),
                                      float(np.mean(some >= length)), float(np.mean(some)),
                                      float(np.std(some) / math.sqrt(len(some)))))
            memorized = lengths >= length
            for window in options.windows.split(","):
                counts = window_counts(memorized[seen], int(window))
                histograms += [(name, step, window, count, int((counts == count).sum())) for count in np.unique(counts)]
                tests += [(name, step, window, len(counts), float(counts.mean()), test, statistic, p)
                          for test, (statistic, p) in poisson_tests(counts).items()]
            both = int((memorized & last)[seen].sum())
            early.append((name, step, int(memorized[seen].sum()), int(last[seen].sum()), both,
                          both / max(1, memorized[seen].sum()), both / max(1, last[seen].sum())))
    write_table(folder / "rates.csv", ("model", "step", "subset", "rows", "n", "memorized", "rate", "mean_length",
                                       "stderr"), rates)
    write_table(folder / "poisson.csv", ("model", "step", "window", "n", "mean", "test", "statistic", "p"), tests)
    write_table(folder / "early.csv", ("model", "step", "memorized", "memorized_last", "both", "precision",
                                       "recall"), early)
    write_csv(folder / "windows.csv", ("model", "step", "window", "memorized", "windows"), histograms)
    if options.plot:
        import plots
        plots.memorization(folder, options.plot)


def subset_of(data, rows):
    """Return the subset of the document that each row begins in, "unnamed" where that was not recorded."""
    provenance = Provenance(data)
    if provenance.names is None:
        return np.full(len(rows), "unnamed")
    doc_idx, sample_idx, shuffle_idx = provenance.data.order
    documents = doc_idx[sample_idx[shuffle_idx[rows], 0]]
    return np.array(provenance.names["subsets"])[provenance.table["subset"][documents]]


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def write_table(path, header, rows):
    """Write a CSV and print it, numbers short."""
    write_csv(path, header, rows)
    short = [[f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)
              for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *short)]
    print(f"\n{path}")
    for row in [header, *short]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


if __name__ == "__main__":
    command(sys.argv[1:], {"score": (Score, score), "analyse": (Analyse, analyse)})
