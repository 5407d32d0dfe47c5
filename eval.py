"""Evaluate checkpoints over training, with exactly lm-evaluation-harness's numbers.

    python eval.py --model=RUN --tasks=lambada_openai,piqa --docs=DIR --output=results.csv
    torchrun --standalone --nproc_per_node=8 eval.py ...  # the same numbers, on 8 GPUs
    python eval.py tasks --docs=DIR                       # the tasks, and which documents are there
    python eval.py sample --model=RUN --steps=1,64,512 --prompt="In the beginning"
    python eval.py losses --model=RUN --rows=0:4096 --output=OUT        # nats of every token
    python eval.py losses --model=RUN --text=TEXTS.jsonl --output=OUT   # of every text

tasks.py has the tasks, their prompts and metrics. This file computes log-likelihoods and greedy
texts by lm_eval's rules, but several times faster: what rows of tokens have in common at their
beginning (the choices of a question, all questions behind the same few-shot examples) is computed
once, and logits only where a token is scored. Numbers change by rounding only (tests/test_eval.py:
1e-4).
"""

import hashlib
import itertools
import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
from config import check, command, file_size, note, parse, read_json, run, Table, write_json
from data import load_npy, Order, order_of, ordered, span, trained_with
from model import Cache, head_blocks, Prefix
from parallel import Processes, leave_processes
from tasks import (digest, GROUPS, measured, named_tasks, prompts, read_jsonl, read_split,
                   STYLES)
from tokenizer import ENDOFTEXT, load_tokenizer

# ---------------------------------------------------------------------------- shared beginnings


# Tokens per forward pass. Few keep a CPU's activations in its cache (10 % faster than 4096).
BATCH_TOKENS = 32768 if torch.cuda.is_available() else 2048
SHARED = 32  # rows that begin with the same 32 tokens, and fill more than a batch, share a prefix
NEVER = 1 << 40  # larger than any node's number


class Pack:
    """Rows of tokens as a tree, in which a beginning that they have in common is there once.

    Every token is a node and attends to its ancestors and itself. A new row shares nodes only with
    the row before it, so the nodes that see node j are j to ends[j] - 1. Of the rows "the cat sat"
    and "the cat ran on":

        0 the - 1 cat - 2 sat              positions 0 1 2 2 3, ends NEVER NEVER 3 NEVER NEVER
                      \\ 3 ran - 4 on      path, the nodes of the last row: 0 1 3 4

    The P tokens of a prefix before the tree are not in it; a path has them as nodes -P to -1.
    """

    def __init__(self, P):
        self.tokens, self.positions, self.ends, self.path = [], [], [], [*range(-P, 0)]
        self.scored = []  # for each row (3, n): its index, nodes, and the tokens that follow them

    def add(self, index, row, n, shared):
        """Append a row that scores its last n tokens and begins with `shared` nodes of the path."""
        start = len(self.tokens)
        for node in self.path[shared:]:
            self.ends[node] = start
        self.tokens += row[shared:-1]
        self.positions += range(shared, len(row) - 1)
        self.ends += [NEVER] * (len(self.tokens) - start)
        self.path[shared:] = range(start, len(self.tokens))
        self.scored.append(np.array([[index] * n, self.path[-n:], row[-n:]]))


def plan(rows, L, batch_tokens=BATCH_TOKENS, name="request {}".format):
    """Return batches [(prefix tokens, packs)] of rows (index, tokens, n), each scoring n tokens.

    Rows are cut on the left to L inputs. If rows with the same beginning fill more than a batch, as
    behind the same shots, it becomes a prefix that is computed once. Raises ValueError with
    name(index) if a row scores nothing or has no context.
    """
    cut = []
    for index, tokens, n in rows:
        if not 0 < n <= min(L, len(tokens) - 1):
            raise ValueError(f"{name(index)}: a continuation of {max(n, 0)} tokens behind "
                             f"{len(tokens) - max(n, 0)}, expected 1 to {L} behind at least 1")
        cut.append((index, tokens[-(L + 1):], n))
    # Sorted, rows that share much are neighbours; bytes are compared faster than lists.
    cut.sort(key=lambda row: np.array(row[1], ">u4").tobytes())
    groups = defaultdict(list)
    for _, group in itertools.groupby(cut, key=lambda row: row[1][:SHARED]):
        group, prefix = list(group), ()
        if sum(len(tokens) for _, tokens, _ in group) > batch_tokens:
            prefix = os.path.commonprefix([tokens[:-n - 1] for _, tokens, n in group])
        groups[tuple(prefix)] += group
    batches = []
    for prefix, group in groups.items():
        packs = make_packs(group, len(prefix))
        packs.sort(key=lambda pack: -len(pack.tokens))  # packs of similar length share a batch
        while packs:
            n = max(1, batch_tokens // len(packs[0].tokens))
            batches.append((prefix, packs[:n]))
            packs = packs[n:]
    return batches


def make_packs(rows, P):
    """Return Packs of sorted rows behind a prefix of P tokens.

    A row joins the pack of the row before if they share a quarter of it and the tree stays below
    twice its length, because every token is compared with the whole tree.
    """
    packs, before = [], []
    for index, row, n in rows:
        shared = len(os.path.commonprefix([before[:-1], row[:-1]]))
        small = packs and P + len(packs[-1].tokens) + len(row) - shared <= 2 * len(row)
        if not small or 4 * shared < len(row):
            packs.append(Pack(P))
            shared = P
        packs[-1].add(index, row, n, shared)
        before = row
    return packs


def pack_tensors(packs, P, like):
    """Return tokens, positions (B, T) of packs behind P tokens; mask (B, 1, T, P + T) or None."""
    nodes = torch.zeros(3, len(packs), max(len(pack.tokens) for pack in packs), dtype=torch.int64)
    for b, pack in enumerate(packs):
        nodes[:, b, :len(pack.tokens)] = torch.tensor([pack.tokens, pack.positions, pack.ends])
    tokens, positions, ends = nodes.to(like.device)
    if P == 0 and all(len(pack.path) == len(pack.tokens) for pack in packs):
        # Plain rows need no mask: padding on the right is never seen by a causal model.
        return tokens, None, None
    node = torch.arange(len(ends[0]), device=like.device)
    # Padding sees the prefix or node 0, since a softmax over nothing would be NaN.
    seen = (node <= node[:, None]) & (node[:, None] < ends[:, None])
    mask = like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return tokens, positions, F.pad(mask, (P, 0))[:, None]


def score(model, rows, batch_tokens=BATCH_TOKENS):
    """Return [(log-likelihood in nats, is_greedy)] of the last n tokens of rows (tokens, n).

    Rows are cut on the left to the context. The softmax runs over all columns, padded vocabulary
    included. is_greedy: each of the n tokens has the largest logit (the first of equal ones). Under
    torchrun the rows are shared out, and every process gets all results.
    """
    rows = [(i, *row) for i, row in enumerate(rows)]
    return run_plan(model, plan(rows, model.config.seq_length, batch_tokens), len(rows))


@torch.no_grad()
def run_plan(model, batches, n):
    """Return score's results of the indices 0 to n - 1; rows with the same index are added up."""
    lls, all_greedy, prefix, cache = np.zeros(n), np.ones(n, dtype=bool), (), None
    weight = model.embed_in.weight
    rank, processes = checkpoints.process_place()
    for tokens, packs in tqdm(batches[rank::processes], leave=False, disable=rank > 0 or None):
        P = len(tokens)
        if tokens != prefix:
            prefix, cache = tokens, None
            if P:
                layers = [Cache(model.config, 1, P, weight) for _ in model.layers]
                model.hidden(torch.tensor([prefix], device=weight.device), cache=layers)
                cache = [Prefix(layer) for layer in layers]
        tokens, positions, mask = pack_tensors(packs, P, weight)
        which, nodes, targets = np.concatenate([
            scored + [[0], [b * tokens.shape[1]], [0]]
            for b, pack in enumerate(packs) for scored in pack.scored], axis=1)
        # Choices of one token are scored at the same node, whose logits are computed once.
        nodes, at = np.unique(nodes, return_inverse=True)
        hidden = model.hidden(tokens, positions, mask, cache, np.divmod(nodes, tokens.shape[1]))
        logprobs, greedy = target_logprobs(model, hidden, at, targets)
        np.add.at(lls, which, logprobs)
        np.logical_and.at(all_greedy, which, greedy)
    lls, all_greedy = zip(*Processes.gather((lls, all_greedy)))
    return list(zip(sum(lls).tolist(), np.all(all_greedy, axis=0).tolist()))


def target_logprobs(model, hidden, at, targets):
    """Return log p(target), and whether it is the greedy token, of targets (N,).

    Target i is predicted from row at[i] of hidden (n, D).
    """
    at, targets = (torch.as_tensor(values, device=hidden.device) for values in (at, targets))
    logprobs = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for block, logits in head_blocks(hidden, model.embed_out.weight):
        here = torch.nonzero((at >= block.start) & (at < block.stop))[:, 0]
        row, target = at[here] - block.start, targets[here]
        greedy[here] = logits.argmax(1)[row] == target
        logprobs[here] = torch.log_softmax(logits, 1, out=logits)[row, target].double()
    return logprobs.cpu().numpy(), greedy.cpu().numpy()


# ---------------------------------------------------------------------------- requests


def encode_pair(tokenizer, context, continuation, style="v0.4"):
    """Return (tokens of context and continuation, number of the latter's tokens).

    lm_eval/api/model.py, TemplateLM._encode_pair: both are encoded together, so white space at the
    context's end counts as the continuation's. An empty context is <|endoftext|>, once.
    v0.3 (lm_eval/base.py, BaseLM.loglikelihood) encodes each alone.
    """
    if style == "v0.3":
        tokens = tokenizer.encode_lines(continuation)
        return (tokenizer.encode_lines(context) or [ENDOFTEXT]) + tokens, len(tokens)
    if context == "":
        context, continuation = "<|endoftext|>", continuation.removeprefix("<|endoftext|>")
    whole = tokenizer.encode_lines(context + continuation)
    return whole, len(whole) - len(tokenizer.encode_lines(context.rstrip()))


def loglikelihood(model, tokenizer, requests):
    """Return [(log-likelihood, is_greedy)] of (context, continuation) pairs of texts."""
    return score(model, [encode_pair(tokenizer, *request) for request in requests])


def rolling_rows(tokenizer, texts, L):
    """Return plan's rows (number of the text, tokens, n) that predict every token of a text once.

    lm_eval/utils.py, get_rolling_token_windows with context_len 1: a full window predicts all its L
    tokens; the last, shorter one has earlier text as context. <|endoftext|> precedes a text.
    """
    rows = []
    for i, text in enumerate(texts):
        tokens = [ENDOFTEXT] + tokenizer.encode(text)
        for start in range(1, len(tokens), L):
            end = min(start + L, len(tokens))
            rows.append((i, tokens[max(0, end - L - 1):end], end - start))
    return rows


def loglikelihood_rolling(model, tokenizer, texts):
    """Return the log-likelihood in nats of each whole text."""
    L = model.config.seq_length
    batches = plan(rolling_rows(tokenizer, texts, L), L)
    return [ll for ll, _ in run_plan(model, batches, len(texts))]


def generate_until(model, tokenizer, prompts, stops=("\n",), n_tokens=256,
                   batch_tokens=BATCH_TOKENS):
    """Return the greedy continuation of each prompt, up to the first of `stops` or n_tokens.

    lm_eval/models/huggingface.py, HFLM.generate_until: prompts are cut on the left to leave room
    for n_tokens; <|endoftext|> is always a stop.
    """
    stop = re.compile("|".join(map(re.escape, (*stops, "<|endoftext|>"))))

    def decode(tokens):
        return tokenizer.decode([token for token in tokens if token != 1])  # 1 is <|padding|>

    # Tokens that can hold a stop, if each is one byte; 3 more for a character that is cut in two.
    window = max((len(words.encode()) for words in stops), default=0) + 3

    def finished(new):
        return torch.tensor([bool(stop.search(decode(row))) for row in new[:, -window:].tolist()])

    room, device = model.config.seq_length - n_tokens, model.embed_in.weight.device
    encoded = [(tokenizer.encode_lines(prompt) or [ENDOFTEXT])[-room:] for prompt in prompts]
    rank, processes = checkpoints.process_place()
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))[rank::processes]
    results = []  # (number of the prompt, text)
    while order:
        T = len(encoded[order[0]])
        n = max(1, min(8 * batch_tokens, 16384) // (T + n_tokens))  # all keys and values are kept
        chosen, order = order[:n], order[n:]
        padding = [T - len(encoded[i]) for i in chosen]
        tokens = torch.tensor([[0] * pad + encoded[i] for pad, i in zip(padding, chosen)])
        out = model.generate(tokens.to(device), n_tokens, 0, finished=finished,
                             padding=torch.tensor(padding, device=device))
        results += [(i, stop.split(decode(row))[0]) for i, row in zip(chosen, out[:, T:].tolist())]
    return [text for _, text in sorted(itertools.chain(*Processes.gather(results)))]


class Job:
    """A task, or the tasks of a group, made into requests that any number of models can answer."""

    def __init__(self, name, docs, shots=0, style="v0.4", limit=None):
        members = GROUPS[name][0] if name in GROUPS else [name]
        self.name, self.style = name, style
        self.task = STYLES[style][members[0]]  # a group's tasks differ only in their documents
        self.members = {}  # {task: its Questions}
        self.hashes = {}  # {task or group: hash of its documents}
        self.requests = []  # of all Questions: (context, continuation), or (prompt,)
        self.asked = []  # for each request: (task, number of the document, its file and line)
        for member in members:
            self.members[member], self.hashes[member] = prompts(
                STYLES[style][member], docs, shots, style, limit)
            for number, question in enumerate(self.members[member]):
                self.requests += question.requests
                self.asked += [(member, number, question.where)] * len(question.requests)
        if name in GROUPS:
            self.hashes[name] = digest(list(self.hashes.values()))


@lru_cache(maxsize=None)  # the same for all checkpoints
def plan_job(job, tokenizer, L, batch_tokens):
    """Return the batches that score a job's requests with a context of L tokens."""
    if job.task.kind == "rolling":
        rows = rolling_rows(tokenizer, [text for _, text in job.requests], L)
    else:
        rows = [(i, *encode_pair(tokenizer, *request, job.style))
                for i, request in enumerate(job.requests)]
    return plan(rows, L, batch_tokens, lambda i: f"{job.asked[i][0]}: {job.asked[i][2]}")


def answer(model, tokenizer, job, batch_tokens=BATCH_TOKENS):
    """Return the result of each request: (log-likelihood, is_greedy), or (text,)."""
    if job.task.kind == "generate":
        texts = generate_until(model, tokenizer, [prompt for [prompt] in job.requests],
                               job.task.stops, job.task.n_tokens, batch_tokens)
        return [(text,) for text in texts]
    batches = plan_job(job, tokenizer, model.config.seq_length, batch_tokens)
    return run_plan(model, batches, len(job.requests))


def measure(job, results):
    """Return rows [(task, metric, value, stderr, n)] of a job's results, a group's own last."""
    rows, results = [], iter(results)
    for name, questions in job.members.items():
        own = [[next(results) for _ in question.requests] for question in questions]
        rows += [(name + suffix, *row) for suffix, *row in measured(job.task, questions, own)]
    return rows + (GROUPS[job.name][1](rows) if job.name in GROUPS else [])


# ---------------------------------------------------------------------------- over training


@dataclass(frozen=True, kw_only=True)
class Models:
    """Which checkpoints to evaluate, and on what device."""
    model: str  # run, checkpoint or Hugging Face folder; several separated by commas
    steps: str = "all"  # of a run folder: all, last, or numbers separated by commas
    tokenizer: str | None = None  # None: the model's own, else 20B_tokenizer.json
    device: str = "auto"  # cuda if there is one, else cpu


@dataclass(frozen=True)
class EvalConfig(Models):
    tasks: str  # names separated by commas; `python eval.py tasks` lists them
    docs: str  # folder of documents, DOCS/TASK/SPLIT.jsonl
    output: str = "results.csv"  # results are appended; evaluations already in it are skipped
    samples: str | None = None  # JSON Lines file to which every request and its result are appended
    shots: int = 0  # few-shot examples before each question
    style: str = "v0.4"  # of lm-evaluation-harness; v0.3 made the paper's result files
    dtype: str = "float32"  # as in the paper; lm_eval loads the published files in float16
    limit: int | None = None  # number of documents of each task; None: all
    batch_tokens: int = BATCH_TOKENS  # tokens per forward pass: 32768 on a GPU, else 2048

    def __post_init__(self):
        check(self, " or ".join(STYLES), STYLES.__contains__, "style")
        check(self, "float32, float16 or bfloat16", checkpoints.FLOATS.__contains__, "dtype")
        check(self, "at least 0", lambda value: value >= 0, "shots")
        check(self, "at least 1", lambda value: value >= 1, "limit", "batch_tokens")


COLUMNS = ("model", "step", "tokens", "task", "shots", "metric", "value", "stderr", "n", "style",
           "dtype", "docs")
identity = itemgetter("model", "step", "task", "shots", "metric", "style", "dtype", "docs")


def main(config):
    # The first process may take longer over a task than gloo's 30 minutes; the others wait for it.
    processes = Processes(config.device, timeout=timedelta(days=30))
    jobs = [Job(name, config.docs, config.shots, config.style, config.limit)
            for name in named_tasks(config.tasks, config.style)]
    for job in [job for job in jobs if not all(job.members.values())]:
        problem = f"{config.docs}/{job.task.folder}: holds no documents of {job.name}"
        if job.name in config.tasks.split(","):
            raise ValueError(problem)
        note(f"{problem}; left out")  # the original CrowS-Pairs has no bias_type "autre"
        jobs.remove(job)
    entries = find_all(config.model, config.steps)
    processes.agree(asdict(config) | {"device": processes.device.type,
                                      "documents": [job.hashes for job in jobs]})
    # Only the first process reads and writes the output files.
    table = processes.together(lambda: Table(config.output, COLUMNS), first_alone=True)
    if config.samples:
        processes.together(lambda: open_samples(config.samples), first_alone=True)
    done = processes.gather(table and set(map(identity, table.rows)))[0]
    tokenizer, n_new = None, 0
    for entry in entries:
        # A job's rows are written in order, so all are there if the last one is.
        todo = [job for job in jobs if identity(csv_row(
            config, entry, job, job.name, job.task.metrics.split()[-1])) not in done]
        if not todo:
            continue
        path = checkpoints.folder_tokenizer(entry[3], config.tokenizer)
        tokenizer = tokenizer or load_tokenizer(path)  # all are the same
        model = checkpoints.load_model(entry[3], processes.device)
        model = model.to(checkpoints.FLOATS[config.dtype])
        for job in todo:
            results = answer(model, tokenizer, job, config.batch_tokens)
            if processes.rank == 0:
                record(config, table, done, entry, job, results)
        n_new += len(todo)
        del model  # two may not fit into memory
    if processes.rank == 0:
        print(f"{config.output}: {n_new} evaluations done, "
              f"{len(entries) * len(jobs) - n_new} were there")
    leave_processes()


def csv_row(config, entry, job, task, metric, value=None, stderr=None, n=None):
    """Return {column: cell}; a task of a group has the hash of its own documents."""
    docs = job.hashes.get(task.partition(":")[0], job.hashes[job.name])
    return dict(zip(COLUMNS, (*entry[:3], task, str(config.shots), metric, value, stderr, n,
                              job.style, config.dtype, docs)))


def open_samples(path):
    """Create the samples file, or remove a last line that was cut off when a process was killed."""
    with open(path, "ab+") as file:  # refused now, not in an hour, if it cannot be written
        file_size(path)  # refuses a pipe
        file.seek(0)
        whole = 0
        for line in file:
            if not line.startswith(b'{"model": '[:len(line)]):
                raise ValueError(f"{path}: holds other lines than samples; name another --samples")
            whole += len(line) * line.endswith(b"\n")
        file.truncate(whole)


def record(config, table, done, entry, job, results):
    """Append a job's requests to the samples and its rows to the CSV, and print a summary."""
    name, step, *_ = entry
    if config.samples:
        cells = ("context", "continuation", "loglikelihood", "is_greedy")
        if job.task.kind == "generate":
            cells = ("context", "generated")
        with open(config.samples, "a", encoding="utf8") as file:
            for (task, number, _), request, result in zip(job.asked, job.requests, results):
                line = {"model": name, "step": step, "task": task, "shots": config.shots,
                        "style": job.style, "doc_id": number}
                line |= zip(cells, (*request, *result))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    rows = [csv_row(config, entry, job, *row) for row in measure(job, results)]
    # Some may be there: a kill has cut off the last ones, or a group's task was evaluated alone.
    new = [row for row in rows if identity(row) not in done]
    table.append(*(row.values() for row in new))
    done.update(map(identity, new))
    print(f"{name} step {step:>6} | {job.name} |", " | ".join(
        f"{row['metric']} {row['value']:.4f}" + (
            "" if row["stderr"] is None else f" ± {row['stderr']:.4f}")
        for row in rows if row["task"] == job.name))


def find_all(models, steps):
    """Return [(name, step, tokens seen, folder)] of the checkpoints of comma-separated models."""
    found = {}
    for model in models.split(","):
        path = Path(os.path.abspath(model))  # gives "." a name
        there = {str(step): folder for step, folder in checkpoints.step_folders(path)}
        name, folders = path.name, there
        if not there:  # the folder of a single checkpoint
            match = re.fullmatch(r"step(\d+)", name)
            name, step = (path.parent.name, match[1]) if match else (name, "")
            folders = {step: path}
        elif steps == "last":
            folders = dict([*there.items()][-1:])
        elif steps != "all":
            folders = {step: path / f"step{step}" for step in steps.split(",")}
        for step, folder in folders.items():
            if not checkpoints.is_whole(folder):
                raise ValueError(f"{folder}: no whole checkpoint (missing or damaged); steps in "
                                 f"{model}: {', '.join(there) or 'none'}")
            if found.setdefault((name, step), folder) != folder:
                raise ValueError(f"two folders would be called {name} step {step}; rename one")
    return [(name, step, tokens_seen(folder), folder) for (name, step), folder in found.items()]


def tokens_seen(folder):
    """Return the tokens that a run's checkpoint, or one with a published name, was trained on."""
    name, step = checkpoints.identify(folder)
    training = {} if step is None else checkpoints.read_training(folder, step)
    return training.get("tokens", step << 21 if name and step is not None else "")


# ---------------------------------------------------------------------------- other commands


@dataclass(frozen=True)
class TasksConfig:
    docs: str = ""  # folder of documents, to count those that are there
    style: str = "v0.4"  # or v0.3


def list_tasks(config):
    """List the tasks; with --docs, how many of their documents are there, or what is missing."""
    check(config, " or ".join(STYLES), STYLES.__contains__, "style")
    for name, task in STYLES[config.style].items():
        line = f"{name:46} {task.kind:14} {task.n or '':6}"
        for split in dict.fromkeys((task.split, task.pool or task.split)) if config.docs else ():
            try:
                line += f"  {split} {len(read_split(config.docs, task, split)):,}"
            except (ValueError, OSError) as error:
                line += "  " + str(error).removeprefix(f"{config.docs}/")
        print(line)
    groups = [name for name, (members, _) in GROUPS.items() if members[0] in STYLES[config.style]]
    print("groups:", ", ".join(groups), "(arithmetic means all arithmetic_*)")


@dataclass(frozen=True)
class SampleConfig(Models):
    prompt: str = ""  # empty: <|endoftext|>
    steps: str = "last"
    n_tokens: int = 48
    temperature: float = 0.8  # 0 is greedy
    seed: int = 1234

    def __post_init__(self):
        check(self, "at least 0", lambda value: value >= 0, "n_tokens", "temperature")


@torch.no_grad()
def sample(config):
    """Print a continuation of the prompt at each step."""
    device = Processes(config.device).device
    for name, step, _, folder in find_all(config.model, config.steps):
        tokenizer = load_tokenizer(checkpoints.folder_tokenizer(folder, config.tokenizer))
        prompt = torch.tensor([tokenizer.encode(config.prompt) or [ENDOFTEXT]], device=device)
        model = checkpoints.load_model(folder, device)
        generator = torch.Generator(device).manual_seed(config.seed)
        if not model(prompt).isfinite().all():
            raise ValueError(f"{folder}: its logits are not finite; `verify.py verify` says more")
        tokens = model.generate(prompt, config.n_tokens, config.temperature, generator)
        print(f"--- {name} step {step}\n{tokenizer.decode(tokens[0].tolist())}")
        del model  # two may not fit into memory


@dataclass(frozen=True)
class LossesConfig(Models):
    output: str  # writes OUTPUT.npy, float32 (checkpoints, rows, tokens), and OUTPUT.json
    data: str | None = None  # PREFIX of a token file; None: what the first model was trained on
    rows: str = "0:4096"  # first:last+1, in the order in which the first model was trained
    text: str | None = None  # JSON Lines file: the "text" of each document is a row
    batch_tokens: int = BATCH_TOKENS  # tokens per forward pass

    def __post_init__(self):
        check(self, "at least 1", lambda value: value >= 1, "batch_tokens")


def losses(config):
    """Write the nats of every token of the same rows at every checkpoint; goes on if stopped.

    A text begins after <|endoftext|>; behind its end is NaN. OUTPUT.json says which rows or
    documents these are, and which checkpoints are done.
    """
    processes = Processes(config.device, timeout=timedelta(days=30))
    entries = find_all(config.model, config.steps)
    rows, what = loss_rows(config, entries[0][3])
    path, arrays, done = f"{config.output}.json", f"{config.output}.npy", 0
    shape = len(entries), len(rows), rows.shape[1] - 1
    names = [[name, step] for name, step, *_ in entries]
    # What the JSON file says after each checkpoint.
    at = [what | {"checkpoints": names[:n]} for n in range(len(entries) + 1)]
    if os.path.exists(path) or os.path.exists(arrays):
        before = os.path.exists(path) and read_json(path)  # an array alone is not ours
        done = at.index(before) if before in at else None
        if done is None or (done and load_npy(arrays).shape != shape):
            raise ValueError(f"{arrays}: of other checkpoints or rows; name another --output")
    processes.agree({"the rows": what, "what is there already": done})
    if processes.rank == 0:
        write_json(path, at[done])
        results = np.lib.format.open_memmap(arrays, "r+" if done else "w+", np.float32, shape)
        with open(arrays, "r+b") as file:  # a full disk is an error here, but a crash in a store
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(arrays))
    batches = torch.tensor(rows[processes.rank::processes.count], device=processes.device).split(
        max(1, config.batch_tokens // rows.shape[1]))
    for i in tqdm(range(done, len(entries)), disable=processes.rank > 0 or None):
        model = checkpoints.load_model(entries[i][3], processes.device)
        parts = processes.gather([token_losses(model, some) for some in batches if len(some)])
        del model  # two may not fit into memory
        if processes.rank == 0:
            for rank, part in enumerate(filter(None, parts)):  # the last may have no rows
                results[i, rank::processes.count] = np.concatenate(part)
            results.flush()
            write_json(path, at[i + 1])
    if processes.rank == 0:
        print(f"{arrays}: {len(entries)} checkpoints, {len(entries) - done} done now")
    leave_processes()


def loss_rows(config, folder):
    """Return the rows of tokens (n, T + 1), -1 behind the end of a text, and what they are."""
    model, tokenizer = config.model.split(",")[0], None
    if config.text:
        tokenizer = load_tokenizer(checkpoints.folder_tokenizer(folder, config.tokenizer))
        what = {"text": config.text,
                "documents": [document.get("id") for document in read_jsonl(config.text)]}
    else:
        order = order_of(model, config.data)
        numbers = span("rows", config.rows, len(ordered(order)))
        what = {"order": asdict(order), "rows": [numbers.start, numbers.stop]}
        trained_on = trained_with(model).get("data", order.data)
        if trained_on != order.data:
            what["trained_on"] = trained_on
    rows = token_rows(what, tokenizer)
    if rows.shape[1] < 2:
        raise ValueError(f"{config.text}: every text is empty")
    return rows, what | {"sha256": hashlib.sha256(rows.tobytes()).hexdigest()}


def token_rows(what, tokenizer):
    """Return the rows of tokens (n, T + 1) that OUTPUT.json names, -1 behind the end of a text."""
    if "order" in what:
        return ordered(Order(**what["order"])).rows(range(*what["rows"])).astype(np.int64)
    encoded = [[ENDOFTEXT] + tokenizer.encode(str(document["text"]))
               for document in read_jsonl(what["text"])]
    return np.array([*itertools.zip_longest(*encoded, fillvalue=-1)]).T


@torch.no_grad()
def token_losses(model, rows):
    """Return the nats of all tokens but the first of rows (n, T + 1) as (n, T); NaN for -1."""
    hidden, targets = model.hidden(rows[:, :-1].clamp(min=0)).flatten(0, 1), rows[:, 1:].flatten()
    logprobs, _ = target_logprobs(model, hidden, np.arange(len(hidden)), targets.clamp(min=0))
    return np.where((targets >= 0).cpu().numpy(), -logprobs, np.nan).reshape(len(rows), -1)


if __name__ == "__main__":
    commands = {"tasks": (TasksConfig, list_tasks), "sample": (SampleConfig, sample),
                "losses": (LossesConfig, losses)}
    if sys.argv[1:2] and sys.argv[1] in commands:
        command(sys.argv[1:], commands)
    else:
        run(main, parse(sys.argv[1:], EvalConfig))
