"""pytest tests/test_eval.py"""

import csv
import json
import math
import subprocess
import sys

import pytest

from checkpoints import save
from conftest import ROOT
from model import ModelConfig, Pythia
from train import TrainConfig, make_optimizer

CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=50304, seq_length=64)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("eval")
    (folder / "run").mkdir()
    model = Pythia(CONFIG)
    optimizer = make_optimizer(model, TrainConfig(data="", out_dir="", learning_rate=1.0))
    for step in (0, 2, 8):
        save(folder / "run", step, model, optimizer, {"updates": 0, "tokens": 64 * step}, tokenizer_path)
    (folder / "docs/heldout").mkdir(parents=True)
    (folder / "docs/piqa").mkdir()
    (folder / "docs/heldout/test.jsonl").write_text('{"text": "one"}\n{"text": "two two"}\n')
    (folder / "docs/piqa/validation.jsonl").write_text('{"goal": "g", "sol1": 3, "sol2": "b", "label": 0}\n')
    return folder


def run(folder, *flags, expect=0):
    done = subprocess.run([sys.executable, "eval.py", f"--model={folder}/run", f"--docs={folder}/docs",
                           f"--output={folder}/r.csv", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


def test_all_checkpoints_are_evaluated_once(workplace):
    run(workplace, "--tasks=heldout", "--steps=2")
    with open(workplace / "r.csv", "a") as file:
        file.write("run,8,512,heldout,0,bits_per")  # torn by a kill
    assert "2 evaluations done, 1 were there" in run(workplace, "--tasks=heldout").stdout
    assert "0 evaluations done, 3 were there" in run(workplace, "--tasks=heldout").stdout
    rows = list(csv.DictReader((workplace / "r.csv").open()))
    assert [(row["model"], row["step"], row["tokens"], row["n"]) for row in rows if row["metric"] == "bits_per_byte"
            ] == [("run", "2", "128", "2"), ("run", "0", "0", "2"), ("run", "8", "512", "2")]
    assert list(rows[0]) == "model,step,tokens,task,shots,metric,value,stderr,n,style,dtype,docs".split(",")


@pytest.mark.parametrize("flags, words", [
    (["--tasks=hellaswagg"], "no task called hellaswagg in style v0.4; `python eval.py tasks`"),
    (["--tasks=lambada_openai"], "lambada_openai/test.jsonl: no such file"),
    (["--tasks=piqa"], "piqa/validation.jsonl, line 1: sol1 is 3, expected a str"),
    (["--tasks=heldout", "--steps=1,2,3"], "no checkpoint at step 1, 3; there are 0, 2, 8"),
    (["--tasks=heldout", "--steps=first"], "steps = 'first', expected all, last"),
    (["--tasks=heldout", "--shots=1"], "heldout: shots must be 0 in style v0.4"),
    (["--tasks=mmlu", "--style=v0.3"], "no task called mmlu in style v0.3"),
    (["--tasks=heldout", "--style=v1"], "style = 'v1', expected v0.4 or v0.3"),
    (["--tasks=heldout", "--samples=/nowhere/s.jsonl"], "/nowhere/s.jsonl: No such file"),
    (["--tasks=heldout", "--model=/proc"], "/proc: neither a run folder")])
def test_a_mistake_is_one_line(workplace, flags, words):
    done = run(workplace, *flags, expect=2)
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_samples_start_with_the_prompt(workplace):
    done = subprocess.run([sys.executable, "eval.py", "sample", f"--model={workplace}/run", "--steps=0,8",
                           "--prompt=In the beginning", "--n_tokens=5"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("In the beginning") == 2 and "--- run step 8" in done.stdout, done.stderr


def test_samples_hold_every_request(workplace):
    run(workplace, "--tasks=heldout", "--steps=8", f"--samples={workplace}/s.jsonl", f"--output={workplace}/s.csv")
    lines = [json.loads(line) for line in (workplace / "s.jsonl").read_text().splitlines()]
    assert [(line["task"], line["doc_id"], line["context"]) for line in lines] == [
        ("heldout", 0, "one"), ("heldout", 1, "two two")]
    rows = {row["metric"]: float(row["value"]) for row in csv.DictReader((workplace / "s.csv").open())}
    assert rows["byte_perplexity"] == pytest.approx(math.exp(-sum(line["loglikelihood"] for line in lines) / 10))


def test_the_list_of_tasks_tells_what_is_missing(workplace):
    done = subprocess.run([sys.executable, "eval.py", "tasks", f"--docs={workplace}/docs"], cwd=ROOT,
                          capture_output=True, text=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "test 2" in lines["heldout"] and f"{workplace}/docs/piqa/train.jsonl missing" in lines["piqa"]
