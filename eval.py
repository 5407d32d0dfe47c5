"""Evaluate checkpoints exactly as EleutherAI's lm-evaluation-harness (v0.4) scores them.

    python eval.py --model=RUN --steps=all --tasks=lambada_openai,piqa --docs=DIR --output=results.csv
    python eval.py sample --model=RUN --steps=1,64,512 --prompt="In the beginning"

--model is a run folder of ours, one of its step folders, or any GPT-NeoX folder in Hugging Face's
layout. --docs holds a folder for each task with its documents as distributed, for instance
DIR/piqa/validation.jsonl. What the CSV already holds is skipped, so the same command goes on.

Tasks: lambada_openai, piqa, and heldout (any {"text", "meta": {"pile_set_name"}} documents: bits per
byte, overall and per subset).
"""

import csv
import json
import math
import os
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
from config import parse, run
from data import read_json
from model import head_blocks
from tokenizer import ENDOFTEXT, load_tokenizer

# ---------------------------------------------------------------------------- scoring


@torch.no_grad()
def score(model, rows, batch_tokens=4096):
    """Return [(log-likelihood in nats, is_greedy)] of the last n tokens of each row, for rows (tokens, n).

    Each row is cut on the left to the model's context. The softmax runs over all columns, padded
    vocabulary included; is_greedy says that every one of the n tokens is the largest logit's. Rows
    are batched by length and padded on the right, which a causal model cannot see.
    """
    L, device = model.config.seq_length, model.embed_in.weight.device
    results = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -min(len(rows[i][0]), L + 1))
    while order:
        width = min(len(rows[order[0]][0]), L + 1) - 1
        chosen, order = np.split(order, [max(1, batch_tokens // width)])
        order = order.tolist()
        tokens = torch.zeros(len(chosen), width, dtype=torch.int64)
        positions, targets, counts = [], [], []
        for b, i in enumerate(chosen):
            row, n = rows[i][0][-(L + 1):], rows[i][1]
            if not 0 < n < len(row):
                raise ValueError(f"a continuation of {n} tokens does not fit in {L} tokens of context")
            tokens[b, :len(row) - 1] = torch.tensor(row[:-1])
            positions += range(b * width + len(row) - 1 - n, b * width + len(row) - 1)
            targets += row[-n:]
            counts.append(n)
        hidden = model.hidden(tokens.to(device)).flatten(0, 1)[torch.tensor(positions, device=device)]
        targets = torch.tensor(targets, device=device)[:, None]
        logprobs, greedy = [], []
        for block, logits in head_blocks(hidden, model.embed_out.weight):
            target_logits = logits.gather(1, targets[block])
            logprobs.append((target_logits - logits.logsumexp(1, keepdim=True))[:, 0])
            # The first maximum is the greedy token, so a target that ties with an earlier one is not.
            greedy.append(logits.argmax(1) == targets[block][:, 0])
        logprobs = torch.cat(logprobs).double().cpu().split(counts)
        greedy = torch.cat(greedy).cpu().split(counts)
        for i, lp, g in zip(chosen, logprobs, greedy):
            results[i] = (float(lp.sum()), bool(g.all()))
    return results


def encode_pair(tokenizer, context, continuation):
    """Return (tokens, n): context and continuation encoded together, n tokens belonging to the latter.

    lm_eval/api/model.py, TemplateLM._encode_pair: white space at the context's end moves to the
    continuation, and the context's share is the length of its own encoding. An empty context is
    <|endoftext|>; a continuation that begins with it already is its own context.
    """
    if context == "":
        tokens = tokenizer.encode(continuation)
        return (tokens, len(tokens) - 1) if tokens[:1] == [ENDOFTEXT] else ([ENDOFTEXT] + tokens, len(tokens))
    kept = context.rstrip()
    continuation = context[len(kept):] + continuation
    whole = tokenizer.encode(kept + continuation)
    return whole, len(whole) - len(tokenizer.encode(kept))


def loglikelihood(model, tokenizer, requests):
    """Return [(log-likelihood, is_greedy)] of the continuation of each (context, continuation) pair of texts."""
    return score(model, [encode_pair(tokenizer, *request) for request in requests])


def loglikelihood_rolling(model, tokenizer, texts):
    """Return the log-likelihood in nats of each whole text, every token predicted exactly once.

    Windows as lm_eval/utils.py, get_rolling_token_windows with context_len 1: full windows predict all
    their L tokens from <|endoftext|> or the token before; the last one borrows earlier text as context.
    """
    L, rows, owners = model.config.seq_length, [], []
    for owner, text in enumerate(texts):
        tokens = [ENDOFTEXT] + tokenizer.encode(text)
        for start in range(1, len(tokens), L):
            end = min(start + L, len(tokens))
            rows.append((tokens[max(0, end - L - 1):end], end - start))
            owners.append(owner)
    totals = [0.0] * len(texts)
    for owner, (logprob, _) in zip(owners, score(model, rows)):
        totals[owner] += logprob
    return totals


# ---------------------------------------------------------------------------- metrics


def mean(values):
    """Return (mean, standard error); one value has no error."""
    return statistics.fmean(values), (statistics.stdev(values) / math.sqrt(len(values))
                                      if len(values) > 1 else None)


def perplexity(logprobs, iterations=100_000):
    """Return exp(-mean) and its bootstrap standard error, with lm_eval's own draws.

    lm_eval/api/metrics.py, bootstrap_stderr: 1000 resamples from each of random.Random(0), (1), ...
    numpy's RandomState([i]) is the same generator; its numbers are drawn a block at a time.
    """
    values, n, draws = np.array(logprobs), len(logprobs), []
    for seed in range(iterations // 1000 if n > 1 else 0):
        generator = np.random.RandomState([seed])
        for _ in range(10):
            picked = values[(generator.random_sample((100, n)) * n).astype(np.int64)]
            draws += np.exp(-picked.mean(axis=1)).tolist()
    return math.exp(-statistics.fmean(logprobs)), statistics.stdev(draws) if draws else None


# ---------------------------------------------------------------------------- tasks
# A task is a function (model, tokenizer, documents) -> [(task, metric, value, stderr, n)].


def lambada_openai(model, tokenizer, documents):
    """Last word of a passage: greedy accuracy, and perplexity per word (not per token)."""
    pairs = [field(doc, "text", str).rsplit(" ", 1) for doc in documents]
    results = loglikelihood(model, tokenizer, [(context, " " + word) for context, word in pairs])
    return [("lambada_openai", "acc", *mean([float(greedy) for _, greedy in results]), len(pairs)),
            ("lambada_openai", "perplexity", *perplexity([ll for ll, _ in results]), len(pairs))]


def piqa(model, tokenizer, documents):
    """Which of two solutions: by log-likelihood, and by log-likelihood per character."""
    return multiple_choice("piqa", model, tokenizer, [
        (f"Question: {field(doc, 'goal', str)}\nAnswer:",
         [field(doc, "sol1", str), field(doc, "sol2", str)], field(doc, "label", int)) for doc in documents])


def multiple_choice(task, model, tokenizer, questions):
    """Score (context, choices, index of the right one); the first of equal likelihoods wins.

    acc_norm divides by the choice's length in code points, without the space before it.
    """
    results = iter(loglikelihood(model, tokenizer, [
        (context, " " + choice) for context, choices, _ in questions for choice in choices]))
    acc, acc_norm = [], []
    for _, choices, gold in questions:
        lls = np.array([next(results)[0] for _ in choices])
        acc.append(float(np.argmax(lls) == gold))
        acc_norm.append(float(np.argmax(lls / [len(choice) for choice in choices]) == gold))
    return [(task, "acc", *mean(acc), len(questions)), (task, "acc_norm", *mean(acc_norm), len(questions))]


def heldout(model, tokenizer, documents):
    """Whole documents: bits per UTF-8 byte, overall and for each subset; ratios of sums."""
    texts = [field(doc, "text", str) for doc in documents]
    names = [(doc.get("meta") or {}).get("pile_set_name") for doc in documents]
    lls = loglikelihood_rolling(model, tokenizer, texts)
    rows = []
    for subset in [None, *sorted({name for name in names if name})]:
        members = [i for i, name in enumerate(names) if subset in (None, name)]
        bits = -sum(lls[i] for i in members) / math.log(2)
        size = sum(len(texts[i].encode()) for i in members)
        rows.append((f"heldout:{subset}" if subset else "heldout", "bits_per_byte",
                     bits / size, None, len(members)))
    return rows


TASKS = {"lambada_openai": (lambada_openai, "test"), "piqa": (piqa, "validation"),
         "heldout": (heldout, "test")}  # name: the function, and the split it reads


def field(doc, name, kind):
    """Return doc[name], or raise ValueError saying which field is missing or of the wrong type."""
    value = doc.get(name)
    if type(value) is not kind:
        raise ValueError(f"{doc['where']}: {name} is {value!r}, expected a {kind.__name__}")
    return value


def read_documents(docs, task, limit):
    """Return the task's documents from DOCS/task/split.jsonl, each with where it stands in the file."""
    path = Path(docs) / task / f"{TASKS[task][1]}.jsonl"
    if not path.exists():
        raise ValueError(f"{path}: no such file; --docs=DIR expects the documents of {task} there")
    documents = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(document, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object")
        documents.append(document | {"where": f"{path}, line {number}"})
        if len(documents) == limit:
            break
    if not documents:
        raise ValueError(f"{path}: holds no documents")
    return documents


# ---------------------------------------------------------------------------- over training


@dataclass(frozen=True)
class EvalConfig:
    model: str  # run folder, checkpoint folder or Hugging Face folder; several with commas
    tasks: str  # comma-separated
    docs: str  # folder of documents, DOCS/TASK/SPLIT.jsonl
    output: str = "results.csv"  # rows are appended; what it holds is not computed again
    steps: str = "all"  # of a run folder: all, last, or numbers with commas
    limit: int | None = None  # only the first documents of each task
    tokenizer: str = "20B_tokenizer.json"
    device: str = "auto"


HEADER = ("model", "step", "tokens", "task", "shots", "metric", "value", "stderr", "n")


def main(config):
    tasks = config.tasks.split(",")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"no task called {task}; there are {', '.join(TASKS)}")
    documents = {task: read_documents(config.docs, task, config.limit) for task in tasks}
    tokenizer = load_tokenizer(config.tokenizer)
    folders = [entry for model in config.model.split(",") for entry in find(model, config.steps)]
    done = open_results(config.output)
    todo = [(entry, task) for entry in folders for task in tasks if (*entry[:2], task) not in done]
    device = pick_device(config.device)
    loaded, model = None, None
    with tqdm(total=len(todo), unit="task", disable=None) as bar:
        for (name, step, tokens, folder), task in todo:
            bar.set_description(f"{name} step {step} {task}")
            if folder != loaded:
                loaded, model = folder, checkpoints.load_model(folder, device)
            rows = TASKS[task][0](model, tokenizer, documents[task])
            append_results(config.output, [(name, step, tokens, t, 0, metric, value, stderr, n)
                                           for t, metric, value, stderr, n in rows])
            tqdm.write(f"{name} step {step:>6} | " + " | ".join(
                f"{t} {metric} {value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "") + f" (n {n:,})"
                for t, metric, value, stderr, n in rows))
            bar.update()
    print(f"{config.output}: {len(todo)} evaluations done, {len(folders) * len(tasks) - len(todo)} were there")


def pick_device(device):
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def find(model, steps):
    """Return [(name, step, tokens seen, folder)] of the checkpoints that `model` and `steps` name."""
    path = Path(model)
    if (path / "model.safetensors").exists():
        match = re.fullmatch(r"step(\d+)", path.name)
        name = path.parent.name if match else path.name
        return [(name, match[1] if match else "", _tokens(path), path)]
    saved = checkpoints.saved_steps(path)
    if not saved:
        raise ValueError(f"{model}: neither a run folder (step0, step1, ...) nor a model.safetensors in it")
    if steps == "last":
        wanted = saved[-1:]
    elif steps == "all":
        wanted = saved
    elif re.fullmatch(r"\d+(,\d+)*", steps):
        wanted = [int(step) for step in steps.split(",")]
    else:
        raise ValueError(f"steps = {steps!r}, expected all, last, or numbers with commas")
    missing = [str(step) for step in wanted if step not in saved]
    if missing:
        raise ValueError(f"{model}: no checkpoint at step {', '.join(missing)}; "
                         f"there are {', '.join(map(str, saved))}")
    return [(path.name, str(step), _tokens(path / f"step{step}"), path / f"step{step}") for step in wanted]


def _tokens(folder):
    path = folder / "training.json"
    return read_json(path).get("tokens", "") if path.exists() else ""


def open_results(path):
    """Make the CSV if there is none, drop a torn last line, return the {(model, step, task)} it holds."""
    if not os.path.exists(path):
        append_results(path, [HEADER])
    text = Path(path).read_text(encoding="utf8")
    if not text.startswith(",".join(HEADER)):
        raise ValueError(f"{path}: its first line is not {','.join(HEADER)}; name another --output")
    whole = text[:text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    return {(row["model"], row["step"], row["task"]) for row in csv.DictReader(whole.splitlines())}


def append_results(path, rows):
    with open(path, "a", newline="", encoding="utf8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            ["" if cell is None else repr(cell) if isinstance(cell, float) else cell for cell in row]
            for row in rows)


@dataclass(frozen=True)
class SampleConfig:
    model: str  # as for evaluation
    prompt: str = ""  # empty: from <|endoftext|>
    steps: str = "last"
    n_tokens: int = 48
    temperature: float = 0.8  # 0 is greedy
    seed: int = 1234
    tokenizer: str = "20B_tokenizer.json"
    device: str = "auto"


def sample(config):
    """Print a continuation of the prompt at each step."""
    tokenizer, device = load_tokenizer(config.tokenizer), pick_device(config.device)
    prompt = torch.tensor([tokenizer.encode(config.prompt) or [ENDOFTEXT]], device=device)
    for name, step, _, folder in find(config.model, config.steps):
        model = checkpoints.load_model(folder, device)
        generator = torch.Generator(device).manual_seed(config.seed)
        tokens = model.generate(prompt, config.n_tokens, config.temperature, generator)
        print(f"--- {name} step {step}\n{tokenizer.decode(tokens[0].tolist())}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["sample"]:
        run(sample, parse(sys.argv[2:], SampleConfig))
    else:
        run(main, parse(sys.argv[1:], EvalConfig))
