"""Evaluate checkpoints over training, with exactly lm-evaluation-harness's numbers.

    python eval.py --model=RUN --tasks=lambada_openai,piqa --docs=DIR --output=results.csv
    torchrun --standalone --nproc_per_node=8 eval.py ...  # the same numbers, shared out
    python eval.py tasks --docs=DIR                       # the tasks, and which documents are there
    python eval.py sample --model=RUN --steps=1,64,512 --prompt="In the beginning"
    python eval.py losses --model=RUN --rows=0:4096 --output=OUT      # nats of every token, or of
    python eval.py losses --model=RUN --text=TEXTS.jsonl --output=OUT # every text's, as arrays

--model is a run folder of ours, one of its step folders, or a published checkpoint in any form.
--docs holds a folder for each task with its documents as distributed, for instance
DIR/piqa/validation.jsonl. What the CSV already holds is skipped, so the same command goes on.

tasks.py has the tasks, their prompts and metrics; here is what the model does with them, by
lm_eval's rules but several times faster: rows that begin alike (the choices of a question, all
questions behind the same shots) share the work on what they share, logits are computed only where a
token is scored, and rows of like length are batched by tokens. None of it changes a number by more
than rounding (tests/test_scoring.py: 1e-4).
"""

import hashlib
import itertools
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoints
from config import (check, COUNT, file_size, note, NUMBER, parse, read_json, run, sha256_of, Table,
                    TEXT, write_all, write_json)
from data import Order, ordered
from model import Cache, head_blocks, Prefix
from parallel import Processes, leave_processes
from tasks import (digest, GROUPS, MEMBERS, named_tasks, NoDocuments, prompts, read_jsonl,
                   read_split, STYLES, text as text_of)
from tokenizer import ENDOFTEXT, load_tokenizer, N_TOKENS

# ---------------------------------------------------------------------------- shared beginnings


class Pack:
    """Rows of tokens as a tree: what they begin with in common is there once.

    The rows "the cat sat" and "the cat ran on" are the nodes

        0 the - 1 cat - 2 sat
                      \\ 3 ran - 4 on        positions 0 1 2 2 3

    A node is a token; it sees its ancestors and itself. `branches` are the chains that the tree is
    made of, (first node, end, ancestors of the first): here (0, 3, []) and (3, 5, [0, 1]). `path`
    has the nodes of the row that was added last.
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


# Tokens of a batch: few keep a CPU's activations in its cache (a tenth faster than 4096).
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
JOINS = 4  # a row joins the pack before it if they share at least 1 / JOINS of the row
PACK = 640  # tokens that a pack may have, or twice the row that joins: attention sees all of it
PREFIX = 32  # tokens that packs must share to be one group
PREFIX_PAYS = 512  # tokens that a group must save for its prefix to be computed apart


def plan(rows, L, batch_tokens, name="request {}".format):
    """Return batches [(prefix tokens, packs)] of rows (index, tokens, n), cut on the left to L + 1.

    Rows next to each other in alphabetical order share most. A row joins the pack of the one before
    if they share much of it and the tree stays small. Packs that share a long beginning (the shots)
    are a group, whose beginning is computed once, as a prefix of its batches. Raises ValueError by
    a row's name(index) if it has nothing to score or no context; there lm_eval's assertions fail.
    """
    for index, tokens, n in rows:
        if not 0 < n <= min(L, len(tokens) - 1):
            raise ValueError(f"{name(index)}: a continuation of {max(n, 0)} tokens behind "
                             f"{len(tokens) - max(n, 0)} does not fit in {L} tokens of context, at "
                             "least 1 of each")
    rows = [(index, np.array(tokens[-(L + 1):]), n) for index, tokens, n in rows]
    groups, before = [], np.array([-1])  # [packs, how many tokens all of them share]
    for index, row, n in sorted(rows, key=lambda row: row[1].astype(">u4").tobytes()):
        most = min(len(before), len(row)) - 1
        shared = int(np.append(before[:most] != row[:most], True).argmax())
        own = len(row) - 1 - n  # positions of the context: a prefix has no scored position
        packs, P = groups[-1] if groups else ([], 0)
        still = min(P, shared, own)  # what the group would share with this row in it
        small = packs and len(packs[-1].tokens) + len(row) - shared <= max(PACK, 2 * len(row))
        if small and JOINS * shared >= len(row) and (len(packs) == 1 or still >= P // 2):
            groups[-1][1] = still
        elif packs and still >= max(PREFIX, P // 2):
            packs.append(Pack())
            groups[-1][1], shared = still, 0
        else:
            groups.append([[Pack()], own])
            shared = 0
        groups[-1][0][-1].add(index, row.tolist(), n, shared)
        before = row

    batches, alone, behind_prefix = [], [], []
    for packs, P in groups:
        if (len(packs) - 1) * P >= PREFIX_PAYS:
            behind_prefix.append((packs, P))
        else:
            alone += packs
    for packs, P in [(alone, 0), *behind_prefix]:
        packs.sort(key=lambda pack: -len(pack.tokens))  # so those of like length come together
        while packs:
            n = max(1, batch_tokens // (len(packs[0].tokens) - P))
            batches.append((packs[0].tokens[:P], packs[:n]))
            packs = packs[n:]
    return batches


def _tensors(packs, P, like):
    """Return tokens, positions (B, T) of packs behind a prefix of P; mask (B, 1, T, P + T) or None.

    A node's column in the mask is its number, for the prefix's P tokens are its first nodes.
    """
    T = max(len(pack.tokens) for pack in packs) - P
    nodes = torch.zeros(2, len(packs), T, dtype=torch.int64)
    for b, pack in enumerate(packs):
        nodes[:, b, :len(pack.tokens) - P] = torch.tensor([pack.tokens[P:], pack.positions[P:]])
    tokens, positions = nodes.to(like.device)
    if P == 0 and all(len(pack.branches) == 1 for pack in packs):
        # Plain rows are padded on the right, which a causal model never looks at.
        return tokens, None, None
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
    return tokens, positions, mask.to(like)


def score(model, rows, batch_tokens=None):
    """Return [(log-likelihood in nats, is_greedy)] of the last n tokens of rows (tokens, n).

    Each row is cut on the left to the model's context. The softmax runs over all columns, padded
    vocabulary included; is_greedy says that every one of the n tokens is the largest logit's, the
    first of equals. Under torchrun the rows are shared out and every process gets all results.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS[model.embed_in.weight.device.type]
    rows = [(i, *row) for i, row in enumerate(rows)]
    return run_plan(model, plan(rows, model.config.seq_length, batch_tokens), len(rows))


@torch.no_grad()
def run_plan(model, batches, n, progress=None):
    """Return score's result of each index, 0 to n - 1; rows of the same index are added up."""
    lls, all_greedy, prefix, cache = np.zeros(n), np.ones(n, dtype=bool), [], None
    weight = model.embed_in.weight
    for prefix_tokens, packs in _mine(batches):
        P = len(prefix_tokens)
        if prefix_tokens != prefix:
            prefix, cache = prefix_tokens, None
            if P:
                layers = [Cache(model.config, 1, P, weight) for _ in model.layers]
                model.hidden(torch.tensor([prefix], device=weight.device), cache=layers)
                cache = [Prefix(layer) for layer in layers]
        tokens, positions, mask = _tensors(packs, P, weight)
        hidden = model.hidden(tokens, positions, mask, cache).flatten(0, 1)
        scored = [(index, b * tokens.shape[1] - P + np.array(nodes), targets)
                  for b, pack in enumerate(packs) for index, nodes, targets in pack.scored]
        logprobs, greedy = _logprobs(
            model, hidden, np.concatenate([nodes for _, nodes, _ in scored]),
            [target for *_, targets in scored for target in targets])
        ends = np.cumsum([len(targets) for *_, targets in scored])[:-1]
        for (index, *_), lp, g in zip(scored, np.split(logprobs, ends), np.split(greedy, ends)):
            lls[index] += lp.sum()
            all_greedy[index] &= g.all()
        if progress:
            progress(len(scored))
    lls, all_greedy = zip(*_everyone((lls, all_greedy)))
    return list(zip(sum(lls).tolist(), np.all(all_greedy, axis=0).tolist()))


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


def _mine(items):
    """Return the items that are this process's."""
    return items[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else items


def _everyone(value):
    """Return every process's value."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


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
        context, continuation = "<|endoftext|>", continuation.removeprefix("<|endoftext|>")
    whole = encode(tokenizer, context + continuation)
    return whole, len(whole) - len(encode(tokenizer, context.rstrip()))


def loglikelihood(model, tokenizer, requests):
    """Return [(log-likelihood, is_greedy)] of (context, continuation) pairs of texts."""
    return score(model, [encode_pair(tokenizer, *request) for request in requests])


def rolling_rows(tokenizer, texts, L):
    """Return plan's rows, by the number of the text, that predict every token of each text once.

    lm_eval/utils.py, get_rolling_token_windows with context_len 1: a full window predicts all its L
    tokens from <|endoftext|> or the token before; the last borrows earlier text as context.
    """
    rows = []
    for i, text in enumerate(texts):
        tokens = [ENDOFTEXT] + tokenizer.encode(text)
        for start in range(1, len(tokens), L):
            end = min(start + L, len(tokens))
            rows.append((i, tokens[max(0, end - L - 1):end], end - start))
    return rows


def loglikelihood_rolling(model, tokenizer, texts):
    """Return the log-likelihood in nats of each whole text, every token predicted exactly once."""
    rows, totals = rolling_rows(tokenizer, texts, model.config.seq_length), [0.0] * len(texts)
    for (i, *_), (logprob, _) in zip(rows, score(model, [row[1:] for row in rows])):
        totals[i] += logprob
    return totals


def generate_until(model, tokenizer, prompts, stops=("\n",), n_tokens=256, batch_tokens=None,
                   progress=None):
    """Return what greedy decoding says after each prompt, up to the first of `stops` or n_tokens.

    lm_eval/models/huggingface.py, HFLM.generate_until: prompts are cut on the left to leave room
    for n_tokens, the text at each stop in turn; <|endoftext|> always ends it.
    """
    L, device = model.config.seq_length, model.embed_in.weight.device
    # The last tokens that can hold a stop; 3 more for a character that is cut in two.
    window = max((len(stop.encode()) for stop in stops), default=0) + 3

    def decode(tokens):
        tokens = itertools.takewhile(lambda token: token != ENDOFTEXT, tokens)
        return tokenizer.decode([token for token in tokens if 1 < token < N_TOKENS])

    def finished(new):
        tails = [(row[-1], decode(row)) for row in new[:, -window:].tolist()]
        return torch.tensor([last == ENDOFTEXT or any(stop in tail for stop in stops)
                             for last, tail in tails])

    encoded = [(encode(tokenizer, prompt) or [ENDOFTEXT])[-(L - n_tokens):] for prompt in prompts]
    order = _mine(sorted(range(len(prompts)), key=lambda i: -len(encoded[i])))
    results = {}
    while order:
        T = len(encoded[order[0]])
        n = max(1, (batch_tokens or 16384) // (T + n_tokens))
        chosen, order = order[:n], order[n:]
        padding = [T - len(encoded[i]) for i in chosen]
        tokens = torch.tensor([[0] * pad + encoded[i] for pad, i in zip(padding, chosen)])
        out = model.generate(tokens.to(device), n_tokens, 0, finished=finished,
                             padding=torch.tensor(padding, device=device))
        for i, row in zip(chosen, out[:, T:].tolist()):
            results[i] = decode(row)
            for stop in (*stops, "<|endoftext|>"):
                results[i] = results[i].split(stop)[0]
        if progress:
            progress(len(chosen))
    results = {i: text for part in _everyone(results) for i, text in part.items()}
    return [results[i] for i in range(len(prompts))]


# ---------------------------------------------------------------------------- one task, one model


class Job:
    """A task or a group's tasks, their documents made into requests; for any number of models.

    members: (task's name, Task, its Questions); they differ only in their documents from `task`.
    requests, of all, shots included: (context, continuation), prompts or whole texts; asked, whose
    they are: (task's name, number of the document, Question). documents: {task or group: hash}.
    plans: {context length: plan_job's}.
    """

    def __init__(self, name, task, shots, style):
        self.name, self.task, self.shots, self.style = name, task, shots, style
        self.members, self.requests, self.asked, self.documents, self.plans = [], [], [], {}, {}


def prepare(name, docs, shots=0, style="v0.4", limit=None):
    """Return the Job of a task or group, or raise ValueError about its documents."""
    members = GROUPS[name][0] if name in GROUPS else [name]
    job = Job(name, STYLES[style][members[0]], shots, style)
    for member in members:
        task = STYLES[style][member]
        if shots and not task.pool:
            raise ValueError(f"{member}: shots must be 0 in style {style}, it has no examples "
                             "to draw")
        try:
            prompted, job.documents[member] = prompts(task, docs, shots, style, limit)
        except ValueError as error:
            raise type(error)(f"{member}: {error}") from None
        for number, (prefix, question) in enumerate(prompted):
            job.requests += [(prefix + request[0], request[1]) if task.kind == "loglikelihood"
                             else prefix + request for request in question.requests]
            job.asked += [(member, number, question)] * len(question.requests)
        job.members.append((member, task, [question for _, question in prompted]))
    if name in GROUPS:
        job.documents[name] = digest(list(job.documents.values()))
    return job


def plan_job(job, tokenizer, L, batch_tokens):
    """Plan a job for models with a context of L tokens; raise ValueError for what does not fit."""
    task, rows, long = job.task, [], 0
    if L in job.plans:
        return
    if task.kind == "rolling":
        rows = rolling_rows(tokenizer, job.requests, L)
    elif task.kind == "generate":
        if task.n_tokens >= L:
            raise ValueError(f"{job.name}: {task.n_tokens} tokens to generate leave no room for a "
                             f"prompt in {L} tokens of context")
        long = sum(len(encode(tokenizer, prompt)) > L - task.n_tokens for prompt in job.requests)
    else:
        rows = [(i, *encode_pair(tokenizer, *request, job.style))
                for i, request in enumerate(job.requests)]
        long = sum(len(tokens) > L + 1 for _, tokens, _ in rows)
    job.plans[L] = plan(rows, L, batch_tokens,
                        lambda i: f"{job.asked[i][0]}: {job.asked[i][2].where}")
    if long:
        note(f"{job.name}: {long:,} of {len(job.requests):,} requests are too long for {L:,} "
             "tokens of context and lose their beginning, as lm_eval's do")


def answer(model, tokenizer, job, batch_tokens=None, progress=None):
    """Return a result for each request: (log-likelihood, is_greedy), text, or log-likelihood."""
    task, L = job.task, model.config.seq_length
    if task.kind == "generate":
        return generate_until(model, tokenizer, job.requests, task.stops, task.n_tokens,
                              batch_tokens, progress)
    plan_job(job, tokenizer, L, batch_tokens or BATCH_TOKENS["cpu"])
    results = run_plan(model, job.plans[L], len(job.requests), progress)
    return [logprob for logprob, _ in results] if task.kind == "rolling" else results


def measure(job, results):
    """Return [(task, metric, value, stderr, n)] from the results of a job, a group's own last."""
    rows, results = [], iter(results)
    for name, task, questions in job.members:
        own = [[next(results) for _ in question.requests] for question in questions]
        rows += [(name + suffix, metric, *numbers)
                 for suffix, metric, *numbers in task.measure(questions, own)]
    return rows + (GROUPS[job.name][1](rows) if job.name in GROUPS else [])


# ---------------------------------------------------------------------------- over training


@dataclass(frozen=True)
class EvalConfig:
    model: str  # run folder, checkpoint folder or Hugging Face folder; several with commas
    tasks: str  # names with commas; `python eval.py tasks --docs=DIR` lists them
    docs: str  # folder of documents, DOCS/TASK/SPLIT.jsonl
    # Rows are appended; what it holds is not computed again. A model is known by its folder's name
    # alone: two models of one name need two files.
    output: str = "results.csv"
    samples: str | None = None  # JSON Lines file that gets every request computed, and its result
    steps: str = "all"  # of a run folder: all, last, or numbers with commas
    shots: int = 0  # solved examples before each question
    style: str = "v0.4"  # lm-evaluation-harness 0.4, or "v0.3" as in the paper's files
    dtype: str = "float32"  # as in the paper; lm_eval loads the published files in float16
    limit: int | None = None  # only so many documents of each task
    tokenizer: str | None = None  # None: the model's own, else 20B_tokenizer.json
    device: str = "auto"
    # Tokens computed at once; None: 2048 on a CPU, 32768 on a GPU, 16384 where texts are generated.
    batch_tokens: int | None = None

    def __post_init__(self):
        check(self, " or ".join(STYLES), STYLES.__contains__, "style")
        check(self, "float32, float16 or bfloat16",
              ("float32", "float16", "bfloat16").__contains__, "dtype")
        check(self, "at least 0", lambda value: value >= 0, "shots")
        check(self, "at least 1", lambda value: value >= 1, "limit", "batch_tokens")


COLUMNS = {"model": TEXT, "step": f"({COUNT})?", "tokens": f"({COUNT})?", "task": TEXT,
           "shots": COUNT, "metric": TEXT, "value": NUMBER, "stderr": f"({NUMBER})?", "n": COUNT,
           "style": TEXT, "dtype": TEXT, "docs": TEXT}
identity = itemgetter("model", "step", "task", "shots", "metric", "style", "dtype", "docs")


def main(config):
    # Processes meet when a task is done. The first one may wait longer than gloo's 30 minutes.
    processes = Processes(config.device, timeout=timedelta(days=30))
    processes.agree(asdict(config) | {"device": processes.device.type})
    jobs, entries = prepare_all(config), find_all(config.model, config.steps)
    processes.agree({f"documents of {job.name}": job.documents for job in jobs} | {
        f"{name} step {step}": sha256_of(folder / "manifest.json")
        for name, step, _, folder in entries if (folder / "manifest.json").is_file()})
    # The first process knows what the files hold, and alone writes to them.
    opened = processes.together(lambda: open_outputs(config, entries, jobs), first_alone=True)
    table, missing = opened or (None, None)
    missing = processes.gather(missing)[0]
    todo = {}  # checkpoint: its jobs
    for i, j in missing:
        todo.setdefault(entries[i], []).append(jobs[j])
    tokenizer, n = None, config.batch_tokens or BATCH_TOKENS[processes.device.type]
    for (*_, folder), mine in todo.items():  # what does not fit is told before any model runs
        path = checkpoints.folder_tokenizer(folder, config.tokenizer)
        tokenizer = tokenizer or load_tokenizer(path)  # all are the same
        L = checkpoints.open_any(folder)[0].seq_length
        for job in mine:
            plan_job(job, tokenizer, L, n)
    with tqdm(total=sum(len(jobs[j].requests) for _, j in missing), unit="request",
              disable=processes.rank > 0 or None) as bar:
        for entry, mine in todo.items():
            name, step, _, folder = entry
            model = checkpoints.load_model(folder, processes.device)
            model = model.to(getattr(torch, config.dtype))
            for job in mine:
                bar.set_description(f"{name} step {step} {job.name}")
                before = bar.n
                results = answer(model, tokenizer, job, config.batch_tokens, bar.update)
                bar.update(before + len(job.requests) - bar.n)  # the other processes' share
                if processes.rank == 0:
                    record(config, table, entry, job, results)
            del model  # two may not fit where one does
    if processes.rank == 0:
        there = len(entries) * len(jobs) - len(missing)
        print(f"{config.output}: {len(missing)} evaluations done, {there} were there")
    leave_processes()


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
    return jobs


def open_outputs(config, entries, jobs):
    """Return the CSV's Table and [(entry's, job's number)] of the evaluations that it lacks.

    An evaluation that has only some of its rows, after a kill, is done again as a whole, and these
    rows are taken out. Raises ValueError if a name in a row to come could not be written.
    """
    table = Table(config.output, COLUMNS)
    there, missing, again = set(map(identity, table.rows)), [], set()
    nothing = {"loglikelihood": (math.nan, False), "generate": "", "rolling": math.nan}
    for j, job in enumerate(jobs):
        measured = measure(job, [nothing[job.task.kind]] * len(job.requests))
        for i, entry in enumerate(entries):
            rows = csv_rows(config, entry, job, measured)
            expected = {identity(dict(zip(COLUMNS, row))) for row in rows}
            if not expected <= there:
                for row in rows:
                    table.line(row)  # raises ValueError
                missing.append((i, j))
                again |= expected
    if again & there:
        table.keep(lambda row: identity(row) not in again)
    if config.samples:
        open_samples(config.samples)
    return table, missing


def csv_rows(config, entry, job, measured):
    """Return the CSV's rows of measure's; a member's has the hash of its own documents."""
    return [(*entry[:3], task, str(job.shots), metric, value, stderr, n, job.style, config.dtype,
             job.documents.get(task.partition(":")[0], job.documents[job.name]))
            for task, metric, value, stderr, n in measured]


def record(config, table, entry, job, results):
    """Append a job's rows to the CSV, its requests to the samples, and print what matters."""
    name, step, *_ = entry
    if config.samples:
        append_samples(config.samples, name, step, job, results)
    rows = measure(job, results)
    table.append(*csv_rows(config, entry, job, rows))
    tqdm.write(f"{name} step {step:>6} | " + " | ".join(
        f"{task} {metric} {value:.4f}{'' if stderr is None else f' ± {stderr:.4f}'} (n {n:,})"
        for task, metric, value, stderr, n in rows if task == job.name or len(rows) < 12))


def open_samples(path):
    """Make the file if there is none, drop a line that a kill has torn: the next would join it."""
    line, ours = b"\n", b'{"model": '
    if os.path.exists(path):
        file_size(path)  # refuses what is no file
    with open(path, "ab+") as file:  # what cannot be written is refused now, not in an hour
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line[:len(ours)] != ours[:len(line)]:
                raise ValueError(f"{path}, line {number}: no sample; name another --samples")
        if not line.endswith(b"\n"):
            note(f"{path}: the last line was torn and goes: {line[:200]!r}")
            file.truncate(file.tell() - len(line))


def append_samples(path, name, step, job, results):
    """Write one line a request: what was asked, and what came of it; JSON has null for NaN."""
    names = {"loglikelihood": ("context", "continuation", "loglikelihood", "is_greedy"),
             "generate": ("context", "generated"),
             "rolling": ("context", "loglikelihood")}[job.task.kind]
    lines = []
    for (task, number, _), request, result in zip(job.asked, job.requests, results):
        cells = [*request, *result] if len(names) == 4 else [request, result]
        cells = [None if isinstance(cell, float) and not math.isfinite(cell) else cell
                 for cell in cells]
        line = dict(model=name, step=step, task=task, shots=job.shots, style=job.style,
                    doc_id=number, **dict(zip(names, cells)))
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with open(path, "ab", buffering=0) as file:
        write_all(file, "".join(lines).encode())


def find_all(models, steps):
    """Return find's entries of comma-separated models; two of the same name are an error."""
    entries = dict.fromkeys(entry for model in models.split(",") for entry in find(model, steps))
    names = {}
    for name, step, _, folder in entries:
        if names.setdefault((name, step), folder) != folder:
            raise ValueError(f"{names[name, step]} and {folder} would both be called {name} step "
                             f"{step}; rename a folder")
    return list(entries)


def find(model, steps):
    """Return [(name, step, tokens seen, folder)] of the checkpoints `model` and `steps` name.

    A damaged one raises ValueError; among `all` it is left out, with a line that says so.
    """
    path = Path(os.path.abspath(model))  # "." has a name too
    folders = dict(checkpoints.step_folders(path))
    if not folders:
        if not (path / "config.json").exists() and not list(path.glob("layer_*.pt")):
            raise ValueError(f"{model}: neither a run folder (step0, step1, ...) nor a "
                             "checkpoint's folder (config.json)")
        match = re.fullmatch(r"step(\d+)", path.name)
        name = path.parent.name if match else path.name
        return [(name, match[1] if match else "", tokens_seen(path), path)]
    if not re.fullmatch(r"all|last|\d+(,\d+)*", steps):
        raise ValueError(f"steps = {steps!r}, expected all, last, or numbers with commas")
    wanted = {"all": list(folders), "last": [max(folders)]}.get(steps)
    wanted = wanted or list(dict.fromkeys(map(int, steps.split(","))))
    if missing := [str(step) for step in wanted if step not in folders]:
        raise ValueError(f"{model}: no checkpoint at step {', '.join(missing)}; "
                         f"there are {', '.join(map(str, folders))}")
    whole = [step for step in wanted if checkpoints.is_whole(folders[step])]
    if damaged := [str(folders[step]) for step in wanted if step not in whole]:
        words = f"{', '.join(damaged)} damaged (python verify.py verify {model} says what)"
        if steps != "all" or not whole:
            raise ValueError(words)
        note(f"{words}; left out")
    return [(path.name, str(step), tokens_seen(folders[step]), folders[step]) for step in whole]


def tokens_seen(folder):
    """Tokens a checkpoint has seen: as it says; 2^21 a step if its path has a published name."""
    path, match = folder / "training.json", re.fullmatch(r"step(\d+)", folder.name)
    if path.exists():
        tokens = read_json(path).get("tokens")
        if type(tokens) is not int or not re.fullmatch(COUNT, str(tokens)):
            raise ValueError(f"{path}: tokens is {repr(tokens)[:50]}, expected a whole number")
        return tokens
    return int(match[1]) << 21 if match and folder.parent.name.startswith("pythia-") else ""


# ---------------------------------------------------------------------------- the other commands


def list_tasks(config):
    """Print every task; with --docs, how many of its documents are there, or what is missing."""
    for name, task in STYLES[config.style].items():
        line = f"{name:46} {task.kind:14} {task.split:11} shots from {task.pool or 'nowhere':11}"
        for split in dict.fromkeys((task.split, task.pool or task.split)) if config.docs else ():
            try:
                line += f"{split} {len(read_split(config.docs, task, split)):,}"
                if task.n and split == task.split:
                    line += f" of {task.n:,}"
            except (ValueError, OSError) as error:
                line += f"{split} " + str(error).split(";")[0].replace(": no such file", " missing")
            line += "  "
        print(line.rstrip())
    print("all of a kind: " + ", ".join(
        f"{name} ({len(members)})" for name, members in MEMBERS.items()
        if members[0] in STYLES[config.style]))


@dataclass(frozen=True)
class SampleConfig:
    model: str  # as for evaluation
    prompt: str = ""  # empty: from <|endoftext|>
    steps: str = "last"
    n_tokens: int = 48
    temperature: float = 0.8  # 0 is greedy
    seed: int = 1234
    tokenizer: str | None = None
    device: str = "auto"

    def __post_init__(self):
        check(self, "0 or at least 0.001", lambda value: value == 0 or value >= 0.001,
              "temperature")
        check(self, "at least 1", lambda value: value >= 1, "n_tokens")


def sample(config):
    """Print a continuation of the prompt at each step."""
    device = Processes(config.device).device
    for name, step, _, folder in find_all(config.model, config.steps):
        tokenizer = load_tokenizer(checkpoints.folder_tokenizer(folder, config.tokenizer))
        prompt = torch.tensor([tokenizer.encode(config.prompt) or [ENDOFTEXT]], device=device)
        model = checkpoints.load_model(folder, device)
        generator = torch.Generator(device).manual_seed(config.seed)
        tokens = model.generate(prompt, config.n_tokens, config.temperature, generator)
        print(f"--- {name} step {step}\n{tokenizer.decode(tokens[0].tolist())}")
        del model  # two may not fit where one does


# ---------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class LossesConfig:
    model: str  # as for evaluation
    output: str  # writes OUTPUT.npy, float32 (checkpoints, rows, tokens), and OUTPUT.json
    data: str | None = None  # PREFIX; None: what the first model was trained on
    rows: str = "0:4096"  # of the order that the first model was trained in, first:last+1
    text: str | None = None  # instead of rows of data: JSON Lines, each document's "text" a row
    steps: str = "all"
    batch_tokens: int | None = None  # tokens computed at once
    tokenizer: str | None = None
    device: str = "auto"


def losses(config):
    """Write the nats of every token of fixed rows at every checkpoint; goes on if stopped.

    A text's tokens stand behind <|endoftext|>, and behind its last one is NaN. OUTPUT.json says
    which checkpoint, row and document is where.
    """
    processes = Processes(config.device, timeout=timedelta(days=30))
    processes.agree(asdict(config) | {"device": processes.device.type})
    entries = find_all(config.model, config.steps)
    rows, what = loss_rows(config, entries)
    what["sha256"] = hashlib.sha256(rows.tobytes()).hexdigest()
    processes.agree(what)
    what["checkpoints"] = [[name, step] for name, step, *_ in entries]
    results, missing = processes.together(
        lambda: open_losses(config.output, what, rows), first_alone=True) or (None, None)
    todo, stride = processes.gather(missing)[0], processes.count
    n = config.batch_tokens or BATCH_TOKENS[processes.device.type]
    mine = torch.tensor(rows[processes.rank::stride]).split(max(1, n // rows.shape[1]))
    for i in tqdm(todo, unit="checkpoint", disable=processes.rank > 0 or None):
        model = checkpoints.load_model(entries[i][3], processes.device)
        found = np.concatenate([token_losses(model, some.to(processes.device)) for some in mine])
        for rank, part in enumerate(processes.gather(found)):
            if processes.rank == 0:
                results[i, rank::stride] = part
        del model  # two may not fit where one does
    if processes.rank == 0:
        if todo:
            results.flush()
            os.replace(f"{config.output}.partial", f"{config.output}.npy")
        print(f"{config.output}.npy: {len(entries)} checkpoints of {len(rows):,} rows, "
              f"{len(todo)} done now")
    leave_processes()


def loss_rows(config, entries):
    """Return rows of tokens (n, T + 1), -1 behind a text's last, and what they are."""
    L = min(checkpoints.open_any(folder)[0].seq_length for *_, folder in entries)
    tokenizer = None
    if config.text:
        tokenizer = load_tokenizer(checkpoints.folder_tokenizer(entries[0][3], config.tokenizer))
        what = {"text": config.text,
                "documents": [document.get("id") for document in read_jsonl(config.text)]}
    else:
        model = config.model.split(",")[0]
        order = order_of(model, config.data)
        first, last = first_and_last("rows", config.rows, len(ordered(order)))
        what = {"order": asdict(order), "rows": [first, last]}
        trained_on = run_settings(model).get("data", order.data)
        if trained_on != order.data:
            what["trained_on"] = trained_on
    rows = token_rows(what, tokenizer)
    if not 1 < rows.shape[1] <= L + 1:
        raise ValueError(f"rows of {rows.shape[1] - 1} tokens, expected 1 to {L}")
    return rows, what


def token_rows(what, tokenizer):
    """Return the rows of tokens (n, T + 1) that OUTPUT.json names, -1 behind a text's last."""
    if "order" in what:
        return ordered(Order(**what["order"])).rows(range(*what["rows"])).astype(np.int64)
    encoded = [[ENDOFTEXT] + tokenizer.encode(text_of(document, "text"))
               for document in read_jsonl(what["text"])]
    longest = max(map(len, encoded))
    return np.array([row + [-1] * (longest - len(row)) for row in encoded])


def first_and_last(name, text, n):
    """Return the numbers of a setting "first:last", 0 <= first < last <= n, or raise ValueError."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last) <= n):
        raise ValueError(f"{name} = {text!r}, expected FIRST:LAST+1 within 0:{n}")
    return int(first), int(last)


def open_losses(output, what, rows):
    """Return the array that is being made and the checkpoints it lacks; nothing if all is there."""
    path, partial = f"{output}.json", f"{output}.partial"
    if os.path.exists(path) and read_json(path) != what:
        raise ValueError(f"{path}: of other checkpoints or rows; name another --output")
    write_json(path, what)
    shape = len(what["checkpoints"]), len(rows), rows.shape[1] - 1
    if os.path.exists(f"{output}.npy"):
        open_array(f"{output}.npy", shape, "r")
        return None, []
    if not os.path.exists(partial):
        empty = np.lib.format.open_memmap(f"{partial}.tmp", "w+", np.float32, shape)
        for checkpoint in empty:  # one at a time: together they may not fit into memory
            checkpoint[:] = np.nan
        empty.flush()
        os.replace(f"{partial}.tmp", partial)
    results = open_array(partial, shape, "r+")
    return results, [i for i, found in enumerate(results)
                     if not np.isfinite(found[rows[:, 1:] >= 0]).all()]


def open_array(path, shape, mode):
    """Return a mapped .npy of losses, or raise ValueError: it is not what was written there."""
    file_size(path)
    try:
        array = np.load(path, mmap_mode=mode)
    except (ValueError, EOFError):
        array = None
    if array is None or (array.shape, array.dtype) != (shape, np.float32):
        raise ValueError(f"{path}: not the float32 {shape} that belongs here; move it away")
    return array


@torch.no_grad()
def token_losses(model, rows):
    """Return the nats of all tokens but the first of rows (n, T + 1) as (n, T); NaN for -1."""
    hidden, targets = model.hidden(rows[:, :-1].clamp(min=0)).flatten(0, 1), rows[:, 1:].flatten()
    logprobs, _ = _logprobs(model, hidden, np.arange(len(targets)), targets.clamp(min=0).tolist())
    return np.where((targets >= 0).cpu().numpy(), -logprobs, np.nan).reshape(len(rows), -1)


def run_settings(model):
    """Return what a run of ours, or the run of a step's folder, was trained with; else nothing."""
    settings = {}
    for path in (Path(model) / "config.json", Path(model).absolute().parent / "config.json"):
        if path.exists() and "batch_size" in (found := read_json(path)):
            settings = found
    return settings


def order_of(model, data=None):
    """Return the Order that a run was trained in, of other data if given; Pythia's without one."""
    settings = run_settings(model)
    if not (data or settings.get("data")):
        raise ValueError(f"{model}: not a run of ours, so --data=PREFIX has to name what it was "
                         "trained on")
    return Order(data or settings["data"], **{name: settings[name] for name in (
        "steps", "batch_size", "seq_length", "seed") if name in settings})


if __name__ == "__main__":
    if sys.argv[1:2] == ["sample"]:
        run(sample, parse(sys.argv[2:], SampleConfig))
    elif sys.argv[1:2] == ["tasks"]:
        run(list_tasks, parse(["--model=", "--tasks=", "--docs=", *sys.argv[2:]], EvalConfig))
    elif sys.argv[1:2] == ["losses"]:
        run(losses, parse(sys.argv[2:], LossesConfig))
    else:
        run(main, parse(sys.argv[1:], EvalConfig))
