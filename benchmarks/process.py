"""Peak memory and time of one process."""

import os
import time


def peak_memory(reset=False):
    """Return this process's largest resident size in KiB, from now on if `reset` (Linux)."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def forked(run, prepare=None):
    """Return the seconds of run(prepare()) and the KiB that both took, in a process of their own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = peak_memory(reset=True)
        argument = (prepare(),) if prepare else ()
        start = time.perf_counter()
        run(*argument)
        os.write(writer, f"{time.perf_counter() - start} {peak_memory() - before}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        seconds, memory = pipe.read().split()
    os.waitpid(child, 0)
    return float(seconds), int(memory)
