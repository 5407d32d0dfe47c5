"""pytest tests/test_plots.py"""

import pytest

import plots

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


@pytest.mark.parametrize("name, parameters", [
    ("pythia-1.4b-deduped", 1.4e9), ("Pythia-12B", 12e9), ("mini", 0)])
def test_a_name_tells_the_size(name, parameters):
    assert plots.by_size(name)[0] == parameters


def contents(line):
    return list(line.get_xdata()), list(line.get_ydata())


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


def test_what_is_not_a_number_is_a_gap(files):
    (files / "r.csv").write_text(
        RESULTS + "mine-70m,16,33554432,piqa,0,acc,nan,nan,10,v0.4,float32,abc\n"
        "mine-70m,16,33554432,heldout,0,bits_per_byte,inf,,10,v0.4,float32,abc\n")
    figure = plots.curves(plots.Curves(
        f"{files}/r.csv", reference=f"{files}/r.csv", output=f"{files}/c.png"))
    assert list(figure.axes[1].lines[-1].get_xdata()) == [1 << 24, 1 << 25]


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
    assert {bar.get_label(): contents(bar[0]) for bar in right.containers} == {
        "heldout": ([0, 64, 128], [3, 2, 1]), "heldout:books": ([0, 64, 128], [3, 2, 1])}


def test_memorization_shows_lengths_and_counts_against_a_poissons(tmp_path):
    (tmp_path / "rates.csv").write_text("model,step,rows,mean_length\n" + "".join(
        f"m,{step},{rows},{step + n}\n" for step in (4, 2)
        for n, rows in enumerate(("seen", "not seen yet"))))
    (tmp_path / "windows.csv").write_text(  # four counts of the last step
        "model,step,window,memorized,windows\nm,2,64,9,9\nm,4,64,0,2\nm,4,64,3,2\n")
    top, bottom = plots.memorization(tmp_path, tmp_path / "m.png").axes
    assert {bar.get_label(): contents(bar[0]) for bar in top.containers} == {
        "seen": ([2, 4], [2, 4]), "not seen yet": ([2, 4], [3, 5])}
    points, diagonal = bottom.lines  # of rate 1.5, P(0) = 0.22, P(<= 1) = 0.56, P(<= 2) = 0.81
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([0, 1, 2, 3], [0, 0, 3, 3])
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 3]
    assert bottom.get_xlabel() == "Poisson, rate 1.50"


def test_differences_have_their_intervals(tmp_path):
    (tmp_path / "b.csv").write_text(
        "measure,step,seeds,items,difference,low,high\ncost,8,3,1200,0.5,0.25,1\n"
        "cost,4,3,1200,0,-1,1\nchoice,4,1,9,0.5,0,1\n")
    figure = plots.differences(tmp_path / "b.csv", tmp_path / "b.png")
    cost, choice = figure.axes
    assert (cost.get_title(), choice.get_title()) == (
        "cost, 1,200 item(s), 3 seed(s)", "choice, 9 item(s), 1 seed(s)")
    assert cost.get_ylabel() == "branch - twin (bits per byte)"
    [(line, _, [bars])] = cost.containers
    assert contents(line) == ([4, 8], [0, 0.5])
    assert [bar.tolist() for bar in bars.get_segments()] == [[[4, -1], [4, 1]], [[8, 0.25], [8, 1]]]
