import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
COMMANDS = {"tokenize": "prepare.py", "dedup": "prepare.py", "shuffle": "prepare.py",
            "order": "data.py", "view": "batch_viewer.py", "find": "batch_viewer.py"}


def script_of(argv):
    """Return the file that has the command argv[0]."""
    return COMMANDS.get(str(argv[0]), "data.py")


def run(*argv, expect=0, **options):
    """Run a command as a user does; a mistake (expect=2) must be one line."""
    done = subprocess.run([sys.executable, script_of(argv), *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True, **options)
    assert done.returncode == expect and (expect == 0 or done.stderr.count("\n") == 1), done.stderr
    return done


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script's command line in this process: (exit code, stdout, stderr)."""
    def run_here(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return run_here


@pytest.fixture(scope="session")
def tokenizer_path():
    """The real GPT-NeoX-20B tokenizer, which `make test` fetches."""
    path = ROOT / "20B_tokenizer.json"
    if not path.exists():
        pytest.skip("20B_tokenizer.json is absent: `make tokenizer` gets it")
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def pythia_data():
    """A folder of real evaluation sets and texts; too large and too mixed in licence to commit."""
    folder = os.environ.get("PYTHIA_DATA")
    if not folder:
        pytest.skip("PYTHIA_DATA names no folder of real data")
    return Path(folder)
