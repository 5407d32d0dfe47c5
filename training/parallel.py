"""Where a run is computed, never what: processes, their signals, sharding, recomputation.

DDP keeps every weight on every process and averages gradients; FSDP2 (`fully_shard`) keeps 1/n of
weights, gradients and moments on each of n processes and gathers one block at a time. Both see the
same batches and take the same steps, in float32 to 1e-6 (tests/test_parallel.py). At 16 bits they
differ: FSDP rounds the blocks' LayerNorm weights too, as Pythia's own fp16 weights were, where
autocast leaves them in float32. What is saved has one form.
"""

import ctypes
import functools
import os
import signal
import sys
import time
import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


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


class Processes:
    """This process among those torchrun started; alone, rank 0 of 1."""

    def __init__(self, device):
        self.rank, self.count, local_rank, local_count = (
            int(os.environ.get(name, default)) for name, default in
            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda', but this torch sees no GPU; "
                             "--device=cpu computes without")
        if device == "cuda":
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            keep_freed_memory()
            if local_count > 1:
                torch.set_num_threads(max(1, os.cpu_count() // local_count))  # torchrun sets 1
        if self.count > 1:
            # What the hosts exchange goes over gloo, past the GPUs, which need not stop for it.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

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
        flag = torch.tensor(float(flag))  # on the host: over gloo
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def together(self, act, first_alone=False):
        """Return act(), once every process has done it, or the first for all (None elsewhere).

        A mistake in one of them ends all, and is told by those alone that met it, by the first for
        all if they met the same.
        """
        result = problem = None
        try:
            if self.rank == 0 or not first_alone:
                result = act()
        except Exception as error:
            problem = error
        if self.any(problem is not None):
            words = torch.tensor(float(zlib.crc32(str(problem).encode())))
            same = self.mean(words) == float(words)
            raise SystemExit(2) if problem is None or (self.rank > 0 and same) else problem
        return result


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


def keep_freed_memory():
    """Let glibc keep freed blocks of 32 MB and more for the next step, as CUDA's allocator does.

    It gives them back to the system otherwise, whose zeroing of fresh pages cost 7 % of a step at
    14m and at 70m; the peak grows by 2 to 4 %.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's top stays


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


def is_shard(tensor):
    """Return whether a tensor is a DTensor, a process's shard of a whole one."""
    return hasattr(tensor, "full_tensor")  # importing DTensor takes a second


@torch.no_grad()
def fill(tensor, whole):
    """Copy a whole tensor into `tensor`, which may be a process's shard of it."""
    if is_shard(tensor):  # every process has the whole, so none is sent
        from torch.distributed.tensor import distribute_tensor
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements,
                                  src_data_rank=None)
    tensor.copy_(whole)


def compute_dtype(name, device):
    """Return the dtype of the matmuls: as named on a GPU, float32 on a CPU, slow at any other."""
    return getattr(torch, name) if device.type == "cuda" else torch.float32


def make_deterministic():
    """Let every operation give the same bits on every rerun, or raise where it cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
