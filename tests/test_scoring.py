"""pytest tests/test_scoring.py

The scoring rules are those of lm-evaluation-harness 0.4; the numbers they are applied to come from
transformers' model and tokenizer, one request at a time, without batching or padding.
"""

import math
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as OriginalTokenizer

import eval as scoring
from model import ModelConfig, Pythia
from test_model import randomized, transformers_twin

L = 24  # context length: short, so that truncation and several windows happen
CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=50304, seq_length=L)


@pytest.fixture(scope="module")
def model():
    return randomized(CONFIG).eval()


@pytest.fixture(scope="module")
def twin(model):
    return transformers_twin(model)[0].eval()


@pytest.fixture(scope="module")
def encode(tokenizer_path):
    original = OriginalTokenizer.from_file(str(tokenizer_path))
    return lambda text: original.encode(text).ids


@torch.no_grad()
def reference(twin, context, continuation):
    """Log-likelihood and greedy flag of token lists by rules 4 and 5 of the harness, one at a
    time.
    """
    inputs = (context + continuation)[-(L + 1):][:-1]
    logits = twin(torch.tensor([inputs])).logits[0, -len(continuation):]
    logprobs = logits.log_softmax(-1)
    return (sum(float(logprobs[i, token]) for i, token in enumerate(continuation)),
            logits.argmax(-1).tolist() == continuation)


PAIRS = [("The capital of France is", " Paris"),
         ("Question: why?\nAnswer:", " because it is so, they say"),
         ("trailing spaces  \n", "move"), ("", "an empty context"),
         ("", "<|endoftext|>already there"), ("é e\u0301 世界", " naïve\u0301"),
         ("a " * 40, "b " * 5), ("merge acro", "ss the boundary"), ("x", " y" * (L - 1))]


def test_pairs_are_encoded_by_the_harness_rules(tokenizer, encode):
    for context, continuation in PAIRS:
        if context == "":
            whole = [0] + encode(continuation) if encode(continuation)[0] else encode(continuation)
            expected = (whole, len(whole) - 1)
        else:
            whole = encode(context + continuation)
            expected = (whole, len(whole) - len(encode(context.rstrip())))
        assert scoring.encode_pair(tokenizer, context, continuation) == expected
        # The paper's harness encodes each apart; white space stays with the context.
        expected = (encode(context) or [0]) + encode(continuation), len(encode(continuation))
        assert scoring.encode_pair(tokenizer, context, continuation, "v0.3") == expected


def test_loglikelihood_equals_one_request_at_a_time(model, twin, tokenizer):
    rows = [scoring.encode_pair(tokenizer, *pair) for pair in PAIRS]
    assert scoring.loglikelihood(model, tokenizer, PAIRS) == scoring.score(model, rows)
    check(model, twin, rows)


def check(model, twin, rows, batch_tokens=scoring.BATCH_TOKENS):
    """Hold score's results of rows equal to the reference's."""
    for (tokens, n), (logprob, greedy) in zip(
            rows, scoring.score(model, rows, batch_tokens), strict=True):
        expected, expected_greedy = reference(twin, tokens[:-n], tokens[-n:])
        assert (math.isclose(logprob, expected, rel_tol=1e-5, abs_tol=1e-4)
                and greedy == expected_greedy)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 3 * L), st.integers(1, L)), min_size=1, max_size=12),
       st.sampled_from([1, 20, 100, 10_000]), st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_batching_or_order(model, twin, shapes, batch_tokens, rng):
    rows = [([rng.randrange(50277) for _ in range(length)], min(n, length - 1))
            for length, n in shapes]
    check(model, twin, rows, batch_tokens)


def test_greedy_is_true_where_it_should_be(model, twin):
    prompt = torch.tensor([[5, 6, 7]])
    row = model.generate(prompt, 6, temperature=0)[0].tolist()
    wrong = row[:-1] + [(row[-1] + 1) % 50277]
    assert [greedy for _, greedy in scoring.score(model, [(row, 6), (wrong, 6)])] == [True, False]


def rolling_reference(twin, tokens):
    """The windows of lm_eval's rolling log-likelihood, written out; each predicts its tokens
    once.
    """
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
    [total] = scoring.loglikelihood_rolling(model, tokenizer, [text])
    assert math.isclose(total, rolling_reference(twin, tokenizer.encode(text)),
                        rel_tol=1e-5, abs_tol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, L), st.integers(2, 12)),
                min_size=2, max_size=30),
       st.sampled_from([1, 60, 10_000]), st.randoms(use_true_random=False))
def test_shared_beginnings_change_no_score(model, twin, shapes, batch_tokens, rng):
    # Few tokens: much is shared by chance too.
    texts = [[rng.randrange(4) for _ in range(L)] for _ in range(4)]
    rows = [(texts[which][:kept] + [rng.randrange(4) for _ in range(more)], rng.randrange(1, more))
            for which, kept, more in shapes]
    check(model, twin, rows, batch_tokens)


def test_questions_behind_the_same_shots_compute_them_once():
    model = randomized(ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=512,
                                   seq_length=256)).eval()
    twin, rng = transformers_twin(model)[0].eval(), random.Random(0)
    shots = [rng.randrange(512) for _ in range(200)]
    rows = [(shots + question + [choice], 1) for question in
            ([rng.randrange(512) for _ in range(rng.randrange(3, 40))] for _ in range(100))
            for choice in range(4)]
    batches = scoring.plan([(i, *row) for i, row in enumerate(rows)], 256, batch_tokens=400)
    assert len(batches) > 2 and all(len(prefix) == 200 for prefix, _ in batches)
    nodes = sum(len(pack.tokens) - 200 for _, packs in batches for pack in packs)
    # The four choices ask one position; questions that begin with the same token share that too.
    assert nodes <= sum(len(tokens) - 1 - 200 for tokens, _ in rows[::4])
    with torch.no_grad():
        for (tokens, _), (logprob, _) in list(
                zip(rows, scoring.score(model, rows), strict=True))[::9]:
            logits = twin(torch.tensor([tokens[:-1]])).logits[0, -1]
            assert math.isclose(logprob, float(logits.log_softmax(-1)[tokens[-1]]),
                                rel_tol=1e-5, abs_tol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("a Z1.\n\t\r\u00a0\u2003\u0301\u0085\x1c'é世<|"), max_size=40))
def test_line_by_line_encoding_is_encoding(tokenizer, text):
    assert tokenizer.encode_lines(text) == tokenizer.encode(text)


def test_generation_is_one_prompt_at_a_time_cut_at_its_stops(model, twin, tokenizer):
    prompts = ["The cat", "",
               "a much longer prompt than there is room for in so small a context, isn't it?",
               "x\n"]
    stops, n_tokens = (" ", "e"), 9
    for prompt, ours in zip(
            prompts, scoring.generate_until(model, tokenizer, prompts, stops, n_tokens),
            strict=True):
        tokens = (tokenizer.encode(prompt) or [0])[-(L - n_tokens):]
        for _ in range(n_tokens):
            with torch.no_grad():
                tokens = tokens + [int(twin(torch.tensor([tokens])).logits[0, -1].argmax())]
        new = tokens[-n_tokens:]
        expected = tokenizer.decode(new[:new.index(0)] if 0 in new else new)
        for stop in stops:
            expected = expected.split(stop)[0]
        assert ours == expected


def test_a_row_that_has_ended_stays_ended(model):
    """Whoever looks at the last tokens only sees an end once; the rows to compute must not grow
    again.
    """
    rows = []

    def finished(new):
        rows.append(len(new))
        return torch.arange(len(new)) == new.shape[1] - 1  # a row after the other
    model.generate(torch.ones(6, 3, dtype=torch.int64), 6, 0, finished=finished)
    assert rows == [6, 6, 4, 3, 3, 3]  # they leave the batch when a quarter of it has ended
