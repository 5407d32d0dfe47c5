"""pytest tests/test_estimators.py: size, power and coverage of what the studies report."""

import numpy as np
import pytest

from studies.memorization import poisson_tests, position_test, window_counts
from studies.results import holm, regression, student_p, student_quantile

# What is simulated: a function (generator, effect) -> what `regression` is given. Documents have 1
# to 12 items; an item is what its document, its seed and chance make of it.


def items(generator, n_seeds, seed_sd, n_documents=24):
    documents = np.repeat(np.arange(n_documents), generator.integers(1, 13, n_documents))
    by_document = generator.standard_normal(n_documents)[documents]
    noise = 0.5 * generator.standard_normal((n_seeds, len(documents)))
    return seed_sd * generator.standard_normal((n_seeds, 1)) + by_document + noise, documents


def mean(n_seeds, seed_sd):
    def simulate(generator, effect):
        values, documents = items(generator, n_seeds, seed_sd)
        return values + effect, None, documents
    return simulate


def bias(generator, effect):
    """Pairs of texts of which the intervention shifts all, by 2 nats a pronoun, either way."""
    values, documents = items(generator, 3, 0.1, 40)
    x = generator.choice([-1, 1], len(documents))
    return values + effect + 2 * x, x, documents


def context(generator, effect):
    """Places of "she" and "he" in documents that are about one of the two more than the other."""
    values, documents = items(generator, 3, 0.3, 30)
    share = generator.uniform(0.1, 0.9, 30)
    x = (generator.random(len(documents)) < share[documents]) - 0.5
    by_seed = effect + 0.1 * generator.standard_normal((3, 1))
    return values + 1 + by_seed * x, x, documents


def doses(generator, effect):
    """Sums of 48 operands, of which each seed plants others 5, 20, 80 or 640 times."""
    values, documents = items(generator, 3, 0.1, 48)
    x = np.stack([generator.permutation(np.repeat(np.log2([5, 20, 80, 640]), 12)) for _ in "abc"])
    own = generator.standard_normal((3, 48))  # an operand also differs between seeds
    return values + (own + effect * x)[:, documents], x[:, documents], documents


SIMULATED = {  # name: simulate, which Estimate, the effect whose power is stated, at least
    "mean, one seed": (mean(1, 0), 0, 1.0, 0.9), "mean, 3 seeds": (mean(3, 0.3), 0, 1.4, 0.8),
    "mean, 3 equal seeds": (mean(3, 0), 0, 1.0, 0.9), "bias": (bias, 0, 0.8, 0.9),
    "context": (context, 1, 1.0, 0.9), "doses": (doses, 1, 0.4, 0.8)}
BINOMIAL = 2.58 * (0.05 * 0.95 / 500)**0.5  # what 5 % of 500 may differ by, in 99 % of cases


def rejected_and_covered(name, effect, n=500):
    """Return how often p is under 0.05, and how often the interval holds the effect."""
    simulate, which, *_ = SIMULATED[name]
    generator = np.random.default_rng(1)
    found = [regression(*simulate(generator, effect))[which] for _ in range(n)]
    return (np.mean([estimate.p < 0.05 for estimate in found]),
            np.mean([estimate.low <= effect <= estimate.high for estimate in found]))


@pytest.mark.parametrize("name", SIMULATED)
def test_regression_has_its_size_power_and_coverage(name):
    *_, effect, power = SIMULATED[name]
    size, _ = rejected_and_covered(name, 0.0)
    rejected, covered = rejected_and_covered(name, effect)
    assert rejected >= power
    if name == "doses":  # operands that each seed treats otherwise: cautious
        assert size <= 0.05 and covered >= 0.97
    else:
        assert abs(size - 0.05) <= BINOMIAL and 0.93 <= covered <= 0.97


def test_regression_by_hand():
    x, values = np.array([0, 0, 1, 1]), np.array([[1.0, 3, 5, 9], [2, 2, 6, 6]])
    intercept, slope = regression(values, x)
    assert (intercept.value, slope.value) == pytest.approx((2, 4.5))
    only = regression(values, x, np.zeros(4))[1]
    assert only.value == pytest.approx(4.5) and only.low is None  # of one document no interval
    # Two documents 1 and 3: mean 2, standard error 1, a Student's t of one degree.
    [estimate] = regression(np.array([[1.0, 1, 3, 3]]), documents=[7, 7, 9, 9])
    assert estimate == pytest.approx((2, 1, 2 - 12.7062, 2 + 12.7062, 0.295167), abs=1e-4)
    assert np.isnan(regression(values, np.ones(4))[1].value)  # all places alike: no line


def test_students_t_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2.7, 19, 400):
        assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-5)
        assert student_p(2.1, degrees) == pytest.approx(2 * stats.t.sf(2.1, degrees), rel=1e-4)


def test_holm_keeps_the_chance_of_any_false_alarm():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    p = np.random.default_rng(0).random((500, 6))
    assert abs(np.mean([min(holm(list(row))) < 0.05 for row in p]) - 0.05) <= BINOMIAL


def memorized_rows(generator, kind):
    """Return 64 windows of 64 rows, shuffled, or with what is memorized in every other window."""
    rates = np.where(generator.random(4096) < 0.04, 0.9, 0.0)  # few rows have all the chance
    if kind == "crowded":
        rates = np.where(generator.random(4096) < 0.3, 0.9, 0.0)
    if kind == "clumped":
        rates = np.repeat(np.where(np.arange(64) % 2, 0.055, 0.015), 64)
    if kind == "rising":
        rates = np.linspace(0.02, 0.05, 4096)
    return generator.random(4096) < rates


def poisson_rejections(kind, n=500, draws=199):
    """Return how often each p-value is under 0.05: dispersion's two, then trend's two."""
    generator = np.random.default_rng(2)
    found = [poisson_tests(window_counts(memorized_rows(generator, kind), 64), 64, draws)
             for _ in range(n)]
    return np.mean([[p < 0.05 for test in ("dispersion", "trend") for p in tests[test][1:]]
                    for tests in found], axis=0)


def test_counts_of_shuffled_rows_are_told_from_clumps_and_trends():
    size = poisson_rejections("shuffled")
    assert (np.abs(size - 0.05) <= BINOMIAL).all()
    crowded = poisson_rejections("crowded")  # 27 % memorized: a Poisson is no null for it
    assert crowded[0] > 0.3 and abs(crowded[1] - 0.05) <= BINOMIAL
    assert poisson_rejections("clumped", 100)[1] > 0.8
    assert poisson_rejections("rising", 100)[3] > 0.7


def losses_by_place(generator, profile):
    """Return places and gains of 5 passages at each of 16 places."""
    place = np.repeat(np.arange(16.0), 5)
    gain = {"flat": 0 * place, "line": place / 15, "hump": 1 - ((place - 7.5) / 7.5)**2}[profile]
    return place, 1.2 * gain + generator.standard_normal(80)


def position_rejections(profile, n=500, draws=199):
    """Return how often p is under 0.05: linear by t and by permutation, quadratic likewise."""
    generator = np.random.default_rng(3)
    return np.mean([[p < 0.05 for term in position_test(*losses_by_place(generator, profile), draws)
                     for p in term[3:]] for _ in range(n)], axis=0)


def test_a_slope_and_a_hump_are_found_each_by_its_own_term():
    assert (np.abs(position_rejections("flat") - 0.05) <= BINOMIAL).all()
    line, hump = position_rejections("line", 200), position_rejections("hump", 200)
    assert line[:2].min() > 0.85 and hump[2:].min() > 0.85 and hump[:2].max() < 0.15
    # Of few values the normal would reject a true null in 31 %, a Student's t in 5 %.
    generator = np.random.default_rng(4)
    few = [position_test(np.arange(4.0), generator.standard_normal(4), 1)[0][3] for _ in range(500)]
    assert abs(np.mean(np.array(few) < 0.05) - 0.05) <= BINOMIAL


def test_position_by_hand():
    (_, line, error, p, _), (_, hump, *_) = position_test(
        np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 3, 3, 3, 5]))
    assert line == pytest.approx(3.2)  # the slope is 0.8 a place
    stats = pytest.importorskip("scipy.stats")
    assert hump == pytest.approx(0)
    assert p == pytest.approx(2 * stats.t.sf(line / error, 2), rel=1e-4)
    (_, line, *_), (_, hump, *_) = position_test(np.arange(5.0), -(np.arange(5.0) - 2)**2)
    assert (line, hump) == pytest.approx((0, 4))
    assert position_test(np.arange(3), np.arange(3)) == []
