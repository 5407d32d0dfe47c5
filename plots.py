"""Figures from the files that training, evaluation and studies write; only this file draws.

    python plots.py training --run=runs/mini --results=runs/mini/results.csv --output=mini.png
    python plots.py curves --results=results.csv --reference=pythia_v1_evals.csv --output=curves.png
    python plots.py term_frequency --bins=terms_bins.csv --output=terms.png
    python plots.py window --losses=losses.npy --output=window.html  # each token's loss, by step

`reference` is the published suite's results as one CSV (model,deduped,step,shots,task,metric,value,
stderr), from EleutherAI/pythia's evals/pythia-v1. matplotlib is an extra: pip install matplotlib.
"""

import base64
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import command, read_csv, read_json, replacing
from data import load_npy
from eval import token_rows
from tasks import GROUPS
from tokenizer import N_TOKENS, load_tokenizer


def pyplot():
    """Return matplotlib.pyplot, drawing into files; an extra of this project."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "figure.titlesize": 11, "legend.fontsize": 8, "legend.frameon": False, "lines.linewidth": 1,
        "lines.markersize": 4})
    from matplotlib import pyplot
    return pyplot


def grid(n, columns, width, height, legend=0.0, **options):
    """Return a figure and the axes of n panels, in inches, with `legend` inches free below them."""
    rows = math.ceil(n / columns)
    figure, axes = pyplot().subplots(rows, columns, squeeze=False, layout="constrained",
                                     figsize=(width * columns, height * rows + legend), **options)
    for unused in axes.flat[n:]:
        unused.remove()
    return figure, list(axes.flat[:n])


def finish(figure, output):
    """Write the figure to a file and return it."""
    with replacing(output) as file:
        figure.savefig(file, dpi=150, format=Path(output).suffix[1:] or "png")
    pyplot().close(figure)
    print(output)
    return figure


def require(rows, *names):
    """Raise ValueError unless the rows have these columns."""
    if rows and (absent := set(names) - rows[0].keys()):
        raise ValueError(f"no column {', '.join(absent)}: another file than this figure's")


def numbers(rows, *names):
    """Return columns as arrays of numbers; an empty cell is nan, which is not drawn."""
    require(rows, *names)
    return [np.array([float(row[name] or "nan") for row in rows]) for name in names]


def in_order(rows, name="step", /, **kept):
    """Return the rows that have these cells, by the number in column `name`."""
    require(rows, name, *kept)
    chosen = [row for row in rows if all(row[key] == cell for key, cell in kept.items())]
    return sorted(chosen, key=lambda row: float(row[name]))


def unique(rows, name):
    """Return the different cells of a column, in the rows' order."""
    require(rows, name)
    return list(dict.fromkeys(row[name] for row in rows))


def shades(names):
    """Return {name: colour}: evenly from viridis, without its yellows, in the names' order."""
    return {name: pyplot().cm.viridis(0.85 * i / max(1, len(names) - 1))
            for i, name in enumerate(names)}


def errorbars(axes, rows, column, colours, x, *names):
    """Draw a curve with error bars for each value of a column: {value: colour}.

    names: the columns of y and of its error, or of y and of both ends of its interval.
    """
    for value, colour in colours.items():
        curve = in_order(rows, x, **{column: value})
        y, *error = numbers(curve, *names)
        if len(error) == 2:
            error = [(y - error[0], error[1] - y)]
        axes.errorbar(*numbers(curve, x), y, *error, marker="o", color=colour, label=value)


@dataclass(frozen=True)
class Training:
    run: str  # run folder
    results: str  # CSV of eval.py with the task heldout
    output: str = "curves.png"


def training(options):
    """Draw loss and held-out bits per byte against tokens."""
    name = os.path.basename(os.path.normpath(options.run))
    steps = read_csv(os.path.join(options.run, "metrics.csv"))
    rows = in_order(read_csv(options.results), model=name, metric="bits_per_byte")
    if not rows:
        raise ValueError(f"{options.results}: no bits_per_byte of {name}; "
                         "run eval.py --tasks=heldout first")
    figure, (left, right) = grid(2, 2, 5, 4)
    left.plot(*numbers(steps, "tokens", "loss"))
    colours = shades(sorted(unique(rows, "task"))) | {"heldout": "black"}
    errorbars(right, rows, "task", colours, "tokens", "value", "stderr")
    right.legend(loc="lower left")
    for axes in (left, right):
        axes.set_xscale("log", nonpositive="mask")  # without step 0
        axes.set(xlabel="tokens seen")
    left.set(ylabel="training loss (nats per token)")
    right.set(ylabel="held-out bits per byte")
    figure.suptitle(name)
    return finish(figure, options.output)


# ------------------------------------------------------------------ evaluation over training

# The paper's harness had other names for two metrics.
METRIC_NAMES = {"ppl": "perplexity", "likelihood_difference": "likelihood_diff"}
PUBLISHED = "published (v0.3)"  # another style beside it is not quite comparable
SIZE = re.compile(r"(\d+(?:\.\d+)?)([mb])(?![a-z\d])", re.IGNORECASE)  # in pythia-1.4b-deduped


@dataclass(frozen=True)
class Curves:
    results: str  # CSV of eval.py; several with commas
    tasks: str | None = None  # with commas; all without
    metrics: str = "acc,pct_stereotype,exact_match,em,bits_per_byte,perplexity"
    reference: str | None = None  # published results, drawn in grey
    output: str = "curves.png"


def curves(options):
    """Draw evaluations over tokens: a panel a task, a colour a model, error bands."""
    results = evaluations(options.results)
    panels = choose_panels(results, options.metrics, options.tasks)
    reference = evaluations(options.reference) if options.reference else {}
    columns = min(4, len(panels))
    figure, grid_axes = grid(len(panels), columns, max(3.1, 5.5 / columns), 2.6, legend=0.9)
    look = looks({model for panel in panels for model in results[panel]})
    handles = dict.fromkeys(look)  # {name: a line that looks so}, in the legend's order
    for axes, panel in zip(grid_axes, panels):
        task, shots, metric = panel
        axes.set(title=f"{task}, {shots}-shot", ylabel=metric, xscale="log",
                 yscale="log" if metric.endswith("perplexity") else "linear")
        published = list(reference.get(panel, {}).items())
        for i, (model, points) in enumerate(published):
            x, y, _ = zip(*points)
            [handles[PUBLISHED]] = axes.plot(x, y, color="0.78", zorder=1)
            if i in (0, len(published) - 1):  # their names show the order of all
                axes.annotate(model.removeprefix("pythia-").removesuffix("-deduped"),
                              (x[-1], y[-1]), xytext=(3, 0), textcoords="offset points",
                              fontsize=7, color="0.5", va="center")
                axes.margins(x=0.1)
        for model, points in results[panel].items():
            (x, y, error), (colour, line) = np.array(points).T, look[model]
            axes.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
            [handles[model]] = axes.plot(x, y, color=colour, linestyle=line, marker="o",
                                         markersize=2.2)
    for axes in grid_axes[-columns:]:  # the lowest of every column
        axes.set_xlabel("tokens seen")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", handlelength=3,
                  ncols=columns)
    return finish(figure, options.output)


def evaluations(paths):
    """Return {(task, shots, metric): {model: [(tokens, value, stderr or nan)]}} of any CSVs.

    Step 0 is left out: it has no place on a log axis. A later row takes the place of an earlier one
    of the same evaluation. Raises ValueError for a file that is neither eval.py's nor the published
    one, and for a curve of several styles, dtypes or documents.
    """
    points, made = {}, {}
    for path in paths.split(","):
        for number, row in enumerate(read_csv(path), 2):
            where = f"{path}, line {number}"
            try:
                model, task, shots = row["model"], row["task"], int(row["shots"])
                if "deduped" in row:  # published
                    model += "-deduped" * (row["deduped"] == "1")
                    tokens = int(row["step"]) << 21
                else:
                    tokens = int(row["tokens"] or 0)
                metric = METRIC_NAMES.get(row["metric"], row["metric"])
                point = float(row["value"]), float(row["stderr"] or "nan")
            except (KeyError, ValueError) as error:
                raise ValueError(f"{where}: neither results of eval.py nor the published CSV "
                                 f"({type(error).__name__}: {error})") from None
            curve = (task, shots, metric), model
            how = " ".join(row.get(name) or "published" for name in ("style", "dtype", "docs"))
            before = made.setdefault(curve, how)
            if how != before:
                raise ValueError(f"{where}: {metric} of {task} by {model} in {how}, before in "
                                 f"{before}; draw them from two files")
            if tokens > 0 and "MtokBS" not in model:  # published of other batch sizes
                points[*curve, tokens] = point
    curves = defaultdict(lambda: defaultdict(list))
    for panel, model, tokens in sorted(points, key=lambda key: (by_size(key[1]), key[2])):
        curves[panel][model].append((tokens, *points[panel, model, tokens]))
    return curves


def by_size(model):
    """Sort "pythia-410m" before "pythia-1b", and names without a size first."""
    match = SIZE.search(model)
    size = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    return size, model


def looks(models):
    """Return {model: (colour, line)}: colours by size, a line for names alike but for the size."""
    families = sorted({SIZE.sub("", model) for model in models})
    lines = dict(zip(families, itertools.cycle(["-", "--", ":", "-."])))
    colours = shades(sorted(models, key=by_size))
    return {model: (colour, lines[SIZE.sub("", model)]) for model, colour in colours.items()}


def choose_panels(curves, metrics, tasks):
    """Return the (task, shots, metric) to draw, or raise ValueError saying what there is.

    Without `tasks`, a group stands for its members: MMLU has 57.
    """
    members = {(member, shots) for task, shots, _ in curves if task in GROUPS
               for member in GROUPS[task][0]}
    panels = [(task, shots, metric) for task, shots, metric in sorted(curves)
              if metric in metrics.split(",")
              and (task in tasks.split(",") if tasks else (task, shots) not in members)]
    missing = sorted(set(tasks.split(",") if tasks else ()) - {task for task, _, _ in panels})
    if missing or not panels:
        there = sorted({f"{metric} of {task}" for task, _, metric in curves})
        raise ValueError(f"the results have no {metrics} of {' or '.join(missing) or 'any task'}; "
                         f"there are {', '.join(there)}")
    return panels


# ---------------------------------------------------------------------------- the studies


@dataclass(frozen=True)
class TermFrequency:
    bins: str  # OUTPUT_bins.csv of studies/term_frequency.py
    output: str = "term_frequency.png"


def term_frequency(options):
    """Draw accuracy and log-probability against frequency so far, a line a checkpoint."""
    rows = in_order(read_csv(options.bins), "frequency")
    rows = in_order(rows, shots=max((row["shots"] for row in rows), key=int))
    kinds = sorted({(row["model"], row["task"], row["shots"]) for row in rows})
    steps = shades(unique(rows, "step"))
    figure, grid_axes = grid(2 * len(kinds), 2, 5, 4)
    for (model, task, shots), *both in zip(kinds, grid_axes[::2], grid_axes[1::2]):
        mine = in_order(rows, model=model, task=task)
        for axes, metric, label in zip(both, ("acc", "logprob"), (
                "accuracy", "log-probability of the right answer (nats)")):
            errorbars(axes, mine, "step", steps, "frequency", metric, f"{metric}_stderr")
            axes.set_xscale("symlog", linthresh=1)  # some terms were never seen
            axes.set(xlabel="times seen before the checkpoint (tenths of the terms)",
                     ylabel=label, title=f"{model}, {task}, {shots}-shot")
    grid_axes[0].legend(title="step")
    return finish(figure, options.output)


def memorization(folder, output):
    """Draw matched lengths over training, and counts per window against a Poisson's.

    folder: where `analyse` of studies/memorization.py wrote rates.csv and windows.csv.
    """
    rates, windows = (read_csv(os.path.join(folder, name)) for name in ("rates.csv", "windows.csv"))
    models = sorted(unique(rates, "model"), key=by_size)
    figure, axes = grid(2 * len(models), len(models), 4 + 2 / len(models), 3.75, sharey="row")
    for model, top, bottom in zip(models, axes, axes[len(models):]):
        mine, colours = in_order(rates, model=model), {"seen": "black", "not seen yet": "grey"}
        errorbars(top, mine, "rows", colours, "step", "mean_length")
        top.set(title=model, xlabel="step")
        quantiles(bottom, in_order(windows, model=model))
    axes[0].set(ylabel="tokens right before the first miss")
    axes[len(models)].set(ylabel="memorized rows of a window")
    axes[0].legend()
    return finish(figure, output)


def quantiles(axes, rows):
    """Draw the last checkpoint's counts per window against a Poisson's quantiles."""
    step, window = rows[-1]["step"], rows[-1]["window"]
    memorized, windows = numbers(in_order(rows, step=step), "memorized", "windows")
    counts = np.sort(memorized.repeat(windows.astype(int)))
    axes.set(title=f"step {step}, {len(counts):,} windows of {window} rows")
    if len(counts):
        x = poisson_quantiles(len(counts), counts.mean())
        axes.plot(x, counts, ".")
        axes.plot([0, max(x)], [0, max(x)], "--", color="grey")
        axes.set(xlabel=f"Poisson, rate {counts.mean():.2f}")


def poisson_quantiles(n, mean):
    """Return the n quantiles (i + 1/2) / n of a Poisson distribution, (n,) int64."""
    k = torch.arange(int(mean + 10 * math.sqrt(mean)) + 30, dtype=torch.float64)
    at_most_k = torch.special.gammaincc(k + 1, torch.full_like(k, mean))  # probability
    return np.searchsorted(at_most_k.numpy(), (np.arange(n) + 0.5) / n)


def differences(path, output):
    """Draw branch minus twin with its interval over steps, a panel a measure."""
    rows = read_csv(path)
    measures = unique(rows, "measure")
    figure, grid_axes = grid(len(measures), min(3, len(measures)), 4.2, 3.4)
    for axes, measure in zip(grid_axes, measures):
        mine = in_order(rows, measure=measure)
        axes.axhline(0, color="grey")
        errorbars(axes, mine, "measure", {measure: "C0"}, "step", "difference", "low", "high")
        axes.set(xlabel="step", ylabel="branch - twin (nats; of cost bits per byte)",
                 title=f"{measure}, {int(mine[0]['items']):,} item(s), {mine[0]['seeds']} seed(s)")
    return finish(figure, output)


def doses(path, output):
    """Draw what models know of planted text by its dose, a panel a kind, a line a size."""
    rows = read_csv(path)
    kinds, colours = unique(rows, "kind"), shades(unique(rows, "size"))
    figure, panels = grid(len(kinds), len(kinds), 4.2, 3.6)
    for kind, axes in zip(kinds, panels):
        mine = in_order(rows, "dose", kind=kind)
        errorbars(axes, mine, "size", colours, "dose", "value", "low", "high")
        axes.set_xscale("symlog", linthresh=1)
        axes.set(title=kind, xlabel="times planted")
    panels[0].legend()
    return finish(figure, output)


def places(pairs, output):
    """Draw (place, gain) of bursts: each, and the means of those at about one place."""
    figure, [axes] = grid(1, 1, 6, 3.6)
    pairs = np.array(sorted(pairs))
    means = np.array([part.mean(axis=0) for part in np.array_split(pairs, min(16, len(pairs)))])
    axes.plot(*pairs.T, ".", color="grey")
    axes.plot(*means.T, marker="o")
    axes.set(xlabel="step of the burst", ylabel="nats a token better than the mean",
             title="what is left of 12 exposures within 48 steps")
    return finish(figure, output)


def occupations(groups, output):
    """Draw models' log-odds of "she" over those trained on. groups: {name: (x, y), any shape}."""
    figure, [axes] = grid(1, 1, 6, 3.6)
    for name, (x, y) in groups.items():
        x, y = np.ravel(x), np.ravel(y)
        slope, intercept = np.polyfit(x, y, 1)
        [points] = axes.plot(x, y, ".", alpha=0.4)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, intercept + slope * ends, color=points.get_color(),
                  label=f"{name}: slope {slope:.2f}")
    axes.set(xlabel='log-odds of "she" in an occupation\'s sentences',
             ylabel='the model\'s log-odds of "she"')
    axes.legend()
    return finish(figure, output)


# ---------------------------------------------------------------------------- the window

ABSENT = 255  # the level of a token without a loss


@dataclass(frozen=True)
class Window:
    losses: str  # OUTPUT.npy of `eval.py losses`, OUTPUT.json beside it; several with commas
    tokenizer: str = "20B_tokenizer.json"
    output: str = "window.html"


def window(options):
    """Write a page that shows rows' text, each token coloured by its loss at the slider's step.

    Runs on the same rows stand side by side, other rows below. The page is assets/window.html with
    {scale, rows, series} in it as JSON. rows: [{name, seen, tokens}], each token as text. series:
    for each file and run {run, first, n, T, steps, levels}, its losses of the rows `first` to
    first + n - 1 in units of `scale` nats, as base64 of bytes (steps, n, T).
    """
    tokenizer, rows, series, places = load_tokenizer(options.tokenizer), [], [], {}
    for path in options.losses.split(","):
        digest, found, checkpoints, losses = read_losses(path, tokenizer)
        first = places.setdefault(digest, len(rows))
        if first == len(rows):
            rows += found
        runs = [run for run, _ in checkpoints]
        for run in dict.fromkeys(runs):
            its = slice(runs.index(run), runs.index(run) + runs.count(run))
            series.append({"run": run, "first": first, "n": losses.shape[1], "T": losses.shape[2],
                           "steps": [step for _, step in checkpoints[its]], "levels": losses[its]})
    # fmax passes over nan, which is a token without a loss.
    largest = max(np.fmax.reduce(one["levels"], None, initial=1) for one in series)
    scale = float(largest) / (ABSENT - 1)
    for one in series:
        levels = np.rint(np.nan_to_num(one["levels"] / scale, nan=ABSENT)).astype(np.uint8)
        one["levels"] = base64.b64encode(levels).decode()
    data = json.dumps({"scale": scale, "rows": rows, "series": series}, ensure_ascii=False)
    page = (Path(__file__).parent / "assets" / "window.html").read_text(encoding="utf8")
    page = page.replace("{DATA}", data.replace("<", "\\u003c")).encode()  # a row may hold </script>
    with replacing(options.output) as file:
        file.write(page)
    print(f"{options.output}: {len(rows)} rows, losses in units of {scale:.3f} nats")


def read_losses(path, tokenizer):
    """Return the digest of the rows, the rows, the checkpoints [(run, step)] and the losses.

    rows: [{name, seen, tokens}]; seen is the step in which the first run was trained on a row of
    its order, if it has come so far. losses: (checkpoints, rows, T) float32, mapped.
    """
    prefix, rows = path.removesuffix(".npy"), []
    what = read_json(f"{prefix}.json")
    try:
        tokens, digest = token_rows(what, tokenizer), what["sha256"]
        if tokens.max() >= N_TOKENS or hashlib.sha256(tokens.tobytes()).hexdigest() != digest:
            raise ValueError(f"{path}: losses of other tokens than its JSON's data or text have "
                             "now; they were changed, or are of another tokenizer")
        checkpoints = [(str(run), int(step or 0)) for run, step in what["checkpoints"]]
        run, _ = checkpoints[0]
        last = max(step for other, step in checkpoints if other == run)
        for i, ids in enumerate(tokens):
            if "text" in what:
                row = {"name": str(what["documents"][i] or f"text {i}")}
            else:
                number = what["rows"][0] + i
                row = {"name": f"row {number} of {what['order']['data']}"}
                step = number // what["order"]["batch_size"]
                if step < last and "trained_on" not in what:  # the run was trained in this order
                    row |= {"name": f"{row['name']}, seen by {run} in step {step}", "seen": step}
            row["tokens"] = [tokenizer.decode([token]) for token in ids[ids >= 0].tolist()]
            rows.append(row)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{prefix}.json: not written by `eval.py losses` ({error!r})") from None
    losses, expected = load_npy(f"{prefix}.npy"), (len(checkpoints), *tokens[:, 1:].shape)
    if losses.dtype != np.float32 or losses.shape != expected:
        raise ValueError(f"{prefix}.npy: {losses.dtype} {losses.shape}, expected float32 "
                         f"{expected}; is `eval.py losses` done?")
    # Rounding makes losses of -1e-6; nan, a token without one, is neither small nor large.
    if np.any(losses < -1e-3) or np.any(losses > 1e4):
        raise ValueError(f"{prefix}.npy: holds losses below 0, or above 10,000 nats")
    return digest, rows, checkpoints, losses


if __name__ == "__main__":
    command(sys.argv[1:], {
        "training": (Training, training), "curves": (Curves, curves),
        "term_frequency": (TermFrequency, term_frequency), "window": (Window, window)})
