"""A training step beside transformers', the launch of a run, growth with each dimension."""

import csv
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.process import forked, peak_memory
from config import parse
from data import OrderedData, samples_needed
from model import ModelConfig, Pythia
from plots import read_csv
from train import TrainConfig, make_optimizer
from training.parallel import LaunchConfig, Processes, parallelize
from training.plan import flops_per_token, matmul_flops, memory_per_process
from weights.layout import hf_config

CONTENDERS = ("ours", "ours compiled", "ours, plain loss", "transformers", "transformers compiled")


@dataclass(frozen=True)
class Train:
    size: str = "14m"
    batch: int = 4  # sequences
    seq_length: int = 512
    rounds: int = 7
    threads: int = 2


def flags_of(options):
    """Return train.py's arguments for a size at this benchmark's sequence length."""
    return [f"configs/pythia_{options.size.replace('.', '_')}.py",
            f"--seq_length={options.seq_length}"]


def sized(options):
    """Return the ModelConfig and TrainConfig of a size at this benchmark's sequence length."""
    return parse([*flags_of(options), "--gelu=erf"], ModelConfig, TrainConfig, LaunchConfig)[:2]


def train(options):
    """Time a training step of every contender in turn; print speed, ratio, peak memory."""
    config, _ = sized(options)
    torch.set_num_threads(options.threads)
    flags = [f"--{name}={getattr(options, name)}"
             for name in ("size", "batch", "seq_length", "threads")]
    workers = {who: subprocess.Popen(
        [sys.executable, "bench.py", "worker", f"--who={who}", *flags], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE) for who in CONTENDERS}

    def step(who):
        try:
            print("step", file=workers[who].stdin, flush=True)
            seconds, memory = workers[who].stdout.readline().split()
        except (BrokenPipeError, ValueError):
            raise ValueError(f"{who}: its process ended, see above") from None
        return float(seconds), int(memory)

    for who in CONTENDERS:
        step(who), step(who)  # warm up, compile, let Adam allocate
    taken, memory, peaks = {who: [] for who in CONTENDERS}, {}, []
    for _ in range(options.rounds):
        peaks.append(matmul_flops())
        for who in CONTENDERS:
            seconds, memory[who] = step(who)
            taken[who].append(seconds)
    for worker in workers.values():
        worker.communicate()
    tokens = options.batch * options.seq_length
    peak = statistics.median(peaks)
    print(f"{options.size}, {options.batch} x {options.seq_length} tokens, float32, "
          f"{options.threads} threads, {options.rounds} rounds, "
          f"matmul peak {peak / 1e9:.0f} GFLOP/s; medians")
    print(f"{'':22} {'tokens/s':>9} {'of peak':>8} {'ours is':>8} {'memory':>9} {'ours uses':>9}")
    for who in CONTENDERS:
        speed = tokens / statistics.median(taken[who])
        ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken[who]))
        print(f"{who:22} {speed:9,.0f} {speed * flops_per_token(config) / peak:8.0%} {ratio:7.2f}x "
              f"{memory[who] / 1024:6,.0f} MB {memory['ours'] / memory[who]:8.2f}x")


@dataclass(frozen=True)
class Worker(Train):
    who: str = "ours"


def worker(options):
    """Take a training step for every line of input; print its seconds and peak memory in KiB."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config, training = sized(options)
    tokens = torch.randint(50277, (options.batch, options.seq_length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if options.who.startswith("ours"):
        with torch.device("meta"):
            model = Pythia(config)
        launch = LaunchConfig(compile="compiled" in options.who)
        parallelize(model, launch, torch.float32, Processes("cpu"))  # all as in train.py
        model.init_weights(0)
        loss_of = lambda: model(inputs, targets)
        if "plain" in options.who:  # the logits whole, as everybody writes it
            loss_of = lambda: F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    else:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**hf_config(config)))
        compiled = torch.compile(model) if "compiled" in options.who else model
        loss_of = lambda: compiled(input_ids=inputs, labels=inputs, use_cache=False).loss
    optimizer = make_optimizer(model, training)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(time.perf_counter() - start, peak_memory(), flush=True)


@dataclass(frozen=True)
class Start:
    data: str = "data/demo/train"
    size: str = "14m"
    batch: int = 4  # sequences
    seq_length: int = 512
    rounds: int = 3


def start(options):
    """Time the launch of a run up to its first step, and a batch's reading beside computing it."""
    flags = [*flags_of(options), f"--data={options.data}", f"--batch_size={options.batch}",
             f"--micro_batch_size={options.batch}", "--steps=100", "--stop_at=8",
             "--checkpoint_every=100", "--log_every=1"]
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            command = [sys.executable, "train.py", *flags, f"--out_dir={folder}/run"]
            with subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL) as process:
                first = next((time.perf_counter() - began for line in process.stdout
                              if line.startswith("step")), None)
                process.stdout.read()
            if process.returncode:
                raise ValueError(f"train.py {' '.join(flags)}: ended with {process.returncode}")
            steps = [float(row["seconds"]) for row in read_csv(f"{folder}/run/metrics.csv")]
        num_samples = samples_needed(100, options.batch)
        data = OrderedData(options.data, options.seq_length, num_samples, 1234)
        began = time.perf_counter()
        for step in range(100):
            data.batch(step, options.batch)
        batch = (time.perf_counter() - began) / 100
        print(f"first step after {first:.1f} s (it takes {steps[0]:.2f} s of them, with the "
              f"initialisation's checkpoint before it); a batch is read in {batch * 1e3:.2f} ms, "
              f"{batch / statistics.median(steps):.2%} of a step")


@dataclass(frozen=True)
class Growth:
    output: str = "growth.csv"
    rounds: int = 3
    threads: int = 2


# The middle of each axis is the common point; the head's vocabulary is small: the blocks show.
AXES = {"d_model": (64, 128, 256, 512), "n_layers": (2, 4, 8, 16),
        "seq_length": (128, 256, 512, 1024), "batch": (1, 2, 4, 8)}
COMMON = {"d_model": 256, "n_layers": 4, "seq_length": 256, "batch": 4}


def growth(options):
    """Measure a step per token while one axis doubles; write a CSV beside what is expected."""
    torch.set_num_threads(1)  # a fork must not inherit OpenMP's threads
    last, rows = multiprocessing.Value("d"), []

    def steps(model, tokens, threads=options.threads):
        torch.set_num_threads(threads)
        optimizer = make_optimizer(model, TrainConfig(data="", learning_rate=1e-3))
        for _ in range(3):
            began = time.perf_counter()
            model(tokens, tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        last.value = time.perf_counter() - began

    small = ModelConfig(1, 64, 2, vocab_size=512, seq_length=64)
    # The libraries take their own memory before any fork.
    steps(Pythia(small), torch.zeros(2, 64, dtype=torch.int64), 1)
    for axis, values in AXES.items():
        for value in values:
            shape = COMMON | {axis: value}
            batch = shape.pop("batch")
            config = ModelConfig(n_heads=shape["d_model"] // 32, vocab_size=512, **shape)
            tokens = torch.randint(512, (batch, config.seq_length))
            runs = []
            for _ in range(options.rounds):
                _, memory = forked(lambda model: steps(model, tokens), lambda: Pythia(config))
                runs.append((last.value, memory * 1024))
            seconds, memory = (min(column) for column in zip(*runs))
            launch = LaunchConfig(micro_batch_size=batch)
            expected = memory_per_process(config, launch, 1, batch, False, 4, 512)["peak"]
            n, flops = tokens.numel(), flops_per_token(config)
            rows.append((axis, value, seconds / n, flops, memory / n, expected / n))
            print(f"{axis:10} {value:5} {seconds / n * 1e6:9.2f} us a token, "
                  f"{flops * n / seconds / 1e9:6.1f} GFLOP/s; {memory / n / 1e3:8.1f} kB a token, "
                  f"{expected / n / 1e3:8.1f} expected", flush=True)
    with open(options.output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("axis", "value", "seconds_per_token", "flops_per_token", "bytes_per_token",
                         "expected_bytes_per_token"))
        writer.writerows(rows)
