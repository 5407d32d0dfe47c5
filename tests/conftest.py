import csv
import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
# These models are too small for two threads; torch is imported after this.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def ended(done, expect):
    """Return a program that ended with this exit code, if not None; a mistake (2) is one line."""
    assert expect in (None, done.returncode), done.stdout + done.stderr
    assert expect != 2 or done.stderr.count("\n") == 1, done.stderr
    return done


def run(*argv, expect=0, **options):
    """Run `python ARGV` as a user does."""
    return ended(subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True,
                                text=True, **options), expect)


def launch(*argv, expect=0, **options):
    """Run `python ARGV` in one or more processes that have imported torch already, for a script."""
    from launch import Launched
    return ended(Launched(argv, **options).finish(), expect)


def train(*flags):
    """Train a model of one layer for a few steps; a flag given replaces one of these."""
    return launch("train.py", "--n_layers=1", "--d_model=16", "--n_heads=2", "--seq_length=16",
                  "--steps=8", "--batch_size=4", "--micro_batch_size=4", "--learning_rate=1e-2",
                  f"--tokenizer={ROOT}/20B_tokenizer.json", *flags)


def write_jsonl(path, records):
    """Write a JSON object a line, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def table(path):
    """Return the rows {column: cell} of a CSV file."""
    return list(csv.DictReader(Path(path).read_text().splitlines()))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python SCRIPT --flags` in this process."""
    def run_here(script, *arguments, expect=0):
        gc.collect()  # the error of an earlier one may still hold a lock
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return ended(subprocess.CompletedProcess(None, code, *capsys.readouterr()), expect)
    return run_here


@pytest.fixture
def refused(command):
    """Run a script's command line that is a mistake; return the one line that it ends in."""
    return lambda *argv: command(*argv, expect=2).stderr


@pytest.fixture(scope="session")
def tokenizer_path():
    """The real GPT-NeoX-20B tokenizer, which `make test` fetches."""
    path = ROOT / "20B_tokenizer.json"
    if not path.exists():
        pytest.skip("20B_tokenizer.json is absent: `make tokenizer` gets it")
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return load_tokenizer(str(tokenizer_path))


@pytest.fixture(scope="session")
def pythia_data():
    """A folder of real evaluation sets and texts; too large and too mixed in licence to commit."""
    folder = os.environ.get("PYTHIA_DATA")
    if not folder:
        pytest.skip("PYTHIA_DATA names no folder of real data")
    return Path(folder)
