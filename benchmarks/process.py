"""Peak memory and time of one process."""

import os
import time
import traceback


def peak_memory(reset=False):
    """Return this process's largest resident size in KiB, from now on if `reset` (Linux)."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def forked(run, prepare=None):
    """Return the seconds of run(prepare()) and the KiB that both took, in a process of their own.

    Raises ChildProcessError if they raise anything; its traceback is on stderr.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = peak_memory(reset=True)
            argument = (prepare(),) if prepare else ()
            start = time.perf_counter()
            run(*argument)
            os.write(writer, f"{time.perf_counter() - start} {peak_memory() - before}".encode())
        except BaseException:
            traceback.print_exc()
        finally:  # or it would go on as a second parent, and remove the first one's temporary files
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        measured = pipe.read().split()
    os.waitpid(child, 0)
    if not measured:
        raise ChildProcessError("what was to be measured failed; see the traceback above")
    seconds, memory = measured
    return float(seconds), int(memory)
