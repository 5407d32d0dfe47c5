"""pytest tests/test_eval.py

The scoring rules are those of lm-evaluation-harness 0.4; the numbers they are applied to come from
transformers' model and tokenizer, one request at a time, without batching or padding.
"""

import csv
import json
import math
import random
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as OriginalTokenizer

import eval as evaluation
from checkpoints import save
from conftest import ROOT
from model import ModelConfig, Pythia
from test_model import randomized, transformers_twin
from tokenizer import Tokenizer
from train import TrainConfig, make_optimizer

L = 24  # context length: short, so that truncation and several windows happen
CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=50304, seq_length=L)


@pytest.fixture(scope="module")
def model():
    return randomized(CONFIG).eval()


@pytest.fixture(scope="module")
def twin(model):
    return transformers_twin(model)[0].eval()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def encode(tokenizer_path):
    original = OriginalTokenizer.from_file(str(tokenizer_path))
    return lambda text: original.encode(text).ids


@torch.no_grad()
def reference(twin, context, continuation):
    """Log-likelihood and greedy flag of token lists by rules 4 and 5 of the harness, one at a time."""
    inputs = (context + continuation)[-(L + 1):][:-1]
    logits = twin(torch.tensor([inputs])).logits[0, -len(continuation):]
    logprobs = logits.log_softmax(-1)
    return (sum(float(logprobs[i, token]) for i, token in enumerate(continuation)),
            logits.argmax(-1).tolist() == continuation)


PAIRS = [("The capital of France is", " Paris"), ("Question: why?\nAnswer:", " because it is so, they say"),
         ("trailing spaces  \n", "move"), ("", "an empty context"), ("", "<|endoftext|>already there"),
         ("é e\u0301 世界", " naïve\u0301"), ("a " * 40, "b " * 5), ("merge acro", "ss the boundary"),
         ("x", " y" * (L - 1))]


def test_pairs_are_encoded_by_the_harness_rules(tokenizer, encode):
    for context, continuation in PAIRS:
        tokens, n = evaluation.encode_pair(tokenizer, context, continuation)
        if context == "":
            whole = [0] + encode(continuation) if encode(continuation)[0] else encode(continuation)
            expected = (whole, len(whole) - 1)
        else:
            moved = context[len(context.rstrip()):]
            whole = encode(context + continuation)
            assert context.rstrip() + moved == context
            expected = (whole, len(whole) - len(encode(context.rstrip())))
        assert (tokens, n) == expected


def test_loglikelihood_equals_one_request_at_a_time(model, twin, tokenizer):
    for (context, continuation), (logprob, greedy) in zip(
            PAIRS, evaluation.loglikelihood(model, tokenizer, PAIRS), strict=True):
        tokens, n = evaluation.encode_pair(tokenizer, context, continuation)
        expected, expected_greedy = reference(twin, tokens[:-n], tokens[-n:])
        assert math.isclose(logprob, expected, rel_tol=1e-5, abs_tol=1e-4) and greedy == expected_greedy


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 3 * L), st.integers(1, L)), min_size=1, max_size=12),
       st.sampled_from([1, 20, 100, 10_000]), st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_batching_or_order(model, twin, shapes, batch_tokens, rng):
    rows = [([rng.randrange(50277) for _ in range(length)], min(n, length - 1)) for length, n in shapes]
    for (tokens, n), (logprob, greedy) in zip(rows, evaluation.score(model, rows, batch_tokens), strict=True):
        expected, expected_greedy = reference(twin, tokens[:-n], tokens[-n:])
        assert math.isclose(logprob, expected, rel_tol=1e-5, abs_tol=1e-4) and greedy == expected_greedy


def test_greedy_is_true_where_it_should_be(model, twin):
    prompt = torch.tensor([[5, 6, 7]])
    row = model.generate(prompt, 6, temperature=0)[0].tolist()
    wrong = row[:-1] + [(row[-1] + 1) % 50277]
    assert [greedy for _, greedy in evaluation.score(model, [(row, 6), (wrong, 6)])] == [True, False]


def rolling_reference(twin, tokens):
    """The windows of evaluation.md section 5, written out; each predicts its tokens once."""
    windows, m = [], min(L, len(tokens))
    if tokens:
        windows.append(([0] + tokens[:m - 1], tokens[:m]))
    done = m
    while done < len(tokens):
        w = min(len(tokens) - done, L)
        end = done + w
        windows.append((tokens[end - L - 1:end - 1], tokens[end - w:end]))
        done = end
    total = 0.0
    with torch.no_grad():
        for inputs, targets in windows:
            logprobs = twin(torch.tensor([inputs])).logits[0, -len(targets):].log_softmax(-1)
            total += sum(float(logprobs[i, token]) for i, token in enumerate(targets))
    return total


@pytest.mark.parametrize("n_words", [0, 1, L - 1, L, L + 1, 2 * L, 5 * L + 3])
def test_rolling_windows_predict_every_token_once(model, twin, tokenizer, n_words):
    text = " word" * n_words
    [total] = evaluation.loglikelihood_rolling(model, tokenizer, [text])
    assert math.isclose(total, rolling_reference(twin, tokenizer.encode(text)), rel_tol=1e-5, abs_tol=1e-6)


def test_a_continuation_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="does not fit"):
        evaluation.score(model, [(list(range(L + 5)), L + 1)])


def test_bootstrap_draws_are_the_harness_draws():
    values = [random.Random(9).gauss(-3, 2) for _ in range(37)]
    draws = []
    for seed in range(3):  # lm_eval/api/metrics.py, _bootstrap_internal
        rnd = random.Random(seed)
        draws += [math.exp(-statistics.fmean(rnd.choices(values, k=37))) for _ in range(1000)]
    value, stderr = evaluation.perplexity(values, iterations=3000)
    assert math.isclose(value, math.exp(-statistics.fmean(values)), rel_tol=1e-12)
    assert math.isclose(stderr, statistics.stdev(draws), rel_tol=1e-12)


# ---------------------------------------------------------------------------- tasks


def test_piqa_and_lambada_by_hand(model, twin, tokenizer):
    docs = [{"goal": "open a jar", "sol1": "twist the lid ", "sol2": "é", "label": 1},
            {"goal": "boil an egg", "sol1": "in water", "sol2": "in the sun for a very long time", "label": 0}]
    ll = lambda context, continuation: evaluation.loglikelihood(model, tokenizer, [(context, continuation)])[0]
    acc = acc_norm = 0
    for doc in docs:
        lls = [ll(f"Question: {doc['goal']}\nAnswer:", " " + doc[sol])[0] for sol in ("sol1", "sol2")]
        acc += (lls[1] > lls[0]) == doc["label"]
        acc_norm += (lls[1] / len(doc["sol2"]) > lls[0] / len(doc["sol1"])) == doc["label"]
    rows = {metric: value for _, metric, value, _, _ in evaluation.piqa(model, tokenizer, docs)}
    assert rows == {"acc": acc / 2, "acc_norm": acc_norm / 2}
    text = "He opened the door and\nsaw a \"cat\""
    (_, _, acc, _, n), (_, _, perplexity, stderr, _) = evaluation.lambada_openai(model, tokenizer, [{"text": text}])
    logprob, greedy = ll("He opened the door and\nsaw a", ' "cat"')
    assert (acc, n, stderr) == (float(greedy), 1, None) and math.isclose(perplexity, math.exp(-logprob))


def test_heldout_bits_are_ratios_of_sums(model, tokenizer):
    docs = [{"text": "héllo " * 9, "meta": {"pile_set_name": "A"}}, {"text": "x", "meta": {"pile_set_name": "B"}},
            {"text": "more of A", "meta": {"pile_set_name": "A"}}]
    lls = evaluation.loglikelihood_rolling(model, tokenizer, [doc["text"] for doc in docs])
    sizes = [len(doc["text"].encode()) for doc in docs]
    rows = {task: (value, n) for task, _, value, _, n in evaluation.heldout(model, tokenizer, docs)}
    bits = lambda *which: -sum(lls[i] for i in which) / sum(sizes[i] for i in which) / math.log(2)
    assert rows == {"heldout": (pytest.approx(bits(0, 1, 2)), 3), "heldout:A": (pytest.approx(bits(0, 2)), 2),
                    "heldout:B": (pytest.approx(bits(1)), 1)}


def test_published_documents_are_read(tokenizer, pythia_data):
    model = Pythia(ModelConfig(n_layers=1, d_model=32, n_heads=2, seq_length=512))
    for task in ("lambada_openai", "piqa"):
        documents = evaluation.read_documents(pythia_data, task, limit=8)
        rows = evaluation.TASKS[task][0](model, tokenizer, documents)
        assert all(n == 8 and math.isfinite(value) for *_, value, _, n in rows)


# ---------------------------------------------------------------------------- over training


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("eval")
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
    assert [(row["model"], row["step"], row["tokens"], row["n"]) for row in rows] == [
        ("run", "2", "128", "2"), ("run", "0", "0", "2"), ("run", "8", "512", "2")]
    assert list(rows[0]) == "model,step,tokens,task,shots,metric,value,stderr,n".split(",")


@pytest.mark.parametrize("flags, words", [
    (["--tasks=hellaswagg"], "no task called hellaswagg; there are lambada_openai"),
    (["--tasks=lambada_openai"], "lambada_openai/test.jsonl: no such file"),
    (["--tasks=piqa"], "piqa/validation.jsonl, line 1: sol1 is 3, expected a str"),
    (["--tasks=heldout", "--steps=1,2,3"], "no checkpoint at step 1, 3; there are 0, 2, 8"),
    (["--tasks=heldout", "--steps=first"], "steps = 'first', expected all, last"),
    (["--tasks=heldout", "--model=/proc"], "/proc: neither a run folder")])
def test_a_mistake_is_one_line(workplace, flags, words):
    done = run(workplace, *flags, expect=2)
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_samples_start_with_the_prompt(workplace):
    done = subprocess.run([sys.executable, "eval.py", "sample", f"--model={workplace}/run", "--steps=0,8",
                           "--prompt=In the beginning", "--n_tokens=5"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("In the beginning") == 2 and "--- run step 8" in done.stdout, done.stderr
