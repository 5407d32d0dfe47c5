"""The figures of the studies, from the CSV files that they write.

    python -m studies.figures term_frequency --bins=terms_bins.csv --output=terms.png

The others are drawn by the studies themselves: `analyse` and `compare` with --plot=PNG.
"""

import os
import re
import sys
from dataclasses import dataclass

from config import command
from plots import finish, pyplot, read_csv
from studies.poisson import poisson_quantiles


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


COMMANDS = {"term_frequency": (TermFrequency, term_frequency)}

if __name__ == "__main__":
    command(sys.argv[1:], COMMANDS)
