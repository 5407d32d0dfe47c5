"""What the studies share: result folders, tables, and estimates with confidence intervals.

tests/test_estimators.py shows by simulation that tests reject a true null hypothesis in 5 % of
cases and that 95 % intervals cover the truth in 93 to 97 % (in more if seeds and documents have no
effects of their own, for instance if each seed gives the documents other doses).
"""

import math
import os
from typing import NamedTuple

import numpy as np

import checkpoints
from config import csv_lines, read_json, replacing, write_json
from tokenizer import load_tokenizer


def tokenizer_of(folders, named=None):
    """Return the Tokenizer of checkpoints' folders; ValueError if one has another than ours."""
    return load_tokenizer([checkpoints.folder_tokenizer(folder, named) for folder in folders][0])


def open_results(path, settings):
    """Write a results folder's settings, or raise ValueError if it was begun with others."""
    if not os.path.exists(path):
        write_json(path, settings)
    before = read_json(path)
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(f"{path}: {name} was {before.get(name)}, is {value}; name another "
                             "folder for other results")


def write_csv(path, header, rows):
    """Write a CSV, floats to 6 digits, None as an empty cell; return its cells as texts."""
    cells = [["" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell)
              for cell in row] for row in (header, *rows)]
    with replacing(path) as file:
        file.write(csv_lines(cells))
    return cells


def write_table(path, header, rows):
    """Write a CSV and print it in columns."""
    cells = write_csv(path, header, rows)
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{path}")
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


# ---------------------------------------------------------------------------- estimators


class Estimate(NamedTuple):
    value: float
    stderr: float | None = None  # None, like the rest, if there is only one document
    low: float | None = None  # of a 95 % interval
    high: float | None = None
    p: float | None = None  # two-sided, of the null hypothesis that the value is zero


def regression(values, x=None, documents=None):
    """Return Estimates of the intercept and, given x, the slope of values (seeds, items) on x.

    x: the covariate, (items,) or (seeds, items); without it the intercept is the mean. documents
    (items,): the document that each item belongs to; None: its own. Items of one document are
    alike, so it is documents that are resampled, by the jackknife: the line is fitted without each
    in turn, and D times the whole fit minus D - 1 times the fit without a document is that
    document's pseudo-value. Pseudo-values are averaged like independent numbers (`crossed`).
    """
    (S, n), K = values.shape, 1 if x is None else 2
    which = np.unique(np.arange(n) if documents is None else documents, return_inverse=True)[1]
    design = np.ones((n, S, K))
    if x is not None:
        design[..., 1] = np.broadcast_to(x, (S, n)).T
    D = int(which.max()) + 1
    squares, products = np.zeros((D, S, K, K)), np.zeros((D, S, K, 1))
    np.add.at(squares, which, design[..., None] * design[..., None, :])
    np.add.at(products, which, (values.T[..., None] * design)[..., None])
    try:
        whole = np.linalg.solve(squares.sum(axis=0), products.sum(axis=0))[..., 0]  # (S, K)
    except np.linalg.LinAlgError:  # x is the same everywhere: there is no line
        return [Estimate(math.nan)] * K
    try:
        without = np.linalg.solve(squares.sum(axis=0) - squares, products.sum(axis=0) - products)
    except np.linalg.LinAlgError:  # all information is in one document
        return [Estimate(float(value)) for value in whole.mean(axis=0)]
    pseudo = D * whole - (D - 1) * without[..., 0]  # (D, S, K)
    return [crossed(whole[:, k].mean(), pseudo[:, :, k].T) for k in range(K)]


def crossed(value, numbers):
    """Return the Estimate of a mean of numbers (seeds, documents), over seeds and documents.

    The variance of a mean of S seeds and D documents is (mean square of seeds + of documents - of
    residuals) / (S D), with Satterthwaite's degrees of freedom for Student's t. With one seed it is
    over documents alone; another seed may differ by more.
    """
    S, D = numbers.shape
    seeds = numbers.mean(axis=1) - numbers.mean()
    documents = numbers.mean(axis=0) - numbers.mean()
    by_document = S * documents @ documents / (D - 1)
    total, degrees = by_document, D - 1
    if S > 1:
        by_seed = D * seeds @ seeds / (S - 1)
        rest = numbers - numbers.mean() - seeds[:, None] - documents
        left = (rest**2).sum() / (S - 1) / (D - 1)
        total = max(by_seed + by_document - left, left)
        if total:
            degrees = max(1, total**2 / (by_seed**2 / (S - 1) + by_document**2 / (D - 1)))
    error = math.sqrt(total / (S * D))
    reach = student_quantile(degrees) * error
    p = student_p(value / error, degrees) if error else float(value == 0)
    return Estimate(float(value), error, value - reach, value + reach, p)


def student_tails(degrees):
    """Return t >= 0 and the probability of a Student's |t| above it, on a grid.

    Under t = sqrt(degrees) tan(angle) the density becomes cos(angle)**(degrees - 1).
    """
    degrees, angle = min(degrees, 1e5), np.linspace(0, math.pi / 2, 8_001)
    density = np.cos(angle)**(degrees - 1)
    above = np.cumsum(((density[1:] + density[:-1]) / 2)[::-1])[::-1]
    return math.sqrt(degrees) * np.tan(angle[:-1]), above / above[0]


def student_p(t, degrees):
    return float(np.interp(abs(t), *student_tails(degrees)))


def student_quantile(degrees, outside=0.05):
    t, above = student_tails(degrees)
    return float(np.interp(-outside, -above, t))


def permutation_p(found, null):
    """Return the p-value, two-sided, of a statistic among those (n,) of shuffled data."""
    more, less = (1 + np.sum(null >= found)), (1 + np.sum(null <= found))
    return min(1.0, 2 * min(more, less) / (len(null) + 1))


def holm(p_values):
    """Return p-values adjusted for being several, by Holm's method; None stays None."""
    there = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, (p, i) in enumerate(there):
        largest = adjusted[i] = min(1.0, max(largest, (len(there) - rank) * p))
    return adjusted
