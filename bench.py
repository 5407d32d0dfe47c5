"""Measure ourselves beside what one would pick instead, alternating in one run on one machine.

    python bench.py train --size=14m
    python bench.py start --data=data/demo/train
    python bench.py growth --output=growth.csv && python plots.py growth --csv=growth.csv
    python bench.py tokenize --input=data/demo/train.jsonl
    python bench.py find --data=data/demo/train
    python bench.py checkpoints --size=160m
    python bench.py memorization --size=70m
    python bench.py eval --docs=DIR          # needs lm_eval and accelerate

train: a full optimizer step (forward, backward, clip, fused AdamW) of our model and of
    transformers' GPTNeoXForCausalLM, eager and compiled, float32 on the CPU. Each contender has a
    process of its own, so that peak memory is its own too, and they take turns, so that a noisy
    machine is noisy to all. Ours keep freed memory, as train.py has them do; transformers runs as
    one gets it. glibc gives all the same with
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 python bench.py train
    With it, at 14m and 70m, ours is 1.01 to 1.09 times as fast in 0.26 to 0.55 of the memory: both
    spend 94 % of a 70m's step in the same matmuls and attention.
start: seconds from the command to the end of the first step, and reading a batch beside computing
    it.
growth: time and memory of a step as width, depth, length and batch double, beside what is expected.
    Two cores: from width 256 up a token's time follows its FLOPs within 25 %; memory is 2.5 times
    the plan's at width 64 and 1.26 times at 512 (at 14m and 70m within 15 %: tests).
tokenize: documents to ids on one core, ours and the tokenizers library's, whose ids must be the
    same.
find: a text searched in a token file of --gigabytes, the given one over and over.
memorization: rows scored for (32, 32), beside transformers' generate; rows that miss at once, and
    rows that the model continues rightly to the end, the worst case.
checkpoints: float32 weights to the disk (ours hashes them too), and published float16 ones into a
    model.

Peak memory and time of one process.

A training step beside transformers', the launch of a run, growth with each dimension.

Scoring and generation beside lm_eval and transformers, on the same requests.

Documents to ids beside the tokenizers library, and the search of a token file.

Checkpoints to the disk and into a model, beside safetensors.torch and torch.save.
"""

import csv
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import batch_viewer as search
import eval as scoring
import prepare as preparing
from checkpoints import load_model, save
from model import hf_config, parameter_shapes
from config import command, fail, parse
from parallel import Processes
from data import OrderedData, samples_needed, TokenFile, TokenWriter
from eval import prepare
from model import ModelConfig, Pythia
from parallel import flops_per_token, matmul_flops, memory_per_process
from plots import read_csv
from studies.memorization import matched_lengths
from tokenizer import load_tokenizer, Tokenizer
from train import make_optimizer, TrainConfig
from parallel import LaunchConfig, parallelize


# ------------------------------------------------------------ bench.py





# ------------------------------------------------------------ benchmarks/process.py


def peak_memory(reset=False):
    """Return this process's largest resident size in KiB, from now on if `reset` (Linux)."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def forked(run, prepare=None):
    """Return the seconds of run(prepare()) and the KiB that both took, in a process of their own.

    Raises ChildProcessError if they raise anything; its traceback is on stderr.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = peak_memory(reset=True)
            argument = (prepare(),) if prepare else ()
            start = time.perf_counter()
            run(*argument)
            os.write(writer, f"{time.perf_counter() - start} {peak_memory() - before}".encode())
        except BaseException:
            traceback.print_exc()
        finally:  # or it would go on as a second parent, and remove the first one's temporary files
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        measured = pipe.read().split()
    os.waitpid(child, 0)
    if not measured:
        raise ChildProcessError("what was to be measured failed; see the traceback above")
    seconds, memory = measured
    return float(seconds), int(memory)


# ------------------------------------------------------------ benchmarks/training.py


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


# ------------------------------------------------------------ benchmarks/evaluation.py


@dataclass(frozen=True)
class Eval:
    docs: str  # folder of evaluation sets, as for eval.py
    size: str = "70m"
    documents: int = 48  # of each task (of MMLU: of the subject)
    subject: str = "anatomy"  # of MMLU
    rounds: int = 3
    batch: int = 8  # rows, of lm_eval and of both generations
    new_tokens: int = 64  # to generate
    threads: int = 2


def evaluation(options):
    """Time the same requests with our scoring and lm_eval's HFLM, generation with transformers'."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    torch.set_num_threads(options.threads)
    config, training = sized(Train(options.size, seq_length=2048))
    tokenizer, model = load_tokenizer("20B_tokenizer.json"), Pythia(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        save(folder, 0, model, make_optimizer(model, training),
             {"updates": 0, "tokens": 0}, tokenizer.path)
        theirs = HFLM(pretrained=f"{folder}/step0", dtype="float32", device="cpu",
                      batch_size=options.batch)

    def score_ours(requests):
        scoring._encode_piece.cache_clear()
        return scoring.loglikelihood(model, tokenizer, requests)

    def score_theirs(requests):
        return theirs.loglikelihood(
            [Instance("loglikelihood", {}, request, 0) for request in requests], disable_tqdm=True)

    def generate_ours(prompts):
        return model.generate(prompts, options.new_tokens, temperature=0).tolist()

    def generate_theirs(prompts):
        return theirs.model.generate(
            prompts, max_new_tokens=options.new_tokens, do_sample=False, use_cache=True,
            eos_token_id=None, attention_mask=torch.ones_like(prompts)).tolist()

    work = {f"{task}, {shots} shots": (score_ours, score_theirs, prepare(
        task, options.docs, shots, limit=options.documents).requests) for task, shots in (
            ("lambada_openai", 0), ("hellaswag", 0), ("piqa", 0), (f"mmlu_{options.subject}", 5))}
    prompts = torch.randint(2, 50277, (options.batch, 64),
                            generator=torch.Generator().manual_seed(0))
    work[f"generate {options.batch} x {options.new_tokens}"] = (
        generate_ours, generate_theirs, prompts)
    print(f"{options.size}, float32, {options.threads} threads, {options.documents} documents, "
          f"lm_eval's batch size {options.batch}, {options.rounds} rounds in turn; medians")
    print(f"{'':26} {'requests':>8} {'ours':>9} {'theirs':>9} {'ratio':>7}  largest difference")
    for name, (ours, other, requests) in work.items():
        taken = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            first = ours(requests)
            middle = time.perf_counter()
            second = other(requests)
            taken.append((middle - start, time.perf_counter() - middle))
        difference = (
            ("same tokens" if first == second else "other tokens") if name.startswith("gen") else
            f"{max(abs(a - b) for (a, _), (b, _) in zip(first, second)):.1e} nats")
        mine, other_time = (statistics.median(column) for column in zip(*taken))
        ratio = statistics.median(b / a for a, b in taken)
        print(f"{name:26} {len(requests):8,} {mine:7.2f} s {other_time:7.2f} s {ratio:6.2f}x  "
              f"{difference}", flush=True)


@dataclass(frozen=True)
class Memorization:
    size: str = "70m"
    rows: int = 64
    rounds: int = 5
    threads: int = 2


def memorization(options):
    """Time the memorization study's scoring in turn with transformers' greedy generation."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    torch.set_num_threads(options.threads)
    config, _ = sized(Train(options.size, seq_length=2048))
    model, twin = Pythia(config), GPTNeoXForCausalLM(GPTNeoXConfig(**hf_config(config)))
    twin.load_state_dict({
        name if name.startswith("embed_out") else f"gpt_neox.{name}": value
        for name, value in model.state_dict().items()
    } | {"lm_head.weight": model.embed_out.weight}, strict=False)
    prompt = torch.randint(2, 50277, (options.rows, 32))

    def generated():
        return twin.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32,
                             do_sample=False, eos_token_id=None, pad_token_id=0)

    rows = {"missed at once": torch.cat(
                (prompt, torch.randint(2, 50277, (options.rows, 32))), dim=1),
            "right to the end": model.generate(prompt, 32, temperature=0)}
    for name, some in rows.items():
        taken = {"ours": [], "transformers": []}
        for _ in range(options.rounds):
            for who, work in (("ours", lambda: matched_lengths(model, some, 32)),
                              ("transformers", generated)):
                start = time.perf_counter()
                work()
                taken[who].append(time.perf_counter() - start)
        right = float(matched_lengths(model, some, 32).float().mean())
        ours, theirs = (options.rows / statistics.median(taken[who]) for who in taken)
        print(f"{options.size}, rows {name:16} ({right:4.1f} of 32 right): ours {ours:7.1f} "
              f"rows/s, transformers' generate {theirs:6.1f} rows/s, "
              f"{statistics.median(b / a for a, b in zip(*taken.values())):.2f}x")
    print("both generate the same tokens:", torch.equal(generated(), rows["right to the end"]))


# ------------------------------------------------------------ benchmarks/corpora.py


@dataclass(frozen=True)
class Tokenize:
    input: str = "data/demo/train.jsonl"
    tokenizer: str = "20B_tokenizer.json"
    rounds: int = 5


def tokenize(options):
    """Time the encoding of documents on one core, in turn with the tokenizers library."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer as Original
    ours, theirs = Tokenizer(options.tokenizer), Original.from_file(options.tokenizer)
    chunks = preparing.chunks(preparing.input_files(options.input), None)
    texts = [record["text"] for chunk, _, _ in chunks
             for _, record in preparing.documents(chunk, fail)]
    contenders = {
        "ours": lambda: [ours.encode_array(text) for text in texts],
        "tokenizers encode": lambda: [theirs.encode(text).ids for text in texts],
        "tokenizers encode_batch_fast": lambda: [
            one.ids for one in theirs.encode_batch_fast(texts)]}
    taken, ids = {who: [] for who in contenders}, {}
    for _ in range(options.rounds):
        for who, encode in contenders.items():
            start = time.perf_counter()
            ids[who] = encode()
            taken[who].append(time.perf_counter() - start)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {size:.1f} MB, one core, {options.rounds} rounds; medians")
    for who in contenders:
        same = all(list(a) == list(b) for a, b in zip(ids["ours"], ids[who]))
        ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken[who]))
        print(f"{who:30} {size / statistics.median(taken[who]):6.2f} MB/s   "
              f"ours is {ratio:5.2f}x   {'same ids' if same else 'OTHER IDS'}")


@dataclass(frozen=True)
class Find:
    data: str = "data/demo/train"
    text: str = "the waters of Shiloah"
    tokens: str = "45190"  # an id that is rare in the demo's text
    gigabytes: float = 2.0
    tokenizer: str = "20B_tokenizer.json"


def find(options):
    """Time the search of a text and of a token on one core and on all."""
    token_file, tokenizer = TokenFile(options.data), Tokenizer(options.tokenizer)
    times = max(1, round(options.gigabytes * 1e9 / 2 / token_file.n_tokens))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writer = TokenWriter(f"{folder}/long", "bench")
        for _ in range(times):
            writer.append(token_file.slice(0, token_file.n_tokens), token_file.sizes)
        writer.finish({})
        counts = search.sample_counts(TokenFile(f"{folder}/long"))
        n_tokens, patterns = times * token_file.n_tokens, {
            f"text {options.text!r}": search.TextPattern(
                options.text.encode(), tokenizer.token_bytes(), counts),
            f"tokens {options.tokens}": search.TokenPattern(
                [int(i) for i in options.tokens.split(",")], counts)}
        for name, pattern in patterns.items():
            for workers in (1, os.cpu_count()):
                start = time.perf_counter()
                found = search.search(f"{folder}/long", n_tokens, pattern, workers)
                seconds = time.perf_counter() - start
                print(f"{name}: {len(found):,} places in {2 * n_tokens / 1e9:.2f} GB, {workers} "
                      f"process(es), {seconds:.2f} s, {2 * n_tokens / 1e9 / seconds:.2f} GB/s")


# ------------------------------------------------------------ benchmarks/checkpoints.py


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


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # configs are named from here
    command(sys.argv[1:], {
        "train": (Train, train), "worker": (Worker, worker),
        "start": (Start, start), "growth": (Growth, growth),
        "tokenize": (Tokenize, tokenize), "find": (Find, find),
        "checkpoints": (Checkpoints, checkpoints),
        "eval": (Eval, evaluation), "memorization": (Memorization, memorization)})
