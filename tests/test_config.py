"""pytest tests/test_config.py"""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

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


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(argv, First, Second)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


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


@pytest.mark.parametrize("argv, words", [
    (["--stepz=3"], "no setting called stepz, did you mean steps?"),
    (["--steps=abc"], "steps = 'abc' is not int"),
    (["--steps=True"], "steps = True is not int"),
    (["--compile=false"], "compile = 'false' is not bool"),
    (["--seed=1.5"], "seed = 1.5 is not int or NoneType"),
    (["--rate=inf"], "rate = 'inf' is not finite float"),
    (["--rate=1e999"], "rate = inf is not finite float"),
    (["--steps", "3"], "found --steps, expected --name=value"),
    (["nowhere.py"], "nowhere.py: no such file"),
    (["--steps=3"], "missing: --name"),
])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, argv, words):
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize("text, words", [
    ("steps = (", "SyntaxError"), ("import sys; sys.exit()", "SystemExit"),
    ("rate = float('nan')", "rate = nan is not finite float")])
def test_a_broken_config_file_is_one_line(capsys, tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    assert words in refused(capsys, str(tmp_path / "bad.py"))


def test_help_prints_the_dataclasses_themselves(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], First, Second)
    assert stop.value.code == 0
    assert "steps: int = 10  # a comment that --help shows" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_a_regular_file_is_replaced(tmp_path, kind):
    path = tmp_path / "out.csv"
    make = {"link": lambda: path.symlink_to("/dev/null"), "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir}
    make[kind]()
    before = os.lstat(path)
    with pytest.raises(ValueError, match="not a regular file"), replacing(path):
        pass
    assert os.lstat(path).st_ino == before.st_ino and os.listdir(tmp_path) == ["out.csv"]


def test_a_full_disk_is_named(tmp_path, capsys):
    def write():
        with replacing(tmp_path / "out.csv"):
            raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit):
        run(write)
    assert capsys.readouterr().err == f"{tmp_path}/out.csv: No space left on device\n"
    assert not os.listdir(tmp_path)


def test_a_closed_pipe_is_no_error():
    code = "import config; config.run(lambda: [print('x' * 100) for _ in range(10**4)])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
