"""How a run is computed: processes, sharding, precision; and what it will cost.

    python train.py configs/pythia_12b.py --plan=True --gpus=64 --gpu_memory=80

--plan reads no data. It prints FLOPs, days, disk space and memory, and the torchrun line that keeps
the batch size. Source of the loss scale: DeeperSpeed, fp16/loss_scaler.py.
"""

import functools
import math
import os
import re
import shlex
import signal
import sys
import time
import timeit
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from config import check
from model import losses_and_gradient

# ---------------------------------------------------------------------------- processes


class Processes:
    """This process's place among those that torchrun started: rank 0 of 1 without torchrun.

    device: "auto", "cpu" or "cuda". timeout: a timedelta, how long a process waits for the others;
    None is torch's default. threads: of each process on a CPU; None shares out the cores.
    """

    signal = 0  # the last one received, see listen

    def __init__(self, device="auto", timeout=None, threads=None):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.first_on_node = local_rank == 0
        if device not in ("auto", "cpu") and not torch.cuda.is_available():
            raise ValueError(f"device = {device!r}, but this torch sees no GPU; "
                             "--device=cpu computes without")
        if device != "cpu" and torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            if threads or on_this_node > 1:  # torchrun leaves one thread to each
                torch.set_num_threads(threads or max(1, os.cpu_count() // on_this_node))
        if self.count > 1:
            # The hosts' own messages go over gloo, so that no GPU has to wait for them.
            backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=timeout)

    def mean(self, values):
        """Return the mean over processes of a tensor, as numbers; wait until they are computed."""
        values = values.double()
        if self.count > 1:
            dist.all_reduce(values)
        return (values / self.count).tolist()

    def any(self, flag):
        """Return whether the flag is true on at least one process."""
        # A tensor on the host, hence over gloo.
        return bool(flag) if self.count == 1 else self.mean(torch.tensor(float(flag))) > 0

    @staticmethod
    def gather(value):
        """Return every process's value, any picklable object, in a list by rank."""
        if not dist.is_initialized():
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)  # on the host, over gloo
        return values

    def together(self, act, first_alone=False):
        """Return act() once all processes have called it, or only the first (first_alone).

        A user's mistake on any process ends all of them with one line.
        """
        result = problem = None
        try:
            if self.rank == 0 or not first_alone:
                result = act()
        except (ValueError, OSError) as error:
            problem = str(error)
        self.refuse(problem)
        return result

    def agree(self, settings):
        """Raise ValueError naming every setting {name: value} that differs between processes."""
        first = self.gather(settings)[0]
        self.refuse("; ".join(
            f"rank {self.rank}: {name} is {settings.get(name)!r}, but {first.get(name)!r} on rank 0"
            for name in first | settings if settings.get(name) != first.get(name)))

    def refuse(self, problem):
        """If any process has a problem, raise ValueError on the first one and end the others."""
        problems = dict.fromkeys(filter(None, self.gather(problem)))
        if problems and self.rank > 0:
            sys.exit(2)
        if problems:
            raise ValueError("; ".join(problems))

    def listen(self):
        """From now on only note SIGINT and SIGTERM; the training loop ends after its step."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: setattr(self, "signal", number))


def leave_processes():
    """Leave the process group that Processes joined."""
    if dist.is_initialized():
        # gloo's thread needs Python's lock to release its last message. Destroying the group waits
        # for that thread while holding the lock, so without this pause both could wait for ever.
        time.sleep(0.2)
        dist.destroy_process_group()


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch computes a run. It may change at a resume, which changes rounding only."""
    device: str = "auto"  # auto (cuda if there is a GPU), cpu or cuda
    micro_batch_size: int = 32  # sequences per forward pass of one process
    sharding: str = "ddp"  # or fsdp: weights, gradients and moments spread over the processes
    activation_checkpointing: bool = False  # keep only each block's input and recompute the rest
    compile: bool = False  # torch.compile each block, and on a GPU the loss
    deterministic: bool = False  # same bits in every rerun on a GPU too (a CPU always has them)
    threads: int | None = None  # of each process on a CPU; default: the cores are shared out
    check_data: bool = False  # first compare every byte of the data with the SHA-256 in PREFIX.json

    def __post_init__(self):
        check(self, "auto, cpu or cuda", ("auto", "cpu", "cuda").__contains__, "device")
        check(self, "ddp or fsdp", ("ddp", "fsdp").__contains__, "sharding")
        check(self, "at least 1", lambda value: value >= 1, "micro_batch_size")
        check(self, "1 to 1024", lambda value: 1 <= value <= 1024, "threads")


def parallelize(model, launch, dtype, processes, exact_sums=False):
    """Return the module that training calls: the model, or DDP or FSDP around it.

    model: a Pythia on the meta device. It is allocated here, uninitialised, on the processes'
    device. DDP keeps all weights on every process and averages gradients. FSDP2 keeps 1/n of
    weights, gradients and moments on each of n processes and gathers one block at a time. In
    float32 both take the same steps (tests/test_parallel.py: 1e-6). At 16 bits FSDP also rounds the
    blocks' LayerNorm weights, as in Pythia's own fp16 training; autocast keeps them in float32.
    With exact_sums, gradients are summed by ExactSums instead of being averaged here.
    """
    if launch.compile and processes.device.type == "cuda" and dtype != torch.float32:
        model.fused_loss = torch.compile(losses_and_gradient)
    for layer in model.layers:
        # Replacing forward, not the module, keeps wrappers' prefixes out of parameter names. The
        # order from inside out: compiled block, recomputation, FSDP's hooks.
        if launch.compile:
            layer.forward = torch.compile(layer.forward)
        if launch.activation_checkpointing:  # no dropout, so no random state
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                              preserve_rng_state=False)
    if processes.count > 1 and launch.sharding == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh  # takes a second
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        # Blocks are gathered in the dtype of their matmuls, which halves the bytes (a CPU's
        # LayerNorm needs float32 weights). The root module, embeddings and last norm, stays in
        # float32, and so does the residual stream, as under DDP and autocast.
        travel = dtype if processes.device.type == "cuda" else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=travel, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    model.to_empty(device=processes.device)
    if processes.count > 1 and launch.sharding == "ddp" and not exact_sums:
        # Every process initialises or loads the same weights, so none are broadcast.
        return DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
    return model


def communicate(wrapped, last):
    """Exchange gradients in the next backward pass only if it is the last of its step."""
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = last  # as no_sync() does
    elif hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP's
        wrapped.set_requires_gradient_sync(last)


def forget_gradients(wrapped, optimizer):
    """Free the gradients; under DDP set them to zero instead.

    DDP's gradients are views of its message buffers, which stay allocated. If they were None, new
    gradients would be allocated beside the buffers until the last micro-batch.
    """
    optimizer.zero_grad(set_to_none=not isinstance(wrapped, DistributedDataParallel))


class ExactSums:
    """The mean of micro-batches' gradients, bit for bit the same on any number of processes.

    Sums of floats round at every addition, so their bits depend on the order. Here each gradient is
    rounded once, to a multiple of 2**-k, and added up as int64, which is exact in any order.
    With n micro-batches per step, k = 58 - ceil(log2(n)): an entry up to 16 becomes at most
    2**(k + 4), and n of them at most 2**62, which cannot overflow. A larger or non-finite entry
    makes the norm infinite: training stops, or in float16 the update is skipped. (Clipping leaves a
    norm of 1 at most.) The mean is off by at most 2**-(k + 1). With 32 micro-batches that is
    2**-54, less than float32 itself rounds any entry above 2**-30. For smaller entries it hardly
    matters: Adam divides by at least eps = 1e-8, of which 2**-54 is 6e-9.
    """

    LOSS_UNIT = 64  # losses are divided by it: they may reach 16 * 64, gradients 16
    BLOCK = 1 << 22  # entries at a time, since temporary tensors of a whole embedding are slow

    def __init__(self, parameters, micro_batches, processes):
        """micro_batches: per step, over all processes."""
        self.parameters, self.n, self.processes = list(parameters), micro_batches, processes
        self.unit = 2.0**(58 - math.ceil(math.log2(micro_batches)))
        loss = too_large = torch.zeros((), device=processes.device)
        self.sums = [torch.zeros_like(tensor, dtype=torch.int64)
                     for tensor in (*self.parameters, loss, too_large)]

    def add(self, loss, loss_scale):
        """Add one micro-batch's loss and gradients, which are still multiplied by loss_scale."""
        values = [p.grad for p in self.parameters] + [loss.detach() * (loss_scale / self.LOSS_UNIT)]
        largest = torch.stack(torch._foreach_norm(values, math.inf)).max() / loss_scale
        self.sums[-1] += ~(largest <= 16)  # true for nan as well
        for total, value in zip(self.sums, values):
            for a, b in zip(self.blocks(total), self.blocks(value)):
                a += (b * (self.unit / loss_scale)).round_().long()
        for p in self.parameters:
            p.grad = None

    def mean(self):
        """Set every gradient to its mean over all processes; return the mean loss; start anew."""
        if self.processes.count > 1:
            for total in self.sums:
                dist.all_reduce(total)
        for p, total in zip(self.parameters, self.sums):
            p.grad = torch.empty_like(p)
            for gradient, a in zip(self.blocks(p.grad), self.blocks(total)):
                gradient.copy_(a.double() / (self.n * self.unit))
        overflow = torch.where(self.sums[-1] > 0, math.inf, 0.0)
        self.parameters[0].grad += overflow
        loss = (self.sums[-2].double() * self.LOSS_UNIT / (self.n * self.unit)).float() + overflow
        torch._foreach_zero_(self.sums)
        return loss

    def blocks(self, tensor):
        return tensor.reshape(-1).split(self.BLOCK)


def rehearse(training, micro_batch_size, seq_length):
    """Run two passes of a train.Training on zeros and discard their gradients.

    In its first pass DDP records the order in which gradients come, and from the second pass on it
    groups them into messages in that order. The grouping decides how sums round. Without a
    rehearsal, a resumed run would take its first step with other groups than an uninterrupted one.
    """
    communicate(training.wrapped, last=True)
    for _ in range(2):
        training.optimizer.zero_grad(set_to_none=True)  # before the groups change
        training.loss(torch.zeros(micro_batch_size, seq_length + 1, dtype=torch.int64)).backward()
    forget_gradients(training.wrapped, training.optimizer)


def compute_dtype(name, device):
    """Return the dtype of the matmuls: the named one, but float32 instead of float16 on a CPU."""
    if device.type == "cpu" and name == "float16":
        return torch.float32
    if device.type == "cpu" and name == "bfloat16" and not torch.cpu._is_amx_tile_supported():
        raise ValueError("dtype = 'bfloat16' would be slower than float32, as this CPU has no AMX; "
                         "--dtype=float32")
    return getattr(torch, name)


class LossScaler:
    """DeepSpeed's dynamic loss scale with Pythia's settings; `state` is saved in checkpoints.

    Only float16 uses one; otherwise the scale is 1. After an overflow the update is skipped: the
    learning rate does not advance, the data does. The first overflow leaves the scale as it is
    (hysteresis 2, restored when the scale grows), later ones halve it, down to 1, where an overflow
    ends the run. 1000 iterations without an overflow double it.
    """

    def __init__(self, enabled):
        self.enabled = enabled
        self.state = {"scale": 4096.0, "hysteresis": 2, "iteration": 0, "last_overflow": -1}

    @property
    def scale(self):
        return self.state["scale"] if self.enabled else 1.0

    def update(self, overflow):
        """Note one iteration."""
        state = self.state
        if not self.enabled:
            return
        if overflow:
            state["last_overflow"] = state["iteration"]
            if state["hysteresis"] > 1:
                state["hysteresis"] -= 1
            else:
                state["scale"] = max(state["scale"] / 2, 1.0)
        elif (state["iteration"] - state["last_overflow"]) % 1000 == 0:
            state["scale"] *= 2
            state["hysteresis"] = 2
        state["iteration"] += 1


# ---------------------------------------------------------------------------- what it costs

# Dense 16-bit peak of the tensor cores in FLOP/s, from data sheets (half of one with sparsity).
GPU_PEAKS = {"V100": 125e12, "A100": 312e12, "A100 PCIe": 312e12, "A40": 150e12, "A6000": 155e12,
             "L4": 121e12, "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12,
             "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12,
             "H200 NVL": 835e12, "GH200": 990e12, "B200": 2250e12}
USABLE = 0.92  # of a GPU's memory; CUDA, NCCL and fragmentation take the rest


@dataclass(frozen=True)
class PlanConfig:
    plan: bool = False  # print what the run needs and how to launch it; do not train
    gpus: int = 1
    gpu: str = "A100"  # one of GPU_PEAKS
    gpu_memory: float = 80.0  # GB (10^9 bytes) per GPU
    mfu: float = 0.4  # fraction of the peak that is reached; measure yours on one GPU first

    def __post_init__(self):
        check(self, f"one of {', '.join(GPU_PEAKS)}", lambda value: value in GPU_PEAKS, "gpu")
        check(self, "at least 1", lambda value: value >= 1, "gpus", "gpu_memory")
        check(self, "more than 0, at most 1", lambda value: 0 < value <= 1, "mfu")


def flops_per_token(config):
    """Return the matmul FLOPs per token, forward and backward, with causal attention."""
    matrices = config.n_layers * 12 * config.d_model**2 + config.vocab_size * config.d_model
    return 6 * matrices + 6 * config.n_layers * config.d_model * config.seq_length


@functools.cache
def peak_flops(device):
    """Return a device's peak in FLOP/s: measured for a CPU, known for a GPU or nan."""
    if device.type == "cpu":  # the fastest of five float32 matmuls
        a = torch.randn(2048, 2048)
        return 2 * len(a)**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
    # "NVIDIA A100-SXM4-80GB" is an A100. A part of a GPU (MIG) is not in the table.
    model = re.sub(r"NVIDIA |Tesla |GeForce |RTX (?=A)|[ -](SXM\d|\d+GB?|HBM3e?)\b", "",
                   torch.cuda.get_device_name(device))
    peaks = {key.upper(): peak for key, peak in GPU_PEAKS.items()}
    return peaks.get(model.replace("-", " ").upper(), math.nan)


def parameter_counts(config):
    """Return the numbers of parameters of one block, and of the embeddings with the last norm."""
    D = config.d_model
    return 12 * D**2 + 13 * D, 2 * (config.vocab_size + 1) * D


def memory_per_process(config, launch, processes, micro_batch_size, accumulates, itemsize=2,
                       head_rows=2048):
    """Return {what: bytes} that one process needs, with the largest total at one time as "peak".

    itemsize: bytes of the matmuls' dtype, 4 or 2. head_rows: rows of logits in a block of the loss.
    Counted from the tensors that autograd keeps. Tests compare it with measured peaks of 14m and
    70m in float32 on a CPU; bf16 peaks on an H100, 70m to 1b, were within 2 % (bench.py gpu).
    """
    D, V, L = config.d_model, config.vocab_size, config.n_layers
    N = micro_batch_size * config.seq_length
    block, embeddings = parameter_counts(config)
    sharded, cast = launch.sharding == "fsdp" and processes > 1, itemsize if itemsize < 4 else 0
    own = (L * block + embeddings) / (processes if sharded else 1)
    weights, gradients, moments = 4 * own, 4 * own, 8 * own
    if sharded:  # gathered: the root for the whole pass, and two blocks at a time
        weights += 4 * embeddings + 2 * itemsize * block
        gradients += 4 * embeddings + (4 + itemsize) * block
        if accumulates:  # unsharded until the last micro-batch, the only one that communicates
            gradients += 4 * L * block
    else:  # autograd keeps cast weights for the backward pass, unless the block is recomputed
        weights += cast * block * (1 if launch.activation_checkpointing else L)
    # A block keeps the residual stream (float32), both norms' outputs, q k v, rotated q and k,
    # attention's output (2 + 3 + 2 + 1), and the MLP's hidden layer before and after GELU (4 + 4).
    kept = N * D * (4 + 16 * itemsize)
    activations = L * 4 * N * D + kept if launch.activation_checkpointing else L * kept
    activations += 8 * N * D  # the last norm's input and the gradient of its output
    # Cast: input and output of the head's matmul. A block's backward pass may need more than both.
    logits = min(head_rows, N) * V * (4 + 2 * cast)
    loss = 4 * V * D + max(logits + 2 * cast * V * D, 9 * itemsize * N * D)
    passing = activations + loss  # with one micro-batch, freed while gradients are allocated
    both = gradients + passing if processes > 1 or accumulates else max(gradients, passing)
    return {"weights": weights, "gradients": gradients, "moments": moments,
            "activations": activations, "loss blocks": loss, "peak": weights + moments + both}


def plan(config, training, launch, options, n_checkpoints):
    """Print what a run needs on `options.gpus` GPUs, and the command that keeps its batch size."""
    block, embeddings = parameter_counts(config)
    parameters = config.n_layers * block + embeddings
    tokens, peak = training.batch_size * config.seq_length, GPU_PEAKS[options.gpu]
    flops = flops_per_token(config) * tokens
    seconds = flops / (peak * options.mfu * options.gpus)
    print(f"{parameters:,} parameters, {tokens:,} tokens a step, {training.steps:,} steps, "
          f"{tokens * training.steps:,} tokens")
    print(f"{flops:.3e} FLOPs a step, {flops * training.steps:.3e} in all: at {options.mfu:.0%} of "
          f"{options.gpus} {options.gpu}'s {peak / 1e12:.0f} TFLOP/s (16 bits) "
          f"{seconds:.2f} s a step, {seconds * training.steps / 86400:.1f} days")
    gigabytes = 4 * parameters / 1e9  # of the weights
    print(f"{n_checkpoints} checkpoints: {n_checkpoints * gigabytes:,.0f} GB of weights, "
          f"{n_checkpoints * 3 * gigabytes:,.0f} GB with the optimizer's state; "
          f"{3 * gigabytes:,.1f} GB to go on from the newest")
    if training.batch_size % options.gpus:
        raise ValueError(f"gpus = {options.gpus} does not divide batch_size = "
                         f"{training.batch_size}")
    share, room = training.batch_size // options.gpus, options.gpu_memory * 1e9 * USABLE
    itemsize, fits = getattr(torch, training.dtype).itemsize, 0
    print(f"\nGB per GPU with sharding={launch.sharding}, "
          f"activation_checkpointing={launch.activation_checkpointing}, of {room / 1e9:.0f}:")
    for size in [size for size in range(1, share + 1) if share % size == 0]:
        row = memory_per_process(config, launch, options.gpus, size, size < share, itemsize)
        print(f"micro-batch {size:3}: "
              + ", ".join(f"{what} {amount / 1e9:.2f}" for what, amount in row.items()))
        if row["peak"] <= room:
            fits = size
    if not fits:
        raise ValueError(f"no micro-batch fits into {USABLE:.0%} of {options.gpu_memory:g} GB: try "
                         "--sharding=fsdp, --activation_checkpointing=True, more or larger GPUs")
    per_node = max(n for n in range(1, 9) if options.gpus % n == 0)
    nodes = options.gpus // per_node
    meeting = "--standalone" if nodes == 1 else "--rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    given = [word for word in sys.argv[1:] if word.partition("=")[0] != "--plan"]
    print(f"\ntorchrun --nnodes={nodes} --nproc_per_node={per_node} {meeting} "
          f"--shutdown-timeout=600 train.py {shlex.join(given)} --micro_batch_size={fits}"
          + ("" if training.out_dir else " --out_dir=RUN"))
    print(f"{share // fits} micro-batch(es) of {fits} on each of {options.gpus} GPUs: "
          f"{training.batch_size} sequences a step")
