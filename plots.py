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


if __name__ == "__main__":
    command(sys.argv[1:], {"training": (Training, training)})
