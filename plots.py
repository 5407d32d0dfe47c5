"""Figures from the CSV files that training and evaluation write: the only file that needs matplotlib.

    python plots.py training --run=runs/mini --results=runs/mini/results.csv --output=runs/mini/curves.png
"""

import csv
import os
import sys
from dataclasses import dataclass

from config import command


def read_csv(path):
    """Return the rows of a CSV file as dicts, or raise ValueError if it holds none."""
    with open(path, newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
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
        raise ValueError(f"{options.results}: no bits_per_byte of {name}; run eval.py --tasks=heldout first")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    points = [(int(row["tokens"]), float(row["loss"])) for row in steps if int(row["tokens"]) > 0]
    left.plot(*zip(*points), color="tab:blue", linewidth=1)
    left.set(xlabel="tokens seen", ylabel="training loss (nats per token)", xscale="log")
    tasks = sorted({row["task"] for row in rows})
    for i, task in enumerate(tasks):
        curve = sorted((int(row["tokens"]), float(row["value"])) for row in rows if row["task"] == task)
        n = next(row["n"] for row in rows if row["task"] == task)
        label = "all" if task == "heldout" else task.removeprefix("heldout:")
        right.plot(*zip(*curve), marker="o", markersize=4, label=f"{label} (n = {n})",
                   color="black" if task == "heldout" else plt.cm.viridis(i / len(tasks)),
                   linewidth=2 if task == "heldout" else 1)
    right.set(xlabel="tokens seen", ylabel="held-out bits per byte", xscale="log")
    right.legend(frameon=False, loc="lower left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(name)
    figure.savefig(options.output, dpi=150)
    plt.close(figure)
    print(options.output)


@dataclass(frozen=True)
class Weights:
    csv: str  # of checkpoints.py verify
    output: str = "verify.png"


def weights(options):
    """Draw every matrix's norm, distance from the first checkpoint and cosine to the previous, over steps."""
    plt = pyplot()
    rows = [row for row in read_csv(options.csv) if row["distance_from_first"] != "nan"]
    names = list(dict.fromkeys(row["tensor"] for row in rows))
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axes, column, label in zip(panels, ("norm", "distance_from_first", "cosine_to_previous"), (
            "L2 norm", "distance from the first / its norm", "cosine to the checkpoint before")):
        for i, name in enumerate(names):
            points = sorted((int(row["step"]), float(row[column])) for row in rows if row["tensor"] == name)
            axes.plot(*zip(*points), color=plt.cm.viridis(i / len(names)), linewidth=1, marker=".", markersize=3)
        axes.set(xlabel="step", ylabel=label)
        axes.set_xscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    figure.suptitle(f"{len(names)} matrices, embedding (dark) to head (light)")
    figure.savefig(options.output, dpi=150)
    plt.close(figure)
    print(options.output)


if __name__ == "__main__":
    command(sys.argv[1:], {"training": (Training, training), "weights": (Weights, weights)})
