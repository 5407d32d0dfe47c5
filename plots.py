"""Figures from the CSV files that training, evaluation and studies write; only this file draws.

    python plots.py training --run=runs/mini --results=runs/mini/results.csv \\
        --output=runs/mini/curves.png
    python plots.py curves --results=results.csv --reference=pythia_v1_evals.csv --output=curves.png
    python plots.py paper --reference=pythia_v1_evals.csv --bias=pythia_bias_evals.csv \\
        --output=figures
    python plots.py term_frequency --bins=terms_bins.csv --output=terms.png

The other studies draw their figures themselves: `analyse` and `compare` with --plot=PNG. The
reference is the published suite's results as one CSV (model,deduped,step,shots,task,metric,value,
stderr), made from EleutherAI/pythia's evals/pythia-v1; `bias` those of its gender study
(suite,variant,model,raw_step,step,shots,task,prompt,metric,value,stderr), from evals/bias-evals.
matplotlib is an extra: pip install matplotlib.
"""

import csv
import math
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from config import command
from tasks import GROUPS


def read_csv(path):
    """Return the rows of a CSV file as dicts, or raise ValueError if it holds none."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet's has a BOM
        try:
            rows = list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file ({error})") from None
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def pyplot():
    """Return matplotlib.pyplot, drawing into files; an extra of this project."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def finish(figure, output):
    """Write the figure to a file and return it."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)
    pyplot().close(figure)
    print(output)
    return figure


@dataclass(frozen=True)
class Training:
    run: str  # run folder
    results: str  # CSV of eval.py with the task heldout
    output: str = "curves.png"


def training(options):
    """Draw loss and held-out bits per byte against tokens."""
    plt = pyplot()
    steps = read_csv(os.path.join(options.run, "metrics.csv"))
    name = os.path.basename(os.path.normpath(options.run))
    rows = [row for row in read_csv(options.results)
            if row["model"] == name and row["metric"] == "bits_per_byte" and int(row["tokens"]) > 0]
    if not rows:
        raise ValueError(f"{options.results}: no bits_per_byte of {name}; "
                         "run eval.py --tasks=heldout first")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    points = [(int(row["tokens"]), float(row["loss"])) for row in steps if int(row["tokens"]) > 0]
    left.plot(*zip(*points), color="tab:blue", linewidth=1)
    left.set(xlabel="tokens seen", ylabel="training loss (nats per token)", xscale="log")
    tasks = sorted({row["task"] for row in rows})
    for i, task in enumerate(tasks):
        curve = sorted((int(row["tokens"]), float(row["value"]))
                       for row in rows if row["task"] == task)
        n = next(row["n"] for row in rows if row["task"] == task)
        label = "all" if task == "heldout" else task.removeprefix("heldout:")
        right.plot(*zip(*curve), marker="o", markersize=4, label=f"{label} (n = {n})",
                   color="black" if task == "heldout" else plt.cm.viridis(i / len(tasks)),
                   linewidth=2 if task == "heldout" else 1)
    right.set(xlabel="tokens seen", ylabel="held-out bits per byte", xscale="log")
    right.legend(frameon=False, loc="lower left")
    figure.suptitle(name)
    return finish(figure, options.output)


# ------------------------------------------------------------------ evaluation over training

# The paper's harness had other names for two metrics.
METRIC_NAMES = {"ppl": "perplexity", "likelihood_difference": "likelihood_diff"}
# What a task is judged by, if nothing else is asked: the first of these that it has.
MAIN_METRICS = ("acc", "pct_stereotype", "exact_match", "em", "bits_per_byte", "perplexity",
                "word_perplexity")
AXIS_NAMES = {"acc": "accuracy", "acc_norm": "accuracy, length-normalised",
              "perplexity": "perplexity per word",
              "pct_stereotype": "stereotype preferred", "bits_per_byte": "bits per byte",
              "em": "exact match", "exact_match": "exact match",
              "likelihood_diff": "difference of log-likelihoods (nats)"}
PAPER_TASKS = ("lambada_openai", "piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "sciq",
               "logiqa")
CROWS_TYPES = ("", "_gender", "_race_color", "_religion", "_age", "_nationality", "_socioeconomic",
               "_disability")


def evaluations(paths, columns=()):
    """Return {(task, shots, metric): {model: [(tokens, value, stderr or None)]}} of any CSVs.

    A later row takes the place of an earlier one of the same evaluation. Raises ValueError for a
    file that is neither or lacks one of `columns`, and for a curve of rows that cannot be compared.
    """
    points, made = defaultdict(dict), {}
    for path in paths.split(","):
        rows = read_csv(path)
        if missing := [name for name in columns if name not in rows[0]]:
            raise ValueError(f"{path}: has no column {' or '.join(missing)}; this is another file "
                             "than the published one (see the top of plots.py)")
        for number, row in enumerate(rows, 2):
            where = f"{path}, line {number}"
            if row.get("suite") == "v0":  # models before the published ones
                continue
            try:
                model, tokens = model_and_tokens(row)
                task = row["task"] + (":" + row["prompt"] if row.get("prompt") else "")
                metric = METRIC_NAMES.get(row["metric"], row["metric"])
                panel = task, int(row["shots"] or 0), metric
                points[panel][model, tokens] = (float(row["value"]),
                                                float(row["stderr"]) if row["stderr"] else None)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: neither results of eval.py nor the published CSV "
                                 f"({type(error).__name__}: {error})") from None
            how = [row[name] for name in ("style", "dtype", "docs") if row.get(name)] or [
                "published"]
            first, before = made.setdefault((panel, model), (where, how))
            if how != before:
                raise ValueError(f"{where}: {metric} of {task} by {model} in {' '.join(how)}, but "
                                 f"in {' '.join(before)} at {first}; draw them from two files")
    curves = {panel: defaultdict(list) for panel in points}
    for panel, values in points.items():
        in_order = sorted(values.items(), key=lambda item: (size(item[0][0]), item[0]))
        for (model, tokens), point in in_order:
            curves[panel][model].append((tokens, *point))
    return curves


def model_and_tokens(row):
    """Return the model's name and the tokens it has seen, of a row of any of the three CSVs."""
    if "variant" in row:  # the gender study's models have all seen the deduplicated Pile
        variant = "" if row["variant"] == "baseline" else f"-{row['variant']}"
        return f"pythia-{row['model']}-deduped{variant}", int(row["step"]) << 21
    if "deduped" in row:
        tokens = int(row["step"]) * published_batch(row["model"])
        return row["model"] + ("-deduped" if row["deduped"] == "1" else ""), tokens
    return row["model"], int(row["tokens"] or -1)


def published_batch(model):
    """Return the tokens of a published model's step: 2^21, but for the batch-size ablations."""
    name = model.rpartition("-")[2].removesuffix("MtokBS")
    return {"0.5": 1 << 19, "0.25": 1 << 18}.get(name, 1 << 21)


def name_parts(model):
    """Return the parameters a name tells, or the width as in _d64, else 0; and the name's rest."""
    for pattern in (r"(?<![a-z\d.])(\d+(?:\.\d+)?)([mb])(?![a-z\d])", r"(?:^|_)d(\d+)()"):
        if match := re.search(pattern, model, re.IGNORECASE):
            unit = {"m": 1e6, "b": 1e9, "": 1}[match[2].lower()]
            return float(match[1]) * unit, model[:match.start()] + model[match.end():]
    return 0, model


def size(model):
    return name_parts(model)[0]


def looks(models, colours):
    """Return {model: (colour, line)}, in order: a colour a size, a line for the rest of the name.

    Pythia's sizes have theirs in every figure; other sizes, and names that tell none, share the
    map out among them.
    """
    parts = {model: name_parts(model)
             for model in sorted(models, key=lambda name: (size(name), name))}
    smallest, largest = 14e6, 12e9
    places = {number: math.log(number / smallest) / math.log(largest / smallest)
              for number, _ in parts.values() if smallest <= number <= largest}
    others = list(dict.fromkeys(number or model for model, (number, _) in parts.items()
                                if number not in places))
    places |= {name: i / max(1, len(others) - 1) for i, name in enumerate(others)}
    # Names without a size get the last line, which no rest of a name has.
    rests = sorted({rest for number, rest in parts.values() if number},
                   key=lambda rest: ("deduped" in rest, rest)) + [None]
    lines = ["-", "--", ":"]
    for dots in range(1, len(rests)):  # then a dash and ever more dots: lengths of on, off, on, ...
        lines.append((0, (6, 1.5) + (1, 1.5) * dots))
    styles = dict(zip(rests, lines))
    return {model: (colours(0.08 + 0.92 * places[number or model]),
                    styles[rest if number else None])
            for model, (number, rest) in parts.items()}


def choose_panels(curves, tasks, metrics, shots):
    """Return the (task, shots, metric) to draw, or raise ValueError saying what there is.

    Without `tasks`, a group stands for its members: MMLU has 57. Without `metrics`, each task is
    drawn by its main one.
    """
    there = sorted(panel for panel in curves if shots in (None, panel[1]))
    if not tasks:
        members = {(member, n) for task, n, _ in there if task in GROUPS
                   for member in GROUPS[task][0]}
        there = [panel for panel in there if (panel[0].partition(":")[0], panel[1]) not in members]
    at = "" if shots is None else f" at {shots} shots"
    panels = []
    for name in tasks.split(",") if tasks else sorted({task for task, _, _ in there}):
        own = [panel for panel in there if panel[0] == name]
        main = [metric for metric in MAIN_METRICS if any(metric == panel[2] for panel in own)]
        kept = metrics.split(",") if metrics else main[:1]
        found = [panel for panel in own if panel[2] in kept]
        if not found and (tasks or not metrics):
            own = [f"{metric} at {n} shots" for task, n, metric in sorted(curves) if task == name]
            tasks_there = ", ".join(sorted({task for task, _, _ in curves}))
            raise ValueError(f"no {' or '.join(kept) or 'main metric'} of {name}{at} in the "
                             f"results; there are {', '.join(own) or 'the tasks ' + tasks_there}")
        panels += found
    if not panels:
        shot_counts = sorted({n for _, n, _ in curves})
        raise ValueError(f"the results have no {metrics or 'evaluation'}{at}; there are those at "
                         f"{', '.join(map(str, shot_counts))} shots")
    return panels


def draw(curves, panels, output, reference=None, title=None, xscale="log"):
    """Draw a panel for each (task, shots, metric) over tokens; the log axis has no step 0."""
    plt = pyplot()
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(max(5.5, 3.1 * columns), 2.6 * rows + 0.9))
    look = looks({model for panel in panels for model in curves.get(panel, ())}, plt.cm.viridis_r)
    handles = {}
    for axes, panel in zip(grid.flat, panels):
        task, shots, metric = panel
        axes.set_title(f"{task.replace(':', chr(10))}, {shots}-shot", fontsize=9)
        axes.set_ylabel(AXIS_NAMES.get(metric, metric), fontsize=8)
        axes.set(xscale=xscale, yscale="log" if metric.endswith("perplexity") else "linear")
        axes.tick_params(labelsize=7, which="both")  # a short log axis labels minor ticks too
        axes.xaxis.get_offset_text().set_fontsize(7)
        draw_published(axes, (reference or {}).get(panel, {}), handles)
        draw_models(axes, curves.get(panel, {}), look, handles)
    for axes in list(grid.flat)[len(panels):]:
        axes.set_visible(False)
    for column in range(columns):
        below = [axes for axes in grid[:, column] if axes.get_visible()]
        below[-1].set_xlabel("tokens seen", fontsize=8)
    shown = [handles[name] for name in (*look, "published") if name in handles]
    entry = 0.5 + 0.075 * max((len(line.get_label()) for line in shown), default=1)  # inches, about
    figure.legend(shown, [line.get_label() for line in shown], loc="outside lower center",
                  frameon=False, fontsize=8, handlelength=3,
                  ncols=max(1, min(len(shown), int(figure.get_figwidth() / entry))))
    if title:
        figure.suptitle(title, fontsize=11)
    return finish(figure, output)


def draw_published(axes, models, handles):
    """Draw published curves in grey; name the first and the last, which show their order."""
    drawn = {model: [point for point in points if point[0] > 0 and math.isfinite(point[1])]
             for model, points in models.items() if "MtokBS" not in model}
    drawn = {model: points for model, points in drawn.items() if points}
    for model, points in drawn.items():
        x, y, _ = zip(*points)
        [handles["published"]] = axes.plot(x, y, color="0.78", linewidth=1, zorder=1,
                                           label="published")
    for model in dict.fromkeys([*list(drawn)[:1], *list(drawn)[-1:]]):
        axes.annotate(model.removeprefix("pythia-").removesuffix("-deduped"), drawn[model][-1][:2],
                      xytext=(3, 0), textcoords="offset points", fontsize=7,
                      color="0.5", va="center")
        axes.margins(x=0.1)


def draw_models(axes, models, look, handles):
    """Draw our curves, each with a band of one standard error if it has them."""
    logarithmic = axes.get_yscale() == "log"
    for model, points in models.items():
        points = [point for point in points if point[0] > 0]
        x, y = [p[0] for p in points], [p[1] for p in points]
        colour, line = look[model]
        [handles[model]] = axes.plot(x, y, color=colour, linestyle=line, linewidth=1.4, marker="o",
                                     markersize=2.2, label=model)
        if points and None not in (error for *_, error in points):
            # An error as large as its value would reach down without end on a log axis.
            low = [max(v - e, v / 10) if logarithmic else v - e for _, v, e in points]
            high = [v + e for _, v, e in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


@dataclass(frozen=True)
class Curves:
    results: str  # CSV of eval.py; several with commas
    tasks: str | None = None  # with commas; all without
    metrics: str | None = None  # with commas; each task's main one without
    shots: int | None = None  # all there are without
    reference: str | None = None  # published results, drawn in grey
    output: str = "curves.png"


def curves(options):
    """Draw evaluations over tokens: a panel a task, a colour a model, error bands."""
    results = evaluations(options.results)
    panels = choose_panels(results, options.tasks, options.metrics, options.shots)
    reference = evaluations(options.reference) if options.reference else None
    # The published results are of v0.3: another style beside them is not quite comparable.
    styles = sorted({row["style"] for path in options.results.split(",")
                     for row in read_csv(path) if row.get("style")} if reference else ())
    title = f"ours: {', '.join(styles)}" if styles else None
    return draw(results, panels, options.output, reference, title)


@dataclass(frozen=True)
class Paper:
    reference: str  # published results
    bias: str | None = None  # published results of the gender study
    output: str = "figures"  # folder


def paper(options):
    """Draw the paper's evaluation figures from the published results, standard and deduplicated."""
    published, figures = evaluations(options.reference, ["deduped"]), {}
    os.makedirs(options.output, exist_ok=True)

    def save(name, curves, panels, title, **how):
        panels = [panel for panel in panels if curves.get(panel)]
        if panels:
            output = os.path.join(options.output, f"{name}.png")
            figures[name] = draw(curves, panels, output, title=title, **how)

    for deduped, name in ((False, "standard"), (True, "deduplicated")):
        chosen = {panel: {model: points for model, points in models.items()
                          if model.endswith("-deduped") == deduped and "MtokBS" not in model}
                  for panel, models in published.items()}
        for shots in (0, 5):
            save(f"{name}_{shots}_shot", chosen, [(task, shots, "acc") for task in PAPER_TASKS],
                 f"Pythia, {name} Pile, {shots}-shot")
        save(f"{name}_bias", chosen, [(f"crows_pairs_english{kind}", 0, "pct_stereotype")
                                      for kind in CROWS_TYPES], f"Pythia, {name} Pile")
    if options.bias:
        # From where the longest intervention begins; on a log axis nothing could be seen.
        begin = 113000 << 21
        study = {panel: {model: late for model, points in models.items()
                         if (late := [point for point in points if point[0] >= begin])}
                 for panel, models in evaluations(options.bias, ["suite", "variant"]).items()}
        panels = sorted(panel for panel in study
                        if panel[0].startswith("wino_bias") and panel[2] == "em")
        save("gender", study, [*panels, ("crows_pairs_english_gender", 0, "pct_stereotype")],
             "Pythia, deduplicated Pile, pronouns made feminine in the last 7 or 21 % of training",
             xscale="linear")
    return figures


# ---------------------------------------------------------------------------- the studies


@dataclass(frozen=True)
class TermFrequency:
    bins: str  # OUTPUT_bins.csv of studies/term_frequency.py
    model: str = ""  # empty: the first in the file
    shots: str = ""  # empty: the most
    output: str = "term_frequency.png"


def term_frequency(options):
    """Draw accuracy and log-probability against frequency so far, a line a checkpoint."""
    plt, rows = pyplot(), [row for row in read_csv(options.bins) if row["bins"] == "quantile"]
    model = options.model or rows[0]["model"]
    shots = options.shots or max((row["shots"] for row in rows), key=int)
    rows = [row for row in rows if row["model"] == model and row["shots"] == shots]
    if not rows:
        raise ValueError(f"{options.bins}: holds nothing of {model} at {shots} shots")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    steps = sorted({int(row["step"]) for row in rows})
    labels = {"acc": "accuracy", "logprob": "log-probability of the right answer (nats)"}
    figure, panels = plt.subplots(len(tasks), 2, figsize=(10, 4 * len(tasks)), squeeze=False,
                                  layout="constrained")
    for task, line in zip(tasks, panels):
        for axes, metric in zip(line, labels):
            for i, step in enumerate(steps):
                curve = [row for row in rows if row["task"] == task and int(row["step"]) == step]
                x, y, error = (numbers(curve, name)
                               for name in ("frequency", metric, f"{metric}_stderr"))
                colour = plt.cm.viridis(i / max(len(steps) - 1, 1))
                axes.errorbar(x, y, error, marker="o", markersize=4, linewidth=1, color=colour,
                              label=f"step {step:,}")
            axes.set_xscale("symlog", linthresh=1)  # some terms were never seen
            axes.set(xlabel="times seen before the checkpoint (tenths of the terms)",
                     ylabel=labels[metric], title=f"{task}, {shots}-shot")
    panels[0, 0].legend(frameon=False)
    figure.suptitle(model)
    return finish(figure, options.output)


def numbers(rows, name):
    """Return a column as floats; an empty cell is nan, which is not drawn."""
    return [float(row[name] or "nan") for row in rows]


def memorization(folder, output):
    """Draw matched lengths by subset over training, and counts per window against a Poisson's.

    folder: where `analyse` of studies/memorization.py wrote rates.csv and windows.csv.
    """
    plt = pyplot()
    rates, windows = (read_csv(os.path.join(folder, name)) for name in ("rates.csv", "windows.csv"))
    models = sorted({row["model"] for row in rates}, key=natural)
    subsets = sorted({row["subset"] for row in rates} - {"all"}, key=natural)
    figure, panels = plt.subplots(2, len(models), figsize=(4 * len(models) + 2, 7.5), squeeze=False,
                                  layout="constrained", sharey="row")
    for model, (top, bottom) in zip(models, panels.T):
        for i, subset in enumerate(["all", *subsets]):
            curve = sorted((row for row in rates if row["rows"] == "seen"
                            and (row["model"], row["subset"]) == (model, subset)),
                           key=lambda row: int(row["step"]))
            if curve:
                top.errorbar(*(numbers(curve, name) for name in ("step", "mean_length", "stderr")),
                             marker="o", markersize=3, linewidth=1, label=subset,
                             color="black" if subset == "all" else plt.cm.viridis(i / len(subsets)))
        top.set(title=model, xlabel="step")
        quantiles(bottom, [row for row in windows if row["model"] == model])
    panels[0, 0].set(ylabel="tokens right before the first miss")
    panels[1, 0].set(ylabel="memorized rows of a window")
    panels[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return finish(figure, output)


def quantiles(axes, rows):
    """Draw the last checkpoint's counts per window against those of a Poisson with their mean."""
    last = max(int(row["step"]) for row in rows)
    size = rows[0]["window"]
    counts = [int(row["memorized"]) for row in rows for _ in range(int(row["windows"]))
              if (int(row["step"]), row["window"]) == (last, size)]
    if not counts:
        axes.set(title=f"step {last:,}: fewer rows than the {size} of a window")
        return
    mean = sum(counts) / len(counts)
    x = poisson_quantiles(len(counts), mean)
    axes.plot(x, sorted(counts), ".", color="tab:blue")
    axes.plot([0, max(x)], [0, max(x)], "--", color="grey", linewidth=1)
    axes.set(xlabel=f"Poisson, rate {mean:.2f}", title=f"step {last:,}, windows of {size} rows")


def poisson_quantiles(n, mean):
    """Return the n quantiles (i + 1/2) / n of a Poisson distribution, (n,) int64."""
    k = torch.arange(int(mean + 10 * math.sqrt(mean)) + 30, dtype=torch.float64)
    below = torch.special.gammaincc(k + 1, torch.full_like(k, mean))  # at most k
    return np.searchsorted(below.numpy(), (np.arange(n) + 0.5) / n)


def natural(text):
    """Sort "8 times" before "32 times"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def differences(path, output):
    """Draw branch minus twin with its interval over steps, a panel a measure."""
    plt, rows = pyplot(), read_csv(path)
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    columns = min(3, len(measures))
    lines = -(-len(measures) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines),
                                  squeeze=False, layout="constrained")
    for axes in panels.flat[len(measures):]:
        axes.set_visible(False)
    units = {"choice": "", "cost": " (bits per byte)"}
    for axes, measure in zip(panels.flat, measures):
        mine = sorted((row for row in rows if row["measure"] == measure),
                      key=lambda row: int(row["step"]))
        step, value, low, high = (numbers(mine, name)
                                  for name in ("step", "difference", "low", "high"))
        items, seeds = count(mine[0]["items"], "item"), count(mine[0]["seeds"], "seed")
        axes.axhline(0, color="grey", linewidth=1)
        axes.fill_between(step, low, high, color="tab:blue", alpha=0.2, linewidth=0)
        axes.plot(step, value, color="tab:blue", marker="o", markersize=4)
        axes.set(xlabel="step", ylabel="branch - twin" + units.get(measure, " (nats)"),
                 title=f"{measure}, {items}, {seeds}")
    return finish(figure, output)


def count(n, noun):
    """Return "1 seed" or "3 seeds"."""
    return f"{int(n):,} {noun}" + "s" * (int(n) != 1)


if __name__ == "__main__":
    command(sys.argv[1:], {
        "training": (Training, training), "curves": (Curves, curves), "paper": (Paper, paper),
        "term_frequency": (TermFrequency, term_frequency)})
