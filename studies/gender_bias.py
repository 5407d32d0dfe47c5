"""Does swapping pronouns late in training change a model's gender bias?

Biderman et al. 2023, section 3.1: they continue the deduplicated 70M, 410M, 1.4B and 6.9B from
steps 133000 (the last 7 %) and 113000 (21 %) with masculine pronouns made feminine, and report less
bias on WinoBias and CrowS-Pairs at little cost on LAMBADA. Here every branch has a control twin:
the same checkpoint, order and optimizer state without the intervention, so that their difference is
the intervention's.

    python -m studies.gender_bias branch --parents=RUN/step400,RUN2/step400 --output=BRANCHES
    python -m studies.gender_bias measure --branches=BRANCHES --docs=DOCS --output=OUT
    python -m studies.gender_bias compare --results=OUT --plot=OUT/gender_bias.png

The parents are runs of several seeds of one size. `compare` takes all pairs of a folder for seeds:
one output folder per size. --intervention=pronouns_as_pushed shows what the code that was pushed to
gpt-neox does: nothing. studies/gender_measures.py says what is measured; the harness's own scores
of the same sets (winobias by exact match, crows_pairs_english_gender, lambada_openai) come from
eval.py.

The published intervention models, beside the models they were made from:

    python -m studies.gender_bias measure --docs=DOCS --output=OUT_1.4b --pairs=\\
        pythia-intervention-1.4b-deduped/step143000:pythia-1.4b-deduped/step143000

A published model comes without Adam's moments, and without a run to take settings from: it is
branched by train.py itself, which first rebuilds the moments, the same for the twin.

    torchrun --nproc_per_node=8 train.py configs/pythia_1_4b.py --data=PREFIX --twin=True \\
        --branch_from=pythia-1.4b-deduped/step133000 --warm_moments=64 \\
        --intervention=pronouns_to_feminine --intervention_from=133000 --out_dir=BRANCHES/1.4b

Cost: the 7 % with its twin is 20,000 steps of 2,097,152 tokens, by `train.py --plan=True` (8 A100s
at 40 % of their peak, not measured) 3.6 hours for the 70M, 4 days for the 1.4B, 20 for the 6.9B. To
measure one checkpoint of a 70M takes 4 minutes of two CPU cores, 2.6 of them for LAMBADA.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

import checkpoints
from config import command, read_json, replacing
from data import load_npy
from eval import find
from model import ModelConfig
from parallel import LaunchConfig, Processes
from studies.gender_measures import MEASURES
from studies.results import Checkpoints, open_results, paired_bootstrap, write_table
from tokenizer import load_tokenizer
from train import TrainConfig

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
    """Train each parent on, with the intervention and without; goes on where it was stopped."""
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
        settings |= json.loads(launches[-1])["launch"]
        child = Path(options.output) / f"{run.name}_{options.intervention}"
        done = subprocess.run([
            sys.executable, "train.py",
            *(f"--{name}={settings[name]}" for name in sorted(names & set(settings))),
            f"--branch_from={parent}", f"--out_dir={child}", "--twin=True",
            f"--intervention={options.intervention}", f"--intervention_from={begin}"])
        if done.returncode:
            sys.exit(done.returncode)
        print(f"{child} and {child}_twin")


# ---------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Measure(Checkpoints):
    docs: str  # folder of heldout, winogender, winobias, crows_pairs, lambada_openai, or some
    output: str  # folder of the results, one a size
    branches: str = ""  # folder that branch wrote: every X beside an X_twin is a pair
    pairs: str = ""  # or CHILD:TWIN with commas, run or checkpoint folders
    tokenizer: str = "20B_tokenizer.json"


def measure(options):
    """Write OUT/PAIR/{branch,twin}_stepN_MEASURE.npy, a number an item; goes on if stopped."""
    docs, device = Path(options.docs), Processes(options.device).device
    tokenizer, pairs = load_tokenizer(options.tokenizer), pairs_of(options)
    measures = [name for name, (*_, folder) in MEASURES.items() if (docs / folder).is_dir()]
    if not measures:
        folders = sorted({folder for *_, folder in MEASURES.values()})
        raise ValueError(f"{docs}: none of {', '.join(folders)} is there")
    documents = {name: read_documents(name, docs) for name in measures}
    todo = []  # (results' path without the measure, checkpoint folder)
    for name, pair in pairs.items():
        for side, model in zip(("branch", "twin"), pair):
            todo += [(f"{options.output}/{name}/{side}_step{step or 0}", folder)
                     for _, step, _, folder in find(model, options.steps)]
    # From here on the folder belongs to these settings, so all that can be wrong comes before.
    open_results(Path(options.output) / "measure.json", {
        name: getattr(options, name) for name in ("docs", "branches", "pairs")})
    for i, (path, folder) in enumerate(todo, 1):
        missing = [name for name in measures if not Path(f"{path}_{name}.npy").exists()]
        model = checkpoints.load_model(folder, device) if missing else None
        for name in missing:
            _, ask, needs = MEASURES[name]
            values = ask(model, tokenizer, documents[name])
            if not values:
                raise ValueError(f"{docs / needs}: nothing there for the measure {name}")
            with replacing(f"{path}_{name}.npy") as file:
                np.save(file, np.array(values))
        print(f"{path}: {i} of {len(todo)} checkpoints", flush=True)
    print(f"{options.output}: {len(pairs)} pairs, {len(todo)} checkpoints, measures "
          f"{', '.join(measures)}")


def read_documents(name, docs):
    """Return what the measure `name` reads of DOCS, or raise ValueError naming the folder."""
    read, _, needs = MEASURES[name]
    try:
        documents = read(docs)
        if not documents:
            raise ValueError("there are none")
    except (KeyError, IndexError, TypeError, StopIteration, ValueError) as error:
        raise ValueError(f"{docs / needs}: documents of the measure {name} are not as distributed "
                         f"({type(error).__name__}: {error})") from None
    return documents


def pairs_of(options):
    """Return {name: [child, twin]}; a name is the child's run folder, and must be of one pair."""
    pairs = [pair.split(":") for pair in options.pairs.split(",") if pair] or [
        [path.removesuffix("_twin"), path]
        for path in sorted(map(str, Path(options.branches).glob("*_twin")))]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"branches = {options.branches!r}, pairs = {options.pairs!r}: "
                         "no CHILD beside a CHILD_twin there")
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
    values = {}  # (measure, step) -> {pair: {side: values}}
    for path in sorted(Path(options.results).glob("*/*.npy")):
        if match := re.fullmatch(r"(branch|twin)_step(\d+)_(\w+)\.npy", path.name):
            side, step, name = match.groups()
            pairs = values.setdefault((name, int(step)), {})
            pairs.setdefault(path.parent.name, {})[side] = load_npy(path)
    n, rows = len({pair for pairs in values.values() for pair in pairs}), []
    for (name, step), pairs in sorted(values.items()):
        pairs = [sides for sides in pairs.values() if len(sides) == 2]
        if len(pairs) < n:  # or an interval over items would pass for one over seeds
            raise ValueError(f"{options.results}: {name} at step {step} is there for both sides of "
                             f"{len(pairs)} of {n} pairs; run `measure` again")
        if len({len(side) for sides in pairs for side in sides.values()}) > 1:
            raise ValueError(f"{options.results}: {name} at step {step} is not of one size; delete "
                             "it and run `measure` again")
        twin, changed = (np.array([sides[side] for sides in pairs]) for side in ("twin", "branch"))
        rows.append((name, step, *twin.shape, float(twin.mean()), float(changed.mean()),
                     *paired_bootstrap(changed - twin)))
    if not rows:
        raise ValueError(f"{options.results}: no PAIR/branch_stepN_MEASURE.npy there; "
                         "`measure` makes them")
    write_table(Path(options.results) / "gender_bias.csv", (
        "measure", "step", "seeds", "items", "twin", "branch", "difference", "low", "high"), rows)
    if options.plot:
        import plots
        plots.differences(Path(options.results) / "gender_bias.csv", options.plot)


COMMANDS = {"branch": (Branch, branch), "measure": (Measure, measure),
            "compare": (Compare, compare)}

if __name__ == "__main__":
    command(sys.argv[1:], COMMANDS)
