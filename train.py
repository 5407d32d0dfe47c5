"""Train a Pythia: one fixed order of data, log-spaced checkpoints, the learning rate of gpt-neox v1.0.

    python train.py configs/mini.py --data=data/demo/train --out_dir=runs/mini
    torchrun --standalone --nproc_per_node=8 train.py configs/pythia_160m.py --data=PREFIX --out_dir=RUN
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        --shutdown-timeout=600 train.py ...     # RUN on a disk that all nodes share
    python train.py configs/mini.py --branch_from=runs/mini/step256 --out_dir=runs/child --twin=True \\
        --intervention=NAME
    python train.py configs/pythia_12b.py --plan=True --gpus=64

The same command, given again, goes on where the run stopped, to the same bits as if it had never
stopped. (torchrun kills its processes 30 s after a SIGTERM: where a step and a save take longer, give it
--shutdown-timeout.) Checkpoint N is the weights after N updates; step s is the update that makes
checkpoint s + 1 from the rows s * batch_size to (s + 1) * batch_size - 1.
training/record.py says what else is in the run folder.

Sources: gpt-neox v1.0 megatron/{training,learning_rates}.py, DeeperSpeed fp16/loss_scaler.py.
"""

import functools
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoints
from config import fail, parse, run
from data import OrderedData, samples_needed
from model import ModelConfig, Pythia
from training.parallel import (LaunchConfig, Processes, communicate, compute_dtype, fill, is_shard,
                               make_deterministic, parallelize)
from training.plan import PlanConfig, flops_per_token, peak_flops, plan
from training.record import Log, describe_launch, open_run
from studies.interventions import IntervenedData, InterventionConfig
from tokenizer import load_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    data: str  # PREFIX of a token file (python data.py tokenize)
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
    dtype: str = "float16"  # float32, bfloat16 or float16 on a GPU; a CPU always computes in float32
    checkpoint_every: int = 1000  # besides steps 0, 1, 2, 4, ..., 512
    state_every: int | None = None  # keep Adam's moments (2/3 of a checkpoint) only here and in the newest
    tokenizer: str = "20B_tokenizer.json"  # goes into every checkpoint
    log_every: int = 10  # steps between printed lines; metrics.csv has every step
    async_save: bool = False  # training goes on while a checkpoint is written, from a copy in host memory
    stop_at: int | None = None  # save and stop after this step; the same command without it goes on
    heldout: str | None = None  # PREFIX of a token file: its loss is measured every heldout_every steps
    heldout_every: int = 1000
    heldout_batches: int = 1  # of batch_size sequences
    branch_from: str | None = None  # RUN/stepN: begin there, with its weights, moments and place in the order
    warm_moments: int = 0  # if that holds weights only: rebuild Adam's moments from the K batches before it
    twin: bool = False  # then train the branch without its intervention too, in OUT_DIR_twin

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype = {self.dtype!r}, expected float32, bfloat16 or float16")
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "heldout_every",
                     "heldout_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least 1")
        if not (self.learning_rate > 0 and 0 <= self.min_lr_ratio <= 1 and 0 <= self.warmup < 1 and self.clip_norm > 0):
            raise ValueError(f"learning_rate = {self.learning_rate}, min_lr_ratio = {self.min_lr_ratio}, warmup = "
                             f"{self.warmup}, clip_norm = {self.clip_norm}: expected a positive rate and norm, "
                             "0 <= min_lr_ratio <= 1, 0 <= warmup < 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0 and self.weight_decay >= 0):
            raise ValueError(f"beta1 = {self.beta1}, beta2 = {self.beta2}, eps = {self.eps}, weight_decay = "
                             f"{self.weight_decay}: expected 0 <= beta < 1, eps > 0, weight_decay >= 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed}, expected 0 to {2**32 - 1:,}")
        if self.warm_moments < 0 or (self.stop_at is not None and self.stop_at < 1):
            raise ValueError(f"warm_moments = {self.warm_moments}, stop_at = {self.stop_at}: expected at least 0, and 1")
        if self.twin and not self.branch_from:
            raise ValueError("twin = True without branch_from: only a branch has a control twin")


# What may differ when a run goes on: it does not decide what is computed.
MAY_CHANGE = {"data", "out_dir", "tokenizer", "log_every", "async_save", "state_every", "stop_at", "heldout",
              "heldout_every", "heldout_batches", "twin"}


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
    """Return AdamW: decay on every matrix, embedding and head included, none on biases and LayerNorms."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() == 2], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


class LossScaler:
    """DeepSpeed's dynamic loss scale with Pythia's settings; all state is in `state`, a JSON object.

    Not enabled, as for float32 and bfloat16, the scale is 1 and the state rests, for a launch in float16.
    On an overflow the update is skipped and the learning rate does not advance, but the data does. The
    first overflow of two is forgiven (hysteresis, refilled only when the scale grows), later ones
    halve the scale; 1000 iterations without one double it.
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
                    "overflow at loss scale 1, the smallest: the run has diverged. Look at the loss in metrics.csv; "
                    "branch from an earlier checkpoint with a lower rate or --dtype=bfloat16")
            if state["hysteresis"] == 1:
                state["scale"] = max(state["scale"] / 2, 1.0)
            else:
                state["hysteresis"] -= 1
            state["last_overflow"] = state["iteration"]
        elif (state["iteration"] - state["last_overflow"]) % 1000 == 0:
            state["scale"] *= 2
            state["hysteresis"] = 2
        state["iteration"] += 1


class Interrupt:
    """Notes SIGINT and SIGTERM, once it listens, for the loop to act on between steps; a later second one
    ends the process.

    torchrun passes on the signal that a terminal or Slurm has already sent to every process of the
    group, so what comes within two seconds is still the first.
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


def open_data(prefix, steps, model_config, config, processes):
    """Return `steps` batches of data in order; the first process builds it, the others find it built."""
    def build():
        num_samples = samples_needed(steps, config.batch_size)
        return OrderedData(prefix, model_config.seq_length, num_samples, config.seed)

    data = build() if processes.rank == 0 else None
    processes.barrier()
    data = data or build()
    if len(data) < steps * config.batch_size:
        raise ValueError(f"{prefix} holds {len(data):,} rows of {model_config.seq_length + 1} tokens, "
                         f"{steps:,} steps need {steps * config.batch_size:,}")
    return data


def find_start(config):
    """Return (folder, step) of the checkpoint to begin from, (None, 0) for a run from the initialisation."""
    saved = checkpoints.saved_steps(config.out_dir, state=True)
    if saved:
        return os.path.join(config.out_dir, f"step{saved[-1]}"), saved[-1]
    if not config.branch_from:
        return None, 0
    step = re.fullmatch(r"step(0|[1-9]\d*)", Path(config.branch_from).name)
    if not step or not os.path.isdir(config.branch_from):
        raise ValueError(f"branch_from = {config.branch_from}, expected a folder RUN/stepN")
    if int(step[1]) >= config.steps:
        raise ValueError(f"branch_from = {config.branch_from}, but steps = {config.steps:,}: nothing is left to train")
    return config.branch_from, int(step[1])


def rescale_moments(optimizer, updates):
    """Let moments of a few replayed batches stand for those of `updates` updates.

    Adam's moments are sums whose weights come to 1 - beta**steps; what the batches before the replayed
    ones weighed goes to those replayed. Raises FloatingPointError if every one of them overflowed.
    """
    if not optimizer.state:
        raise FloatingPointError("the loss scale fell at every replayed batch: give more of them, --warm_moments=K")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            replayed = float(state["step"])
            for beta, moment in zip(group["betas"], (state["exp_avg"], state["exp_avg_sq"])):
                moment.mul_((1 - beta**updates) / (1 - beta**replayed))
            state["step"].fill_(updates)


def clip(model, limit, scale):
    """Undo the loss scale, clip the gradient of all parameters to a norm of `limit`; return the norm before.

    Nothing here waits for the device: the norm is a tensor on it, the same on every process.
    """
    if scale != 1:
        torch._foreach_div_([p.grad for p in model.parameters()], scale)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if is_shard(norm) else norm


def to_device(rows, device):
    """Return the rows on the device, from pinned memory, so that the host does not wait for the copy."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def rehearse(wrapped, optimizer, autocast, shape, device):
    """Take one pass over zeros and forget its gradients.

    DDP settles the layout of its messages in the first pass, and the layout decides how sums round: a
    run that goes on must not have its first pass where one that never stopped had a later one. It
    also shows before the first step whether the memory suffices.
    """
    communicate(wrapped, last=True)
    rows = torch.zeros(shape, dtype=torch.int64, device=device)
    with autocast():
        loss = wrapped(rows, rows)
    loss.backward()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def mean_loss(wrapped, batches, autocast, processes):
    """Return the mean loss over all processes' rows in `batches`, which are of one size."""
    losses = []
    for rows in batches:
        rows = to_device(torch.from_numpy(rows), processes.device)
        with autocast():
            losses.append(wrapped(rows[:, :-1], rows[:, 1:]))
    if hasattr(wrapped, "reshard"):  # FSDP leaves its root gathered when no backward pass follows, and so
        wrapped.reshard()            # the parameters would be others than the optimizer's
    return processes.mean(torch.stack(losses).mean())


def train(model_config, config, intervention, launch, processes, interrupt):
    device, is_main = processes.device, processes.rank == 0
    tokens_per_step = config.batch_size * model_config.seq_length
    share = dict(batch_size=config.batch_size, rank=processes.rank, world_size=processes.count,
                 micro_batch_size=launch.micro_batch_size)

    # ---- data and the run folder; a mistake ends here, before anything is computed
    data = open_data(config.data, config.steps, model_config, config, processes)
    micro_batches = len(data.batch(0, **share))
    heldout = config.heldout and open_data(config.heldout, config.heldout_batches, model_config, config, processes)
    source, start = find_start(config)
    if is_main:
        load_tokenizer(config.tokenizer)
        # The rows of step 0 stand for the whole order: a moved file is welcome, another one is not.
        digest = hashlib.sha256(data.batch(0, config.batch_size).astype("<u2").tobytes()).hexdigest()
        settings = asdict(model_config) | asdict(config) | asdict(intervention)
        settings["first_batch_sha256"] = digest
        checkpoints.lock(config.out_dir)
        open_run(config.out_dir, settings, MAY_CHANGE)
        with open(os.path.join(config.out_dir, "launches.jsonl"), "a") as file:
            file.write(json.dumps(describe_launch(asdict(launch), processes)) + "\n")
    order = data
    if intervention.intervention:
        data = IntervenedData(data, load_tokenizer(config.tokenizer), intervention)
    processes.barrier()

    # ---- model, optimizer, and where they go on
    dtype = compute_dtype(config.dtype, device)
    autocast = functools.partial(  # every weight is cast once a pass: a cache would only cost memory
        torch.autocast, device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    with torch.device("meta"):
        model = Pythia(model_config)
    wrapped = parallelize(model, launch, dtype, processes)
    optimizer = make_optimizer(model, config)
    scaler = LossScaler(enabled=dtype == torch.float16)
    first, updates = start, 0  # updates: successful ones, which is what the learning rate counts
    if source is None:
        model.init_weights(config.seed, fill)
    elif training := checkpoints.load_training(Path(source).parent, start, model, optimizer):
        updates, scaler.state = training["updates"], training["scaler"]
    elif start > 0:  # weights alone: replay the batches before them at rate 0, which moves nothing but the moments
        first, updates = start - config.warm_moments, start
        if not 0 <= first < start:
            raise ValueError(f"{source} holds weights only and warm_moments = {config.warm_moments}: "
                             f"--warm_moments=K rebuilds Adam's moments from the K batches before it, K from 1 to {start}")

    schedule = set(checkpoints.checkpoint_steps(config.steps, config.checkpoint_every))
    log = Log(config.out_dir, start, config.steps, config.batch_size, tokens_per_step, scaler.enabled,
              bool(intervention.intervention), processes)
    peak = peak_flops(device) if is_main else math.nan
    log.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokens_per_step:,} tokens a step, "
            f"{config.steps:,} steps, {processes.count} process(es) on {device.type}, {micro_batches} micro-batch(es) "
            f"of {launch.micro_batch_size}, peak {'-' if math.isnan(peak) else f'{peak / 1e12:.2f} TFLOP/s'}"
            + (f"; going on from step {start:,}" if source else ""))
    saving = None

    def save(step):
        nonlocal saving
        log.flush()  # raises if one of the steps before was not finite
        log.sync()
        if saving:
            saving.result()
        saving = checkpoints.save(config.out_dir, step, model, optimizer,
                                  {"tokens": step * tokens_per_step, "updates": updates, "scaler": dict(scaler.state)},
                                  config.tokenizer, step in schedule, config.async_save,
                                  config.state_every)
        log.restart_clock()

    if source is None:
        save(0)
    interrupt.listen()
    if processes.count > 1:
        rehearse(wrapped, optimizer, autocast, (launch.micro_batch_size, model_config.seq_length), device)
    end = min(config.steps, config.stop_at or config.steps)
    stop = False
    model.train()
    log.restart_clock()
    for step in range(first, end):
        # ---------------------------------------------------------------- one training step
        rate = learning_rate_at(updates, config) if step >= start else 0.0
        batch = (data if step >= start else order).batch(step, **share)  # (micro-batches, sequences, T + 1) on the host
        if batch.max() >= model_config.vocab_size:
            raise ValueError(f"{config.data}: token {batch.max()} in step {step}, but vocab_size is "
                             f"{model_config.vocab_size}")
        loss = torch.zeros((), device=device)
        for i, rows in enumerate(torch.from_numpy(batch)):
            rows = to_device(rows, device)
            communicate(wrapped, last=i == micro_batches - 1)
            with autocast():  # what an intervention padded has a negative id: no input, no target
                micro_loss = wrapped(rows[:, :-1].clamp(min=0), rows[:, 1:]) / micro_batches
            (micro_loss * scaler.scale).backward()
            loss += micro_loss.detach()
        norm = clip(model, config.clip_norm, scaler.scale)
        # The host runs ahead of the device, but for float16: a skipped update does not advance the
        # rate, so the host must know. It asks once a step, as DeepSpeed does.
        finite = not scaler.enabled or math.isfinite(norm)
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ----------------------------------------------------------------------------------
        if step >= start:
            log.note(step, loss, norm, rate, scaler.scale, getattr(data, "changed", ()))
            updates += finite
        try:
            scaler.update(overflow=not finite)
        except FloatingPointError:
            log.flush()  # the steps that tell why
            raise
        if step < start:
            if step == start - 1:
                rescale_moments(optimizer, updates)
            continue
        last, stop = step + 1 == end, processes.any(interrupt.signal)
        if step % config.log_every == 0 or last or stop:
            log.report(*log.flush(), flops_per_token(model_config), peak)
        if saving and saving.done():
            saving.result()  # raises what went wrong, a full disk for instance
        if heldout and ((step + 1) % config.heldout_every == 0 or last):
            log.flush()  # whose clock must not count what follows
            batches = (rows for i in range(config.heldout_batches) for rows in heldout.batch(i, **share))
            log.heldout(step + 1, mean_loss(wrapped, batches, autocast, processes))
        if step + 1 in schedule or last or stop:
            save(step + 1)
        if stop:
            break
    if saving:
        saving.result()  # on the disk, or raises why it is not
    log.close()
    if stop:
        log.say(f"interrupted: saved step{step + 1}; the same command goes on from there")
        sys.exit(128 + (interrupt.signal or signal.SIGTERM))
    log.say(f"done: {len(checkpoints.saved_steps(config.out_dir))} checkpoints in {config.out_dir}")


def main(model_config, config, intervention, launch, options):
    if options.plan:
        schedule = checkpoints.checkpoint_steps(config.steps, config.checkpoint_every)
        command = [word for word in sys.argv[1:] if not re.match("--(plan|gpus|gpu|gpu_memory|mfu|out_dir)(=|$)", word)]
        return plan(model_config, config, launch, options, len(schedule), command)
    if config.out_dir is None:
        raise ValueError("missing: --out_dir, the run folder (--help explains every setting)")
    processes = Processes(launch.device)
    if launch.deterministic:
        make_deterministic()
    interrupt = Interrupt()
    train(model_config, config, intervention, launch, processes, interrupt)
    if config.twin:
        if processes.any(interrupt.signal):  # it came during the last save
            sys.exit(128 + (interrupt.signal or signal.SIGTERM))
        control = replace(config, out_dir=f"{config.out_dir}_twin", twin=False)
        train(model_config, control, InterventionConfig(), launch, processes, interrupt)


if __name__ == "__main__":
    try:
        run(main, *parse(sys.argv[1:], ModelConfig, TrainConfig, InterventionConfig, LaunchConfig, PlanConfig))
    except FloatingPointError as error:
        fail(str(error))
    finally:
        checkpoints.finish_writing()
        if dist.is_initialized():
            dist.destroy_process_group()
