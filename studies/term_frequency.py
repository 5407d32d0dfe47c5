"""Does a model do better on what it saw more often, and does seeing it more often make it better?

Biderman et al. 2023, section 3.3: accuracy on arithmetic with operand x1, and on TriviaQA, against
how often x1, or question and answer together, stood in the training data so far. They find the
correlation from 2.8B parameters and about step 65,000 on, hardly any arithmetic up to 1B, and a gap
between frequent and rare operands that grows with training. That is an observation; `compare` is
the experiment.

    python -m studies.term_frequency count --data=PREFIX ORDER --output=counts \\
        --questions=QUESTIONS
    python -m studies.term_frequency evaluate --model=RUN --steps=all --tasks=times,plus \\
        --results=terms.csv
    python -m studies.term_frequency evaluate --model=RUN --tasks=triviaqa --shots=4 \\
        --questions=QUESTIONS
    python -m studies.term_frequency analyse --counts=counts --results=terms.csv --output=terms
    python plots.py term_frequency --bins=terms_bins.csv --output=terms.png

ORDER: --steps, --batch_size, --seq_length and --seed as in RUN/config.json; the defaults are
Pythia's. `analyse` refuses counts of another number of tokens a step, but cannot see another seed.

The experiment: two branches of one checkpoint, of which one sees the rows with some terms more
often, for each of several seeds. A row has a term where it stands as a whole word, in an answer
too: a phrase says that the operand is meant.

    python train.py configs/mini.py --branch_from=RUN/step256 --out_dir=MORE --twin=True \\
        --intervention=term_duplicate --copies=4 --terms="What is 24 plus,What is 37 plus"
    python -m studies.term_frequency evaluate --model=MORE,MORE_twin --results=terms.csv
    python -m studies.term_frequency compare --branch=MORE --terms=24,37 --results=terms.csv

What is asked, and what counts as right, is in studies/term_questions.py; what is counted, and the
format of the counts, in studies/term_counts.py. Every results file goes on where it stopped.

The published models and data (the paper's: deduplicated, steps 13000, 39000, ..., 143000):

    python -m studies.term_frequency count --data=data/pile-deduped/document --output=counts \\
        --questions=QUESTIONS \\
        --at=13000,26000,39000,52000,65000,78000,91000,104000,117000,130000,143000
    python -m studies.term_frequency evaluate --model=pythia-160m-deduped/step13000 \\
        --results=terms.csv

Cost: a row of 2049 tokens takes 0.45 ms of a core, 1.55 ms with 2,000 questions, so the 146,432,000
rows 18 or 63 core hours. A checkpoint answers 50,000 arithmetic prompts of 89 tokens on average. A
70m model on two CPU cores, with other work on them, did 14, 4.5, 2.9, 1.6 and 1.0 prompts/s at 0,
2, 4, 8 and 16 shots: 6.3 hours in all. Not measured on a GPU.

Read correlations with care: small numbers are frequent, and their answers short and easy; the
log-probability of an answer to TriviaQA depends on its length; terms are compared without case, so
the month of May is often "may". The experiment has none of these. Its interval is over terms, which
are what is treated, and over seeds if --branch names several; of one pair of runs it does not tell
what another seed would have done.

Measured on the demo's run (6.6M parameters, 524,288 tokens; plus, 4 shots): no answer is right at
any checkpoint. The log-probability of the right one is higher for the most frequent tenth of x1 (14
times seen by step 512) than for the rarest (never), by 0.28 [0.02, 0.58] at step 64, 1.49 [0.76,
2.21] at 256, 1.81 [1.19, 2.42] at 512. The experiment from step 256 on (--terms=12,16,24,36,78
--copies=3: 45 rows replaced; 0 shots; one seed) raised the answers with these x1 by 0.28 for plus
and 0.31 for times, but all others by 0.29 and 0.28: rows with such numbers teach numbers in
general. Far too small a scale to test the paper's claim; `make suite` has a corpus in which
frequency and size of the operands are independent.
"""

import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import command, read_json
from studies.results import paired_bootstrap, write_csv
from studies.term_counts import count, Count, number_frequencies, question_frequencies
from studies.term_evaluation import evaluate, Evaluate, grouped
from studies.term_questions import read_questions, words_of

# ---------------------------------------------------------------------------- analysis


@dataclass(frozen=True)
class Analyse:
    counts: str  # folder of `count`
    results: str = "term_frequency.csv"  # of `evaluate`
    output: str = "term_frequency"  # OUTPUT_bins.csv and OUTPUT_gaps.csv are written


def analyse(options):
    """Compare what models do with how often they saw it: bins, and most frequent minus least."""
    groups = grouped(options.results)
    frequencies = {task: (question_frequencies(options.counts) if task == "triviaqa" else
                          number_frequencies(options.counts))
                   for task in {key[3] for key in groups}}
    bins, gaps, order = [], [], read_json(os.path.join(options.counts, "counts.json"))
    a_step = order["batch_size"] * order["seq_length"]
    for (model, step, tokens, task, shots), answers in groups.items():
        if int(step or -1) not in frequencies[task]:
            raise ValueError(f"{options.counts}: does not count up to step {step or '(none)'} of "
                             f"{model}, only to {', '.join(map(str, frequencies[task]))}; see "
                             "`count --at`")
        if tokens and int(tokens) != int(step) * a_step:
            raise ValueError(f"{options.counts}: counts {int(step) * a_step:,} tokens up to step "
                             f"{step}, {model} has seen {int(tokens):,}; count in the order of its "
                             "config.json")
        before = frequencies[task][int(step)]
        means = np.array([(before.get(term, 0), *np.mean(values, axis=0))  # (terms, 3)
                          for term, values in by_term(answers).items()])
        where = (model, step, tokens, task, shots)
        bins += [(*where, *row) for row in binned(means, task)]
        gaps.append((*where, *gap(means)))
    write_csv(f"{options.output}_bins.csv", BINS, bins)
    write_csv(f"{options.output}_gaps.csv", GAPS, gaps)
    print("most frequent tenth minus least frequent tenth of the terms, 95 % bootstrap interval "
          "over terms")
    for model, step, _, task, shots, n, low, high, *numbers in gaps:
        found = "all terms were seen equally often" if low == high else (
            f"acc x 100 {interval(numbers[:3], 100)} | log-probability {interval(numbers[3:])}")
        print(f"{model} step {step:>6} | {task:8} {shots:>2}-shot | seen {high:,.1f} and "
              f"{low:,.1f} times | {found} (n {n})")


BINS = ("model", "step", "tokens", "task", "shots", "bins", "from", "to", "frequency", "n",
        "acc", "acc_stderr", "logprob", "logprob_stderr")
GAPS = ("model", "step", "tokens", "task", "shots", "n", "least_frequency", "most_frequency",
        "acc_gap", "acc_low", "acc_high", "logprob_gap", "logprob_low", "logprob_high")


def interval(numbers, scale=1):
    mean, *ends = (scale * number for number in numbers if number is not None)
    return f"{mean:+.2f}" + (" [{:+.2f}, {:+.2f}]".format(*ends) if ends else "")


def by_term(answers):
    terms = {}
    for term, _, correct, logprob in answers:
        terms.setdefault(term, []).append((correct, logprob))
    return terms


def binned(means, task, tenths=10):
    """Yield rows of BINS behind the first five: the paper's bins, tenths of the terms by frequency.

    Equally frequent terms are in one tenth, so that there are fewer of them in a small corpus.
    """
    frequency = means[:, 0]
    edges = np.geomspace(1, 1e6, 7) if task == "triviaqa" else np.geomspace(1e5, 2e8, 20)
    members = [("paper", low, high, np.flatnonzero((low <= frequency) & (frequency < high)))
               for low, high in itertools.pairwise(edges.tolist())]
    tenth = np.searchsorted(np.sort(frequency), frequency) * tenths // len(means)
    for part in (np.flatnonzero(tenth == i) for i in np.unique(tenth)):
        members.append(("quantile", frequency[part].min(), frequency[part].max(), part))
    for name, low, high, part in members:
        if len(part):
            mean = means[part].mean(axis=0)
            error = (means[part].std(axis=0, ddof=1) / math.sqrt(len(part)) if len(part) > 1
                     else [None] * 3)
            yield name, low, high, mean[0], len(part), mean[1], error[1], mean[2], error[2]


def gap(means):
    """Return GAPS behind the first five, of (terms, 3): frequency, accuracy, log-probability.

    With 100 operands a tenth is the paper's 10. The bootstrap draws terms, with all their prompts,
    anew within each tenth; of one term there is no interval, and of equal frequencies no gap.
    """
    # Equally frequent terms (never seen, in a small corpus) must not stand by size, which itself
    # matters.
    order, tenth = np.random.RandomState(0).permutation(len(means)), max(1, len(means) // 10)
    order = order[np.argsort(means[order, 0], kind="stable")]
    least, most = means[order[:tenth]], means[order[-tenth:]]
    acc, logprob = (paired_bootstrap(most[None, :, column], least[None, :, column])
                    for column in (1, 2))
    if tenth == 1:
        acc, logprob = (acc[0], None, None), (logprob[0], None, None)
    low, high = least[:, 0].mean(), most[:, 0].mean()
    return len(means), low, high, *((None,) * 6 if low == high else (*acc, *logprob))


# ---------------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Compare:
    branch: str  # runs that saw the terms more (or less) often; each beside its BRANCH_twin
    terms: str  # numbers or words; the branches' own --terms may be phrases around them
    results: str = "term_frequency.csv"  # of `evaluate`, all models
    questions: str = ""  # for triviaqa: its questions, to know which have a term
    output: str = "term_compare.csv"


def compare(options):
    """Compare branches with their control twins: chosen terms, other terms, the difference."""
    groups, chosen = grouped(options.results), terms_of(options)
    branches = [Path(path).name for path in options.branch.split(",")]
    twins = [f"{branch}_twin" for branch in branches]
    rows = []
    print("log-probability of the right answer, branch minus twin; 95 % over terms and seeds")
    for where in dict.fromkeys(key[1:] for key in groups):
        if not all((model, *where) in groups for model in (*branches, *twins)):
            continue
        seeds = [by_term_difference(groups[branch, *where], groups[twin, *where])
                 for branch, twin in zip(branches, twins)]
        if len({frozenset(seed) for seed in seeds}) > 1:
            raise ValueError(f"{options.results}: not the same terms for all of "
                             f"{', '.join(branches)} at step {where[0]}; run `evaluate` again")
        parts = [np.array([[seed[term] for term in seeds[0] if (term in chosen) == side]
                           for seed in seeds]) for side in (True, False)]
        if not all(part.size for part in parts):
            continue
        for terms, part in (("chosen", parts[:1]), ("others", parts[1:]),
                            ("chosen minus others", parts)):
            numbers = paired_bootstrap(*part)
            n = part[0].shape[1] if len(part) == 1 else None
            rows.append(("+".join(branches), *where, terms, len(seeds), n, *numbers))
            print(f"step {where[0]:>6} | {where[2]:8} {where[3]:>2}-shot | {terms:19} "
                  f"{interval(numbers)}" + (f" (n {n:,} terms, {len(seeds)} seeds)" if n else ""))
    if not rows:
        raise ValueError(f"{options.results}: no checkpoint of all of "
                         f"{', '.join(branches + twins)} has answers with and without "
                         f"{options.terms}; it holds "
                         f"{', '.join(sorted({key[0] for key in groups}))}")
    write_csv(options.output, COMPARED, rows)


COMPARED = ("model", "step", "tokens", "task", "shots", "terms", "seeds", "n", "difference", "low",
            "high")


def terms_of(options):
    """Return the chosen terms, and the ids of questions that have one in their text or answers."""
    chosen = set(options.terms.split(","))
    wanted = [f" {words_of(term)} " for term in chosen]
    for question in read_questions(options.questions) if options.questions else ():
        texts = " . ".join(map(words_of, (question.text, question.value, *question.aliases)))
        chosen |= {question.id for term in wanted if term in f" {texts} "}
    return chosen


def by_term_difference(branch, twin):
    """Return {term: mean difference in log-probability}: terms are what is treated, not prompts."""
    control = {(term, item): logprob for term, item, _, logprob in twin}
    found = {}
    for term, item, _, logprob in branch:
        if (term, item) in control:
            found.setdefault(term, []).append(logprob - control[term, item])
    return {term: np.mean(values) for term, values in found.items()}


COMMANDS = {"count": (Count, count), "evaluate": (Evaluate, evaluate),
            "analyse": (Analyse, analyse), "compare": (Compare, compare)}

if __name__ == "__main__":
    command(sys.argv[1:], COMMANDS)
