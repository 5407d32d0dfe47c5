"""What the studies share: folders of results that go on, tables as CSV, and 95 % intervals."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np

from config import replacing
from config import read_json


def open_results(path, settings, remedy="name another --output"):
    """Write the settings of a results folder, or raise ValueError naming what differs there."""
    path = Path(path)
    if not path.exists():
        with replacing(path) as file:
            file.write(json.dumps(settings, indent=2).encode())
        return
    before, differences = read_json(path), []
    for name, value in settings.items():
        found, given = repr(before.get(name)), repr(value)
        if found != given:  # a list of 2,000 questions is no message
            differences.append(f"{name} was {found}, is {given}" if len(found + given) < 500
                               else f"{name} is another")
    if differences:
        raise ValueError(f"{path.parent} holds other results: {'; '.join(differences)}; {remedy}")


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

    low to high is a 95 % interval. Items are drawn anew, the same for all seeds, `others` apart. A
    few seeds are too few to draw from: their spread is added to every draw, as a Student's t.
    """
    generator = np.random.RandomState(seed)
    by_seed, means = np.zeros(len(differences)), np.zeros(samples)
    for sign, part in ((1, differences), (-1, others)):
        if part is not None:
            by_item, n = part.mean(axis=0), part.shape[1]
            by_seed = by_seed + sign * part.mean(axis=1)
            means += sign * np.array([by_item[generator.randint(n, size=n)].mean()
                                      for _ in range(samples)])
    if (n_seeds := len(by_seed)) > 1:
        error = by_seed.std(ddof=1) / math.sqrt(n_seeds)
        means += generator.standard_t(n_seeds - 1, samples) * error
    return float(by_seed.mean()), *np.percentile(means, [2.5, 97.5]).tolist()
