"""The paper in miniature: three sizes, two corpora, one order, three studies, one report.

    make suite          # or: python -m studies.suite --output=runs/suite

Under an hour on two CPU cores; the same command goes on where it was stopped. Every stage is one of
the project's own commands, printed as it is run, so each can be tried by itself; what it prints is
kept in OUTPUT/log.txt. OUTPUT/report.html holds the figures, the numbers and what the paper found
beside them.

The corpus (studies/corpus.py) repeats some passages 8 to 256 times, declared as such. Its
deduplicated twin has one copy of each, and is about half as long: as the runs are not, they pass
over it almost twice. Budgets are what two cores can do: nothing was tuned to look like the paper.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from config import parse, read_json, run, write_json
from studies.corpus import TERMS

SIZES = {  # name: layers, width, heads, peak learning rate
    "d32": (2, 32, 4, 5e-3), "d64": (3, 64, 4, 5e-3), "d128": (4, 128, 8, 3e-3)}
CORPORA = ("standard", "deduped")
BATCH, LENGTH = 8, 128  # 1024 tokens a step
RUNS = [(f"{corpus}_{size}", corpus, size, 1234) for size in SIZES for corpus in CORPORA]
SEEDS = [("standard_d64", "standard", "d64", 1234),  # the branches' parents; the first is in RUNS
         *((f"standard_d64_seed{seed}", "standard", "d64", seed) for seed in (1, 2))]
SWAPS = {  # intervention: parents. As it was pushed it does nothing, which one seed shows.
    "pronouns_to_feminine": SEEDS, "pronouns_as_pushed": SEEDS[:1]}


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


def study(name, *flags):
    return ["-m", f"studies.{name}", *flags]


def order_flags(options):
    return [f"--steps={options.steps}", f"--batch_size={BATCH}", f"--seq_length={LENGTH}"]


def train_command(options, out_dir, corpus, size, seed):
    L, D, H, rate = SIZES[size]
    return ["train.py", f"--n_layers={L}", f"--d_model={D}", f"--n_heads={H}",
            f"--learning_rate={rate}", f"--data={options.data}/{corpus}", *order_flags(options),
            f"--micro_batch_size={BATCH}", f"--checkpoint_every={options.steps // 4}",
            "--log_every=48", f"--seed={seed}", f"--tokenizer={options.tokenizer}",
            f"--out_dir={out_dir}"]


def stages(options):
    """Return the commands of the whole suite."""
    return [*corpus_stages(options), *training_stages(options), *memorization_stages(options),
            *gender_stages(options), *term_stages(options),
            study("report", f"--suite={options.output}")]


def corpus_stages(options):
    data, tokenizer = options.data, f"--tokenizer={options.tokenizer}"
    texts = {corpus: f"{data}/{corpus}.jsonl" for corpus in CORPORA} | {
        "heldout": f"{data}/docs/heldout/test.jsonl"}
    return [
        study("corpus", "tokenizer", f"--output={options.tokenizer}"),
        study("corpus", "suite", f"--output={data}", f"--steps={options.steps}"),
        ["prepare.py", "dedup", f"--input={data}/standard.jsonl", f"--output={data}/deduped.jsonl"],
        *(["prepare.py", "tokenize", f"--input={path}", f"--output={data}/{name}", tokenizer]
          for name, path in texts.items()),
        *(["data.py", "order", f"--data={data}/{corpus}", *order_flags(options),
           f"--report={options.steps}"] for corpus in CORPORA)]


def training_stages(options):
    out, names = options.output, ",".join(f"{options.output}/{name}" for name, *_ in RUNS)
    return [
        *(train_command(options, f"{out}/{name}", corpus, size, seed)
          for name, corpus, size, seed in (*RUNS, *SEEDS[1:])),
        *(["verify.py", "verify", f"{out}/{name}"] for name, *_ in (*RUNS, *SEEDS[1:])),
        ["eval.py", f"--model={names}", f"--docs={options.data}/docs", "--tasks=heldout",
         "--limit=16", f"--output={out}/results.csv", f"--tokenizer={options.tokenizer}"],
        ["plots.py", "curves", f"--results={out}/results.csv", "--tasks=heldout",
         f"--output={out}/curves.png"]]


def memorization_stages(options):
    out, quarter = options.output, options.steps // 4
    steps = ",".join(map(str, range(0, options.steps + 1, quarter)))
    model, other = (name for name, *_ in SEEDS[:2])
    return [
        *(study("memorization", "score", f"--model={out}/{name}", f"--steps={steps}",
                f"--output={out}/memorization_{corpus}") for name, corpus, *_ in RUNS),
        *(study("memorization", "analyse", f"--results={out}/memorization_{corpus}", "--window=64",
                f"--plot={out}/memorization_{corpus}.png") for corpus in CORPORA),
        ["eval.py", "losses", f"--model={out}/{model},{out}/{other}", "--steps=last",
         f"--rows=0:{BATCH * options.steps}", f"--output={out}/losses"],
        study("memorization", "position", f"--losses={out}/losses", f"--model={model}",
              f"--reference={other}", f"--output={out}/position.csv")]


def gender_stages(options):
    out, begin, every = options.output, options.steps * 3 // 4, options.steps // 16
    folders = {"": f"{options.data}/docs"} | ({"_docs": options.docs} if options.docs else {})
    commands = []
    for swap, parents in SWAPS.items():
        commands.append(study(
            "gender_bias", "branch", f"--intervention={swap}", f"--checkpoint_every={every}",
            f"--parents={','.join(f'{out}/{name}/step{begin}' for name, *_ in parents)}",
            f"--output={out}/{swap}"))
        for suffix, docs in folders.items():
            results = f"{out}/gender_{swap}{suffix}"
            commands += [
                study("gender_bias", "measure", f"--branches={out}/{swap}", f"--docs={docs}",
                      f"--output={results}", f"--tokenizer={options.tokenizer}"),
                study("gender_bias", "compare", f"--results={results}", f"--plot={results}.png")]
    return commands


def term_stages(options):
    out, begin = options.output, options.steps // 2
    ours, theirs = f"--results={out}/answers", f"--results={out}/answers_branches"
    terms = ",".join(map(str, TERMS))
    asked = ["--tasks=plus", "--shots=0", "--x1=11:100", "--x2=1:11",
             f"--tokenizer={options.tokenizer}"]
    standard = ",".join(f"{out}/{name}" for name, corpus, *_ in RUNS if corpus == "standard")
    more = {name: f"{out}/terms/{name}_more" for name, *_ in SEEDS}
    return [
        study("term_frequency", "count", f"--data={options.data}/standard", *order_flags(options),
              f"--at={begin},{options.steps}", f"--output={out}/counts",
              f"--tokenizer={options.tokenizer}"),
        *([*train_command(options, more[name], corpus, size, seed), "--twin=True",
           f"--branch_from={out}/{name}/step{begin}", "--intervention=plant",
           f"--intervention_from={begin}", f"--planted={options.data}/sums.jsonl"]
          for name, corpus, size, seed in SEEDS),
        study("term_frequency", "evaluate", f"--model={standard}",
              f"--steps={begin},{options.steps}", ours, *asked),
        study("term_frequency", "evaluate",
              f"--model={','.join(f'{path},{path}_twin' for path in more.values())}",
              "--steps=last", theirs, *asked),
        study("term_frequency", "analyse", f"--counts={out}/counts", ours, f"--output={out}/terms"),
        study("term_frequency", "compare", f"--branch={','.join(more.values())}",
              f"--terms={terms}", theirs, f"--output={out}/terms_compare.csv"),
        ["plots.py", "term_frequency", f"--bins={out}/terms_bins.csv", "--model=standard_d128",
         f"--output={out}/terms.png"]]


def main(options):
    if options.docs and not Path(options.docs).is_dir():  # or it would show in half an hour
        raise ValueError(f"docs = {options.docs}: not a folder")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    path, todo = output / "done.json", stages(options)
    done = read_json(path) if path.exists() else {}
    for i, arguments in enumerate(todo, 1):
        line = shlex.join(arguments)
        if line in done and i < len(todo):  # the report is always made anew
            continue
        print(f"[{i}/{len(todo)}] python {line}", flush=True)
        start = time.monotonic()
        with open(output / "log.txt", "a") as log:
            print(f"\n$ python {line}", file=log, flush=True)
            code = subprocess.run([sys.executable, *arguments], stdout=log,
                                  stderr=subprocess.STDOUT).returncode
        if code:
            last = (output / "log.txt").read_text(errors="replace").strip().splitlines()[-1]
            raise ValueError(f"python {line} ended with exit code {code}: {last} (all of it: "
                             f"{output}/log.txt); the same command goes on from here")
        done[line] = round(time.monotonic() - start, 1)
        write_json(path, done)
    print(f"{output}/report.html")


if __name__ == "__main__":
    run(main, parse(sys.argv[1:], SuiteConfig))
