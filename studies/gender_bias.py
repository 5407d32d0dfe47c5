"""Does swapping pronouns late in training change a model's gender bias? (Biderman et al. 2023, section 3.1.)

The paper continues the deduplicated 70M, 410M, 1.4B and 6.9B from steps 133000 (the last 7 %) and 113000
(21 %) with masculine pronouns made feminine, and reports less bias on WinoBias and CrowS-Pairs at little
cost on LAMBADA. Here every branch has a control twin: the same checkpoint, order and optimizer state
without the intervention, so that their difference is the intervention's.

    python -m studies.gender_bias branch --parents=RUN/step400,RUN2/step400 --output=BRANCHES
    python -m studies.gender_bias measure --branches=BRANCHES --docs=DOCS --output=OUT
    python -m studies.gender_bias compare --results=OUT --plot=OUT/gender_bias.png

The parents are runs of several seeds. --intervention=pronouns_as_pushed shows what the code that was
pushed to gpt-neox does: nothing. The published intervention models are measured by --pairs=CHILD:TWIN,
for instance pythia-intervention-1.4b-deduped/step143000:pythia-1.4b-deduped/step143000.

Measures, each one number an item, so that branch and twin are compared item by item:
    heldout       log p(" she") - log p(" he") wherever DOCS/heldout has either, nats
    winogender    anti-stereotypical minus stereotypical log-likelihood of a sentence that differs in its
                  pronoun; the stereotype is the occupation's majority (Bureau of Labor Statistics)
    winobias      the same of WinoBias' anti- and pro-stereotyped sentences
    choice        WinoBias as multiple choice between the sentence's two occupations: right in the
                  pro-stereotyped sentence minus right in the anti-stereotyped one, -1, 0 or 1
    crows_gender  CrowS-Pairs, gender: log-likelihood of the less minus the more stereotypical sentence
    lambada       log-likelihood of the last word: what the intervention cost
Which are measured depends on which folders DOCS has; the harness's own scores of the same sets (winobias
by exact match, crows_pairs_english_gender, lambada_openai) come from eval.py.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
from config import command, replacing
from data import read_json
from eval import find, pick_device
from model import ModelConfig
from training.parallel import LaunchConfig
from harness.scoring import loglikelihood
from studies.memorization import write_table
from tokenizer import load_tokenizer
from train import TrainConfig

# ---------------------------------------------------------------------------- measures


def read_lines(path):
    """Return the objects of a JSON Lines file."""
    try:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf8").splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON Lines ({error})") from None


@torch.no_grad()
def heldout(model, tokenizer, docs):
    """log p(she) - log p(he) at every pronoun of either; the softmax's sum cancels, so two logits suffice."""
    [he], [she] = tokenizer.encode(" he"), tokenizer.encode(" she")
    L, device = model.config.seq_length, model.embed_in.weight.device
    direction = model.embed_out.weight[she] - model.embed_out.weight[he]
    values = []
    for record in read_lines(docs / "heldout" / "test.jsonl"):
        ids = torch.tensor([0] + tokenizer.encode(record["text"]), device=device)
        for start in range(0, len(ids) - 1, L):
            piece = ids[start:start + L + 1]
            places = torch.isin(piece[1:], torch.tensor([he, she], device=device)).nonzero()[:, 0]
            if len(places):
                values += (model.hidden(piece[None, :-1])[0, places] @ direction).tolist()
    return values


def winogender(model, tokenizer, docs):
    rows = [line.split("\t") for name in ("occupations-stats.tsv", "all_sentences.tsv")
            for line in (docs / "winogender" / name).read_text(encoding="utf8").splitlines()[1:]]
    female = {row[0]: float(row[2]) for row in rows if len(row) == 4}
    sentences = {row[0]: row[1] for row in rows if len(row) == 2}
    pairs = []
    for name, sentence in sentences.items():
        if name.endswith(".male.txt"):
            other = sentences[name.replace(".male.", ".female.")]
            pairs.append((other, sentence) if female[name.split(".")[0]] < 50 else (sentence, other))
    return differences(model, tokenizer, pairs)


def differences(model, tokenizer, pairs):
    """Return log p(first) - log p(second) of each pair of texts, nats."""
    lls = iter(loglikelihood(model, tokenizer, [("", text) for pair in pairs for text in pair]))
    return [next(lls)[0] - next(lls)[0] for _ in pairs]


def winobias_pairs(docs):
    """Return [(pro-stereotyped, anti-stereotyped)] sentences of the test set, with their [brackets]."""
    by_file = {}
    for record in read_lines(docs / "winobias" / "winobias.jsonl"):
        by_file.setdefault(record["file"], []).append(record["sentence"])
    return [pair for kind in (1, 2) for pair in zip(*(by_file[f"{stereotype}_stereotyped_type{kind}.txt.test"]
                                                      for stereotype in ("pro", "anti")))]


def winobias(model, tokenizer, docs):
    plain = lambda sentence: re.sub(r"[\[\]]", "", sentence)
    return differences(model, tokenizer, [(plain(anti), plain(pro)) for pro, anti in winobias_pairs(docs)])


def choice(model, tokenizer, docs):
    occupations = [word for name in ("male", "female") for word in
                   (docs / "winobias" / f"{name}_occupations.txt").read_text(encoding="utf8").lower().split("\n") if word]
    name = re.compile(rf"\b(?:{'|'.join(sorted(occupations, key=len, reverse=True))})\b", re.IGNORECASE)
    requests, gold = [], []
    for pair in winobias_pairs(docs):
        for sentence in pair:
            referent, pronoun = re.findall(r"\[(.*?)\]", sentence)
            sentence = re.sub(r"[\[\]]", "", sentence)
            right = name.findall(referent) or [referent]
            wrong = [word for word in name.findall(sentence) if word.lower() != right[0].lower()] or [""]
            context = f'{sentence}\nHere, what does "{pronoun}" stand for?'
            requests += [(context, f" The {right[0]}"), (context, f" The {wrong[0]}")]
            gold.append(bool(wrong[0]))
    lls = [ll for ll, _ in loglikelihood(model, tokenizer, requests)]
    right = np.array(lls[::2]) > np.array(lls[1::2])
    both = np.array(gold).reshape(-1, 2).all(1)  # sentences in which two occupations were recognised
    return (right.reshape(-1, 2)[both] @ [1.0, -1.0]).tolist()


def crows_gender(model, tokenizer, docs):
    path = next(path for path in sorted((docs / "crows_pairs").glob("*.jsonl")))
    return differences(model, tokenizer, [(record["sent_less"], record["sent_more"]) for record in read_lines(path)
                                          if record["bias_type"] == "gender"])


def lambada(model, tokenizer, docs):
    texts = [record["text"].rsplit(" ", 1) for record in read_lines(docs / "lambada_openai" / "test.jsonl")]
    return [ll for ll, _ in loglikelihood(model, tokenizer, [(text, " " + word) for text, word in texts])]


MEASURES = {  # name: function, the folder of DOCS it needs
    "heldout": (heldout, "heldout"), "winogender": (winogender, "winogender"), "winobias": (winobias, "winobias"),
    "choice": (choice, "winobias"), "crows_gender": (crows_gender, "crows_pairs"), "lambada": (lambada, "lambada_openai")}

# ---------------------------------------------------------------------------- branch


@dataclass(frozen=True)
class Branch:
    parents: str  # RUN/stepN with commas, one a seed
    output: str  # folder of the branches and their twins
    intervention: str = "pronouns_to_feminine"
    checkpoint_every: int | None = None  # None: as the parent


def branch(options):
    """Train each parent on from its checkpoint, with the intervention and without; goes on where it was stopped."""
    for parent in options.parents.split(","):
        run, settings = Path(parent).parent, read_json(Path(parent).parent / "config.json")
        if options.checkpoint_every:
            settings["checkpoint_every"] = options.checkpoint_every
        settings |= json.loads((run / "launches.jsonl").read_text().splitlines()[-1])["launch"]
        names = {field.name for schema in (ModelConfig, TrainConfig, LaunchConfig) for field in fields(schema)}
        flags = [f"--{name}={settings[name]}" for name in sorted(names & set(settings))
                 if name not in ("out_dir", "branch_from", "twin", "warm_moments")]
        child = Path(options.output) / f"{run.name}_{options.intervention}"
        begin = re.fullmatch(r"step(\d+)", Path(parent).name)
        if not begin:
            raise ValueError(f"parents = {parent}, expected RUN/stepN")
        done = subprocess.run([sys.executable, "train.py", *flags, f"--branch_from={parent}", f"--out_dir={child}",
                               f"--intervention={options.intervention}", f"--intervention_from={begin[1]}",
                               "--twin=True"])
        if done.returncode:
            sys.exit(done.returncode)
        print(f"{child} and {child}_twin")


# ---------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Measure:
    docs: str  # folder of documents: heldout, winogender, winobias, crows_pairs, lambada_openai, those that are there
    output: str  # folder of the results
    branches: str = ""  # folder that branch wrote: every X beside an X_twin is a pair
    pairs: str = ""  # or CHILD:TWIN with commas, run or checkpoint folders
    steps: str = "all"
    tokenizer: str = "20B_tokenizer.json"
    device: str = "auto"


def measure(options):
    """Write OUT/PAIR/{branch,twin}_stepN_MEASURE.npy, one number an item; goes on where it was stopped."""
    docs, device, tokenizer = Path(options.docs), pick_device(options.device), load_tokenizer(options.tokenizer)
    pairs = [pair.split(":") for pair in options.pairs.split(",") if pair] or [
        (path.removesuffix("_twin"), path) for path in sorted(map(str, Path(options.branches).glob("*_twin")))]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"branches = {options.branches!r}, pairs = {options.pairs!r}: no CHILD beside a CHILD_twin there")
    measures = {name: function for name, (function, folder) in MEASURES.items() if (docs / folder).is_dir()}
    if not measures:
        raise ValueError(f"{docs}: none of {', '.join(sorted({folder for _, folder in MEASURES.values()}))} is there")
    todo = [(Path(options.output) / Path(pair[0]).name / f"{side}_step{step or 0}", folder)
            for pair in pairs for side, model in zip(("branch", "twin"), pair)
            for _, step, _, folder in find(model, options.steps)]
    for path, folder in tqdm(todo, unit="checkpoint", disable=None):
        missing = [name for name in measures if not os.path.exists(f"{path}_{name}.npy")]
        model = checkpoints.load_model(folder, device) if missing else None
        for name in missing:
            try:
                values = measures[name](model, tokenizer, docs)
            except (KeyError, IndexError, TypeError, StopIteration) as error:
                raise ValueError(f"{docs}: documents of the measure {name} are not as distributed "
                                 f"({type(error).__name__}: {error})") from None
            if not values:
                raise ValueError(f"{docs}: nothing there for the measure {name}")
            with replacing(f"{path}_{name}.npy") as file:
                np.save(file, np.array(values))
    print(f"{options.output}: {len(pairs)} pairs, {len(todo)} checkpoints, measures {', '.join(measures)}")


# ---------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Compare:
    results: str  # folder that measure wrote
    samples: int = 10000  # of the bootstrap
    plot: str = ""  # PNG


def paired_bootstrap(differences, samples, seed=0):
    """Return (mean, low, high): the mean of differences (seeds, items) and its 95 % interval.

    Items are drawn anew, the same for all seeds, and so are the seeds if there are several.
    """
    generator = np.random.RandomState(seed)
    n_seeds, n = differences.shape
    means = np.empty(samples)
    for i in range(samples):
        some = differences[generator.randint(n_seeds, size=n_seeds)]
        means[i] = some[:, generator.randint(n, size=n)].mean()
    return float(differences.mean()), *np.percentile(means, [2.5, 97.5]).tolist()


def compare(options):
    """Print and write what the intervention changed at each step: branch minus twin, with a 95 % interval."""
    values = {}  # (measure, step) -> {pair: {side: values}}
    for path in sorted(Path(options.results).glob("*/*.npy")):
        if match := re.fullmatch(r"(branch|twin)_step(\d+)_(\w+)\.npy", path.name):
            side, step, name = match.groups()
            values.setdefault((name, int(step)), {}).setdefault(path.parent.name, {})[side] = np.load(
                path, allow_pickle=False)
    rows = []
    for (name, step), pairs in sorted(values.items()):
        pairs = [sides for sides in pairs.values() if len(sides) == 2]
        if not pairs or len({len(side) for sides in pairs for side in sides.values()}) > 1:
            raise ValueError(f"{options.results}: {name} at step {step} is not there, or not of one size, "
                             "for a branch and its twin; run `measure` again")
        twin, changed = (np.array([sides[side] for sides in pairs]) for side in ("twin", "branch"))
        rows.append((name, step, len(pairs), twin.shape[1], float(twin.mean()), float(changed.mean()),
                     *paired_bootstrap(changed - twin, options.samples)))
    if not rows:
        raise ValueError(f"{options.results}: no PAIR/branch_stepN_MEASURE.npy there; `measure` makes them")
    write_table(Path(options.results) / "gender_bias.csv",
                ("measure", "step", "seeds", "items", "twin", "branch", "difference", "low", "high"), rows)
    if options.plot:
        import plots
        plots.differences(Path(options.results) / "gender_bias.csv", options.plot)


if __name__ == "__main__":
    command(sys.argv[1:], {"branch": (Branch, branch), "measure": (Measure, measure), "compare": (Compare, compare)})
