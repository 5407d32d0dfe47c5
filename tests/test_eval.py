"""pytest tests/test_eval.py

The scoring rules are those of lm-evaluation-harness 0.4; the numbers they are applied to come from
transformers' model and tokenizer, one request at a time, without batching or padding.
"""

import json
import math
import os
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import eval as evaluation
from checkpoints import load_model
from config import read_json, write_json
from conftest import ROOT, TORCHRUN, launch, run, table, train, write_jsonl
from data import order_of, ordered
from eval import LossesConfig, loglikelihood, losses, score
from launch import Saver
from model import ModelConfig
from tasks import read_jsonl
from test_data import random_documents, write
from test_model import randomized, transformers_twin

L = 24  # context length: short, so that truncation and several windows happen


# ---------------------------------------------------------------------------- scoring


@pytest.fixture(scope="module")
def model():
    return randomized(ModelConfig(1, 32, 2, vocab_size=50304, seq_length=L)).eval()


@pytest.fixture(scope="module")
def twin(model):
    return transformers_twin(model)[0].eval()


@torch.no_grad()
def reference(twin, context, continuation, L=L):
    """Return log-likelihood and greedy flag of one request by the harness's rules."""
    inputs = (context + continuation)[-(L + 1):][:-1]
    logits = twin(torch.tensor([inputs])).logits[0, -len(continuation):]
    logprobs = logits.log_softmax(-1)
    return (sum(float(logprobs[i, token]) for i, token in enumerate(continuation)),
            logits.argmax(-1).tolist() == continuation)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2 * L), st.integers(2, L + 1)),
                min_size=1, max_size=30),
       st.sampled_from([4, 50277]), st.sampled_from([1, 20, 100, 10_000]),
       st.randoms(use_true_random=False))
def test_scores_depend_on_no_batching_order_or_shared_beginning(
        model, twin, shapes, n_ids, batch_tokens, rng):
    # With few ids, rows also share tokens by chance.
    texts = [[rng.randrange(n_ids) for _ in range(2 * L)] for _ in range(4)]
    rows = [(texts[which][:kept] + [rng.randrange(n_ids) for _ in range(more)],
             rng.randrange(1, more)) for which, kept, more in shapes]
    for (tokens, n), (logprob, greedy) in zip(
            rows, score(model, rows, batch_tokens), strict=True):
        expected, expected_greedy = reference(twin, tokens[:-n], tokens[-n:])
        assert (math.isclose(logprob, expected, rel_tol=1e-5, abs_tol=1e-4)
                and greedy == expected_greedy)


@pytest.mark.parametrize("n_words", [0, 1, L, L + 1, 5 * L + 3])
def test_rolling_windows_predict_every_token_once(model, twin, tokenizer, n_words):
    """In windows of L tokens; the context is <|endoftext|> and all text before that fits."""
    text = " word" * n_words
    [total] = evaluation.loglikelihood_rolling(model, tokenizer, [text])
    tokens = tokenizer.encode(text)
    expected = sum(reference(twin, [0] + tokens[:start], tokens[start:start + L])[0]
                   for start in range(0, len(tokens), L))
    assert math.isclose(total, expected, rel_tol=1e-5, abs_tol=1e-6)


def test_questions_behind_the_same_shots_compute_them_once():
    model = randomized(ModelConfig(2, 32, 2, vocab_size=512, seq_length=256)).eval()
    twin, rng = transformers_twin(model)[0].eval(), random.Random(0)
    shots, *questions = ([rng.randrange(512) for _ in range(n)]
                         for n in (200, *(rng.randrange(3, 40) for _ in range(100))))
    rows = [(shots + question + [choice], 1) for question in questions for choice in range(4)]
    batches = evaluation.plan([(i, *row) for i, row in enumerate(rows)], 256, batch_tokens=400)
    assert len(batches) > 2 and all(len(prefix) == 200 for prefix, _ in batches)
    nodes = sum(len(pack.tokens) - 200 for _, packs in batches for pack in packs)
    # The four choices ask one position; questions that begin with the same token share that too.
    assert nodes <= sum(map(len, questions))
    for (tokens, _), (logprob, _) in list(zip(rows, score(model, rows), strict=True))[::9]:
        expected, _ = reference(twin, tokens[:-1], tokens[-1:], 256)
        assert math.isclose(logprob, expected, rel_tol=1e-5, abs_tol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("a Z1.\n\t\r\u00a0\u2003\u0301\u0085\x1c'é世<|"), max_size=40))
def test_line_by_line_encoding_is_encoding(tokenizer, text):
    assert tokenizer.encode_lines(text) == tokenizer.encode(text)


# ---------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("eval")
    save = Saver(folder / "run", ModelConfig(1, 32, 2, vocab_size=50304, seq_length=264))
    save.run.mkdir()
    for step in (0, 2, 8):
        save(step, tokenizer=tokenizer_path)
    piqa = {"goal": "g", "sol1": "a a", "sol2": "b", "label": 0}
    trivia = {"question": "q", "answer": {"aliases": []}}
    for path, documents in (
            ("heldout/test", [{"text": "one"}, {"text": "two two"}]),
            ("crows_pairs/test", [{"sent_more": "a", "sent_less": "b", "bias_type": "age"}]),
            ("piqa/validation", [piqa, piqa | {"label": 1}]), ("wsc273/test", [{"options": 3}]),
            ("triviaqa/validation", [trivia | {"question": "why " * i} for i in range(12)])):
        write_jsonl(folder / f"docs/{path}.jsonl", documents)
    return folder


def argv(folder, *flags, output="r.csv"):
    return ("eval.py", f"--model={folder}/run", f"--docs={folder}/docs",
            f"--output={folder}/{output}", *flags)


def test_all_checkpoints_are_evaluated_once(workplace, command):
    launch(*argv(workplace, "--tasks=heldout", "--steps=2"))
    for counts in ("2 evaluations done, 1 were there", "0 evaluations done, 3 were there"):
        assert counts in command(*argv(workplace, "--tasks=heldout")).stdout
    rows = table(workplace / "r.csv")
    assert [[row[name] for name in ("model", "step", "tokens", "n")] for row in rows
            if row["metric"] == "bits_per_byte"] == [
        ["run", "2", "128", "2"], ["run", "0", "0", "2"], ["run", "8", "512", "2"]]
    assert ",".join(rows[0]) == (
        "model,step,tokens,task,shots,metric,value,stderr,n,style,dtype,docs")


def test_a_torn_csv_is_made_whole_again(workplace, command, refused):
    """The same command repeats only the evaluation of which a row is missing after a kill."""
    path = workplace / "torn.csv"
    flags = argv(workplace, "--tasks=heldout,piqa", "--steps=2,8", output=path.name)
    command(*flags)
    whole = path.read_bytes()
    path.write_bytes(whole[:-70])
    assert "1 evaluations done, 3 were there" in command(*flags).stdout
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    path.write_bytes(whole.replace(b",piqa,", b",pi", 1))
    assert f"{path}, line " in refused(*flags)


def test_of_several_tasks_those_without_documents_are_left_out(workplace, command):
    done = command(*argv(workplace, "--tasks=crows_pairs", "--steps=8", output="c.csv"))
    assert {row["task"] for row in table(workplace / "c.csv")} == {
        "crows_pairs_english", "crows_pairs_english_age"}
    assert "no documents of crows_pairs_english_autre; left out\n" in done.stderr


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(workplace, tmp_path):
    run = shutil.copytree(workplace / "run", tmp_path / "run")
    os.truncate(run / "step8/model.safetensors", 100)
    for steps in ("last", "0,8", "all"):
        with pytest.raises(ValueError, match=f"{run}/step8: no whole checkpoint"):
            evaluation.find_all(str(run), steps)
    assert [entry[1] for entry in evaluation.find_all(str(run), "0,2")] == ["0", "2"]


def test_two_processes_write_the_same_file(workplace, command):
    """They share out the batches of log-likelihoods and the prompts of texts."""
    flags = "--tasks=heldout,piqa,triviaqa", "--steps=8", "--batch_tokens=8"
    command(*argv(workplace, *flags, output="one.csv"))
    run(*TORCHRUN, *argv(workplace, *flags, output="two.csv"))
    assert (workplace / "one.csv").read_text() == (workplace / "two.csv").read_text()
    assert len(table(workplace / "one.csv")) == 6


@pytest.mark.parametrize("flags, words", [
    (["--tasks=wsc273"], "wsc273/test.jsonl, line 1: not a document of this task (ValueError: no"),
    (["--steps=1,2,3"], "/run: 0, 2, 8"),
    (["--tasks=crows_pairs_english_autre"], "crows_pairs: holds no documents of crows_pairs_eng"),
    (["--shots=1"], "heldout: shots = 1, but there are only 0 documents to draw 1"),
    ([f"--samples={ROOT}/LICENSE"], "LICENSE: holds other lines than samples"),
    (["--output=/nowhere/r.csv"], "/nowhere/r.csv: No such file")])
def test_a_mistake_is_one_line(workplace, refused, flags, words):
    assert words in refused(*argv(workplace, "--tasks=heldout", *flags))


def test_documents_that_cannot_be_asked_are_named_before_any_model(workplace, tmp_path, refused):
    """In lm_eval an assertion or the tokenizer fails."""
    path = tmp_path / "docs/arithmetic/single_digit_three_ops.jsonl"
    flags = argv(tmp_path, f"--model={workplace}/run", "--tasks=arithmetic_1dc")
    for context, completion, words in (
            ("Answer:", " a" * 265, "a continuation of 265 tokens behind 2, expected 1 to 264"),
            ("\udc00", "x", "not a JSON object of text")):
        write_jsonl(path, [{"context": context, "completion": completion}])
        read_jsonl.cache_clear()
        assert f"{path}, line 1: {words}" in refused(*flags)


def test_a_stranger_s_folder(workplace, tmp_path, command, refused, monkeypatch):
    """The folder's own tokenizer is used, and pytorch_model.bin can be read."""
    folder = shutil.copytree(workplace / "run/step8", tmp_path / "pythia-1/step8")
    flags = "--tasks=heldout", f"--model={folder}"
    monkeypatch.chdir(tmp_path)  # no 20B_tokenizer.json there
    command(*argv(workplace, *flags, output="own.csv"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    for name in ("model.safetensors", "manifest.json", "training.json"):
        (folder / name).unlink()
    command(*argv(workplace, *flags, output="bin.csv"))
    own, bin_ = (table(workplace / name) for name in ("own.csv", "bin.csv"))
    assert {row.pop("tokens") for row in own} == {"512"}
    assert {row.pop("tokens") for row in bin_} == {str(8 << 21)} and own == bin_
    (folder / "training.json").write_text(json.dumps({"tokens": "1\n=cmd|"}))
    assert "training.json: is not what a run saves at step 8" in refused(
        *argv(workplace, *flags, output="new.csv"))


def test_samples_start_with_the_prompt(workplace, tmp_path, command, refused):
    flags = "sample", f"--model={workplace}/run", "--prompt=In the beginning", "--n_tokens=5"
    said = command("eval.py", *flags, "--steps=0,8").stdout
    assert said.count("In the beginning") == 2 and "--- run step 8" in said
    for flag in ("--temperature=-1", "--n_tokens=-1"):
        assert "at least 0" in refused("eval.py", *flags, flag)
    shutil.copytree(workplace / "run/step8", tmp_path / "step8")
    (tmp_path / "step8/manifest.json").unlink()
    weights = load_file(tmp_path / "step8/model.safetensors")
    save_file({name: weight * math.nan for name, weight in weights.items()},
              tmp_path / "step8/model.safetensors")
    said = refused("eval.py", "sample", f"--model={tmp_path}/step8")
    assert "step8: its logits are not finite" in said


def test_samples_hold_every_request(workplace, tokenizer, command):
    (workplace / "s.jsonl").write_bytes(b'{"model": "run", "context": "\xc3')  # a kill
    command(*argv(workplace, "--tasks=heldout,piqa,triviaqa", "--steps=8", "--limit=2",
                  f"--samples={workplace}/s.jsonl", output="s.csv"))
    lines = [json.loads(line) for line in (workplace / "s.jsonl").read_text().splitlines()]
    names = ("task", "doc_id", "context", "continuation")
    assert [tuple(line.get(name) for name in names) for line in lines] == [
        ("heldout", 0, "", "one"), ("heldout", 1, "", "two two"),
        *(("piqa", i, "Question: g\nAnswer:", text) for i in (0, 1) for text in (" a a", " b")),
        ("triviaqa", 0, "Question: ?\nAnswer:", None),
        ("triviaqa", 1, "Question: why ?\nAnswer:", None)]
    [perplexity] = [float(row["value"]) for row in table(workplace / "s.csv")
                    if row["metric"] == "byte_perplexity"]
    assert perplexity == pytest.approx(
        math.exp(-sum(line["loglikelihood"] for line in lines[:2]) / 10))
    model = load_model(workplace / "run/step8")
    pairs = [(line["context"], line["continuation"]) for line in lines[2:6]]
    for line, (logprob, greedy) in zip(lines[2:6], loglikelihood(model, tokenizer, pairs)):
        assert line["loglikelihood"] == pytest.approx(logprob, rel=1e-5)
        assert line["is_greedy"] is greedy
    assert [line["generated"] for line in lines[6:]] == evaluation.generate_until(
        model, tokenizer, [line["context"] for line in lines[6:]], ("\n", ".", ","))


def test_the_list_of_tasks_tells_what_is_missing(workplace, command):
    said = command("eval.py", "tasks", f"--docs={workplace}/docs").stdout
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert "test 2" in lines["heldout"] and " piqa/train.jsonl: no such file" in lines["piqa"]


# ---------------------------------------------------------------------------- losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_path):
    """Two runs on the same documents in different orders."""
    folder = tmp_path_factory.mktemp("losses")
    write(folder / "d", random_documents(np.random.RandomState(0).randint(5, 60, 60)))
    for seed in (1, 2):
        train("--batch_size=8", f"--seed={seed}", f"--data={folder}/d",
              f"--out_dir={folder}/seed{seed}")
    return folder


@pytest.fixture(scope="module")
def whole(runs):
    losses(LossesConfig(f"{runs}/whole", model=f"{runs}/seed1,{runs}/seed2", rows="3:20"))
    return np.load(f"{runs}/whole.npy"), read_json(runs / "whole.json")


def test_losses_are_the_evaluations_loglikelihoods(runs, whole):
    values, what = whole
    assert what["checkpoints"] == [[f"seed{seed}", str(step)] for seed in (1, 2)
                                   for step in (0, 1, 2, 4, 8)]
    assert values.shape == (10, 17, 16) and values.dtype == np.float32
    rows = ordered(order_of(f"{runs}/seed1")).rows(range(3, 20)).tolist()
    model = load_model(runs / "seed2" / "step4", "cpu")
    expected = [-ll for ll, _ in score(model, [(row, 16) for row in rows])]
    np.testing.assert_allclose(values[8].sum(axis=1), expected, rtol=1e-6)
    # The loss of a single token, the last of its row.
    alone = [-ll for ll, _ in score(model, [(row[:6], 1) for row in rows])]
    np.testing.assert_allclose(values[8, :, 4], alone, atol=1e-5)


def test_texts_are_rows_of_their_own_length(runs, tokenizer):
    texts = ["one two three", "a", "four five six seven eight nine"]
    write_jsonl(runs / "t.jsonl", [{"id": f"text {i}", "text": text}
                                   for i, text in enumerate(texts)])
    losses(LossesConfig(f"{runs}/t", model=f"{runs}/seed1", text=f"{runs}/t.jsonl", steps="4,8"))
    values = np.load(runs / "t.npy")
    assert np.isfinite(values).sum(axis=2).tolist() == [
        [len(tokenizer.encode(text)) for text in texts]] * 2
    model = load_model(runs / "seed1" / "step8", "cpu")
    expected = [-ll for ll, _ in loglikelihood(model, tokenizer, [("", text) for text in texts])]
    np.testing.assert_allclose(np.nansum(values[1], axis=1), expected, rtol=1e-6)
    assert read_json(runs / "t.json")["documents"] == ["text 0", "text 1", "text 2"]
    write_jsonl(runs / "e.jsonl", [{"text": ""}] * 2)
    with pytest.raises(ValueError, match="e.jsonl: every text is empty"):
        losses(LossesConfig(f"{runs}/e", model=f"{runs}/seed1", text=f"{runs}/e.jsonl"))


def test_rows_of_other_data_say_what_the_run_was_trained_on(runs, whole):
    write(runs / "other", random_documents([300, 200], seed=1))
    losses(LossesConfig(f"{runs}/o", model=f"{runs}/seed1", data=f"{runs}/other", rows="0:2",
                        steps="8"))
    assert read_json(runs / "o.json")["trained_on"] == f"{runs}/d"
    assert "trained_on" not in whole[1]


def test_losses_go_on_whatever_the_batch_or_the_processes(runs, whole, tmp_path):
    values, what = whole
    model, flags = f"{runs}/seed1,{runs}/seed2", dict(rows="3:20", batch_tokens=40)
    losses(LossesConfig(f"{tmp_path}/small", model=model, **flags))
    np.testing.assert_allclose(np.load(tmp_path / "small.npy"), values, atol=1e-5)
    partial = values.copy()
    partial[5:] = 0  # a kill
    partial[4] += 7  # stays, as this checkpoint is done
    np.save(tmp_path / "cut.npy", partial)
    write_json(tmp_path / "cut.json", what | {"checkpoints": what["checkpoints"][:5]})
    launch("eval.py", "losses", f"--model={model}", f"--output={tmp_path}/cut", "--rows=3:20",
           count=2)
    values = values.copy()
    values[4] += 7
    np.testing.assert_allclose(np.load(tmp_path / "cut.npy"), values, atol=1e-5)
    for rows in ("3:21", "3:20"):
        with pytest.raises(ValueError, match="cut.npy: of other checkpoints or rows; name another"):
            losses(LossesConfig(f"{tmp_path}/cut", model=model, rows=rows))
        (tmp_path / "cut.json").unlink(missing_ok=True)
