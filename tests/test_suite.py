"""python -m pytest tests/test_suite.py -m "proof or not proof" """

import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

from studies.corpus import operand_weights, sums
from studies.suite import stages, SuiteConfig, TERMS


def test_no_stage_is_there_twice():
    commands = [" ".join(command) for _, _, command in stages(SuiteConfig())]
    assert len(commands) == len(set(commands)) and "studies.report" in commands[-1]


def test_own_documents_are_measured_beside_the_held_out_ones():
    flags = [command for title, _, command in stages(SuiteConfig(docs="mine"))
             if title.startswith("measure pronouns_to_feminine")]
    docs, outputs = zip(*([next(f for f in command if f.startswith(name))
                           for name in ("--docs", "--output")] for command in flags))
    assert docs == ("--docs=data/suite/docs", "--docs=mine") and len(set(outputs)) == 2


def test_how_often_an_operand_comes_does_not_tell_its_size():
    weights = np.array(operand_weights())
    rank = weights.argsort().argsort()
    assert abs(np.corrcoef(rank, np.arange(100))[0, 1]) < 0.2
    assert (all(rank[term] < 30 for term in TERMS) and np.ptp(TERMS) > 80
            and 40 < np.mean(TERMS) < 60)
    seen = Counter(itertools.chain(*sums()))  # as counted: what is near another number
    rank = np.array([seen[x1] for x1 in range(100)]).argsort().argsort()
    assert abs(np.corrcoef(rank, np.arange(100))[0, 1]) < 0.2


@pytest.mark.parametrize("module, flags, words", [
    ("suite", ["--steps=100"], "steps = 100, expected a multiple of 16"),
    ("suite", ["--docs=nope"], "docs = nope: not a folder"),
    ("report", ["--suite=nowhere"], "nowhere/done.json")])
def test_a_mistake_is_one_line(module, flags, words):
    done = subprocess.run([sys.executable, "-m", f"studies.{module}", *flags], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.proof
def test_sixteen_steps_of_everything_make_a_report(tmp_path, tokenizer_path):
    flags = [f"--output={tmp_path}/suite", f"--data={tmp_path}/data",
             f"--tokenizer={tokenizer_path}", "--steps=16"]
    command = [sys.executable, "-m", "studies.suite", *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    page = (tmp_path / "suite" / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in (
        "Training", "Memorization", "Gendered pronouns", "Term frequency"))
    assert page.count("data:image/png;base64,") >= 6
    before = json.loads((tmp_path / "suite" / "done.json").read_text())
    subprocess.run(command, cwd=ROOT, check=True)  # nothing is done again but the report
    after = json.loads((tmp_path / "suite" / "done.json").read_text())
    assert all("studies.report" in line for line in before if before[line] != after[line])
