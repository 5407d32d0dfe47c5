"""pytest tests/test_parity.py

Both styles at 0 and 5 shots against what lm-evaluation-harness itself said (lm_eval_golden.py).
Not asked again, being the same code: arc_challenge, the other subjects, types and sums. Not
compared: mmlu's own rows and winobias, which is not in lm_eval (both worked by hand in
test_tasks.py), heldout (ours), logiqa's raw text file.
"""

import json
import math

import pytest

import eval as evaluation
import lm_eval_golden as golden
from conftest import ROOT
from tasks import TASKS, V03_TASKS

GOLDEN, GOLDEN_V03 = (json.loads((ROOT / "tests" / f"lm_eval_{name}.json").read_text())
                      for name in ("golden", "v03_golden"))
EXACT = ("acc", "acc_norm", "exact_match", "pct_stereotype")  # counts


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("parity")
    docs = folder / "docs"
    for name in golden.CASES:
        golden.write_documents(docs, TASKS[name], golden.made_documents(name, TASKS[name], 8))
    return golden.trained_model(folder / "run", docs, tokenizer), docs


def check_metrics(job, results, expected, tolerance, monkeypatch):
    """Hold the metrics and errors that come of a job's results equal to the harness's."""
    monkeypatch.setattr("tasks.BOOTSTRAP", golden.BOOTSTRAP)  # as golden
    rows = evaluation.measure(job, results)
    assert {metric for _, metric, *_ in rows} == {
        metric for metric in expected if not metric.endswith("_stderr")}
    for _, metric, value, stderr, _ in rows:
        assert math.isclose(value, expected[metric], rel_tol=tolerance(metric))
        error = expected.get(f"{metric}_stderr")
        assert error in (None, "N/A") if stderr is None else math.isclose(
            stderr, error, rel_tol=tolerance(metric))


@pytest.mark.parametrize("case", GOLDEN)
def test_requests_results_and_metrics_are_the_harness_s(small, tokenizer, case, monkeypatch):
    model, docs = small
    task, shots = case.split()
    job = evaluation.Job(task, docs, int(shots))
    rolls = job.task.kind == "rolling"
    texts = [request[1:] if rolls else request for request in job.requests]
    assert golden.requests_hash(texts) == GOLDEN[case]["requests"]
    results = evaluation.answer(model, tokenizer, job)
    for ours, theirs in zip(results, GOLDEN[case]["results"], strict=True):
        if job.task.kind == "generate":
            assert ours == (theirs,)
        elif rolls:
            assert math.isclose(ours[0], theirs, rel_tol=1e-5)
        else:
            assert (math.isclose(ours[0], theirs[0], rel_tol=1e-5, abs_tol=1e-4)
                    and ours[1] == theirs[1])
    # In a perplexity the log-likelihoods' rounding stands in an exponent.
    check_metrics(job, results, GOLDEN[case]["metrics"],
                  lambda metric: 1e-12 if metric in EXACT else 1e-4, monkeypatch)


def test_every_kind_of_task_is_compared_and_some_answers_are_greedy():
    alike = ("arc_challenge", "mmlu", "crows_pairs", "arithmetic")  # with one that is
    assert {task for task in TASKS if not task.startswith((*alike, "wino_bias"))} - {"heldout"} <= {
        case.split()[0] for case in GOLDEN} <= set(TASKS)
    flags = [result[1] for answer in GOLDEN.values() for result in answer["results"]
             if isinstance(result, list)]
    assert 5 < sum(flags) < len(flags) - 5


@pytest.mark.parametrize("case", GOLDEN_V03)
def test_the_paper_s_harness_asks_and_measures_the_same(
        tokenizer, case, request, tmp_path, monkeypatch):
    data = request.getfixturevalue("pythia_data") if case.startswith("real") else None
    _, name, shots = case.split()
    golden.write_documents(tmp_path, V03_TASKS[name], golden.splits_of(case, data))
    job = evaluation.Job(name, tmp_path, int(shots), "v0.3", golden.LIMIT)
    [questions] = job.members.values()
    rolls = job.task.kind == "rolling"
    texts = [request[1:] if rolls else request for request in job.requests]
    pairs = iter((text, () if rolls else evaluation.encode_pair(tokenizer, *text, "v0.3"))
                 for text in texts)
    asked = [[next(pairs) for _ in question.requests] for question in questions]
    assert " ".join(map(golden.question_hash, asked)) == GOLDEN_V03[case]["questions"]
    results = [golden.answer(*those) for those in texts]
    check_metrics(job, results, GOLDEN_V03[case]["metrics"], lambda metric: 1e-12, monkeypatch)
