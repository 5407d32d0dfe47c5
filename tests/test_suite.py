"""python -m pytest tests/test_suite.py -m "proof or not proof" """

import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

from studies.corpus import TERMS, operand_weights, sums


def test_how_often_an_operand_comes_does_not_tell_its_size():
    rank = np.array(operand_weights()).argsort().argsort()
    assert (all(rank[term] < 30 for term in TERMS) and np.ptp(TERMS) > 70
            and 40 < np.mean(TERMS) < 60)
    seen = Counter(itertools.chain(*sums()))  # as counted: what is near another number
    rank = np.array([seen[x1] for x1 in range(11, 100)]).argsort().argsort()
    assert abs(np.corrcoef(rank, np.arange(89))[0, 1]) < 0.2


@pytest.mark.proof
def test_sixteen_steps_of_everything_make_a_report(tmp_path, tokenizer_path):
    flags = [f"--output={tmp_path}/suite", f"--data={tmp_path}/data",
             f"--tokenizer={tokenizer_path}", "--steps=16"]
    command = [sys.executable, "-m", "studies.suite", *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    page = (tmp_path / "suite" / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in (
        "Training", "Memorization", "Gendered pronouns", "Term frequency"))
    assert page.count("data:image/png;base64,") >= 5
    before = json.loads((tmp_path / "suite" / "done.json").read_text())
    subprocess.run(command, cwd=ROOT, check=True)  # nothing is done again but the report
    after = json.loads((tmp_path / "suite" / "done.json").read_text())
    assert all("studies.report" in line for line in before if before[line] != after[line])
