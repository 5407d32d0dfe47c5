"""What a run leaves behind besides its checkpoints, so that its folder explains itself.

    config.json      every setting that decides what is computed; of a branch also what differs from its parent
    launches.jsonl   one line a launch: command, git commit, package versions, hardware
    log.txt          what was printed
    metrics.csv      one line a step
    interventions.csv  the rows that an intervention changed
    heldout.csv      the loss on the held-out batches, of checkpoint `step`
"""

import csv
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import saved_steps
from config import replacing
from data import read_json

METRICS = ("step", "tokens", "loss", "learning_rate", "grad_norm", "loss_scale", "seconds")
# A branch has the model, the order of the data and the schedule of its parent.
SHARED = ("n_layers", "d_model", "n_heads", "vocab_size", "seq_length", "steps", "batch_size",
          "first_batch_sha256")


def open_run(out_dir, settings, may_change):
    """Write RUN/config.json, or raise ValueError naming each setting in which a run already there differs."""
    path = os.path.join(out_dir, "config.json")
    if os.path.exists(path):
        before = read_json(path)
        differences = [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in settings.items()
                       if name not in may_change and before.get(name) != value]
        if differences:
            raise ValueError(f"{out_dir} holds another run: {'; '.join(differences)}. "
                             "Go back to its settings, or name another --out_dir")
        return
    if settings["branch_from"]:
        settings = settings | {"differs_from_parent": compare_with_parent(settings, may_change)}
    with replacing(path) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())


def compare_with_parent(settings, may_change):
    """Return {setting: [the parent's, ours]}; raise ValueError on what a branch must share with its parent."""
    path = Path(settings["branch_from"]).parent / "config.json"
    if not path.exists():  # a published model: weights alone, so only their shapes can be compared
        return "unknown: the parent has no config.json"
    before = read_json(path)
    differences = {name: [before.get(name), value] for name, value in settings.items()
                   if name not in (*may_change, "branch_from") and before.get(name) != value}
    refused = [f"{name} is {differences[name][1]!r}, the parent's {differences[name][0]!r}"
               for name in SHARED if name in differences]
    if refused:
        raise ValueError(f"branch_from = {settings['branch_from']}: a branch keeps its parent's model, order "
                         f"and schedule, but {'; '.join(refused)}")
    return differences


def describe_launch(launch, processes):
    """Return what this launch runs on and from, a JSON object."""
    def output(*command):
        if not shutil.which(command[0]):
            return None
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else None

    gpu = processes.device.type == "cuda"
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    packages = ("torch", "numpy", "safetensors", "tiktoken", "tqdm")
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv], "launch": launch,
        "git_commit": output("git", "rev-parse", "HEAD"),
        "git_changes": output("git", "status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(), "system": platform.platform(), "host": platform.node(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "processes": processes.count, "threads": torch.get_num_threads(), "cpu": cpu,
        "gpu": torch.cuda.get_device_name(processes.device) if gpu else None, "cuda": torch.version.cuda}


def open_csv(path, columns, start):
    """Return a CSV file open at its end, and its rows; those of steps that will run again are gone."""
    rows = []
    if os.path.exists(path):
        with open(path, newline="") as file:
            # A line that a full disk or a power failure cut has too few cells: its step will not be told again.
            rows = [row for row in csv.DictReader(file, columns) if None not in row.values() and None not in row
                    and row["step"].isdigit() and int(row["step"]) < start]
    with replacing(path) as file:
        lines = [columns, *([row[name] for name in columns] for row in rows)]
        file.write("".join(",".join(line) + "\n" for line in lines).encode())
    return open(path, "a", buffering=1), rows


class Log:
    """metrics.csv, log.txt, the printed lines and the progress bar.

    A step's loss and norm are noted while they are still on the device. `flush` alone waits for
    them: every log_every steps and before anything is saved, so a GPU never stands still for a log.
    """

    def __init__(self, out_dir, start, steps, batch_size, tokens_per_step, may_overflow, intervenes, processes):
        self.out_dir, self.processes, self.steps = out_dir, processes, steps
        self.batch_size, self.tokens_per_step, self.may_overflow = batch_size, tokens_per_step, may_overflow
        self.is_main, self.intervenes = processes.rank == 0, intervenes
        self.pending, self.recent = [], deque(maxlen=128)
        if self.is_main:
            self.metrics, rows = open_csv(os.path.join(out_dir, "metrics.csv"), METRICS, start)
            if intervenes:
                self.changed, _ = open_csv(os.path.join(out_dir, "interventions.csv"), ("step", "row"), start)
            self.recent.extend(float(row["loss"]) for row in rows[-128:])
            self.text = open(os.path.join(out_dir, "log.txt"), "a", buffering=1)
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None if self.is_main else True)
        self.restart_clock()

    def say(self, line):
        if self.is_main:
            tqdm.write(line)
            sys.stdout.flush()  # tqdm does not: a pipe would get lines by 8 KB
            print(line, file=self.text)

    def restart_clock(self):
        self.began = time.perf_counter()

    def note(self, step, loss, norm, rate, scale, changed):
        """Note a step; loss and norm are tensors, `changed` the rows that an intervention changed."""
        self.pending.append((step, loss, norm, rate, scale, changed))
        self.bar.update()

    def flush(self):
        """Write the noted steps; return the last one's (step, loss, rate, norm, mean seconds) or None.

        Raises FloatingPointError at the first whose loss or gradient is not finite, if it is not an
        overflow that the loss scaler has answered: it names the rows, and nothing is saved after it.
        """
        if not self.pending:
            return None
        steps, losses, norms, rates, scales, changed = zip(*self.pending)
        self.pending = []
        losses = self.processes.mean(torch.stack(losses))
        norms = torch.stack(norms).tolist()
        seconds = (time.perf_counter() - self.began) / len(steps)
        self.restart_clock()
        for step, loss, norm, rate, scale, rows_changed in zip(steps, losses, norms, rates, scales, changed):
            rows = f"rows {step * self.batch_size:,} to {(step + 1) * self.batch_size - 1:,}"
            if not (self.may_overflow or math.isfinite(loss) and math.isfinite(norm)):
                saved = saved_steps(self.out_dir)
                raise FloatingPointError(
                    f"step {step} ({rows}): loss {loss}, gradient norm {norm}. Nothing was saved after it; the last "
                    + (f"checkpoint is step{saved[-1]}" if saved else "checkpoint is the one it branched from")
                    + ", `python data.py view` shows the rows")
            if self.is_main:
                self.metrics.write(f"{step},{step * self.tokens_per_step},{loss!r},{rate!r},{norm!r},"
                                   f"{scale:.0f},{seconds:.4f}\n")
                if rows_changed:
                    self.changed.writelines(f"{step},{row}\n" for row in rows_changed)
                self.watch(step, loss, rows)
        return steps[-1], losses[-1], rates[-1], norms[-1], seconds

    def sync(self):
        """Bring the lines to the disk: a checkpoint that outlived a power failure would never write its own again."""
        if self.is_main:
            for file in (self.metrics, *([self.changed] if self.intervenes else [])):
                os.fsync(file.fileno())

    def watch(self, step, loss, rows):
        """Say when a loss lies 6 standard deviations above the mean of the last 128; it changes nothing."""
        if not math.isfinite(loss):  # a float16 overflow, which metrics.csv has
            return
        if len(self.recent) == self.recent.maxlen:
            mean, deviation = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > mean + 6 * deviation:
                self.say(f"spike at step {step} ({rows}): loss {loss:.4f}, {(loss - mean) / deviation:.1f} "
                         f"standard deviations above {mean:.4f}, the mean of the 128 steps before")
        self.recent.append(loss)

    def report(self, step, loss, rate, norm, seconds, flops_per_token, peak):
        """Say where the run is: one line, fixed columns."""
        speed = self.tokens_per_step / seconds
        used = speed * flops_per_token / (peak * self.processes.count)
        self.say(f"step {step:6}/{self.steps} | loss {loss:.4f} | lr {rate:.2e} | norm {norm:.2f} | {seconds:.2f} s "
                 f"| {_count(speed)} tok/s | mfu {'-' if math.isnan(used) else f'{used:.1%}'}")

    def heldout(self, step, loss):
        if self.is_main:
            file, _ = open_csv(os.path.join(self.out_dir, "heldout.csv"), ("step", "tokens", "loss"), step)
            with file:
                file.write(f"{step},{step * self.tokens_per_step},{loss!r}\n")
        self.say(f"step {step:6}/{self.steps} | held-out loss {loss:.4f}")
        self.restart_clock()

    def close(self):
        self.bar.close()


def _count(n):
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k"
