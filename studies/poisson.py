"""Are counts per window Poisson with one rate, and does a row's place matter? With p-values."""

import math

import numpy as np
import torch


def poisson_tests(counts):
    """Return {test: (statistic, p-value)} of counts (n,) per window against Poisson with one rate.

    dispersion: sum (c - mean)^2 / mean against chi-square with n - 1 degrees, two-sided; the
    statistic is divided by n - 1. trend: the score test of a rate that changes linearly with the
    window's number, normal, two-sided; its variance is the counts' own, not the Poisson's, so that
    it stays a test where they are not Poisson. fit: chi-square over the counts' values, pooled
    until 5 are expected of each. Without two windows and a memorized row there is nothing to test:
    dispersion is (None, None).
    """
    n, mean = len(counts), counts.mean() if len(counts) else 0.0
    if n < 2 or mean == 0:
        return {"dispersion": (None, None)}
    dispersion = float(((counts - mean)**2).sum() / mean)
    upper = chi2_sf(dispersion, n - 1)
    place = np.arange(n) - (n - 1) / 2
    variance = mean * (place @ place) * dispersion / (n - 1)
    z = float(place @ counts / math.sqrt(variance)) if variance else 0.0
    tests = {"dispersion": (dispersion / (n - 1), min(1.0, 2 * min(upper, 1 - upper))),
             "trend": (z, normal_p(z))}
    observed, expected, o, e, below = [], [], 0.0, 0.0, 0.0
    for k in range(int(counts.max()) + 1):
        p = math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1))
        o, e, below = o + (counts == k).sum(), e + n * p, below + p
        if e >= 5 and n * (1 - below) >= 5:
            observed.append(o), expected.append(e)
            o, e = 0.0, 0.0
    observed.append(n - sum(observed)), expected.append(n - sum(expected))
    if len(observed) > 2:
        statistic = sum((o - e)**2 / e for o, e in zip(observed, expected))
        tests["fit"] = (float(statistic), chi2_sf(statistic, len(observed) - 2))
    return tests


def position_test(rows, lengths):
    """Return (slope, stderr, p) of lengths (n,) regressed on row numbers, p two-sided, normal.

    The slope is what a row gains from the first place to the last. Three empty cells if there are
    fewer than three rows, or none of them differ.
    """
    if len(rows) < 3 or np.ptp(lengths) == 0:
        return None, None, None
    x = (rows - rows.mean()) / np.ptp(rows)
    y = lengths - lengths.mean()
    slope = x @ y / (x @ x)
    error = math.sqrt(max(y @ y - slope**2 * (x @ x), 0.0) / (len(x) - 2) / (x @ x))
    return float(slope), error, normal_p(slope / error) if error else 0.0


def chi2_sf(x, degrees):
    return float(torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64),
                                         torch.tensor(float(x) / 2, dtype=torch.float64)))


def normal_p(z):
    return math.erfc(abs(z) / math.sqrt(2))


def window_counts(memorized, window):
    """Return how many of each whole window of consecutive rows are memorized."""
    return memorized[:len(memorized) // window * window].reshape(-1, window).sum(axis=1)
