import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"tokenize": "prepare.py", "dedup": "prepare.py", "shuffle": "prepare.py",
            "order": "data.py", "view": "batch_viewer.py", "find": "batch_viewer.py"}


def script_of(argv):
    """Return the file that has the command argv[0]."""
    return COMMANDS.get(str(argv[0]), "data.py")


@pytest.fixture(scope="session")
def tokenizer_path():
    """The real GPT-NeoX-20B tokenizer, which `make test` fetches."""
    path = ROOT / "20B_tokenizer.json"
    if not path.exists():
        pytest.skip("20B_tokenizer.json is absent: `make tokenizer` gets it")
    return path


@pytest.fixture(scope="session")
def pythia_data():
    """A folder of real evaluation sets and texts; too large and too mixed in licence to commit."""
    folder = os.environ.get("PYTHIA_DATA")
    if not folder:
        pytest.skip("PYTHIA_DATA names no folder of real data")
    return Path(folder)
