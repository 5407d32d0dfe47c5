"""Checkpoints to the disk and into a model, beside safetensors.torch and torch.save."""

import json
import math
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.process import forked
from benchmarks.training import Train, sized
from checkpoints import load_model
from model import Pythia
from weights.layout import hf_config, parameter_shapes
from weights.tensors import write_file


@dataclass(frozen=True)
class Checkpoints:
    size: str = "160m"
    rounds: int = 5
    folder: str = "."  # on the disk to measure


def checkpoints(options):
    """Time and peak memory of saving and loading, beside safetensors.torch and torch.save."""
    from safetensors.torch import load_file, save_file
    config = sized(Train(size=options.size))[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder, out = Path(folder), Path(folder) / "out"

        def weights(dtype=torch.float32):
            return {name: torch.full(shape, 0.5, dtype=dtype)
                    for name, shape in parameter_shapes(config).items()}

        def published():
            write_file(folder / "model.safetensors", weights(torch.float16))
            torch.save(weights(torch.float16), folder / "pytorch_model.bin")
            (folder / "config.json").write_text(json.dumps(hf_config(config)))

        def synced(save):
            def run(tensors):
                save(tensors)
                with open(out, "rb") as file:
                    os.fsync(file.fileno())
            return run

        def fill(tensors):
            with torch.device("meta"):
                model = Pythia(config)
            state = {name.removeprefix("gpt_neox."): tensor.float()
                     for name, tensor in tensors.items()}
            model.load_state_dict(state, assign=True)

        forked(published)
        tasks = {
            "save": (weights, {"ours": lambda tensors: write_file(out, tensors),
                               "safetensors.torch": synced(lambda tensors: save_file(tensors, out)),
                               "torch.save": synced(lambda tensors: torch.save(tensors, out))}),
            "load": (lambda: None, {
                "ours": lambda _: load_model(folder),
                "safetensors.torch": lambda _: fill(load_file(folder / "model.safetensors")),
                "torch.load": lambda _: fill(torch.load(folder / "pytorch_model.bin"))})}
        size = 4 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
        print(f"{options.size}, {size / 1e6:,.0f} MB in float32, {options.rounds} rounds; medians")
        for task, (prepared, contenders) in tasks.items():
            results = {who: [] for who in contenders}
            for _ in range(options.rounds):
                for who, run in contenders.items():
                    results[who].append(forked(run, prepared))
            for who, taken in results.items():
                ratio = statistics.median(theirs[0] / ours[0]
                                          for ours, theirs in zip(results["ours"], taken))
                print(f"{task} {who:20} {statistics.median(t[0] for t in taken):6.2f} s   "
                      f"ours is {ratio:5.2f}x   peak memory "
                      f"{max(t[1] for t in taken) * 1024 / size:.2f} of the model")
