"""Evaluate checkpoints over training, with exactly lm-evaluation-harness's numbers.

    python eval.py --model=RUN --tasks=lambada_openai,piqa --docs=DIR --output=results.csv
    torchrun --standalone --nproc_per_node=8 eval.py ...  # the same numbers, shared out
    python eval.py tasks --docs=DIR                       # the tasks, and which documents are there
    python eval.py sample --model=RUN --steps=1,64,512 --prompt="In the beginning"
    python eval.py losses --model=RUN --rows=0:4096 --output=OUT        # nats of every token
    python eval.py losses --model=RUN --text=TEXTS.jsonl --output=OUT   # of every text

tasks.py has the tasks, their prompts and metrics; here is what the model does with them, by
lm_eval's rules but several times faster: rows that begin alike (the choices of a question, all
questions behind the same shots) share the work on what they share, logits are computed only where a
token is scored. That changes a number by no more than rounding (tests/test_eval.py: 1e-4).
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
from tasks import (digest, GROUPS, measured, named_tasks, NoDocuments, prompts, read_jsonl,
                   read_split, STYLES)
from tokenizer import ENDOFTEXT, load_tokenizer

# ---------------------------------------------------------------------------- shared beginnings


# Tokens computed at once. Few keep a CPU's activations in its cache (a tenth faster than 4096).
BATCH_TOKENS = 32768 if torch.cuda.is_available() else 2048
SHARED = 32  # tokens that rows of more than a batch must share for that to be computed apart
NEVER = 1 << 40  # behind all nodes


class Pack:
    """Rows of tokens as a tree: what they begin with in common is there once.

    A token is a node, and sees its ancestors and itself. Each row shares nodes with the one before
    only, so that nodes j to ends[j] - 1 are those that see node j. "the cat sat", "the cat ran on":

        0 the - 1 cat - 2 sat              positions 0 1 2 2 3, ends NEVER NEVER 3 NEVER NEVER
                      \\ 3 ran - 4 on      path, the nodes of the last row: 0 1 3 4

    The P tokens of a prefix are not in the tree; in a path they are nodes -P to -1.
    """

    def __init__(self, P):
        self.tokens, self.positions, self.ends, self.path = [], [], [], [*range(-P, 0)]
        self.scored = []  # of each row (3, n): its index, nodes, and the tokens that follow them

    def add(self, index, row, n, shared):
        """Append a row of which n tokens are scored and the `shared` first are the last row's."""
        start = len(self.tokens)
        for node in self.path[shared:]:
            self.ends[node] = start
        self.tokens += row[shared:-1]
        self.positions += range(shared, len(row) - 1)
        self.ends += [NEVER] * (len(self.tokens) - start)
        self.path[shared:] = range(start, len(self.tokens))
        self.scored.append(np.array([[index] * n, self.path[-n:], row[-n:]]))


def plan(rows, L, batch_tokens=BATCH_TOKENS, name="request {}".format):
    """Return batches [(prefix tokens, packs)] of rows (index, tokens, n), cut on the left to L + 1.

    If more rows begin alike than fit in one batch, as behind the same shots, their common beginning
    is computed once, as a prefix. Raises ValueError by name(index) of a row without score or
    context.
    """
    for index, tokens, n in rows:
        if not 0 < n <= min(L, len(tokens) - 1):
            raise ValueError(f"{name(index)}: a continuation of {max(n, 0)} tokens behind "
                             f"{len(tokens) - max(n, 0)} does not fit in {L} tokens of context")
    rows = [(index, np.array(tokens[-(L + 1):], ">u4"), n) for index, tokens, n in rows]
    rows.sort(key=lambda row: row[1].tobytes())  # rows that share much are neighbours
    groups = defaultdict(list)
    for _, group in itertools.groupby(rows, key=lambda row: row[1][:SHARED].tobytes()):
        group, prefix = list(group), ()
        if sum(len(tokens) for _, tokens, _ in group) > batch_tokens:
            prefix = os.path.commonprefix([tokens[:-n - 1].tolist() for _, tokens, n in group])
        groups[tuple(prefix)] += group
    batches = []
    for prefix, group in groups.items():
        packs = make_packs(group, len(prefix))
        packs.sort(key=lambda pack: -len(pack.tokens))  # so those of like length come together
        while packs:
            n = max(1, batch_tokens // len(packs[0].tokens))
            batches.append((prefix, packs[:n]))
            packs = packs[n:]
    return batches


def make_packs(rows, P):
    """Return Packs of sorted rows behind their common P tokens.

    A row joins the pack of the one before if they share a quarter of it, and if the tree stays
    below twice its length, as attention sees the whole tree.
    """
    packs, before = [], []
    for index, row, n in rows:
        row = row.tolist()
        shared = len(os.path.commonprefix([before[:-1], row[:-1]]))
        small = packs and P + len(packs[-1].tokens) + len(row) - shared <= 2 * len(row)
        if not small or 4 * shared < len(row):
            packs.append(Pack(P))
            shared = P
        packs[-1].add(index, row, n, shared)
        before = row
    return packs


def _tensors(packs, P, like):
    """Return tokens, positions (B, T) of packs behind P tokens; mask (B, 1, T, P + T) or None."""
    nodes = torch.zeros(3, len(packs), max(len(pack.tokens) for pack in packs), dtype=torch.int64)
    for b, pack in enumerate(packs):
        nodes[:, b, :len(pack.tokens)] = torch.tensor([pack.tokens, pack.positions, pack.ends])
    tokens, positions, ends = nodes.to(like.device)
    if P == 0 and all(len(pack.path) == len(pack.tokens) for pack in packs):
        # Plain rows are padded on the right, which a causal model never looks at.
        return tokens, None, None
    node = torch.arange(len(ends[0]), device=like.device)
    seen = (node <= node[:, None]) & (node[:, None] < ends[:, None])  # node 0 by all, padding too
    mask = like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return tokens, positions, F.pad(mask, (P, 0))[:, None]


def score(model, rows, batch_tokens=BATCH_TOKENS):
    """Return [(log-likelihood in nats, is_greedy)] of the last n tokens of rows (tokens, n).

    Rows are cut on the left to the context. The softmax runs over all columns, padded vocabulary
    included; is_greedy: each of the n tokens is the largest logit's, the first of equals. Under
    torchrun the rows are shared out and every process gets all results.
    """
    rows = [(i, *row) for i, row in enumerate(rows)]
    return run_plan(model, plan(rows, model.config.seq_length, batch_tokens), len(rows))


@torch.no_grad()
def run_plan(model, batches, n):
    """Return score's result of each index, 0 to n - 1; rows of the same index are added up."""
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
        tokens, positions, mask = _tensors(packs, P, weight)
        hidden = model.hidden(tokens, positions, mask, cache).flatten(0, 1)
        which, nodes, targets = np.concatenate([
            scored + [[0], [b * tokens.shape[1]], [0]]
            for b, pack in enumerate(packs) for scored in pack.scored], axis=1)
        # Choices of one token are scored at the same node, whose logits are computed once.
        nodes, at = np.unique(nodes, return_inverse=True)
        logprobs, greedy = _logprobs(model, hidden[nodes], at, targets)
        np.add.at(lls, which, logprobs)
        np.logical_and.at(all_greedy, which, greedy)
    lls, all_greedy = zip(*Processes.gather((lls, all_greedy)))
    return list(zip(sum(lls).tolist(), np.all(all_greedy, axis=0).tolist()))


def _logprobs(model, hidden, at, targets):
    """Return log p(target), and is it the greedy token, of targets (N,) behind rows `at` (N,) of
    hidden (n, D).
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


def encode_pair(tokenizer, context, continuation, style="v0.4"):
    """Return (tokens, n): context and continuation encoded together, n tokens of them the latter's.

    lm_eval/api/model.py, TemplateLM._encode_pair: white space at the context's end moves to the
    continuation; an empty context is <|endoftext|>, which a continuation may begin with already.
    v0.3 (lm_eval/base.py, BaseLM.loglikelihood) encodes each alone, white space where it stands.
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
    L = model.config.seq_length
    results = run_plan(model, plan(rolling_rows(tokenizer, texts, L), L), len(texts))
    return [ll for ll, _ in results]


def generate_until(model, tokenizer, prompts, stops=("\n",), n_tokens=256,
                   batch_tokens=BATCH_TOKENS):
    """Return what greedy decoding says after each prompt, up to the first of `stops` or n_tokens.

    lm_eval/models/huggingface.py, HFLM.generate_until: prompts are cut on the left to leave room
    for n_tokens; <|endoftext|> always ends a text.
    """
    stop = re.compile("|".join(map(re.escape, (*stops, "<|endoftext|>"))))

    def decode(tokens):
        return tokenizer.decode([token for token in tokens if token != 1])  # 1 is <|padding|>

    # The last tokens that can hold a stop; 3 more for a character that is cut in two.
    window = max((len(words.encode()) for words in stops), default=0) + 3

    def finished(new):
        return torch.tensor([bool(stop.search(decode(row))) for row in new[:, -window:].tolist()])

    room, device = model.config.seq_length - n_tokens, model.embed_in.weight.device
    encoded = [(tokenizer.encode_lines(prompt) or [ENDOFTEXT])[-room:] for prompt in prompts]
    rank, processes = checkpoints.process_place()
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))[rank::processes]
    results = {}
    while order:
        T = len(encoded[order[0]])
        n = max(1, min(8 * batch_tokens, 16384) // (T + n_tokens))  # the keys of all are kept
        chosen, order = order[:n], order[n:]
        padding = [T - len(encoded[i]) for i in chosen]
        tokens = torch.tensor([[0] * pad + encoded[i] for pad, i in zip(padding, chosen)])
        out = model.generate(tokens.to(device), n_tokens, 0, finished=finished,
                             padding=torch.tensor(padding, device=device))
        for i, row in zip(chosen, out[:, T:].tolist()):
            results[i] = stop.split(decode(row))[0]
    results = {i: text for part in Processes.gather(results) for i, text in part.items()}
    return [results[i] for i in range(len(prompts))]


class Job:
    """A task or a group's tasks, their documents made into requests; for any number of models."""

    def __init__(self, name, docs, shots=0, style="v0.4", limit=None):
        members = GROUPS[name][0] if name in GROUPS else [name]
        self.name, self.style = name, style
        self.task = STYLES[style][members[0]]  # a group's tasks differ only in their documents
        self.members = []  # (task's name, its Questions)
        self.requests = []  # of all, shots included: (context, continuation), or (prompt,)
        self.asked = []  # whose they are: (task's name, number of the document, file and line)
        self.documents = {}  # {task or group: hash}
        for member in members:
            try:
                prompted, self.documents[member] = prompts(
                    STYLES[style][member], docs, shots, style, limit)
            except ValueError as error:
                raise type(error)(f"{member}: {error}") from None
            self.members.append((member, [question for _, question in prompted]))
            for number, (prefix, question) in enumerate(prompted):
                for context, *continuation in question.requests:
                    self.requests.append((prefix + context, *continuation))
                    self.asked.append((member, number, question.where))
        if name in GROUPS:
            self.documents[name] = digest(list(self.documents.values()))


@lru_cache(maxsize=None)  # one for all checkpoints
def plan_job(job, tokenizer, L, batch_tokens):
    """Return the plan of a job's log-likelihoods for models with a context of L tokens."""
    if job.task.kind == "rolling":
        rows = rolling_rows(tokenizer, [text for _, text in job.requests], L)
    else:
        rows = [(i, *encode_pair(tokenizer, *request, job.style))
                for i, request in enumerate(job.requests)]
    return plan(rows, L, batch_tokens, lambda i: f"{job.asked[i][0]}: {job.asked[i][2]}")


def answer(model, tokenizer, job, batch_tokens=BATCH_TOKENS):
    """Return a result for each request: (log-likelihood, is_greedy), or (text,)."""
    if job.task.kind == "generate":
        if job.task.n_tokens >= model.config.seq_length:
            raise ValueError(f"{job.name}: {job.task.n_tokens} new tokens do not fit in "
                             f"{model.config.seq_length} tokens of context")
        texts = generate_until(model, tokenizer, [prompt for [prompt] in job.requests],
                               job.task.stops, job.task.n_tokens, batch_tokens)
        return [(text,) for text in texts]
    batches = plan_job(job, tokenizer, model.config.seq_length, batch_tokens)
    return run_plan(model, batches, len(job.requests))


def measure(job, results):
    """Return [(task, metric, value, stderr, n)] from the results of a job, a group's own last."""
    rows, results = [], iter(results)
    for name, questions in job.members:
        own = [[next(results) for _ in question.requests] for question in questions]
        rows += [(name + suffix, *row) for suffix, *row in measured(job.task, questions, own)]
    return rows + (GROUPS[job.name][1](rows) if job.name in GROUPS else [])


# ---------------------------------------------------------------------------- over training


@dataclass(frozen=True, kw_only=True)
class Models:
    """Which checkpoints, and what computes them."""
    model: str  # run folder, checkpoint folder or Hugging Face folder; several with commas
    steps: str = "all"  # of a run folder: all, last, or numbers with commas
    tokenizer: str | None = None  # None: the model's own, else 20B_tokenizer.json
    device: str = "auto"


@dataclass(frozen=True)
class EvalConfig(Models):
    tasks: str  # names with commas; `python eval.py tasks --docs=DIR` lists them
    docs: str  # folder of documents, DOCS/TASK/SPLIT.jsonl
    output: str = "results.csv"  # appended to; what it has of a model's name is not done again
    samples: str | None = None  # JSON Lines file that gets every request and its result (or NaN)
    shots: int = 0  # solved examples before each question
    style: str = "v0.4"  # lm-evaluation-harness 0.4, or "v0.3" as in the paper's files
    dtype: str = "float32"  # as in the paper; lm_eval loads the published files in float16
    limit: int | None = None  # only so many documents of each task
    batch_tokens: int = BATCH_TOKENS  # tokens computed at once: 32768 on a GPU, else 2048

    def __post_init__(self):
        check(self, " or ".join(STYLES), STYLES.__contains__, "style")
        check(self, "float32, float16 or bfloat16", checkpoints.FLOATS.__contains__, "dtype")
        check(self, "at least 0", lambda value: value >= 0, "shots")
        check(self, "at least 1", lambda value: value >= 1, "limit", "batch_tokens")


COLUMNS = ("model", "step", "tokens", "task", "shots", "metric", "value", "stderr", "n", "style",
           "dtype", "docs")
identity = itemgetter("model", "step", "task", "shots", "metric", "style", "dtype", "docs")


def all_jobs(config):
    """Return the Jobs of config.tasks; of a name for several tasks, those that have documents."""
    jobs = []
    for name in named_tasks(config.tasks, config.style):
        try:
            jobs.append(Job(name, config.docs, config.shots, config.style, config.limit))
        except NoDocuments as error:
            if name in config.tasks.split(","):
                raise
            note(f"{error}; left out")  # as CrowS-Pairs has no bias_type "autre" in English
    return jobs


def main(config):
    # Processes meet when a task is done. The first one may wait longer than gloo's 30 minutes.
    processes = Processes(config.device, timeout=timedelta(days=30))
    jobs = all_jobs(config)
    entries = find_all(config.model, config.steps)
    processes.agree(asdict(config) | {"device": processes.device.type,
                                      "documents": [job.documents for job in jobs]})
    # The first process knows what the files hold, and alone writes to them.
    table = processes.together(lambda: Table(config.output, COLUMNS), first_alone=True)
    if config.samples:
        processes.together(lambda: open_samples(config.samples), first_alone=True)
    there = processes.gather(table and set(map(identity, table.rows)))[0]
    tokenizer, n_done = None, 0
    for entry in entries:
        # An evaluation's rows are written at once: it is there if its last one is.
        todo = [job for job in jobs if (
            *entry[:2], job.name, str(config.shots), job.task.metrics.split()[-1], job.style,
            config.dtype, job.documents[job.name]) not in there]
        if not todo:
            continue
        path = checkpoints.folder_tokenizer(entry[3], config.tokenizer)
        tokenizer = tokenizer or load_tokenizer(path)  # all are the same
        model = checkpoints.load_model(entry[3], processes.device)
        model = model.to(checkpoints.FLOATS[config.dtype])
        for job in todo:
            results = answer(model, tokenizer, job, config.batch_tokens)
            if processes.rank == 0:
                record(config, table, there, entry, job, results)
        n_done += len(todo)
        del model  # two may not fit where one does
    if processes.rank == 0:
        print(f"{config.output}: {n_done} evaluations done, "
              f"{len(entries) * len(jobs) - n_done} were there")
    leave_processes()


def csv_rows(config, entry, job, measured):
    """Return rows {column: cell} of measure's; a group's member has its own documents' hash."""
    return [dict(zip(COLUMNS, (
        *entry[:3], task, str(config.shots), metric, value, stderr, n, job.style, config.dtype,
        job.documents.get(task.partition(":")[0], job.documents[job.name]))))
        for task, metric, value, stderr, n in measured]


def open_samples(path):
    """Make the file if there is none; drop a line that a kill has torn."""
    with open(path, "ab+") as file:  # what cannot be written is refused now, not in an hour
        file_size(path)  # refuses what is no file
        file.seek(0)
        whole = 0
        for line in file:
            if not line.startswith(b'{"model": '[:len(line)]):
                raise ValueError(f"{path}: holds other lines than samples; name another --samples")
            whole += len(line) * line.endswith(b"\n")
        file.truncate(whole)


def record(config, table, there, entry, job, results):
    """Append a job's requests to the samples, its rows to the CSV, and print what matters."""
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
    rows = measure(job, results)
    # Some are there already, if a kill has torn another one, or if a group had the task.
    new = [row for row in csv_rows(config, entry, job, rows) if identity(row) not in there]
    table.append(*(row.values() for row in new))
    there.update(map(identity, new))
    print(f"{name} step {step:>6} | " + " | ".join(
        f"{task} {metric} {value:.4f}{'' if stderr is None else f' ± {stderr:.4f}'} (n {n:,})"
        for task, metric, value, stderr, n in rows if task == job.name or len(rows) < 12))


def find_all(models, steps):
    """Return [(name, step, tokens seen, folder)] of the checkpoints of comma-separated models.

    Raises ValueError if one is not there or damaged.
    """
    found = {}
    for model in models.split(","):
        path = Path(os.path.abspath(model))  # "." has a name too
        name, folders = path.name, {str(step): at for step, at in checkpoints.step_folders(path)}
        chosen = {"all": [*folders], "last": [*folders][-1:]}.get(steps) or steps.split(",")
        if not folders:  # a checkpoint's own
            match = re.fullmatch(r"step(\d+)", name)
            name, step = (path.parent.name, match[1]) if match else (name, "")
            folders, chosen = {step: path}, [step]
        for step in chosen:
            if step not in folders:
                raise ValueError(f"{model}: no checkpoint at step {step}; "
                                 f"there are {', '.join(folders)}")
            folder = folders[step]
            if not checkpoints.is_whole(folder):
                raise ValueError(f"{folder}: no whole checkpoint (`verify.py verify` says why)")
            if found.setdefault((name, step), folder) != folder:
                raise ValueError(f"two folders would be called {name} step {step}; rename one")
    return [(name, step, tokens_seen(folder), folder) for (name, step), folder in found.items()]


def tokens_seen(folder):
    """Tokens a checkpoint has seen: as it says; 2^21 a step if its path has a published name."""
    path, (name, step) = folder / "training.json", checkpoints.identify(folder)
    if path.exists():
        tokens = read_json(path).get("tokens")
        if type(tokens) is not int:
            raise ValueError(f"{path}: tokens = {tokens!r}, expected a number")
        return tokens
    return step << 21 if name and step is not None else ""


# ---------------------------------------------------------------------------- other commands


def list_tasks(config):
    """Print every task; with --docs, how many of its documents are there, or what is missing."""
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
    prompt: str = ""  # empty: from <|endoftext|>
    steps: str = "last"
    n_tokens: int = 48
    temperature: float = 0.8  # 0 is greedy
    seed: int = 1234

    def __post_init__(self):
        check(self, "0 or at least 0.001", lambda t: t == 0 or t >= 0.001, "temperature")


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


@dataclass(frozen=True)
class LossesConfig(Models):
    output: str  # writes OUTPUT.npy, float32 (checkpoints, rows, tokens), and OUTPUT.json
    data: str | None = None  # PREFIX; None: what the first model was trained on
    rows: str = "0:4096"  # of the order that the first model was trained in, first:last+1
    text: str | None = None  # instead of rows of data: JSON Lines, each document's "text" a row
    batch_tokens: int = BATCH_TOKENS  # tokens computed at once


def losses(config):
    """Write the nats of every token of fixed rows at every checkpoint; goes on if stopped.

    A text's tokens stand behind <|endoftext|>, and behind its last one is NaN. OUTPUT.json says
    which row and document is where, and which checkpoints are there already.
    """
    processes = Processes(config.device, timeout=timedelta(days=30))
    entries = find_all(config.model, config.steps)
    rows, what = loss_rows(config, entries)
    path, arrays, done = f"{config.output}.json", f"{config.output}.npy", 0
    shape = len(entries), len(rows), rows.shape[1] - 1
    at = [what | {"checkpoints": what["checkpoints"][:n]} for n in range(len(entries) + 1)]
    if os.path.exists(path):
        before = read_json(path)
        done = at.index(before) if before in at else None
        if done is None or (done and load_npy(arrays).shape != shape):
            raise ValueError(f"{path}: of other checkpoints or rows; name another --output")
    elif os.path.exists(arrays):
        raise ValueError(f"{arrays}: there without its .json; move it away or name another "
                         "--output")
    processes.agree({"the rows": what, "what is there already": done})
    if processes.rank == 0:
        write_json(path, at[done])
        results = np.lib.format.open_memmap(arrays, "r+" if done else "w+", np.float32, shape)
        with open(arrays, "r+b") as file:  # a full disk shows now, not in the midst of a store
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(arrays))
    batches = torch.tensor(rows[processes.rank::processes.count], device=processes.device).split(
        max(1, config.batch_tokens // rows.shape[1]))
    for i in tqdm(range(done, len(entries)), disable=processes.rank > 0 or None):
        model = checkpoints.load_model(entries[i][3], processes.device)
        mine = np.concatenate([token_losses(model, some) for some in batches if len(some)]
                              or [np.empty((0, rows.shape[1] - 1))])
        del model  # two may not fit where one does
        for rank, part in enumerate(processes.gather(mine)):
            if processes.rank == 0:
                results[i, rank::processes.count] = part
        if processes.rank == 0:
            results.flush()
            write_json(path, at[i + 1])
    if processes.rank == 0:
        print(f"{arrays}: {len(entries)} checkpoints, {len(entries) - done} done now")
    leave_processes()


def loss_rows(config, entries):
    """Return rows of tokens (n, T + 1), -1 behind a text's last, and what they are."""
    model, tokenizer = config.model.split(",")[0], None
    if config.text:
        tokenizer = load_tokenizer(checkpoints.folder_tokenizer(entries[0][3], config.tokenizer))
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
    return rows, what | {"sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
                         "checkpoints": [[name, step] for name, step, *_ in entries]}


def token_rows(what, tokenizer):
    """Return the rows of tokens (n, T + 1) that OUTPUT.json names, -1 behind a text's last."""
    if "order" in what:
        return ordered(Order(**what["order"])).rows(range(*what["rows"])).astype(np.int64)
    encoded = [[ENDOFTEXT] + tokenizer.encode(str(document["text"]))
               for document in read_jsonl(what["text"])]
    return np.array([*itertools.zip_longest(*encoded, fillvalue=-1)]).T


@torch.no_grad()
def token_losses(model, rows):
    """Return the nats of all tokens but the first of rows (n, T + 1) as (n, T); NaN for -1."""
    hidden, targets = model.hidden(rows[:, :-1].clamp(min=0)).flatten(0, 1), rows[:, 1:].flatten()
    logprobs, _ = _logprobs(model, hidden, np.arange(len(hidden)), targets.clamp(min=0))
    return np.where((targets >= 0).cpu().numpy(), -logprobs, np.nan).reshape(len(rows), -1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["tasks"]:
        run(list_tasks, parse(["--model=", "--tasks=", "--docs=", *sys.argv[2:]], EvalConfig))
    elif sys.argv[1:2] in (["sample"], ["losses"]):
        command(sys.argv[1:], {"sample": (SampleConfig, sample), "losses": (LossesConfig, losses)})
    else:
        run(main, parse(sys.argv[1:], EvalConfig))
