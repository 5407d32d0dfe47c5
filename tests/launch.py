"""Real processes for the tests, forked from one that has imported torch already.

A process of its own takes 3 s for that, two under torchrun take 8; a fork takes none. What runs is
`python SCRIPT --flags` in all else: its signals, its exit code, its stdout that nobody flushes.

    python tests/launch.py small_files --data=PREFIX ...    # trains
    python tests/launch.py without_pause RUN    # saves until it is killed
    python tests/launch.py fill_disk RUN        # saves until the disk RUN is full
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch._dynamo  # noqa: F401  (so does every optimizer)
import torch.distributed.fsdp  # noqa: F401

import checkpoints
from checkpoints import saved_steps
from conftest import ROOT
from model import ModelConfig, Pythia
from parallel import peak_flops
from tokenizer import load_tokenizer
from train import TrainConfig, make_optimizer

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["launch"])


class Launched:
    """A script running in `count` processes, as torchrun would start them.

    rank_1: flags that the second process alone is given.
    """

    def __init__(self, command, count=1, rank_1=()):
        self.outputs = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # all write to the same
        paths = [file.name for file in self.outputs]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]),
                     "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        self.processes = []
        for rank in range(count):
            words = [str(word) for word in (*command, *(rank_1 if rank == 1 else ()))]
            place = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(
                FORKS.Process(target=run, args=(words, paths, place), daemon=True))
            self.processes[-1].start()

    def wait_until(self, condition):
        """Wait until a condition holds or the first process has ended."""
        while not condition() and self.processes[0].is_alive():
            time.sleep(0.001)

    def printed(self, text):
        """Return whether `text` has come out so far."""
        return lambda: text in Path(self.outputs[0].name).read_text()

    def send(self, number, rank=0):
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def finish(self):
        """Wait for all processes; return the first exit code but 0, stdout and stderr of all."""
        for process in self.processes:
            process.join()
        out, error = (Path(file.name).read_text() for file in self.outputs)
        code = next(filter(None, (process.exitcode for process in self.processes)), 0)
        return subprocess.CompletedProcess(None, code, out, error)


def run(command, paths, environment):
    """Become `python COMMAND`, with stdout and stderr at the end of these files."""
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in zip((1, 2), paths):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def small_files(*flags):
    """Train with files of at most 20 kB in a checkpoint."""
    checkpoints.SHARD_BYTES = 20_000
    sys.argv = ["train.py", *flags]
    runpy.run_path("train.py", run_name="__main__")


class Saver:
    """Called with a step it saves a checkpoint in the folder `run`, of a model after an update."""

    def __init__(self, run, config=ModelConfig(2, 32, 2, vocab_size=512, seq_length=32)):
        self.run = Path(run)
        self.model = Pythia(config)
        self.optimizer = make_optimizer(self.model, TrainConfig(data="", learning_rate=1e-3))
        ids = torch.zeros(1, 8, dtype=int)
        self.model(ids, ids).backward()
        self.optimizer.step()

    def __call__(self, step, run=None, **options):
        checkpoints.save(run or self.run, step, self.model, self.optimizer,
                         {"updates": min(step, 1), "tokens": 64 * step, "scaler": {}}, **options)


def without_pause(run):
    """Save without end, every third step as an interrupted run; keep the moments of every fifth."""
    save = Saver(run)
    checkpoints.lock(save.run)
    step = max(saved_steps(run), default=-1) + 1
    while True:
        print("begun", step, flush=True)
        save(step, scheduled=step % 3 > 0, state_every=5)
        print("saved", step, flush=True)
        step += 1


def fill_disk(run):
    save = Saver(run)
    for step in range(100):
        try:
            save(step)
        except (OSError, ValueError) as error:
            print(error)
            break
    assert step > 2 and saved_steps(run) == list(range(step))
    assert sorted(os.listdir(run)) == sorted(f"step{s}" for s in range(step))
    assert saved_steps(run, state=True) == list(range(step))
    assert checkpoints.load_training(run, step - 1, save.model, save.optimizer)["updates"] == 1
    os.system(f"mount -o remount,size=30m {run}")
    save(step)
    assert saved_steps(run)[-1] == step


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
else:  # once, not in each fork
    peak_flops(torch.device("cpu"))
    if (ROOT / "20B_tokenizer.json").exists():
        load_tokenizer(f"{ROOT}/20B_tokenizer.json")
