"""pytest tests/test_config.py"""

import os
from dataclasses import dataclass

import pytest

from config import parse, replacing, run


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
    ("--compile=false", "compile = 'false' is not bool"), ("--rate=inf", "rate = 'inf' is not"),
    ("--steps", "found --steps, expected"), ("nowhere.py", "nowhere.py: no such file"),
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


def test_a_full_disk_is_named(tmp_path, capsys):
    def write():
        with replacing(tmp_path / "out.csv"):
            raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit):
        run(write)
    assert capsys.readouterr().err == f"{tmp_path}/out.csv: No space left on device\n"
    assert not os.listdir(tmp_path)
