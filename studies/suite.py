"""The paper's three claims in miniature, on planted text: models, measures, claims, one report.

    make suite          # or: python -m studies.suite --output=runs/suite

About 655,000 tokens a run: prose that comes once, and in it canaries, bursts, facts, occupations
and sums, each at as many places as its dose, drawn by the seed and declared in a plan file
(studies/corpus.py). Three seeds of order, initialisation and doses; a twin of one run whose planted
documents come once at most, as deduplicated; and branches of the largest model with pronouns
swapped in the last quarter, as pushed to gpt-neox for one. The control of a branch is its parent's
own continuation: bit for bit what a twin would be. The same command goes on where it was stopped.

The primary outcomes, all others being adjusted for their number (Holm), are of the largest size:

    1. the dispersion of memorized rows (32, 32) over windows, against the same rows in any order
    2. what the swap changes in the slope of occupations' bias on the log-odds they were trained on
    3. nats of a sum's answer per doubling of how often its operand was planted

OUTPUT/claims.csv has every outcome, doses.csv what is in the figures, log.txt what the commands
printed, report.html all of it beside what the paper found. A published size is trained in the same
way (`train.py configs/pythia_70m.py --intervention=plant --planted=PLAN --plan=True` says the
cost), and `python eval.py losses --text=PLAN` measures the canaries at every checkpoint.
"""

import base64
import html
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoints
import plots
from config import check, parse, replacing, run
from data import OrderedData, samples_needed
from eval import loglikelihood, loglikelihood_rolling, token_losses
from interventions import IntervenedData, InterventionConfig, read_plan
from parallel import Processes
from studies.corpus import CITIES, SAID, lives
from studies.gender_bias import heldout_texts, she_against_he
from studies.memorization import matched_lengths, poisson_tests, position_test, window_counts
from studies.results import holm, open_results, regression, write_table
from tokenizer import load_tokenizer

# Name: layers, width, heads, peak learning rate. Heads of 32 dims, as the 14m's: with 16, of which
# rotary positions turn 4, the same model learns a tenth of the occupations' bias. Many small
# updates: with 4 rows instead of 2, and half the steps, a fact takes twice as many exposures.
SIZES = {"d32": (2, 32, 1, 5e-3), "d64": (3, 64, 2, 5e-3), "d128": (4, 128, 4, 3e-3)}
BATCH, LENGTH, WINDOW = 2, 128, 64
SWAPS = ("pronouns_to_feminine", "pronouns_as_pushed")
SUM = "nats of a sum per doubling of the dose"
DOSES = ("kind", "size", "dose", "n", "seeds", "value", "low", "high")


@dataclass(frozen=True)
class SuiteConfig:
    output: str = "runs/suite"
    data: str = "data/suite"
    steps: int = 2560  # of every run
    seeds: int = 3  # of all sizes but the smallest
    scale: float = 1.0  # less plants fewer of everything
    tokenizer: str = "20B_tokenizer.json"
    device: str = "auto"

    def __post_init__(self):
        check(self, "a multiple of 4 from 64", lambda n: n >= 64 and n % 4 == 0, "steps")
        check(self, "at least 1", lambda value: value >= 1, "seeds")


# ---------------------------------------------------------------------------- text and models


def command(options, *arguments):
    """Run one of the project's commands; what it prints is in OUTPUT/log.txt."""
    words, log_path = [str(argument) for argument in arguments], Path(options.output) / "log.txt"
    print("python", *words, flush=True)
    with open(log_path, "a") as log:
        print("\n$ python", *words, file=log, flush=True)
        code = subprocess.run([sys.executable, *words], stdout=log,
                              stderr=subprocess.STDOUT).returncode
    if code:
        last = log_path.read_text(errors="replace").strip().splitlines()[-1]
        raise ValueError(f"python {words[0]} ended with exit code {code}: {last} (all of it: "
                         f"{log_path}); the same command goes on from here")


def prepare(options):
    data, tokenizer = Path(options.data), f"--tokenizer={options.tokenizer}"
    command(options, "-m", "studies.corpus", "tokenizer", f"--output={options.tokenizer}")
    open_results(data / "suite.json", {name: getattr(options, name) for name in (
        "steps", "seeds", "scale")})
    if not (data / "prose.idx").exists():
        command(options, "-m", "studies.corpus", "suite", f"--output={data}", tokenizer,
                f"--steps={options.steps}", f"--batch_size={BATCH}", f"--seeds={options.seeds}",
                f"--scale={options.scale}")
        command(options, "prepare.py", "tokenize", f"--input={data}/prose.jsonl",
                f"--output={data}/prose", tokenizer)


def runs_of(options):
    """Return [(name, size, seed, plan, intervention, parent)] of all runs."""
    largest, seeds = list(SIZES)[-1], range(1, options.seeds + 1)
    runs = [(f"{size}_{seed}", size, seed, f"plan_{seed}", "plant", None)
            for size in SIZES for seed in (seeds if size != "d32" else [1])]
    runs.append(("d64_once", "d64", 1, "once_1", "plant", None))
    return runs + [(f"{largest}_{seed}_{swap}", largest, seed, f"plan_{seed}", f"plant+{swap}",
                    f"{largest}_{seed}")
                   for swap in SWAPS for seed in (seeds if swap == SWAPS[0] else [1])]


def train(options, name, size, seed, plan, intervention, parent):
    folder, begin = Path(options.output) / name, options.steps * 3 // 4
    if (folder / f"step{options.steps}").exists():
        return
    L, D, H, rate = SIZES[size]
    command(options, "train.py", f"--n_layers={L}", f"--d_model={D}", f"--n_heads={H}",
            f"--learning_rate={rate}", f"--data={options.data}/prose", f"--steps={options.steps}",
            f"--batch_size={BATCH}", f"--micro_batch_size={BATCH}", f"--seq_length={LENGTH}",
            f"--checkpoint_every={options.steps // 4}", "--log_every=64", f"--seed={seed}",
            f"--tokenizer={options.tokenizer}", f"--out_dir={folder}",
            f"--intervention={intervention}", f"--planted={options.data}/{plan}.jsonl",
            *([f"--branch_from={options.output}/{parent}/step{begin}",
               f"--intervention_from={begin}"] if parent else []))


# ---------------------------------------------------------------------------- measures


def measure(options, name, seed, plan, step, tokenizer):
    """Return {measure: numbers} of a checkpoint, computed once: OUTPUT/measured/NAME_stepN.npz."""
    path = Path(options.output) / "measured" / f"{name}_step{step}.npz"
    if not path.exists():
        print(path, flush=True)
        device = Processes(options.device).device
        model = checkpoints.load_model(Path(options.output) / name / f"step{step}", device)
        found = ask(model, tokenizer, plan) | heldout(model, tokenizer, Path(options.data) / "docs")
        if step == options.steps:
            found["rows"] = memorized_rows(options, model, tokenizer, seed, plan, device)
        with replacing(path) as file:
            np.savez(file, **found)
    return dict(np.load(path))


def ask(model, tokenizer, plan):
    """Return what a model knows of what is planted, in the order of the plan."""
    logprobs = lambda pairs: np.array([ll for ll, _ in loglikelihood(model, tokenizer, pairs)])
    rows = torch.tensor([[0] + tokenizer.encode(entry["text"]) for entry in canaries(plan)],
                        device=model.embed_in.weight.device)
    people = facts(plan)
    right = np.array([CITIES.index(entry["city"]) for entry in people])
    statement, _, question = zip(*(lives(entry["person"]) for entry in people))
    cities = logprobs([(prompt, f" {city}") for prompt in statement + question
                       for city in CITIES]).reshape(2, len(people), len(CITIES))
    cities -= np.logaddexp.reduce(cities, axis=-1, keepdims=True)
    she_he = logprobs([(f"The {entry['occupation']} {said}", pronoun) for entry in occupations(plan)
                       for said in SAID for pronoun in (" she", " he")])
    return {
        "whole": (matched_lengths(model, rows[:, 1:], 32) == 32).cpu().numpy(),
        "canary": -token_losses(model, rows).mean(axis=1),
        "right": cities[0].argmax(axis=1) == right,
        "question": cities[1][np.arange(len(people)), right],
        "sum": logprobs([(f"Q:What is {entry['x1']} plus {entry['x2']}? A:",
                          str(entry["x1"] + entry["x2"])) for entry in sums(plan)]),
        "occupation": she_he[::2] - she_he[1::2]}


def canaries(plan):
    return [entry for entry in plan if entry["group"] in ("canary", "burst")]


def facts(plan):
    return [entry for entry in plan if entry["group"] == "fact" and entry["id"].endswith(" 2")]


def sums(plan):
    return [entry for entry in plan if entry["group"] == "sum"]


def occupations(plan):
    return [entry for entry in plan if entry["id"].startswith("occupation")
            and entry["id"].endswith(" she 0")]


def heldout(model, tokenizer, docs):
    """Return nats a token of held-out texts, and log p(she) - log p(he) where either stands."""
    texts = heldout_texts(docs / "heldout")
    she, documents, x = she_against_he(model, tokenizer, docs / "heldout")
    lls = loglikelihood_rolling(model, tokenizer, texts)
    return {"nats": np.array([-ll / len(tokenizer.encode(t)) for ll, t in zip(lls, texts)]),
            "she": np.array(she),
            "she_documents": np.array(documents), "she_x": np.array(x)}


def memorized_rows(options, model, tokenizer, seed, plan, device):
    """Return whether each row, as it was trained on, is (32, 32)-memorized and no burst's."""
    bursts = {tuple(tokenizer.encode(entry["text"])) for entry in plan if entry["group"] == "burst"}
    data = OrderedData(f"{options.data}/prose", LENGTH, samples_needed(options.steps, BATCH), seed)
    served = IntervenedData(data, tokenizer, InterventionConfig(
        intervention="plant", planted=f"{options.data}/plan_{seed}.jsonl"))
    found = []
    for start in range(0, options.steps, 64):
        rows = np.concatenate([served.step_rows(step, BATCH)[:, :64]
                               for step in range(start, min(start + 64, options.steps))])
        whole = matched_lengths(model, torch.tensor(rows, device=device), 32) == 32
        found += [flag and tuple(row) not in bursts
                  for flag, row in zip(whole.tolist(), rows.tolist())]
    return np.array(found)


# ---------------------------------------------------------------------------- claims


def stack(parts, key):
    return np.array([part[key] for part in parts], dtype=np.float64)


def of_entries(plans, pick, value):
    """Return what the chosen entries of each plan have, (seeds, entries)."""
    return np.array([[value(entry) for entry in pick(plan)] for plan in plans])


def trained_odds(plans):
    """Return the log-odds of "she" that each question about an occupation was trained on, whose."""
    share = of_entries(plans, occupations, lambda entry: entry["share"])
    who = np.repeat(np.arange(share.shape[1]), len(SAID))
    return np.log(share / (1 - share))[:, who], who


def dose_claims(found, plans):
    """Return {claim: Estimate} of one size; found: what was measured of each seed at the end."""
    x1 = [entry["x1"] for entry in sums(plans[0])]
    of_sum = of_entries(plans, sums, lambda entry: np.log2(entry["total"]))
    of_fact = of_entries(plans, facts, lambda entry: np.log2(1 + entry["total"]))
    odds, who = trained_odds(plans)
    return {SUM: regression(stack(found, "sum"), of_sum, x1)[1],
            "nats of a question about a fact, per doubling of 1 + the dose":
                regression(stack(found, "question"), of_fact)[1],
            "slope of occupations' log-odds on those trained":
                regression(stack(found, "occupation"), odds, who)[1]}


def swap_claims(swap, found, swapped, plans):
    """Return {claim: Estimate} of what a swap changed, from its branches and their parents."""
    odds, who = trained_odds(plans)
    change = lambda key: stack(swapped, key) - stack(found, key)
    documents, x = found[0]["she_documents"], found[0]["she_x"]
    slope = regression(change("occupation"), odds, who)
    return {f"{swap}: slope of occupations": slope[1],
            f"{swap}: shift to she of occupations": regression(change("occupation"), None, who)[0],
            f"{swap}: context in held-out prose": regression(change("she"), x, documents)[1],
            f"{swap}: held-out nats a token": regression(change("nats"))[0]}


def place_claims(found, plans):
    """Return the tests of places: rows' dispersion and trend, canaries and bursts by place.

    Windows at the same place of every seed's run are counted together.
    """
    rows = stack(found, "rows")
    tests = poisson_tests(sum(window_counts(row, WINDOW) for row in rows.astype(int)),
                          WINDOW * len(found))
    claims = [(f"{test} of the {rows.mean():.2%} memorized rows", *numbers)
              for test, numbers in tests.items()]
    spread, burst = [], []
    for part, plan in zip(found, plans):
        of_dose = {}  # a canary is compared with those of its dose
        for entry, nats in zip(canaries(plan), part["canary"]):
            if entry["steps"]:
                of_dose.setdefault((entry["group"], entry["dose"]), []).append(
                    (np.mean(entry["steps"]), nats))
        for (group, _), pairs in of_dose.items():
            place, nats = np.array(pairs).T
            (spread if group == "canary" else burst).extend(zip(place, nats - nats.mean()))
    for name, pairs in (("spread canaries", spread), ("bursts", burst)):
        for term, value, _, p, by_permutation in position_test(*np.array(pairs).T):
            claims.append((f"{name}: nats a token, {term}", value, p, by_permutation))
    return claims, burst


def time_claims(half, found, plans, steps):
    """Return {claim: Estimate} of what changed from half of training, `half`, to its end."""
    early, late, gone, change, early_texts, texts = [], [], [], [], [], []
    for before, after, plan in zip(half, found, plans):
        of_dose = {}
        for entry, x, y in zip(canaries(plan), before["canary"], after["canary"]):
            if entry["group"] == "canary" and entry["dose"]:
                of_dose.setdefault(entry["dose"], []).append((entry["text"], x, y))
            elif not entry["steps"] or entry["steps"][-1] < steps // 2:
                gone.append(entry["group"] == "burst")
                change.append(y - x)
                texts.append(entry["text"])
        for group in of_dose.values():
            names, x, y = zip(*group)
            early_texts += names
            early += list(x - np.mean(x))
            late += list(y - np.mean(y))
    predicts = regression(np.array([late]), np.array(early), np.array(early_texts))[1]
    forgets = regression(np.array([change]), np.array(gone, dtype=float), np.array(texts))[1]
    return {"canaries' nats at the end per nat at half, within a dose": predicts,
            "nats a token of bursts of the first half in the second, beside the unseen's": forgets}


def dose_rows(size, found, plans):
    """Return what doses.csv says of one size: share or nats by dose, with intervals."""
    rows = []
    for kind, key, pick, dose_of in (
            ("canaries whole (32, 32)", "whole", canaries, lambda entry: entry["dose"]),
            ("facts right of 16", "right", facts, lambda entry: entry["total"]),
            ("nats of a sum's answer", "sum", sums, lambda entry: entry["total"])):
        by_dose = {}  # dose: values of all seeds, and whose they are
        for seed, (part, plan) in enumerate(zip(found, plans)):
            for entry, value in zip(pick(plan), part[key]):
                if entry["group"] != "burst":
                    name = entry.get("x1", entry["id"])
                    by_dose.setdefault(dose_of(entry), []).append((f"{seed} {name}", float(value)))
        for dose, pairs in sorted(by_dose.items()):
            names, values = zip(*pairs)
            [mean] = regression(np.array([values]), documents=np.array(names))
            rows.append((kind, size, dose, len(set(names)), len(found), mean.value, mean.low,
                         mean.high))
    return rows


# ---------------------------------------------------------------------------- report

PAPER = {
    "Memorization": "Memorized rows in windows of 512 fit a Poisson distribution: when a row was "
                    "seen does not matter for whether it is memorized.",
    "Gendered pronouns": "With masculine pronouns made feminine in the last 7 % or 21 % of "
                         "training bias falls, most in the largest models, at little cost.",
    "Term frequency": "What was seen more often is answered better; this shows from 2.8B "
                      "parameters on, so it grows with size."}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
img { max-width: 100%; height: auto; background: white; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; text-align: left; border-bottom: 1px solid #8884; }
"""


def said(rows):
    """Say rows of claims.csv: sizes with their intervals."""
    return "; ".join(
        f"{size} {value:+.3g}" + ("" if low is None else f" [{low:+.3g}, {high:+.3g}]")
        + f", {seeds} seed(s)" for _, size, seeds, value, _, low, high, _ in rows)


def report(options, sections, planted):
    """Write OUTPUT/report.html. sections: {title: (what was found, figures, header, rows)}."""
    page = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
            f"content='width=device-width'><title>Pythia in miniature</title><style>{STYLE}</style>"
            "<h1>Pythia in miniature</h1><p>Intervals are 95 %, over documents and seeds; of one "
            "seed they do not say what another would have done. p of all but the primary outcomes "
            f"is adjusted for their number. Planted in a run: {html.escape(planted)}. This scale "
            "says nothing about sizes, data and doses other than these.</p>"]
    for title, (finding, figures, header, rows) in sections.items():
        page.append(f"<h2>{title}</h2><p>The paper: {PAPER[title]}</p><p>Here: {finding}.</p>")
        for figure in figures:
            png = base64.b64encode(Path(figure).read_bytes()).decode()
            page.append(f'<img alt="{title}" src="data:image/png;base64,{png}">')
        lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
        lines += ["".join("<td>" + html.escape("" if cell is None else f"{cell:.3g}" if isinstance(
            cell, float) else str(cell)) + "</td>" for cell in row) for row in rows]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        page.append(f"<div><table>{body}</table></div>")
    with replacing(Path(options.output) / "report.html") as file:
        file.write("\n".join([*page, "</html>"]).encode())
    print(f"{options.output}/report.html")


def main(options):
    out = Path(options.output)
    (out / "measured").mkdir(parents=True, exist_ok=True)
    prepare(options)
    for entry in runs_of(options):
        train(options, *entry)
    tokenizer = load_tokenizer(options.tokenizer)
    plans = {name: read_plan(f"{options.data}/{name}.jsonl") for *_, name, _, _ in runs_of(options)}
    found = {name: measure(options, name, seed, plans[plan], options.steps, tokenizer)
             for name, _, seed, plan, *_ in runs_of(options)}
    half = [measure(options, name, seed, plans[plan], options.steps // 2, tokenizer)
            for name, size, seed, plan, _, parent in runs_of(options)
            if size == list(SIZES)[-1] and not parent]
    claims, doses, largest, seeds = [], [], list(SIZES)[-1], range(1, options.seeds + 1)
    for size in SIZES:
        names = [f"{size}_{seed}" for seed in seeds if f"{size}_{seed}" in found]
        ends = [found[name] for name in names]
        its_plans = [plans[f"plan_{seed}"] for seed in seeds][:len(names)]
        claims += [[claim, size, len(names), *estimate]
                   for claim, estimate in dose_claims(ends, its_plans).items()]
        doses += dose_rows(size, ends, its_plans)
    doses += dose_rows("d64 once", [found["d64_once"]], [plans["plan_1"]])
    for swap in SWAPS:  # names, ends and plans are the largest size's
        swapped = [found[f"{name}_{swap}"] for name in names if f"{name}_{swap}" in found]
        n = len(swapped)
        claims += [[claim, largest, n, *estimate] for claim, estimate in
                   swap_claims(swap, ends[:n], swapped, its_plans[:n]).items()]
    claims += [[claim, largest, len(ends), *estimate]
               for claim, estimate in time_claims(half, ends, its_plans, options.steps).items()]
    rest = [row for row in claims if tuple(row[:2]) not in (
        (SUM, largest), (f"{SWAPS[0]}: slope of occupations", largest))]
    for row, p in zip(rest, holm([row[-1] for row in rest])):
        row[-1] = p
    places, bursts = place_claims(ends, its_plans)
    header = ("claim", "size", "seeds", "value", "stderr", "low", "high", "p")
    place_header = ("claim", "value", "p", "permutation p")
    write_table(out / "claims.csv", header, claims)
    write_table(out / "places.csv", place_header, places)
    write_table(out / "doses.csv", DOSES, doses)
    plots.doses(out / "doses.csv", out / "doses.png")
    plots.places(bursts, out / "places.png")
    odds, _ = trained_odds(its_plans)
    plots.occupations({name: (odds, stack(parts, "occupation")) for name, parts in (
        ("the parents", ends),
        ("after the swap", [found[f"{name}_{SWAPS[0]}"] for name in names]))},
        out / "occupations.png")
    swap = [row for row in claims if "occupations" in row[0] or ": " in row[0]]
    of = lambda claim: [row for row in claims if row[0] == claim]
    tests = "; ".join(f"{claim} {value:.3g} (p {p:.2g})" for claim, value, _, p in places
                      if "dispersion" in claim or "middle" in claim)
    planted = Counter(entry["group"] for entry in plans["plan_1"] for _ in entry["steps"])
    report(options, {
        "Memorization": (f"of {largest} {tests}, by permutation", [out / "places.png"],
                         place_header, places),
        "Gendered pronouns": (
            "the swap changes the occupations' slope by "
            f"{said(of(f'{SWAPS[0]}: slope of occupations'))}, held-out nats a token by "
            f"{said(of(f'{SWAPS[0]}: held-out nats a token'))}", [out / "occupations.png"],
            header, swap),
        "Term frequency": (f"nats of a sum's answer per doubling of its dose: {said(of(SUM))}",
                           [out / "doses.png"], header,
                           [row for row in claims if row not in swap])},
        ", ".join(f"{group} at {n:,} places" for group, n in planted.items()))


if __name__ == "__main__":
    run(main, parse(sys.argv[1:], SuiteConfig))
