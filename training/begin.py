"""What a run begins from: its data and its folder, the initialisation or a checkpoint."""

import os
import re
from pathlib import Path

import torch

import checkpoints
from data import OrderedData, TokenFile, samples_needed
from studies.interventions import IntervenedData
from tokenizer import load_tokenizer
from training.parallel import fill
from training.record import claim_folder


def claim(model_config, config, intervention, launch, processes):
    """Open the data and claim the run folder; a mistake ends here, before anything is computed.

    Return read(step), the rows of this process and those that an intervention changed; the held-out
    micro-batches; folder and step of the checkpoint to begin from.
    """
    share = dict(batch_size=config.batch_size, rank=processes.rank, world_size=processes.count,
                 micro_batch_size=launch.micro_batch_size)
    vocab_size, heldout = model_config.vocab_size, []
    order = data = open_data(model_config, config, processes, config.data, config.steps)
    processes.together(lambda: read_batch(order, 0, vocab_size, share))
    if config.heldout:
        others = open_data(model_config, config, processes, config.heldout, config.heldout_batches,
                           once=True)
        heldout = processes.together(lambda: [
            rows for i in range(config.heldout_batches)
            for rows in read_batch(others, i, vocab_size, share)])

    def claim_alone():
        find_start(config)  # a mistake in --branch_from leaves no folder
        load_tokenizer(config.tokenizer)
        claim_folder(model_config, config, intervention, launch, order, processes)

    processes.together(claim_alone, first_alone=True)
    # Behind the lock, when no other launch can save any more.
    source, start = processes.together(lambda: find_start(config))
    position = torch.tensor(float(start if source else -1))
    if processes.any(position != processes.mean(position)):
        raise ValueError(f"{source or config.out_dir}: the processes see different newest "
                         "checkpoints; launch again once every node sees the same disk")
    if intervention.intervention:
        data = IntervenedData(order, load_tokenizer(config.tokenizer), intervention)

    def read(step):
        rows = data if step >= start else order  # what is replayed comes as the parent saw it
        return read_batch(rows, step, vocab_size, share), getattr(rows, "changed", ())

    return read, heldout, source, start


def open_data(model_config, config, processes, prefix, steps, once=False):
    """Return `steps` batches in order; the first process builds it, the others find it built.

    once: held-out ones, of which none may come again.
    """
    def build():
        num_samples = samples_needed(steps, config.batch_size)
        rows = (TokenFile(prefix).n_tokens - 1) // model_config.seq_length
        if once and num_samples > rows:
            raise ValueError(f"{prefix} holds {rows * 200 // 201 // config.batch_size:,} batches "
                             f"of {config.batch_size:,} rows, heldout_batches = {steps:,}")
        data = OrderedData(prefix, model_config.seq_length, num_samples, config.seed)
        if len(data) < steps * config.batch_size:
            raise ValueError(f"{prefix} holds {len(data):,} rows of {model_config.seq_length + 1} "
                             f"tokens, {steps:,} steps need {steps * config.batch_size:,}")
        return data

    data = processes.together(build, first_alone=True)
    return processes.together(lambda: data or build())


def read_batch(data, step, vocab_size, share):
    """Return this process's rows of a step, (micro-batches, sequences, T + 1) int64 on the host.

    Raises ValueError, naming the file, on a token that the model has not.
    """
    batch = data.batch(step, **share)
    if batch.max() >= vocab_size:
        prefix = getattr(data, "data", data).tokens.prefix  # an intervention has its data within
        raise ValueError(f"{prefix}: token {batch.max()} in step {step}, "
                         f"but vocab_size is {vocab_size}")
    return torch.from_numpy(batch)


def find_start(config):
    """Return (folder, step) of the checkpoint to begin from, (None, 0) for the initialisation."""
    if os.path.lexists(config.out_dir) and not os.path.isdir(config.out_dir):
        raise ValueError(f"out_dir = {config.out_dir} is no folder; name another")
    saved = checkpoints.saved_steps(config.out_dir, state=True)
    if saved:
        return os.path.join(config.out_dir, f"step{saved[-1]}"), saved[-1]
    if not config.branch_from:
        return None, 0
    step = re.fullmatch(r"step(0|[1-9]\d*)", Path(config.branch_from).name)
    if not step or not os.path.isdir(config.branch_from):
        raise ValueError(f"branch_from = {config.branch_from}, expected a folder RUN/stepN")
    if int(step[1]) >= config.steps:
        raise ValueError(f"branch_from = {config.branch_from}, but steps = {config.steps:,}: "
                         "nothing is left to train")
    if not checkpoints.is_whole(Path(config.branch_from)):
        raise ValueError(f"branch_from = {config.branch_from}: a file is missing or cut (python "
                         f"checkpoints.py verify {Path(config.branch_from).parent} says which): "
                         "branch from another step")
    return config.branch_from, int(step[1])


def go_on(source, start, model, optimizer, scaler, config):
    """Fill model, optimizer and scaler from where `find_start` says.

    Return the first step to take and how many updates there were. Where a checkpoint holds weights
    alone, the first step lies before `start`: the batches before it are replayed at rate 0, which
    moves nothing but Adam's moments. What training.json knows, loss scale and number of updates,
    holds then too; a published checkpoint has none.
    """
    if source is None:
        model.init_weights(config.seed, fill)
        return start, 0
    if training := checkpoints.load_training(Path(source).parent, start, model, optimizer):
        scaler.state = training["scaler"]
        return start, training["updates"]
    training = checkpoints.read_training(Path(source), start)
    scaler.state, updates = training.get("scaler", scaler.state), training.get("updates", start)
    first = start - config.warm_moments
    if start > 0 and not 0 <= first < start:
        raise ValueError(f"{source} holds weights only and warm_moments = {config.warm_moments}: "
                         "--warm_moments=K rebuilds Adam's moments from the K batches before it, "
                         f"K from 1 to {start}")
    return max(first, 0), updates


def rescale_moments(optimizer, updates):
    """Let moments of a few replayed batches stand for those of `updates` updates.

    Adam's moments are sums whose weights come to 1 - beta**steps; what the batches before the
    replayed ones weighed goes to those replayed. Raises FloatingPointError if every one of them
    overflowed.
    """
    if not optimizer.state:
        raise FloatingPointError("the loss scale fell at every replayed batch: "
                                 "give more of them, --warm_moments=K")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            replayed = float(state["step"])
            for beta, moment in zip(group["betas"], (state["exp_avg"], state["exp_avg_sq"])):
                moment.mul_((1 - beta**updates) / (1 - beta**replayed))
            state["step"].fill_(updates)
