"""Measure this code beside what one would use instead, in turn, in one run on one machine.

    python bench.py train --size=14m           # an optimizer step, beside transformers
    python bench.py tokenize                   # documents to ids, beside the tokenizers library
    python bench.py memorization               # rows scored, beside transformers' generate
    python bench.py eval --docs=DIR            # beside lm_eval; pip install lm_eval accelerate
    python bench.py gpu --output=FOLDER        # a step, evaluation, memorization on one GPU

A speed is the median over rounds, a ratio the median of the rounds' ratios. `memorization` and
`eval` take --device=cuda. All but `tokenize` need transformers.
"""

import functools
import gc
import os
import re
import sys
import timeit
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer  # in seconds; it waits until a GPU has finished

import eval as harness
from config import command, csv_lines, parse
from model import ModelConfig, Pythia, head_blocks, hf_config, hf_name
from parallel import LaunchConfig, Processes, flops_per_token, memory_per_process, peak_flops
from studies.memorization import matched_lengths
from tasks import read_jsonl
from tokenizer import encode_piece, load_tokenizer
from train import TrainConfig, Training, make_optimizer

# glibc then keeps freed memory for the next step; `train` starts ours and theirs with it.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
TOKENIZER = "20B_tokenizer.json"


@dataclass(frozen=True)
class Bench:
    size: str = "70m"  # of the model
    rounds: int = 5
    threads: int = 2
    batch: int = 4  # train: sequences per step
    seq_length: int = 512  # train: tokens per sequence
    data: str = "data/demo/train.jsonl"  # tokenize: documents
    docs: str = ""  # eval: folder of evaluation sets, as for eval.py
    documents: int = 48  # eval: of each task
    device: str = "cpu"  # memorization, eval


@dataclass(frozen=True)
class GPUBench:
    sizes: str = "14m,31m,70m,160m,410m,1b,1.4b"
    compiled_theirs: str = "70m,410m"  # sizes at which transformers is compiled: a minute each
    profiled: str = "70m,410m"  # sizes whose step is profiled and whose evaluation is measured
    steps: int = 5  # timed, after three to warm up
    micro_batch: int = 64  # sequences at most; halved until they fit
    seq_length: int = 2048
    device: str = "cuda"  # "cpu" tries the script, in float32
    output: str = "bench_gpu"  # folder of steps.csv and the profiles


def race(title, rounds, amount, unit, contenders):
    """Call each function once to warm up, then once a round; print how fast they were.

    amount: what a call does, in `unit`. Returns {name: last value}, {name: seconds of each round}.
    """
    values = {name: act() for name, act in contenders.items()}
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, act in contenders.items():
            began = timer()
            values[name] = act()
            seconds[name].append(timer() - began)
    print(f"{title}; {rounds} rounds")
    first, *_ = contenders
    for name, taken in seconds.items():
        ratio = median(a / b for a, b in zip(taken, seconds[first]))
        print(f"  {name:22} {amount / median(taken):12,.2f} {unit}/s, {first} is {ratio:.2f}x",
              flush=True)
    return values, seconds


def race_scores(title, rounds, amount, unit, contenders):
    """Race two that return [(log-likelihood, ...)]; print also how much these differ."""
    values, _ = race(title, rounds, amount, unit, contenders)
    worst = max(abs(a - b) for (a, *_), (b, *_) in zip(*values.values(), strict=True))
    print(f"  largest difference {worst:.1e} nats", flush=True)


def configs(size, seq_length=2048):
    """Return the ModelConfig and TrainConfig of a size."""
    flags = [f"configs/pythia_{size.replace('.', '_')}.py", "--gelu=erf",
             f"--seq_length={seq_length}"]
    return parse(flags, ModelConfig, TrainConfig, LaunchConfig)[:2]


def models(size, device, seq_length=2048):
    """Return our model, new, and transformers' with the same weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    ours = Pythia(configs(size, seq_length)[0]).eval()
    weights = {hf_name(name): weight for name, weight in ours.state_dict().items()}
    theirs = GPTNeoXForCausalLM.from_pretrained(
        None, config=GPTNeoXConfig(**hf_config(ours.config)), state_dict=weights)
    return ours.to(device), theirs.to(device)


# ---------------------------------------------------------------------------- training


def make_step(who, size, B, T, device, dtype="float32"):
    """Return a function that takes an optimizer step: forward, backward, clip, fused AdamW.

    who: "ours" (train.py's own step), "transformers", either of them "compiled", or "floor".
    """
    config, training = configs(size, T)
    if who == "floor":
        return make_floor(config, B, T)
    tokens = torch.randint(50277, (B, T + 1))
    if "transformers" not in who:
        ours = Training(config, replace(training, dtype=dtype),
                        LaunchConfig(compile="compiled" in who), Processes(device.type))
        for parameter in ours.model.parameters():  # on its device: init_weights draws on the CPU
            torch.nn.init.normal_(parameter, std=0.02)

        def step():
            ours.gradients(tokens[None])
            ours.update(1e-4, ours.clip())
        return step

    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
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
    """Return a function that does only the matmuls and attention of a step, forward and backward.

    Their shapes, strides and number are the step's; all layers use the same tensors.
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


made_step = functools.cache(make_step)


def step(who, options):
    """Take a step in this process; return the process's peak memory so far in MB (Linux)."""
    torch.set_num_threads(options.threads)
    made_step(who, options.size, options.batch, options.seq_length, torch.device("cpu"))()
    status = Path("/proc/self/status").read_text()  # getrusage counts what the parent had, too
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024 / 1e6


def train(options):
    """Time a step in float32 on the CPU, and peak memory, beside transformers and the floor."""
    os.environ.update(ALLOCATOR)  # glibc reads it when a process starts
    torch.set_num_threads(options.threads)
    contenders = {}
    for who in ("ours", "floor", "transformers", "transformers compiled"):
        pool = ProcessPoolExecutor(1, get_context("spawn"))  # a process each, for its peak memory
        contenders[who] = lambda who=who, pool=pool: pool.submit(step, who, options).result()
        for _ in range(2):  # to warm up: compile, let Adam allocate
            contenders[who]()
    tokens = options.batch * options.seq_length
    peaks, seconds = race(f"{options.size}, {options.batch} x {options.seq_length} tokens, "
                          f"{options.threads} threads, all with {ALLOCATOR}", options.rounds,
                          tokens, "tokens", contenders)
    for who, peak in peaks.items():
        print(f"  {who:22} {peak:12,.0f} MB, ours uses {peaks['ours'] / peak:.2f}x")
    flops = tokens * flops_per_token(configs(options.size, options.seq_length)[0])
    share = flops / median(seconds["ours"]) / peak_flops(torch.device("cpu"))
    print(f"  ours reaches {share:.0%} of the matmul peak")


# ---------------------------------------------------------------------------- without training


def tokenize(options):
    """Time the encoding of documents on one core, beside the tokenizers library."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer  # pip install tokenizers
    ours, theirs = load_tokenizer(TOKENIZER), Tokenizer.from_file(TOKENIZER)
    texts = [document["text"] for document in read_jsonl(options.data)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ids, _ = race("one core", options.rounds, megabytes, "MB", {
        "ours": lambda: [ours.encode_array(text).tolist() for text in texts],
        "encode": lambda: [theirs.encode(text).ids for text in texts],
        "encode_batch_fast": lambda: [one.ids for one in theirs.encode_batch_fast(texts)]})
    print("  the same ids:", ids["ours"] == ids["encode"] == ids["encode_batch_fast"])


def memorization(options):
    """Time the scoring of rows for (32, 32), beside transformers' greedy generation."""
    torch.set_num_threads(options.threads)
    device = Processes(options.device).device
    ours, theirs = models(options.size, device)
    n = 256 if device.type == "cuda" else 64
    prompt, other = torch.randint(2, 50277, (2, n, 32), device=device)
    right = ours.generate(prompt, 32, temperature=0)
    for name, rows in (("wrong at once", torch.cat([prompt, other], 1)), ("all right", right)):
        values, _ = race(f"{options.size}, rows {name}", options.rounds, n, "rows", {
            "ours": lambda: matched_lengths(ours, rows, 32).tolist(),
            "transformers' generate": lambda: theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False,
                eos_token_id=None, pad_token_id=0).tolist()})
    print("  both generate the same:", values["transformers' generate"] == right.tolist())


def evaluation(options):
    """Time the same requests with ours and lm_eval's HFLM (batches of 16, of 64 on a GPU)."""
    from lm_eval.api.instance import Instance  # pip install lm_eval accelerate
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast
    torch.set_num_threads(options.threads)
    device, tokenizer = Processes(options.device).device, load_tokenizer(TOKENIZER)
    ours, theirs = models(options.size, device)
    theirs = HFLM(theirs, batch_size=64 if device.type == "cuda" else 16, tokenizer=(
        PreTrainedTokenizerFast(tokenizer_file=TOKENIZER, eos_token="<|endoftext|>")))

    def score():
        encode_piece.cache_clear()  # every round encodes its texts itself
        return harness.loglikelihood(ours, tokenizer, requests)

    for task, shots in (("lambada_openai", 0), ("hellaswag", 0), ("piqa", 0), ("mmlu_anatomy", 5)):
        requests = harness.Job(task, options.docs, shots, limit=options.documents).requests
        asked = [Instance("loglikelihood", {}, request, 0) for request in requests]
        race_scores(f"{task}, {shots} shots", options.rounds, len(requests), "requests", {
            "ours": score, "lm_eval": lambda: theirs.loglikelihood(asked, disable_tqdm=True)})


# ---------------------------------------------------------------------------- on a GPU


def gpu(options):
    """Measure steps at every size beside transformers, what they spend time on, and evaluation."""
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


def measure_steps(size, who, options, device):
    """Return a row of the table: the step with the largest micro-batch that fits."""
    on_gpu, B = device.type == "cuda", options.micro_batch
    while True:
        torch.compiler.reset()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            began = timer()
            act = make_step(who, size, B, options.seq_length, device,
                            "bfloat16" if on_gpu else "float32")
            act()
            first = timer() - began
            for _ in range(2):  # to warm up
                act()
            seconds = timeit.timeit(act, timer=timer, number=options.steps) / options.steps
            break
        except torch.OutOfMemoryError:
            if B == 1:
                raise ValueError(f"{size}, {who}: one sequence does not fit in memory") from None
            act, B = None, B // 2
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else float("nan")
    config, _ = configs(size, options.seq_length)
    planned = memory_per_process(config, LaunchConfig(), 1, B, False)["peak"] / 1e9
    if size in options.profiled.split(",") and "ours" in who:
        profile_step(act, f"{options.output}/{size}_{who.replace(' ', '_')}", device)
    speed, flops = B * options.seq_length / seconds, flops_per_token(config)
    whole = flops + 6 * config.n_layers * config.d_model * config.seq_length
    mfu, mfu_whole = (speed * f / peak_flops(device) for f in (flops, whole))
    return (size, who, B, f"{speed:,.0f}", f"{mfu:.1%}", f"{mfu_whole:.1%}", f"{peak:.2f}",
            f"{planned:.2f}" if "ours" in who else "", f"{first:.1f}")


# A kernel is of the first kind whose pattern is in its name.
KINDS = {"attention": "flash|fmha|attention|cudnn", "matmul": "gemm|nvjet|cutlass|xmma|mm_|mm$",
         "optimizer": "adam|multi_tensor", "copy": "memcpy|memset", "elementwise": ""}


def profile_step(act, path, device):
    """Print where a step's time goes by kind of kernel; PATH.txt lists the kernels."""
    with profile(activities=[getattr(ProfilerActivity, device.type.upper())]) as seen:
        began = timer()
        act()
        wall = timer() - began
    spent, events = dict.fromkeys(KINDS, 0.0), seen.key_averages()
    column = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"
    for event in events:
        kind = next(kind for kind, names in KINDS.items() if re.search(names, event.key.lower()))
        spent[kind] += getattr(event, column) / 1e6
    spent["gaps"] = wall - sum(spent.values())
    print("  " + ", ".join(f"{kind} {taken / wall:.0%}" for kind, taken in spent.items())
          + f" of {wall * 1e3:.1f} ms", flush=True)
    Path(path + ".txt").write_text(events.table(
        sort_by=column, row_limit=60, max_name_column_width=110))


def plain_scores(model, rows, n):
    """Return [(log-likelihood,)] of the last n tokens of rows (R, T), as lm_eval computes them.

    It takes whole logits, their log softmax, and each row's sum by itself.
    """
    scores = []
    for part in rows.split(64 if model.device.type == "cuda" else 8):  # 64 need 20 GB
        part = part.to(model.device)
        logprobs = model(part[:, :-1]).logits.log_softmax(-1)
        scores += [(float(its[-n:].gather(1, row[-n:, None]).sum()),)
                   for row, its in zip(part, logprobs)]
    return scores


@torch.no_grad()
def measure_evaluation(size, seq_length, device):
    """Race evaluation in float32 with lm_eval's way, and time memorization of rows that miss.

    Rows are random tokens in the form of tasks: few-shot examples, which all rows of a task share,
    a question, and one of its choices of n tokens.
    """
    ours, theirs = models(size, device, seq_length)
    for task, questions, shots, context, choices, n in (
            ("lambada", 512, 0, 80, 1, 2), ("hellaswag", 256, 0, 60, 4, 25),
            ("MMLU, 5 shots", 64, 600, 100, 4, 1)):
        rows = torch.randint(2, 50277, (questions, 1, shots + context + n)).repeat(1, choices, 1)
        rows[..., :shots] = rows[0, 0, :shots]
        rows[..., -n:] = torch.randint(2, 50277, (questions, choices, n))
        rows = rows.flatten(0, 1)
        lists = [(row, n) for row in rows.tolist()]
        race_scores(f"{size}, {task}", 1, rows.numel(), "tokens", {
            "ours": lambda: harness.score(ours, lists),
            "lm_eval's way": lambda: plain_scores(theirs, rows, n)})
    tokens = torch.randint(2, 50277, (256, 64), device=device)
    race(f"{size}, memorization, rows that miss at once", 5, len(tokens), "rows", {
        "ours": lambda: matched_lengths(ours, tokens, 32).tolist()})


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # configs are named from here
    command(sys.argv[1:], {
        "train": (Bench, train), "tokenize": (Bench, tokenize),
        "memorization": (Bench, memorization), "eval": (Bench, evaluation), "gpu": (GPUBench, gpu)})
