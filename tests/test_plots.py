"""pytest tests/test_plots.py"""

import subprocess
import sys

import pytest

import plots
from conftest import ROOT

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
    assert list(curves["piqa", 0, "acc"]) == ["mine-14m", "mine-70m", "pythia-70m", "pythia-1b-0.5MtokBS"]
    assert curves["piqa", 0, "acc"]["mine-14m"] == [(0, 0.5, 0.02), (1 << 24, 0.56, 0.02)]
    assert curves["piqa", 0, "acc"]["pythia-1b-0.5MtokBS"] == [(8 << 19, 0.58, None)]
    assert curves["lambada_openai", 0, "perplexity"] == {"pythia-70m-deduped": [(8 << 21, 142.4, 1.5)]}


@pytest.mark.parametrize("name, parameters", [
    ("pythia-70m", 70e6), ("pythia-1.4b-deduped", 1.4e9), ("pythia-1b-bf16", 1e9), ("Pythia-12B", 12e9), ("mini", 0)])
def test_a_name_tells_the_size(name, parameters):
    assert plots.size(name) == parameters


def run(*arguments, expect=0):
    done = subprocess.run([sys.executable, "plots.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


def test_the_table_has_the_last_checkpoint_of_each_model(files):
    lines = run("table", f"--results={files}/r.csv").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["heldout", "(0)", "piqa", "(0)"], ["bits_per_byte", "acc"],
        ["mine-14m", "-", "0.5600", "±", "0.0200"], ["mine-70m", "1.5000", "0.6000", "±", "0.0200"]]


def test_figures_are_drawn(files):
    run("curves", f"--results={files}/r.csv", f"--reference={files}/ref.csv", f"--output={files}/c.png")
    run("paper", f"--reference={files}/ref.csv", f"--output={files}/figures")
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (files / "c.png", files / "figures/standard_0_shot.png"))


@pytest.mark.parametrize("flags, words", [
    (["--tasks=piqua"], "no acc of piqua in the results; there are the tasks heldout, piqa"),
    (["--metrics=accuracy"], "the results have no accuracy"),
    (["--tasks=piqa", "--metrics=em"], "no em of piqa in the results; there are acc"),
    (["--results=plots.py"], "plots.py, line 2: neither results of eval.py nor the published CSV"),
    (["--results=/nowhere.csv"], "/nowhere.csv: No such file")])
def test_a_mistake_is_one_line(files, flags, words):
    done = run("table", f"--results={files}/r.csv", *flags, expect=2)
    assert words in done.stderr and done.stderr.count("\n") == 1
