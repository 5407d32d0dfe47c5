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

    config.json        every setting that decides what is computed, and hashes of the data
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
from config import Table, check, fail, file_size, note, parse, read_json, run, write_json
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
    # Of the matmuls: float32, bfloat16 or float16. For float16 a CPU computes in float32. For
    # bfloat16, the 1B's, it needs AMX; without, give --dtype=float32.
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
        micro_batches = config.batch_size // launch.micro_batch_size
        self.sums = (ExactSums(self.model.parameters(), micro_batches, processes)
                     if config.exact_sums else None)
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


# ---------------------------------------------------------------------------- what a run reads


class Batches:
    """This process's micro-batches of every step of a run; all processes make one together.

    order: the run's OrderedData; data: that, or an IntervenedData of it.
    """

    def __init__(self, model_config, config, intervention, launch, processes):
        self.config, self.model_config, self.intervention = config, model_config, intervention
        self.share = dict(batch_size=config.batch_size, rank=processes.rank,
                          world_size=processes.count, micro_batch_size=launch.micro_batch_size)
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of a node, which builds the order alone
        processes.together(lambda: first and self.open())
        processes.together(self.open)

    def open(self):
        """Open the order and read a step, so that a mistake shows before anything is computed."""
        config, wanted = self.config, self.config.steps * self.config.batch_size
        tokenizer = load_tokenizer(config.tokenizer)
        seed = config.seed if config.data_seed is None else config.data_seed
        self.data = self.order = OrderedData(config.data, self.model_config.seq_length,
                                             samples_needed(config.steps, config.batch_size), seed)
        if wanted > len(self.order):
            raise ValueError(f"{config.data} holds {len(self.order):,} rows, too few for "
                             f"{config.steps:,} batches of {config.batch_size:,}")
        self.read(0)
        if self.intervention.intervention:
            self.data = IntervenedData(self.order, tokenizer, self.intervention)

    def read(self, step):
        """Return micro-batches (A, B, T + 1) int64 on the host; changed rows and row digests."""
        batch, vocab_size = self.data.batch(step, **self.share), self.model_config.vocab_size
        if batch.max() >= vocab_size:
            raise ValueError(f"{self.config.data}: token {batch.max()} in step {step}, but "
                             f"vocab_size is {vocab_size}")
        return torch.from_numpy(batch), (getattr(self.data, "changed", []), row_digests(batch))


# ---------------------------------------------------------------------------- is it the same run?

# What may lie elsewhere on another node, if it holds the same there.
PATHS = ("data", "tokenizer", "planted")
# What may differ when a run goes on: it does not decide what is computed.
MAY_CHANGE = {*PATHS, "out_dir", "log_every", "async_save", "state_every", "stop_at", "twin"}
# What a branch shares with its parent: model, order of the data, schedule. The highest rate may
# differ, since a run that overflows is advised to branch with a lower one.
SHARED = {"n_layers", "d_model", "n_heads", "vocab_size", "seq_length", "gelu", "steps",
          "batch_size", "warmup", "min_lr_ratio", "data_tokens", "data_sha256", "order_sha256"}


def identity(model_config, config, intervention, launch, order):
    """Return what decides a run's numbers: every setting, and what its files hold."""
    settings = asdict(model_config) | asdict(config) | asdict(intervention) | {
        "branch_from": config.branch_from and str(Path(config.branch_from)),  # without a last slash
        "data_tokens": order.tokens.n_tokens, "data_sha256": fingerprint(order.tokens.paths),
        "order_sha256": None if order.preshuffled else fingerprint(order.paths),
        "planted_sha256": intervention.plan_sha256()}
    if config.exact_sums:  # then these alone decide how its sums round
        settings |= {name: getattr(launch, name)
                     for name in ("micro_batch_size", "threads", "compile")}
    return settings


def surroundings(launch, processes):
    """Return what else may change a run's bits: how it is launched, versions, hardware."""
    commit, cpu = None, platform.machine()
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                             cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    if os.path.exists("/proc/cpuinfo"):
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or cpu
    gpu = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else None
    packages = ("torch", "numpy", "safetensors", "tiktoken", "tqdm")
    return asdict(launch) | {name: importlib.metadata.version(name) for name in packages} | {
        "python": platform.python_version(), "git_commit": commit, "cpu": cpu, "gpu": gpu,
        "cuda": torch.version.cuda, "processes": processes.count,
        "threads": torch.get_num_threads()}


def find_start(config):
    """Return (folder, step) of the checkpoint to begin from, (None, 0) for the initialisation."""
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
    name = re.fullmatch(r"step(0|[1-9]\d*)", source.name)
    if not name or not checkpoints.is_whole(source) or int(name[1]) >= config.steps:
        raise ValueError(f"branch_from = {source}, expected a whole checkpoint RUN/stepN of a step "
                         f"before {config.steps:,} (python verify.py verify says more)")
    step = int(name[1])
    if step and not (source / "optimizer").exists() and not 1 <= config.warm_moments <= step:
        raise ValueError(f"{source} holds weights only and warm_moments = {config.warm_moments}: "
                         f"expected --warm_moments=K (--help), K from 1 to {step}")
    return source, step


def claim(settings, here, config):
    """Lock the run folder and write what explains the run; only the first process does.

    settings: its identity, which has to be that of the run that is there, or of the parent in what
    they share; here: its surroundings, which may be others than at the last launch. Returns
    find_start's folder and step, and words for what is other.
    """
    run, known = Path(config.out_dir), None
    if not run.exists():
        find_start(config)  # a mistake in --branch_from leaves no folder
    checkpoints.lock(run)
    for path in filter(os.path.lexists, (run / "launches.jsonl", run / "log.txt")):
        file_size(path)  # refuses a pipe
    source, start = find_start(config)
    parent = source and source.parent / "config.json"
    if (run / "config.json").exists() or checkpoints.step_folders(run):
        known, but = run / "config.json", MAY_CHANGE
    elif source and (parent.exists() or (source / "training.json").exists()):  # not published
        known, but = parent, settings.keys() - SHARED
    if known and (different := differences(read_json(known), settings, but)):
        raise ValueError(f"{known} says otherwise: {'; '.join(different)}. Go back to that, or "
                         "begin a run of its own in another --out_dir")
    if not (run / "config.json").exists():
        write_json(run / "config.json", settings)
    try:
        last = launches(run)[-1]
    except (OSError, ValueError):
        last = {}  # this is the first launch
    with open(run / "launches.jsonl", "a") as file:
        file.write("\n")  # the last line may be torn
        print(json.dumps({"started": datetime.now().astimezone().isoformat(timespec="seconds"),
                          "command": [sys.executable, *sys.argv], "host": platform.node(),
                          **here}), file=file)
    same_bits = {"check_data"} | ({"processes"} if config.exact_sums else set())
    return source, start, differences(last, here, same_bits)


def load_start(training, source, start):
    """Fill in what `find_start` found: weights, moments, loss scale, number of updates.

    Returns whether there are no moments where there should be (see rebuild_moments). A published
    checkpoint has no training.json: no update was skipped, as far as is known.
    """
    if source is None:
        training.model.init_weights(training.config.seed, checkpoints.fill)
        return False
    saved = checkpoints.load_training(source.parent, start, training.model, training.optimizer)
    notes = saved or checkpoints.read_training(source, start)
    training.scaler.state |= notes.get("scaler", {})
    training.updates = notes.get("updates", start)
    return start > 0 and not saved


def rebuild_moments(training, batches, source, start, log):
    """Rebuild Adam's moments for checkpoint `start` from the `warm_moments` batches before it.

    They are replayed as the parent saw them, at rate 0, which moves nothing but the moments. Those
    are sums whose weights come to 1 - beta**updates: what they are now is scaled up to that total.
    """
    config, updates = training.config, training.updates
    for step in range(start - config.warm_moments, start):
        training.gradients(torch.from_numpy(batches.order.batch(step, **batches.share)))
        training.update(rate=0.0, norm=training.clip())
        if log.processes.any(log.processes.signal):
            log.say("interrupted: the same command begins the replay again")
            log.processes.exit()
    if not training.optimizer.state:
        raise FloatingPointError("the loss scale fell at every replayed batch: "
                                 "give more of them, --warm_moments=K")
    for state in training.optimizer.state.values():
        replayed = float(state["step"])
        for beta, name in ((config.beta1, "exp_avg"), (config.beta2, "exp_avg_sq")):
            state[name].mul_((1 - beta**updates) / (1 - beta**replayed))
        state["step"].fill_(updates)
    training.updates = updates
    # The loss scale is again the parent's; of a published checkpoint it is not known.
    training.scaler.state |= checkpoints.read_training(source, start).get("scaler", {})


# ---------------------------------------------------------------------------- what a run leaves

METRICS = ("step", "tokens", "loss", "learning_rate", "grad_norm", "loss_scale", "seconds",
           "batch_sha256", "digest")


class Log:
    """The CSV files, log.txt and the printed lines; the first process alone writes.

    A step's loss and norm are noted while they are still on the device. Only `flush` waits for
    them, every log_every steps and before anything is saved, so that a GPU rarely has to wait.
    peak: what all processes could do at most, in tokens/s; digest: that of the step before.
    """

    def __init__(self, config, intervention, start, tokens_per_step, peak, digest, processes):
        self.config, self.processes, self.digest = config, processes, digest
        self.tokens_per_step, self.peak, self.tables = tokens_per_step, peak, {}
        self.pending, self.recent = [], deque(maxlen=128)  # steps not yet written, last losses
        self.began = time.perf_counter()
        if processes.rank > 0:
            return
        self.text = open(Path(config.out_dir) / "log.txt", "a", buffering=1)
        columns = {"metrics": METRICS}
        if intervention.intervention:
            columns["interventions"] = ("step", "row")
        for name in columns:  # without what a killed launch wrote of later steps
            self.tables[name] = Table(Path(config.out_dir) / f"{name}.csv", columns[name],
                                      lambda row: int(row["step"]) < start)
        losses = [float(row["loss"]) for row in self.tables["metrics"].rows]
        self.recent.extend(filter(math.isfinite, losses))  # a float16 overflow's may be nan

    def say(self, line):
        if self.tables:
            print(line, flush=True)
            print(line, file=self.text)

    def note(self, step, loss, norm, rate, scale, seen):
        """Note a step; loss and norm are tensors, `seen` is Batches.read's."""
        self.pending.append((step, loss, norm, rate, scale, seen))

    def flush(self):
        """Write the noted steps, if any, and say where the run is: one line, fixed columns.

        Raises FloatingPointError at the first whose loss or gradient is not finite, if it is not an
        overflow that a smaller loss scale answers. Nothing is saved after it.
        """
        if not self.pending:
            return
        steps, losses, norms, rates, scales, seen = zip(*self.pending)
        losses, norms = self.processes.mean(torch.stack(losses)), torch.stack(norms).tolist()
        of_processes = self.processes.gather([digests for _, digests in seen])
        seconds = (time.perf_counter() - self.began) / len(steps)
        self.pending = []
        for step, loss, norm, rate, scale, (changed, _), *digests in zip(
                steps, losses, norms, rates, scales, seen, *of_processes):
            row = dict(zip(METRICS, (step, step * self.tokens_per_step, loss, rate, norm,
                                     f"{scale:.0f}", f"{seconds:.4f}", batch_sha256(digests))))
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
                    "saved after it. Branch from an earlier checkpoint with a lower rate, or from "
                    "float16 with --dtype=bfloat16")
            self.watch(where, loss)
        speed, steps_left = self.tokens_per_step / seconds, self.config.steps - step - 1
        mfu = "-" if math.isnan(self.peak) else f"{speed / self.peak:.1%}"
        self.say(f"step {step:6}/{self.config.steps} | loss {loss:.4f} | lr {rate:.2e} "
                 f"| norm {norm:.2f} | {seconds:.2f} s | {speed / 1e3:,.1f}k tok/s "
                 f"| mfu {mfu} | {timedelta(seconds=round(seconds * steps_left))} left")
        self.began = time.perf_counter()

    def watch(self, where, loss):
        """Say when a loss is 6 standard deviations above the last 128's mean; changes nothing."""
        if len(self.recent) == self.recent.maxlen:
            mean, deviation = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > mean + 6 * deviation:
                self.say(f"spike at {where}: loss {loss:.4f}, {(loss - mean) / deviation:.1f} "
                         f"standard deviations above {mean:.4f}, the mean of the 128 steps before")
        if math.isfinite(loss):  # else it is a float16 overflow
            self.recent.append(loss)


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
    log.began = time.perf_counter()


# ---------------------------------------------------------------------------- the run


def train(model_config, config, intervention, launch, processes):
    """Take the steps that the run folder does not have yet; leave there what comes of them."""
    # Data, run folder, checkpoint to begin from: a mistake ends here, before any computing.
    batches = Batches(model_config, config, intervention, launch, processes)
    settings = processes.together(
        lambda: identity(model_config, config, intervention, launch, batches.order))
    processes.agree({name: value for name, value in (settings | asdict(launch)).items()
                     if name not in PATHS})
    claimed = processes.together(
        lambda: claim(settings, surroundings(launch, processes), config), first_alone=True)
    source, start, changed = processes.gather(claimed)[0]

    # Model, optimizer, and what the checkpoint has of them.
    training = Training(model_config, config, launch, processes)
    without_moments = processes.together(lambda: load_start(training, source, start))
    tokens_per_step = config.batch_size * model_config.seq_length
    peak = processes.count * peak_flops(processes.device) / flops_per_token(model_config)
    digest = checkpoints.read_manifest(source)[1] if source else checkpoints.FIRST_DIGEST
    log = processes.together(
        lambda: Log(config, intervention, start, tokens_per_step, peak, digest, processes))
    log.say(f"{sum(p.numel() for p in training.model.parameters()):,} parameters, "
            f"{tokens_per_step:,} tokens a step, {config.steps:,} steps, {processes.count} "
            f"process(es) on {processes.device.type} in {str(training.dtype)[6:]}, "
            f"{config.batch_size // (launch.micro_batch_size * processes.count)} micro-batch(es) "
            f"of {launch.micro_batch_size}, peak {peak:,.0f} tokens/s"
            + (f"; going on from step {start:,}" if source else ""))
    for line in batches.order.describe() if processes.rank == 0 else ():
        log.say(line)
    if source and changed:
        log.say(f"bits can differ from step {start:,} on: since the last launch "
                + "; ".join(changed))
    if source is None:
        save(training, 0, True, log)
    processes.listen()
    if processes.count > 1:
        rehearse(training, launch.micro_batch_size, model_config.seq_length)
    if without_moments:
        rebuild_moments(training, batches, source, start, log)

    schedule = checkpoints.checkpoint_steps(config.steps, config.checkpoint_every)
    end, stop = min(config.steps, config.stop_at or config.steps), False
    if start < end:
        batch, seen = batches.read(start)
    log.began = time.perf_counter()
    for step in range(start, end):
        rate = learning_rate_at(training.updates, config)
        loss = training.gradients(batch)
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
        processes.exit()
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
    if not config.out_dir:
        fail("missing: --out_dir, the run folder (--help explains every setting)")
    if config.exact_sums and (launch.sharding == "fsdp" or launch.threads is None):
        fail("exact_sums = True: expected --sharding=ddp and --threads=N, since the bits of a "
             "matmul depend on the number of threads")
    # Hashing 600 GB takes longer than the 30 minutes for which processes wait for each other.
    patience = timedelta(days=1) if launch.check_data else None
    processes = Processes(launch.device, patience, launch.threads)

    def prepare():
        compute_dtype(config.dtype, processes.device)  # may refuse it
        if proof and processes.rank == 0:
            begin_again(config.out_dir, proof)
        if launch.check_data and os.environ.get("LOCAL_RANK", "0") == "0":  # once a node
            check_whole(config.data)

    processes.together(prepare)
    if launch.deterministic:  # or raise where an operation cannot be
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only a debugging aid
    train(model_config, config, intervention, launch, processes)
    if config.twin:
        # The first run's blocks lie in cycles of references (a replaced forward refers to its
        # block): without this their weights could still be in memory beside the twin's.
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
