"""Are counts per window Poisson with one rate? Three tests and their p-values, for the memorization study."""

import math

import numpy as np
import torch


def poisson_tests(counts):
    """Return {test: (statistic, p-value)} of whether counts (n,) per window are Poisson with one rate.

    dispersion: sum (c - mean)^2 / mean against chi-square with n - 1 degrees, two-sided; trend: the score
    test of a rate that changes linearly with the window's number, normal, two-sided; fit: chi-square over the
    counts' values, pooled until 5 are expected of each.
    """
    n, mean = len(counts), counts.mean()
    if n < 2 or mean == 0:
        return {}
    dispersion = float(((counts - mean)**2).sum() / mean)
    upper = chi2_sf(dispersion, n - 1)
    place = np.arange(n) - (n - 1) / 2
    z = float(place @ counts / math.sqrt(mean * (place @ place)))
    tests = {"dispersion": (dispersion / (n - 1), min(1.0, 2 * min(upper, 1 - upper))),
             "trend": (z, math.erfc(abs(z) / math.sqrt(2)))}
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


def chi2_sf(x, degrees):
    return float(torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64),
                                         torch.tensor(float(x) / 2, dtype=torch.float64)))


def window_counts(memorized, window):
    """Return how many of each whole window of consecutive rows are memorized."""
    whole = len(memorized) // window * window
    return memorized[:whole].reshape(-1, window).sum(1) if whole else np.zeros(1)
