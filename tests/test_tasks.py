"""pytest tests/test_tasks.py"""

import math
import random
import statistics

import pytest
from conftest import write_jsonl

import tasks as metrics
from tasks import (GROUPS, MMLU, mmlu_rows, named_tasks, prompts, Question, SUBJECTS, TASKS,
                   V03_TASKS, winobias, winobias_rows)


def test_bootstrap_draws_are_the_harness_draws(monkeypatch):
    values = [random.Random(9).gauss(-3, 2) for _ in range(37)]
    draws = []
    for seed in range(3):  # lm_eval/api/metrics.py, _bootstrap_internal
        rnd = random.Random(seed)
        draws += [math.exp(-statistics.fmean(rnd.choices(values, k=37))) for _ in range(1000)]
    monkeypatch.setattr(metrics, "BOOTSTRAP", 3000)
    value, stderr = metrics.perplexity(values)
    assert math.isclose(value, math.exp(-statistics.fmean(values)), rel_tol=1e-12)
    assert math.isclose(stderr, statistics.stdev(draws), rel_tol=1e-12)


def test_a_diverged_model_is_right_about_nothing():
    """argmax picks NaN, so the first choice would be the answer to every question."""
    fine, diverged, lost = (-1.0, True), (math.nan, False), (-1e4, False)
    choices, word = Question([("", " a"), ("", " b")], "one", gold=0), Question([("", " a")], "one")
    for task, question, results in (
            ("piqa", choices, [[fine, lost], [diverged, diverged]]),
            ("crows_pairs_english", choices, [[fine, lost], [diverged, fine]]),
            ("lambada_openai", word, [[fine], [diverged]]),
            ("wikitext", word, [[fine], [diverged]])):
        for _, _, value, stderr, n in metrics.measured(TASKS[task], [question] * 2, results):
            assert math.isnan(value) and (stderr is None or math.isnan(stderr)) and n == 2
    rows = metrics.measured(TASKS["lambada_openai"], [word] * 2, [[lost], [lost]])
    assert [row[1:3] for row in rows] == [("acc", 0.0), ("perplexity", math.inf)]


def test_paper_style_draws_with_one_generator_that_has_shuffled_the_documents(tmp_path):
    """And `limit` takes the first of these; parity's documents are fewer than its limit."""
    for split, n in ("validation", 7), ("train", 30):
        write_jsonl(tmp_path / f"piqa/{split}.jsonl", [
            {"goal": f"{split} {i}", "sol1": "a", "sol2": "b", "label": 0} for i in range(n)])
    asked, _ = prompts(V03_TASKS["piqa"], tmp_path, shots=3, style="v0.3", limit=4)
    rng, order = random.Random(42), list(range(7))
    rng.shuffle(order)
    assert [question.requests[0][0] for question in asked] == [
        "".join(f"Question: train {i}\nAnswer: a\n\n" for i in rng.sample(range(30), 3))
        + f"Question: validation {i}\nAnswer:" for i in order[:4]]


def test_paper_style_without_a_shot_left_still_begins_with_an_empty_line(tmp_path):
    write_jsonl(tmp_path / "lambada_openai/test.jsonl", [{"text": "one end"}] * 2)
    asked, _ = prompts(V03_TASKS["lambada_openai"], tmp_path, shots=1, style="v0.3")
    # lm_eval/base.py, Task.fewshot_context.
    assert [question.requests for question in asked] == [[("\n\none", " end")]] * 2


def test_paper_style_asks_no_alias_that_begins_with_another():
    trivia = dict(question="Q?", answer={
        "aliases": ["Sun City", "Sun", "Moon", "Sunday"], "value": "Sun"})
    assert V03_TASKS["triviaqa"].question(trivia).requests == [
        ("Question: Q?\nAnswer:", " Moon"), ("Question: Q?\nAnswer:", " Sun")]


def test_winobias_asks_by_bigscience_s_prompts():
    asked = winobias(dict(sentence="[The developer] left the designer because [he] didn't."))
    sentence = "The developer left the designer because he did n't ."  # as in the CoNLL files
    assert asked.requests == [
        (f'{sentence}\nHere, what does "he" stand for?',),
        (f'What does "he" refer to in the following sentence?\n{sentence}',)]
    assert asked.gold == "The developer"


def test_winobias_summary_is_the_paper_s_notebook_s():
    em = {"type1_pro": (0.2, 0.02), "type1_anti": (0.1, 0.01),
          "type2_pro": (0.3, 0.02), "type2_anti": (0.25, 0.03)}
    rows = [(f"wino_bias_{kind}", "em", *values, 396) for kind, values in em.items()]
    (_, _, bias, bias_error, _), (_, _, accuracy, error, n) = winobias_rows(rows)
    assert (accuracy, bias, n) == (pytest.approx(0.2125), pytest.approx(0.075), 1584)
    pro, anti = math.sqrt((0.02**2 + 0.02**2) / 2), math.sqrt((0.01**2 + 0.03**2) / 2)
    assert (bias_error == pytest.approx(math.hypot(pro, anti))
            and error == pytest.approx(bias_error / math.sqrt(2)))


def test_groups_weigh_by_size():
    for members, _ in GROUPS.values():
        assert members and all(member in TASKS for member in members)
    for style, table, name, n in (("v0.4", TASKS, "arithmetic", 10), ("v0.4", TASKS, "arc", 2),
                                  ("v0.4", TASKS, "crows_pairs", 11),
                                  ("v0.3", V03_TASKS, "hendrycksTest", 57)):
        assert len(named_tasks(name, style)) == n and table.keys() >= {*named_tasks(name, style)}
    value, stderr, n = metrics.pooled([(0.5, 0.1, 10), (0.25, 0.05, 30)])
    assert (value, n) == (0.3125, 40)
    assert stderr == pytest.approx(math.sqrt((9 * 10 * 0.01 + 29 * 30 * 0.0025) / 38 / 40))
    rows = mmlu_rows([(f"mmlu_{subject}", "acc", float(i), 0.1, 10)
                      for i, subject in enumerate(SUBJECTS)])
    assert {name: n for name, *_, n in rows} == {
        "mmlu_stem": 190, "mmlu_other": 130, "mmlu_social_sciences": 120, "mmlu_humanities": 130,
        "mmlu": 570}
    assert dict((name, value) for name, _, value, *_ in rows) == {
        f"mmlu_{category}": statistics.fmean(map(SUBJECTS.index, subjects))
        for category, subjects in MMLU.items()} | {"mmlu": 28.0}


def test_superglue_files_become_the_repaired_set():
    doc = dict(text="They moved the table. It broke .", label=True, idx=3, target={
        "span1_index": 2, "span1_text": "The table.", "span2_index": 4, "span2_text": "It"})
    for table, noun in ((TASKS, "the table"), (V03_TASKS, "The table.")):
        assert f'"*It*" refer to "*{noun}*"?' in table["wsc"].question(doc).requests[0][0]


def test_published_documents_become_requests(pythia_data):
    there = ["lambada_openai", "piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "logiqa",
             "hellaswag", "triviaqa", "crows_pairs_english_gender", "arithmetic_5ds",
             "mmlu_anatomy", "wino_bias_type2_anti"]
    for task in there:
        asked, _ = prompts(TASKS[task], pythia_data)
        assert TASKS[task].n in (0, len(asked)) or task in ("hellaswag", "triviaqa")
        assert all(question.gold is None or isinstance(question.gold, (list, str))
                   or 0 <= question.gold < len(question.requests) for question in asked)


PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
ARC = {"question": "q", "choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "B"}


@pytest.mark.parametrize("task, document, words", [
    ("piqa", PIQA | {"label": -1}, "the right choice is -1, expected one of ['0', '1']"),
    ("piqa", [1], "line 1: not a JSON object of text"),
    ("arc_easy", ARC | {"choices": {"text": ["a"]}}, "KeyError: 'label'")])
def test_a_wrong_document_is_named(tmp_path, task, document, words):
    name = TASKS[task].file or f"{TASKS[task].split}.jsonl"
    write_jsonl(tmp_path / TASKS[task].folder / name, [document])
    with pytest.raises(ValueError, match="line 1") as error:
        prompts(TASKS[task], tmp_path)
    assert words in str(error.value)
