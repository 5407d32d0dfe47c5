"""Print the planned memory of a training step over the measured peak of this process.

    python tests/measure_memory.py MICRO_BATCHES configs/pythia_14m.py --seq_length=256
"""

import sys

import torch

from config import parse
from model import ModelConfig, Pythia
from parallel import LaunchConfig, Processes, memory_per_process, parallelize
from train import TrainConfig, make_optimizer


def status(key):
    """Return an entry of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def steps(model, config, batch, accumulation):
    """Take a step, and the backward passes of a second one, now beside Adam's moments."""
    optimizer = make_optimizer(model, config)
    for _ in range(accumulation):
        model(batch, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for _ in range(accumulation):
        model(batch, batch).backward()


def main(accumulation, shape, config, launch):
    batch = torch.randint(500, (launch.micro_batch_size, shape.seq_length))
    small = Pythia(ModelConfig(1, 512, 8, vocab_size=512))
    steps(small, config, batch[:, :64], 1)  # what the libraries take for themselves
    before = status("VmRSS")
    with torch.device("meta"):
        model = Pythia(shape)
    parallelize(model, launch, torch.float32, Processes("cpu"))
    model.init_weights(0)
    steps(model, config, batch, accumulation)
    planned = memory_per_process(shape, launch, 1, launch.micro_batch_size, accumulation > 1, 4,
                                 512)["peak"]
    print(planned / (status("VmHWM") - before))


if __name__ == "__main__":
    main(int(sys.argv[1]), *parse(sys.argv[2:], ModelConfig, TrainConfig, LaunchConfig))
