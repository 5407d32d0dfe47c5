"""What a task's results come to: metrics and standard errors as lm-evaluation-harness has them.

A measure is a function (questions, results of each, style) -> [(suffix of the row's task name,
metric, value, stderr, n)]; a result is (log-likelihood, is_greedy), a generated text or a rolling
log-likelihood.
"""

import math
import re
import statistics
import string
from collections import defaultdict

import numpy as np


def mean(values):
    """Return (mean, standard error); one value has no error."""
    error = deviation(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def deviation(values):
    """Return the sample standard deviation; nan, where statistics fails, if one is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


BOOTSTRAP = 100_000  # draws, as in the paper's files and by default in lm_eval


def perplexity(logprobs, iterations=None):
    """Return exp(-mean) and its bootstrap standard error, with lm_eval's own draws.

    lm_eval/api/metrics.py, bootstrap_stderr: 1000 resamples from each of random.Random(0), (1), ...
    numpy's RandomState([i]) is the same generator; its numbers are drawn a block at a time.
    """
    values, n, draws = np.array(logprobs), len(logprobs), []
    for seed in range((iterations or BOOTSTRAP) // 1000 if n > 1 else 0):
        generator = np.random.RandomState([seed])
        for _ in range(10):
            picked = values[(generator.random_sample((100, n)) * n).astype(np.int64)]
            with np.errstate(over="ignore"):
                draws += np.exp(-picked.mean(axis=1)).tolist()
    return _exp(-statistics.fmean(logprobs)), deviation(draws) if draws else None


def _exp(x):
    return math.inf if x > 700 else math.exp(x)


def pooled(rows):
    """Return the size-weighted mean of rows (value, stderr, n), its stderr, and the whole n.

    lm_eval/api/metrics.py, pooled_sample_stderr; without it if a row has none.
    """
    total = sum(n for _, _, n in rows)
    value = sum(value * n for value, _, n in rows) / total
    if any(stderr is None for _, stderr, _ in rows):
        return value, None, total
    variance = sum((n - 1) * n * stderr**2 for _, stderr, n in rows) / (total - len(rows))
    return value, math.sqrt(variance / total), total


def row(metric, values, suffix=""):
    return (suffix, metric, *mean(values), len(values))


def unless_nan(result, right):
    """Return `right` as a number; nan if a log-likelihood is: argmax takes NaN for the largest."""
    return math.nan if any(math.isnan(ll) for ll, _ in result) else float(right)


def accuracy(questions, results, style):
    """acc: the likeliest request is the right one; the first of equals wins."""
    return [row("acc", [unless_nan(result, np.argmax([ll for ll, _ in result]) == question.gold)
                        for question, result in zip(questions, results)])]


def both_accuracies(questions, results, style):
    """acc, and acc_norm: by log-likelihood per character (code point, without the space before)."""
    # An empty choice is infinitely unlikely a character, as in lm_eval.
    with np.errstate(divide="ignore"):
        normed = [np.array([ll for ll, _ in result]) / question.lengths
                  for question, result in zip(questions, results)]
    return [*accuracy(questions, results, style),
            row("acc_norm", [unless_nan(result, np.argmax(lls) == question.gold)
                             for question, result, lls in zip(questions, results, normed)])]


def greedy(questions, results, style):
    """acc: some request of the document is what greedy decoding would say."""
    return [row("acc", [unless_nan(result, any(is_greedy for _, is_greedy in result))
                        for result in results])]


def last_word(questions, results, style):
    """acc, and perplexity per target word, not per token."""
    return [*greedy(questions, results, style),
            ("", "ppl" if style == "v0.3" else "perplexity",
             *perplexity([ll for [(ll, _)] in results]), len(results))]


def stereotype(questions, results, style):
    """How far apart two sentences are, and how often the more stereotypical one is likelier."""
    return [row("likelihood_difference" if style == "v0.3" else "likelihood_diff",
                [abs(more - less) for (more, _), (less, _) in results]),
            row("pct_stereotype", [unless_nan(result, result[0][0] > result[1][0])
                                   for result in results])]


def exact_match(questions, results, style):
    """The generated text is one of the accepted ones, but for case and punctuation."""
    return [row("exact_match", [float(bare(generated.strip()) in map(bare, question.gold))
                                for question, [generated] in zip(questions, results)])]


def bare(answer):
    return answer.lower().translate(str.maketrans("", "", string.punctuation))


def without_articles(answer):
    """Return an answer without case, punctuation, articles and extra white space (SQuAD)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare(answer)).split())


def rolled(questions, results, style):
    """Bits per UTF-8 byte, and perplexity per byte and per word: ratios of sums, so without error.

    A row for each subset too (question.gold), the whole last.
    """
    members = defaultdict(list)
    for question, [ll] in zip(questions, results):
        counted = question.shot  # a detokenised page is scored, the original counted
        for subset in {question.gold or "", ""}:
            members[subset].append((ll, len(counted.encode()), len(re.split(r"\s+", counted))))
    rows = []
    for subset in sorted(members, reverse=True):
        ll, n_bytes, n_words = map(sum, zip(*members[subset]))
        if not n_bytes:
            raise ValueError(f"held-out documents{subset and ' of ' + subset}: all empty")
        measured = {"bits_per_byte": -ll / n_bytes / math.log(2)}
        if not subset:
            measured |= {"byte_perplexity": _exp(-ll / n_bytes),
                         "word_perplexity": _exp(-ll / n_words)}
        rows += [(subset and f":{subset}", metric, value, None, len(members[subset]))
                 for metric, value in measured.items()]
    return rows
