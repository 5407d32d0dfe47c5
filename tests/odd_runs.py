"""Runs of train.py in which one thing is odd; tests start them by the name of a function here.

    python tests/odd_runs.py late --data=PREFIX --out_dir=RUN ...
"""

import os
import runpy
import signal
import sys
import time

import checkpoints
import data


def late():
    """A shared disk lists what is new to one node before the other."""
    checkpoints.saved_steps = lambda run, state: [2 - int(os.environ["RANK"])]


def small_files():
    """A checkpoint's tensor files hold at most 20 kB."""
    checkpoints.SHARD_BYTES = 20_000


def slow_replay():
    """Reading a batch of the steps before 6 takes 0.2 s."""
    before_reading(lambda step: time.sleep(0.2 * (step < 6)))


def signal_in_replay():
    """SIGTERM comes while the batch of step 3 is read."""
    before_reading(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)


def before_reading(act):
    read = data.OrderedData.batch

    def batch(self, step, *arguments, **settings):
        act(step)
        return read(self, step, *arguments, **settings)

    data.OrderedData.batch = batch


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    runpy.run_path("train.py", run_name="__main__")
