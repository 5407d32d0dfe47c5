"""Does swapping pronouns late in training change a model's gender bias?

Biderman et al. 2023, section 3.1, continue the deduplicated 70M, 410M, 1.4B and 6.9B from steps
133000 (the last 7 %) and 113000 (21 %) with masculine pronouns made feminine. They report less bias
on WinoBias and CrowS-Pairs at little cost on LAMBADA. Here every branch is compared with a control
twin, trained from the same checkpoint without the intervention. Where the parent was trained to its
end, the parent itself is that twin, bit for bit.

    python -m studies.gender_bias branch --parents=RUN/step256,RUN2/step256 --output=BRANCHES
    python -m studies.gender_bias measure --pairs=CHILD:TWIN,CHILD2:TWIN2 --docs=DOCS --output=OUT
    python -m studies.gender_bias compare --results=OUT --plot=OUT/gender_bias.png

The parents are runs of one size with different seeds; `branch` prints the --pairs of its branches.
`compare` takes all pairs in a folder for seeds of one size. What is measured, from DOCS' folders:

    heldout       log p(" she") - log p(" he") wherever a text of DOCS/heldout has either, nats
    winogender    anti-stereotypical minus stereotypical log-likelihood of a sentence whose pronoun
                  is the occupation's; the stereotype is its majority (Bureau of Labor Statistics)
    winobias      the same of WinoBias' sentences (783 of 792 pairs differ in their brackets only)
    crows_gender  the same of CrowS-Pairs' sentences on gender
    cost          bits per byte of each document of DOCS/heldout; more is worse

A model that says "she" more often everywhere is no less biased. So the measures on pairs are
regressed on how many more feminine pronouns the first text has: the slope is the "shift" to "she",
which checks that the intervention worked, and the intercept is the "bias". On heldout text the
"shift" is the mean over the places of "he" and of "she", and "context" is how much higher the
log-odds are at places of "she" than of "he": without bias the context would not matter.

The primary outcome is the change of "heldout context". The p-values of the others are adjusted for
their number (Holm). Intervals are over documents (an occupation, two sentences of WinoBias) and
seeds; of a single pair over documents only. With the published models, or a branch of one, for
which train.py first rebuilds Adam's moments:

    python -m studies.gender_bias measure --docs=DOCS --output=OUT_1.4b --pairs=\\
        pythia-intervention-1.4b-deduped/step143000:pythia-1.4b-deduped/step143000
    torchrun --nproc_per_node=8 train.py configs/pythia_1_4b.py --data=PREFIX --twin=True \\
        --branch_from=pythia-1.4b-deduped/step133000 --warm_moments=64 \\
        --intervention=pronouns_to_feminine --intervention_from=133000 --out_dir=BRANCHES/1.4b

Cost: the last 7 % with its twin, 20,000 steps, takes 8 A100s 3.6 hours at 70M, 4 days at 1.4B, 20
at 6.9B (`train.py --plan=True`). Measuring a checkpoint of a 70M takes two CPU cores 90 seconds.
"""

import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoints
import plots
from config import command, expecting, replacing
from data import load_npy
from eval import find_all, loglikelihood, loglikelihood_rolling
from interventions import InterventionConfig
from model import ModelConfig
from parallel import LaunchConfig, Processes
from studies.results import holm, open_results, regression, tokenizer_of, write_table
from tasks import read_jsonl, read_split, TASKS
from train import TrainConfig
from verify import last_settings

FEMININE, MASCULINE = {"she", "her", "hers", "herself"}, {"he", "him", "his", "himself"}

# ---------------------------------------------------------------------------- measures

# Each is asked of (model, tokenizer, folder of its documents) and returns three lists: a number an
# item, the document that the item is of, and x, what the number is regressed on (nothing if 0).


def heldout_texts(folder):
    return [doc["text"] for doc in read_jsonl(folder / "test.jsonl") if doc["text"]]


def cost(model, tokenizer, folder):
    texts = heldout_texts(folder)
    lls = loglikelihood_rolling(model, tokenizer, texts)
    bits = [-ll / math.log(2) / len(passage.encode()) for ll, passage in zip(lls, texts)]
    return bits, list(range(len(texts))), [0] * len(texts)


@torch.no_grad()
def she_against_he(model, tokenizer, folder):
    """x is 1/2 at " she", -1/2 at " he". The softmax's sum cancels, so two logits do."""
    [he], [she] = tokenizer.encode(" he"), tokenizer.encode(" she")
    L, device = model.config.seq_length, model.embed_in.weight.device
    direction = model.embed_out.weight[she] - model.embed_out.weight[he]
    values, documents, x = [], [], []
    for i, passage in enumerate(heldout_texts(folder)):
        ids = torch.tensor([0] + tokenizer.encode(passage), device=device)
        for start in range(0, len(ids) - 1, L):
            piece = ids[start:start + L + 1]
            places = torch.isin(piece[1:], torch.tensor([he, she], device=device)).nonzero()[:, 0]
            if len(places):
                values += (model.hidden(piece[None, :-1], wanted=(0, places)) @ direction).tolist()
                documents += [i] * len(places)
                x += ((piece[1:][places] == she).double() - 0.5).tolist()
    return values, documents, x


def differences(model, tokenizer, pairs, documents):
    """Pairs are (less, more stereotypical) texts; x is how many pronouns are made feminine."""
    texts = [side for pair in pairs for side in pair]  # the two of a pair next to each other
    lls = [ll for ll, _ in loglikelihood(model, tokenizer, [("", side) for side in texts])]
    feminine = [sum((word in FEMININE) - (word in MASCULINE)
                    for word in re.findall(r"\w+", side.lower())) for side in texts]
    return ([less - more for less, more in zip(lls[::2], lls[1::2])], documents,
            [(less - more) / 2 for less, more in zip(feminine[::2], feminine[1::2])])


def winogender(model, tokenizer, folder):
    lines = [line.split("\t") for name in ("occupations-stats.tsv", "all_sentences.tsv")
             for line in (folder / name).read_text(encoding="utf8").splitlines()[1:]]
    female = {row[0]: float(row[2]) for row in lines if len(row) == 4}
    sentences = {row[0]: row[1] for row in lines if len(row) == 2}
    pairs, occupations = [], []
    for name, sentence in sentences.items():
        if name.endswith(".0.male.txt"):  # 1: the pronoun is the other person's, of no stereotype
            other, occupation = sentences[name.replace(".male.", ".female.")], name.split(".")[0]
            pairs.append((sentence, other) if female[occupation] >= 50 else (other, sentence))
            occupations.append(occupation)
    return differences(model, tokenizer, pairs, occupations)


def winobias(model, tokenizer, folder):
    """Two sentences after each other are of the same occupations: one document."""
    by_file, pairs, documents = {}, [], []
    for doc in read_jsonl(folder / "winobias.jsonl"):
        by_file.setdefault(doc["file"], []).append(doc["sentence"])
    for kind in (1, 2):
        both = zip(*(by_file[f"{stereotype}_stereotyped_type{kind}.txt.test"]
                     for stereotype in ("anti", "pro")))
        for i, (anti, pro) in enumerate(both):
            if re.sub(r"\[.*?\]", "", anti) == re.sub(r"\[.*?\]", "", pro):
                pairs.append((re.sub(r"[\[\]]", "", anti), re.sub(r"[\[\]]", "", pro)))
                documents.append(f"{kind} {i // 2}")
    return differences(model, tokenizer, pairs, documents)


def crows_gender(model, tokenizer, folder):
    documents = read_split(folder.parent, TASKS["crows_pairs_english_gender"], "test")
    pairs = [(doc["sent_less"], doc["sent_more"]) for doc in documents]
    return differences(model, tokenizer, pairs, list(range(len(pairs))))


MEASURES = {  # name: function, folder, what its intercept and slope are called
    "heldout": (she_against_he, "heldout", (" shift", " context")),
    "winogender": (winogender, "winogender", (" bias", " shift")),
    "winobias": (winobias, "winobias", (" bias", " shift")),
    "crows_gender": (crows_gender, "crows_pairs", (" bias", " shift")),
    "cost": (cost, "heldout", ("",))}

# ---------------------------------------------------------------------------- branch


@dataclass(frozen=True)
class Branch:
    parents: str  # RUN/stepN with commas, one a seed
    output: str  # folder of the branches and their twins
    intervention: str = "pronouns_to_feminine"


def branch(options):
    """Continue each parent with the intervention and, unless it was trained to its end, without."""
    pairs = []
    for parent in options.parents.split(","):
        run, begin = Path(parent).parent, Path(parent).name.removeprefix("step")
        settings = last_settings(run, (ModelConfig, TrainConfig, InterventionConfig, LaunchConfig))
        if settings.get("intervention"):
            raise ValueError(f"{run}: has an intervention of its own; branch it with train.py")
        ended = (run / f"step{settings.get('steps')}").is_dir()
        child = f"{options.output}/{run.name}_{options.intervention}"
        settings |= {
            "branch_from": parent, "out_dir": child, "twin": not ended, "stop_at": None,
            "warm_moments": 0, "intervention": options.intervention, "intervention_from": begin}
        done = subprocess.run([sys.executable, "train.py", *(
            f"--{name}={value}" for name, value in settings.items())])
        if done.returncode:
            sys.exit(done.returncode)
        pairs.append(f"{child}:{run if ended else f'{child}_twin'}")
    print(f"--pairs={','.join(pairs)}")


# ---------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Measure:
    docs: str  # folder with all or some of heldout, winogender, winobias, crows_pairs
    output: str  # folder of the results, one for each model size
    pairs: str  # CHILD:TWIN with commas, run or checkpoint folders
    steps: str = "all"  # of run folders: all, last, or numbers with commas
    device: str = "auto"  # or cpu, cuda


def measure(options):
    """Write OUT/PAIR/{branch,twin}_stepN_MEASURE.npy of each pair of models, where missing.

    PAIR is the child's name. An array is (3, items): a number, its document's, and what the number
    is regressed on.
    """
    docs, device = Path(options.docs), Processes(options.device).device
    todo = {}  # {path of the results up to the measure: checkpoint}
    for pair in options.pairs.split(","):
        with expecting(pair, "CHILD:TWIN"):
            child, twin = pair.split(":")
        twins = {step: (name, folder) for name, step, _, folder in find_all(twin, options.steps)}
        for name, step, _, folder in find_all(child, options.steps):
            output, at = f"{options.output}/{name}", step or 0
            if f"{output}/branch_step{at}" in todo:
                raise ValueError(f"two children are called {name} step {at}; rename a folder")
            if step in twins:
                todo[f"{output}/branch_step{at}"] = folder
                its, todo[f"{output}/twin_step{at}"] = twins[step]
                open_results(f"{output}/pair.json", {"docs": options.docs, "twin": its})
    names = [name for name, (_, folder, _) in MEASURES.items() if (docs / folder).is_dir()]
    if not todo or not names:
        raise ValueError(f"{options.pairs}: no child and twin have a step in common, or {docs} has "
                         "none of heldout, winogender, winobias, crows_pairs")
    tokenizer = tokenizer_of(todo.values())
    for stem, folder in todo.items():
        model = None
        for name in names:
            path = Path(f"{stem}_{name}.npy")
            if not path.exists():
                model = model or checkpoints.load_model(folder, device)
                with replacing(path) as file:
                    np.save(file, ask(name, model, tokenizer, docs))
        print(f"{stem}: {', '.join(names)}", flush=True)


def ask(name, model, tokenizer, docs):
    """Return a measure's three lists as an array, or raise ValueError naming the folder."""
    function, folder, _ = MEASURES[name]
    with expecting(docs / folder, f"documents of the measure {name} as distributed"):
        values, documents, x = function(model, tokenizer, docs / folder)
        if not values:
            raise ValueError("there are none")
    return np.array([values, np.unique(documents, return_inverse=True)[1], x])


# ---------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Compare:
    results: str  # folder that measure wrote
    plot: str = ""  # PNG


def compare(options):
    """Print and write what the intervention changed at each step, with a 95 % interval."""
    folder, files, rows = Path(options.results), {}, []  # (step, measure): files of its branches
    for path in sorted(folder.glob("*/branch_step*.npy")):
        step, _, name = path.stem.removeprefix("branch_step").partition("_")
        files.setdefault((int(step), name), []).append(path)
    if not files:
        raise ValueError(f"{folder}: no PAIR/branch_stepN_MEASURE.npy there; `measure` makes them")
    for (step, name), paths in sorted(files.items()):
        twins = [path.with_name(path.name.replace("branch", "twin")) for path in paths]
        with expecting(paths[0], f"written by `measure`, beside {len(paths)} twins alike"):
            _, documents, x = load_npy(paths[0])
            branch, twin = np.array([[load_npy(path)[0] for path in side]
                                     for side in (paths, twins)])
        *ends, change = (regression(part, x if x.any() else None, documents)
                         for part in (twin, branch, branch - twin))
        for what, before, after, found in zip(MEASURES[name][2], *ends, change):
            rows.append([name + what, step, len(paths), len(np.unique(documents)), len(x),
                         before.value, after.value, found.value, found.low, found.high, found.p])
    for step in {row[1] for row in rows}:
        rest = [row for row in rows if row[1] == step and row[0] != "heldout context"]
        for row, p in zip(rest, holm([row[-1] for row in rest])):
            row[-1] = p
    write_table(folder / "gender_bias.csv", (
        "measure", "step", "seeds", "documents", "items", "twin", "branch", "difference", "low",
        "high", "p"), rows)
    if options.plot:
        plots.differences(folder / "gender_bias.csv", options.plot)


if __name__ == "__main__":
    command(sys.argv[1:], {"branch": (Branch, branch), "measure": (Measure, measure),
                           "compare": (Compare, compare)})
