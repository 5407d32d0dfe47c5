"""Saves checkpoints of a small model with Adam's moments; what test_faults.py runs by itself.

    python tests/saver.py kill_often RUN 15 1    # 15 children, which save until they are killed
    python tests/saver.py fill_disk RUN          # until the disk RUN is full, then on a larger one
    python tests/saver.py save_once RUN
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import checkpoints
import config
from model import ModelConfig, Pythia
from train import TrainConfig, make_optimizer


class Saver:
    """Called with a step it saves a checkpoint in the folder `run`."""

    def __init__(self, run):
        self.run = Path(run)
        self.model = Pythia(ModelConfig(2, 32, 2, vocab_size=512, seq_length=32))
        self.optimizer = make_optimizer(self.model, TrainConfig(data="", learning_rate=1e-3))
        ids = torch.zeros(1, 8, dtype=int)
        self.model(ids, ids).backward()
        self.optimizer.step()

    def __call__(self, step, run=None, **options):
        checkpoints.save(run or self.run, step, self.model, self.optimizer,
                         {"updates": min(step, 1), "tokens": 8, "scaler": {}}, **options)


def save_without_pause(save, say):
    """Save for ever: every third as of an interrupted run, and the moments stay on every fifth."""
    checkpoints.lock(save.run)
    step = max(checkpoints.saved_steps(save.run), default=-1) + 1
    while True:
        os.write(say, b"begun %d\n" % step)
        save(step, scheduled=step % 3 > 0, state_every=5)
        os.write(say, b"saved %d\n" % step)
        step += 1


def check(save, begun, saved):
    """Check a run after a kill; return how many checkpoints were lost."""
    there = checkpoints.saved_steps(save.run)
    assert not saved or there[-1] >= saved[-1], (saved, there)
    if there:
        assert checkpoints.saved_steps(save.run, state=True)[-1] == there[-1]
        checkpoints.load_training(save.run, there[-1], save.model, save.optimizer)
    for _, folder in checkpoints.step_folders(save.run):
        assert checkpoints.is_whole(folder), folder
        for file, entry in checkpoints.manifest_of(folder).items():
            assert checkpoints.sha256_of(folder / file) == entry["sha256"], (folder, file)
    scheduled = [step for step in range(max(there, default=0)) if step % 3]  # these stay
    assert set(scheduled) <= set(there), there
    # Scheduled ones, and the last whether it is or not: an unscheduled one gives way to the next.
    return len([step for step in begun if step not in there and (step % 3 or step == begun[-1])])


def kill_often(save, count, seed):
    """Print for each kill how many saves were begun, were done, and how many were lost."""
    random.seed(int(seed))
    for _ in range(int(count)):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_without_pause(save, writer)
        os.close(writer)
        time.sleep(random.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        words = [line.split() for line in open(reader).read().splitlines()]
        begun, saved = ([int(step) for said, step in words if said == name]
                        for name in ("begun", "saved"))
        print(len(begun), len(saved), check(save, begun, saved), flush=True)


def fill_disk(save):
    for step in range(100):
        try:
            save(step)
        except OSError as error:
            print(error.strerror)
            break
    assert step > 2 and checkpoints.saved_steps(save.run) == list(range(step))
    assert sorted(os.listdir(save.run)) == sorted(f"step{s}" for s in range(step))
    assert checkpoints.load_training(save.run, step - 1, save.model, save.optimizer)["updates"] == 1
    os.system(f"mount -o remount,size=30m {save.run}")
    save(step)
    assert checkpoints.saved_steps(save.run)[-1] == step


def save_once(save):
    config.run(save, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, function, folder, *arguments = sys.argv
    globals()[function](Saver(folder), *arguments)
