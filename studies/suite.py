"""The paper in miniature: three sizes, two corpora, one order, all studies with their controls, one report.

    make suite          # or: python -m studies.suite --output=runs/suite

About 40 minutes on two CPU cores; the same command goes on where it was stopped. Every stage is one of the
project's own commands, printed as it is run, so each can be tried by itself; what it prints is kept in
OUTPUT/log.txt. OUTPUT/report.html holds the figures, the numbers and what the paper found beside them.

The corpus (studies/corpus.py) repeats some passages 8 to 256 times, declared as such; its deduplicated
twin has each once. Budgets are what two cores can do: nothing was tuned to look like the paper.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from config import parse, replacing, run
from data import read_json

SIZES = {  # name: layers, width, heads, peak learning rate, minutes on two cores
    "d32": (2, 32, 4, 5e-3, 1.6), "d64": (3, 64, 4, 5e-3, 2.4), "d128": (4, 128, 8, 3e-3, 4.5)}
BATCH, LENGTH = 8, 128  # 1024 tokens a step
SEEDS = (1234, 1, 2)  # of the middle size, for the gender study
TERMS = "61,67,71,73,79,83,89,97"  # operands that the corpus has seldom


@dataclass(frozen=True)
class SuiteConfig:
    output: str = "runs/suite"
    data: str = "data/suite"
    docs: str = ""  # folder of WinoBias, Winogender, CrowS-Pairs and LAMBADA, if you have them
    steps: int = 384  # of every run; the branches of the studies begin at 3/4 and at 1/2
    tokenizer: str = "20B_tokenizer.json"

    def __post_init__(self):
        if self.steps < 16 or self.steps % 16:
            raise ValueError(f"steps = {self.steps}, expected a multiple of 16")


def stages(options):
    """Return [(title, minutes on two cores, command)] of the whole suite."""
    out, data, docs = options.output, options.data, f"{options.data}/docs"
    steps, swap_from, terms_from = options.steps, options.steps * 3 // 4, options.steps // 2
    order = [f"--steps={steps}", f"--batch_size={BATCH}", f"--seq_length={LENGTH}"]
    heldout = [f"--docs={docs}", "--tasks=heldout", "--limit=16"]

    def train(name, corpus, size, seed=1234):
        L, D, H, rate, minutes = SIZES[size]
        return f"train {name}", minutes * steps / 384, ["train.py", f"--n_layers={L}", f"--d_model={D}", f"--n_heads={H}",
            f"--learning_rate={rate}", f"--data={data}/{corpus}", *order, f"--micro_batch_size={BATCH}",
            f"--checkpoint_every={steps // 4}", "--log_every=48", f"--seed={seed}", f"--tokenizer={options.tokenizer}",
            f"--out_dir={out}/{name}"]

    runs = [(f"{corpus}_{size}", corpus, size) for size in SIZES for corpus in ("standard", "deduped")]
    seeds = [(f"standard_d64_seed{seed}", "standard", "d64", seed) for seed in SEEDS[1:]]
    names = ",".join(f"{out}/{name}" for name, _, _ in runs)
    standard = ",".join(f"{out}/{name}" for name, corpus, _ in runs if corpus == "standard")
    parents = [f"{out}/standard_d64", *(f"{out}/{name}" for name, *_ in seeds)]
    study = lambda name, *flags: ["-m", f"studies.{name}", *flags]
    branch_minutes = SIZES["d64"][4] / 384 * (steps - swap_from) * 2 * len(SEEDS)  # with the twins
    swaps = ("pronouns_to_feminine", "pronouns_as_pushed")
    return [
        ("the tokenizer", 0.1, study("corpus", "tokenizer", f"--output={options.tokenizer}")),
        ("the corpus", 0.3, study("corpus", "suite", f"--output={data}")),
        ("duplicates", 0.1, ["data.py", "dedup", f"--input={data}/standard.jsonl", f"--output={data}/deduped.jsonl"]),
        *((f"tokenize {corpus}", 0.1, ["data.py", "tokenize", f"--input={data}/{corpus}.jsonl",
           f"--output={data}/{corpus}", f"--tokenizer={options.tokenizer}"]) for corpus in ("standard", "deduped")),
        *((f"order {corpus}", 0.1, ["data.py", "order", f"--data={data}/{corpus}", *order, f"--report={steps}"])
          for corpus in ("standard", "deduped")),
        *(train(*run_) for run_ in runs), *(train(*run_) for run_ in seeds),
        *((f"verify {name}", 0.2, ["checkpoints.py", "verify", f"{out}/{name}"]) for name, _, _ in runs),
        ("evaluate", 3, ["eval.py", f"--model={names}", *heldout, f"--output={out}/results.csv",
                         f"--tokenizer={options.tokenizer}"]),
        *((f"memorization {name}", 0.4, study("memorization", "score", f"--model={out}/{name}",
           f"--steps={','.join(map(str, (0, *range(steps // 4, steps + 1, steps // 4))))}", f"--output={out}/memorization_{corpus}"))
          for name, corpus, _ in runs),
        *((f"memorization, {corpus}", 0.1, study(
            "memorization", "analyse", f"--results={out}/memorization_{corpus}", "--windows=64,32,128",
            "--length=8", f"--plot={out}/memorization_{corpus}.png")) for corpus in ("standard", "deduped")),
        *((f"branches, {name}", branch_minutes, study(
            "gender_bias", "branch", f"--parents={','.join(f'{p}/step{swap_from}' for p in (parents if name in swaps[:1] else parents[:1]))}",
            f"--intervention={name}", f"--checkpoint_every={steps // 16}", f"--output={out}/{name}")) for name in swaps),
        *((f"measure {name}", 1, study(
            "gender_bias", "measure", f"--branches={out}/{name}", f"--docs={options.docs or docs}",
            f"--output={out}/gender_{name}", f"--tokenizer={options.tokenizer}")) for name in swaps),
        *((f"compare {name}", 0.1, study(
            "gender_bias", "compare", f"--results={out}/gender_{name}", f"--plot={out}/gender_{name}.png"))
          for name in swaps),
        ("count numbers", 0.3, study("term_frequency", "count", f"--data={data}/standard", *order,
                                     f"--at={terms_from},{steps}", f"--output={out}/counts")),
        (f"branch, {TERMS}", branch_minutes / len(SEEDS) * 2, [
            *train("", "standard", "d64")[2][:-1], f"--branch_from={out}/standard_d64/step{terms_from}",
            "--intervention=term_duplicate", f"--intervention_from={terms_from}", f"--terms={TERMS}", "--copies=3",
            "--twin=True", f"--out_dir={out}/terms/more"]),
        ("ask sums", 4, study("term_frequency", "evaluate", f"--model={standard}", f"--steps={terms_from},{steps}",
                              "--tasks=plus", "--shots=0", f"--results={out}/terms.csv")),
        ("ask the branches sums", 1, study("term_frequency", "evaluate", f"--model={out}/terms/more,{out}/terms/more_twin",
                                           "--steps=last", "--tasks=plus", "--shots=0", f"--results={out}/terms.csv")),
        ("terms, frequency", 0.1, study("term_frequency", "analyse", f"--counts={out}/counts", f"--results={out}/terms.csv",
                                        f"--output={out}/terms", "--frequency=plain")),
        ("terms, experiment", 0.1, study("term_frequency", "compare", f"--branch={out}/terms/more", f"--terms={TERMS}",
                                         f"--results={out}/terms.csv", f"--output={out}/terms_compare.csv")),
        ("terms, figure", 0.1, ["plots.py", "term_frequency", f"--bins={out}/terms_bins.csv", "--model=standard_d128",
                                f"--output={out}/terms.png"]),
        ("curves", 0.1, ["plots.py", "curves", f"--results={out}/results.csv", "--tasks=heldout", f"--output={out}/curves.png"]),
        ("report", 0.1, study("report", f"--suite={out}")),
    ]


def main(options):
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "done.json"
    done = read_json(path) if path.exists() else {}
    todo = stages(options)
    began, worked = time.monotonic(), 0.0
    for i, (title, minutes, arguments) in enumerate(todo, 1):
        line = " ".join(arguments)
        if line in done and title != "report":
            continue
        left = sum(m for _, m, a in todo[i - 1:] if " ".join(a) not in done)
        pace = (time.monotonic() - began) / 60 / worked if worked > 1 else 1.0
        print(f"[{i}/{len(todo)}] {title}: about {left * pace:.0f} min left\n    python {line}", flush=True)
        start = time.monotonic()
        with open(output / "log.txt", "a") as log:
            print(f"\n$ python {line}", file=log, flush=True)
            code = subprocess.run([sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            last = (output / "log.txt").read_text(errors="replace").strip().splitlines()[-1]
            raise ValueError(f"{title} ended with exit code {code}: {last} (all of it: {output}/log.txt); "
                             "the same command goes on from here")
        worked += minutes
        done[line] = round(time.monotonic() - start, 1)
        with replacing(path) as file:
            file.write(json.dumps(done, indent=2).encode())
    print(f"{output}/report.html")


if __name__ == "__main__":
    run(main, parse(sys.argv[1:], SuiteConfig))
