"""Train a Pythia: one order of the data, log-spaced checkpoints, gpt-neox v1.0's learning rate.

    python train.py configs/mini.py --data=data/demo/train --out_dir=runs/mini
    torchrun --standalone --nproc_per_node=8 train.py configs/pythia_160m.py --data=PREFIX \\
        --out_dir=RUN
    python train.py configs/mini.py --branch_from=runs/mini/step256 --out_dir=runs/child \\
        --intervention=NAME --twin=True
    python train.py configs/pythia_12b.py --plan=True --gpus=64   # the torchrun line for many nodes
    python train.py --replay=runs/mini/step256:300  # takes steps again and compares
    python train.py --restore=runs/mini/step300     # any step, from the state saved before it

Checkpoint N is the weights after N updates, so step 0 is the initialisation. Step s is the update
that makes checkpoint s + 1 from the rows s * batch_size to (s + 1) * batch_size - 1 of the order.
The same command, given again, goes on where the run stopped, to the same bits as if it had never
stopped. (torchrun kills its processes 30 s after a SIGTERM. Where a step and a save take longer,
give it --shutdown-timeout.)

The run folder explains itself:

    config.json        every setting that decides what is computed; of a branch also what differs
                       from its parent
    launches.jsonl     one line a launch: command, git commit, package versions, hardware
    log.txt            what was printed
    metrics.csv        one line a step; its digest is SHA-256 of the digest before and of the step's
                       token ids, rate, loss scale, loss and gradient norm
    interventions.csv  the rows that an intervention changed
    stepN/             a checkpoint: checkpoints.py

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
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import torch

import checkpoints
from config import check, COUNT, fail, note, NUMBER, parse, read_json, run, Table, write_json
from data import OrderedData, check_whole, fingerprint, samples_needed
from interventions import IntervenedData, InterventionConfig
from model import ModelConfig, Pythia
from parallel import (ExactSums, Interrupt, LaunchConfig, LossScaler, PlanConfig, Processes,
                      communicate, compute_dtype, flops_per_token, forget_gradients,
                      leave_processes, parallelize, peak_flops, plan, rehearse)
from tokenizer import load_tokenizer
from verify import (ProofConfig, batch_sha256, begin_again, changes, launches, link, prove,
                    repeat_command, row_digests)


@dataclass(frozen=True)
class TrainConfig:
    """What a run computes."""
    data: str  # PREFIX of a token file (python prepare.py tokenize)
    learning_rate: float  # the highest, reached after the warmup
    out_dir: str | None = None  # run folder; a run that is there already goes on
    min_lr_ratio: float = 0.1  # floor of the learning rate, as a fraction of learning_rate
    warmup: float = 0.01  # fraction of steps
    steps: int = 143000
    batch_size: int = 1024  # sequences per optimizer step, all processes together
    weight_decay: float = 0.1  # of matrices and embeddings; biases and LayerNorms have none
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # of the gradient of all parameters
    seed: int = 1234  # of the initialisation
    data_seed: int | None = None  # of the order of the data; default: seed
    exact_sums: bool = False  # equal bits on any number of processes, with --threads=N
    # Of the matmuls: float32, bfloat16 or float16. A CPU computes float16's in float32, and without
    # AMX it refuses bfloat16, the 1B's: there --dtype=float32 has to be given.
    dtype: str = "float16"
    checkpoint_every: int = 1000  # besides steps 0, 1, 2, 4, ..., 512
    state_every: int | None = None  # keep Adam's moments (2/3 of it) only here and in the newest
    tokenizer: str = "20B_tokenizer.json"  # goes into every checkpoint
    log_every: int = 10  # steps between printed lines; metrics.csv has every step
    async_save: bool = False  # train on while a checkpoint is written, from a copy in host memory
    stop_at: int | None = None  # save and stop after this step; without it the command goes on
    branch_from: str | None = None  # RUN/stepN: begin with its weights, moments, place in the order
    warm_moments: int = 0  # if it has weights only: Adam's moments from the K batches before it
    twin: bool = False  # then train the same without its intervention too, in OUT_DIR_twin

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype = {self.dtype!r}, expected float32, bfloat16 or float16")
        check(self, "at least 1", lambda value: value >= 1, "steps", "batch_size", "stop_at",
              "checkpoint_every", "state_every", "log_every")
        check(self, "at least 0", lambda value: value >= 0, "weight_decay", "warm_moments")
        check(self, "more than 0", lambda value: value > 0, "learning_rate", "eps", "clip_norm")
        check(self, "0 to 1", lambda value: 0 <= value <= 1,
              "min_lr_ratio", "warmup", "beta1", "beta2")
        check(self, f"0 to {2**32 - 1:,}", lambda value: 0 <= value < 2**32, "seed", "data_seed")


# ---------------------------------------------------------------------------- one update


def learning_rate_at(k, config):
    """Return the rate of the update after k successful ones (megatron/learning_rates.py, v1.0).

    Two surprises, both as in the original. The first update has rate 0, so checkpoints 0 and 1 are
    equal. The cosine aims at about 0 and is cut off at the floor: Pythia's rate is constant from
    update 115,139 on.
    """
    highest, lowest = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup = config.warmup * config.steps
    n = min(k, config.steps - warmup)
    if k <= warmup and warmup > 0:
        return highest * n / warmup
    return max(highest / 2 * (math.cos(math.pi * (n - warmup) / config.steps) + 1), lowest)


def make_optimizer(model, config):
    """Return AdamW: decay on matrices, embedding and head too, none on biases and LayerNorms."""
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if p.dim() == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps,
                             fused=True)


class Training:
    """What changes as training goes on: weights, moments, loss scale, the count of updates.

    model is the plain Pythia, whose names and weights are saved; wrapped is what computes, the same
    weights behind DDP's or FSDP's exchange of gradients.
    """

    def __init__(self, model_config, config, launch, processes):
        self.config, self.device = config, processes.device
        self.dtype = compute_dtype(config.dtype, processes.device)
        with torch.device("meta"):
            self.model = Pythia(model_config)
        self.wrapped = parallelize(self.model, launch, self.dtype, processes, config.exact_sums)
        self.sums = None
        if config.exact_sums:
            micro_batches = config.batch_size // launch.micro_batch_size
            self.sums = ExactSums(self.model.parameters(), micro_batches, processes)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = LossScaler(enabled=self.dtype == torch.float16)
        self.updates = 0  # that were not skipped: the learning rate goes by them

    def loss(self, rows):
        """Return the mean loss of rows (B, T + 1) on the host, a tensor on the device."""
        if self.device.type == "cuda":  # pinned, so that the host does not wait for the copy
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        # Each weight is used once a pass, so a cache of cast weights would only cost memory.
        with torch.autocast(self.device.type, self.dtype, cache_enabled=False,
                            enabled=self.dtype != torch.float32):
            # A negative id is padding that an intervention made. It is no target, and as an input
            # any token does in its place.
            return self.wrapped(rows[:, :-1].clamp(min=0), rows[:, 1:])

    def gradients(self, batch):
        """Add up the gradients of micro-batches (A, B, T + 1) on the host; return the mean loss."""
        if self.sums:
            for rows in batch:
                loss = self.loss(rows)
                (loss * self.scaler.scale).backward()
                self.sums.add(loss, self.scaler.scale)
            return self.sums.mean()
        total = 0.0
        for i, rows in enumerate(batch):
            communicate(self.wrapped, last=i == len(batch) - 1)
            loss = self.loss(rows) / len(batch)
            (loss * self.scaler.scale).backward()
            total += loss.detach()
        return total

    def clip(self):
        """Undo the loss scale, clip the whole gradient's norm; return the norm it had before.

        The norm is a tensor on the device, the same on every process: the host does not wait.
        """
        if self.scaler.scale != 1:
            torch._foreach_div_([p.grad for p in self.model.parameters()], self.scaler.scale)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        return norm.full_tensor() if checkpoints.is_shard(norm) else norm

    def update(self, rate, norm):
        """Take Adam's step at this rate, unless float16 overflowed; forget the gradients."""
        # In float16 a skipped update does not advance the rate, so here the host has to know the
        # norm and waits for it, once a step, as DeepSpeed does.
        overflow = self.scaler.enabled and not math.isfinite(norm)
        if not overflow:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.updates += 1
        forget_gradients(self.wrapped, self.optimizer)
        self.scaler.update(overflow)

    @torch.no_grad()
    def is_finite(self):
        """Return whether all weights and moments of this process are finite."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        tensors = [t.to_local() if checkpoints.is_shard(t) else t
                   for t in (*self.model.parameters(), *moments)]
        largest = torch._foreach_norm([t for t in tensors if t.numel()], math.inf)
        return bool(torch.stack(largest).isfinite().all())


# ---------------------------------------------------------------------------- where a run starts


class Batches:
    """This process's micro-batches of every step of a run; all processes make one together.

    data is the run's OrderedData, or an IntervenedData that train puts in its place.
    """

    def __init__(self, model_config, config, launch, processes):
        self.config, self.model_config = config, model_config
        self.share = dict(batch_size=config.batch_size, rank=processes.rank,
                          world_size=processes.count, micro_batch_size=launch.micro_batch_size)
        processes.together(self.open, first_alone=True)  # builds the order, for the others too
        processes.together(self.open)

    def open(self):
        """Open the order and read a step, so that a mistake shows before anything is computed."""
        config, wanted = self.config, self.config.steps * self.config.batch_size
        seed = config.seed if config.data_seed is None else config.data_seed
        self.data = OrderedData(config.data, self.model_config.seq_length,
                                samples_needed(config.steps, config.batch_size), seed)
        if wanted > len(self.data):
            raise ValueError(f"{config.data} holds {len(self.data):,} rows, too few for "
                             f"{config.steps:,} batches of {config.batch_size:,}")
        self.read(0)

    def read(self, step):
        """Return micro-batches (A, B, T + 1) int64 on the host, the changed rows, the digests."""
        batch, vocab_size = self.data.batch(step, **self.share), self.model_config.vocab_size
        if batch.max() >= vocab_size:
            raise ValueError(f"{self.config.data}: token {batch.max()} in step {step}, but "
                             f"vocab_size is {vocab_size}")
        return torch.from_numpy(batch), getattr(self.data, "changed", []), row_digests(batch)


def identity(model_config, config, intervention, launch, order):
    """Return what decides a run's numbers: every setting, and what its files hold.

    order: its OrderedData.
    """
    settings = asdict(model_config) | asdict(config) | asdict(intervention) | {
        "branch_from": config.branch_from and str(Path(config.branch_from)),  # without a last slash
        "data_tokens": order.tokens.n_tokens, "data_sha256": fingerprint(order.tokens.paths()),
        "order_sha256": None if order.preshuffled else fingerprint(order.paths),
        "planted_sha256": intervention.plan_sha256()}
    if config.exact_sums:  # then these alone decide how its sums round
        settings |= {name: getattr(launch, name)
                     for name in ("micro_batch_size", "threads", "compile")}
    return settings


def find_start(config):
    """Return (folder, step) of the checkpoint to begin from, (None, 0) for the initialisation."""
    if saved := checkpoints.saved_steps(config.out_dir, state=True):
        return Path(config.out_dir) / f"step{saved[-1]}", saved[-1]
    if folders := checkpoints.step_folders(config.out_dir):
        raise ValueError(f"{folders[-1][1]}: damaged or without Adam's moments, like every "
                         f"checkpoint of {config.out_dir} (python verify.py verify says more): "
                         "restore one, or move all of them away to begin again")
    if not config.branch_from:
        return None, 0
    source = Path(config.branch_from)
    name = re.fullmatch(r"step(0|[1-9]\d*)", source.name)
    if not name or not checkpoints.is_whole(source) or int(name[1]) >= config.steps:
        raise ValueError(f"branch_from = {source}, expected a whole checkpoint RUN/stepN of a step "
                         f"before {config.steps:,} (python verify.py verify {source.parent} says "
                         "what is missing)")
    return source, int(name[1])


def claim(settings, config, launch, processes):
    """Lock the run folder and write what explains it.

    settings: the run's identity. Returns find_start's folder and step, and lines of what changed
    since the last launch.
    """
    def claim_alone():
        find_start(config)  # a mistake in --branch_from leaves no folder
        checkpoints.lock(config.out_dir)
        open_run(config.out_dir, settings)
        return note_launch(config, launch, processes)

    changed = processes.together(claim_alone, first_alone=True)
    # Looked for again behind the lock, when no other launch can save any more.
    source, start = processes.together(lambda: find_start(config))
    processes.agree({"the checkpoint that its disk shows": str(source)})
    for step, folder in checkpoints.step_folders(config.out_dir):
        if step > start:
            note(f"{folder}: damaged or without Adam's moments; going on from step {start:,}")
    return source, start, changed


def load_start(training, source, start):
    """Fill weights, moments and loss scale from where `find_start` says; return the first step.

    Where a checkpoint holds weights alone, the first step lies `warm_moments` before `start`: those
    batches are replayed at rate 0, which moves nothing but Adam's moments. Loss scale and number of
    updates are in training.json, which a published checkpoint does not have.
    """
    config = training.config
    if source is None:
        training.model.init_weights(config.seed, checkpoints.fill)
        return start
    saved = checkpoints.load_training(source.parent, start, training.model, training.optimizer)
    notes = saved or checkpoints.read_training(source, start)
    training.scaler.state |= notes.get("scaler", {})
    training.updates = notes.get("updates", start)
    if saved or start == 0:
        return start
    if not 1 <= config.warm_moments <= start:
        raise ValueError(
            f"{source} holds weights only and warm_moments = {config.warm_moments}: "
            "--warm_moments=K rebuilds Adam's moments from the K batches before it, "
            f"K from 1 to {start}")
    return start - config.warm_moments


def rebuild_moments(training, batches, first, source, start, log, interrupt):
    """Rebuild Adam's moments for checkpoint `start` from the batches of steps first to start - 1.

    They are taken at rate 0. Adam's moments are sums whose weights come to 1 - beta**updates: those
    of the replayed batches are scaled up to that total.
    """
    updates = training.updates
    for step in range(first, start):
        training.gradients(batches.read(step)[0])
        training.update(rate=0.0, norm=training.clip())
        if log.processes.any(interrupt.signal):
            log.say("interrupted: the same command begins the replay again")
            interrupt.exit()
    if not training.optimizer.state:
        raise FloatingPointError("the loss scale fell at every replayed batch: "
                                 "give more of them, --warm_moments=K")
    betas = training.config.beta1, training.config.beta2
    for state in training.optimizer.state.values():
        replayed = float(state["step"])
        for beta, moment in zip(betas, (state["exp_avg"], state["exp_avg_sq"])):
            moment.mul_((1 - beta**updates) / (1 - beta**replayed))
        state["step"].fill_(updates)
    training.updates = updates
    # The loss scale is again the parent's; of a published checkpoint it is not known.
    training.scaler.state |= checkpoints.read_training(source, start).get("scaler", {})


# ---------------------------------------------------------------------------- what a run leaves

# What may lie elsewhere on another node, if it holds the same there.
PATHS = ("data", "tokenizer", "planted")
# What may differ when a run goes on: it does not decide what is computed.
MAY_CHANGE = {*PATHS, "out_dir", "log_every", "async_save", "state_every", "stop_at", "twin"}
# What a branch shares with its parent: model, order of the data, schedule. The highest rate may
# differ, since a run that overflows is advised to branch with a lower one.
SHARED = ("n_layers", "d_model", "n_heads", "vocab_size", "seq_length", "gelu", "steps",
          "batch_size", "warmup", "min_lr_ratio", "data_tokens", "data_sha256", "order_sha256")


def open_run(out_dir, settings):
    """Write RUN/config.json, or raise ValueError naming what differs there.

    Of a branch, "differs_from_parent" notes {setting: [the parent's, ours]}.
    """
    path = Path(out_dir) / "config.json"
    if path.exists():
        return refuse(f"{out_dir} holds another run", differences(read_json(path), settings))
    if checkpoints.step_folders(out_dir):
        raise ValueError(f"{path}: no such file, though {out_dir} holds checkpoints, which nothing "
                         "explains now. Put it back, or name another --out_dir")
    if branch := settings["branch_from"]:
        parent = Path(branch).parent / "config.json"
        if parent.exists() or (Path(branch) / "training.json").exists():  # not a published one
            found = differences(read_json(parent) | {"branch_from": branch}, settings)
            refuse("a branch keeps its parent's model, data, order and schedule",
                   {name: found[name] for name in SHARED if name in found})
            settings["differs_from_parent"] = found
    write_json(path, settings)


def differences(before, settings):
    """Return {setting: [before, now]} of what decides the numbers, is known of both and differs."""
    return {name: [before[name], value] for name, value in settings.items()
            if name not in MAY_CHANGE and before.get(name, value) != value}


def refuse(why, different):
    """Raise ValueError if anything is different, naming it."""
    if different:
        words = [f"{name} was {before!r}, is {now!r}" for name, (before, now) in different.items()]
        raise ValueError(f"{why}: {'; '.join(words)}. Go back to that, or name another --out_dir")


def note_launch(config, launch, processes):
    """Add a line to RUN/launches.jsonl; return what the last one had otherwise, "name a -> b"."""
    commit, cpu = None, platform.machine()
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                             cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    if os.path.exists("/proc/cpuinfo"):
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or cpu
    packages = ("torch", "numpy", "safetensors", "tiktoken", "tqdm")
    decides = asdict(launch) | {name: importlib.metadata.version(name) for name in packages} | {
        "python": platform.python_version(), "git_commit": commit, "cpu": cpu,
        "gpu": (torch.cuda.get_device_name(processes.device)
                if processes.device.type == "cuda" else None), "cuda": torch.version.cuda,
        "processes": processes.count, "threads": torch.get_num_threads()}
    try:
        before = launches(Path(config.out_dir))[-1]
    except (OSError, ValueError):
        before = {}  # this is the first
    same_bits = {"check_data"} | ({"processes"} if config.exact_sums else set())
    changed = changes(before, decides, same_bits)
    with open(Path(config.out_dir) / "launches.jsonl", "a") as file:
        print(json.dumps({"started": datetime.now().astimezone().isoformat(timespec="seconds"),
                          "command": [sys.executable, *sys.argv], "host": platform.node(),
                          **decides}), file=file)
    return changed


def rows_of(step, config):
    first = step * config.batch_size
    return f"rows {first:,} to {first + config.batch_size - 1:,}"


METRICS = {"step": COUNT, "tokens": COUNT, "loss": NUMBER, "learning_rate": NUMBER,
           "grad_norm": NUMBER, "loss_scale": NUMBER, "seconds": NUMBER,
           "batch_sha256": "[0-9a-f]{64}", "digest": "[0-9a-f]{64}"}


class Log:
    """The CSV files, log.txt and the printed lines; the first process alone writes.

    A step's loss and norm are noted while they are still on the device. Only `flush` waits for
    them, every log_every steps and before anything is saved, so that a GPU rarely has to wait.
    """

    def __init__(self, config, start, tokens_per_step, intervention, processes, digest):
        self.config, self.processes, self.digest = config, processes, digest
        self.tokens_per_step, self.tables = tokens_per_step, {}
        self.pending, self.recent = [], deque(maxlen=128)  # steps not yet written, last losses
        if processes.rank == 0:
            self.text = open(Path(config.out_dir) / "log.txt", "a", buffering=1)
            metrics = self.table("metrics", METRICS, start)
            losses = [float(row["loss"]) for row in metrics.rows]
            self.recent.extend(filter(math.isfinite, losses))  # a float16 overflow's may be nan
            if intervention.intervention:
                self.table("interventions", {"step": COUNT, "row": COUNT}, start)
        self.restart_clock()

    def table(self, name, columns, stop):
        """Return the table RUN/NAME.csv without the rows of step `stop` and later."""
        self.tables[name] = Table(Path(self.config.out_dir) / f"{name}.csv", columns,
                                  lambda row: int(row["step"]) < stop)
        return self.tables[name]

    def write(self, name, *cells):
        if self.tables:
            self.tables[name].append(cells)

    def say(self, line):
        if self.tables:
            print(line, flush=True)
            print(line, file=self.text)

    def restart_clock(self):
        self.began = time.perf_counter()

    def note(self, step, loss, norm, rate, scale, changed, digests):
        """Note a step; loss and norm are tensors, `changed` and `digests` are Batches.read's."""
        self.pending.append((step, loss, norm, rate, scale, changed, digests))

    def flush(self):
        """Write the noted steps; return the last's (step, loss, rate, norm, mean seconds) or None.

        Raises FloatingPointError at the first whose loss or gradient is not finite, if it is not an
        overflow that a smaller loss scale answers. Nothing is saved after it.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return None
        losses = self.processes.mean(torch.stack([loss for _, loss, *_ in pending]))
        norms = torch.stack([norm for _, _, norm, *_ in pending]).tolist()
        read = zip(*self.processes.gather([digests for *_, digests in pending]))
        seconds = (time.perf_counter() - self.began) / len(pending)
        self.restart_clock()
        for (step, _, _, rate, scale, rows, _), loss, norm, digests in zip(
                pending, losses, norms, read):
            line = dict(zip(METRICS, (step, step * self.tokens_per_step, loss, rate, norm,
                                      f"{scale:.0f}", f"{seconds:.4f}", batch_sha256(digests))))
            self.digest = link(self.digest, line)
            self.write("metrics", *line.values(), self.digest)
            for row in rows:
                self.write("interventions", step, row)
            if scale == 1 and not math.isfinite(loss + norm):
                raise FloatingPointError(
                    f"step {step} ({rows_of(step, self.config)}): loss {loss}, gradient norm "
                    f"{norm} at loss scale 1. Nothing was saved after it, and `python "
                    "batch_viewer.py view` shows the rows. Branch from an earlier checkpoint with "
                    "a lower rate, or from float16 with --dtype=bfloat16")
            self.watch(step, loss)
        return step, loss, rate, norm, seconds

    def watch(self, step, loss):
        """Say when a loss is 6 standard deviations above the last 128's mean; changes nothing."""
        if len(self.recent) == self.recent.maxlen:
            mean, deviation = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > mean + 6 * deviation:
                self.say(f"spike at step {step} ({rows_of(step, self.config)}): loss {loss:.4f}, "
                         f"{(loss - mean) / deviation:.1f} standard deviations above {mean:.4f}, "
                         "the mean of the 128 steps before")
        if math.isfinite(loss):  # else it is a float16 overflow
            self.recent.append(loss)

    def report(self, step, loss, rate, norm, seconds, peak):
        """Say where the run is: one line, fixed columns. peak: all processes', in tokens/s."""
        speed = self.tokens_per_step / seconds
        left = timedelta(seconds=round(seconds * (self.config.steps - step - 1)))
        count = f"{speed / 1e6:.2f}M" if speed >= 1e6 else f"{speed / 1e3:.1f}k"
        self.say(f"step {step:6}/{self.config.steps} | loss {loss:.4f} | lr {rate:.2e} "
                 f"| norm {norm:.2f} | {seconds:.2f} s | {count} tok/s "
                 f"| mfu {'-' if math.isnan(peak) else f'{speed / peak:.1%}'} | {left} left")


# ---------------------------------------------------------------------------- the run


def save(training, step, scheduled, log):
    """Write checkpoint `step`, once every step before it is known to be finite and on the disk."""
    config = training.config
    log.flush()  # raises if one of them was not finite
    if log.processes.any(not training.is_finite()):
        raise FloatingPointError(f"step {step - 1}: the update left weights or moments that are "
                                 f"not finite; step{step} was not saved. Branch from an earlier "
                                 "checkpoint with a lower rate")
    # After a power failure the lines of all steps before a saved checkpoint must be there.
    for table in log.tables.values():
        os.fsync(table.file.fileno())
    checkpoints.save(config.out_dir, step, training.model, training.optimizer, {
        "tokens": step * log.tokens_per_step, "updates": training.updates,
        "scaler": dict(training.scaler.state)
    }, config.tokenizer, scheduled, config.async_save, config.state_every, log.digest)
    log.restart_clock()


def train(model_config, config, intervention, launch, processes, interrupt):
    """Take the steps that the run folder does not have yet; leave there what comes of them."""
    # Data, run folder, checkpoint to begin from: a mistake ends here, before any computing.
    batches = Batches(model_config, config, launch, processes)
    order = batches.data
    tokenizer = processes.together(lambda: load_tokenizer(config.tokenizer))
    settings = processes.together(
        lambda: identity(model_config, config, intervention, launch, order))
    processes.agree({name: value for name, value in settings.items() if name not in PATHS})
    seen = order
    if intervention.intervention:
        seen = IntervenedData(order, tokenizer, intervention)
    source, start, changed = claim(settings, config, launch, processes)

    # Model, optimizer, and what the checkpoint has of them.
    training = Training(model_config, config, launch, processes)
    first = processes.together(lambda: load_start(training, source, start))
    tokens_per_step = config.batch_size * model_config.seq_length
    peak = processes.count * peak_flops(processes.device) / flops_per_token(model_config)
    log = Log(config, start, tokens_per_step, intervention, processes,
              checkpoints.chain_of(source)["digest"] if source else checkpoints.FIRST_DIGEST)
    log.say(f"{sum(p.numel() for p in training.model.parameters()):,} parameters, "
            f"{tokens_per_step:,} tokens a step, {config.steps:,} steps, {processes.count} "
            f"process(es) on {processes.device.type} in {str(training.dtype)[6:]}, "
            f"{config.batch_size // (launch.micro_batch_size * processes.count)} micro-batch(es) "
            f"of {launch.micro_batch_size}, peak {peak:,.0f} tokens/s"
            + (f"; going on from step {start:,}" if source else ""))
    for line in order.describe() if processes.rank == 0 else ():  # it reads 1000 documents
        log.say(line)
    if source and changed:
        log.say(f"bits can differ from step {start:,} on: since the last launch "
                f"{', '.join(changed)}")
    schedule = set(checkpoints.checkpoint_steps(config.steps, config.checkpoint_every))
    if source is None:
        save(training, 0, True, log)
    interrupt.listen()
    if processes.count > 1:
        rehearse(training, launch.micro_batch_size, model_config.seq_length)
    if first < start:
        rebuild_moments(training, batches, first, source, start, log, interrupt)
    batches.data = seen  # what was replayed came as the parent saw it
    end, stop = min(config.steps, config.stop_at or config.steps), False
    if start < end:
        batch, changed, digests = batches.read(start)
    log.restart_clock()
    for step in range(start, end):
        last = step + 1 == end
        # ----------------------------------------------------------------- one update
        rate = learning_rate_at(training.updates, config)
        loss = training.gradients(batch)
        norm = training.clip()
        log.note(step, loss, norm, rate, training.scaler.scale, changed, digests)
        if not last:  # read the next batch while a GPU is still computing this one
            batch, changed, digests = batches.read(step + 1)
        training.update(rate, norm)
        # ----------------------------------------------------------------- what is left of it
        stop = processes.any(interrupt.signal)
        if step % config.log_every == 0 or last or stop:
            log.report(*log.flush(), peak)
        if step + 1 in schedule or last or stop:
            save(training, step + 1, step + 1 in schedule, log)
        if stop:
            break
    checkpoints.finish_writing()
    if "interventions" in log.tables:
        rows = log.tables["interventions"].path.read_bytes().count(b"\n") - 1
        log.say(f"the intervention changed {rows:,} rows, see interventions.csv")
    if stop:
        log.say(f"interrupted: saved step{step + 1}; the same command goes on from there")
        interrupt.exit()
    log.say(f"done: step {max(start, end):,} of {config.steps:,}, "
            f"{len(checkpoints.saved_steps(config.out_dir))} checkpoints in {config.out_dir}")


SCHEMAS = ModelConfig, TrainConfig, InterventionConfig, LaunchConfig, PlanConfig, ProofConfig


def main(model_config, config, intervention, launch, options, proof=None):
    if intervention.intervention and intervention.intervention_from >= config.steps:
        fail(f"intervention_from = {intervention.intervention_from:,}, but the last step is "
             f"{config.steps - 1:,}")
    if options.plan:
        schedule = checkpoints.checkpoint_steps(config.steps, config.checkpoint_every)
        return plan(model_config, config, launch, options, len(schedule))
    if config.out_dir is None:
        fail("missing: --out_dir, the run folder (--help explains every setting)")
    check(config, "a name", bool, "data", "out_dir", "branch_from")  # --data=$UNSET
    if config.exact_sums and (launch.sharding == "fsdp" or launch.threads is None):
        fail("exact_sums = True: expected --sharding=ddp and --threads=N, since the bits of a "
             "matmul depend on the number of threads")
    processes = Processes(launch.device, threads=launch.threads)
    given = asdict(model_config) | asdict(config) | asdict(intervention) | asdict(launch)
    processes.agree(given | {name: given[name] is not None for name in PATHS})
    processes.together(lambda: compute_dtype(config.dtype, processes.device))  # or refuse it
    if proof:
        processes.together(lambda: begin_again(config.out_dir, proof), first_alone=True)
    if launch.check_data:  # once a node
        processes.together(lambda: os.environ.get("LOCAL_RANK", "0") == "0"
                           and check_whole(config.data))
    if launch.deterministic:  # or raise where an operation cannot be
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only a debugging aid
    interrupt = Interrupt()
    train(model_config, config, intervention, launch, processes, interrupt)
    if config.twin:
        # The first run's blocks lie in cycles of references (a replaced forward refers to its
        # block): without this their weights could still be in memory beside the twin's.
        gc.collect()
        control = replace(config, out_dir=f"{config.out_dir.rstrip('/')}_twin", twin=False)
        train(model_config, control, InterventionConfig(), launch, processes, interrupt)
    if proof and processes.rank == 0:
        prove(proof, Path(config.out_dir))


if __name__ == "__main__":
    try:
        arguments, proof = run(repeat_command, sys.argv[1:], SCHEMAS[:4])
        *settings, asked = parse(arguments, *SCHEMAS)
        if (asked.replay or asked.restore) and not proof:
            fail("replay and restore are given on the command line, not in a config file")
        run(main, *settings, proof)
    finally:
        run(checkpoints.finish_writing)
        leave_processes()
