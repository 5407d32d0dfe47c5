"""Measure ourselves beside what one would use instead, in turn, in one run on one machine.

    python bench.py train --size=14m           # an optimizer step, beside transformers
    python bench.py start --size=14m           # from the command to the first step
    python bench.py tokenize                   # documents to ids, beside the tokenizers library
    python bench.py find                       # the search of 2 GB of tokens
    python bench.py checkpoints --size=160m    # beside safetensors.torch and torch.save
    python bench.py memorization               # rows scored, beside transformers' generate
    python bench.py eval --docs=DIR            # beside lm_eval; pip install lm_eval accelerate

Times are medians, and a ratio is the median of the rounds' ratios. `train` gives each contender a
process of its own, for peak memory is a process's. All of them, ours and theirs, start with the
variables of ALLOCATOR, so that glibc keeps freed memory for all or for none.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import eval as harness
from checkpoints import hf_config, load_model, save
from config import command, parse, Processes, write_json
from data import OrderedData, samples_needed, TokenFile, TokenWriter
from model import ModelConfig, Pythia
from plan import flops_per_token, matmul_flops
from plots import read_csv
from studies.memorization import matched_lengths
from tokenizer import load_tokenizer
from train import LaunchConfig, make_optimizer, parallelize, TrainConfig

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
TOKENIZER = "20B_tokenizer.json"


@dataclass(frozen=True)
class Bench:
    size: str = "70m"  # of the model
    rounds: int = 5
    threads: int = 2
    batch: int = 4  # train, start: sequences a step
    seq_length: int = 512  # train, start: tokens of a sequence; of the model
    data: str = "data/demo/train"  # start, find: PREFIX of token files; tokenize: of .jsonl
    docs: str = ""  # eval: folder of evaluation sets, as for eval.py
    documents: int = 48  # eval: of each task
    folder: str = "."  # find, checkpoints: on the disk to measure


def in_turn(rounds, contenders):
    """Call every function in every round; return {name: seconds} and {name: last value}."""
    seconds, values = {name: [] for name in contenders}, {}
    for _ in range(rounds):
        for name, act in contenders.items():
            began = time.perf_counter()
            values[name] = act()
            seconds[name].append(time.perf_counter() - began)
    return seconds, values


def in_processes(rounds, contenders):
    """Do the same with what each (function, arguments) returns; the values are peak memory, MB."""
    os.environ.update(ALLOCATOR)  # glibc reads it when a process starts
    pools = {name: ProcessPoolExecutor(1, get_context("spawn"), _prepare, contender)
             for name, contender in contenders.items()}
    acts = {name: lambda pool=pool: pool.submit(_act_once).result() for name, pool in pools.items()}
    in_turn(2, acts)  # to warm up: compile, let Adam allocate
    measured = in_turn(rounds, acts)
    for pool in pools.values():
        pool.shutdown()
    return measured


def _prepare(function, *arguments):
    global _act
    _act = function(*arguments)


def _act_once():
    _act()
    status = Path("/proc/self/status").read_text()  # Linux
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def report(amount, unit, seconds, memory=None):
    """Print each contender's speed and memory, and what ours are in comparison."""
    for who, taken in seconds.items():
        ratio = median(theirs / ours for theirs, ours in zip(taken, seconds["ours"]))
        used = (f"; {memory[who]:,.0f} MB, ours uses {memory['ours'] / memory[who]:.2f}x"
                if memory else "")
        print(f"  {who:24} {amount / median(taken):10,.2f} {unit}/s, ours is {ratio:.2f}x{used}")


def flags_of(options):
    """Return train.py's arguments for a size and this sequence length."""
    return [f"configs/pythia_{options.size.replace('.', '_')}.py", "--gelu=erf",
            f"--seq_length={options.seq_length}"]


def configs(options):
    """Return the ModelConfig and TrainConfig of a size."""
    return parse(flags_of(options), ModelConfig, TrainConfig, LaunchConfig)[:2]


# ---------------------------------------------------------------------------- training


def training_step(who, options):
    """Return a function that takes an optimizer step: forward, backward, clip, fused AdamW."""
    torch.set_num_threads(options.threads)
    config, training = configs(options)
    tokens = torch.randint(50277, (options.batch, options.seq_length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    compiled = "compiled" in who
    if "transformers" in who:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # pip install transformers
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**hf_config(config)))
        called = torch.compile(model) if compiled else model
        loss_of = lambda: called(input_ids=inputs, labels=inputs, use_cache=False).loss
    else:
        with torch.device("meta"):
            model = Pythia(config)
        parallelize(model, LaunchConfig(compile=compiled), torch.float32, Processes("cpu"))
        model.init_weights(0)
        loss_of = lambda: model(inputs, targets)
        if "plain loss" in who:  # holds all logits at once, as everybody writes it
            loss_of = lambda: F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    optimizer = make_optimizer(model, training)

    def step():
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train(options):
    """Time an optimizer step in float32 on the CPU, beside transformers; print peak memory."""
    torch.set_num_threads(options.threads)
    peak, tokens = matmul_flops(), options.batch * options.seq_length
    print(f"{options.size}, {options.batch} x {options.seq_length} tokens, float32, "
          f"{options.threads} threads, {options.rounds} rounds, all processes with "
          + " ".join(f"{name}={value}" for name, value in ALLOCATOR.items()), flush=True)
    seconds, memory = in_processes(options.rounds, {
        who: (training_step, who, options) for who in (
            "ours", "ours compiled", "ours, plain loss", "transformers", "transformers compiled")})
    report(tokens, "tokens", seconds, memory)
    config, _ = configs(options)
    share = tokens / median(seconds["ours"]) * flops_per_token(config) / peak
    print(f"  ours is at {share:.0%} of {peak / 1e9:.0f} GFLOP/s, this machine's own matmul")


def start(options):
    """Time train.py from the command to its first step, and the reading of a batch."""
    command = [sys.executable, "train.py", *flags_of(options), f"--data={options.data}",
               f"--batch_size={options.batch}", f"--micro_batch_size={options.batch}",
               "--steps=100", "--stop_at=8", "--log_every=1"]
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            process = subprocess.Popen([*command, f"--out_dir={folder}/run"], text=True,
                                       env=os.environ | ALLOCATOR, stdout=subprocess.PIPE)
            for line in process.stdout:
                if line.startswith("step"):
                    print(f"first step after {time.perf_counter() - began:.1f} s", end="; ")
                    break
            process.communicate()
            step = median(float(row["seconds"]) for row in read_csv(f"{folder}/run/metrics.csv"))
        n = samples_needed(100, options.batch)
        data = OrderedData(options.data, options.seq_length, n, 1234)
        seconds, _ = in_turn(100, {"read": lambda: data.batch(7, options.batch)})
        batch = median(seconds["read"])
        print(f"a batch is read in {batch * 1e3:.2f} ms, {batch / step:.2%} of a step")


def tokenize(options):
    """Time the encoding of documents on one core, beside the tokenizers library."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer  # pip install tokenizers
    ours, theirs = load_tokenizer(TOKENIZER), Tokenizer.from_file(TOKENIZER)
    with open(f"{options.data}.jsonl", encoding="utf8") as file:
        texts = [json.loads(line)["text"] for line in file]
    seconds, ids = in_turn(options.rounds, {
        "ours": lambda: [ours.encode_array(text).tolist() for text in texts],
        "encode": lambda: [theirs.encode(text).ids for text in texts],
        "encode_batch_fast": lambda: [one.ids for one in theirs.encode_batch_fast(texts)]})
    report(sum(len(text.encode()) for text in texts) / 1e6, "MB", seconds)
    print("  the same ids:", ids["ours"] == ids["encode"] == ids["encode_batch_fast"])


def find(options):
    """Time the search of a text and of a token in 2 GB, on one core and on all."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tokens, writer = TokenFile(options.data), TokenWriter(f"{folder}/long", "bench")
        for _ in range(10**9 // tokens.n_tokens + 1):
            writer.append(tokens.slice(0, tokens.n_tokens), tokens.sizes)
        writer.finish({})
        for pattern in ("--text=the waters of Shiloah", "--tokens=45190"):
            for workers in (1, os.cpu_count()):
                done = subprocess.run(
                    [sys.executable, "batch_viewer.py", "find", f"--data={folder}/long", pattern,
                     f"--workers={workers}", "--steps=1", "--batch_size=1"],
                    text=True, stdout=subprocess.PIPE, check=True)
                print(f"{pattern}, {workers} process(es): {done.stdout.splitlines()[-1]}")


# ---------------------------------------------------------------------------- models


def saved(options, folder):
    """Return our model of a size, freshly initialised, and save it as FOLDER/step0."""
    config, training = configs(options)
    torch.set_num_threads(options.threads)
    model = Pythia(config).eval()
    save(folder, 0, model, make_optimizer(model, training), {"updates": 0, "tokens": 0}, TOKENIZER)
    return model


def checkpoints(options):
    """Time float32 weights to the disk, ours also hashed, and float16 ones into a model."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, tensors = saved(options, folder), load_file(f"{folder}/step0/model.safetensors")
        half, out = {name: tensor.half() for name, tensor in tensors.items()}, f"{folder}/out"
        save_file(half, f"{folder}/model.safetensors", metadata={"format": "pt"})
        torch.save(half, f"{folder}/pytorch_model.bin")
        write_json(f"{folder}/config.json", hf_config(model.config))

        def write_ours():
            shutil.rmtree(f"{folder}/step0", ignore_errors=True)  # the others overwrite their file
            save(folder, 0, model, torch.optim.AdamW(model.parameters()), {"updates": 0,
                                                                           "tokens": 0})

        def write(function):
            function(tensors, out)
            with open(out, "rb") as file:
                os.fsync(file.fileno())

        def fill(tensors):
            with torch.device("meta"):
                loaded = Pythia(model.config)
            loaded.load_state_dict({name.removeprefix("gpt_neox."): tensor.float()
                                    for name, tensor in tensors.items()}, assign=True)

        megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        for act, contenders in {"save": {
                "ours": write_ours, "safetensors.torch": lambda: write(save_file),
                "torch.save": lambda: write(torch.save)}, "load": {
                "ours": lambda: load_model(folder),
                "safetensors.torch": lambda: fill(load_file(f"{folder}/model.safetensors")),
                "torch.load": lambda: fill(torch.load(f"{folder}/pytorch_model.bin"))}}.items():
            print(f"{act} {options.size}, {megabytes:,.0f} MB in float32")
            report(megabytes, "MB", in_turn(options.rounds, contenders)[0])


def memorization(options):
    """Time the scoring of 64 rows for (32, 32), beside transformers' greedy generation."""
    from transformers import GPTNeoXForCausalLM  # pip install transformers
    with tempfile.TemporaryDirectory() as folder:
        model = saved(options, folder)
        theirs = GPTNeoXForCausalLM.from_pretrained(f"{folder}/step0", dtype=torch.float32)
    prompt, other = torch.randint(2, 50277, (2, 64, 32))
    right = model.generate(prompt, 32, temperature=0)
    for name, rows in (("wrong at once", torch.cat([prompt, other], 1)), ("all right", right)):
        seconds, values = in_turn(options.rounds, {
            "ours": lambda: matched_lengths(model, rows, 32).float().mean().item(),
            "transformers' generate": lambda: theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False,
                eos_token_id=None, pad_token_id=0)})
        print(f"{options.size}, rows {name}: {values['ours']:.1f} of 32 tokens")
        report(64, "rows", seconds)
    print("  both generate the same:", torch.equal(values["transformers' generate"], right))


def evaluation(options):
    """Time the same requests with ours and lm_eval's HFLM (batches of 8), and generation."""
    from lm_eval.api.instance import Instance  # pip install lm_eval accelerate
    from lm_eval.models.huggingface import HFLM
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = saved(options, folder), load_tokenizer(TOKENIZER)
        theirs = HFLM(f"{folder}/step0", dtype="float32", device="cpu", batch_size=8)
    for task, shots in (("lambada_openai", 0), ("hellaswag", 0), ("piqa", 0), ("mmlu_anatomy", 5)):
        requests = harness.prepare(task, options.docs, shots, limit=options.documents).requests
        asked = [Instance("loglikelihood", {}, request, 0) for request in requests]
        seconds, values = in_turn(options.rounds, {
            "ours": lambda: harness.loglikelihood(model, tokenizer, requests),
            "lm_eval": lambda: theirs.loglikelihood(asked, disable_tqdm=True)})
        worst = max(abs(a - b) for (a, _), (b, _) in zip(values["ours"], values["lm_eval"]))
        print(f"{options.size}, {task}, {shots} shots; largest difference {worst:.1e} nats")
        report(len(requests), "requests", seconds)
    prompts = torch.randint(2, 50277, (8, 64))
    seconds, values = in_turn(options.rounds, {
        "ours": lambda: model.generate(prompts, 64, temperature=0),
        "transformers": lambda: theirs.model.generate(
            prompts, max_new_tokens=64, do_sample=False, use_cache=True, eos_token_id=None,
            attention_mask=torch.ones_like(prompts))})
    print("generation of 8 x 64 tokens, the same:", torch.equal(*values.values()))
    report(8 * 64, "tokens", seconds)


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # configs are named from here
    command(sys.argv[1:], {name: (Bench, function) for name, function in (
        ("train", train), ("start", start), ("tokenize", tokenize), ("find", find),
        ("checkpoints", checkpoints), ("memorization", memorization), ("eval", evaluation))})
