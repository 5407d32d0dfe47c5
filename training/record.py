"""What a run leaves behind besides its checkpoints, so that its folder explains itself.

    config.json      every setting that decides what is computed; of a branch also what differs from
                     its parent
    launches.jsonl   one line a launch: command, git commit, package versions, hardware
    log.txt          what was printed
    metrics.csv      one line a step
    interventions.csv  the rows that an intervention changed
    heldout.csv      the loss on the held-out batches, of checkpoint `step`
"""

import csv
import hashlib
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
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import lock, saved_steps
from config import replacing
from data import read_json

METRICS = ("step", "tokens", "loss", "learning_rate", "grad_norm", "loss_scale", "seconds")
# What may differ when a run goes on: it does not decide what is computed.
MAY_CHANGE = {"data", "out_dir", "tokenizer", "log_every", "async_save", "state_every", "stop_at",
              "heldout", "heldout_every", "heldout_batches", "twin"}
# What a branch shares with its parent: model, order of the data, schedule. The highest rate is
# free: a branch with a lower one is the advice to a run that overflows.
SHARED = ("n_layers", "d_model", "n_heads", "vocab_size", "seq_length", "gelu", "steps",
          "batch_size", "warmup", "min_lr_ratio", "first_batch_sha256")
INTERVENED = {"intervention", "intervention_from", "terms", "copies"}


def claim_folder(model_config, config, intervention, launch, data, processes):
    """Lock the run folder, write or check config.json, note this launch; for the first process."""
    # The rows of step 0 stand for the whole order: a moved file is welcome, another one is not.
    digest = hashlib.sha256(data.batch(0, config.batch_size).astype("<u2").tobytes()).hexdigest()
    settings = asdict(model_config) | asdict(config) | asdict(intervention)
    lock(config.out_dir)
    open_run(config.out_dir, settings | {"first_batch_sha256": digest})
    with open(os.path.join(config.out_dir, "launches.jsonl"), "a") as file:
        file.write(json.dumps(describe_launch(asdict(launch), processes)) + "\n")


def open_run(out_dir, settings):
    """Write RUN/config.json, or raise ValueError naming every setting that differs there."""
    path = os.path.join(out_dir, "config.json")
    if os.path.exists(path):
        before = read_json(path)
        if Path(str(before.get("branch_from"))) == Path(str(settings["branch_from"])):
            before["branch_from"] = settings["branch_from"]  # RUN/step8/ is RUN/step8
        differences = [f"{name} was {before.get(name)!r}, is {value!r}"
                       for name, value in settings.items()
                       if name not in MAY_CHANGE and before.get(name) != value]
        if differences:
            raise ValueError(f"{out_dir} holds another run: {'; '.join(differences)}. "
                             "Go back to its settings, or name another --out_dir")
        return
    if settings["branch_from"]:
        settings = settings | {"differs_from_parent": compare_with_parent(settings)}
    with replacing(path) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())


def compare_with_parent(settings):
    """Return {setting: [the parent's, ours]}; raise ValueError on what a branch must share."""
    path = Path(settings["branch_from"]).parent / "config.json"
    before = read_json(path) if path.exists() else {}
    differences = {name: [before.get(name), value] for name, value in settings.items()
                   if name not in MAY_CHANGE | {"branch_from"} and before.get(name) != value}
    begin = int(Path(settings["branch_from"]).name.removeprefix("step"))
    first, last = settings["intervention_from"], settings["intervention_to"]
    # What the parent did itself may go on; 0 means from the branch's first step on.
    if settings["intervention"] and INTERVENED & set(differences) and (
            0 < first < begin or (last is not None and last < begin)):
        raise ValueError(f"intervention_from = {first}, intervention_to = {last}, but the branch "
                         f"begins at step {begin}: steps before it are its parent's")
    if not before:  # a published model: weights alone, so only their shapes can be compared
        return "unknown: the parent has no config.json"
    refused = [f"{name} is {differences[name][1]!r}, the parent's {differences[name][0]!r}"
               for name in SHARED if name in differences]
    if refused:
        raise ValueError(f"branch_from = {settings['branch_from']}: a branch keeps its parent's "
                         f"model, order and schedule, but {'; '.join(refused)}")
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
            cpu = next((line.split(":")[1].strip() for line in file
                        if line.startswith("model name")), cpu)
    packages = ("torch", "numpy", "safetensors", "tiktoken", "tqdm")
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv], "launch": launch,
        "git_commit": output("git", "rev-parse", "HEAD"),
        "git_changes": output("git", "status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(), "system": platform.platform(), "host": platform.node(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "processes": processes.count, "threads": torch.get_num_threads(), "cpu": cpu,
        "gpu": torch.cuda.get_device_name(processes.device) if gpu else None,
        "cuda": torch.version.cuda}


def open_csv(path, columns, start):
    """Return a CSV file open at its end, and its rows without those of steps that run again."""
    rows = []
    if os.path.exists(path):
        with open(path, newline="") as file:
            # A full disk or a power failure cuts the last line anywhere, in its last cell too, so
            # that only its end tells it is whole. Its step will not be told again.
            whole = csv.reader(line for line in file if line.endswith("\n"))
            rows = [row for row in whole if len(row) == len(columns)
                    and row[0].isdigit() and int(row[0]) < start]
    with replacing(path) as file:
        file.write("".join(",".join(line) + "\n" for line in (columns, *rows)).encode())
    return open(path, "a", buffering=1), [dict(zip(columns, row)) for row in rows]


class Log:
    """metrics.csv, log.txt, the printed lines and the progress bar.

    A step's loss and norm are noted while they are still on the device. `flush` alone waits for
    them: every log_every steps and before anything is saved, so a GPU never stands still for a log.
    """

    def __init__(self, config, start, tokens_per_step, may_overflow, intervention, processes):
        """config: the run's TrainConfig; start: the step it goes on from."""
        self.config, self.intervention, self.tokens_per_step, self.processes = (
            config, intervention, tokens_per_step, processes)
        self.may_overflow, self.is_main = may_overflow, processes.rank == 0
        self.pending, self.recent = [], deque(maxlen=128)
        if self.is_main:
            def table(name, columns, start):
                return open_csv(os.path.join(config.out_dir, name), columns, start)

            self.metrics, rows = table("metrics.csv", METRICS, start)
            self.tables = [self.metrics]
            if intervention.intervention:
                self.changed, changed = table("interventions.csv", ("step", "row"), start)
                self.n_changed = len(changed)
                self.n_covered = sum(intervention.covers(int(row["step"])) for row in rows)
                self.tables.append(self.changed)
            if config.heldout:  # its steps are checkpoints: that of `start` is not measured again
                self.evaluated, _ = table("heldout.csv", ("step", "tokens", "loss"), start + 1)
                self.tables.append(self.evaluated)
            losses = (float(row["loss"]) for row in rows)  # a float16 overflow's may be nan
            self.recent.extend(loss for loss in losses if math.isfinite(loss))
            self.text = open(os.path.join(config.out_dir, "log.txt"), "a", buffering=1)
        self.bar = tqdm(total=config.steps, initial=start, unit="step",
                        disable=None if self.is_main else True)
        self.restart_clock()

    def say(self, line):
        if self.is_main:
            tqdm.write(line)
            sys.stdout.flush()  # tqdm does not: a pipe would get lines by 8 KB
            print(line, file=self.text)

    def restart_clock(self):
        self.began = time.perf_counter()

    def note(self, step, loss, norm, rate, scale, changed):
        """Note a step; loss and norm are tensors, `changed` lists what an intervention changed."""
        self.pending.append((step, loss, norm, rate, scale, changed))
        self.bar.update()

    def flush(self):
        """Write the noted steps; return the last's (step, loss, rate, norm, mean seconds) or None.

        Raises FloatingPointError at the first whose loss or gradient is not finite, if it is not an
        overflow that the loss scaler has answered. It names the rows; nothing is saved after it.
        """
        if not self.pending:
            return None
        steps, losses, norms, rates, scales, changed = zip(*self.pending)
        self.pending = []
        losses = self.processes.mean(torch.stack(losses))
        norms = torch.stack(norms).tolist()
        seconds = (time.perf_counter() - self.began) / len(steps)
        self.restart_clock()
        for step, loss, norm, rate, scale, rows_changed in zip(
                steps, losses, norms, rates, scales, changed):
            first = step * self.config.batch_size
            rows = f"rows {first:,} to {first + self.config.batch_size - 1:,}"
            if not (self.may_overflow or math.isfinite(loss) and math.isfinite(norm)):
                saved = saved_steps(self.config.out_dir)
                raise FloatingPointError(
                    f"step {step} ({rows}): loss {loss}, gradient norm {norm}. Nothing was saved "
                    "after it; the last checkpoint is "
                    + (f"step{saved[-1]}" if saved else "the one it branched from")
                    + ", `python data.py view` shows the rows")
            if self.is_main:
                self.metrics.write(f"{step},{step * self.tokens_per_step},{loss!r},{rate!r},"
                                   f"{norm!r},{scale:.0f},{seconds:.4f}\n")
                if self.intervention.intervention:
                    self.n_changed += len(rows_changed)
                    self.n_covered += self.intervention.covers(step)
                    self.changed.writelines(f"{step},{row}\n" for row in rows_changed)
                self.watch(step, loss, rows)
        return steps[-1], losses[-1], rates[-1], norms[-1], seconds

    def sync(self):
        """Bring the lines to the disk.

        A run goes on from a checkpoint that outlived a power failure, and nothing would write the
        lines of the steps before it again.
        """
        if self.is_main:
            for file in self.tables:
                os.fsync(file.fileno())

    def watch(self, step, loss, rows):
        """Say when a loss is 6 standard deviations above the last 128's mean; changes nothing."""
        if not math.isfinite(loss):  # a float16 overflow, which metrics.csv has
            return
        if len(self.recent) == self.recent.maxlen:
            mean, deviation = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > mean + 6 * deviation:
                self.say(f"spike at step {step} ({rows}): loss {loss:.4f}, "
                         f"{(loss - mean) / deviation:.1f} standard deviations above {mean:.4f}, "
                         "the mean of the 128 steps before")
        self.recent.append(loss)

    def report(self, step, loss, rate, norm, seconds, flops_per_token, peak):
        """Say where the run is: one line, fixed columns."""
        speed = self.tokens_per_step / seconds
        used = speed * flops_per_token / (peak * self.processes.count)
        self.say(f"step {step:6}/{self.config.steps} | loss {loss:.4f} | lr {rate:.2e} "
                 f"| norm {norm:.2f} | {seconds:.2f} s | {_count(speed)} tok/s "
                 f"| mfu {'-' if math.isnan(used) else f'{used:.1%}'}")

    def heldout(self, step, loss):
        if self.is_main:
            self.evaluated.write(f"{step},{step * self.tokens_per_step},{loss!r}\n")
        self.say(f"step {step:6}/{self.config.steps} | held-out loss {loss:.4f}")
        self.restart_clock()

    def close(self):
        self.bar.close()
        if self.is_main and self.intervention.intervention:
            self.say(f"{self.intervention.intervention} changed {self.n_changed:,} of "
                     f"{self.n_covered * self.config.batch_size:,} rows, see interventions.csv")


def _count(n):
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k"
