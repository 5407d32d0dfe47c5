"""pytest tests/test_plots.py"""

import base64
import hashlib
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT, write_jsonl
from test_data import random_documents, write

import plots
from data import Order
from eval import token_rows
from plots import Window, window

RESULTS = """model,step,tokens,task,shots,metric,value,stderr,n,style,dtype,docs
mine-14m,0,0,piqa,0,acc,0.5,0.02,10,v0.4,float32,abc
mine-14m,8,16777216,piqa,0,acc,0.55,0.02,10,v0.4,float32,abc
mine-14m,8,16777216,piqa,0,acc,0.56,0.02,10,v0.4,float32,abc
mine-70m,8,16777216,piqa,0,acc,0.6,0.02,10,v0.4,float32,abc
mine-70m,8,16777216,heldout,0,bits_per_byte,1.5,,10,v0.4,float32,abc
"""
REFERENCE = """model,deduped,step,shots,task,metric,value,stderr
pythia-70m,1,8,0,lambada_openai,ppl,142.4,1.5
pythia-70m,0,8,0,piqa,acc,0.59,0.01
pythia-1b-0.5MtokBS,0,8,0,piqa,acc,0.58,
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "r.csv").write_text(RESULTS)
    (tmp_path / "ref.csv").write_text(REFERENCE)
    return tmp_path


def test_rows_become_curves_and_the_later_row_wins(files):
    curves = plots.evaluations(f"{files}/r.csv,{files}/ref.csv")
    assert list(curves["piqa", 0, "acc"]) == ["mine-14m", "mine-70m", "pythia-70m"]
    assert curves["piqa", 0, "acc"]["mine-14m"] == [(1 << 24, 0.56, 0.02)]
    assert curves["lambada_openai", 0, "perplexity"] == {
        "pythia-70m-deduped": [(8 << 21, 142.4, 1.5)]}


def test_curves_show_our_models_before_the_published_ones(files):
    """A reference with nothing but step 0, or called as it likes, is no obstacle."""
    with open(files / "ref.csv", "a") as file:
        file.write("gpt2,0,16,0,piqa,acc,0.63,\npythia-6.9b,0,0,0,piqa,acc,0.5,\n")
    figure = plots.curves(plots.Curves(
        f"{files}/r.csv", reference=f"{files}/ref.csv", output=f"{files}/c.png"))
    assert (files / "c.png").read_bytes()[:4] == b"\x89PNG"
    heldout, piqa = figure.axes
    assert [(axes.get_title(), axes.get_ylabel()) for axes in (heldout, piqa)] == [
        ("heldout, 0-shot", "bits_per_byte"), ("piqa, 0-shot", "acc")]
    assert list(heldout.lines[0].get_ydata()) == [1.5]
    assert [list(line.get_ydata()) for line in piqa.lines] == [[0.63], [0.59], [0.56], [0.6]]
    assert [text.get_text() for text in piqa.texts] == ["gpt2", "70m"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "mine-14m", "mine-70m", "published (v0.3)"]


@pytest.mark.parametrize("how", ["v0.3 float32 abc", "v0.4 float16 abc", "v0.4 float32 abd"])
def test_one_curve_is_of_one_kind(files, how):
    row = f"mine-70m,16,9,piqa,0,acc,0.5,,10,{how.replace(' ', ',')}\n"
    (files / "r.csv").write_text(RESULTS + row)
    with pytest.raises(ValueError, match=f"line 7: acc of piqa by mine-70m in {how}, before in "
                                         "v0.4 float32 abc"):
        plots.evaluations(f"{files}/r.csv")


def test_training_shows_the_loss_and_each_subset(tmp_path):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini/metrics.csv").write_text("step,tokens,loss\n0,0,9\n1,64,8\n2,128,nan\n")
    row = "{},{},{},{},0,bits_per_byte,{},,3,v0.4,float32,abc\n".format
    (tmp_path / "r.csv").write_text(RESULTS.splitlines(True)[0] + "".join(
        row(model, step, 64 * step, task, 3 - step) for model in ("mini", "other")
        for step in (2, 1, 0) for task in ("heldout:books", "heldout")))
    left, right = plots.training(plots.Training(
        f"{tmp_path}/mini", f"{tmp_path}/r.csv", f"{tmp_path}/c.png")).axes
    assert left.get_ylabel() == "training loss (nats per token)"
    assert list(left.lines[0].get_xdata()) == [0, 64, 128] and left.lines[0].get_ydata()[1] == 8
    assert {bar.get_label(): (list(bar[0].get_xdata()), list(bar[0].get_ydata()))
            for bar in right.containers} == {
        "heldout": ([0, 64, 128], [3, 2, 1]), "heldout:books": ([0, 64, 128], [3, 2, 1])}


# ---------------------------------------------------------------------------- the window


TEXTS = ['He said\n"light".', "</script><script>alert(1)</script><!-- {DATA}", "naïve 日本", "a"]


def write_losses(prefix, what, checkpoints, tokenizer=None):
    """Write PREFIX.npy and .json as `eval.py losses` does, of losses made by hand; return them."""
    rows = token_rows(what, tokenizer)
    shape = len(checkpoints), len(rows), rows.shape[1] - 1
    losses = np.random.default_rng(0).gamma(2, 2, shape).astype(np.float32)
    losses[:, rows[:, 1:] < 0] = np.nan
    np.save(f"{prefix}.npy", losses)
    prefix.with_suffix(".json").write_text(json.dumps(what | {
        "sha256": hashlib.sha256(rows.tobytes()).hexdigest(), "checkpoints": checkpoints}))
    return losses


def write_texts(folder, documents, tokenizer, runs=("a",), steps=range(3)):
    """Write FOLDER/a.npy and .json, losses of these texts."""
    write_jsonl(folder / "t.jsonl", [{"text": text} for text in documents])
    what = {"text": f"{folder}/t.jsonl", "documents": [None] * len(documents)}
    return write_losses(folder / "a", what, [[run, str(step)] for run in runs for step in steps],
                        tokenizer)


def page_of(path):
    """Return the page's JSON, with levels as losses (steps, n, T)."""
    text = path.read_text()
    data = json.loads(re.search('<script id="data" type="application/json">(.*?)</script>', text,
                                re.DOTALL)[1])
    for one in data["series"]:
        levels = np.frombuffer(base64.b64decode(one["levels"]), np.uint8).astype(float)
        levels[levels == 255] = np.nan
        one["losses"] = data["scale"] * levels.reshape(len(one["steps"]), one["n"], one["T"])
    return data


def test_the_page_has_the_losses_and_the_texts_whatever_is_in_them(tmp_path, tokenizer):
    losses = write_texts(tmp_path, TEXTS, tokenizer, runs=("a", "b"))
    window(Window(f"{tmp_path}/a.npy", f"{ROOT}/20B_tokenizer.json", f"{tmp_path}/w.html"))
    data = page_of(tmp_path / "w.html")
    assert data["scale"] == pytest.approx(np.nanmax(losses) / 254)
    assert [(one["run"], one["first"], one["steps"]) for one in data["series"]] == [
        ("a", 0, [0, 1, 2]), ("b", 0, [0, 1, 2])]
    np.testing.assert_allclose(np.concatenate([one["losses"] for one in data["series"]]), losses,
                               atol=data["scale"] * 0.501)
    joined = ["".join(row["tokens"]).removeprefix("<|endoftext|>") for row in data["rows"]]
    assert joined[:2] == TEXTS[:2]
    assert [len(row["tokens"]) - 1 for row in data["rows"]] == [
        np.isfinite(row).sum() for row in losses[0]]
    page, template = (path.read_text() for path in (
        tmp_path / "w.html", ROOT / "assets" / "window.html"))
    assert page.count("<") == template.count("<") and "http" not in template


def test_rows_of_the_order_say_when_they_were_seen_and_files_stand_beside(
        tmp_path, tokenizer_path):
    write(tmp_path / "d", random_documents(np.random.RandomState(0).randint(5, 60, 60)))
    what = {"order": asdict(Order(f"{tmp_path}/d", 8, 4, 16)), "rows": [7, 9]}
    for name, other in (("one", {}), ("two", {}), ("held", {"rows": [7, 10], "trained_on": "x"})):
        write_losses(tmp_path / name, what | other, [[name, "1"], [name, "2"]])
    paths = ",".join(f"{tmp_path}/{name}.npy" for name in ("one", "two", "held"))
    window(Window(paths, output=f"{tmp_path}/w.html"))
    data = page_of(tmp_path / "w.html")
    # The update of step 2 makes checkpoint 3.
    assert [row.get("seen") for row in data["rows"]] == [1, None, None, None, None]
    assert data["rows"][0]["name"] == f"row 7 of {tmp_path}/d, seen by one in step 1"
    assert [(one["run"], one["first"], one["n"], one["steps"]) for one in data["series"]] == [
        ("one", 0, 2, [1, 2]), ("two", 0, 2, [1, 2]), ("held", 2, 3, [1, 2])]
    expected = np.load(tmp_path / "held.npy")
    np.testing.assert_allclose(data["series"][2]["losses"], expected, atol=data["scale"] * 0.501)


def test_files_that_do_not_fit_are_one_line(tmp_path, tokenizer, refused):
    losses = write_texts(tmp_path, TEXTS, tokenizer)
    what = json.loads((tmp_path / "a.json").read_text())
    for values, note, words in (
            (losses[:2], what, r"float32 \(2, 4, .*, expected float32 \(3, 4, "),
            (-losses, what, "from 0 to 10,000 nats"),
            (losses * np.inf, what, "from 0 to 10,000 nats"),
            (losses, what | {"sha256": "0"}, "the tokenizer is not the same as then"),
            (losses, {"sha256": "0"}, "a.npy: not finished losses of .* its .json describes")):
        np.save(tmp_path / "a.npy", values)
        (tmp_path / "a.json").write_text(json.dumps(note))
        assert re.search(words, refused("plots.py", "window", f"--losses={tmp_path}/a.npy",
                                        f"--tokenizer={ROOT}/20B_tokenizer.json"))
