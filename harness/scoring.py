"""Log-likelihoods and greedy texts by lm-evaluation-harness's rules, several times faster.

Rows that begin alike (the choices of a question, all questions behind the same shots) share the
work on what they share, logits are computed only where a token is scored, and rows of like length
are batched by tokens. None of it changes a number by more than rounding (tests/test_scoring.py:
1e-4).
"""

import itertools
import re
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

from model import Cache, Prefix, head_blocks
from tokenizer import ENDOFTEXT, N_TOKENS

# ---------------------------------------------------------------------------- shared beginnings


class Pack:
    """Rows of tokens as a tree: what they begin with in common is there once.

    A node is a token; its position is its depth, it sees its ancestors and itself. `branches` are
    the chains it is made of, (first node, end, ancestors of the first).
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


def plan(rows, L, batch_tokens):
    """Return batches [(prefix tokens, packs)] of all rows (tokens, n), cut on the left to L + 1.

    Rows next to each other in alphabetical order share most. A row joins the pack of the one before
    if they share a quarter of it and the tree stays small (attention looks at the whole tree);
    packs that share a long beginning have it computed once, as a prefix of their batches.
    """
    cut = [np.array(tokens[-(L + 1):]) for tokens, _ in rows]
    for row, (_, n) in zip(cut, rows):
        if not 0 < n < len(row):
            raise ValueError(f"a continuation of {n} tokens does not fit in {L} tokens of context")
    order = sorted(range(len(rows)), key=lambda i: cut[i].astype(">u4").tobytes())
    groups, before = [], None  # [packs, tokens that all of them share]
    for i in order:
        row, n = cut[i], rows[i][1]
        shared = 0 if before is None else _common(before[:-1], row[:-1])
        own = len(row) - 1 - n  # a scored position is no part of a prefix
        packs, P = groups[-1] if groups else ([], 0)
        still = min(P, shared, own)  # what the group would share with this row in it
        if packs and 4 * shared >= len(row) and (len(packs) == 1 or still >= P // 2) and (
                len(packs[-1].tokens) + len(row) - shared <= max(len(row), 256) * 3 // 2 + 256):
            groups[-1][1] = still
        elif packs and still >= max(32, P // 2):
            packs.append(Pack())
            groups[-1][1], shared = still, 0
        else:
            groups.append([[Pack()], own])
            shared = 0
        groups[-1][0][-1].add(i, row.tolist(), n, shared)
        before = row
    alone = [pack for packs, P in groups if (len(packs) - 1) * P < 512 for pack in packs]
    batches = _batches(alone, 0, batch_tokens)
    for packs, P in groups:
        if (len(packs) - 1) * P >= 512:
            batches += _batches(packs, P, batch_tokens)
    return batches


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
        # Plain rows, padded on the right, where a causal model cannot see.
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
        # Padding sees anything: a softmax of nothing would be NaN.
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
    nodes, which = np.unique(nodes, return_inverse=True)  # choices of one token share their logits
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
        # log sum exp = largest logit - log(its probability): half the time of logsumexp, in place.
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
    # A stop's tokens, and broken bytes.
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
