"""python -m pytest tests/test_suite.py -m "proof or not proof" """

from collections import Counter

import numpy as np
import pytest
from conftest import run

import plots
from studies.corpus import place, planned
from studies.results import write_table
from studies.suite import (
    DOSES, canaries, dose_claims, dose_rows, facts, occupations, place_claims, sums, swap_claims)

WORDS = "light water house people king land son day hand heart voice stone river field".split()


def test_plans_give_each_seed_other_doses_of_the_same_texts(tokenizer):
    plans = {}
    for seed in (1, 2):
        plan = plans[seed] = planned(seed, tokenizer, WORDS, 1280)
        tokens = place(plan, tokenizer, 1280, 420, seed)
        load, sizes = Counter(), [len(tokenizer.encode(entry["text"])) + 1 for entry in plan]
        for entry, size in zip(plan, sizes):
            assert len(set(entry["steps"])) == entry["dose"]
            load.update({step: size for step in entry["steps"]})
            if entry["group"] == "burst":
                assert np.ptp(entry["steps"]) < 48
        assert max(load) < 1280 and max(load.values()) <= 420 and sum(load.values()) == tokens
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
                         for entry in occupations(plan)]).repeat(3)
        steps = np.array([np.mean(entry["steps"] or 0) for entry in canaries(plan)])
        part = {"sum": 0.7 * np.log2(dose(sums(plan))) + noise(len(sums(plan))),
                "question": 0.5 * np.log2(1 + dose(facts(plan))) + noise(len(facts(plan))),
                "right": dose(facts(plan)) > 16, "occupation": 1 + 0.8 * odds + noise(len(odds)),
                "whole": np.array([entry["dose"] > 16 for entry in canaries(plan)]),
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
    rows, bursts = place_claims(found, plans)
    p = {name: permutation_p for name, _, _, permutation_p in rows}
    assert p["bursts: nats a token, middle minus ends"] < 0.01 < p[
        "bursts: nats a token, last minus first"]
    whole = {(kind, dose): value for kind, _, dose, *_, value, _, _ in
             dose_rows("d8", found, plans)}
    assert [whole["canaries whole (32, 32)", dose] for dose in (0, 16, 64)] == [0, 0, 1]
    write_table(tmp_path / "doses.csv", DOSES, dose_rows("d8", found, plans))
    plots.doses(tmp_path / "doses.csv", tmp_path / "doses.png")
    plots.places(bursts, tmp_path / "places.png")


@pytest.mark.proof
def test_few_steps_of_everything_make_a_report(tmp_path, tokenizer_path):
    command = ("-m", "studies.suite", f"--output={tmp_path}/suite", f"--data={tmp_path}/data",
               f"--tokenizer={tokenizer_path}", "--steps=256", "--seeds=2", "--scale=0.03")
    run(*command)
    page = (tmp_path / "suite" / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in (
        "Memorization", "Gendered pronouns", "Term frequency"))
    before = {path: path.stat().st_mtime for path in tmp_path.glob("suite/*/*")}
    run(*command)  # nothing is done again but the report
    assert before == {path: path.stat().st_mtime for path in tmp_path.glob("suite/*/*")}
