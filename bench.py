"""Measure ourselves beside what one would use instead, in turn, in one run on one machine.

    python bench.py train --size=14m           # an optimizer step, beside transformers
    python bench.py tokenize                   # documents to ids, beside the tokenizers library
    python bench.py checkpoints --size=160m    # beside safetensors.torch and torch.save
    python bench.py memorization               # rows scored, beside transformers' generate
    python bench.py eval --docs=DIR            # beside lm_eval; pip install lm_eval accelerate
    python bench.py gpu --output=FOLDER        # a step, evaluation, memorization on one GPU

Speeds are medians, and a ratio is the median of the rounds' ratios. `train` gives each contender a
process of its own, for peak memory is a process's. All of them, ours and theirs, start with the
variables of ALLOCATOR, so that glibc keeps freed memory for all or for none. Its "floor" is the
matmuls and attention of a step alone. With --device=cuda `memorization` and `eval` measure a GPU.
"""

import gc
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import eval as harness
from checkpoints import save
from config import command, csv_lines, parse
from model import ModelConfig, Pythia, head_blocks, hf_config, hf_name
from parallel import (LaunchConfig, Processes, flops_per_token, matmul_flops, memory_per_process,
                      peak_flops)
from studies.memorization import matched_lengths
from tokenizer import encode_piece, load_tokenizer
from train import TrainConfig, Training, make_optimizer

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
TOKENIZER = "20B_tokenizer.json"
STATE = {"updates": 0, "tokens": 0}  # of a model that was not trained


@dataclass(frozen=True)
class Bench:
    size: str = "70m"  # of the model
    rounds: int = 5
    threads: int = 2
    batch: int = 4  # train: sequences a step
    seq_length: int = 512  # train: tokens of a sequence
    data: str = "data/demo/train.jsonl"  # tokenize: documents
    docs: str = ""  # eval: folder of evaluation sets, as for eval.py
    documents: int = 48  # eval: of each task
    device: str = "cpu"  # memorization, eval
    folder: str = "."  # checkpoints: on the disk to measure


@dataclass(frozen=True)
class GPUBench:
    sizes: str = "14m,31m,70m,160m,410m,1b,1.4b"
    compiled_theirs: str = "70m,410m"  # sizes of which transformers is compiled: a minute each
    profiled: str = "70m,410m"  # sizes whose step is profiled and evaluation measured
    steps: int = 5  # timed, after three
    micro_batch: int = 64  # sequences at most; halved until it fits
    seq_length: int = 2048
    device: str = "cuda"  # "cpu" tries the script, in float32
    output: str = "bench_gpu"  # folder of steps.csv


def race(title, rounds, amount, unit, contenders, memory=False):
    """Call each function in every round and print how fast they were.

    amount: what a call does, in `unit`. memory: the values are peak memory in MB, printed too.
    Returns {name: last value} and {name: seconds of each round}.
    """
    seconds, values = {name: [] for name in contenders}, {}
    for _ in range(rounds):
        for name, act in contenders.items():
            began = time.perf_counter()
            values[name] = act()
            seconds[name].append(time.perf_counter() - began)
    print(f"{title}; {rounds} rounds")
    first, *_ = contenders
    for name, taken in seconds.items():
        line = (f"  {name:22} {amount / median(taken):12,.2f} {unit}/s, "
                f"{first} is {ratio(taken, seconds[first]):.2f}x")
        if memory:
            line += f", {values[name]:,.0f} MB, {first} uses {values[first] / values[name]:.2f}x"
        print(line, flush=True)
    return values, seconds


def ratio(a, b):
    """Return the median of the rounds' ratios."""
    return median(x / y for x, y in zip(a, b))


def configs(size, seq_length=2048):
    """Return the ModelConfig and TrainConfig of a size."""
    flags = [f"configs/pythia_{size.replace('.', '_')}.py", "--gelu=erf",
             f"--seq_length={seq_length}"]
    return parse(flags, ModelConfig, TrainConfig, LaunchConfig)[:2]


# ---------------------------------------------------------------------------- training


def make_step(who, config, training, tokens, device, dtype="float32"):
    """Return a function that takes an optimizer step: forward, backward, clip, fused AdamW.

    Ours is train.py's own; tokens (B, T + 1) int64 on the host.
    """
    if "transformers" not in who:
        ours = Training(config, replace(training, dtype=dtype),
                        LaunchConfig(compile="compiled" in who), Processes(device.type))
        for parameter in ours.model.parameters():  # on its device: init_weights draws on the CPU
            torch.nn.init.normal_(parameter, std=0.02)

        def step():
            ours.gradients(tokens[None])
            ours.update(1e-4, ours.clip())
        return step

    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # pip install transformers
    with device:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**hf_config(config)))
    called = torch.compile(model) if "compiled" in who else model
    optimizer, inputs = make_optimizer(model, training), tokens[:, :-1].to(device)

    def step():
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = called(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def make_floor(config, B, T):
    """Return a function that does the matmuls and attention of a step's forward and backward pass.

    They have the step's shapes, strides and number; every layer's are done on the same tensors.
    """
    D, H, N = config.d_model, config.n_heads, B * T
    linears = [(torch.randn(N, inner), torch.randn(outer, inner), torch.randn(N, outer))
               for outer, inner in ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D))]
    *qkv, y_grad = torch.randn(B, T, H, 4, D // H).transpose(1, 2).unbind(3)  # (B, H, T, K) each
    q, k, v = (part.requires_grad_() for part in qkv)
    hidden, head = torch.randn(N, D), torch.randn(config.vocab_size, D)
    head_grad = torch.zeros_like(head)

    def floor():
        for _ in range(config.n_layers):
            for x, weight, grad in linears:
                x @ weight.T  # forward
                grad @ weight  # the gradient of x
                grad.T @ x  # the gradient of weight
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), y_grad)
        for rows, logits in head_blocks(hidden, head):  # a block's logits stand for their gradient
            logits @ head
            head_grad.addmm_(logits.T, hidden[rows])
    return floor


def prepare_step(who, options):
    """Make an optimizer step of `who` what step() takes in this process."""
    global _step
    torch.set_num_threads(options.threads)
    config, training = configs(options.size, options.seq_length)
    if who == "floor":
        _step = make_floor(config, options.batch, options.seq_length)
    else:
        tokens = torch.randint(50277, (options.batch, options.seq_length + 1))
        _step = make_step(who, config, training, tokens, torch.device("cpu"))
    for _ in range(2):  # to warm up: compile, let Adam allocate
        _step()


def step():
    """Take the prepared step; return this process's peak memory so far in MB (Linux)."""
    _step()
    status = Path("/proc/self/status").read_text()  # getrusage counts what the parent had, too
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def train(options):
    """Time an optimizer step in float32 on the CPU, and peak memory, beside transformers."""
    os.environ.update(ALLOCATOR)  # glibc reads it when a process starts
    torch.set_num_threads(options.threads)
    contenders = {}
    for who in ("ours", "floor", "transformers", "transformers compiled"):
        pool = ProcessPoolExecutor(1, get_context("spawn"), prepare_step, (who, options))
        contenders[who] = lambda pool=pool: pool.submit(step).result()
        contenders[who]()  # wait until it is prepared
    tokens = options.batch * options.seq_length
    _, seconds = race(f"{options.size}, {options.batch} x {options.seq_length} tokens, "
                      f"{options.threads} threads, all with {ALLOCATOR}", options.rounds, tokens,
                      "tokens", contenders, memory=True)
    flops = tokens * flops_per_token(configs(options.size, options.seq_length)[0])
    print(f"  ours reaches {ratio(seconds['floor'], seconds['ours']):.0%} of the floor, "
          f"{flops / median(seconds['ours']) / matmul_flops():.0%} of the matmul peak")


def tokenize(options):
    """Time the encoding of documents on one core, beside the tokenizers library."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer  # pip install tokenizers
    ours, theirs = load_tokenizer(TOKENIZER), Tokenizer.from_file(TOKENIZER)
    with open(options.data, encoding="utf8") as file:
        texts = [json.loads(line)["text"] for line in file]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ids, _ = race("one core", options.rounds, megabytes, "MB", {
        "ours": lambda: [ours.encode_array(text).tolist() for text in texts],
        "encode": lambda: [theirs.encode(text).ids for text in texts],
        "encode_batch_fast": lambda: [one.ids for one in theirs.encode_batch_fast(texts)]})
    print("  the same ids:", ids["ours"] == ids["encode"] == ids["encode_batch_fast"])


# ---------------------------------------------------------------------------- models


def saved(options, folder):
    """Return our model of a size and its optimizer, new, and saved as FOLDER/step0."""
    torch.set_num_threads(options.threads)
    config, training = configs(options.size)
    model = Pythia(config).eval()
    optimizer = make_optimizer(model, training)
    save(folder, 0, model, optimizer, STATE, TOKENIZER)
    return model, optimizer


def checkpoints(options):
    """Time float32 weights to the disk; ours are also hashed."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, optimizer = saved(options, folder)
        weights, out = model.state_dict(), f"{folder}/out"

        def save_ours():
            shutil.rmtree(f"{folder}/step0")  # the others overwrite their file
            save(folder, 0, model, optimizer, STATE)

        def save_theirs(write):
            write(weights, out)
            with open(out, "rb") as file:
                os.fsync(file.fileno())

        megabytes = sum(tensor.nbytes for tensor in weights.values()) / 1e6
        race(f"save a {options.size}", options.rounds, megabytes, "MB", {
            "ours": save_ours, "safetensors.torch": lambda: save_theirs(save_file),
            "torch.save": lambda: save_theirs(torch.save)})


def memorization(options):
    """Time the scoring of rows for (32, 32), beside transformers' greedy generation."""
    from transformers import GPTNeoXForCausalLM  # pip install transformers
    device = Processes(options.device).device
    with tempfile.TemporaryDirectory() as folder:
        model = saved(options, folder)[0].to(device)
        theirs = GPTNeoXForCausalLM.from_pretrained(f"{folder}/step0", dtype=torch.float32)
    theirs = theirs.to(device)
    n = 256 if device.type == "cuda" else 64
    prompt, other = torch.randint(2, 50277, (2, n, 32), device=device)
    right = model.generate(prompt, 32, temperature=0)
    for name, rows in (("wrong at once", torch.cat([prompt, other], 1)), ("all right", right)):
        values, _ = race(f"{options.size}, rows {name}", options.rounds, n, "rows", {
            "ours": lambda: matched_lengths(model, rows, 32).tolist(),
            "transformers' generate": lambda: theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False,
                eos_token_id=None, pad_token_id=0).tolist()})
    print("  both generate the same:", values["transformers' generate"] == right.tolist())


def evaluation(options):
    """Time the same requests with ours and lm_eval's HFLM (batches of 8, of 64 on a GPU)."""
    from lm_eval.api.instance import Instance  # pip install lm_eval accelerate
    from lm_eval.models.huggingface import HFLM
    device = Processes(options.device).device
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = saved(options, folder)[0].to(device), load_tokenizer(TOKENIZER)
        theirs = HFLM(pretrained=f"{folder}/step0", dtype="float32", device=str(device),
                      batch_size=64 if device.type == "cuda" else 8)

    def score():
        encode_piece.cache_clear()  # every round encodes its texts itself
        return harness.loglikelihood(model, tokenizer, requests)

    for task, shots in (("lambada_openai", 0), ("hellaswag", 0), ("piqa", 0), ("mmlu_anatomy", 5)):
        requests = harness.Job(task, options.docs, shots, limit=options.documents).requests
        asked = [Instance("loglikelihood", {}, request, 0) for request in requests]
        values, _ = race(f"{task}, {shots} shots", options.rounds, len(requests), "requests", {
            "ours": score,
            "lm_eval": lambda: theirs.loglikelihood(asked, disable_tqdm=True)})
        worst = max(abs(a - b) for (a, _), (b, _) in zip(values["ours"], values["lm_eval"]))
        print(f"  largest difference {worst:.1e} nats")


# ---------------------------------------------------------------------------- on a GPU


def gpu(options):
    """Measure steps at every size beside transformers, where their time goes, and evaluation."""
    device = Processes(options.device).device
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}, T = {options.seq_length}")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    table = [("size", "who", "micro_batch", "tokens/s", "MFU", "MFU, whole attention",
              "peak GB", "planned GB", "first step s")]
    for size in options.sizes.split(","):
        for who in ("ours", "ours compiled", "transformers", "transformers compiled"):
            if who != "transformers compiled" or size in options.compiled_theirs.split(","):
                table.append(measure_steps(size, who, options, device))
                print(*table[-1], sep=" | ", flush=True)
                Path(f"{options.output}/steps.csv").write_bytes(csv_lines(table))
        if size in options.profiled.split(","):
            measure_evaluation(size, options.seq_length, device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(act, n, device):
    """Return the mean seconds of n calls."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(n):
        act()
    synchronize(device)
    return (time.perf_counter() - began) / n


def measure_steps(size, who, options, device):
    """Return a row of the table: the step with the largest micro-batch that fits."""
    config, training = configs(size, options.seq_length)
    on_gpu, B = device.type == "cuda", options.micro_batch
    while B:
        torch.compiler.reset()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            began = time.perf_counter()
            tokens = torch.randint(50277, (B, options.seq_length + 1))
            act = make_step(who, config, training, tokens, device,
                            "bfloat16" if on_gpu else "float32")
            first = seconds_of(act, 1, device) + time.perf_counter() - began
            seconds_of(act, 2, device)
            seconds = seconds_of(act, options.steps, device)
            break
        except torch.OutOfMemoryError:
            act, B = None, B // 2
    if not B:
        raise ValueError(f"{size}, {who}: not even one sequence fits into the GPU's memory")
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else math.nan
    planned = memory_per_process(config, LaunchConfig(), 1, B, False)["peak"] / 1e9
    if size in options.profiled.split(",") and "ours" in who:
        profile_step(act, f"{options.output}/{size}_{who.replace(' ', '_')}", device)
    speed, flops = B * options.seq_length / seconds, flops_per_token(config)
    whole = flops + 6 * config.n_layers * config.d_model * config.seq_length
    mfu, mfu_whole = (speed * f / peak_flops(device) for f in (flops, whole))
    return (size, who, B, f"{speed:,.0f}", f"{mfu:.1%}", f"{mfu_whole:.1%}", f"{peak:.2f}",
            f"{planned:.2f}" if "ours" in who else "", f"{first:.1f}")


KINDS = (("attention", "flash|fmha|attention|cudnn"), ("matmul", "gemm|nvjet|cutlass|xmma|mm_"),
         ("optimizer", "adam|multi_tensor"), ("copy", "memcpy|memset"), ("elementwise", ""))


def profile_step(act, path, device):
    """Print where a step's time goes by kind of kernel; PATH.txt lists the kernels."""
    from torch.profiler import ProfilerActivity, profile
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        wall = seconds_of(act, 1, device)
    spent = dict.fromkeys([kind for kind, _ in KINDS], 0.0)
    events = seen.key_averages()
    for event in events:
        kind = next(kind for kind, names in KINDS if re.search(names, event.key.lower()))
        spent[kind] += event.self_device_time_total / 1e6
    spent["gaps"] = wall - sum(spent.values())
    print("  " + ", ".join(f"{kind} {taken / wall:.0%}" for kind, taken in spent.items())
          + f" of {wall * 1e3:.1f} ms", flush=True)
    Path(path + ".txt").write_text(events.table(
        sort_by="self_device_time_total", row_limit=60, max_name_column_width=110))


def plain_scores(model, rows, batch=64):
    """Score rows as lm_eval does: padded batches of like length, whole logits, log softmax."""
    order, results = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), {}
    for start in range(0, len(order), batch):
        chosen = order[start:start + batch]
        inputs = torch.zeros(len(chosen), len(rows[chosen[0]][0]) - 1, dtype=torch.int64)
        for b, i in enumerate(chosen):
            inputs[b, :len(rows[i][0]) - 1] = torch.tensor(rows[i][0][:-1])
        logprobs = model(inputs.to(model.device)).logits.log_softmax(-1)
        for b, i in enumerate(chosen):
            row, n = rows[i]
            targets = torch.tensor(row[-n:], device=model.device)
            results[i] = float(logprobs[b, len(row) - 1 - n:len(row) - 1].gather(
                1, targets[:, None]).sum())
    return [results[i] for i in range(len(rows))]


def question_rows(generator, questions, shots, context, choices, n):
    """Return rows for score: random tokens in the form of a task's questions behind its shots."""
    draw = lambda length: torch.randint(2, 50277, (length,), generator=generator).tolist()
    prefix, rows = draw(shots), []
    for _ in range(questions):
        question = prefix + draw(context)
        rows += [(question + draw(n), n) for _ in range(choices)]
    return rows


@torch.no_grad()
def measure_evaluation(size, seq_length, device):
    """Print tokens/s of evaluation in float32 beside lm_eval's way, rows/s of memorization."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # pip install transformers
    config, _ = configs(size, seq_length)
    model = Pythia(config).eval().to(device)
    with device:
        theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**hf_config(config))).eval()
    names = {hf_name(name).replace("embed_out", "lm_head"): parameter
             for name, parameter in model.named_parameters()}
    theirs.load_state_dict(names, strict=False)
    generator = torch.Generator().manual_seed(0)
    for task, *form in (("lambada", 512, 0, 80, 1, 2), ("hellaswag", 256, 0, 60, 4, 25),
                        ("MMLU, 5 shots", 64, 600, 100, 4, 1)):
        rows = question_rows(generator, *form)
        tokens, speed = sum(len(row) for row, _ in rows), {}
        for who, act in (("ours", lambda: [value for value, _ in harness.score(model, rows)]),
                         ("lm_eval's way", lambda: plain_scores(theirs, rows))):
            values = act()
            speed[who] = tokens / seconds_of(act, 1, device), values
        (ours, a), (plain, b) = speed.values()
        worst = max(abs(x - y) for x, y in zip(a, b))
        print(f"{size}, {task}: ours {ours:,.0f} tokens/s, {ours / plain:.2f}x lm_eval's way, "
              f"largest difference {worst:.1e} nats", flush=True)
    tokens = torch.randint(2, 50277, (256, 64), device=device)
    matched_lengths(model, tokens, 32)
    seconds = seconds_of(lambda: matched_lengths(model, tokens, 32), 5, device)
    print(f"{size}, memorization: {256 / seconds:,.0f} rows/s that miss at once", flush=True)


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # configs are named from here
    command(sys.argv[1:], {
        "train": (Bench, train), "tokenize": (Bench, tokenize), "checkpoints": (Bench, checkpoints),
        "memorization": (Bench, memorization), "eval": (Bench, evaluation),
        "gpu": (GPUBench, gpu)})
