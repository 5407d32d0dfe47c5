"""Figures from the files that training, evaluation and studies write; only this file draws.

    python plots.py training --run=runs/mini --results=runs/mini/results.csv --output=mini.png
    python plots.py curves --results=results.csv --reference=pythia_v1_evals.csv --output=curves.png
    python plots.py paper --reference=pythia_v1_evals.csv --bias=pythia_bias_evals.csv \\
        --output=figures
    python plots.py term_frequency --bins=terms_bins.csv --output=terms.png
    python plots.py window --losses=losses.npy --output=window.html  # each token's loss, by step

`reference` is the published suite's results as one CSV (model,deduped,step,shots,task,metric,value,
stderr), from EleutherAI/pythia's evals/pythia-v1; `bias` those of its gender study (suite,variant,
model,raw_step,step,shots,task,prompt,metric,value,stderr), from evals/bias-evals. matplotlib is an
extra: pip install matplotlib.
"""

import base64
import hashlib
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

from config import check, command, read_csv, read_json, replacing
from data import load_npy, span
from eval import token_rows
from tasks import GROUPS
from tokenizer import N_TOKENS, load_tokenizer


def pyplot():
    """Return matplotlib.pyplot, drawing into files; an extra of this project."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
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
    figure.savefig(output, dpi=150)
    pyplot().close(figure)
    print(output)
    return figure


def numbers(rows, *names):
    """Return columns as arrays of numbers; an empty cell is nan, which is not drawn."""
    return [np.array([float(row[name] or "nan") for row in rows]) for name in names]


def in_order(rows, name="step", /, **kept):
    """Return the rows that have these cells, by the number in column `name`."""
    if rows and (absent := kept.keys() - rows[0].keys()):
        raise ValueError(f"no column {', '.join(absent)}: another file than this figure's")
    chosen = [row for row in rows if all(row[key] == cell for key, cell in kept.items())]
    return sorted(chosen, key=lambda row: float(row[name]))


def natural(text):
    """Sort "8 times" before "32 times"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def shades(names):
    """Return {name: colour}, evenly from one map in the names' order."""
    return {name: pyplot().cm.viridis(i / max(1, len(names) - 1)) for i, name in enumerate(names)}


@dataclass(frozen=True)
class Training:
    run: str  # run folder
    results: str  # CSV of eval.py with the task heldout
    output: str = "curves.png"


def training(options):
    """Draw loss and held-out bits per byte against tokens."""
    name = os.path.basename(os.path.normpath(options.run))
    steps = [row for row in read_csv(os.path.join(options.run, "metrics.csv"))
             if int(row["tokens"]) > 0]  # the axis is logarithmic
    rows = [row for row in in_order(read_csv(options.results), model=name, metric="bits_per_byte")
            if int(row["tokens"]) > 0]
    if not rows:
        raise ValueError(f"{options.results}: no bits_per_byte of {name}; "
                         "run eval.py --tasks=heldout first")
    figure, (left, right) = grid(2, 2, 5, 4)
    left.plot(*numbers(steps, "tokens", "loss"))
    left.set(xlabel="tokens seen", ylabel="training loss (nats per token)", xscale="log")
    for task, colour in shades(sorted({row["task"] for row in rows})).items():
        curve, subset = in_order(rows, task=task), task.removeprefix("heldout:")
        label, colour, width = ("all", "black", 2) if subset == "heldout" else (subset, colour, 1)
        right.plot(*numbers(curve, "tokens", "value"), marker="o", color=colour, linewidth=width,
                   label=f"{label} (n = {curve[0]['n']})")
    right.set(xlabel="tokens seen", ylabel="held-out bits per byte", xscale="log")
    right.legend(loc="lower left")
    figure.suptitle(name)
    return finish(figure, options.output)


# ------------------------------------------------------------------ evaluation over training

# The paper's harness had other names for two metrics.
METRIC_NAMES = {"ppl": "perplexity", "likelihood_difference": "likelihood_diff"}
# What a task is judged by, if nothing else is asked: the first of these that it has.
MAIN_METRICS = ("acc", "pct_stereotype", "exact_match", "em", "bits_per_byte", "perplexity",
                "word_perplexity")
AXIS_NAMES = {"acc": "accuracy", "acc_norm": "accuracy, length-normalised", "em": "exact match",
              "exact_match": "exact match", "perplexity": "perplexity per word",
              "pct_stereotype": "stereotype preferred", "bits_per_byte": "bits per byte",
              "likelihood_diff": "difference of log-likelihoods (nats)"}
PAPER_TASKS = ("lambada_openai", "piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "sciq",
               "logiqa")
CROWS_TYPES = ("", "_gender", "_race_color", "_religion", "_age", "_nationality", "_socioeconomic",
               "_disability")


def evaluations(paths, least=1):
    """Return {(task, shots, metric): {model: [(tokens, value, stderr or nan)]}} of any CSVs.

    Those of fewer tokens than `least` are left out: step 0 has no place on a log axis. A later row
    takes the place of an earlier one of the same evaluation. Raises ValueError for a file that is
    neither eval.py's nor the published one, and for a curve of several styles, dtypes or documents.
    """
    points, made = {}, {}
    for path in paths.split(","):
        for number, row in enumerate(read_csv(path), 2):
            # Not drawn: models before the published ones, and those of other batch sizes.
            if row.get("suite") == "v0" or "MtokBS" in (row.get("model") or ""):
                continue
            where = f"{path}, line {number}"
            try:
                model, tokens = model_and_tokens(row)
                task = row["task"] + (":" + row["prompt"] if row.get("prompt") else "")
                metric = METRIC_NAMES.get(row["metric"], row["metric"])
                panel = task, int(row["shots"] or 0), metric
                point = float(row["value"]), float(row["stderr"] or "nan")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: neither results of eval.py nor the published CSV "
                                 f"({type(error).__name__}: {error})") from None
            how = " ".join(row.get(name) or "published" for name in ("style", "dtype", "docs"))
            first, before = made.setdefault((panel, model), (where, how))
            if how != before:
                raise ValueError(f"{where}: {metric} of {task} by {model} in {how}, but in "
                                 f"{before} at {first}; draw them from two files")
            if tokens >= least:
                points[panel, model, tokens] = point
    curves = defaultdict(lambda: defaultdict(list))
    for panel, model, tokens in sorted(points, key=lambda key: (name_parts(key[1]), key[2])):
        curves[panel][model].append((tokens, *points[panel, model, tokens]))
    return curves


def model_and_tokens(row):
    """Return the model's name and the tokens it has seen, of a row of any of the three CSVs."""
    if "variant" in row:  # the gender study's models have all seen the deduplicated Pile
        variant = "" if row["variant"] == "baseline" else f"-{row['variant']}"
        return f"pythia-{row['model']}-deduped{variant}", int(row["step"]) << 21
    if "deduped" in row:
        return row["model"] + "-deduped" * (row["deduped"] == "1"), int(row["step"]) << 21
    return row["model"], int(row["tokens"] or -1)


def name_parts(model):
    """Return the parameters a name tells, or the width as in _d64, else 0; and the name's rest."""
    for pattern in (r"(?<![a-z\d.])(\d+(?:\.\d+)?)([mb])(?![a-z\d])", r"(?:^|_)d(\d+)()"):
        if match := re.search(pattern, model, re.IGNORECASE):
            unit = {"m": 1e6, "b": 1e9, "": 1}[match[2].lower()]
            return float(match[1]) * unit, model[:match.start()] + model[match.end():]
    return 0, model


def looks(models, colours):
    """Return {model: (colour, line)}, in order: a colour a size, a line for the rest of the name.

    Pythia's sizes have theirs in every figure; smaller ones, and names that tell none, share the
    map out among them.
    """
    parts = {model: name_parts(model) for model in sorted(models, key=name_parts)}
    small = list(dict.fromkeys(number or model for model, (number, _) in parts.items()
                               if number < 14e6))
    rests = sorted({rest for number, rest in parts.values() if number},
                   key=lambda rest: ("deduped" in rest, rest))
    # After three plain lines a dash and ever more dots: lengths of on, off, on, off, ...
    lines = ["-", "--", ":"] + [(0, (6, 1.5) + (1, 1.5) * dots) for dots in range(1, len(rests))]
    look = {}
    for model, (number, rest) in parts.items():
        if number < 14e6:
            place = small.index(number or model) / max(1, len(small) - 1)
        else:
            place = min(1, math.log(number / 14e6) / math.log(12e9 / 14e6))
        line = lines[rests.index(rest) if number else len(rests)]
        look[model] = colours(0.08 + 0.92 * place), line
    return look


def choose_panels(curves, tasks, metrics):
    """Return the (task, shots, metric) to draw, or raise ValueError saying what there is.

    Without `tasks`, a group stands for its members: MMLU has 57. Without `metrics`, each task is
    drawn by its main one.
    """
    members = {(member, shots) for task, shots, _ in curves if task in GROUPS
               for member in GROUPS[task][0]}
    wanted, panels = tasks.split(",") if tasks else [], []
    for task, shots, metric in sorted(curves):
        main = [main for main in MAIN_METRICS if (task, shots, main) in curves][:1]
        fits = metric in (metrics.split(",") if metrics else main)
        shown = task in wanted if wanted else (task.partition(":")[0], shots) not in members
        if fits and shown:
            panels.append((task, shots, metric))
    missing = sorted(set(wanted) - {task for task, _, _ in panels})
    if missing or not panels:
        there = sorted({f"{metric} of {task}" for task, _, metric in curves})
        raise ValueError(f"the results have no {metrics or 'main metric'} of "
                         f"{' or '.join(missing) or 'any task'}; there are {', '.join(there)}")
    return panels


def draw(curves, panels, output, reference=None, title=None, xscale="log"):
    """Draw a panel for each (task, shots, metric) over tokens, with bands of one standard error.

    The reference is grey; its first and last curve are named, which shows the order of all.
    """
    columns = min(4, len(panels))
    figure, grid_axes = grid(len(panels), columns, max(3.1, 5.5 / columns), 2.6, legend=0.9)
    look = looks({model for panel in panels for model in curves[panel]}, pyplot().cm.viridis_r)
    handles = {}
    for axes, panel in zip(grid_axes, panels):
        task, shots, metric = panel
        axes.set(title=f"{task.replace(':', chr(10))}, {shots}-shot", xscale=xscale,
                 ylabel=AXIS_NAMES.get(metric, metric),
                 yscale="log" if metric.endswith("perplexity") else "linear")
        published = reference.get(panel, {}) if reference else {}
        for model, points in published.items():
            x, y, _ = zip(*points)
            [handles["published"]] = axes.plot(x, y, color="0.78", zorder=1, label="published")
            if model in (list(published)[0], list(published)[-1]):
                axes.annotate(model.removeprefix("pythia-").removesuffix("-deduped"),
                              (x[-1], y[-1]), xytext=(3, 0), textcoords="offset points", fontsize=7,
                              color="0.5", va="center")
                axes.margins(x=0.1)
        for model, points in curves[panel].items():
            colour, line = look[model]
            x, y, error = np.array(points).T
            [handles[model]] = axes.plot(x, y, color=colour, linestyle=line, marker="o",
                                         markersize=2.2, label=model)
            low = y - error
            if metric.endswith("perplexity"):  # an error as large as its value has no end below
                low = np.maximum(low, y / 10)
            axes.fill_between(x, low, y + error, color=colour, alpha=0.15, linewidth=0)
    for axes in grid_axes[-columns:]:  # the lowest of every column
        axes.set_xlabel("tokens seen")
    shown = [handles[name] for name in (*look, "published") if name in handles]
    figure.legend(shown, [line.get_label() for line in shown], loc="outside lower center",
                  handlelength=3, ncols=columns)
    figure.suptitle(title or "")
    return finish(figure, output)


@dataclass(frozen=True)
class Curves:
    results: str  # CSV of eval.py; several with commas
    tasks: str | None = None  # with commas; all without
    metrics: str | None = None  # with commas; each task's main one without
    reference: str | None = None  # published results, drawn in grey
    output: str = "curves.png"


def curves(options):
    """Draw evaluations over tokens: a panel a task, a colour a model, error bands."""
    results = evaluations(options.results)
    panels = choose_panels(results, options.tasks, options.metrics)
    if not options.reference:
        return draw(results, panels, options.output)
    # The published results are of v0.3: another style beside them is not quite comparable.
    styles = {row.get("style", "") for path in options.results.split(",") for row in read_csv(path)}
    return draw(results, panels, options.output, evaluations(options.reference),
                title=f"ours: {', '.join(sorted(styles))}")


@dataclass(frozen=True)
class Paper:
    reference: str  # published results
    bias: str | None = None  # published results of the gender study
    output: str = "figures"  # folder


def paper(options):
    """Draw the paper's evaluation figures from the published results, standard and deduplicated."""
    for path, column in ((options.reference, "deduped"), (options.bias, "variant")):
        if path and column not in read_csv(path)[0]:
            raise ValueError(f"{path}: has no column {column}; the top of plots.py says which file")
    os.makedirs(options.output, exist_ok=True)
    figures = {}

    def save(name, curves, panels, title, **how):
        if panels := [panel for panel in panels if curves.get(panel)]:
            output = os.path.join(options.output, f"{name}.png")
            figures[name] = draw(curves, panels, output, title=title, **how)

    published = evaluations(options.reference)
    for name, deduped in (("standard", False), ("deduplicated", True)):
        curves = {panel: {model: points for model, points in models.items()
                          if model.endswith("-deduped") == deduped}
                  for panel, models in published.items()}
        title = f"Pythia, {name} Pile"
        for shots in (0, 5):
            save(f"{name}_{shots}_shot", curves, [(task, shots, "acc") for task in PAPER_TASKS],
                 f"{title}, {shots}-shot")
        save(f"{name}_bias", curves, [(f"crows_pairs_english{kind}", 0, "pct_stereotype")
                                      for kind in CROWS_TYPES], title)
    if options.bias:
        # From where the longest intervention begins; on a log axis nothing could be seen.
        late = evaluations(options.bias, 113000 << 21)
        panels = sorted(panel for panel in late
                        if panel[0].startswith("wino_bias") and panel[2] == "em")
        save("gender", late, [*panels, ("crows_pairs_english_gender", 0, "pct_stereotype")],
             "Pythia, deduplicated Pile, pronouns made feminine in the last 7 or 21 % of training",
             xscale="linear")
    return figures


# ---------------------------------------------------------------------------- the studies


@dataclass(frozen=True)
class TermFrequency:
    bins: str  # OUTPUT_bins.csv of studies/term_frequency.py
    output: str = "term_frequency.png"


def term_frequency(options):
    """Draw accuracy and log-probability against frequency so far, a line a checkpoint."""
    rows = in_order(read_csv(options.bins), bins="quantile")
    rows = in_order(rows, shots=max((row["shots"] for row in rows), key=int))
    kinds = sorted({(row["model"], row["task"], row["shots"]) for row in rows})
    colours = shades(list(dict.fromkeys(row["step"] for row in rows)))
    figure, grid_axes = grid(2 * len(kinds), 2, 5, 4)
    for i, axes in enumerate(grid_axes):
        model, task, shots = kinds[i // 2]
        metric, label = (("acc", "accuracy"),
                         ("logprob", "log-probability of the right answer (nats)"))[i % 2]
        for step, colour in colours.items():
            curve = in_order(rows, "frequency", model=model, task=task, step=step)
            axes.errorbar(*numbers(curve, "frequency", metric, f"{metric}_stderr"), marker="o",
                          color=colour, label=f"step {int(step):,}")
        axes.set_xscale("symlog", linthresh=1)  # some terms were never seen
        axes.set(xlabel="times seen before the checkpoint (tenths of the terms)", ylabel=label,
                 title=f"{model}, {task}, {shots}-shot")
    grid_axes[0].legend()
    return finish(figure, options.output)


def memorization(folder, output):
    """Draw matched lengths over training, and counts per window against a Poisson's.

    folder: where `analyse` of studies/memorization.py wrote rates.csv and windows.csv.
    """
    rates, windows = (read_csv(os.path.join(folder, name)) for name in ("rates.csv", "windows.csv"))
    models = sorted({row["model"] for row in rates}, key=natural)
    figure, axes = grid(2 * len(models), len(models), 4 + 2 / len(models), 3.75, sharey="row")
    for model, top, bottom in zip(models, axes, axes[len(models):]):
        for which, colour in (("seen", "black"), ("not seen yet", "grey")):
            curve = in_order(rates, rows=which, model=model)
            top.plot(*numbers(curve, "step", "mean_length"), marker="o", color=colour, label=which)
        top.set(title=model, xlabel="step")
        quantiles(bottom, in_order(windows, model=model))
    axes[0].set(ylabel="tokens right before the first miss")
    axes[len(models)].set(ylabel="memorized rows of a window")
    axes[0].legend()
    return finish(figure, output)


def quantiles(axes, rows):
    """Draw the last checkpoint's counts per window against a Poisson's quantiles."""
    last, size = rows[-1]["step"], rows[0]["window"]
    counts = [int(row["memorized"]) for row in in_order(rows, step=last, window=size)
              for _ in range(int(row["windows"]))]
    axes.set(title=f"step {last}, {len(counts):,} windows of {size} rows")
    if counts:
        mean = sum(counts) / len(counts)
        x = poisson_quantiles(len(counts), mean)
        axes.plot(x, sorted(counts), ".")
        axes.plot([0, max(x)], [0, max(x)], "--", color="grey")
        axes.set(xlabel=f"Poisson, rate {mean:.2f}")


def poisson_quantiles(n, mean):
    """Return the n quantiles (i + 1/2) / n of a Poisson distribution, (n,) int64."""
    k = torch.arange(int(mean + 10 * math.sqrt(mean)) + 30, dtype=torch.float64)
    at_most_k = torch.special.gammaincc(k + 1, torch.full_like(k, mean))  # probability
    return np.searchsorted(at_most_k.numpy(), (np.arange(n) + 0.5) / n)


def differences(path, output):
    """Draw branch minus twin with its interval over steps, a panel a measure."""
    rows = read_csv(path)
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    figure, grid_axes = grid(len(measures), min(3, len(measures)), 4.2, 3.4)
    for axes, measure in zip(grid_axes, measures):
        mine = in_order(rows, measure=measure)
        step, value, low, high = numbers(mine, "step", "difference", "low", "high")
        axes.axhline(0, color="grey")
        axes.fill_between(step, low, high, alpha=0.2, linewidth=0)
        axes.plot(step, value, marker="o")
        unit = "bits per byte" if measure == "cost" else "nats"
        axes.set(xlabel="step", ylabel=f"branch - twin ({unit})",
                 title=f"{measure}, {int(mine[0]['items']):,} item(s), {mine[0]['seeds']} seed(s)")
    return finish(figure, output)


def doses(path, output):
    """Draw what models know of planted text by its dose, a panel a kind, a line a size."""
    rows = read_csv(path)
    kinds, colours = (list(dict.fromkeys(row[name] for row in rows)) for name in ("kind", "size"))
    figure, panels = grid(len(kinds), len(kinds), 4.2, 3.6)
    for kind, axes in zip(kinds, panels):
        for size, colour in shades(colours).items():
            curve = in_order(rows, "dose", kind=kind, size=size)
            x, y, low, high = numbers(curve, "dose", "value", "low", "high")
            axes.errorbar(x, y, (y - low, high - y), marker="o", color=colour, label=size)
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

PAGE_BYTES = 2_000_000
ABSENT = 255  # the level of a token without a loss


@dataclass(frozen=True)
class Window:
    losses: str  # OUTPUT.npy of `eval.py losses`, OUTPUT.json beside it; several with commas
    rows: str | None = None  # first:last+1 of each file's; None: all
    every: int = 1  # shows the last checkpoint and every so manieth before it
    tokenizer: str = "20B_tokenizer.json"
    output: str = "window.html"

    def __post_init__(self):
        check(self, "at least 1", lambda value: value >= 1, "every")


def window(options):
    """Write a page that shows rows' text, each token coloured by its loss at the slider's step.

    Runs on the same rows stand side by side, other rows below. The page is assets/window.html with
    {scale, rows, series} in it as JSON. rows: [{name, seen, tokens}], each token as text. series:
    for each file and run {run, first, n, T, steps, levels}, its losses of the rows `first` to
    first + n - 1 in units of `scale` nats, as base64 of bytes (steps, n, T).
    """
    tokenizer, rows, series, places = load_tokenizer(options.tokenizer), [], [], {}
    for path in options.losses.split(","):
        what, found, losses = read_losses(path, tokenizer)
        chosen = span("rows", options.rows or f"0:{len(found)}", len(found))
        start, end = chosen.start, chosen.stop
        first = places.setdefault(what["sha256"], len(rows))
        if first == len(rows):
            rows += found[start:end]
        runs = [run for run, _ in what["checkpoints"]]
        for run in dict.fromkeys(runs):
            if any((one["run"], one["first"]) == (run, first) for one in series):
                raise ValueError(f"{path}: {run} has losses of these rows in another file; rename "
                                 "one of the runs' folders")
            begin, count = runs.index(run), runs.count(run)
            shown = slice(begin + (count - 1) % options.every, begin + count, options.every)
            series.append({
                "run": run, "first": first, "n": end - start, "T": losses.shape[2],
                "steps": [int(step or 0) for _, step in what["checkpoints"][shown]],
                "levels": losses[shown, start:end]})
    # Base64 has 4 characters for 3 bytes, and a token's text takes about 8 characters.
    size = (sum(one["levels"].size for one in series) * 4 / 3
            + sum(len(row["tokens"]) for row in rows) * 8)
    if size > PAGE_BYTES:
        raise ValueError(f"{options.losses}: the page would have {size / 1e6:,.1f} MB, at most 2; "
                         "choose fewer rows, as --rows=0:16, or checkpoints, as --every=4")
    scale = max(float(np.max(one["levels"], where=np.isfinite(one["levels"]), initial=1e-3))
                for one in series) / (ABSENT - 1)
    for one in series:
        levels = np.nan_to_num(one["levels"] / scale, nan=ABSENT, posinf=ABSENT)
        one["levels"] = base64.b64encode(np.rint(levels).astype(np.uint8)).decode()
    for row in rows:
        row["tokens"] = [tokenizer.decode([token]) for token in row["tokens"].tolist()]
    data = json.dumps({"scale": scale, "rows": rows, "series": series}, ensure_ascii=False)
    page = (Path(__file__).parent / "assets" / "window.html").read_text(encoding="utf8")
    with replacing(options.output) as file:  # a row may hold </script>
        file.write(page.replace("{DATA}", data.replace("<", "\\u003c")).encode())
    print(f"{options.output}: {len(rows)} rows, losses in units of {scale:.3f} nats")


def read_losses(path, tokenizer):
    """Return OUTPUT.json of `eval.py losses`, its rows [{name, seen, tokens}], its mapped losses.

    seen: the step in which the first run was trained on a row, if the row is one of its order's.
    Raises ValueError if a file is missing or does not fit the others.
    """
    prefix, rows = path.removesuffix(".npy"), []
    what = read_json(f"{prefix}.json")
    try:
        tokens, runs, digest = token_rows(what, tokenizer), what["checkpoints"], what["sha256"]
        for i, ids in enumerate(tokens):
            if "text" in what:
                row = {"name": str(what["documents"][i] or f"text {i}")}
            else:
                number = what["rows"][0] + i
                row = {"name": f"row {number} of {what['order']['data']}"}
                step = number // what["order"]["batch_size"]
                # Else the order is not the run's own, or goes on behind its last step.
                if "trained_on" not in what and step < what["order"]["steps"]:
                    row["seen"] = step
                    row["name"] += f", seen by {runs[0][0]} in step {row['seen']}"
            rows.append(row | {"tokens": ids[ids >= 0]})
        runs = [(str(name), int(step or 0)) for name, step in runs]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{prefix}.json: not written by `eval.py losses` ({error!r})") from None
    if tokens.max() >= N_TOKENS or hashlib.sha256(tokens.tobytes()).hexdigest() != digest:
        raise ValueError(f"{path}: losses of other tokens than its JSON's data or text have now; "
                         "they were changed, or are of another tokenizer")
    losses = load_npy(f"{prefix}.npy")
    if losses.dtype != np.float32:
        raise ValueError(f"{prefix}.npy: {losses.dtype}, expected float32")
    if losses.shape != (len(runs), *tokens[:, 1:].shape):
        raise ValueError(f"{prefix}.npy: {losses.shape}, expected {len(runs)} checkpoints of "
                         f"{tokens[:, 1:].shape}; is `eval.py losses` done?")
    return what, rows, losses


if __name__ == "__main__":
    command(sys.argv[1:], {
        "training": (Training, training), "curves": (Curves, curves), "paper": (Paper, paper),
        "term_frequency": (TermFrequency, term_frequency), "window": (Window, window)})
