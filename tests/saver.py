"""Saves checkpoints of a small model with Adam's moments; what test_faults.py runs by itself.

    python tests/saver.py without_pause RUN      # until it is killed
    python tests/saver.py fill_disk RUN          # until the disk RUN is full, then on a larger one
    python tests/saver.py once RUN
"""

import os
import sys
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


def without_pause(save):
    """Save for ever: every third as of an interrupted run, and the moments stay on every fifth."""
    checkpoints.lock(save.run)
    step = max(checkpoints.saved_steps(save.run), default=-1) + 1
    while True:
        print("begun", step, flush=True)
        save(step, scheduled=step % 3 > 0, state_every=5)
        print("saved", step, flush=True)
        step += 1


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


def once(save):
    config.run(save, 1)


if __name__ == "__main__":
    globals()[sys.argv[1]](Saver(sys.argv[2]))
