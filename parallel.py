"""How a run is computed: processes, sharding, precision; and what it will cost.

    python train.py configs/pythia_12b.py --plan=True --gpus=64 --gpu_memory=80

--plan prints FLOPs, days, disk and memory before they are paid for, and the torchrun line that
keeps the batches as they are. It reads no data. Source of the loss scale: DeeperSpeed,
fp16/loss_scaler.py.
"""

import functools
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from config import check
from model import losses_and_gradient

# ---------------------------------------------------------------------------- processes


class Processes:
    """This process among those that torchrun started; alone, it is rank 0 of 1.

    device: "auto", "cpu" or "cuda". timeout: a timedelta, how long a process may wait for another;
    None is torch's default. threads: of a process on a CPU; None shares out the cores.
    """

    signal = 0  # the last that this process got; see listen

    def __init__(self, device="auto", timeout=None, threads=None):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device not in ("auto", "cpu") and not torch.cuda.is_available():
            raise ValueError(f"device = {device!r}, but this torch sees no GPU; "
                             "--device=cpu computes without")
        if device != "cpu" and torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            if threads or on_this_node > 1:  # torchrun leaves one thread to each
                torch.set_num_threads(threads or max(1, os.cpu_count() // on_this_node))
        if self.count > 1:
            # Hosts exchange their messages over gloo, so that GPUs need not stop for them.
            backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=timeout)

    def mean(self, values):
        """Return the mean over processes of a tensor's values, as a list; waits for the device."""
        values = values.double()
        if self.count > 1:
            dist.all_reduce(values)
        return (values / self.count).tolist()

    def any(self, flag):
        """Return whether the flag is true on one process at least."""
        if self.count == 1:
            return bool(flag)
        return self.mean(torch.tensor(float(flag))) > 0  # on the host: over gloo

    @staticmethod
    def gather(value):
        """Return a list of every process's value, any picklable object, by rank."""
        if not dist.is_initialized():
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)  # on the host, over gloo
        return values

    def together(self, act, first_alone=False):
        """Return act() of this process, once all have done it; first_alone: the others only wait.

        A user's mistake in one process ends all of them, and the first one tells it.
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
        """Raise ValueError naming every setting {name: value} that a process has otherwise."""
        first = self.gather(settings)[0]
        self.refuse("; ".join(
            f"rank {self.rank}: {name} is {settings.get(name)!r}, but {first.get(name)!r} on rank 0"
            for name in first | settings if settings.get(name) != first.get(name)))

    def refuse(self, problem):
        """Raise ValueError on the first process if any has a problem; the others end."""
        problems = dict.fromkeys(filter(None, self.gather(problem)))
        if problems and self.rank > 0:
            sys.exit(2)
        if problems:
            raise ValueError("; ".join(problems))

    def listen(self):
        """From now on note a SIGINT or SIGTERM, on which the loop acts between steps."""
        def note(number, frame):
            self.signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)

    def exit(self):
        """End with the signal's exit code, or SIGTERM's if only another process got one."""
        sys.exit(128 + (self.signal or signal.SIGTERM))


def leave_processes():
    """End what Processes began."""
    if dist.is_initialized():
        # gloo's thread needs Python's lock to release its last message. A group that is destroyed
        # earlier waits for that thread while it holds the lock: both would wait for ever.
        time.sleep(0.2)
        dist.destroy_process_group()


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch computes a run. It may differ at every resume; only rounding changes."""
    device: str = "auto"  # cuda where there is one, else cpu
    micro_batch_size: int = 32  # sequences per forward pass of one process
    sharding: str = "ddp"  # or fsdp: weights, gradients and moments spread over the processes
    activation_checkpointing: bool = False  # keep each block's input only, compute the rest again
    compile: bool = False  # torch.compile each block, and on a GPU the loss
    deterministic: bool = False  # equal bits on every rerun on a GPU too (a CPU's are equal anyway)
    threads: int | None = None  # of each process on a CPU; default: the cores are shared out
    check_data: bool = False  # compare every byte of the data with the SHA-256 that tokenize noted

    def __post_init__(self):
        check(self, "auto, cpu or cuda", ("auto", "cpu", "cuda").__contains__, "device")
        check(self, "ddp or fsdp", ("ddp", "fsdp").__contains__, "sharding")
        check(self, "at least 1", lambda value: value >= 1, "micro_batch_size", "threads")


def parallelize(model, launch, dtype, processes, exact_sums=False):
    """Return the module that training calls, whose every process takes its part.

    model: a Pythia on the meta device. It gets its memory here, unfilled, on the processes' device.
    DDP keeps every weight on every process and averages gradients. FSDP2 keeps 1/n of weights,
    gradients and moments on each of n processes and gathers one block at a time. In float32 both
    take the same steps (tests/test_parallel.py: 1e-6). At 16 bits FSDP rounds the blocks' LayerNorm
    weights too, as Pythia's own fp16 weights were; autocast leaves them in float32. exact_sums:
    gradients are not averaged here (ExactSums does).
    """
    if launch.compile and processes.device.type == "cuda" and dtype != torch.float32:
        model.fused_loss = torch.compile(losses_and_gradient)
    for layer in model.layers:
        # The forward function is replaced, not the module, so that no wrapper's prefix reaches a
        # parameter's name. FSDP's hooks come outermost, then recomputation, the compiled block.
        if launch.compile:
            layer.forward = torch.compile(layer.forward)
        if launch.activation_checkpointing:  # there is no dropout, hence no random state to keep
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                              preserve_rng_state=False)
    if processes.count > 1 and launch.sharding == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh  # takes a second
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        # Blocks travel in the dtype of their matmuls, half the bytes (a CPU's LayerNorm wants its
        # weights in float32). The root, embeddings and last norm, stays float32, and with it the
        # residual stream, as under DDP and autocast.
        travel = dtype if processes.device.type == "cuda" else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=travel, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    model.to_empty(device=processes.device)
    if processes.count > 1 and launch.sharding == "ddp" and not exact_sums:
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
    """Give the gradients' memory back; under DDP set them to zero instead.

    DDP's gradients are views of its message buffers, which stay anyway. Set to None, the next
    step's gradients would lie beside the buffers until the last micro-batch.
    """
    optimizer.zero_grad(set_to_none=not isinstance(wrapped, DistributedDataParallel))


class ExactSums:
    """The mean of micro-batches' gradients, with equal bits however many processes share them.

    A sum of floats rounds at every addition, so its bits depend on the order. Here each gradient is
    rounded once, to a whole multiple of 2**-k, and whole numbers (int64) have one sum in any order.
    With n micro-batches a step, k = 58 - ceil(log2(n)): entries up to 16 are at most 2**(k + 4), n
    of them at most 2**62, so no sum can overflow. An entry that is larger, or not finite, makes the
    norm infinite: training stops, in float16 the update is skipped. (Clipping allows a norm of 1,
    so entries up to 1.) The mean is off by 2**-(k + 1) at most. With 32 micro-batches that is
    2**-54, less than float32's own rounding of any entry above 2**-30. Smaller entries matter to
    Adam only beside its eps of 1e-8, of which 2**-54 is 6e-9.
    """

    LOSS_UNIT = 64  # losses up to 16 * 64 fit where gradients up to 16 do
    BLOCK = 1 << 22  # entries at a time, as temporary tensors of a whole embedding would be slow

    def __init__(self, parameters, micro_batches, processes):
        """micro_batches: of one step on all processes together."""
        self.parameters, self.n, self.processes = list(parameters), micro_batches, processes
        self.unit = 2.0**(58 - math.ceil(math.log2(micro_batches)))
        loss = torch.zeros((), device=processes.device)
        self.sums = [torch.zeros_like(t, dtype=torch.int64) for t in (*self.parameters, loss)]
        self.largest = loss

    def add(self, loss, loss_scale):
        """Add the gradients, which are loss_scale too large, and the loss of one micro-batch."""
        values = [p.grad for p in self.parameters] + [loss.detach() * (loss_scale / self.LOSS_UNIT)]
        largest = torch.stack(torch._foreach_norm(values, math.inf)).max() / loss_scale
        self.largest = torch.maximum(self.largest, largest)
        for total, value in zip(self.sums, values):
            for a, b in zip(self.blocks(total), self.blocks(value)):
                a += (b * (self.unit / loss_scale)).round_().long()
        for p in self.parameters:
            p.grad = None

    def mean(self):
        """Make every gradient the mean over all processes; return the mean loss; begin again."""
        too_large = (~(self.largest <= 16)).float()
        if self.processes.count > 1:
            dist.all_reduce(too_large, dist.ReduceOp.MAX)
            for total in self.sums:
                dist.all_reduce(total)
        for p, total in zip(self.parameters, self.sums):
            p.grad = torch.empty_like(p)
            for gradient, a in zip(self.blocks(p.grad), self.blocks(total)):
                gradient.copy_(a.double() / (self.n * self.unit))
        overflow = torch.where(too_large > 0, math.inf, 0.0)
        self.parameters[0].grad += overflow
        loss = (self.sums[-1].double() * self.LOSS_UNIT / (self.n * self.unit)).float() + overflow
        torch._foreach_zero_(self.sums)
        self.largest = torch.zeros_like(self.largest)
        return loss

    def blocks(self, tensor):
        return tensor.reshape(-1).split(self.BLOCK)


def rehearse(training, micro_batch_size, seq_length):
    """Take two passes of a train.Training over rows of zeros and forget their gradients.

    DDP notes in its first pass in which order gradients come and lays out its messages in that
    order from the second on. The layout decides how sums round. Without a rehearsal, a resumed run
    would take its first pass at a step that an unbroken run took with the second layout.
    """
    communicate(training.wrapped, last=True)
    for _ in range(2):
        training.optimizer.zero_grad(set_to_none=True)  # the first layout goes before the second
        training.loss(torch.zeros(micro_batch_size, seq_length + 1, dtype=torch.int64)).backward()
    forget_gradients(training.wrapped, training.optimizer)


def compute_dtype(name, device):
    """Return the dtype of the matmuls: the named one, but on a CPU float32 for float16.

    Raises ValueError for bfloat16 on a CPU that cannot multiply its matrices (AMX).
    """
    if device.type == "cpu" and name == "float16":
        return torch.float32
    if device.type == "cpu" and name == "bfloat16" and not torch.cpu._is_amx_tile_supported():
        raise ValueError("dtype = 'bfloat16': this CPU has no AMX, where it would be slower than "
                         "float32; --dtype=float32")
    return getattr(torch, name)


class LossScaler:
    """DeepSpeed's dynamic loss scale with Pythia's settings; its memory is `state`, a JSON object.

    Only float16 needs one; otherwise the scale is 1 and the state does not change. On an overflow
    the update is skipped and the learning rate does not advance, but the data does. The first
    overflow is forgiven (hysteresis 2, restored only when the scale grows), later ones halve the
    scale, down to 1, at which an overflow ends the run. 1000 iterations without one double it.
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
        if overflow and state["hysteresis"] > 1:
            state["hysteresis"] -= 1
        elif overflow:
            state["scale"] = max(state["scale"] / 2, 1.0)
        elif (state["iteration"] - state["last_overflow"]) % 1000 == 0:
            state["scale"] *= 2
            state["hysteresis"] = 2
        if overflow:
            state["last_overflow"] = state["iteration"]
        state["iteration"] += 1


# ---------------------------------------------------------------------------- what it costs

# Dense peak of the tensor cores in FLOP/s at 16 bits, from the makers' data sheets; where one gives
# it with sparsity only, half of that.
GPU_PEAKS = {"V100": 125e12, "A100": 312e12, "A100 PCIe": 312e12, "A40": 150e12, "A6000": 155e12,
             "L4": 121e12, "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12,
             "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12,
             "H200 NVL": 835e12, "GH200": 990e12, "B200": 2250e12}
USABLE = 0.92  # of a GPU's memory; the rest is the CUDA context, NCCL's buffers and fragments


@dataclass(frozen=True)
class PlanConfig:
    plan: bool = False  # print what the run needs and how to launch it, and end
    gpus: int = 1
    gpu: str = "A100"  # one of GPU_PEAKS
    gpu_memory: float = 80.0  # GB (10^9 bytes) of each
    mfu: float = 0.4  # fraction of the peak that the run will reach: measure yours on one GPU first

    def __post_init__(self):
        check(self, f"one of {', '.join(GPU_PEAKS)}", lambda value: value in GPU_PEAKS, "gpu")
        check(self, "at least 1", lambda value: value >= 1, "gpus", "gpu_memory")
        check(self, "more than 0, at most 1", lambda value: 0 < value <= 1, "mfu")


def flops_per_token(config):
    """Return the matmul FLOPs of one token's forward and backward pass, attention causal."""
    matrices = config.n_layers * 12 * config.d_model**2 + config.vocab_size * config.d_model
    return 6 * matrices + 6 * config.n_layers * config.d_model * config.seq_length


@functools.cache
def peak_flops(device):
    """Return the device's peak in FLOP/s: known for a GPU (else nan), measured once for a CPU."""
    if device.type == "cpu":
        return matmul_flops()
    return gpu_peak(torch.cuda.get_device_name(device))


def gpu_peak(name):
    """Return the peak of a GPU in FLOP/s; nan for one that is not in the table, or a part of one.

    Its name without maker, socket and memory is in the table: "NVIDIA A100-SXM4-80GB" is an A100.
    """
    model = re.sub(r"NVIDIA |Tesla |GeForce |RTX (?=A)|[ -](SXM\d|\d+GB?|HBM3e?)\b", "", name)
    peaks = {key.upper(): peak for key, peak in GPU_PEAKS.items()}
    return peaks.get(model.replace("-", " ").upper(), math.nan)


def matmul_flops():
    """Return the FLOP/s of the CPU's fastest matmul of five, float32."""
    a, seconds = torch.randn(2048, 2048), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * len(a)**3 / min(seconds)


def parameter_counts(config):
    """Return how many parameters a block has, and how many the embeddings and the last norm."""
    D = config.d_model
    return 12 * D**2 + 13 * D, 2 * (config.vocab_size + 1) * D


def memory_per_process(config, launch, processes, micro_batch_size, accumulates, itemsize=2,
                       head_rows=2048):
    """Return {what: bytes} of one process, and under "peak" the most of it that is there at once.

    itemsize: bytes of the matmuls' dtype, 4 or 2; head_rows: rows of logits in a block of the loss.
    Counted from the tensors that autograd keeps; held to measured peaks at 14m and 70m in float32
    on a CPU (tests/test_parallel.py, tests/test_model.py); on an H100 bf16 peaks from 70m to 1b
    were within 2 % (python bench.py gpu).
    """
    D, V, L = config.d_model, config.vocab_size, config.n_layers
    N = micro_batch_size * config.seq_length
    block, embeddings = parameter_counts(config)
    sharded, cast = launch.sharding == "fsdp" and processes > 1, itemsize if itemsize < 4 else 0
    own = (L * block + embeddings) / (processes if sharded else 1)
    weights, gradients, moments = 4 * own, 4 * own, 8 * own
    if sharded:  # gathered: the root for the whole pass, blocks by twos
        weights += 4 * embeddings + 2 * itemsize * block
        gradients += 4 * embeddings + (4 + itemsize) * block
        if accumulates:  # whole until the last micro-batch, which alone communicates
            gradients += 4 * L * block
    else:  # autograd keeps cast weights for the backward pass; what is computed again is cast again
        weights += cast * block * (1 if launch.activation_checkpointing else L)
    # A block keeps the residual stream (float32), both norms' outputs, q k v, rotated q and k,
    # attention's output (2 + 3 + 2 + 1), and the MLP's hidden layer before and after GELU (4 + 4).
    kept = N * D * (4 + 16 * itemsize)
    activations = L * 4 * N * D + kept if launch.activation_checkpointing else L * kept
    activations += 8 * N * D  # the last norm's input and the gradient of its output
    # Cast: what comes from a matmul, and what goes into one. Or one block's backward pass is more.
    logits = min(head_rows, N) * V * (4 + 2 * cast)
    loss = 4 * V * D + max(logits + 2 * cast * V * D, 9 * itemsize * N * D)
    passing = activations + loss  # without other micro-batches they go while gradients come
    both = gradients + passing if processes > 1 or accumulates else max(gradients, passing)
    return {"weights": weights, "gradients": gradients, "moments": moments,
            "activations": activations, "loss blocks": loss, "peak": weights + moments + both}


def plan(config, training, launch, options, n_checkpoints):
    """Print what a run needs on `options.gpus` GPUs, and the command that keeps its batches."""
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
                         f"{training.batch_size}: the batch would change")
    share, room = training.batch_size // options.gpus, options.gpu_memory * 1e9 * USABLE
    itemsize, fits = getattr(torch, training.dtype).itemsize, 0
    print(f"\nGB a GPU with sharding={launch.sharding}, "
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
          f"{training.batch_size} sequences a step, as ever")
