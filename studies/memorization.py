"""Is memorization a Poisson process over training? (Biderman et al. 2023, section 3.2.)

A row of the training order is (k, l)-memorized, k = l = 32, if greedy decoding from its first k
tokens gives its next l. The paper counts memorized rows in windows of 512 consecutive rows and
finds the counts Poisson distributed: what is memorized does not depend on when it was seen.

    python -m studies.memorization score --model=RUN --output=OUT
    python -m studies.memorization score --model=RUN --output=NEVER --data=HELDOUT --control
    python -m studies.memorization analyse --results=OUT --plot=OUT/memorization.png

and with a published model and its data, checkpoint folders named step13000, step143000, ...:

    torchrun --nproc_per_node=8 -m studies.memorization score \\
        --model=pythia-12b-deduped/step143000 --data=data/pile-deduped/document --output=OUT

Cost: a 70m on two CPU cores decides 187 rows/s that miss at once, 49 that are right to the end
(`python bench.py memorization`): Pythia's 146,432,000 rows take 9 to 35 days a checkpoint,
--rows=0:1000000 1.5 to 6 hours. A miss at once is one pass over 32 tokens, 7.6e11 FLOPs with the
12B (47 GB of weights in float32), 1.1e20 for all its rows. On an
H100 a 70m decides 25,157 such rows/s, a 410m 2,152 (float32; `python bench.py gpu`).

OUT/NAME_stepN.npy is uint8 (rows,): how many of the l tokens are right before the first miss. With
--generate=True NAME_stepN_generated.npy is the original's score times l: how many of the l are
right when the model goes on from its own output (predictable-memorization/eval_memorization.py).
NAME_model.json says which model has that name.

What `analyse` makes of it, and which of it answers the question: studies/memorization_analysis.py.
"""

import os
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoints
from config import command, read_json
from data import Order, ordered
from eval import find_all
from model import Cache, head_blocks
from parallel import Processes
from studies.memorization_analysis import Analyse, analyse
from studies.results import Checkpoints, first_and_last, open_results

UNKNOWN = 255  # in a .npy that is being made


@torch.no_grad()
def matched_lengths(model, rows, context, stages=(1, 4, 16)):
    """Return how many tokens behind the first `context` greedy decoding gets right until it misses.

    rows (n, context + l) int64 -> (n,) int64. Nothing is generated: until its first miss, greedy
    decoding reads the row itself, so argmax on the row decides. Most rows miss at once, so the
    positions are scored in stages, each reading on from the last one's keys and values, and a row
    is dropped at its miss. Of equal logits the first is greedy, as in torch.argmax and so in
    transformers' generate.
    """
    (n, width), device = rows.shape, rows.device
    cache = [Cache(model.config, n, width - 1, model.embed_in.weight) for _ in model.layers]
    columns = torch.arange(width - 1, device=device)
    lengths = torch.zeros(n, dtype=torch.int64, device=device)
    alive, read, done = torch.arange(n, device=device), 0, 0  # tokens in the cache, tokens decided
    for stop in sorted({stage for stage in stages if stage < width - context} | {width - context}):
        end = context + stop - 1  # the last token is only predicted
        ahead = torch.zeros(end - read, end, device=device).masked_fill_(
            columns[:end] > columns[read:end, None], -torch.inf)
        hidden = model.hidden(rows[alive, read:end], columns[read:end], ahead, cache)
        hidden = hidden[:, context - 1 + done - read:].flatten(0, 1)
        predicted = torch.cat([logits.argmax(1) for _, logits in
                               head_blocks(hidden, model.embed_out.weight)])
        right = predicted.view(len(alive), -1) == rows[alive, context + done:context + stop]
        lengths[alive] += right.cumprod(1).sum(1)
        going, read, done = right.all(1), end, stop
        alive = alive[going]
        if not len(alive):
            break
        if not going.all():
            for layer in cache:
                layer.kv = layer.kv[:, going]
    return lengths


def generated_matches(model, rows, context):
    """Return how many tokens behind the first `context` equal what the model generates, (n,)."""
    out = model.generate(rows[:, :context], rows.shape[1] - context, temperature=0)
    return (out[:, context:] == rows[:, context:]).sum(1)


# ---------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Score(Checkpoints):
    model: str  # run folder, or checkpoint folders named stepN, with commas
    output: str  # folder of the results
    data: str | None = None  # PREFIX; None: what the run was trained on
    control: bool = False  # the models never saw any of the data
    rows: str = "all"  # of the training order, first:last+1; all: as many as the order has
    context: int = 32  # k
    continuation: int = 32  # l
    generate: bool = False  # also the score of the model's own generation
    batch: int = 256  # rows at a time

    def __post_init__(self):
        if not (self.context > 0 and 0 < self.continuation < UNKNOWN and self.batch > 0):
            raise ValueError(f"context = {self.context}, continuation = {self.continuation}, "
                             f"batch = {self.batch}: expected positive numbers, continuation below "
                             f"{UNKNOWN}")


def training_order(models, data, control=False):
    """Return the one Order that these runs were trained in, Pythia's without a run's config."""
    orders = {model: order_of(model, data, control) for model in models.split(",")}
    (first, order), *others = orders.items()
    for model, other in others:
        if other != order:
            raise ValueError(f"{first} and {model} were trained in different orders; score each "
                             "into its own --output")
    return order


def order_of(model, data, control):
    folder = Path(model)
    path = next((p for p in (folder / "config.json", folder.parent / "config.json")
                 if p.exists() and "batch_size" in read_json(p)), None)
    settings = read_json(path) if path else {}
    if not (data or settings.get("data")):
        raise ValueError(f"{model}: not a run of ours, so --data=PREFIX has to name what it was "
                         "trained on")
    if control and (not data or os.path.realpath(data) == os.path.realpath(
            settings.get("data") or "")):
        raise ValueError(f"{model}: was trained on {settings.get('data')}; --control needs the "
                         "--data=PREFIX of something else")
    try:
        return Order(data or settings["data"], **{name: settings[name] for name in (
            "steps", "batch_size", "seq_length", "seed") if name in settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def score(options):
    """Score rows of the training order at each checkpoint; goes on where it was stopped."""
    # The first process to finish may wait for the last one longer than gloo's 30 minutes.
    processes = Processes(options.device, timedelta(days=30))
    folders = find_all(options.model, options.steps)
    order = training_order(options.model, options.data, options.control)
    data = ordered(order)
    width = options.context + options.continuation
    if width > data.seq_length + 1:
        raise ValueError(f"context + continuation = {width}, but a row has {data.seq_length + 1} "
                         "tokens")
    first, last = 0, len(data)
    if options.rows != "all":
        first, last = first_and_last("rows", options.rows, len(data))
    output = Path(options.output)
    open_results(output / "memorization.json", {
        "first_row": first, "last_row": last - 1, "context": options.context,
        "continuation": options.continuation, "order": asdict(order), "control": options.control})
    for name, step, _, folder in folders:  # the files have only the name
        path = output / f"{name}_model.json"
        open_results(path, {"model": str(folder.parent if step else folder)},
                     f"name another --output or, if the model was moved, delete {path}")
    kinds = {"": matched_lengths} | ({"_generated": generated_matches} if options.generate else {})
    for name, step, _, folder in folders:
        # A file is there only once every process is through with it, so all find the same.
        paths = {output / f"{name}_step{step}{kind}.npy": act for kind, act in kinds.items()}
        paths = {path: act for path, act in paths.items() if not path.exists()}
        model = checkpoints.load_model(folder, processes.device) if paths else None
        for path, act in paths.items():
            results = open_partial(path, last - first)
            score_rows(lambda rows: act(model, rows, options.context), data, width, results,
                       range(first, last), options.batch, processes, path.stem)
            results.flush()
            processes.gather(None)  # wait for all
            if processes.rank == 0:
                os.replace(f"{path}.partial", path)
                whole = np.mean(results == options.continuation)
                print(f"{path}: {len(results):,} rows, {whole:.3%} of which whole, "
                      f"{np.mean(results):.3f} of {options.continuation} tokens right on average")
    if dist.is_initialized():
        dist.destroy_process_group()


def score_rows(act, data, width, results, rows, batch, processes, title):
    """Fill `results`, of these rows, where it is UNKNOWN with what act says of their first tokens.

    The processes take blocks of `batch` rows in turn.
    """
    blocks = range(rows.start + processes.rank * batch, rows.stop, processes.count * batch)
    with tqdm(total=len(rows), desc=title, unit="row", unit_scale=True,
              disable=processes.rank or None) as bar:
        for start in blocks:
            stop = min(start + batch, rows.stop)
            here = slice(start - rows.start, stop - rows.start)
            if UNKNOWN in results[here]:
                tokens = data.rows(range(start, stop))[:, :width].astype(np.int64)
                found = act(torch.from_numpy(tokens).to(processes.device))
                results[here] = found.cpu().numpy()
            bar.update((stop - start) * processes.count)


def open_partial(path, n):
    """Return PATH.partial as a uint8 array (n,) that all processes write to, UNKNOWN at first."""
    partial = f"{path}.partial"
    if not os.path.exists(partial):
        mine = f"{partial}.{os.getpid()}"
        np.save(mine, np.full(n, UNKNOWN, dtype=np.uint8))  # numpy adds .npy
        try:
            os.link(f"{mine}.npy", partial)  # the first process's is everybody's
        except FileExistsError:
            pass
        os.remove(f"{mine}.npy")
    results = np.load(partial, mmap_mode="r+", allow_pickle=False)
    if results.shape != (n,) or results.dtype != np.uint8:
        raise ValueError(f"{partial}: {results.dtype} {results.shape}, expected uint8 ({n},); "
                         "delete it")
    return results


COMMANDS = {"score": (Score, score), "analyse": (Analyse, analyse)}

if __name__ == "__main__":
    command(sys.argv[1:], COMMANDS)
