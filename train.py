"""Train a Pythia: one order of data, log-spaced checkpoints, the learning rate of gpt-neox v1.0.

    python train.py configs/mini.py --data=data/demo/train --out_dir=runs/mini
    torchrun --standalone --nproc_per_node=8 train.py configs/pythia_160m.py --data=PREFIX \\
        --out_dir=RUN
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        --shutdown-timeout=600 train.py ...     # RUN on a disk that all nodes share
    python train.py configs/mini.py --branch_from=runs/mini/step256 --out_dir=runs/child \\
        --intervention=NAME --twin=True
    python train.py configs/pythia_12b.py --plan=True --gpus=64

The same command, given again, goes on where the run stopped, to the same bits as if it had never
stopped. (torchrun kills its processes 30 s after a SIGTERM: where a step and a save take longer,
give it --shutdown-timeout.) Checkpoint N is the weights after N updates; step s is the update that
makes checkpoint s + 1 from the rows s * batch_size to (s + 1) * batch_size - 1.
training/record.py says what else is in the run folder.

Sources: gpt-neox v1.0 megatron/{training,learning_rates}.py.
"""

import functools
import gc
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoints
from config import fail, parse, run
from model import ModelConfig, Pythia
from training.begin import claim, go_on, rescale_moments
from training.parallel import (Interrupt, LaunchConfig, Processes, communicate, compute_dtype,
                               forget_gradients, is_shard, make_deterministic, parallelize,
                               rehearse)
from training.plan import PlanConfig, flops_per_token, peak_flops, plan
from training.record import Log
from training.scaler import LossScaler
from studies.interventions import InterventionConfig


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
