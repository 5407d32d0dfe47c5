"""Real processes for the tests, forked from one that has imported torch already.

A process of its own takes 3 s for that, two under torchrun take 8; a fork takes none. What runs is
`python SCRIPT --flags` in all else: its signals, its exit code, its stdout that nobody flushes.
"""

import functools
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# These models are too small for two threads. Empty, the other says that nobody flushes for us.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", "PYTHONPATH": str(ROOT)}


class Launched:
    """A script running in `count` processes, as torchrun would start them.

    rank_1: flags that the second process alone is given.
    """

    def __init__(self, command, count=1, rank_1=()):
        self.outputs = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # all write to the same
        paths = [file.name for file in self.outputs]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count),
                 "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}
        self.pids = [ask(command=[str(word) for word in (*command, *(rank_1 if rank == 1 else ()))],
                         paths=paths,
                         environment=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                     for rank in range(count)]
        self.codes = {}

    def running(self):
        """Return whether the first process has not ended."""
        pid = self.pids[0]
        if pid not in self.codes and (code := ask(wait=pid, flags=os.WNOHANG)) is not None:
            self.codes[pid] = code
        return pid not in self.codes

    def wait_until(self, condition):
        while not condition() and self.running():
            time.sleep(0.001)

    def printed(self, text):
        """Return whether `text` has come out so far."""
        return lambda: text in Path(self.outputs[0].name).read_text()

    def send(self, number, rank=0):
        if rank > 0 or self.running():
            os.kill(self.pids[rank], number)

    def finish(self):
        """Wait for all processes; return the first exit code but 0, stdout and stderr of all."""
        for pid in self.pids:
            if pid not in self.codes:
                self.codes[pid] = ask(wait=pid, flags=0)
        out, error = (Path(file.name).read_text() for file in self.outputs)
        code = next(filter(None, map(self.codes.get, self.pids)), 0)
        return subprocess.CompletedProcess(None, code, out, error)


@functools.cache
def server():
    return subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=ENVIRONMENT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ask(**request):
    print(json.dumps(request), file=server().stdin, flush=True)
    return json.loads(server().stdout.readline())


def serve():
    """Fork for every request to run a script; wait for a process whose exit code is asked."""
    import torch._dynamo  # noqa: F401  (so does every optimizer)
    import torch.distributed.fsdp  # noqa: F401
    import train  # noqa: F401
    from parallel import peak_flops
    peak_flops(torch.device("cpu"))  # once for all
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], request["flags"])
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                run(**request)
        print(json.dumps(answer), flush=True)


def run(command, paths, environment):
    """Run a script in this process, a child of the server, and end it."""
    code = 1
    try:
        os.environ.update(environment)
        for number, path in zip((1, 2), paths):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
