"""pytest tests/test_eval.py"""

import csv
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import config
import eval as evaluation
from checkpoints import load_model, save
from conftest import ROOT
from eval import generate_until, loglikelihood
from model import ModelConfig, Pythia
from tasks import read_jsonl
from tokenizer import Tokenizer
from train import make_optimizer, TrainConfig

CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=50304, seq_length=264)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("eval")
    model = Pythia(CONFIG)
    optimizer = make_optimizer(model, TrainConfig(data="", out_dir="", learning_rate=1.0))
    for run, steps in (("run", (0, 2, 8)), ("diverged", (9,))):
        (folder / run).mkdir()
        if run == "diverged":
            torch.nn.init.constant_(model.embed_out.weight, math.nan)
        for step in steps:
            save(folder / run, step, model, optimizer, {"updates": 0, "tokens": 64 * step},
                 tokenizer_path)
    piqa = {"goal": "g", "sol1": "a a", "sol2": "b", "label": 0}
    trivia = {"question": "q", "answer": {"aliases": []}}
    for path, documents in {
            "docs/heldout/test": [{"text": "one"}, {"text": "two two"}],
            "docs/piqa/validation": [piqa, piqa | {"label": 1}],
            "docs/wsc273/test": [{"options": 3}],
            "docs/triviaqa/validation": [trivia | {"question": "why " * i} for i in range(12)],
            }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{path}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in documents))
    return folder


def run(folder, *flags, launcher=(), output="r.csv"):
    command = [sys.executable, *launcher, "eval.py", f"--model={folder}/run",
               f"--docs={folder}/docs", f"--output={folder}/{output}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluate(folder, *flags, output="r.csv"):
    """The command line in this process."""
    gc.collect()  # the error of an earlier one may still hold the lock of its output
    flags = f"--model={folder}/run", f"--docs={folder}/docs", f"--output={folder}/{output}", *flags
    config.run(evaluation.main, config.parse(flags, evaluation.EvalConfig))


def refused(capsys, folder, *flags, output="r.csv"):
    """Return the one line that a mistake ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        evaluate(folder, *flags, output=output)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    return said


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_all_checkpoints_are_evaluated_once(workplace, capsys):
    """Even those that a kill has torn: the metrics not yet written would be lost for good."""
    run(workplace, "--tasks=heldout", "--steps=2")
    [first, *_] = (workplace / "r.csv").read_text().splitlines()[1:]
    with open(workplace / "r.csv", "a") as file:
        file.write(first.replace("run,2,128", "run,8,512") + "\nrun,8,512,heldout,0,byte_per")
    for counts in ("2 evaluations done, 1 were there", "0 evaluations done, 3 were there"):
        evaluate(workplace, "--tasks=heldout")
        assert counts in capsys.readouterr().out
    rows = rows_of(workplace / "r.csv")
    assert [[row[name] for name in ("model", "step", "tokens", "n")] for row in rows
            if row["metric"] == "bits_per_byte"] == [
        ["run", "2", "128", "2"], ["run", "0", "0", "2"], ["run", "8", "512", "2"]]
    assert ",".join(rows[0]) == (
        "model,step,tokens,task,shots,metric,value,stderr,n,style,dtype,docs")


def test_a_damaged_csv_is_made_whole_again(workplace, capsys):
    """By the same command: the evaluation that lacks a row, and nothing else."""
    path, flags = workplace / "damaged.csv", ("--tasks=heldout,piqa", "--steps=2,8")
    evaluate(workplace, *flags, output=path.name)
    whole, at = path.read_bytes(), b"run,2,128,piqa,0,acc_norm"
    lines = whole.splitlines(True)
    assert len(lines) == 11
    for text, again in (
            (whole[:-70], 1), (whole.replace(b"\n", b"\r\n")[:-70], 1),
            (whole.replace(at, b'run,2,"28,piqa,0,acc_norm'), 1),
            (whole.replace(at, b"r\xffn,2,128,piqa,0,acc_norm"), 1),
            (whole.replace(lines[5], lines[5][:-1] + b"*"), 2)):  # two lines become one
        path.write_bytes(text)
        capsys.readouterr()
        evaluate(workplace, *flags, output=path.name)
        said = capsys.readouterr()
        assert f"{again} evaluations done, {4 - again} were there" in said.out
        assert sorted(path.read_bytes().splitlines(True)) == sorted(lines)
        assert re.search(rf"{path}, line \d+ is (torn|damaged) and goes", said.err)


def test_a_name_that_no_csv_can_hold_is_refused_before_any_model(workplace, tmp_path, capsys):
    (tmp_path / "docs/heldout").mkdir(parents=True)
    (tmp_path / "docs/heldout/test.jsonl").write_text(json.dumps(
        {"text": "one", "meta": {"pile_set_name": "x\n"}}))
    for name in ("r\nun", os.fsdecode(b"\xff"), "run"):
        (tmp_path / name).symlink_to(workplace / "run")
        said = refused(capsys, tmp_path if name == "run" else workplace, "--tasks=heldout",
                       f"--model={tmp_path}/{name}", output="odd.csv")
        assert re.search("odd.csv: cannot hold (model|task) = '", said)


def test_a_torn_sample_is_dropped_and_nothing_of_another_file(tmp_path):
    path, whole = tmp_path / "s.jsonl", b'{"model": "run", "step": "1"}\n' * 2
    for torn in (b"", b'{"mod', b'{"model": "run", "context": "\xc3'):
        path.write_bytes(whole + torn)
        evaluation.open_samples(path)
        assert path.read_bytes() == whole
    for text in ('{"text": "documents"}\n', "one\ntwo"):
        path.write_text(text)
        with pytest.raises(ValueError, match="s.jsonl: holds other lines than samples"):
            evaluation.open_samples(path)
        assert path.read_text() == text


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(workplace, tmp_path, capsys):
    run = shutil.copytree(workplace / "run", tmp_path / "run")
    os.truncate(run / "step8/model.safetensors", 100)
    words = f"{run}/step8: no whole checkpoint (`python verify.py verify` says why)"
    for steps in ("last", "8", "0,8"):
        with pytest.raises(ValueError) as error:
            evaluation.find_all(str(run), steps)
        assert str(error.value) == words
    assert [entry[1] for entry in evaluation.find_all(str(run), "all")] == ["0", "2"]
    assert capsys.readouterr().err == f"{words}; left out\n"


def test_of_several_tasks_those_without_documents_are_left_out(tmp_path, capsys):
    """CrowS-Pairs as first distributed has no bias_type "autre"."""
    (tmp_path / "crows_pairs").mkdir()
    (tmp_path / "crows_pairs/test.jsonl").write_text(json.dumps(
        {"sent_more": "a", "sent_less": "b", "bias_type": "age"}))
    config = evaluation.EvalConfig(model="", tasks="crows_pairs", docs=f"{tmp_path}")
    assert [job.name for job in evaluation.prepare_all(config)] == [
        "crows_pairs_english", "crows_pairs_english_age"]
    words = "crows_pairs_english_autre: .*test.jsonl: holds no documents of this task"
    assert re.search(f"{words}; left out\n", capsys.readouterr().err)
    with pytest.raises(ValueError, match=words):
        evaluation.prepare_all(replace(config, tasks="crows_pairs,crows_pairs_english_autre"))


def test_two_processes_write_the_same_file(workplace):
    """Of log-likelihoods, whose batches are shared out, and of texts, whose prompts are."""
    flags = "--tasks=heldout,piqa,triviaqa", "--steps=8", "--batch_tokens=8"
    evaluate(workplace, *flags, output="one.csv")
    run(workplace, *flags, output="two.csv", launcher=(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    assert (workplace / "one.csv").read_text() == (workplace / "two.csv").read_text()
    assert len(rows_of(workplace / "one.csv")) == 6


def test_a_diverged_checkpoint_is_measured_once_as_not_a_number(workplace, capsys):
    flags = ("--tasks=heldout,piqa", f"--model={workplace}/diverged",
             f"--samples={workplace}/nan.jsonl")
    evaluate(workplace, *flags, output="nan.csv")
    assert {(row["task"], row["metric"], row["value"])
            for row in rows_of(workplace / "nan.csv")} == {
        ("heldout", "bits_per_byte", "nan"), ("heldout", "byte_perplexity", "nan"),
        ("heldout", "word_perplexity", "nan"),
        ("piqa", "acc", "nan"), ("piqa", "acc_norm", "nan")}
    lines = (workplace / "nan.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loglikelihood"]
            for line in lines] == [None] * 6
    evaluate(workplace, *flags, output="nan.csv")
    assert "0 evaluations done, 2 were there" in capsys.readouterr().out


def test_a_member_of_a_group_is_known_by_its_own_documents(tmp_path):
    """So that it is not computed again alone, and a plot may join both."""
    (tmp_path / "winobias").mkdir()
    (tmp_path / "winobias/winobias.jsonl").write_text("".join(json.dumps({
        "file": f"{kind}_stereotyped_type{i}.txt.test",
        "sentence": f"[The dev] met [him] {kind} {i}"}) + "\n"
        for kind in ("pro", "anti") for i in (1, 2)))
    group, alone = (evaluation.prepare(name, tmp_path)
                    for name in ("winobias", "wino_bias_type1_pro"))
    names = ("wino_bias_type1_pro:refers_to", "winobias", "wino_bias_type1_anti")
    config = evaluation.EvalConfig("", "", model="")
    measured = [(name, "em", 0, 0, 1) for name in names]
    (own, *_), (member, *others) = (
        [row[-1] for row in evaluation.csv_rows(config, ("", "", ""), job, measured)]
        for job in (alone, group))
    assert member == own and len({own, *others}) == 3


@pytest.mark.parametrize("flags, words", [
    (["--tasks=hellaswagg"], "no task called hellaswagg in style v0.4; `python eval.py tasks"),
    (["--tasks=xyz"], "no task called xyz in style v0.4; `python eval.py tasks"),
    (["--tasks=lambada_openai"], "lambada_openai/test.jsonl: no such file"),
    (["--tasks=wsc273"], "wsc273/test.jsonl, line 1: no field 'pronoun'"),
    (["--tasks=heldout", "--steps=1,2,3"], "no checkpoint at step 1; there are 0, 2, 8"),
    (["--tasks=heldout", "--steps=first"], "steps = 'first', expected all, last"),
    (["--tasks=heldout", "--shots=1"], "heldout: 1 shots need 1 documents of None"),
    (["--tasks=mmlu", "--style=v0.3"], "no task called mmlu in style v0.3"),
    (["--tasks=heldout", "--style=v1"], "style = 'v1', expected v0.4 or v0.3"),
    (["--tasks=heldout", "--samples=/nowhere/s.jsonl"], "/nowhere/s.jsonl: No such file"),
    (["--tasks=heldout", "--output=/nowhere/r.csv"], "/nowhere/r.csv: No such file"),
    (["--tasks=heldout", "--output=/dev/full"], "/dev/full: not a regular file"),
    (["--tasks=heldout", "--output=/proc"], "/proc: not a regular file"),
    (["--tasks=heldout", "--model=/proc"], "/proc: no whole checkpoint")])
def test_a_mistake_is_one_line(workplace, capsys, flags, words):
    assert words in refused(capsys, workplace, *flags)


def test_documents_that_cannot_be_asked_are_named_before_any_model(workplace, tmp_path, capsys):
    """lm_eval ends with an assertion, or in its tokenizer."""
    path = tmp_path / "docs/arithmetic/single_digit_three_ops.jsonl"
    path.parent.mkdir(parents=True)
    for context, completion, words in (
            ("Ans", "wer", "a continuation of 0 tokens behind 1 does not fit in 264 tokens"),
            ("Answer:", "", "a continuation of 0 tokens behind 2 does not fit"),
            ("Answer:", " a" * 265, "a continuation of 265 tokens behind 2 does not fit"),
            ("\udc00", "x", "not a JSON object of text ('utf-8' codec can't encode")):
        path.write_text("".join(json.dumps({"context": "1 + 1 =", "completion": answer}) + "\n"
                                for answer in (" 2", " 3"))
                        + json.dumps({"context": context, "completion": completion}))
        read_jsonl.cache_clear()
        said = refused(capsys, tmp_path, f"--model={workplace}/run", "--tasks=arithmetic_1dc")
        assert f"arithmetic_1dc: {path}, line 3: {words}" in said
    path.write_text(json.dumps({"context": "1" + " +" * 300, "completion": " 2"}))
    read_jsonl.cache_clear()
    evaluate(tmp_path, f"--model={workplace}/run", "--tasks=arithmetic_1dc")
    assert capsys.readouterr().err == (  # once for all checkpoints
        "arithmetic_1dc: 1 of 1 requests are too long for 264 tokens of context and lose their "
        "beginning, as lm_eval's do\n")


def test_out_of_memory_is_one_line(workplace, capsys, monkeypatch):
    flags = "--tasks=piqa", "--steps=2", "--batch_tokens=64"

    def on_gpu(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
    for run_plan in (on_gpu, lambda *_: torch.empty(1 << 60)):
        monkeypatch.setattr(evaluation, "run_plan", run_plan)
        assert re.fullmatch("a setting is too large: .*(out of|allocate) memory.*; lower "
                            "--batch_tokens=64\n", refused(capsys, workplace, *flags, output="m"))
    monkeypatch.setattr(evaluation, "run_plan", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # a fault of ours keeps its traceback
        evaluate(workplace, *flags, output="m")


def test_a_stranger_s_folder(workplace, tmp_path, capsys, monkeypatch):
    """Its tokenizer is used if it is ours and refused if not; pytorch_model.bin is read as well."""
    folder = shutil.copytree(workplace / "run/step8", tmp_path / "pythia-1/step8")
    flags = "--tasks=heldout", f"--model={folder}"
    monkeypatch.chdir(tmp_path)  # no 20B_tokenizer.json there
    evaluate(workplace, *flags, output="own.csv")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    for name in ("model.safetensors", "manifest.json", "training.json"):
        (folder / name).unlink()
    evaluate(workplace, *flags, output="bin.csv")
    own, bin_ = (rows_of(workplace / name) for name in ("own.csv", "bin.csv"))
    assert {row.pop("tokens") for row in own} == {"512"}
    assert {row.pop("tokens") for row in bin_} == {str(8 << 21)} and own == bin_

    for tokens in (10**400, "1\n=cmd|", -1, 1.5, True):
        (folder / "training.json").write_text(json.dumps({"tokens": tokens}))
        assert "cannot hold tokens = " in refused(capsys, workplace, *flags, output="new.csv")
    (folder / "training.json").unlink()
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert "tokenizer.json: not the GPT-NeoX-20B tokenizer" in refused(
        capsys, workplace, *flags, output="new.csv")
    evaluate(workplace, *flags, f"--tokenizer={ROOT}/20B_tokenizer.json", output="new.csv")


def test_samples_start_with_the_prompt(workplace, capsys):
    flags = f"--model={workplace}/run", "--steps=0,8", "--prompt=In the beginning", "--n_tokens=5"
    evaluation.sample(config.parse(flags, evaluation.SampleConfig))
    said = capsys.readouterr().out
    assert said.count("In the beginning") == 2 and "--- run step 8" in said
    for wrong in ({"temperature": -1.0}, {"temperature": 1e-40}, {"n_tokens": -1}):
        with pytest.raises(ValueError, match="expected (0 or )?at least [01]"):
            evaluation.SampleConfig(model="run", **wrong)


def test_samples_hold_every_request(workplace):
    (workplace / "s.jsonl").write_text('{"model": "run", "st')  # a kill
    evaluate(workplace, "--tasks=heldout,piqa,triviaqa", "--steps=8", "--limit=2",
             f"--samples={workplace}/s.jsonl", output="s.csv")
    lines = [json.loads(line) for line in (workplace / "s.jsonl").read_text().splitlines()]
    assert {(line["model"], line["step"], line["shots"], line["style"]) for line in lines} == {
        ("run", "8", 0, "v0.4")}
    asked = [(line["task"], line["doc_id"], line["context"], line.get("continuation"))
             for line in lines]
    assert asked == [
        ("heldout", 0, "", "one"), ("heldout", 1, "", "two two"),
        *(("piqa", i, "Question: g\nAnswer:", choice) for i in (0, 1) for choice in (" a a", " b")),
        ("triviaqa", 0, "Question: ?\nAnswer:", None),
        ("triviaqa", 1, "Question: why ?\nAnswer:", None)]
    rows = {(row["task"], row["metric"]): float(row["value"])
            for row in rows_of(workplace / "s.csv")}
    assert rows["heldout", "byte_perplexity"] == pytest.approx(
        math.exp(-sum(line["loglikelihood"] for line in lines[:2]) / 10))
    model, tokenizer = load_model(workplace / "run/step8"), Tokenizer(ROOT / "20B_tokenizer.json")
    for line in lines[2:6]:
        request = line["context"], line["continuation"]
        [(logprob, greedy)] = loglikelihood(model, tokenizer, [request])
        assert line["loglikelihood"] == pytest.approx(logprob, rel=1e-5)
        assert line["is_greedy"] is greedy
    for line in lines[6:]:
        [generated] = generate_until(model, tokenizer, [line["context"]], ("\n", ".", ","))
        assert line["generated"] == generated


def test_the_list_of_tasks_tells_what_is_missing(workplace, capsys):
    evaluation.list_tasks(evaluation.EvalConfig("", f"{workplace}/docs", model=""))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert ("test 2" in lines["heldout"]
            and " piqa/train.jsonl: no such file" in lines["piqa"])
