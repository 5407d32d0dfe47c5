"""pytest tests/test_parity_v03.py

Style v0.3, at 0 and 5 shots, against what lm-evaluation-harness 0.3.0 itself asked and reckoned
(lm_eval_v03_golden.py; `make parity` asks it anew), of awkward documents and of the real ones in
the folder PYTHIA_DATA: the documents' order, every request with its shots and token ids, metrics,
errors.
"""

import json
import math

import pytest

import eval as evaluation
from conftest import ROOT
from lm_eval_v03_golden import (
    answer, BOOTSTRAP, LIMIT, made_documents, question_hash, real_documents, write)

GOLDEN = json.loads((ROOT / "tests" / "lm_eval_v03_golden.json").read_text())


def check(tokenizer, case, splits, docs, monkeypatch):
    monkeypatch.setattr("tasks.BOOTSTRAP", BOOTSTRAP)
    _, name, shots = case.split()
    write(docs, name, splits)
    job = evaluation.prepare(name, docs, int(shots), "v0.3", LIMIT)
    [(_, questions)] = job.members
    rolls = job.task.kind == "rolling"
    texts = [request[1:] if rolls else request for request in job.requests]
    pairs = iter((text, () if rolls else evaluation.encode_pair(tokenizer, *text, "v0.3"))
                 for text in texts)
    asked = [[next(pairs) for _ in question.requests] for question in questions]
    assert " ".join(map(question_hash, asked)) == GOLDEN[case]["questions"]
    results = [answer(*those) for those in texts]
    rows = {metric: (value, stderr)
            for _, metric, value, stderr, _ in evaluation.measure(job, results)}
    metrics = GOLDEN[case]["metrics"]
    assert set(rows) == {metric for metric in metrics if not metric.endswith("_stderr")}
    for metric, (value, stderr) in rows.items():
        assert math.isclose(value, metrics[metric], rel_tol=1e-12)
        expected = metrics.get(f"{metric}_stderr")
        assert stderr is expected is None or math.isclose(stderr, expected, rel_tol=1e-12)


@pytest.mark.parametrize("case", [case for case in GOLDEN if case.startswith("made")])
def test_awkward_documents_are_asked_and_measured_as_by_the_paper_s_harness(
        tokenizer, case, tmp_path, monkeypatch):
    check(tokenizer, case, made_documents(case.split()[1]), tmp_path, monkeypatch)


@pytest.mark.parametrize("case", [case for case in GOLDEN if case.startswith("real")])
def test_real_documents_are_asked_and_measured_as_by_the_paper_s_harness(
        tokenizer, case, pythia_data, tmp_path, monkeypatch):
    check(tokenizer, case, real_documents(pythia_data, case.split()[1]), tmp_path, monkeypatch)
