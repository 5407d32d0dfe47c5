"""Scoring and generation beside lm_eval and transformers, on the same requests."""

import statistics
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks.training import Train, sized
from checkpoints import save
from eval import prepare
from harness import scoring
from model import Pythia
from studies.memorization import matched_lengths
from tokenizer import load_tokenizer
from train import make_optimizer
from weights.layout import hf_config


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
