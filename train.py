"""Train a Pythia: one order of the data, log-spaced checkpoints, gpt-neox v1.0's learning rate.

    python train.py configs/mini.py --data=data/demo/train --out_dir=runs/mini
    torchrun --standalone --nproc_per_node=8 train.py configs/pythia_160m.py --data=PREFIX \\
        --out_dir=RUN
    python train.py configs/mini.py --branch_from=runs/mini/step256 --out_dir=runs/child \\
        --intervention=NAME --twin=True
    python train.py configs/pythia_12b.py --plan=True --gpus=64   # the torchrun line for many nodes
    python train.py --replay=runs/mini/step256:300  # repeat these steps and compare
    python train.py --restore=runs/mini/step300     # recompute any step from an earlier checkpoint

Checkpoint N holds the weights after N updates, so step 0 is the initialisation. Step s is the
update that makes checkpoint s + 1 from rows s * batch_size to (s + 1) * batch_size - 1 of the
order. The same command, given again, resumes the run, and the result has the same bits as that of
an uninterrupted run. (torchrun kills its processes 30 s after a SIGTERM. If a step and a save take
longer, start it with --shutdown-timeout.)

The run folder:

    config.json        every setting that decides what is computed, and hashes of the data
    launches.jsonl     one line per launch: command, git commit, package versions, hardware
    log.txt            what was printed
    metrics.csv        one line per step; its digest is the SHA-256 of the previous digest and the
                       step's token ids, learning rate, loss scale, loss and gradient norm
    interventions.csv  the rows that an intervention changed
    stepN/             a checkpoint, see checkpoints.py

Sources: gpt-neox v1.0, megatron/{training,learning_rates}.py.
"""

import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import torch

import checkpoints
from checkpoints import FIRST_DIGEST
from config import Table, check, expecting, fail, lock, note, parse, read_json, run, write_json
from data import OrderedData, check_whole, fingerprint, samples_needed
from interventions import IntervenedData, InterventionConfig
from model import ModelConfig, Pythia
from parallel import (ExactSums, LaunchConfig, LossScaler, PlanConfig, Processes, communicate,
                      compute_dtype, flops_per_token, forget_gradients, leave_processes,
                      parallelize, peak_flops, plan, rehearse)
from tokenizer import load_tokenizer
from verify import (ProofConfig, batch_sha256, begin_again, differences, launches, link, prove,
                    repeat_command, row_digests)


@dataclass(frozen=True)
class TrainConfig:
    """What a run computes."""
    data: str  # PREFIX of a token file (python prepare.py tokenize)
    learning_rate: float  # the peak, reached at the end of the warmup
    out_dir: str | None = None  # run folder; a run that is already there is resumed
    min_lr_ratio: float = 0.1  # lowest learning rate, as a fraction of learning_rate
    warmup: float = 0.01  # fraction of the steps
    steps: int = 143000
    batch_size: int = 1024  # sequences per optimizer step, over all processes
    weight_decay: float = 0.1  # of matrices and embeddings; biases and LayerNorms have none
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # largest norm of the whole gradient
    seed: int = 1234  # of the initialisation
    data_seed: int | None = None  # of the order of the data; default: seed
    exact_sums: bool = False  # same bits on any number of processes; needs --threads=N
    # Dtype of the matmuls: float32, bfloat16 or float16. On a CPU, float32 takes the place of
    # float16, and bfloat16 (the 1B's) needs AMX; on a CPU without it give --dtype=float32.
    dtype: str = "float16"
    checkpoint_every: int = 1000  # besides steps 0, 1, 2, 4, ..., 512
    state_every: int | None = None  # keep Adam's moments only at its multiples and in the newest
    tokenizer: str = "20B_tokenizer.json"  # copied into every checkpoint
    log_every: int = 10  # steps between printed lines; metrics.csv has every step
    async_save: bool = False  # write checkpoints in the background, from a copy in host memory
    stop_at: int | None = None  # save and stop after this step; without the flag the run goes on
    branch_from: str | None = None  # RUN/stepN: start with its weights, moments, place in the order
    warm_moments: int = 0  # K: rebuild Adam's moments, if it has none, from K batches before it
    twin: bool = False  # then train the same without the intervention too, in OUT_DIR_twin

    def __post_init__(self):
        check(self, "float32, bfloat16 or float16", checkpoints.FLOATS.__contains__, "dtype")
        check(self, "at least 1", lambda value: value >= 1, "steps", "batch_size", "stop_at",
              "checkpoint_every", "state_every", "log_every")
        check(self, "at least 0", lambda value: value >= 0, "weight_decay", "warm_moments")
        check(self, "more than 0", lambda value: value > 0, "learning_rate", "eps", "clip_norm")
        check(self, "0 to 1", lambda value: 0 <= value <= 1,
              "min_lr_ratio", "warmup", "beta1", "beta2")
        check(self, f"0 to {2**32 - 1:,}", lambda value: 0 <= value < 2**32, "seed", "data_seed")


# ---------------------------------------------------------------------------- one update


def learning_rate_at(k, config):
    """Return the learning rate after k updates, as megatron/learning_rates.py in gpt-neox v1.0.

    The original has two surprises. The first update has learning rate 0, so checkpoints 0 and 1 are
    equal. The cosine would end near 0 but is cut off at the floor, so that Pythia's learning rate
    is constant from update 115,139 on.
    """
    highest, lowest = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup = config.warmup * config.steps
    n = min(k, config.steps - warmup)
    if k <= warmup and warmup > 0:
        return highest * n / warmup
    return max(highest / 2 * (math.cos(math.pi * (n - warmup) / config.steps) + 1), lowest)


def make_optimizer(model, config):
    """Return AdamW with weight decay on matrices and embeddings, not on biases and LayerNorms."""
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if p.dim() == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps,
                             fused=True)


class Training:
    """The state of training: weights, moments, loss scale, number of updates.

    model is the plain Pythia, whose names and weights are saved. wrapped shares its weights and is
    what training calls: model itself, or DDP's or FSDP's module around it.
    """

    def __init__(self, model_config, config, launch, processes):
        self.config, self.device = config, processes.device
        self.dtype = compute_dtype(config.dtype, processes.device)
        with torch.device("meta"):
            self.model = Pythia(model_config)
        self.wrapped = parallelize(self.model, launch, self.dtype, processes, config.exact_sums)
        micro_batches = config.batch_size // launch.micro_batch_size
        self.sums = (ExactSums(self.model.parameters(), micro_batches, processes)
                     if config.exact_sums else None)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = LossScaler(enabled=self.dtype == torch.float16)
        self.updates = 0  # without those skipped; the learning rate depends on it

    def loss(self, rows):
        """Return the mean loss, a scalar on the device, of rows (B, T + 1) on the host."""
        if self.device.type == "cuda":  # pinned: the host does not wait for the copy
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        # Each weight is used once per pass, so caching cast weights would only cost memory.
        with torch.autocast(self.device.type, self.dtype, cache_enabled=False,
                            enabled=self.dtype != torch.float32):
            # A negative id is padding made by an intervention. As a target it is ignored; as an
            # input any token can stand in for it.
            return self.wrapped(rows[:, :-1].clamp(min=0), rows[:, 1:])

    def gradients(self, batch):
        """Add up the gradients of micro-batches (A, B, T + 1) on the host; return the mean loss."""
        total, n = 0.0, 1 if self.sums else len(batch)  # exact sums are divided at the end
        for i, rows in enumerate(batch):
            communicate(self.wrapped, last=i == len(batch) - 1)
            loss = self.loss(rows) / n
            (loss * self.scaler.scale).backward()
            total += loss.detach()
            if self.sums:
                self.sums.add(loss, self.scaler.scale)
        return self.sums.mean() if self.sums else total

    def clip(self):
        """Undo the loss scale and clip the gradient; return the norm that the gradient had.

        The norm is a tensor on the device and the same on all processes. The host does not wait.
        """
        if self.scaler.scale != 1:
            torch._foreach_div_([p.grad for p in self.model.parameters()], self.scaler.scale)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        return norm.full_tensor() if checkpoints.is_shard(norm) else norm

    def update(self, rate, norm):
        """Take Adam's step, or skip it after a float16 overflow; then clear the gradients."""
        # A skipped update does not advance the learning rate, so in float16 the host has to wait
        # for the norm once per step, as in DeepSpeed.
        overflow = self.scaler.enabled and not math.isfinite(norm)
        if not overflow:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.updates += 1
        forget_gradients(self.wrapped, self.optimizer)
        self.scaler.update(overflow)

    def is_finite(self):
        """Return whether all weights and moments of this process are finite."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return all((t.to_local() if checkpoints.is_shard(t) else t).isfinite().all()
                   for t in (*self.model.parameters(), *moments))


# ---------------------------------------------------------------------------- batches


class Batches:
    """Reads this process's micro-batches; all processes create one together.

    order is the run's OrderedData. data is the same, or an IntervenedData that changes its rows.
    """

    def __init__(self, model_config, config, intervention, launch, processes):
        self.config, self.model_config, self.intervention = config, model_config, intervention
        self.share = dict(batch_size=config.batch_size, rank=processes.rank,
                          world_size=processes.count, micro_batch_size=launch.micro_batch_size)
        processes.together(lambda: processes.first_on_node and self.open())  # builds the order
        processes.together(self.open)

    def open(self):
        """Open the data and read one step, so that mistakes show before anything is computed."""
        config = self.config
        tokenizer = load_tokenizer(config.tokenizer)
        seed = config.seed if config.data_seed is None else config.data_seed
        self.data = self.order = OrderedData(config.data, self.model_config.seq_length,
                                             samples_needed(config.steps, config.batch_size), seed)
        if config.steps * config.batch_size > len(self.order):
            raise ValueError(f"{config.data} holds {len(self.order):,} rows, too few for "
                             f"{config.steps:,} batches of {config.batch_size:,}")
        self.read(0)
        if self.intervention.intervention:
            self.data = IntervenedData(self.order, tokenizer, self.intervention)

    def read(self, step):
        """Return micro-batches (A, B, T + 1) int64 on the host, and (changed rows, row digests)."""
        batch, vocab_size = self.data.batch(step, **self.share), self.model_config.vocab_size
        if batch.max() >= vocab_size:
            raise ValueError(f"{self.config.data}: token {batch.max()} in step {step}, but "
                             f"vocab_size is {vocab_size}")
        return torch.from_numpy(batch), (getattr(self.data, "changed", []), row_digests(batch))


# ---------------------------------------------------------------------------- start and resume

# Paths, which may differ between nodes and launches; what the files hold is hashed instead.
PATHS = ("data", "tokenizer", "planted")
# Settings that do not decide what is computed. They may change when a run is resumed.
MAY_CHANGE = {*PATHS, "out_dir", "log_every", "async_save", "state_every", "stop_at", "twin"}
# What a branch shares with its parent: model, order of the data, schedule. The peak learning rate
# may differ, since the advice after an overflow is to branch with a lower one.
SHARED = {"n_layers", "d_model", "n_heads", "vocab_size", "seq_length", "gelu", "steps",
          "batch_size", "warmup", "min_lr_ratio", "data_tokens", "data_sha256", "order_sha256"}


def identity(batches, launch, processes):
    """Return all settings that decide what a run computes, and the hashes of its files.

    Raises ValueError if processes have different ones, or are launched differently.
    """
    config, order = batches.config, batches.order
    settings = asdict(batches.model_config) | asdict(config) | asdict(batches.intervention) | {
        "branch_from": config.branch_from and str(Path(config.branch_from)),  # no slash at the end
        "data_tokens": order.tokens.n_tokens, "data_sha256": fingerprint(order.tokens.paths),
        "order_sha256": None if order.preshuffled else fingerprint(order.paths),
        "planted_sha256": batches.intervention.plan_sha256()}
    if config.exact_sums:  # then only these can still change how sums are rounded
        settings |= {"micro_batch_size": launch.micro_batch_size, "threads": launch.threads,
                     "compile": launch.compile}
    processes.agree({name: value for name, value in (settings | asdict(launch)).items()
                     if name not in PATHS})
    return settings


def surroundings(launch, processes):
    """Return what launches.jsonl says of this launch: its settings, versions, hardware."""
    commit, cpuinfo = None, Path("/proc/cpuinfo")
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                             cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    cpu = re.search(r"model name\s*: (.*)|$", cpuinfo.read_text() if cpuinfo.exists() else "")[1]
    gpu = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else None
    packages = ("torch", "numpy", "safetensors", "tiktoken", "tqdm")
    return {"started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": [sys.executable, *sys.argv], "host": platform.node(), **asdict(launch),
            **{name: importlib.metadata.version(name) for name in packages},
            "python": platform.python_version(), "git_commit": commit,
            "cpu": cpu or platform.machine(), "gpu": gpu, "cuda": torch.version.cuda,
            "processes": processes.count, "threads": torch.get_num_threads()}


def find_start(config):
    """Return (folder, step) of the checkpoint to start from, (None, 0) for the initialisation."""
    run, saved = Path(config.out_dir), checkpoints.saved_steps(config.out_dir, state=True)
    for step, folder in checkpoints.step_folders(run):
        if not saved:
            raise ValueError(f"{run}: every checkpoint is damaged or without Adam's moments; "
                             "restore one, or move all of them away to begin again")
        if step > saved[-1]:
            note(f"{folder}: damaged or without Adam's moments; going on from step {saved[-1]:,}")
    if saved:
        return run / f"step{saved[-1]}", saved[-1]
    if config.branch_from is None:
        return None, 0
    source = Path(config.branch_from)
    _, step = checkpoints.identify(source)
    if source.name != f"step{step}" or step >= config.steps or not checkpoints.is_whole(source):
        raise ValueError(f"branch_from = {source}, expected a whole checkpoint RUN/stepN of a step "
                         f"before {config.steps:,} (python verify.py verify says more)")
    if step and not (source / "optimizer").exists() and not 1 <= config.warm_moments <= step:
        raise ValueError(f"{source} holds weights only and warm_moments = {config.warm_moments}: "
                         f"expected --warm_moments=K (--help), K from 1 to {step}")
    return source, step


def claim(settings, config, launch, processes):
    """Lock the run folder, note this launch in it and return where to start.

    settings (see identity) must be those of the run that is there, or share with a branch's parent
    what SHARED lists. Returns folder and step of find_start, and what has changed since the last
    launch, in words. Only the first process calls this.
    """
    run = Path(config.out_dir)
    if not run.exists():
        find_start(config)  # a mistake in --branch_from leaves no folder
    checkpoints.lock(run)
    source, start = find_start(config)
    ours, known, but = run / "config.json", None, MAY_CHANGE
    if ours.exists() or checkpoints.step_folders(run):
        known = ours
    elif source and (source / "training.json").exists():  # it is not a published one
        known, but = source.parent / "config.json", settings.keys() - SHARED
    if known and (different := differences(read_json(known), settings, but)):
        raise ValueError(f"{known} says otherwise: {'; '.join(different)}. Use those settings, or "
                         "start a new run in another --out_dir")
    if known != ours:
        write_json(ours, settings)
    here, last = surroundings(launch, processes), {}
    file = lock(run / "launches.jsonl")
    with suppress(ValueError):  # it is empty at the first launch
        last = launches(run)[-1]
    file.write(f"\n{json.dumps(here)}\n".encode())  # the line before it may have been cut
    harmless = {"started", "command", "host", "check_data"}
    harmless |= {"processes"} if config.exact_sums else set()
    return source, start, differences(last, here, harmless)


def load_start(training, source, start):
    """Fill in weights, moments, loss scale and number of updates, from what `find_start` found.

    A published checkpoint has no moments (see rebuild_moments) and no training.json: the number of
    updates is taken to be its step, as if none had been skipped.
    """
    if source is None:
        training.model.init_weights(training.config.seed, checkpoints.fill)
        return
    notes = checkpoints.load_training(source.parent, start, training.model, training.optimizer)
    training.scaler.state |= notes.get("scaler", {})
    training.updates = notes.get("updates", start)


def rebuild_moments(training, batches, source, start):
    """Rebuild Adam's moments at checkpoint `start` from the `warm_moments` batches before it.

    The batches are replayed as the parent saw them, at learning rate 0, which changes nothing but
    the moments. A moment is a sum of gradients with weights that add up to 1 - beta**updates. After
    a few replayed updates that total is too small, so moments are scaled up to the right one.
    """
    config, updates = training.config, training.updates
    for step in range(start - config.warm_moments, start):
        training.gradients(torch.from_numpy(batches.order.batch(step, **batches.share)))
        training.update(rate=0.0, norm=training.clip())
    if not training.optimizer.state:
        raise FloatingPointError("every replayed batch overflowed and lowered the loss scale; "
                                 "replay more batches with --warm_moments=K")
    for state in training.optimizer.state.values():
        replayed = float(state["step"])
        for beta, name in ((config.beta1, "exp_avg"), (config.beta2, "exp_avg_sq")):
            state[name].mul_((1 - beta**updates) / (1 - beta**replayed))
        state["step"].fill_(updates)
    training.updates = updates
    # Back to the parent's loss scale; a published checkpoint does not tell it.
    training.scaler.state |= checkpoints.read_training(source, start).get("scaler", {})


# ---------------------------------------------------------------------------- logging and saving

METRICS = ("step", "tokens", "loss", "learning_rate", "grad_norm", "loss_scale", "seconds",
           "batch_sha256", "digest")


class Log:
    """Prints, and writes log.txt, metrics.csv and interventions.csv, in the first process.

    A step's loss and norm are noted before they are computed. Only `flush` waits for them, every
    log_every steps and before a save, so that a GPU rarely has to wait for the host.
    """

    def __init__(self, model_config, config, intervention, source, start, processes):
        """source and start: the checkpoint that the run starts from, as find_start returns them."""
        self.config, self.processes, self.start, self.tables = config, processes, start, {}
        self.digest = checkpoints.read_manifest(source)[1] if source else FIRST_DIGEST
        self.tokens_per_step = config.batch_size * model_config.seq_length
        # Tokens per second at most.
        self.peak = processes.count * peak_flops(processes.device) / flops_per_token(model_config)
        self.pending, self.recent = [], deque(maxlen=128)  # steps to write, last finite losses
        self.began = time.perf_counter()
        if processes.rank > 0:
            return
        self.text = lock(Path(config.out_dir) / "log.txt")
        columns = {"metrics": METRICS}
        if intervention.intervention:
            columns["interventions"] = ("step", "row")
        for name in columns:  # the steps that a killed launch wrote later are taken again
            self.tables[name] = Table(Path(config.out_dir) / f"{name}.csv", columns[name],
                                      lambda row: int(row["step"]) < start)
        with expecting(f"{config.out_dir}/metrics.csv", "the metrics of a run"):
            losses = [float(row["loss"]) for row in self.tables["metrics"].rows]
        self.recent.extend(filter(math.isfinite, losses))  # not an overflow's

    def say(self, line):
        if self.tables:
            print(line, flush=True)
            self.text.write(f"{line}\n".encode())

    def introduce(self, training, launch, order, changed):
        """Print what is about to be computed, and `changed`, why its bits may differ."""
        config, count = self.config, self.processes.count
        lines = [f"{sum(p.numel() for p in training.model.parameters()):,} parameters, "
                 f"{self.tokens_per_step:,} tokens a step, {config.steps:,} steps, {count} "
                 f"process(es) on {training.device.type} in {str(training.dtype)[6:]}, "
                 f"{config.batch_size // (launch.micro_batch_size * count)} micro-batch(es) "
                 f"of {launch.micro_batch_size}, peak {self.peak:,.0f} tokens/s"
                 + (f"; going on from step {self.start:,}" if self.start else ""),
                 *order.describe()]
        if changed and self.start:
            lines.append(f"bits can differ from step {self.start:,} on: since the last launch "
                         + "; ".join(changed))
        self.say("\n".join(lines))

    def note(self, step, loss, norm, rate, scale, seen):
        """Note a step: loss and norm are tensors, `seen` comes from Batches.read."""
        self.pending.append((step, loss, norm, rate, scale, *seen))

    def flush(self):
        """Write the noted steps and print one line on where the run is.

        Raises FloatingPointError at the first step whose loss or gradient norm is not finite,
        unless a smaller loss scale can mend it. Nothing is saved after such a step.
        """
        if not self.pending:
            return
        steps, losses, norms, rates, scales, changes, digests = zip(*self.pending)
        losses, norms = self.processes.mean(torch.stack(losses)), torch.stack(norms).tolist()
        batches = map(batch_sha256, zip(*self.processes.gather(digests)))
        seconds = (time.perf_counter() - self.began) / len(steps)
        self.pending = []
        for step, loss, norm, rate, scale, changed, batch in zip(
                steps, losses, norms, rates, scales, changes, batches):
            row = dict(zip(METRICS, (step, step * self.tokens_per_step, loss, rate, norm,
                                     f"{scale:.0f}", f"{seconds:.4f}", batch)))
            self.digest = link(self.digest, row)
            if self.tables:
                self.tables["metrics"].append((*row.values(), self.digest))
            if "interventions" in self.tables:
                self.tables["interventions"].append(*((step, place) for place in changed))
            first, n = step * self.config.batch_size, self.config.batch_size
            where = f"step {step} (rows {first:,} to {first + n - 1:,})"
            if scale == 1 and not math.isfinite(loss + norm):
                raise FloatingPointError(
                    f"{where}: loss {loss}, gradient norm {norm} at loss scale 1. Nothing was "
                    "saved after it. Branch from an earlier checkpoint with a lower learning rate, "
                    "or with --dtype=bfloat16 if this run is in float16")
            self.watch(where, loss)
        speed, steps_left = self.tokens_per_step / seconds, self.config.steps - step - 1
        mfu = "-" if math.isnan(self.peak) else f"{speed / self.peak:.1%}"
        self.say(f"step {step:6}/{self.config.steps} | loss {loss:.4f} | lr {rate:.2e} "
                 f"| norm {norm:.2f} | {seconds:.2f} s | {speed / 1e3:,.1f}k tok/s "
                 f"| mfu {mfu} | {timedelta(seconds=round(seconds * steps_left))} left")
        self.began = time.perf_counter()

    def watch(self, where, loss):
        """Report a loss 6 standard deviations above the mean of the last 128; change nothing."""
        if len(self.recent) == self.recent.maxlen:
            mean, deviation = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > mean + 6 * deviation:
                self.say(f"spike at {where}: loss {loss:.4f}, {(loss - mean) / deviation:.1f} "
                         f"standard deviations above {mean:.4f}, the mean of the 128 steps before")
        if math.isfinite(loss):  # not an overflow's
            self.recent.append(loss)


def save(training, step, scheduled, log):
    """Write checkpoint `step`, after every step before it is known to be finite and on the disk."""
    config = training.config
    log.flush()
    if log.processes.any(not training.is_finite()):
        raise FloatingPointError(f"step {step - 1}: the update left weights or moments that are "
                                 f"not finite; step{step} was not saved. Branch from an earlier "
                                 "checkpoint with a lower learning rate")
    # Even after a power failure, the lines of all steps before a saved checkpoint are there.
    for table in log.tables.values():
        os.fsync(table.file.fileno())
    checkpoints.save(config.out_dir, step, training.model, training.optimizer, {
        "tokens": step * log.tokens_per_step, "updates": training.updates,
        "scaler": dict(training.scaler.state)
    }, config.tokenizer, scheduled, config.async_save, config.state_every, log.digest)
    log.began = time.perf_counter()


# ---------------------------------------------------------------------------- the run


def train(model_config, config, intervention, launch, processes):
    """Take the steps that the run folder does not have yet."""
    batches = Batches(model_config, config, intervention, launch, processes)
    settings = identity(batches, launch, processes)
    training = Training(model_config, config, launch, processes)
    claimed = processes.together(lambda: claim(settings, config, launch, processes),
                                 first_alone=True)
    source, start, changed = processes.gather(claimed)[0]
    processes.together(lambda: load_start(training, source, start))
    log = processes.together(lambda: Log(model_config, config, intervention, source, start,
                                         processes))
    log.introduce(training, launch, batches.order, changed)
    if source is None:
        save(training, 0, True, log)
    if processes.count > 1:
        rehearse(training, launch.micro_batch_size, model_config.seq_length)
    if training.updates and not training.optimizer.state:
        rebuild_moments(training, batches, source, start)

    schedule = checkpoints.checkpoint_steps(config.steps, config.checkpoint_every)
    end, stop = min(config.steps, config.stop_at or config.steps), False
    if start < end:
        batch, seen = batches.read(start)
    processes.listen()  # a signal up to here ends the process at once: no step is lost
    log.began = time.perf_counter()
    for step in range(start, end):
        rate = learning_rate_at(training.updates, config)
        loss = training.gradients(batch)  # forward and backward passes of all micro-batches
        norm = training.clip()
        log.note(step, loss, norm, rate, training.scaler.scale, seen)
        if step + 1 < end:  # read the next batch while a GPU is still computing this one
            batch, seen = batches.read(step + 1)
        training.update(rate, norm)
        if step % config.log_every == 0:
            log.flush()
        stop = processes.any(processes.signal)
        if stop or step + 1 == end or step + 1 in schedule:
            save(training, step + 1, step + 1 in schedule, log)
        if stop:
            break
    checkpoints.finish_writing()
    if stop:
        log.say(f"interrupted: saved step{step + 1}; the same command goes on from there")
        sys.exit(128 + (processes.signal or signal.SIGTERM))  # another process may have got it
    log.say(f"done: step {max(start, end):,} of {config.steps:,}, "
            f"{len(checkpoints.saved_steps(config.out_dir))} checkpoints in {config.out_dir}")


SCHEMAS = ModelConfig, TrainConfig, InterventionConfig, LaunchConfig, PlanConfig, ProofConfig


def main(model_config, config, intervention, launch, options, proof=None):
    if intervention.intervention and intervention.intervention_from >= config.steps:
        raise ValueError(f"intervention_from = {intervention.intervention_from:,}, but the last "
                         f"step is {config.steps - 1:,}")
    if options.plan:
        schedule = checkpoints.checkpoint_steps(config.steps, config.checkpoint_every)
        return plan(model_config, config, launch, options, len(schedule))
    if not config.out_dir:
        raise ValueError("missing: --out_dir, the run folder (--help explains every setting)")
    if config.warm_moments and not config.branch_from:
        raise ValueError(f"warm_moments = {config.warm_moments} without --branch_from=RUN/stepN, "
                         "the checkpoint whose moments are to be rebuilt")
    if config.exact_sums and (launch.sharding == "fsdp" or launch.threads is None):
        raise ValueError("exact_sums = True: expected --sharding=ddp and --threads=N, since the "
                         "bits of a matmul depend on the number of threads")
    # Hashing 600 GB takes longer than the 30 minutes for which processes wait for each other.
    patience = timedelta(days=1) if launch.check_data else None
    processes = Processes(launch.device, patience, launch.threads)
    check_here = launch.check_data and processes.first_on_node
    processes.together(lambda: check_here and check_whole(config.data))
    processes.together(lambda: proof and begin_again(config.out_dir, proof), first_alone=True)
    if launch.deterministic:  # an operation that cannot be deterministic raises an error
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only a debugging aid
    train(model_config, config, intervention, launch, processes)
    if config.twin:
        # The first run's blocks are in reference cycles, since a replaced forward refers to its
        # block. Without this, their weights could stay in memory beside the twin's.
        gc.collect()
        control = replace(config, out_dir=f"{config.out_dir.rstrip('/')}_twin", twin=False)
        train(model_config, control, InterventionConfig(), launch, processes)
    if proof and processes.rank == 0:
        prove(proof, Path(config.out_dir))


if __name__ == "__main__":
    try:
        arguments, proof = run(repeat_command, sys.argv[1:], SCHEMAS[:4])
        *settings, asked = parse(arguments, *SCHEMAS)
        if asked != ProofConfig() and not proof:
            fail("replay and restore are given on the command line, not in a config file")
        run(main, *settings, proof)
    finally:
        run(checkpoints.finish_writing)
        leave_processes()
