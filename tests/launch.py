"""Real processes for the tests, forked from one that has imported torch already.

A process of its own takes 3 s for that, two under torchrun take 8; a fork takes none. What runs is
`python SCRIPT --flags` in all else: its signals, its exit code, its stdout that nobody flushes.

    python tests/launch.py small_files --data=PREFIX ...    # train.py with a function of here
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
import train  # noqa: F401
from conftest import ROOT
from parallel import peak_flops

peak_flops(torch.device("cpu"))  # once for all
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


def small_files():
    """A checkpoint's tensor files hold at most 20 kB."""
    checkpoints.SHARD_BYTES = 20_000


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    runpy.run_path("train.py", run_name="__main__")
