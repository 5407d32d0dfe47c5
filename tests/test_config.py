"""pytest tests/test_config.py"""

import os
from dataclasses import dataclass

import pytest

from config import Table, parse, replacing, run


@dataclass(frozen=True)
class First:
    steps: int = 10  # a comment that --help shows
    rate: float = 0.5


@dataclass(frozen=True)
class Second:
    name: str
    seed: int | None = 1234
    compile: bool = False


def test_flags_win_over_files_in_the_order_given(tmp_path):
    (tmp_path / "a.py").write_text("name, steps = 'a', 1\n_helper = 3\nrate = 2 * _helper\n")
    (tmp_path / "b.py").write_text("steps = 2\n")
    first, second = parse([str(tmp_path / "a.py"), "--steps=5", str(tmp_path / "b.py")],
                          First, Second)
    assert (first, second) == (First(steps=2, rate=6.0), Second(name="a"))


def test_values_take_the_declared_type():
    first, second = parse(["--name=1e5", "--steps=3e11", "--rate=1", "--seed=None",
                           "--compile=True"], First, Second)
    assert (first.steps, first.rate) == (300_000_000_000, 1.0) and type(first.rate) is float
    assert second == Second(name="1e5", seed=None, compile=True)


@pytest.mark.parametrize("argument, words", [
    ("--stepz=3", "no setting called stepz, did you mean steps?"),
    ("--steps=abc", "steps = 'abc' is not int"), ("--steps=True", "steps = True is not int"),
    ("--compile=false", "compile = 'false' is not bool; write --name=value, True or False"),
    ("--rate=inf", "rate = 'inf' is not"), ("--rate=1" + 400 * "0", "rate = 1000"),
    ("--steps", "steps = True is not int"), ("nowhere.py", "nowhere.py: no such file"),
    ("--steps=3", "missing: --name"), ("steps = (", "SyntaxError")])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, argument, words):
    """Of a flag, or in a config file, of which `argument` is the text."""
    if " " in argument:
        (tmp_path / "bad.py").write_text(argument)
        argument = str(tmp_path / "bad.py")
    with pytest.raises(SystemExit, match="2"):
        parse([argument], First, Second)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("argv, words", [
    ("eval.py --model=m --docs=d --output=o --tasks=hellaswagg", "no task called hellaswagg"),
    ("eval.py --model=m --docs=d --output=o --tasks=piqa", "piqa/validation.jsonl: no such file"),
    ("batch_viewer.py view --data=d --intervention=term_drop", "expected --terms with term_drop"),
    ("batch_viewer.py view --data=d --intervention=pronoun", "expected one of pronouns_to_femin"),
    ("batch_viewer.py find --data=d --text=a --tokens=1", "find takes one of"),
    ("data.py order --data=nowhere", "nowhere.idx: no such file"),
    ("prepare.py tokenize --input=*.nothing --output=o", "*.nothing: no .jsonl"),
    ("plots.py curves --results=plots.py", "plots.py, line "),
    ("verify.py verify nowhere", "nowhere: neither a run"), ("verify.py diff a b", "a: no checkp"),
    ("verify.py diff a b c", "found c, expected --name=value"),
    ("checkpoints.py list nowhere", "nowhere: no step0"),
    ("studies/term_frequency.py analyse --counts=c --results=/nowhere", "/nowhere: holds no ans")])
def test_a_mistake_in_any_command_is_one_line(refused, argv, words):
    assert words in refused(*argv.split())


def test_help_prints_the_dataclasses_themselves(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], First, Second)
    assert stop.value.code == 0
    assert "steps: int = 10  # a comment that --help shows" in capsys.readouterr().out


def test_only_a_regular_file_is_replaced(tmp_path):
    path = tmp_path / "out.csv"
    for make, undo in ((lambda: path.symlink_to("/dev/null"), path.unlink),
                       (lambda: os.mkfifo(path), path.unlink), (path.mkdir, path.rmdir)):
        make()
        before = os.lstat(path).st_ino
        with pytest.raises(ValueError, match="not a regular file"), replacing(path):
            pass
        assert os.lstat(path).st_ino == before and os.listdir(tmp_path) == ["out.csv"]
        undo()


@pytest.mark.parametrize("error", [(28, "No space left on device"), ("9 requested and 0 written",)])
def test_a_full_disk_is_named(tmp_path, capsys, error):
    """As file.write says it, and as np.save does."""
    def write():
        with replacing(tmp_path / "out.csv"):
            raise OSError(*error)
    with pytest.raises(SystemExit):
        run(write)
    assert capsys.readouterr().err == f"{tmp_path}/out.csv: {error[-1]}\n"
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------- tables


COLUMNS = ("step", "loss", "name")
WHOLE = b"step,loss,name\n8,4.25,r2\n9,1e-05,\"a, b\"\n10,nan,\xc3\xa9\n"


def reopened(path, text):
    """Return the rows of a table with these bytes, and its lines afterwards."""
    path.write_bytes(text)
    table = Table(path, COLUMNS)
    table.file.close()
    return table.rows, path.read_bytes().splitlines(True)


def test_a_table_cut_anywhere_keeps_its_whole_lines(tmp_path, monkeypatch):
    """As a full disk or a power failure leaves it, in its last cell too."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes most of the time
    for cut in range(len(WHOLE) + 1):
        rows, lines = reopened(tmp_path / "t.csv", WHOLE[:cut])
        assert len(rows) == max(WHOLE[:cut].count(b"\n") - 1, 0)
        assert lines == WHOLE.splitlines(True)[:len(rows) + 1]


@pytest.mark.parametrize("line, before, after", [
    (1, b"loss", b"lose"), (2, b",r2", b""), (2, b"r2\n", b"r2*"), (3, b' b"', b" b"),
    (3, b"9,", b"9,,")])
def test_another_damaged_line_is_named_and_the_file_stays(tmp_path, line, before, after):
    text = WHOLE.replace(before, after)
    with pytest.raises(ValueError, match=f"t.csv, line {line}.*; mend it or move the file away"):
        reopened(tmp_path / "t.csv", text)
    assert (tmp_path / "t.csv").read_bytes() == text


def test_what_is_appended_can_be_read(tmp_path):
    table = Table(tmp_path / "t.csv", COLUMNS)
    table.append((7, -1.5e-7, 'a "b", c'), (8, float("inf"), None))
    table.append((9, 0.5, "a\nb" + os.fsdecode(b"\xff")))
    table.file.close()
    rows, _ = reopened(tmp_path / "t.csv", (tmp_path / "t.csv").read_bytes())
    assert [list(row.values()) for row in rows] == [
        ["7", "-1.5e-07", 'a "b", c'], ["8", "inf", ""], ["9", "0.5", "a\nb\udcff"]]

