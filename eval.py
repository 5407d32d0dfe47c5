"""Evaluate checkpoints over training, with exactly lm-evaluation-harness's numbers.

    python eval.py --model=RUN --steps=all --tasks=lambada_openai,piqa --docs=DIR \\
        --output=results.csv
    torchrun --standalone --nproc_per_node=8 eval.py ...  # the same numbers, shared out
    python eval.py tasks --docs=DIR                       # the tasks, and which documents are there
    python eval.py sample --model=RUN --steps=1,64,512 --prompt="In the beginning"

--model is a run folder of ours, one of its step folders, or any GPT-NeoX folder in Hugging Face's
layout. --docs holds a folder for each task with its documents as distributed, for instance
DIR/piqa/validation.jsonl. What the CSV already holds is skipped, so the same command goes on.

tasks.py has the tasks, their prompts and metrics; here is what the model does with them.
Log-likelihoods and greedy texts follow lm_eval's rules, several times faster: rows that begin alike
(the choices of a question, all questions behind the same shots) share the work on what they share,
logits are computed only where a token is scored, and rows of like length are batched by tokens.
None of it changes a number by more than rounding (tests/test_scoring.py: 1e-4).
"""

import itertools
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoints
from config import check, COUNT, NUMBER, parse, read_json, run, Table, TEXT
from model import Cache, Prefix, head_blocks, read_config
from parallel import Processes
from tasks import (GROUPS, SEVERAL, STYLES, NoDocuments, digest, named_tasks, prompts, read_split,
                   tasks_of)
from tokenizer import ENDOFTEXT, N_TOKENS, load_tokenizer

# ---------------------------------------------------------------------------- shared beginnings


class Pack:
    """Rows of tokens as a tree: what they begin with in common is there once.

    The rows "the cat sat" and "the cat ran on" are the nodes

        0 the - 1 cat - 2 sat
                      \\ 3 ran - 4 on        positions 0 1 2 2 3

    A node is a token; its position is its depth, and it sees its ancestors and itself. `branches`
    are the chains that the tree is made of, (first node, end, ancestors of the first): here
    (0, 3, []) and (3, 5, [0, 1]). `path` has the nodes of the row that was added last.
    """

    def __init__(self):
        self.tokens, self.positions, self.branches, self.path, self.scored = [], [], [], [], []

    def add(self, index, row, n, shared):
        """Append a row of which n tokens are scored and the `shared` first are the last row's."""
        start, end = len(self.tokens), len(self.tokens) + len(row) - 1 - shared
        ancestors = self.path[:shared]
        if end > start:
            self.branches.append((start, end, ancestors))
        self.tokens.extend(row[shared:-1])
        self.positions.extend(range(shared, len(row) - 1))
        self.path = ancestors + list(range(start, end))
        self.scored.append((index, self.path[-n:], row[-n:]))


def tokens_per_batch(model):
    """Return how many tokens a batch may have where the model is.

    Fewer keep a CPU's activations in its cache (a tenth faster than 4096); a GPU wants many.
    """
    return 2048 if model.embed_in.weight.device.type == "cpu" else 32768


JOINS = 4  # a row joins the pack before it if they share this part of it, a quarter
PACK_GROWS = 1.5  # a pack may be so many times as long as the row that joins it, and
PACK_SLACK = 256  # so many tokens longer: attention looks at the whole tree
PREFIX = 32  # tokens that packs must share to be one group
PREFIX_PAYS = 512  # tokens that a group must save for its prefix to be computed apart


def plan(rows, L, batch_tokens):
    """Return batches [(prefix tokens, packs)] of all rows (tokens, n), cut on the left to L + 1.

    Rows next to each other in alphabetical order share most. A row joins the pack of the one before
    if they share much of it and the tree stays small. Packs that share a long beginning (the shots)
    are a group, whose beginning is computed once, as a prefix of its batches.
    """
    cut = [np.array(tokens[-(L + 1):]) for tokens, _ in rows]
    for row, (_, n) in zip(cut, rows):
        if not 0 < n < len(row):
            raise ValueError(f"a continuation of {n} tokens does not fit in {L} tokens of context")
    order = sorted(range(len(rows)), key=lambda i: cut[i].astype(">u4").tobytes())
    groups, before = [], None  # [packs, how many tokens all of them share]
    for i in order:
        row, n = cut[i], rows[i][1]
        shared = 0 if before is None else _common(before[:-1], row[:-1])
        own = len(row) - 1 - n  # positions of the context: a prefix has no scored position
        packs, P = groups[-1] if groups else ([], 0)
        still = min(P, shared, own)  # what the group would share with this row in it
        small = packs and (len(packs[-1].tokens) + len(row) - shared
                           <= int(max(len(row), PACK_SLACK) * PACK_GROWS) + PACK_SLACK)
        if small and JOINS * shared >= len(row) and (len(packs) == 1 or still >= P // 2):
            groups[-1][1] = still
        elif packs and still >= max(PREFIX, P // 2):
            packs.append(Pack())
            groups[-1][1], shared = still, 0
        else:
            groups.append([[Pack()], own])
            shared = 0
        groups[-1][0][-1].add(i, row.tolist(), n, shared)
        before = row
    alone, batches = [], []
    for packs, P in groups:
        if (len(packs) - 1) * P < PREFIX_PAYS:
            alone += packs
        else:
            batches += _batches(packs, P, batch_tokens)
    return _batches(alone, 0, batch_tokens) + batches


def _common(a, b):
    m = min(len(a), len(b))
    different = np.flatnonzero(a[:m] != b[:m])
    return int(different[0]) if len(different) else m


def _batches(packs, P, batch_tokens):
    """Cut packs into batches of like lengths, longest first, each with its prefix of P tokens."""
    packs, batches = sorted(packs, key=lambda pack: -len(pack.tokens)), []
    while packs:
        n = max(1, batch_tokens // (len(packs[0].tokens) - P))
        batches.append((packs[0].tokens[:P], packs[:n]))
        packs = packs[n:]
    return batches


def _tensors(packs, P, device):
    """Return tokens, positions (B, T) of packs behind a prefix of P; mask (B, 1, T, P + T) or None.

    A node's column in the mask is its number, for the prefix's P tokens are its first nodes.
    """
    T = max(len(pack.tokens) for pack in packs) - P
    tokens, positions = (torch.zeros(len(packs), T, dtype=torch.int64) for _ in range(2))
    for b, pack in enumerate(packs):
        length = len(pack.tokens) - P
        tokens[b, :length] = torch.tensor(pack.tokens[P:])
        positions[b, :length] = torch.tensor(pack.positions[P:])
    if P == 0 and all(len(pack.branches) == 1 for pack in packs):
        # Plain rows are padded on the right, which a causal model never looks at.
        return tokens.to(device), None, None
    mask = torch.full((len(packs), 1, T, P + T), -torch.inf)
    mask[..., :P] = 0
    triangle = torch.full((T, T), -torch.inf).triu(1)
    for b, pack in enumerate(packs):
        for start, end, ancestors in pack.branches:
            start = max(start, P)
            inside = mask[b, 0, start - P:end - P]
            inside[:, ancestors] = 0
            inside[:, start:end] = triangle[:end - start, :end - start]
        # Padding may see everything. If it saw nothing, its softmax would be NaN.
        mask[b, 0, len(pack.tokens) - P:] = 0
    return tokens.to(device), positions.to(device), mask.to(device)


# ---------------------------------------------------------------------------- scoring


def score(model, rows, batch_tokens=None):
    """Return [(log-likelihood in nats, is_greedy)] of the last n tokens of rows (tokens, n).

    Each row is cut on the left to the model's context. The softmax runs over all columns, padded
    vocabulary included; is_greedy says that every one of the n tokens is the largest logit's, the
    first of equals. Under torchrun the rows are shared out and every process gets all results.
    """
    batches = plan(rows, model.config.seq_length, batch_tokens or tokens_per_batch(model))
    return run_plan(model, batches, len(rows))


@torch.no_grad()
def run_plan(model, batches, n_rows, progress=None):
    """Return score's results of the rows that `batches` holds."""
    results, prefix, cache = [None] * n_rows, None, None
    device, dtype = model.embed_in.weight.device, model.embed_in.weight.dtype
    for prefix_tokens, packs in _share(batches):
        P = len(prefix_tokens)
        if prefix_tokens != prefix:
            prefix, cache = prefix_tokens, _read(model, prefix_tokens) if P else None
        tokens, positions, mask = _tensors(packs, P, device)
        mask = None if mask is None else mask.to(dtype)
        hidden = model.hidden(tokens, positions, mask, cache).flatten(0, 1)
        scored = [(index, b * tokens.shape[1] - P + np.array(nodes), targets)
                  for b, pack in enumerate(packs) for index, nodes, targets in pack.scored]
        logprobs, greedy = _logprobs(
            model, hidden, np.concatenate([nodes for _, nodes, _ in scored]),
            [target for *_, targets in scored for target in targets])
        ends = np.cumsum([len(targets) for *_, targets in scored])[:-1]
        for (index, *_), lp, g in zip(scored, np.split(logprobs, ends), np.split(greedy, ends)):
            results[index] = (float(lp.sum()), bool(g.all()))
        if progress:
            progress(sum(len(pack.scored) for pack in packs))
    return _gather(results)


def _read(model, tokens):
    """Return a Prefix of these tokens for each layer."""
    cache = [Cache(model.config, 1, len(tokens), model.embed_in.weight) for _ in model.layers]
    model.hidden(torch.tensor([tokens], device=model.embed_in.weight.device), cache=cache)
    return [Prefix(layer) for layer in cache]


def _logprobs(model, hidden, nodes, targets):
    """Return log p(target), and is it the greedy token, for targets at rows `nodes` of hidden."""
    # Choices of one token are scored at the same node, whose logits are computed once.
    nodes, which = np.unique(nodes, return_inverse=True)
    device = hidden.device
    hidden = hidden[torch.tensor(nodes, device=device)]
    which, targets = (torch.tensor(values, device=device) for values in (which, targets))
    logprobs = torch.empty(len(targets), dtype=torch.float64, device=device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=device)
    for block, logits in head_blocks(hidden, model.embed_out.weight):
        here = torch.nonzero((which >= block.start) & (which < block.stop))[:, 0]
        row, target = which[here] - block.start, targets[here]
        target_logits, first = logits[row, target], logits.argmax(1, keepdim=True)
        greedy[here] = first[row, 0] == target
        largest = logits.gather(1, first)
        # log sum exp = largest logit - log(its probability). This works in place and takes half
        # the time of torch.logsumexp.
        log_sum = largest - torch.softmax(logits, 1, out=logits).gather(1, first).log()
        logprobs[here] = (target_logits - log_sum[row, 0]).double()
    return logprobs.cpu().numpy(), greedy.cpu().numpy()


def _share(batches):
    """Return this process's part of the batches: neighbours, which have a prefix in common."""
    if not dist.is_initialized():
        return batches
    cost = np.cumsum([sum(len(pack.tokens) - len(prefix) for pack in packs)
                      for prefix, packs in batches])
    owner = (cost - 1) * dist.get_world_size() // cost[-1] if batches else []
    return [batch for batch, rank in zip(batches, owner) if rank == dist.get_rank()]


def _gather(results):
    """Return the results of all processes; each has None where another one's are."""
    if not dist.is_initialized():
        return results
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, results)
    return [next((part[i] for part in parts if part[i] is not None), None)
            for i in range(len(results))]


# ---------------------------------------------------------------------------- texts


@lru_cache(maxsize=1 << 16)
def _encode_piece(tokenizer, piece):
    return tokenizer.encode(piece)


def encode(tokenizer, text):
    """Return tokenizer.encode(text), line by line: prompts have most of their lines in common.

    No token reaches over the start of a newline that follows anything but white space.
    """
    return [token for piece in re.split(r"(?<=\S)(?=\n)", text)
            for token in _encode_piece(tokenizer, piece)]


def encode_pair(tokenizer, context, continuation, style="v0.4"):
    """Return (tokens, n): context and continuation encoded together, n tokens of them the latter's.

    lm_eval/api/model.py, TemplateLM._encode_pair: white space at the context's end moves to the
    continuation, and the context's share is the length of its own encoding. An empty context is
    <|endoftext|>; a continuation that begins with it already is its own context. v0.3
    (lm_eval/base.py, BaseLM.loglikelihood) encodes each alone, white space where it stands.
    """
    if style == "v0.3":
        tokens = encode(tokenizer, continuation)
        return (encode(tokenizer, context) or [ENDOFTEXT]) + tokens, len(tokens)
    if context == "":
        tokens = encode(tokenizer, continuation)
        tokens = tokens if tokens[:1] == [ENDOFTEXT] else [ENDOFTEXT] + tokens
        return tokens, len(tokens) - 1
    kept = context.rstrip()
    whole = encode(tokenizer, context + continuation)
    return whole, len(whole) - len(encode(tokenizer, kept))


def loglikelihood(model, tokenizer, requests):
    """Return [(log-likelihood, is_greedy)] of each (context, continuation) pair of texts."""
    return score(model, [encode_pair(tokenizer, *request) for request in requests])


def rolling_rows(tokenizer, texts, L):
    """Return (rows for score, each one's text by index) that predict every token of a text once.

    Windows as lm_eval/utils.py, get_rolling_token_windows with context_len 1: full windows predict
    all their L tokens from <|endoftext|> or the token before; the last one borrows earlier text as
    context.
    """
    rows, owners = [], []
    for owner, text in enumerate(texts):
        tokens = [ENDOFTEXT] + tokenizer.encode(text)
        for start in range(1, len(tokens), L):
            end = min(start + L, len(tokens))
            rows.append((tokens[max(0, end - L - 1):end], end - start))
            owners.append(owner)
    return rows, owners


def loglikelihood_rolling(model, tokenizer, texts):
    """Return the log-likelihood in nats of each whole text, every token predicted exactly once."""
    rows, owners = rolling_rows(tokenizer, texts, model.config.seq_length)
    return totals(score(model, rows), owners, len(texts))


def totals(results, owners, n):
    """Return the sum of the log-likelihoods of each owner's rows."""
    sums = [0.0] * n
    for owner, (logprob, _) in zip(owners, results):
        sums[owner] += logprob
    return sums


def generate_until(model, tokenizer, prompts, stops=("\n",), n_tokens=256, batch_tokens=16384,
                   progress=None):
    """Return what greedy decoding says after each prompt, up to the first of `stops` or n_tokens.

    lm_eval/models/huggingface.py, HFLM.generate_until: prompts are cut on the left to leave room
    for n_tokens, the text at each stop in turn; <|endoftext|> always ends it.
    """
    L, device = model.config.seq_length, model.embed_in.weight.device
    if n_tokens >= L:
        raise ValueError(f"{n_tokens} tokens to generate leave no room for a prompt "
                         f"in {L} tokens of context")
    stops = (*stops, "<|endoftext|>")
    # The last tokens that can hold a stop; 3 more for a character that is cut in two.
    window = max(len(stop.encode()) for stop in stops[:-1] or stops) + 3

    def text(tokens):
        tokens = list(itertools.takewhile(lambda token: token != ENDOFTEXT, tokens))
        return tokenizer.decode([token for token in tokens if 1 < token < N_TOKENS])

    def finished(new):
        tails = [(row, text(row[-window:])) for row in new.tolist()]
        return torch.tensor([row[-1] == ENDOFTEXT or any(stop in tail for stop in stops)
                             for row, tail in tails])

    encoded = [(encode(tokenizer, prompt) or [ENDOFTEXT])[-(L - n_tokens):] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    if dist.is_initialized():
        order = order[dist.get_rank()::dist.get_world_size()]
    results = [None] * len(prompts)
    while order:
        T = len(encoded[order[0]])
        chosen, order = np.split(order, [max(1, batch_tokens // (T + n_tokens))])
        order = order.tolist()
        tokens = torch.zeros(len(chosen), T, dtype=torch.int64)
        for b, i in enumerate(chosen):
            tokens[b, T - len(encoded[i]):] = torch.tensor(encoded[i])
        padding = torch.tensor([T - len(encoded[i]) for i in chosen], device=device)
        out = model.generate(tokens.to(device), n_tokens, 0, padding=padding, finished=finished)
        for i, row in zip(chosen, out[:, T:].tolist()):
            results[i] = text(row)
            for stop in stops:
                results[i] = results[i].split(stop)[0]
        if progress:
            progress(len(chosen))
    return _gather(results)

# ---------------------------------------------------------------------------- one task, one model


class Job:
    """A task or a group's tasks, their documents made into requests; for any number of models.

    members: (task's name, Task, its Questions). requests, of all, shots included: (context,
    continuation), prompts or whole texts. documents: {task or group: hash of its documents}.
    """

    def __init__(self, name, members, requests, documents, shots, style):
        self.name, self.members, self.requests = name, members, requests
        self.documents, self.shots, self.style = documents, shots, style
        # The rows to come, without values: measured of answers that say nothing.
        nothing = {"loglikelihood": (math.nan, False), "generate": "", "rolling": math.nan}
        self.measured = measure(self, [nothing[members[0][1].kind]] * len(requests))
        self.batches = None  # (context length, plan's batches, rows, owners of rolling rows)


def prepare(name, docs, shots=0, style="v0.4", limit=None):
    """Return the Job of a task or group, or raise ValueError about its documents."""
    members, requests, hashes = [], [], {}
    for member in GROUPS[name][0] if name in GROUPS else [name]:
        task = tasks_of(style)[member]
        if shots and not task.pool:
            raise ValueError(f"{member}: shots must be 0 in style {style}, it has no examples "
                             "to draw")
        try:
            prompted, documents = prompts(task, docs, shots, style, limit)
        except NoDocuments as error:
            raise NoDocuments(f"{member}: {error}") from None
        for prefix, question in prompted:
            requests += [(prefix + request[0], request[1]) if task.kind == "loglikelihood"
                         else prefix + request for request in question.requests]
        members.append((member, task, [question for _, question in prompted]))
        hashes[member] = documents
    if name in GROUPS:
        hashes[name] = digest(list(hashes.values()))
    return Job(name, members, requests, hashes, shots, style)


def token_rows(tokenizer, job):
    """Return encode_pair's (tokens, n) of the job's (context, continuation) requests."""
    return [encode_pair(tokenizer, *request, job.style) for request in job.requests]


def answer(model, tokenizer, job, progress=None):
    """Return a result for each request: (log-likelihood, is_greedy), text, or log-likelihood."""
    task, L = job.members[0][1], model.config.seq_length
    if task.kind == "generate":
        return generate_until(model, tokenizer, job.requests, task.stops, task.n_tokens,
                              progress=progress)
    if job.batches is None or job.batches[0] != L:  # the same for every checkpoint of a run
        if task.kind == "rolling":
            rows, owners = rolling_rows(tokenizer, job.requests, L)
        else:
            rows, owners = token_rows(tokenizer, job), None
        job.batches = L, plan(rows, L, tokens_per_batch(model)), len(rows), owners
    _, batches, n_rows, owners = job.batches
    results = run_plan(model, batches, n_rows, progress)
    return results if owners is None else totals(results, owners, len(job.requests))


def measure(job, results):
    """Return [(task, metric, value, stderr, n)] from the results of a job, a group's own last."""
    rows, results = [], iter(results)
    for name, task, questions in job.members:
        own = [[next(results) for _ in question.requests] for question in questions]
        rows += [(name + suffix, metric, *numbers)
                 for suffix, metric, *numbers in task.measure(questions, own, job.style)]
    return rows + (GROUPS[job.name][1](rows) if job.name in GROUPS else [])


def documents_of(job, task):
    """Return the hash of a row's documents: a member's own, as if alone, or the whole group's."""
    return job.documents.get(task.partition(":")[0], job.documents[job.name])

# ---------------------------------------------------------------------------- over training


@dataclass(frozen=True)
class EvalConfig:
    # Other commands: `eval.py tasks --help` (what there is), `eval.py sample --help` (texts).
    model: str  # run folder, checkpoint folder or Hugging Face folder; several with commas
    tasks: str  # names with commas; `python eval.py tasks --docs=DIR` lists them
    docs: str  # folder of documents, DOCS/TASK/SPLIT.jsonl
    # Rows are appended; what it holds is not computed again. A model is known by its folder's name
    # alone: two models of one name need two files.
    output: str = "results.csv"
    # JSON Lines file that gets every request computed now and its result. What the CSV already
    # holds is not computed, so it gets no lines.
    samples: str | None = None
    steps: str = "all"  # of a run folder: all, last, or numbers with commas
    shots: int = 0  # solved examples before each question
    style: str = "v0.4"  # lm-evaluation-harness 0.4, or "v0.3" as in the paper's files
    dtype: str = "float32"  # as in the paper; lm_eval loads the published files in float16
    limit: int | None = None  # only so many documents of each task
    tokenizer: str = "20B_tokenizer.json"
    device: str = "auto"

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"style = {self.style!r}, expected {' or '.join(STYLES)}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype = {self.dtype!r}, expected float32, float16 or bfloat16")
        if self.shots < 0 or self.limit is not None and self.limit < 1:
            raise ValueError("shots must be at least 0, and limit at least 1")


COLUMNS = {"model": TEXT, "step": f"({COUNT})?", "tokens": f"({COUNT})?", "task": TEXT,
           "shots": COUNT, "metric": TEXT, "value": NUMBER, "stderr": f"({NUMBER})?", "n": COUNT,
           "style": TEXT, "dtype": TEXT, "docs": TEXT}
# What tells a row from others.
KEY = ("model", "step", "task", "shots", "metric", "style", "dtype", "docs")


def main(config):
    # Processes meet when a task is done. The first one may wait longer than gloo's 30 minutes.
    processes = Processes(config.device, timeout=timedelta(days=30))
    jobs = prepare_all(config)
    tokenizer = load_tokenizer(config.tokenizer)
    folders = find_all(config.model, config.steps)

    # The first process knows what the files hold, and alone writes to them.
    opened = processes.together(lambda: open_outputs(config, folders, jobs), first_alone=True)
    table, missing = opened or (None, None)
    todo = [(folders[i], jobs[j]) for i, j in processes.gather(missing)[0]]
    for entry, job in todo:  # refuse now, not after hours of other tasks
        task = job.members[0][1]
        if task.kind == "generate" and task.n_tokens >= (L := read_config(entry[3]).seq_length):
            raise ValueError(f"{job.name}: {task.n_tokens} tokens to generate leave no room for a "
                             f"prompt in {L} tokens of context ({entry[3]})")

    def load(folder):
        return checkpoints.load_model(folder, processes.device).to(getattr(torch, config.dtype))

    wanted = list(dict.fromkeys(entry for entry, _ in todo))
    with (ThreadPoolExecutor(1) as loader,  # reads the next checkpoint while this one is evaluated
          tqdm(total=sum(len(job.requests) for _, job in todo), unit="request",
               disable=processes.rank > 0 or None) as bar):
        loading = loader.submit(load, wanted[0][3]) if wanted else None
        for i, entry in enumerate(wanted):
            model = loading.result()
            loading = loader.submit(load, wanted[i + 1][3]) if i + 1 < len(wanted) else None
            for job in [job for its, job in todo if its == entry]:
                bar.set_description(f"{entry[0]} step {entry[1]} {job.name}")
                before = bar.n
                results = answer(model, tokenizer, job, bar.update)
                bar.update(before + len(job.requests) - bar.n)  # the other processes' share
                if processes.rank == 0:
                    record(config, table, entry, job, results)
            del model  # before the one after the next is loaded
    if processes.rank == 0:
        print(f"{config.output}: {len(todo)} evaluations done, "
              f"{len(folders) * len(jobs) - len(todo)} were there")
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_all(config):
    """Return the Jobs of config.tasks; of a name for several tasks, those that have documents."""
    jobs = []
    for name in named_tasks(config.tasks, config.style):
        try:
            jobs.append(prepare(name, config.docs, config.shots, config.style, config.limit))
        except NoDocuments as error:
            if name in config.tasks.split(","):
                raise
            note(f"{error}; left out")  # as CrowS-Pairs has no bias_type "autre" in English
    if not jobs:
        raise ValueError(f"{config.tasks}: none of these tasks has documents in {config.docs}")
    return jobs


def note(words):
    """Print what is no mistake but must be seen; under torchrun the first process does."""
    if os.environ.get("RANK", "0") == "0":
        print(words, file=sys.stderr)


def open_outputs(config, entries, jobs):
    """Return the CSV's Table and (entry, job) numbers of the evaluations that it lacks a row of.

    Rows of these that it has go: the evaluation that a kill has torn is done again as a whole.
    Raises ValueError if a name among the rows to come could not be written.
    """
    table = Table(config.output, COLUMNS)
    there, missing, again = {key(row) for row in table.rows}, [], set()
    for (i, entry), (j, job) in itertools.product(enumerate(entries), enumerate(jobs)):
        rows = csv_rows(config, entry, job, job.measured)
        keys = {key(dict(zip(COLUMNS, row))) for row in rows}
        if not keys <= there:
            for row in rows:
                table.line(row)
            missing.append((i, j))
            again |= keys
    if again & there:
        table = Table(config.output, COLUMNS, lambda row: key(row) not in again)
    if config.samples:
        open_samples(config.samples)
    return table, missing


def key(row):
    """What tells a row of the CSV from others."""
    return tuple(str(row[name]) for name in KEY)


def csv_rows(config, entry, job, measured):
    """Return the CSV's rows of what `measure` returns."""
    return [(*entry[:3], task, job.shots, metric, value, stderr, n, job.style, config.dtype,
             documents_of(job, task)) for task, metric, value, stderr, n in measured]


def record(config, table, entry, job, results):
    """Append a job's rows to the CSV, its requests to the samples, and print what matters."""
    name, step, *_ = entry
    if config.samples:
        append_samples(config.samples, name, step, job, results)
    rows = measure(job, results)
    table.append(*csv_rows(config, entry, job, rows))
    within = lambda stderr: "" if stderr is None else f" ± {stderr:.4f}"
    tqdm.write(f"{name} step {step:>6} | " + " | ".join(
        f"{task} {metric} {value:.4f}{within(stderr)} (n {n:,})"
        for task, metric, value, stderr, n in rows if task == job.name or len(rows) < 12))


def find_all(models, steps):
    """Return find's entries of comma-separated models; two of the same name are an error."""
    entries = [entry for model in models.split(",") for entry in find(model, steps)]
    names = {}
    for name, step, _, folder in entries:
        if names.setdefault((name, step), folder) != folder:
            raise ValueError(f"{names[name, step]} and {folder} would both be called {name} step "
                             f"{step}; rename a folder")
    return list(dict.fromkeys(entries))


def find(model, steps):
    """Return [(name, step, tokens seen, folder)] of the checkpoints `model` and `steps` name.

    A damaged one raises ValueError; among `all` it is left out, with a line that says so.
    """
    path = Path(os.path.abspath(model))  # "." has a name too
    folders = dict(checkpoints.step_folders(path))
    if not folders:
        if not (path / "config.json").exists():
            raise ValueError(f"{model}: neither a run folder (step0, step1, ...) nor a "
                             "checkpoint's folder (config.json)")
        match = re.fullmatch(r"step(\d+)", path.name)
        name = path.parent.name if match else path.name
        return [(name, match[1] if match else "", _tokens(path), path)]
    if not re.fullmatch(r"all|last|\d+(,\d+)*", steps):
        raise ValueError(f"steps = {steps!r}, expected all, last, or numbers with commas")
    wanted = {"all": list(folders), "last": [max(folders)]}.get(steps)
    wanted = wanted or list(dict.fromkeys(int(step) for step in steps.split(",")))
    missing = [str(step) for step in wanted if step not in folders]
    if missing:
        raise ValueError(f"{model}: no checkpoint at step {', '.join(missing)}; "
                         f"there are {', '.join(map(str, folders))}")
    whole = [step for step in wanted if checkpoints.is_whole(folders[step])]
    if damaged := [str(folders[step]) for step in wanted if step not in whole]:
        words = f"{', '.join(damaged)} damaged (python verify.py verify {model} says what)"
        if steps != "all" or not whole:
            raise ValueError(words)
        note(f"{words}; left out")
    return [(path.name, str(step), _tokens(folders[step]), folders[step]) for step in whole]


def _tokens(folder):
    """Tokens a checkpoint has seen: as it says; 2^21 a step if its path has a published name."""
    if (folder / "training.json").exists():
        return read_json(folder / "training.json").get("tokens", "")
    match = re.fullmatch(r"step(\d+)", folder.name)
    return int(match[1]) << 21 if match and folder.parent.name.startswith("pythia-") else ""


# ---------------------------------------------------------------------------- the files written


def open_samples(path):
    """Make the file if there is none, drop a line that a kill has torn: the next would join it."""
    open(path, "ab").close()  # a path that cannot be written is refused now, not in an hour
    if path.startswith("/dev/") or not os.path.isfile(path):
        return  # /dev/stdout may be a file, but not ours
    whole, ours = 0, b'{"model": '
    with open(path, "rb+") as file:
        for line in file:
            if not whole and not (line.startswith(ours) or ours.startswith(line)):
                raise ValueError(f"{path}, line 1: found {line[:100]!r}, no sample; name another "
                                 "--samples")
            if line.endswith(b"\n"):
                whole += len(line)
            else:
                note(f"{path}: the last line is torn and goes: {line[:200]!r}")
        file.truncate(whole)


def append_samples(path, name, step, job, results):
    """Write one line a request: what was asked, and what came of it; JSON has null for NaN."""
    def finite(value):
        return value if math.isfinite(value) else None

    results, lines = iter(zip(job.requests, results)), []
    for task, _, questions in job.members:
        for doc_id, question in enumerate(questions):
            for _ in question.requests:
                request, result = next(results)
                context, continuation = request if isinstance(request, tuple) else (request, None)
                line = dict(model=name, step=step, task=task, shots=job.shots, style=job.style,
                            doc_id=doc_id, context=context)
                if isinstance(result, str):
                    line |= dict(generated=result)
                elif isinstance(result, tuple):
                    line |= dict(continuation=continuation, loglikelihood=finite(result[0]),
                                 is_greedy=result[1])
                else:
                    line |= dict(loglikelihood=finite(result))
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with open(path, "a", encoding="utf8", errors="surrogatepass") as file:
        file.writelines(lines)


# ---------------------------------------------------------------------------- the other commands


@dataclass(frozen=True)
class TasksConfig:
    docs: str | None = None  # folder of documents; without it only the names
    style: str = "v0.4"  # or v0.3

    def __post_init__(self):
        check(self, " or ".join(STYLES), STYLES.__contains__, "style")
        if self.docs is not None and not os.path.isdir(self.docs):
            raise ValueError(f"{self.docs}: no such folder")


def list_tasks(config):
    """Print every task, how many of its documents are there, and which file is missing."""
    for name, task in tasks_of(config.style).items():
        line = f"{name:46} {task.kind:14} {task.split:11} shots from {task.pool or 'nowhere':11}"
        if config.docs:
            counts = []
            for split in dict.fromkeys((task.split, *([task.pool] if task.pool else []))):
                try:
                    found = f"{len(read_split(config.docs, task, split)):,}"
                except (ValueError, OSError) as error:
                    found = str(error).split(";")[0].replace(": no such file", " missing")
                whole = f" of {task.n:,}" if task.n and split == task.split else ""
                counts.append(f"{split} {found}{whole}")
            line += ", ".join(counts)
        print(line.rstrip())
    several = SEVERAL | {name: members for name, (members, _) in GROUPS.items()}
    print("all of a kind: " + ", ".join(
        f"{name} ({len(members)})" for name, members in several.items()
        if all(member in tasks_of(config.style) for member in members)))


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

    def __post_init__(self):
        check(self, "at least 0", lambda value: value >= 0, "temperature")
        check(self, "at least 1", lambda value: value >= 1, "n_tokens")


def sample(config):
    """Print a continuation of the prompt at each step."""
    tokenizer, device = load_tokenizer(config.tokenizer), Processes(config.device).device
    prompt = torch.tensor([tokenizer.encode(config.prompt) or [ENDOFTEXT]], device=device)
    for name, step, _, folder in find_all(config.model, config.steps):
        model = checkpoints.load_model(folder, device)
        generator = torch.Generator(device).manual_seed(config.seed)
        tokens = model.generate(prompt, config.n_tokens, config.temperature, generator)
        print(f"--- {name} step {step}\n{tokenizer.decode(tokens[0].tolist())}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["sample"]:
        run(sample, parse(sys.argv[2:], SampleConfig))
    elif sys.argv[1:2] == ["tasks"]:
        run(list_tasks, parse(sys.argv[2:], TasksConfig))
    else:
        run(main, parse(sys.argv[1:], EvalConfig))
