"""Train a Pythia: one fixed order of data, log-spaced checkpoints, the learning rate of gpt-neox v1.0.

    python train.py configs/mini.py --data=data/demo/train --out_dir=runs/mini
    torchrun --standalone --nproc_per_node=8 train.py configs/pythia_160m.py --data=PREFIX --out_dir=RUN
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

The same command, given again, goes on where the run stopped, to the same bits as if it had never
stopped. Checkpoint N is the weights after N updates; step s is the update that makes checkpoint s + 1
from the rows s * batch_size to (s + 1) * batch_size - 1.

Sources: gpt-neox v1.0 megatron/{training,learning_rates}.py, DeeperSpeed fp16/loss_scaler.py.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
from config import fail, parse, replacing, run
from data import OrderedData, read_json, samples_needed
from model import ModelConfig, Pythia
from studies.interventions import IntervenedData, InterventionConfig
from tokenizer import load_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    data: str  # PREFIX of a token file (python data.py tokenize)
    out_dir: str  # run folder; a run that is there already goes on
    learning_rate: float  # the highest, reached after the warmup
    min_lr_ratio: float = 0.1  # floor of the learning rate, as a fraction of learning_rate
    warmup: float = 0.01  # fraction of steps
    steps: int = 143000
    batch_size: int = 1024  # sequences per optimizer step, all processes together
    micro_batch_size: int = 32  # sequences per forward pass of one process
    weight_decay: float = 0.1  # matrices and embeddings; not biases, not LayerNorms
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # of the gradient of all parameters
    seed: int = 1234  # of the initialisation and of the data order
    dtype: str = "float16"  # float32, bfloat16 or float16 on a GPU; a CPU always computes in float32
    device: str = "auto"  # cuda where there is one, else cpu
    compile: bool = False  # torch.compile each block
    checkpoint_every: int = 1000  # besides steps 0, 1, 2, 4, ..., 512
    log_every: int = 10  # steps between printed lines; metrics.csv has every step
    tokenizer: str = "20B_tokenizer.json"  # goes into every checkpoint

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype = {self.dtype!r}, expected float32, bfloat16 or float16")
        for name in ("steps", "batch_size", "micro_batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least 1")


# Settings that may differ when a run goes on: they do not decide what is computed (accumulation and
# compilation round differently, as does another number of processes; the batches stay the same).
MAY_CHANGE = {"data", "out_dir", "micro_batch_size", "device", "compile", "log_every", "tokenizer"}

# Dense peak of the tensor cores in FLOP/s at 16 bits, from the makers' data sheets.
GPU_PEAKS = {"V100": 125e12, "A100": 312e12, "A40": 150e12, "A6000": 155e12, "L4": 121e12,
             "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "H100": 989e12, "H200": 989e12}


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
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


class LossScaler:
    """DeepSpeed's dynamic loss scale with Pythia's settings; all state is in `state`, a JSON object.

    On an overflow the update is skipped and the learning rate does not advance, but the data does. The
    first overflow of two is forgiven (hysteresis, refilled only when the scale grows), later ones
    halve the scale; 1000 iterations without one double it.
    """

    def __init__(self, enabled):
        self.enabled = enabled
        self.state = {"scale": 4096.0 if enabled else 1.0, "hysteresis": 2, "iteration": 0,
                      "last_overflow": -1}

    def update(self, overflow):
        """Note one iteration. Raises FloatingPointError on an overflow at the smallest scale, 1."""
        state = self.state
        if not self.enabled:
            return
        if overflow:
            if state["scale"] == 1.0:
                raise FloatingPointError("overflow at loss scale 1: the run has diverged")
            if state["hysteresis"] == 1:
                state["scale"] = max(state["scale"] / 2, 1.0)
            else:
                state["hysteresis"] -= 1
            state["last_overflow"] = state["iteration"]
        elif (state["iteration"] - state["last_overflow"]) % 1000 == 0:
            state["scale"] *= 2
            state["hysteresis"] = 2
        state["iteration"] += 1


def flops_per_token(config):
    """Return the matmul FLOPs of one token's forward and backward pass, causal attention counted once."""
    matrices = config.n_layers * 12 * config.d_model**2 + config.vocab_size * config.d_model
    return 6 * matrices + 6 * config.n_layers * config.d_model * config.seq_length


def peak_flops(device):
    """Return the device's peak in FLOP/s: known for a GPU (else nan), measured here for a CPU in float32."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in GPU_PEAKS.items() if key in name), math.nan)
    a = torch.randn(2048, 2048)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * len(a)**3 / best


class Processes:
    """This process among those torchrun started; alone, rank 0 of 1."""

    def __init__(self, device):
        self.rank, self.count, local_rank, local_count = (
            int(os.environ.get(name, default)) for name, default in
            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(max(1, os.cpu_count() // local_count))  # torchrun sets 1
        if self.count > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    def mean(self, *values):
        """Return the mean over all processes of each number."""
        values = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.count > 1:
            dist.all_reduce(values)
        return (values / self.count).tolist()

    def barrier(self):
        if self.count > 1:
            dist.barrier()


def open_run(model_config, config, intervention, data):
    """Write RUN/config.json, or raise ValueError naming each setting in which a run already there differs."""
    settings = asdict(model_config) | asdict(config) | asdict(intervention)
    # The rows of step 0 stand for the whole order: a moved file is welcome, another one is not.
    first = data.batch(0, config.batch_size)
    settings["first_batch_sha256"] = hashlib.sha256(first.astype("<u2").tobytes()).hexdigest()
    path = os.path.join(config.out_dir, "config.json")
    if os.path.exists(path):
        before = read_json(path)
        differences = [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in settings.items()
                       if name not in MAY_CHANGE and before.get(name) != value]
        if differences:
            raise ValueError(f"{config.out_dir} holds another run: {'; '.join(differences)}. "
                             "Go back to its settings, or name another --out_dir")
        return
    os.makedirs(config.out_dir, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())


METRICS = ("step", "tokens", "loss", "learning_rate", "grad_norm", "loss_scale", "seconds")


def open_log(path, columns, start):
    """Return a CSV file open at its end, without the rows of steps that are about to be run again."""
    rows = []
    if os.path.exists(path):
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) < start]
    with replacing(path) as file:
        lines = [columns, *([row[name] for name in columns] for row in rows)]
        file.write("".join(",".join(line) + "\n" for line in lines).encode())
    return open(path, "a", buffering=1)


class Interrupt:
    """Notes SIGINT and SIGTERM for the loop to act on between steps; a second one ends the process."""

    signal = 0

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def main(model_config, config, intervention):
    processes = Processes(config.device)
    device, rank = processes.device, processes.rank
    is_main = rank == 0
    say = tqdm.write if is_main else lambda line: None
    tokens_per_step = config.batch_size * model_config.seq_length

    # ---- data, model, optimizer; the first process builds the order, the others find it built
    num_samples = samples_needed(config.steps, config.batch_size)
    if is_main:
        load_tokenizer(config.tokenizer)
        data = OrderedData(config.data, model_config.seq_length, num_samples, config.seed)
    processes.barrier()
    if not is_main:
        data = OrderedData(config.data, model_config.seq_length, num_samples, config.seed)
    if len(data) < config.steps * config.batch_size:
        raise ValueError(f"{config.data} holds {len(data):,} rows of {model_config.seq_length + 1} tokens, "
                         f"the run needs {config.steps * config.batch_size:,}")
    micro_batches = data.batch(0, config.batch_size, rank, processes.count, config.micro_batch_size).shape[0]
    if is_main:
        open_run(model_config, config, intervention, data)
    if intervention.intervention:
        data = IntervenedData(data, load_tokenizer(config.tokenizer), intervention)
    model = Pythia(model_config, config.seed).to(device)
    optimizer = make_optimizer(model, config)
    scaler = LossScaler(enabled=device.type == "cuda" and config.dtype == "float16")

    # ---- resume
    saved = checkpoints.saved_steps(config.out_dir)
    processes.barrier()
    start, updates = 0, 0  # updates: successful ones, which is what the learning rate counts
    if saved:
        training = checkpoints.load_training(config.out_dir, saved[-1], model, optimizer)
        start, updates, scaler.state = training["step"], training["updates"], training["scaler"]
    if is_main:
        metrics = open_log(os.path.join(config.out_dir, "metrics.csv"), METRICS, start)
        if intervention.intervention:
            changed = open_log(os.path.join(config.out_dir, "interventions.csv"), ("step", "row"), start)

    # ---- the raw model is what is saved, so no wrapper's prefix ever reaches the disk
    if config.compile:
        for layer in model.layers:
            layer.compile()
    wrapped = model
    if processes.count > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    autocast = contextlib.nullcontext()
    if device.type == "cuda" and config.dtype != "float32":
        autocast = torch.autocast("cuda", getattr(torch, config.dtype))

    schedule = set(checkpoints.checkpoint_steps(config.steps, config.checkpoint_every))

    def save(step):
        if is_main:
            training = {"tokens": step * tokens_per_step, "updates": updates, "scaler": scaler.state}
            checkpoints.save(config.out_dir, step, model, optimizer, training, config.tokenizer,
                             scheduled=step in schedule)
        processes.barrier()

    peak = peak_flops(device) if is_main else math.nan
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters:,} parameters, {tokens_per_step:,} tokens a step, {config.steps:,} steps, "
        f"{processes.count} process(es) on {device.type}, {micro_batches} micro-batch(es) of "
        f"{config.micro_batch_size}, peak {peak / 1e12:.2f} TFLOP/s"
        + (f"; going on from step {start:,}" if saved else ""))
    if start == 0:
        save(0)

    interrupt = Interrupt()
    bar = tqdm(total=config.steps, initial=start, unit="step", disable=None if is_main else True)
    model.train()
    for step in range(start, config.steps):
        began = time.perf_counter()
        # ---------------------------------------------------------------- one training step
        rate = learning_rate_at(updates, config)
        rows = data.batch(step, config.batch_size, rank, processes.count, config.micro_batch_size)
        if rows.max() >= model_config.vocab_size:
            raise ValueError(f"{config.data}: token {rows.max()} in step {step}, but vocab_size is "
                             f"{model_config.vocab_size}")
        loss = 0.0
        for i, micro_batch in enumerate(torch.from_numpy(rows)):
            if device.type == "cuda":
                micro_batch = micro_batch.pin_memory().to(device, non_blocking=True)
            last = i == micro_batches - 1  # gradients travel between processes once a step
            with contextlib.nullcontext() if last or processes.count == 1 else wrapped.no_sync():
                with autocast:  # what an intervention padded is MASKED, a negative id: no input, no target
                    micro_loss = wrapped(micro_batch[:, :-1].clamp(min=0), micro_batch[:, 1:])
                (micro_loss * (scaler.state["scale"] / micro_batches)).backward()
            loss += micro_loss.detach() / micro_batches
        if scaler.enabled:
            torch._foreach_div_([p.grad for p in model.parameters()], scaler.state["scale"])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        finite = math.isfinite(norm)
        mean_loss, stop = processes.mean(float(loss), float(interrupt.signal > 0))
        if not math.isfinite(mean_loss) or not (finite or scaler.enabled):
            first_row = step * config.batch_size
            raise FloatingPointError(
                f"step {step} (rows {first_row:,} to {first_row + config.batch_size - 1:,}): loss {mean_loss}, "
                f"gradient norm {float(norm)}. Nothing was saved after it; the last checkpoint is "
                f"step{checkpoints.saved_steps(config.out_dir)[-1]}, `python data.py view` shows the rows")
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            updates += 1
        scale = scaler.state["scale"]
        scaler.update(overflow=not finite)
        optimizer.zero_grad(set_to_none=True)
        # ----------------------------------------------------------------------------------
        seconds = time.perf_counter() - began
        if is_main:
            metrics.write(f"{step},{step * tokens_per_step},{mean_loss!r},{rate!r},{float(norm)!r},{scale:g},"
                          f"{seconds:.4f}\n")
            if intervention.intervention:
                changed.writelines(f"{step},{row}\n" for row in data.changed)
        if step % config.log_every == 0 or step == config.steps - 1:
            speed = tokens_per_step / seconds
            used = speed * flops_per_token(model_config) / (peak * processes.count)
            say(f"step {step:6}/{config.steps} | loss {mean_loss:.4f} | lr {rate:.2e} | norm {float(norm):.2f} "
                f"| {seconds:.2f} s | {_count(speed)} tok/s | mfu {'-' if math.isnan(used) else f'{used:.1%}'}")
        bar.update()
        if step + 1 in schedule or stop:
            save(step + 1)
        if stop:
            bar.close()
            say(f"interrupted: saved step{step + 1}; the same command goes on from there")
            sys.exit(128 + (interrupt.signal or signal.SIGTERM))
    bar.close()
    say(f"done: {len(checkpoints.saved_steps(config.out_dir))} checkpoints in {config.out_dir}")


def _count(n):
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k"


if __name__ == "__main__":
    try:
        run(main, *parse(sys.argv[1:], ModelConfig, TrainConfig, InterventionConfig))
    except FloatingPointError as error:
        fail(str(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
