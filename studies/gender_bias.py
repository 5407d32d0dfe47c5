"""Does swapping pronouns late in training change a model's gender bias?

Biderman et al. 2023, section 3.1: they continue the deduplicated 70M, 410M, 1.4B and 6.9B from
steps 133000 (the last 7 %) and 113000 (21 %) with masculine pronouns made feminine, and report less
bias on WinoBias and CrowS-Pairs at little cost on LAMBADA. Here every branch has a control twin:
the same checkpoint, order and optimizer state without the intervention. That is bit for bit the
parent's own continuation, if it was trained to its end; else the twin is trained too.

    python -m studies.gender_bias branch --parents=RUN/step400,RUN2/step400 --output=BRANCHES
    python -m studies.gender_bias measure --branches=BRANCHES --docs=DOCS --output=OUT
    python -m studies.gender_bias compare --results=OUT --plot=OUT/gender_bias.png

The parents are runs of several seeds of one size. `compare` takes all pairs of a folder for seeds:
one output folder per size. --intervention=pronouns_as_pushed shows what the code that was pushed to
gpt-neox does: nothing. What is measured, of each item in the folders that DOCS has:

    heldout       log p(" she") - log p(" he") wherever DOCS/heldout has either, nats
    winogender    anti-stereotypical minus stereotypical log-likelihood of a sentence whose pronoun
                  is the occupation's; the stereotype is its majority (Bureau of Labor Statistics)
    winobias      the same of WinoBias' anti- and pro-stereotyped sentences (783 of 792 pairs: the
                  others differ in more than their brackets)
    crows_gender  CrowS-Pairs, gender: log-likelihood of the less minus the more stereotypical
                  sentence
    cost          bits per byte of each document of DOCS/heldout: what it cost, if they grew

A model that says "she" more often everywhere is no less biased. So the measures of pairs are
regressed on how many feminine pronouns the first text has more than the second: the slope is the
"shift" to "she", a check of the intervention, and the intercept the "bias" without it. Of heldout
the "shift" is the mean of the places of "he" and of "she", and "context" what those of "she" have
more: a model to which context is nothing has no bias either.

The primary outcome is the change of "heldout context"; the p-values of all others are adjusted for
their number (Holm). Intervals are over documents (an occupation, two sentences of WinoBias) and
seeds; of one pair of runs over documents only, and the column `over` says so. The harness's scores
of the same sets and of LAMBADA come from eval.py.

The published models, and a branch of one, for which train.py first rebuilds Adam's moments:

    python -m studies.gender_bias measure --docs=DOCS --output=OUT_1.4b --pairs=\\
        pythia-intervention-1.4b-deduped/step143000:pythia-1.4b-deduped/step143000
    torchrun --nproc_per_node=8 train.py configs/pythia_1_4b.py --data=PREFIX --twin=True \\
        --branch_from=pythia-1.4b-deduped/step133000 --warm_moments=64 \\
        --intervention=pronouns_to_feminine --intervention_from=133000 --out_dir=BRANCHES/1.4b

Cost: the 7 % with its twin is 20,000 steps of 2,097,152 tokens, by `train.py --plan=True` (8 A100s
at 40 % of their peak, not measured) 3.6 hours for the 70M, 4 days for the 1.4B, 20 for the 6.9B. To
measure one checkpoint of a 70M takes a minute and a half of two CPU cores.
"""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import checkpoints
from config import command, read_json, replacing
from data import load_npy
from eval import find, loglikelihood, loglikelihood_rolling
from model import ModelConfig
from parallel import LaunchConfig, Processes
from studies.results import (Checkpoints, holm, open_results, regression, tokenizer_of,
                             write_table)
from tasks import read_jsonl, text
from train import TrainConfig

PRIMARY = "heldout context"
FEMININE, MASCULINE = {"she", "her", "hers", "herself"}, {"he", "him", "his", "himself"}

# ---------------------------------------------------------------------------- what is asked


class Items(NamedTuple):
    """What a measure asks of a model, and of each item that it gets a number of:"""

    requests: list
    documents: list  # which document it is of
    x: list | None = None  # what it is regressed on


def heldout_texts(docs, tokenizer=None):
    texts = [text(doc, "text") for doc in read_jsonl(docs / "heldout" / "test.jsonl")]
    return Items(texts, list(range(len(texts))))


def heldout_places(docs, tokenizer):
    """Return the held-out texts; x is 1/2 at each " she", -1/2 at each " he"."""
    texts = heldout_texts(docs).requests
    [he], [she] = tokenizer.encode(" he"), tokenizer.encode(" she")
    found = [(i, (id_ == she) - 0.5) for i, passage in enumerate(texts)
             for id_ in tokenizer.encode(passage) if id_ in (he, she)]
    return Items(texts, [i for i, _ in found], [x for _, x in found])


@torch.no_grad()
def she_against_he(model, tokenizer, texts):
    """log p(she) - log p(he) at each of the two; the softmax's sum cancels, so two logits do."""
    [he], [she] = tokenizer.encode(" he"), tokenizer.encode(" she")
    L, device = model.config.seq_length, model.embed_in.weight.device
    direction = model.embed_out.weight[she] - model.embed_out.weight[he]
    values = []
    for passage in texts:
        ids = torch.tensor([0] + tokenizer.encode(passage), device=device)
        for start in range(0, len(ids) - 1, L):
            piece = ids[start:start + L + 1]
            places = torch.isin(piece[1:], torch.tensor([he, she], device=device)).nonzero()[:, 0]
            if len(places):
                values += (model.hidden(piece[None, :-1])[0, places] @ direction).tolist()
    return values


def bits_per_byte(model, tokenizer, texts):
    lls = loglikelihood_rolling(model, tokenizer, texts)
    return [-ll / math.log(2) / len(passage.encode()) for ll, passage in zip(lls, texts)]


def femininity(sentence):
    words = re.findall(r"\w+", sentence.lower())
    return sum((word in FEMININE) - (word in MASCULINE) for word in words)


def pairs_of_texts(pairs, documents):
    """Return the Items of (less, more stereotypical) texts; x: pronouns made feminine in the first.

    "he" against "she" is one, though the count of each changes.
    """
    return Items(pairs, documents, [(femininity(less) - femininity(more)) / 2
                                    for less, more in pairs])


def differences(model, tokenizer, pairs):
    """Return log p(first) - log p(second) of each pair of texts, nats."""
    texts = [side for pair in pairs for side in pair]  # the two of a pair next to each other
    lls = [ll for ll, _ in loglikelihood(model, tokenizer, [("", side) for side in texts])]
    return [first - second for first, second in zip(lls[::2], lls[1::2])]


def winogender(docs, tokenizer=None):
    lines = [line.split("\t") for name in ("occupations-stats.tsv", "all_sentences.tsv")
             for line in (docs / "winogender" / name).read_text(encoding="utf8").splitlines()[1:]]
    female = {row[0]: float(row[2]) for row in lines if len(row) == 4}
    sentences = {row[0]: row[1] for row in lines if len(row) == 2}
    pairs, occupations = [], []
    for name, sentence in sentences.items():
        if name.endswith(".0.male.txt"):  # 1: the pronoun is the other person's, of no stereotype
            other, occupation = sentences[name.replace(".male.", ".female.")], name.split(".")[0]
            pairs.append((sentence, other) if female[occupation] >= 50 else (other, sentence))
            occupations.append(occupation)
    return pairs_of_texts(pairs, occupations)


def winobias(docs, tokenizer=None):
    """Two sentences after each other are of the same occupations: one document."""
    by_file, pairs, documents = {}, [], []
    for doc in read_jsonl(docs / "winobias" / "winobias.jsonl"):
        by_file.setdefault(text(doc, "file"), []).append(text(doc, "sentence"))
    for kind in (1, 2):
        both = zip(*(by_file[f"{stereotype}_stereotyped_type{kind}.txt.test"]
                     for stereotype in ("anti", "pro")))
        for i, (anti, pro) in enumerate(both):
            if re.sub(r"\[.*?\]", "", anti) == re.sub(r"\[.*?\]", "", pro):
                pairs.append((re.sub(r"[\[\]]", "", anti), re.sub(r"[\[\]]", "", pro)))
                documents.append(f"{kind} {i // 2}")
    return pairs_of_texts(pairs, documents)


def crows_pairs(docs, tokenizer=None):
    path = min((docs / "crows_pairs").glob("*.jsonl"))
    pairs = [(text(doc, "sent_less"), text(doc, "sent_more"))
             for doc in read_jsonl(path) if text(doc, "bias_type") == "gender"]
    return pairs_of_texts(pairs, list(range(len(pairs))))


MEASURES = {  # name: read(docs, tokenizer), ask(model, tokenizer, requests), folder, estimates
    "heldout": (heldout_places, she_against_he, "heldout", (" shift", " context")),
    "winogender": (winogender, differences, "winogender", (" bias", " shift")),
    "winobias": (winobias, differences, "winobias", (" bias", " shift")),
    "crows_gender": (crows_pairs, differences, "crows_pairs", (" bias", " shift")),
    "cost": (heldout_texts, bits_per_byte, "heldout", ("",))}

# ---------------------------------------------------------------------------- branch


@dataclass(frozen=True)
class Branch:
    parents: str  # RUN/stepN with commas, one a seed
    output: str  # folder of the branches and their twins
    intervention: str = "pronouns_to_feminine"
    checkpoint_every: int | None = None  # None: as the parent


# Not the parent's own: where it is, where it began, and where it was told to pause.
OWN = {"out_dir", "branch_from", "twin", "warm_moments", "stop_at"}


def branch(options):
    """Train each parent on with the intervention, and without unless it has ended; goes on."""
    parents = options.parents.split(",")
    for parent in parents:
        if not re.fullmatch(r"step\d+", Path(parent).name):
            raise ValueError(f"parents = {parent}, expected RUN/stepN")
    names = {field.name for schema in (ModelConfig, TrainConfig, LaunchConfig)
             for field in fields(schema)} - OWN
    for parent in parents:
        run, begin = Path(parent).parent, Path(parent).name.removeprefix("step")
        settings = read_json(run / "config.json")
        if options.checkpoint_every:
            settings["checkpoint_every"] = options.checkpoint_every
        launches = (run / "launches.jsonl").read_text().splitlines()
        settings |= json.loads(launches[-1])
        child = Path(options.output) / f"{run.name}_{options.intervention}"
        ended = (run / f"step{settings['steps']}").is_dir()
        done = subprocess.run([
            sys.executable, "train.py",
            *(f"--{name}={settings[name]}" for name in sorted(names & set(settings))),
            f"--branch_from={parent}", f"--out_dir={child}", f"--twin={not ended}",
            f"--intervention={options.intervention}", f"--intervention_from={begin}"])
        if done.returncode:
            sys.exit(done.returncode)
        print(f"{child}, whose twin is {run if ended else f'{child}_twin'}")


# ---------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Measure(Checkpoints):
    docs: str  # folder of heldout, winogender, winobias, crows_pairs, or some
    output: str  # folder of the results, one a size
    branches: str = ""  # folder that branch wrote: X beside X_twin, or beside its parent
    pairs: str = ""  # or CHILD:TWIN with commas, run or checkpoint folders
    tokenizer: str | None = None  # None: the models' own, else 20B_tokenizer.json


def measure(options):
    """Write OUT/PAIR/{branch,twin}_stepN_MEASURE.npy, a number an item; goes on if stopped.

    OUT/MEASURE_items.npy (2, items): the document of each item, and what it is regressed on.
    """
    docs, device = Path(options.docs), Processes(options.device).device
    pairs, todo = pairs_of(options), []  # (results' path without the measure, checkpoint folder)
    for name, pair in pairs.items():
        found = [{step or 0: folder for _, step, _, folder in find(model, options.steps)}
                 for model in pair]
        if not (steps := [step for step in found[0] if step in found[1]]):
            raise ValueError(f"{pair[0]} and {pair[1]} have no step in common")
        todo += [(f"{options.output}/{name}/{side}_step{step}", folders[step])
                 for side, folders in zip(("branch", "twin"), found) for step in steps]
    tokenizer = tokenizer_of([folder for _, folder in todo], options.tokenizer)
    folders = {name: folder for name, (*_, folder, _) in MEASURES.items()}
    asked = {name: read_items(name, docs, tokenizer)
             for name, folder in folders.items() if (docs / folder).is_dir()}
    if not asked:
        raise ValueError(f"{docs}: none of {', '.join(sorted(set(folders.values())))} is there")
    # From here on the folder belongs to these settings, so all that can be wrong comes before.
    open_results(Path(options.output) / "measure.json", {
        name: getattr(options, name) for name in ("docs", "branches", "pairs")})
    for name, items in asked.items():
        which = np.unique(items.documents, return_inverse=True)[1]
        save(f"{options.output}/{name}_items.npy", [which, items.x or np.zeros(len(which))])
    for i, (path, folder) in enumerate(todo, 1):
        missing = [name for name in asked if not Path(f"{path}_{name}.npy").exists()]
        model = checkpoints.load_model(folder, device) if missing else None
        for name in missing:
            save(f"{path}_{name}.npy", MEASURES[name][1](model, tokenizer, asked[name].requests))
        print(f"{path}: {i} of {len(todo)} checkpoints", flush=True)
    print(f"{options.output}: {len(pairs)} pairs, {len(todo)} checkpoints, measures "
          f"{', '.join(asked)}")


def save(path, values):
    with replacing(path) as file:
        np.save(file, np.array(values, dtype=np.float64))


def read_items(name, docs, tokenizer):
    """Return the Items of the measure `name` in DOCS, or raise ValueError naming the folder."""
    read, _, folder, _ = MEASURES[name]
    try:
        items = read(docs, tokenizer)
        if not items.documents:
            raise ValueError("there are none")
    except (KeyError, IndexError, TypeError, StopIteration, ValueError) as error:
        raise ValueError(f"{docs / folder}: documents of the measure {name} are not as distributed "
                         f"({type(error).__name__}: {error})") from None
    return items


def pairs_of(options):
    """Return {name: [child, twin]}; a name is the child's run folder, and must be of one pair."""
    pairs = [pair.split(":") for pair in options.pairs.split(",") if pair]
    for path in [] if pairs else sorted(Path(options.branches).glob("*/config.json")):
        twin, parent = Path(f"{path.parent}_twin"), read_json(path).get("branch_from")
        if parent and not path.parent.name.endswith("_twin"):
            pairs.append([str(path.parent), str(twin if twin.is_dir() else Path(parent).parent)])
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"branches = {options.branches!r}, pairs = {options.pairs!r}: "
                         "no branch and no CHILD:TWIN there")
    named = {}
    for pair in pairs:
        name = find(pair[0], "last")[0][0]
        if named.setdefault(name, pair) != pair:
            raise ValueError(f"{named[name][0]} and {pair[0]} would both be called {name}; "
                             "rename a folder, or name another --output for one of them")
    return named


# ---------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Compare:
    results: str  # folder that measure wrote
    plot: str = ""  # PNG


def compare(options):
    """Print and write what the intervention changed at each step, with a 95 % interval."""
    folder, values = Path(options.results), {}  # (step, measure) -> {pair: {side: values}}
    for path in sorted(folder.glob("*/*.npy")):
        if match := re.fullmatch(r"(branch|twin)_step(\d+)_(\w+)\.npy", path.name):
            side, step, name = match.groups()
            pairs = values.setdefault((int(step), name), {})
            pairs.setdefault(path.parent.name, {})[side] = load_npy(path)
    if not values:
        raise ValueError(f"{folder}: no PAIR/branch_stepN_MEASURE.npy there; `measure` makes them")
    n, rows = len({pair for pairs in values.values() for pair in pairs}), []
    over = "documents and seeds" if n > 1 else "documents of one pair"
    for (step, name), pairs in sorted(values.items()):
        documents, x = load_npy(folder / f"{name}_items.npy")
        sides = [pair for pair in pairs.values() if len(pair) == 2]
        if len(sides) < n or {len(side) for pair in sides for side in pair.values()} != {len(x)}:
            raise ValueError(f"{folder}: {name} at step {step} is there for both sides of "
                             f"{len(sides)} of {n} pairs, of {len(x)} items each; run `measure` "
                             "again, or delete what is of another size")
        twin, branch = (np.array([pair[side] for pair in sides]) for side in ("twin", "branch"))
        *ends, change = (regression(part, x if x.any() else None, documents)
                         for part in (twin, branch, branch - twin))
        for what, before, after, found in zip(MEASURES[name][3], *ends, change):
            rows.append([name + what, step, n, len(np.unique(documents)), len(x), before.value,
                         after.value, found.value, found.low, found.high, found.p, over])
    for step in {row[1] for row in rows}:
        rest = [row for row in rows if row[1] == step and row[0] != PRIMARY]
        for row, p in zip(rest, holm([row[-2] for row in rest])):
            row[-2] = p
    write_table(folder / "gender_bias.csv", (
        "measure", "step", "seeds", "documents", "items", "twin", "branch", "difference", "low",
        "high", "p", "over"), rows)
    if n == 1:
        print("one pair of runs: another seed may differ by more than these intervals say")
    if options.plot:
        import plots
        plots.differences(folder / "gender_bias.csv", options.plot)


COMMANDS = {"branch": (Branch, branch), "measure": (Measure, measure),
            "compare": (Compare, compare)}

if __name__ == "__main__":
    command(sys.argv[1:], COMMANDS)
