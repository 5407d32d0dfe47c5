"""What two checkpoints differ in, and what a run holds.

    python checkpoints.py diff runs/mini/step512 OTHER
    python checkpoints.py list runs/mini
"""

import csv
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import is_whole, read_training, step_folders
from weights.huggingface import open_any


@dataclass(frozen=True)
class Diff:
    a: str  # a checkpoint folder of any published form
    b: str


def diff(options):
    """Compare two checkpoints tensor by tensor; exit code 1 if they differ."""
    (config_a, a), (config_b, b) = open_any(options.a), open_any(options.b)
    fields = asdict(config_a), asdict(config_b)
    configs = [name for name in fields[0] if fields[0][name] != fields[1][name]]
    for name in configs:
        print(f"config: {name} is {fields[0][name]} and {fields[1][name]}")
    print(f"{'tensor':50} {'shape':>14} {'max |a-b|':>10} {'mean |a-b|':>10} {'|a-b|/|b|':>10}")
    differing = sorted(a.keys() ^ b.keys())
    for name in differing:
        print(f"{name:50} only in {options.a if name in a else options.b}")
    for name in tqdm([name for name in a if name in b], disable=None, leave=False):
        line = f"{name:50} {'x'.join(map(str, a[name].shape)):>14}"
        if a[name].shape != b[name].shape:
            differing.append(name)
            tqdm.write(f"{line} {'x'.join(map(str, b[name].shape)):>14} in {options.b}")
            continue
        largest, total, square, norm, equal = torch.zeros(()).double(), 0.0, 0.0, 0.0, True
        chunks = (stored.read().reshape(-1).split(1 << 20) for stored in (a[name], b[name]))
        for x, y in zip(*chunks):
            x, y = x.double(), y.double()
            delta = (x - y).abs()
            equal = equal and torch.equal(x, y)
            largest = largest.maximum(delta.max())  # Python's max would lose a NaN
            total += delta.sum().item()
            square, norm = square + delta.square().sum().item(), norm + y.square().sum().item()
        if not equal:
            differing.append(name)
        tqdm.write(f"{line} {largest:10.3g} {total / max(1, math.prod(a[name].shape)):10.3g} "
                   + (f"{math.sqrt(square / norm):10.3g}" if norm else f"{'-':>10}"))
    print(f"{len(differing)} of {len(a.keys() | b.keys())} tensors differ"
          + (f", dtypes {_dtypes(a)} and {_dtypes(b)}" if _dtypes(a) != _dtypes(b) else "")
          + (f"; configs differ: {', '.join(configs)}" if configs else ""))
    if differing or configs:
        sys.exit(1)


def _dtypes(tensors):
    names = {str(stored.dtype).removeprefix("torch.") for stored in tensors.values()}
    return "/".join(sorted(names))


@dataclass(frozen=True)
class List:
    run: str  # run folder


def list_(options):
    """List a run's checkpoints: step, tokens, loss there, size, what is in them."""
    if not Path(options.run).is_dir():
        raise ValueError(f"{options.run}: no such folder")
    folders = step_folders(options.run)
    if not folders:
        raise ValueError(f"{options.run}: no step0, step1, ... in it")
    losses = read_losses(Path(options.run) / "metrics.csv")
    print(f"{'step':>7} {'tokens':>15} {'loss':>8} {'size':>11}  contents")
    total = 0
    for step, folder in folders:
        try:
            training, damage = read_training(folder, step), ""
        except ValueError as error:
            training, damage = {}, f" ({error})"
        files = [path for path in folder.iterdir() if path.is_file()]
        bytes_ = sum(path.stat().st_size for path in files)
        total += bytes_
        loss = losses.get(str(step))  # of the batch that these weights met next
        tokens = f"{training['tokens']:,}" if type(training.get("tokens")) is int else "-"
        print(f"{step:7} {tokens:>15} {f'{loss:.4f}' if loss is not None else '-':>8} "
              f"{bytes_ / 1e6:8,.1f} MB  {contents(folder, files)}{damage}")
    print(f"{len(folders)} checkpoints, {total / 1e9:,.2f} GB")


def read_losses(path):
    """Return {step: loss} of a run's metrics.csv, but for lines that a crash left unreadable."""
    losses = {}
    if path.exists():
        with open(path, newline="", errors="replace") as file:
            for row in csv.DictReader(file):
                try:
                    losses[row["step"]] = float(row["loss"])
                except (KeyError, TypeError, ValueError):
                    pass
    return losses


def contents(folder, files):
    """Return what a checkpoint holds, in words."""
    names = [path.name for path in files]
    held = [word for word, start in (
                ("weights", ("model", "pytorch_model", "layer_")), ("state", "optimizer"),
                ("tokenizer", "tokenizer.json"), ("manifest", "manifest.json"))
            if any(name.startswith(start) for name in names)]
    return ", ".join(held) + ("" if is_whole(folder) else ": NOT WHOLE")
