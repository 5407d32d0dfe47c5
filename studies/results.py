"""What the studies share: settings, folders of results that go on, tables, 95 % intervals."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import read_json, replacing, write_json


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    steps: str = "all"  # of a run folder: all, last, or numbers with commas
    device: str = "auto"  # or cpu, cuda


def open_results(path, settings, remedy="name another --output"):
    """Write the settings of a results folder, or raise ValueError naming what differs there."""
    path = Path(path)
    if not path.exists():
        write_json(path, settings)
        return
    before, differences = read_json(path), []
    for name, value in settings.items():
        found, given = repr(before.get(name)), repr(value)
        if found != given:  # a list of 2,000 questions is no message
            differences.append(f"{name} was {found}, is {given}" if len(found + given) < 500
                               else f"{name} is another")
    if differences:
        raise ValueError(f"{path.parent} holds other results: {'; '.join(differences)}; {remedy}")


def first_and_last(name, text, n):
    """Return the numbers of a setting "first:last", 0 <= first < last <= n, or raise ValueError."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last) <= n):
        raise ValueError(f"{name} = {text!r}, expected FIRST:LAST+1 within 0:{n}")
    return int(first), int(last)


def write_csv(path, header, rows):
    """Write a CSV: floats to 6 digits, None as an empty cell."""
    text = io.StringIO()
    lines = [[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row]
             for row in (header, *rows)]
    csv.writer(text, lineterminator="\n").writerows(lines)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def write_table(path, header, rows):
    """Write a CSV and print it, numbers short."""
    write_csv(path, header, rows)
    short = [["" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else
              f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *short)]
    print(f"\n{path}")
    for row in [header, *short]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def paired_bootstrap(differences, others=None, samples=10_000, seed=0):
    """Return (mean, low, high) of differences (seeds, items), less the mean of `others` if given.

    low to high is a 95 % interval. Each of the `samples` draws takes as many items as there are,
    with replacement and the same ones for all seeds; those of `others` are drawn apart. A few seeds
    are too few to draw from: their spread is added to every draw, as a Student's t.
    """
    generator = np.random.RandomState(seed)

    def drawn_means(part):
        by_item, n = part.mean(axis=0), part.shape[1]
        return np.array([by_item[generator.randint(n, size=n)].mean() for _ in range(samples)])

    by_seed, means = differences.mean(axis=1), drawn_means(differences)
    if others is not None:
        by_seed, means = by_seed - others.mean(axis=1), means - drawn_means(others)
    n_seeds = len(by_seed)
    if n_seeds > 1:
        error = by_seed.std(ddof=1) / math.sqrt(n_seeds)
        means += generator.standard_t(n_seeds - 1, samples) * error
    return float(by_seed.mean()), *np.percentile(means, [2.5, 97.5]).tolist()
