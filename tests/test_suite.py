"""python -m pytest tests/test_suite.py -m "proof or not proof" """

import functools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run

import plots
from interventions import InterventionConfig, plant
from studies.corpus import place, planned
from studies.memorization import poisson_tests, window_counts
from studies.results import write_table
from studies.suite import (DISPERSION, DOSES, WINDOW, asked, asked_of_places, dose_claims,
                           dose_rows, place_claims, swap_claims)

WORDS = "light water house people king land son day hand heart voice stone river field".split()


def test_plans_give_each_seed_other_doses_of_the_same_texts(tokenizer):
    plans = {}
    for seed in (1, 2):
        plan = plans[seed] = planned(seed, tokenizer, WORDS, 1280)
        place(plan, tokenizer, 1280, 420, seed)
        load, sizes = Counter(), [len(tokenizer.encode(entry["text"])) + 1 for entry in plan]
        for entry, size in zip(plan, sizes):
            assert len(set(entry["steps"])) == entry["dose"]
            load.update({step: size for step in entry["steps"]})
            if entry["group"] == "burst":
                assert np.ptp(entry["steps"]) < 48
        assert max(load) < 1280 and max(load.values()) <= 420
        doses = Counter(entry["dose"] for entry in plan if entry["group"] == "canary")
        assert doses == {0: 48, 1: 24, 4: 24, 16: 24, 64: 8}
    kinds = lambda seed, key: [(entry["text"], entry[key]) for entry in plans[seed]
                               if entry["group"] in ("canary", "sum")]
    assert [text for text, _ in kinds(1, "dose")] == [text for text, _ in kinds(2, "dose")]
    assert kinds(1, "dose") != kinds(2, "dose") and kinds(1, "steps") != kinds(2, "steps")
    operands = {entry["x1"]: entry["total"] for entry in plans[1] if entry["group"] == "sum"}
    assert Counter(operands.values()) == {5: 12, 20: 12, 80: 12, 640: 12}
    rank = np.array([operands[x1] for x1 in sorted(operands)]).argsort().argsort()
    assert abs(np.corrcoef(rank, np.arange(48))[0, 1]) < 0.3  # a dose does not tell a size


def test_claims_are_the_slopes_that_were_put_in(tokenizer, tmp_path):
    """Models made by hand, of which all that is planted is known."""
    generator, plans, found, swapped = np.random.default_rng(0), [], [], []
    for seed in (1, 2, 3):
        plan = planned(seed, tokenizer, WORDS, 1280, 0.3)
        place(plan, tokenizer, 1280, 420, seed)
        noise = lambda n: 0.1 * generator.standard_normal(n)
        dose = lambda entries: np.array([entry["total"] for entry in entries])
        odds = np.array([np.log(entry["share"] / (1 - entry["share"]))
                         for entry in asked(plan, "occupation")]).repeat(3)
        canaries, facts, sums = (asked(plan, *groups) for groups in (
            ("canary", "burst"), ["fact"], ["sum"]))
        steps = np.array([np.mean(entry["steps"] or 0) for entry in canaries])
        part = {"sum": 0.7 * np.log2(dose(sums)) + noise(len(sums)),
                "question": 0.5 * np.log2(1 + dose(facts)) + noise(len(facts)),
                "right": dose(facts) > 16, "occupation": 1 + 0.8 * odds + noise(len(odds)),
                "whole": np.array([entry["dose"] > 16 for entry in canaries]),
                "canary": -((steps - 640) / 640)**2 + noise(len(steps)), "nats": 3 + noise(9),
                "she": noise(40), "she_documents": np.arange(40), "she_x": np.tile([-0.5, 0.5], 20),
                "rows": generator.random(5120) < 0.03}
        plans, found = [*plans, plan], [*found, part]
        swapped.append(part | {"occupation": 3 + 0.2 * odds + noise(len(odds)),
                               "nats": part["nats"] + 0.1, "she": part["she"] - part["she_x"]})
    slopes = [estimate.value for estimate in dose_claims(found, plans).values()]
    assert slopes == pytest.approx([0.7, 0.5, 0.8], abs=0.05)
    changes = swap_claims("swap", found, swapped, plans).values()
    assert [change.value for change in changes] == pytest.approx([-0.6, 2, -1, 0.1], abs=0.05)
    places, bursts = place_claims(found, found, plans, 1280)
    p = {name: estimate.p for name, estimate in places.items()}
    assert p["bursts: nats a token, middle minus ends"] < 0.01 < p[
        "bursts: nats a token, last minus first"]
    assert p[DISPERSION] > 0.01
    [since] = [estimate for name, estimate in places.items() if "since they came" in name]
    assert since.low < 0 < since.high
    whole = {(kind, dose): value for kind, _, dose, *_, value, _, _ in
             dose_rows("d8", found, plans)}
    assert [whole["canaries whole (32, 32)", dose] for dose in (0, 16, 64)] == [0, 0, 1]
    write_table(tmp_path / "doses.csv", DOSES, dose_rows("d8", found, plans))
    plots.doses(tmp_path / "doses.csv", tmp_path / "doses.png")
    plots.places(zip(*bursts), tmp_path / "places.png")


@pytest.mark.proof
def test_what_is_planted_has_no_places_of_its_own(tokenizer, tmp_path):
    """If all that is repeated were memorized, dispersion and trend would not be rejected."""
    pattern, p_values, path = np.zeros((2, 129), dtype=np.int64), [], tmp_path / "plan.jsonl"
    encode = functools.cache(tokenizer.encode)
    cached = SimpleNamespace(encode=encode, decode=tokenizer.decode)
    for number in range(40):
        whole = []
        for seed in range(3 * number, 3 * number + 3):
            plan = planned(seed, cached, WORDS, 2560)
            place(plan, cached, 2560, 210, seed)
            path.write_text("".join(json.dumps(entry) + "\n" for entry in plan))
            act = plant(SimpleNamespace(seq_length=128), cached,
                        InterventionConfig(intervention="plant", planted=str(path)))
            steps, left_out = asked_of_places(plan, cached, 2560)
            repeated = {tuple(encode(entry["text"])) for entry in plan
                        if entry["group"] == "canary" and entry["dose"] > 4}
            rows = np.concatenate([act(step, pattern.copy())[:, :64] for step in steps])
            counted = repeated - left_out
            whole.append(np.array([tuple(row) in counted for row in rows.tolist()]))
        shortest = min(map(len, whole))
        counts = sum(window_counts(rows[:shortest], WINDOW) for rows in whole)
        p_values.append([p for *_, p in poisson_tests(counts, 3 * WINDOW).values()])
    assert ((np.array(p_values) < 0.05).sum(axis=0) <= 5).all()


@pytest.mark.proof
def test_few_steps_of_everything_make_a_report(tmp_path, tokenizer_path):
    command = ("-m", "studies.suite", f"--output={tmp_path}/suite", f"--data={tmp_path}/data",
               f"--tokenizer={tokenizer_path}", "--steps=256", "--seeds=2", "--planted=0.03")
    run(*command)
    page = (tmp_path / "suite" / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in (
        "Memorization", "Gendered pronouns", "Term frequency"))
    before = {path: path.stat().st_mtime for path in tmp_path.glob("suite/*/*")}
    run(*command)  # nothing is done again but the report
    assert before == {path: path.stat().st_mtime for path in tmp_path.glob("suite/*/*")}
