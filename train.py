"""Train a Pythia: one order of data, log-spaced checkpoints, the learning rate of gpt-neox v1.0.

    python train.py configs/mini.py --data=data/demo/train --out_dir=runs/mini
    torchrun --standalone --nproc_per_node=8 train.py configs/pythia_160m.py --data=PREFIX \
        --out_dir=RUN
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        --shutdown-timeout=600 train.py ...     # RUN on a disk that all nodes share
    python train.py configs/mini.py --branch_from=runs/mini/step256 --out_dir=runs/child \
        --intervention=NAME --twin=True
    python train.py configs/pythia_12b.py --plan=True --gpus=64

The same command, given again, goes on where the run stopped, to the same bits as if it had never
stopped. (torchrun kills its processes 30 s after a SIGTERM: where a step and a save take longer,
give it --shutdown-timeout.) Checkpoint N is the weights after N updates; step s is the update that
makes checkpoint s + 1 from the rows s * batch_size to (s + 1) * batch_size - 1.
training/record.py says what else is in the run folder.

Sources: gpt-neox v1.0 megatron/{training,learning_rates}.py.

The loss scale of a float16 run.

Source: DeeperSpeed fp16/loss_scaler.py.

Where a run is computed, never what: processes, their signals, sharding, recomputation.

DDP keeps every weight on every process and averages gradients; FSDP2 (`fully_shard`) keeps 1/n of
weights, gradients and moments on each of n processes and gathers one block at a time. Both see the
same batches and take the same steps, in float32 to 1e-6 (tests/test_parallel.py). At 16 bits they
differ: FSDP rounds the blocks' LayerNorm weights too, as Pythia's own fp16 weights were, where
autocast leaves them in float32. What is saved has one form.

What a run leaves behind besides its checkpoints, so that its folder explains itself.

    config.json      every setting that decides what is computed; of a branch also what differs from
                     its parent
    launches.jsonl   one line a launch: command, git commit, package versions, hardware
    log.txt          what was printed
    metrics.csv      one line a step
    interventions.csv  the rows that an intervention changed
    heldout.csv      the loss on the held-out batches, of checkpoint `step`

What a run begins from: its data and its folder, the initialisation or a checkpoint.
"""

import csv
import functools
import gc
import hashlib
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
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import checkpoints
from checkpoints import fill, is_shard, lock, saved_steps
from config import fail, parse, Processes, read_json, replacing, run
from data import OrderedData, samples_needed, TokenFile
from interventions import IntervenedData, InterventionConfig
from model import ModelConfig, Pythia
from plan import flops_per_token, peak_flops, plan, PlanConfig
from tokenizer import load_tokenizer


# ------------------------------------------------------------ train.py


@dataclass(frozen=True)
class TrainConfig:
    data: str  # PREFIX of a token file (python prepare.py tokenize)
    learning_rate: float  # the highest, reached after the warmup
    out_dir: str | None = None  # run folder; a run that is there already goes on
    min_lr_ratio: float = 0.1  # floor of the learning rate, as a fraction of learning_rate
    warmup: float = 0.01  # fraction of steps
    steps: int = 143000
    batch_size: int = 1024  # sequences per optimizer step, all processes together
    weight_decay: float = 0.1  # matrices and embeddings; not biases, not LayerNorms
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # of the gradient of all parameters
    seed: int = 1234  # of the initialisation and of the data order
    dtype: str = "float16"  # on a GPU: float32, bfloat16 or float16; a CPU computes in float32
    checkpoint_every: int = 1000  # besides steps 0, 1, 2, 4, ..., 512
    state_every: int | None = None  # keep Adam's moments (2/3 of it) only here and in the newest
    tokenizer: str = "20B_tokenizer.json"  # goes into every checkpoint
    log_every: int = 10  # steps between printed lines; metrics.csv has every step
    async_save: bool = False  # train on while a checkpoint is written, from a copy in host memory
    stop_at: int | None = None  # save and stop after this step; without it the command goes on
    heldout: str | None = None  # PREFIX of a token file, for the loss every heldout_every steps
    heldout_every: int = 1000
    heldout_batches: int = 1  # of batch_size sequences
    branch_from: str | None = None  # RUN/stepN: begin with its weights, moments, place in the order
    warm_moments: int = 0  # if it has weights only: Adam's moments from the K batches before it
    twin: bool = False  # then train the branch without its intervention too, in OUT_DIR_twin

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype = {self.dtype!r}, expected float32, bfloat16 or float16")
        for names, holds, expected in (
                ("steps batch_size checkpoint_every state_every log_every stop_at heldout_every "
                 "heldout_batches", lambda value: value >= 1, "at least 1"),
                ("weight_decay warm_moments", lambda value: value >= 0, "at least 0"),
                ("learning_rate eps clip_norm", lambda value: value > 0, "more than 0"),
                ("min_lr_ratio", lambda value: 0 <= value <= 1, "0 to 1"),
                ("warmup beta1 beta2", lambda value: 0 <= value < 1, "at least 0, less than 1"),
                ("seed", lambda value: 0 <= value < 2**32, f"0 to {2**32 - 1:,}")):
            for name in names.split():
                if (value := getattr(self, name)) is not None and not holds(value):
                    raise ValueError(f"{name} = {value}, expected {expected}")
        if (self.stop_at or 0) > self.steps:
            raise ValueError(f"stop_at = {self.stop_at:,}, but steps = {self.steps:,}")
        if self.twin and not self.branch_from:
            raise ValueError("twin = True without branch_from: only a branch has a control twin")


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


def clip(model, limit, scale):
    """Undo the loss scale, clip the whole gradient to a norm of `limit`; return the norm before.

    Nothing here waits for the device: the norm is a tensor on it, the same on every process.
    """
    if scale != 1:
        torch._foreach_div_([p.grad for p in model.parameters()], scale)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if is_shard(norm) else norm


def loss_on(wrapped, device, dtype, rows):
    """Return the mean loss of rows (B, T + 1) on the host, a tensor on the device.

    What an intervention padded has a negative id: no input, no target. dtype: of the matmuls.
    """
    if device.type == "cuda":  # pinned, so that the host does not wait for the copy
        rows = rows.pin_memory().to(device, non_blocking=True)
    # Every weight is cast once a pass: a cache would only cost memory.
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        return wrapped(rows[:, :-1].clamp(min=0), rows[:, 1:])


@torch.no_grad()
def mean_loss(wrapped, loss_of, batches, processes):
    """Return the mean loss over all processes' rows in `batches`, which are of one size."""
    loss = torch.stack([loss_of(rows) for rows in batches]).mean()
    # Without a backward pass FSDP leaves its root gathered, and model.parameters() would not be the
    # optimizer's.
    if hasattr(wrapped, "reshard"):
        wrapped.reshard()
    return processes.mean(loss)


def take_step(wrapped, optimizer, scaler, loss_of, limit, batch, rate, meanwhile=lambda: None):
    """Update the weights once. Return loss and gradient norm, whether it was done, and meanwhile().

    batch: (micro-batches, sequences, T + 1) int64 on the host; limit: of the gradient's norm. Loss
    and norm stay on the device; the host calls meanwhile() before it ever waits for them.
    """
    loss = 0.0
    for i, rows in enumerate(batch):
        communicate(wrapped, last=i == len(batch) - 1)
        micro_loss = loss_of(rows) / len(batch)
        (micro_loss * scaler.scale).backward()
        loss += micro_loss.detach()
    norm = clip(wrapped, limit, scaler.scale)
    aside = meanwhile()
    # In float16 a skipped update does not advance the rate, so the host must know and waits here.
    # It asks once a step, as DeepSpeed does.
    finite = not scaler.enabled or math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    forget_gradients(wrapped, optimizer)
    return loss, norm, finite, aside


def train(model_config, config, intervention, launch, processes, interrupt):
    """Take the steps that the run folder does not have yet; leave there what comes of them."""
    read, heldout, source, start = claim(model_config, config, intervention, launch, processes)
    dtype = compute_dtype(config.dtype, processes.device)
    with torch.device("meta"):
        model = Pythia(model_config)
    wrapped = parallelize(model, launch, dtype, processes)
    loss_of = functools.partial(loss_on, wrapped, processes.device, dtype)
    optimizer = make_optimizer(model, config)
    scaler = LossScaler(enabled=dtype == torch.float16)
    first, updates = processes.together(
        lambda: go_on(source, start, model, optimizer, scaler, config))

    tokens_per_step = config.batch_size * model_config.seq_length
    micro_batches = config.batch_size // (launch.micro_batch_size * processes.count)
    peak = peak_flops(processes.device) if processes.rank == 0 else math.nan
    schedule = set(checkpoints.checkpoint_steps(config.steps, config.checkpoint_every))
    log = Log(config, start, tokens_per_step, scaler.enabled, intervention, processes)
    log.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokens_per_step:,} "
            f"tokens a step, {config.steps:,} steps, {processes.count} process(es) on "
            f"{processes.device.type}, {micro_batches} micro-batch(es) of "
            f"{launch.micro_batch_size}, peak "
            + ("-" if math.isnan(peak) else f"{peak / 1e12:.2f} TFLOP/s")
            + (f"; going on from step {start:,}" if source else ""))
    if config.warm_moments and source == config.branch_from and first == start:
        log.say(f"warm_moments = {config.warm_moments} is not used: "
                f"{source or 'the initialisation'} needs none")
    saving = None

    def save(step):
        nonlocal saving
        log.flush()  # raises if one of the steps before was not finite
        log.sync()
        if saving:
            saving.result()
        progress = {"tokens": step * tokens_per_step, "updates": updates,
                    "scaler": dict(scaler.state)}
        saving = checkpoints.save(config.out_dir, step, model, optimizer, progress,
                                  config.tokenizer, step in schedule, config.async_save,
                                  config.state_every)
        log.restart_clock()

    if source is None:
        save(0)
    interrupt.listen()
    if processes.count > 1:
        rehearse(wrapped, optimizer, loss_of, launch.micro_batch_size, model_config.seq_length)
    model.train()
    take = functools.partial(take_step, wrapped, optimizer, scaler, loss_of, config.clip_norm)
    for step in range(first, start):  # at rate 0, from batches as the parent saw them
        _, _, done, _ = take(read(step)[0], rate=0.0)
        scaler.update(overflow=not done)
        if processes.any(interrupt.signal):
            log.say("interrupted: the same command begins the replay again")
            interrupt.exit()
    if first < start:
        rescale_moments(optimizer, updates)
        # What the parent knew of its loss scale holds again; a published checkpoint knows nothing.
        scaler.state |= checkpoints.read_training(Path(source), start).get("scaler", {})

    end, stop = min(config.steps, config.stop_at or config.steps), False
    if start >= end:
        log.say(f"step {start:,} is there already: nothing is left to train up to step {end:,}")
    batches = map(read, range(start, end))
    upcoming = next(batches, None)
    log.restart_clock()
    for step in range(start, end):
        (batch, changed), rate, scale = upcoming, learning_rate_at(updates, config), scaler.scale
        loss, norm, done, upcoming = take(batch, rate, lambda: next(batches, None))
        log.note(step, loss, norm, rate, scale, changed)
        updates += done
        try:
            scaler.update(overflow=not done)
        except FloatingPointError:
            log.flush()  # the steps that tell why
            raise
        last, stop = step + 1 == end, processes.any(interrupt.signal)
        if step % config.log_every == 0 or last or stop:
            log.report(*log.flush(), flops_per_token(model_config), peak)
        if saving and saving.done():
            saving.result()  # raises what went wrong, a full disk for instance
        if heldout and ((step + 1) % config.heldout_every == 0 or last):
            log.flush()  # whose clock must not count what follows
            log.heldout(step + 1, mean_loss(wrapped, loss_of, heldout, processes))
        if step + 1 in schedule or last or stop:
            save(step + 1)
        if stop:
            break
    if saving:
        saving.result()  # on the disk, or raises why it is not
    log.close()
    if stop:
        log.say(f"interrupted: saved step{step + 1}; the same command goes on from there")
        interrupt.exit()
    if end < config.steps:
        return log.say(f"stopped at step {max(start, end):,} of {config.steps:,} (--stop_at): "
                       "the same command without it goes on")
    log.say(f"done: {len(checkpoints.saved_steps(config.out_dir))} checkpoints in {config.out_dir}")


def main(model_config, config, intervention, launch, options):
    if intervention.intervention and intervention.intervention_from >= config.steps:
        fail(f"intervention_from = {intervention.intervention_from:,}, but the last step is "
             f"{config.steps - 1:,}")
    if options.plan:
        schedule = checkpoints.checkpoint_steps(config.steps, config.checkpoint_every)
        command = [word for word in sys.argv[1:] if not re.match(  # but what the plan says itself
            "--(plan|gpus|gpu|gpu_memory|mfu|device|sharding|activation_checkpointing|"
            "micro_batch_size)(=|$)", word)] + ["--out_dir=RUN"] * (not config.out_dir)
        return plan(model_config, config, launch, options, len(schedule), command)
    if config.out_dir is None:
        fail("missing: --out_dir, the run folder (--help explains every setting)")
    if empty := [name for name, value in vars(config).items() if value == ""]:  # --data=$UNSET
        fail(f"{', '.join(empty)}: empty (--help explains every setting)")
    processes = Processes(launch.device)
    if launch.deterministic:
        make_deterministic()
    interrupt = Interrupt()
    train(model_config, config, intervention, launch, processes, interrupt)
    if config.twin:
        if processes.any(interrupt.signal):  # it came during the last save
            interrupt.exit()
        # The first run's blocks lie in cycles of references (a wrapped forward refers to its
        # block): their weights could stay beside the twin's.
        gc.collect()
        control = replace(config, out_dir=f"{config.out_dir.rstrip('/')}_twin", twin=False)
        train(model_config, control, InterventionConfig(), launch, processes, interrupt)


# ------------------------------------------------------------ training/scaler.py


class LossScaler:
    """DeepSpeed's dynamic loss scale with Pythia's settings; its memory is `state`, a JSON object.

    Not enabled, as for float32 and bfloat16, the scale is 1 and the state rests, for a launch in
    float16. On an overflow the update is skipped and the learning rate does not advance, but the
    data does. The first overflow of two is forgiven (hysteresis, refilled only when the scale
    grows), later ones halve the scale; 1000 iterations without one double it.
    """

    def __init__(self, enabled):
        self.enabled = enabled
        self.state = {"scale": 4096.0, "hysteresis": 2, "iteration": 0, "last_overflow": -1}

    @property
    def scale(self):
        return self.state["scale"] if self.enabled else 1.0

    def update(self, overflow):
        """Note one iteration. Raises FloatingPointError on an overflow at the smallest scale, 1."""
        state = self.state
        if not self.enabled:
            return
        if overflow:
            if state["scale"] == 1.0:
                raise FloatingPointError(
                    "overflow at loss scale 1, the smallest: the run has diverged. Look at the "
                    "loss in metrics.csv; branch from an earlier checkpoint with a lower rate or "
                    "--dtype=bfloat16")
            if state["hysteresis"] == 1:
                state["scale"] = max(state["scale"] / 2, 1.0)
            else:
                state["hysteresis"] -= 1
            state["last_overflow"] = state["iteration"]
        elif (state["iteration"] - state["last_overflow"]) % 1000 == 0:
            state["scale"] *= 2
            state["hysteresis"] = 2
        state["iteration"] += 1


# ------------------------------------------------------------ training/parallel.py


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch computes a run. It may differ at every resume; only rounding changes."""
    device: str = "auto"  # cuda where there is one, else cpu
    micro_batch_size: int = 32  # sequences per forward pass of one process
    sharding: str = "ddp"  # or fsdp: weights, gradients and moments spread over the processes
    activation_checkpointing: bool = False  # keep each block's input only, compute the rest again
    compile: bool = False  # torch.compile each block
    deterministic: bool = False  # equal bits on every rerun on a GPU too (a CPU's are equal anyway)

    def __post_init__(self):
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device = {self.device!r}, expected 'auto', 'cpu' or 'cuda'")
        if self.sharding not in ("ddp", "fsdp"):
            raise ValueError(f"sharding = {self.sharding!r}, expected 'ddp' or 'fsdp'")
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size = {self.micro_batch_size}, expected at least 1")


class Interrupt:
    """From `listen` on, notes a SIGINT or SIGTERM, on which the loop acts between steps.

    A second one, more than two seconds later, ends the process. (torchrun passes on the signal that
    a terminal or Slurm has already sent to every process of the group.)
    """

    signal, noted = 0, 0.0

    def listen(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if not self.signal:
            self.signal, self.noted = number, time.monotonic()
        elif time.monotonic() > self.noted + 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def exit(self):
        """End as the signal would have; another process alone may have got it."""
        sys.exit(128 + (self.signal or signal.SIGTERM))


def parallelize(model, launch, dtype, processes):
    """Return the module that training calls, whose every process takes its part.

    model: a Pythia on the meta device; it gets its memory here, unfilled, on the processes' device.
    """
    for layer in model.layers:
        # The forward is replaced, not the module, so that no wrapper's prefix reaches a parameter's
        # name. Outermost first: FSDP's hooks, then recomputation, then the compiled block.
        if launch.compile:
            layer.forward = torch.compile(layer.forward)
        if launch.activation_checkpointing:  # there is no dropout, hence no random state to keep
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                              preserve_rng_state=False)
    if processes.count > 1 and launch.sharding == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh  # takes a second
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        # Blocks travel in the dtype of their matmuls, half the bytes. The root, embeddings and last
        # norm, stays float32, and with it the residual stream, as under DDP and autocast.
        half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                    cast_forward_inputs=False)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=half)
        fully_shard(model, mesh=mesh)
    model.to_empty(device=processes.device)
    if processes.count > 1 and launch.sharding == "ddp":
        # Every process fills in the same weights, so there is nothing to broadcast.
        return DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
    return model


def communicate(wrapped, last):
    """Let the next backward pass send gradients only if it is its step's last."""
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = last  # what its no_sync() sets
    elif hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP's
        wrapped.set_requires_gradient_sync(last)


def forget_gradients(wrapped, optimizer):
    """Give the gradients' memory back; DDP's are zeroed instead, for they lie in its messages.

    Those stay in any case: set to None, the gradients of all micro-batches before the last would
    lie beside them.
    """
    optimizer.zero_grad(set_to_none=not isinstance(wrapped, DistributedDataParallel))


def rehearse(wrapped, optimizer, loss_of, micro_batch_size, seq_length):
    """Take two passes over rows of zeros and forget their gradients.

    In the first DDP learns in which order gradients come, for the second it lays out its messages
    in that order, and the layout decides how sums round: a run that goes on must not have its first
    pass where one that never stopped had a later one.
    """
    communicate(wrapped, last=True)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)  # the first layout goes before the second comes
        loss_of(torch.zeros(micro_batch_size, seq_length + 1, dtype=torch.int64)).backward()
    forget_gradients(wrapped, optimizer)


def compute_dtype(name, device):
    """Return the dtype of the matmuls: as named on a GPU, float32 on a CPU, slow at any other."""
    return getattr(torch, name) if device.type == "cuda" else torch.float32


def make_deterministic():
    """Let every operation give the same bits on every rerun, or raise where it cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False


# ------------------------------------------------------------ training/record.py


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
                    + ", `python batch_viewer.py view` shows the rows")
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


# ------------------------------------------------------------ training/begin.py


def claim(model_config, config, intervention, launch, processes):
    """Open the data and claim the run folder; a mistake ends here, before anything is computed.

    Return read(step), the rows of this process and those that an intervention changed; the held-out
    micro-batches; folder and step of the checkpoint to begin from.
    """
    share = dict(batch_size=config.batch_size, rank=processes.rank, world_size=processes.count,
                 micro_batch_size=launch.micro_batch_size)
    vocab_size, heldout = model_config.vocab_size, []
    order = data = open_data(model_config, config, processes, config.data, config.steps)
    processes.together(lambda: read_batch(order, 0, vocab_size, share))
    if config.heldout:
        others = open_data(model_config, config, processes, config.heldout, config.heldout_batches,
                           once=True)
        heldout = processes.together(lambda: [
            rows for i in range(config.heldout_batches)
            for rows in read_batch(others, i, vocab_size, share)])

    def claim_alone():
        find_start(config)  # a mistake in --branch_from leaves no folder
        load_tokenizer(config.tokenizer)
        claim_folder(model_config, config, intervention, launch, order, processes)

    processes.together(claim_alone, first_alone=True)
    # Behind the lock, when no other launch can save any more.
    source, start = processes.together(lambda: find_start(config))
    position = torch.tensor(float(start if source else -1))
    if processes.any(position != processes.mean(position)):
        raise ValueError(f"{source or config.out_dir}: the processes see different newest "
                         "checkpoints; launch again once every node sees the same disk")
    if intervention.intervention:
        data = IntervenedData(order, load_tokenizer(config.tokenizer), intervention)

    def read(step):
        rows = data if step >= start else order  # what is replayed comes as the parent saw it
        return read_batch(rows, step, vocab_size, share), getattr(rows, "changed", ())

    return read, heldout, source, start


def open_data(model_config, config, processes, prefix, steps, once=False):
    """Return `steps` batches in order; the first process builds it, the others find it built.

    once: held-out ones, of which none may come again.
    """
    def build():
        num_samples = samples_needed(steps, config.batch_size)
        rows = (TokenFile(prefix).n_tokens - 1) // model_config.seq_length
        if once and num_samples > rows:
            raise ValueError(f"{prefix} holds {rows * 200 // 201 // config.batch_size:,} batches "
                             f"of {config.batch_size:,} rows, heldout_batches = {steps:,}")
        data = OrderedData(prefix, model_config.seq_length, num_samples, config.seed)
        if len(data) < steps * config.batch_size:
            raise ValueError(f"{prefix} holds {len(data):,} rows of {model_config.seq_length + 1} "
                             f"tokens, {steps:,} steps need {steps * config.batch_size:,}")
        return data

    data = processes.together(build, first_alone=True)
    return processes.together(lambda: data or build())


def read_batch(data, step, vocab_size, share):
    """Return this process's rows of a step, (micro-batches, sequences, T + 1) int64 on the host.

    Raises ValueError, naming the file, on a token that the model has not.
    """
    batch = data.batch(step, **share)
    if batch.max() >= vocab_size:
        prefix = getattr(data, "data", data).tokens.prefix  # an intervention has its data within
        raise ValueError(f"{prefix}: token {batch.max()} in step {step}, "
                         f"but vocab_size is {vocab_size}")
    return torch.from_numpy(batch)


def find_start(config):
    """Return (folder, step) of the checkpoint to begin from, (None, 0) for the initialisation."""
    if os.path.lexists(config.out_dir) and not os.path.isdir(config.out_dir):
        raise ValueError(f"out_dir = {config.out_dir} is no folder; name another")
    saved = checkpoints.saved_steps(config.out_dir, state=True)
    if saved:
        return os.path.join(config.out_dir, f"step{saved[-1]}"), saved[-1]
    if not config.branch_from:
        return None, 0
    step = re.fullmatch(r"step(0|[1-9]\d*)", Path(config.branch_from).name)
    if not step or not os.path.isdir(config.branch_from):
        raise ValueError(f"branch_from = {config.branch_from}, expected a folder RUN/stepN")
    if int(step[1]) >= config.steps:
        raise ValueError(f"branch_from = {config.branch_from}, but steps = {config.steps:,}: "
                         "nothing is left to train")
    if not checkpoints.is_whole(Path(config.branch_from)):
        raise ValueError(f"branch_from = {config.branch_from}: a file is missing or cut (python "
                         f"verify.py verify {Path(config.branch_from).parent} says which): "
                         "branch from another step")
    return config.branch_from, int(step[1])


def go_on(source, start, model, optimizer, scaler, config):
    """Fill model, optimizer and scaler from where `find_start` says.

    Return the first step to take and how many updates there were. Where a checkpoint holds weights
    alone, the first step lies before `start`: the batches before it are replayed at rate 0, which
    moves nothing but Adam's moments. What training.json knows, loss scale and number of updates,
    holds then too; a published checkpoint has none.
    """
    if source is None:
        model.init_weights(config.seed, fill)
        return start, 0
    if training := checkpoints.load_training(Path(source).parent, start, model, optimizer):
        scaler.state = training["scaler"]
        return start, training["updates"]
    training = checkpoints.read_training(Path(source), start)
    scaler.state, updates = training.get("scaler", scaler.state), training.get("updates", start)
    first = start - config.warm_moments
    if start > 0 and not 0 <= first < start:
        raise ValueError(f"{source} holds weights only and warm_moments = {config.warm_moments}: "
                         "--warm_moments=K rebuilds Adam's moments from the K batches before it, "
                         f"K from 1 to {start}")
    return max(first, 0), updates


def rescale_moments(optimizer, updates):
    """Let moments of a few replayed batches stand for those of `updates` updates.

    Adam's moments are sums whose weights come to 1 - beta**steps; what the batches before the
    replayed ones weighed goes to those replayed. Raises FloatingPointError if every one of them
    overflowed.
    """
    if not optimizer.state:
        raise FloatingPointError("the loss scale fell at every replayed batch: "
                                 "give more of them, --warm_moments=K")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            replayed = float(state["step"])
            for beta, moment in zip(group["betas"], (state["exp_avg"], state["exp_avg_sq"])):
                moment.mul_((1 - beta**updates) / (1 - beta**replayed))
            state["step"].fill_(updates)


if __name__ == "__main__":
    try:
        run(main, *parse(sys.argv[1:], ModelConfig, TrainConfig, InterventionConfig, LaunchConfig,
                         PlanConfig))
    except FloatingPointError as error:
        fail(str(error))
    finally:
        checkpoints.finish_writing()
        if dist.is_initialized():
            dist.destroy_process_group()
