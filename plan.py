"""What a run costs before it is paid for: FLOPs, days, disk, memory, and the torchrun line.

    python train.py configs/pythia_12b.py --plan=True --gpus=64 --gpu_memory=80
"""

import functools
import itertools
import math
import re
import shlex
import time
from dataclasses import dataclass, replace

import torch


# Dense peak of the tensor cores in FLOP/s at 16 bits, from the makers' data sheets.
GPU_PEAKS = {"V100": 125e12, "A100": 312e12, "A40": 150e12, "A6000": 155e12, "L4": 121e12,
             "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "H100 PCIe": 756e12,
             "H100": 989e12, "H200": 989e12}


def flops_per_token(config):
    """Return the matmul FLOPs of one token's forward and backward pass, attention causal."""
    matrices = config.n_layers * 12 * config.d_model**2 + config.vocab_size * config.d_model
    return 6 * matrices + 6 * config.n_layers * config.d_model * config.seq_length


@functools.cache
def peak_flops(device):
    """Return the device's peak in FLOP/s: known for a GPU (else nan), measured once for a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in GPU_PEAKS.items() if re.search(rf"\b{key}\b", name)),
                    math.nan)
    return matmul_flops()


def matmul_flops():
    """Return the FLOP/s of the CPU's fastest matmul of five, float32."""
    a = torch.randn(2048, 2048)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * len(a)**3 / best


USABLE = 0.92  # of a GPU's memory; the rest is the CUDA context, NCCL's buffers and fragments


@dataclass(frozen=True)
class PlanConfig:
    plan: bool = False  # print what the run needs and how to launch it, and end; no data are read
    gpus: int = 1
    gpu: str = "A100"  # one of GPU_PEAKS
    gpu_memory: float = 80.0  # GB (10^9 bytes) of each
    mfu: float = 0.4  # fraction of the peak that the run will reach: measure yours on one GPU first

    def __post_init__(self):
        if self.gpu not in GPU_PEAKS:
            raise ValueError(f"gpu = {self.gpu!r}, expected one of {', '.join(GPU_PEAKS)}")
        for name, holds, expected in (("gpus", self.gpus >= 1, "at least 1"),
                                      ("gpu_memory", self.gpu_memory > 0, "more than 0"),
                                      ("mfu", 0 < self.mfu <= 1, "more than 0, at most 1")):
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}, expected {expected}")


def memory_per_process(config, launch, processes, micro_batch_size, accumulates, itemsize=2,
                       head_rows=2048):
    """Return {what: bytes} of one process, and under "peak" the most of it that is there at once.

    itemsize: bytes of the matmuls' dtype, 4 or 2; head_rows: rows of logits in a block of the loss.
    Counted from the tensors that autograd keeps; held to measured peaks at 14m and 70m in float32
    on a CPU (tests/test_parallel.py, tests/test_model.py), not yet to any on a GPU.
    """
    D, V, L = config.d_model, config.vocab_size, config.n_layers
    N = micro_batch_size * config.seq_length
    block, embeddings = parameter_counts(config)
    parameters, cast = L * block + embeddings, itemsize if itemsize < 4 else 0
    if launch.sharding == "fsdp" and processes > 1:
        # gathered: the root for the whole pass, blocks by twos
        weights = 4 * parameters / processes + 4 * embeddings + 2 * itemsize * block
        moments = 8 * parameters / processes
        gradients = 4 * parameters / processes + 4 * embeddings + (4 + itemsize) * block
        if accumulates:  # whole until the last micro-batch, which alone communicates
            gradients += 4 * L * block
    else:  # autograd keeps cast weights for the backward pass; what is computed again is cast again
        cast_blocks = 1 if launch.activation_checkpointing else L
        weights = 4 * parameters + cast * cast_blocks * block
        moments, gradients = 8 * parameters, 4 * parameters
    # A block keeps the residual stream (float32), both norms' outputs, q k v, rotated q and k,
    # attention's output (2 + 3 + 2 + 1), and the MLP's hidden layer before and after GELU (4 + 4).
    kept = N * D * (4 + 16 * itemsize)
    activations = L * 4 * N * D + kept if launch.activation_checkpointing else L * kept
    activations += 8 * N * D  # the last norm's input and the gradient of its output
    # Cast: what comes from a matmul, and what goes into one. Or one block's backward pass is more.
    logits = min(head_rows, N) * V * (4 + 2 * cast)
    loss = 4 * V * D + max(logits + 2 * cast * V * D, 9 * itemsize * N * D)
    if processes > 1 or accumulates:
        peak = weights + moments + gradients + activations + loss
    else:  # activations go while gradients come
        peak = weights + moments + max(gradients, activations + loss)
    return {"weights": weights, "gradients": gradients, "moments": moments,
            "activations": activations, "loss blocks": loss, "peak": peak}


def parameter_counts(config):
    """Return how many parameters a block has, and how many the embeddings and the last norm."""
    D = config.d_model
    return 12 * D**2 + 13 * D, 2 * (config.vocab_size + 1) * D


def plan(config, training, launch, options, n_checkpoints, command):
    """Print what a run needs on `options.gpus` GPUs, and the command that keeps its batches."""
    steps, batch_size = training.steps, training.batch_size
    tokens = batch_size * config.seq_length
    block, embeddings = parameter_counts(config)
    parameters = config.n_layers * block + embeddings
    flops = flops_per_token(config) * tokens
    seconds = flops / (GPU_PEAKS[options.gpu] * options.mfu * options.gpus)
    slower = "; float32 takes many times as long" if training.dtype == "float32" else ""
    print(f"{parameters:,} parameters, {tokens:,} tokens a step, {steps:,} steps, "
          f"{tokens * steps:,} tokens")
    print(f"{flops:.3e} FLOPs a step, {flops * steps:.3e} in all: at {options.mfu:.0%} of "
          f"{options.gpus} {options.gpu}'s {GPU_PEAKS[options.gpu] / 1e12:.0f} TFLOP/s "
          f"(16 bits{slower}) {seconds:.2f} s a step, {seconds * steps / 86400:.1f} days")
    print(f"{n_checkpoints} checkpoints: "
          f"{n_checkpoints * 4 * parameters / 1e9:,.0f} GB of weights, "
          f"{n_checkpoints * 12 * parameters / 1e9:,.0f} GB with the optimizer's state; "
          f"{12 * parameters / 1e9:,.1f} GB to go on from the newest")
    if batch_size % options.gpus:
        raise ValueError(f"gpus = {options.gpus} does not divide batch_size = {batch_size}: "
                         "the batch would change")
    share = batch_size // options.gpus
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    room = options.gpu_memory * 1e9 * USABLE
    best, itemsize = None, getattr(torch, training.dtype).itemsize
    # From the fastest to the most frugal of what goes at least as far as the config does. Small
    # micro-batches starve the GPU, and FSDP gathers all weights for each: 8 are enough to stop at.
    for checkpointing, sharding in itertools.product((False, True), ("ddp", "fsdp")):
        if (checkpointing < launch.activation_checkpointing
                or (sharding, launch.sharding) == ("ddp", "fsdp")):
            continue
        chosen = replace(launch, activation_checkpointing=checkpointing, sharding=sharding)
        rows = {size: memory_per_process(config, chosen, options.gpus, size, size < share, itemsize)
                for size in sizes}
        fits = max((size for size in sizes if rows[size]["peak"] <= room), default=0)
        print(f"{sharding}{' with' if checkpointing else ', no'} activation checkpointing: "
              + (f"micro-batches of up to {fits} fit" if fits else "does not fit"))
        if best is None or fits > best[0]:
            best = fits, chosen, rows
        if fits >= min(8, share):
            break
    fits, chosen, rows = best
    print(f"\nGB a GPU with sharding={chosen.sharding}, "
          f"activation_checkpointing={chosen.activation_checkpointing}:")
    print(f"{'':14} " + " ".join(f"{name:>11}" for name in rows[1]))
    for size, row in rows.items():
        print(f"micro-batch {size:2} " + " ".join(f"{value / 1e9:11.2f}" for value in row.values())
              + ("" if row["peak"] <= room else f"  over {room / 1e9:.0f}"))
    if len({row["gradients"] for row in rows.values()}) > 1:
        print("(gradients: each GPU keeps all blocks' whole until a step's last micro-batch "
              f"sends them; where one micro-batch is all {share}, its share)")
    if not fits:
        raise ValueError(f"no micro-batch fits into {USABLE:.0%} of {options.gpu_memory:g} GB on "
                         f"{options.gpus} GPUs: take more GPUs, or larger ones")
    per_node = max(n for n in range(1, 9) if options.gpus % n == 0)
    nodes = options.gpus // per_node
    launcher = f"--standalone --nproc_per_node={options.gpus}" if nodes == 1 else (
        f"--nnodes={nodes} --nproc_per_node={per_node} --rdzv_backend=c10d "
        "--rdzv_endpoint=HOST:29500")
    print(f"\ntorchrun {launcher} --shutdown-timeout=600 train.py {shlex.join(command)} "
          f"--sharding={chosen.sharding} "
          f"--activation_checkpointing={chosen.activation_checkpointing} "
          f"--micro_batch_size={fits}")
    print(f"{share // fits} micro-batch(es) of {fits} on each of {options.gpus} GPUs: "
          f"{batch_size} sequences a step, as ever")
