"""The paper's three claims in miniature, on planted text: train, measure, report.

    make suite                              # or: python -m studies.suite --output=runs/suite
    python -m studies.suite --scale=gpu     # the published 14m, 31m, 70m, 10.5 million tokens a run

Each run has about 655,000 tokens: prose that comes once, and planted in it canaries, bursts, facts,
occupations and sums, each as often as its dose, at places drawn by the seed and written to a plan
file (studies/corpus.py). The largest size has five seeds of order, initialisation and doses, the
middle one three. One run has every planted document once at most, as if deduplicated. Branches of
the largest model swap pronouns in the last quarter, one of them as the code pushed to gpt-neox. A
branch is compared with its parent's own continuation, which is what a control twin would be, bit
for bit. On a CPU one run goes on each core. After an interruption the same command continues.

The primary outcomes, of the largest size (the p-values of all others are adjusted by Holm):

    1. the dispersion of memorized rows (32, 32) over windows, against the same rows in random order
    2. the swap's change of the slope of occupations' bias on the log-odds they were trained on
    3. nats of a sum's answer per doubling of how often its operand was planted

In OUTPUT, claims.csv has every outcome, doses.csv the figure of doses, NAME.log what a run printed,
report.html all results beside the paper's. With --scale=gpu every dose is 4 times as large and the
prose comes about three times; this was only tried with tiny models.
"""

import base64
import html
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import checkpoints
import plots
from config import check, parse, replacing, run
from data import OrderedData, samples_needed
from eval import loglikelihood, loglikelihood_rolling, token_losses
from interventions import IntervenedData, InterventionConfig, read_plan
from parallel import Processes
from studies.corpus import CITIES, SAID, lives, write_miniature
from studies.gender_bias import heldout_texts, she_against_he
from studies.memorization import matched_lengths, poisson_tests, position_test, window_counts
from studies.results import Estimate, holm, open_results, regression, write_table
from tokenizer import load_tokenizer


class Scale(NamedTuple):
    sizes: dict  # {name: flags for train.py}, smallest first
    batch: int  # rows a step
    length: int  # tokens of a row
    times: int  # factor of all doses


# Heads have 32 dimensions, as the 14m's. With 16, of which only 4 carry rotary positions, the model
# learns a tenth of the occupations' bias. Updates are small and many: with 4 rows instead of 2 and
# half the steps a fact needs twice as many exposures.
SCALES = {
    "cpu": Scale({
        "d32": "--n_layers=2 --d_model=32 --n_heads=1 --learning_rate=5e-3",
        "d64": "--n_layers=3 --d_model=64 --n_heads=2 --learning_rate=5e-3",
        "d128": "--n_layers=4 --d_model=128 --n_heads=4 --learning_rate=3e-3"}, 2, 128, 1),
    "gpu": Scale({size: f"configs/pythia_{size}.py" for size in ("14m", "31m", "70m")}, 8, 512, 4)}
WINDOW = 64  # rows
SWAPS = ("pronouns_to_feminine", "pronouns_as_pushed")
SUM = "nats of a sum per doubling of the dose"
DISPERSION = "dispersion of memorized rows over windows"
SLOPE = f"{SWAPS[0]}: slope of occupations"
PRIMARY = (DISPERSION, SLOPE, SUM)
CLAIMS = ("study", "claim", "size", "seeds", "value", "stderr", "low", "high", "p")
DOSES = ("kind", "size", "dose", "n", "seeds", "value", "low", "high")


@dataclass(frozen=True)
class SuiteConfig:
    output: str = "runs/suite"
    data: str = "data/suite"
    scale: str = "cpu"  # or gpu
    steps: int = 2560  # of every run
    seeds: int = 5  # of the largest size; the middle one has at most 3, the smallest 1
    planted: float = 1.0  # factor of the number of planted documents
    tokenizer: str = "20B_tokenizer.json"
    device: str = "auto"

    def __post_init__(self):
        check(self, " or ".join(SCALES), SCALES.__contains__, "scale")
        check(self, "a multiple of 4 from 64", lambda n: n >= 64 and n % 4 == 0, "steps")
        check(self, "at least 1", lambda value: value >= 1, "seeds")


# ---------------------------------------------------------------------------- text and models


def command(options, name, *arguments):
    """Run one of the project's commands, its output appended to OUTPUT/NAME.log."""
    words, path = [str(argument) for argument in arguments], Path(options.output) / f"{name}.log"
    print(f"{path}: python {' '.join(words)}", flush=True)
    with open(path, "a") as log:
        print("\n$ python", *words, file=log, flush=True)
        code = subprocess.run([sys.executable, *words], stdout=log,
                              stderr=subprocess.STDOUT).returncode
    if code:
        raise ValueError(f"python {words[0]} ended with exit code {code}, {path} says why; the "
                         "same command continues from here")


def prepare(options, scale):
    data, tokenizer = Path(options.data), f"--tokenizer={options.tokenizer}"
    command(options, "text", "-m", "studies.corpus", "tokenizer", f"--output={options.tokenizer}")
    open_results(data / "suite.json", {name: getattr(options, name) for name in (
        "scale", "steps", "seeds", "planted")})
    if not (data / "prose.idx").exists():
        write_miniature(data, load_tokenizer(options.tokenizer), options.steps,
                        scale.batch * (scale.length - 23), options.seeds, options.planted,
                        scale.times)
        command(options, "text", "prepare.py", "tokenize", f"--input={data}/prose.jsonl",
                f"--output={data}/prose", tokenizer)


def runs_of(options, sizes):
    """Return [(name, size, seed, plan, intervention, parent)] of all runs."""
    _, middle, largest = sizes
    runs = [(f"{size}_{seed}", size, seed, f"plan_{seed}", "plant", None)
            for size, most in zip(sizes, (1, 3, options.seeds))
            for seed in range(1, min(most, options.seeds) + 1)]
    runs.append((f"{middle}_once", middle, 1, "once_1", "plant", None))
    return runs + [(f"{largest}_{seed}_{swap}", largest, seed, f"plan_{seed}", f"plant+{swap}",
                    f"{largest}_{seed}")
                   for swap, n in zip(SWAPS, (options.seeds, 1)) for seed in range(1, n + 1)]


def train(options, scale, name, size, seed, plan, intervention, parent):
    folder, begin = Path(options.output) / name, options.steps * 3 // 4
    if (folder / f"step{options.steps}").exists():
        return
    command(options, name, "train.py", *scale.sizes[size].split(), f"--data={options.data}/prose",
            f"--steps={options.steps}", f"--batch_size={scale.batch}",
            f"--micro_batch_size={scale.batch}", f"--seq_length={scale.length}",
            f"--checkpoint_every={options.steps // 4}", "--log_every=64", f"--seed={seed}",
            f"--tokenizer={options.tokenizer}", f"--out_dir={folder}", "--threads=1",
            f"--device={options.device}", f"--intervention={intervention}",
            f"--planted={options.data}/{plan}.jsonl",
            *([f"--branch_from={options.output}/{parent}/step{begin}",
               f"--intervention_from={begin}"] if parent else []))


# ---------------------------------------------------------------------------- measures


def measure(options, scale, tokenizer, device, name, seed, plan, step):
    """Return {measure: numbers} of a checkpoint, kept in OUTPUT/measured/NAME_stepN.npz."""
    path = Path(options.output) / "measured" / f"{name}_step{step}.npz"
    if not path.exists():
        print(path, flush=True)
        model = checkpoints.load_model(Path(options.output) / name / f"step{step}", device)
        found = ask(model, tokenizer, plan, Path(options.data) / "docs" / "heldout")
        if step == options.steps:
            found["rows"] = memorized_rows(options, scale, model, tokenizer, seed, plan, device)
        with replacing(path) as file:
            np.savez(file, **found)
    return dict(np.load(path))


def ask(model, tokenizer, plan, heldout):
    """Return what a model knows of the planted documents, in the plan's order, and of other text.

    heldout: the folder of the held-out documents. Of them the result has nats a token, and
    log p(she) - log p(he) wherever either occurs.
    """
    logprobs = lambda pairs: np.array([ll for ll, _ in loglikelihood(model, tokenizer, pairs)])
    rows = torch.tensor([[0] + tokenizer.encode(entry["text"])
                         for entry in asked(plan, "canary", "burst")],
                        device=model.embed_in.weight.device)
    facts = asked(plan, "fact")
    right = np.array([CITIES.index(entry["city"]) for entry in facts])
    statement, _, question = zip(*(lives(entry["person"]) for entry in facts))
    cities = logprobs([(prompt, f" {city}") for prompt in statement + question
                       for city in CITIES]).reshape(2, len(facts), len(CITIES))
    cities -= np.logaddexp.reduce(cities, axis=-1, keepdims=True)
    she_he = logprobs([(f"The {entry['occupation']} {said}", pronoun)
                       for entry in asked(plan, "occupation")
                       for said in SAID for pronoun in (" she", " he")])
    texts = heldout_texts(heldout)
    lls = loglikelihood_rolling(model, tokenizer, texts)
    she, documents, x = she_against_he(model, tokenizer, heldout)
    return {
        "whole": (matched_lengths(model, rows[:, 1:], 32) == 32).cpu().numpy(),
        "canary": -token_losses(model, rows).mean(axis=1),  # nats a token, log p
        "right": cities[0].argmax(axis=1) == right,
        "question": cities[1][np.arange(len(facts)), right],
        "sum": logprobs([(f"Q:What is {entry['x1']} plus {entry['x2']}? A:",
                          str(entry["x1"] + entry["x2"])) for entry in asked(plan, "sum")]),
        "occupation": she_he[::2] - she_he[1::2],
        "nats": np.array([-ll / len(tokenizer.encode(t)) for ll, t in zip(lls, texts)]),
        "she": np.array(she), "she_documents": np.array(documents), "she_x": np.array(x)}


def asked(plan, *groups):
    """Return the plan's entries of some groups that a model is asked about, in order."""
    return [entry for group in groups for entry in plan
            if entry["group"] == group and entry.get("asked", True)]


def asked_of_places(plan, tokenizer, steps):
    """Return the steps whose rows count for dispersion and trend, and the canaries that do not.

    Two rules keep the planting itself from looking like an effect: a step with a burst has less
    room for canaries, so its rows do not count; and counts are nearly Poisson only if few rows are
    memorized, so every fourth canary counts. Without them a test at 5 % rejects in half of all
    plans, with them in 2.5 % (tests/test_suite.py).
    """
    of_bursts = {step for entry in plan if entry["group"] == "burst" for step in entry["steps"]}
    left_out = {tuple(tokenizer.encode(entry["text"]))
                for i, entry in enumerate(asked(plan, "canary")) if i % 4}
    return [step for step in range(steps) if step not in of_bursts], left_out


def memorized_rows(options, scale, model, tokenizer, seed, plan, device):
    """Return which rows count and are (32, 32)-memorized as they were trained on, in order."""
    steps, left_out = asked_of_places(plan, tokenizer, options.steps)
    data = OrderedData(f"{options.data}/prose", scale.length,
                       samples_needed(options.steps, scale.batch), seed)
    served = IntervenedData(data, tokenizer, InterventionConfig(
        intervention="plant", planted=f"{options.data}/plan_{seed}.jsonl"))
    found = []
    for start in range(0, len(steps), 64):
        rows = np.concatenate([served.step_rows(step, scale.batch)[:, :64]
                               for step in steps[start:start + 64]])
        whole = matched_lengths(model, torch.tensor(rows, device=device), 32) == 32
        counts = [tuple(row) not in left_out for row in rows.tolist()]
        found.append(whole.cpu().numpy() & counts)
    return np.concatenate([np.empty(0, dtype=bool), *found])


# ---------------------------------------------------------------------------- claims


def stack(parts, key):
    return np.array([part[key] for part in parts], dtype=np.float64)


def of_entries(plans, group, value):
    """Return value(entry) of a group's entries in each plan, (seeds, entries)."""
    return np.array([[value(entry) for entry in asked(plan, group)] for plan in plans])


def trained_odds(plans):
    """Return the log-odds of "she" trained on, for each question, and its occupation's number."""
    share = of_entries(plans, "occupation", lambda entry: entry["share"])
    who = np.repeat(np.arange(share.shape[1]), len(SAID))
    return np.log(share / (1 - share))[:, who], who


def dose_claims(found, plans):
    """Return {claim: Estimate} of one size; found: what was measured at the end, by seed."""
    x1 = [entry["x1"] for entry in asked(plans[0], "sum")]
    of_sum = of_entries(plans, "sum", lambda entry: np.log2(entry["total"]))
    of_fact = of_entries(plans, "fact", lambda entry: np.log2(1 + entry["total"]))
    odds, who = trained_odds(plans)
    return {SUM: regression(stack(found, "sum"), of_sum, x1)[1],
            "nats of a question about a fact, per doubling of 1 + the dose":
                regression(stack(found, "question"), of_fact)[1],
            "slope of occupations' log-odds on those trained":
                regression(stack(found, "occupation"), odds, who)[1]}


def swap_claims(swap, found, swapped, plans):
    """Return {claim: Estimate} of what a swap changed: its branches minus their parents."""
    odds, who = trained_odds(plans)
    change = lambda key: stack(swapped, key) - stack(found, key)
    documents, x = found[0]["she_documents"], found[0]["she_x"]
    return {f"{swap}: slope of occupations": regression(change("occupation"), odds, who)[1],
            f"{swap}: shift to she of occupations": regression(change("occupation"), None, who)[0],
            f"{swap}: context in held-out prose": regression(change("she"), x, documents)[1],
            f"{swap}: held-out nats a token": regression(change("nats"))[0]}


def canary_table(half, found, plans):
    """Return columns of the canaries and bursts of all seeds: group, text, name of seed and dose,
    mean and last step (-1 if never), log p a token at half of training and at its end."""
    rows = []
    for seed, (plan, *measured) in enumerate(zip(plans, half, found)):
        for entry, before, after in zip(asked(plan, "canary", "burst"),
                                        *(part["canary"] for part in measured)):
            steps, group = entry["steps"] or [-1], entry["group"]
            rows.append((group, entry["text"], f"{seed} {group} {entry['dose']}", np.mean(steps),
                         steps[-1], before, after))
    return map(np.array, zip(*rows))


def centred(values, groups):
    """Return values less the mean of their group."""
    _, which = np.unique(groups, return_inverse=True)
    return values - (np.bincount(which, values) / np.bincount(which))[which]


def place_claims(half, found, plans, steps):
    """Return {claim: Estimate} on place in training, and the bursts' places and gains, (2, n).

    Windows at the same place of all seeds are counted together. p is by permutation.
    """
    shortest = min(len(part["rows"]) for part in found)
    rows = np.array([part["rows"][:shortest] for part in found])
    counts = sum(window_counts(row, WINDOW) for row in rows.astype(int))
    tests = poisson_tests(counts, WINDOW * len(found))
    claims = {f"{test} of memorized rows over windows": Estimate(value, p=by_permutation)
              for test, (value, _, by_permutation) in tests.items()}
    claims["p of this dispersion if rows were independent"] = Estimate(tests["dispersion"][1])
    claims["share of memorized rows"] = Estimate(rows.mean() if rows.size else None)
    group, text, lot, place, last, before, after = canary_table(half, found, plans)
    spread, burst = (group == "canary") & (last >= 0), group == "burst"
    gain, early = centred(after, lot), centred(before, lot)
    for name, those in (("spread canaries", spread), ("bursts", burst)):
        for term, value, error, _, p in position_test(place[those], gain[those]):
            claims[f"{name}: nats a token, {term}"] = Estimate(value, error, p=p)
    since = centred(np.log2(steps - last), lot)
    claims |= {
        "canaries' nats at the end per nat at half, within a dose":
            regression(gain[None, spread], early[spread], text[spread])[1],
        "canaries' nats at the end per doubling of the steps since they came, within a dose":
            regression(gain[None, spread], since[spread], text[spread])[1]}
    return claims, (place[burst], gain[burst])


def dose_rows(size, found, plans):
    """Return the rows of doses.csv of one size: share or nats by dose, with intervals."""
    rows = []
    for kind, key, group, dose_of in (("canaries whole (32, 32)", "whole", "canary", "dose"),
                                      ("facts right of 16", "right", "fact", "total"),
                                      ("nats of a sum's answer", "sum", "sum", "total")):
        entries = [(seed, entry) for seed, plan in enumerate(plans) for entry in asked(plan, group)]
        n = len(entries) // len(plans)  # behind canaries bursts are measured
        values = np.concatenate([part[key][:n] for part in found]).astype(float)
        names = np.array([f"{seed} {entry.get('x1', entry['id'])}" for seed, entry in entries])
        doses = np.array([entry[dose_of] for _, entry in entries])
        for dose in np.unique(doses).tolist():
            those = doses == dose
            [mean] = regression(values[None, those], documents=names[those])
            rows.append((kind, size, dose, len(np.unique(names[those])), len(found), mean.value,
                         mean.low, mean.high))
    return rows


def all_claims(options, scale, runs, plans, found, half):
    """Return the rows of claims.csv and of doses.csv, and the bursts' places and gains."""
    claims, doses, (_, middle, largest) = [], [], scale.sizes

    def claim(study, size, seeds, estimates):
        claims.extend([study, name, size, seeds, *found] for name, found in estimates.items())

    for size in scale.sizes:
        names = [name for name, its, *_, parent in runs
                 if its == size and not parent and not name.endswith("once")]
        ends = [found[name] for name in names]
        its_plans = [plans[f"plan_{seed}"] for seed in range(1, len(names) + 1)]
        claim("Term frequency", size, len(names), dose_claims(ends, its_plans))
        doses += dose_rows(size, ends, its_plans)
    doses += dose_rows(f"{middle} once", [found[f"{middle}_once"]], [plans["plan_1"]])
    for swap in SWAPS:  # of the largest size, which the loop above took last
        swapped = [found[f"{name}_{swap}"] for name in names if f"{name}_{swap}" in found]
        n = len(swapped)
        claim("Gendered pronouns", largest, n, swap_claims(swap, ends[:n], swapped, its_plans[:n]))
    estimates, bursts = place_claims(half, ends, its_plans, options.steps)
    claim("Memorization", largest, len(ends), estimates)
    rest = [row for row in claims if row[1] not in PRIMARY or row[2] != largest]
    for row, p in zip(rest, holm([row[-1] for row in rest])):
        row[-1] = p
    return claims, doses, bursts


# ---------------------------------------------------------------------------- report

STUDIES = {  # title: figure, what the paper found
    "Memorization": ("places", "memorized rows in windows of 512 fit a Poisson distribution: when "
                     "a row was seen does not matter for whether it is memorized."),
    "Gendered pronouns": ("occupations", "with masculine pronouns made feminine in the last 7 % or "
                          "21 % of training bias falls, most in the largest models, at little "
                          "cost."),
    "Term frequency": ("doses", "what was seen more often is answered better; this shows from 2.8B "
                       "parameters on, so it grows with size.")}
STYLE = """body { font: 16px/1.5 system-ui; max-width: 45rem; margin: 0 auto; padding: 1rem; }
img { max-width: 100%; height: auto; }"""


def sentence(claim, size, seeds, value, _, low, high, p):
    """Return a row of claims.csv in words."""
    words = f"{claim}, {size}: {'none' if value is None else f'{value:.3g}'}"
    words += f" [{low:.3g}, {high:.3g}]" if low is not None else ""
    words += f", p {p:.2g}" if p is not None else ""
    return html.escape(f"{words} ({seeds} seed{'s' * (seeds > 1)})")


def report(out, claims, largest, planted):
    """Write OUT/report.html: of each study a figure, what the paper found, and what is here."""
    page = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
            f"content='width=device-width'><title>Pythia in miniature</title><style>{STYLE}</style>"
            "<h1>Pythia in miniature</h1><p>Intervals are 95 %, over documents and seeds; of one "
            "seed they do not say what another would have done. p of all but the primary outcomes, "
            "which are bold, is adjusted for their number. Planted in a run: "
            f"{html.escape(planted)}. This scale says nothing about other sizes, data, doses."]
    for study, (figure, paper) in STUDIES.items():
        png = base64.b64encode((out / f"{figure}.png").read_bytes()).decode()
        page.append(f'<h2>{study}</h2><p>The paper: {paper}<p>Here:<ul>')
        for its, *row in claims:
            if its == study:
                bold = "b" if row[0] in PRIMARY and row[1] == largest else "span"
                page.append(f"<li><{bold}>{sentence(*row)}</{bold}>")
        page.append(f'</ul><img alt="{study}" src="data:image/png;base64,{png}">')
    with replacing(out / "report.html") as file:
        file.write("\n".join([*page, "</html>"]).encode())
    print(f"{out}/report.html")


def main(options):
    out, scale = Path(options.output), SCALES[options.scale]
    (out / "measured").mkdir(parents=True, exist_ok=True)
    prepare(options, scale)
    runs, largest = runs_of(options, scale.sizes), list(scale.sizes)[-1]
    device = Processes(options.device).device
    at_once = os.cpu_count() if device.type == "cpu" else 1
    with ThreadPoolExecutor(at_once) as pool:
        for is_branch in (False, True):  # after their parents
            chosen = [run for run in runs if bool(run[-1]) == is_branch]
            list(pool.map(lambda run: train(options, scale, *run), chosen))
    tokenizer = load_tokenizer(options.tokenizer)
    plans = {plan: read_plan(f"{options.data}/{plan}.jsonl") for _, _, _, plan, *_ in runs}
    at = partial(measure, options, scale, tokenizer, device)
    found = {name: at(name, seed, plans[plan], options.steps) for name, _, seed, plan, *_ in runs}
    parents = [run for run in runs if run[1] == largest and not run[-1]]
    half = [at(name, seed, plans[plan], options.steps // 2) for name, _, seed, plan, *_ in parents]
    claims, doses, bursts = all_claims(options, scale, runs, plans, found, half)
    write_table(out / "claims.csv", CLAIMS, claims)
    write_table(out / "doses.csv", DOSES, doses)
    plots.doses(out / "doses.csv", out / "doses.png")
    plots.places(zip(*bursts), out / "places.png")
    odds, _ = trained_odds([plans[plan] for _, _, _, plan, *_ in parents])
    names = [name for name, *_ in parents]
    plots.occupations({who: (odds, stack([found[name + end] for name in names], "occupation"))
                       for who, end in (("the parents", ""),
                                        ("after the swap", f"_{SWAPS[0]}"))},
                      out / "occupations.png")
    planted = Counter(entry["group"] for entry in plans["plan_1"] for _ in entry["steps"])
    report(out, claims, largest,
           ", ".join(f"{group} at {n:,} places" for group, n in planted.items()))


if __name__ == "__main__":
    run(main, parse(sys.argv[1:], SuiteConfig))
