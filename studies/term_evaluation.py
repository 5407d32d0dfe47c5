"""Ask models the term-frequency study's questions: `evaluate` of studies/term_frequency.py.

A row of its CSV is one prompt: model, step, tokens seen, task, shots, term (x1, or the question's
id), item (x2, or the hash of all questions), correct (0 or 1), logprob (of the right answer, in
nats).
"""

import csv
import io
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoints
from eval import find_all, lock, pick_device
from eval import generate_until, loglikelihood
from studies.term_questions import arithmetic, given_answer, OPERATIONS, read_questions, trivia
from tokenizer import load_tokenizer

HEADER = ("model", "step", "tokens", "task", "shots", "term", "item", "correct", "logprob")
KEY = ("model", "step", "task", "shots", "term", "item")
ANSWER_TOKENS = {"times": 16, "plus": 16, "triviaqa": 32}


@dataclass(frozen=True)
class Evaluate:
    model: str  # run folder, checkpoint folder or Hugging Face folder; several with commas
    steps: str = "all"  # of a run folder: all, last, or numbers with commas
    tasks: str = "times,plus"  # times, plus, triviaqa
    shots: str = "0,2,4,8,16"
    x1: str = "0:100"  # first:last+1 of the arithmetic's first operands
    questions: str = ""  # TriviaQA's questions and answers, one JSON object a line
    results: str = "term_frequency.csv"  # rows are appended; what it holds is not computed again
    tokenizer: str = "20B_tokenizer.json"
    device: str = "auto"


def evaluate(options):
    """Ask every checkpoint every question: is its greedy answer right, how probable the right?"""
    prompts = all_prompts(options)
    folders = find_all(options.model, options.steps)
    tokenizer, device = load_tokenizer(options.tokenizer), pick_device(options.device)
    lock(options.results)
    rows = read_rows(options.results, mend=True)
    for (task, _), asked in prompts.items():
        if task == "triviaqa" and any(row["task"] == task and row["item"] != asked[0].item
                                      for row in rows):
            raise ValueError(f"{options.results}: holds answers to other questions than "
                             f"{options.questions} has now; name another --results")
    done = {tuple(row[name] for name in KEY) for row in rows}
    todo = [(entry, group, rest)
            for entry in folders for group, asked in prompts.items() if (rest := [
        p for p in asked if (*entry[:2], group[0], str(group[1]), p.term, p.item) not in done])]
    total, loaded = sum(len(asked) for *_, asked in todo), None
    with tqdm(total=total, unit="prompt", disable=None) as bar:
        for (name, step, tokens, folder), (task, shots), asked in todo:
            bar.set_description(f"{name} step {step} {task} {shots}-shot")
            if folder != loaded:
                loaded, model = folder, checkpoints.load_model(folder, device)
            L, n_tokens = model.config.seq_length, ANSWER_TOKENS[task]
            if cut := sum(len(tokenizer.encode(prompt.text)) > L - n_tokens for prompt in asked):
                tqdm.write(f"{cut:,} of {len(asked):,} prompts are longer than the model's {L:,} "
                           f"tokens less {n_tokens} for an answer, and lose their beginning")
            correct, logprobs = [], []
            for piece in (asked[i:i + 1000] for i in range(0, len(asked), 1000)):
                results = answer_all(model, tokenizer, task, piece)
                append_rows(options.results, [
                    (name, step, tokens, task, shots, prompt.term, prompt.item, int(right),
                     f"{logprob:.6g}")
                    for prompt, (right, logprob) in zip(piece, results)])
                correct += [right for right, _ in results]
                logprobs += [logprob for _, logprob in results]
                bar.update(len(piece))
            tqdm.write(f"{name} step {step:>6} | {task} {shots:>2}-shot | "
                       f"acc {np.mean(correct):.4f} | "
                       f"log-probability {np.mean(logprobs):.4f} (n {len(asked):,})")
    print(f"{options.results}: {total:,} prompts answered, "
          f"{len(folders) * sum(map(len, prompts.values())) - total:,} were there")


def all_prompts(options):
    """Return {(task, shots): prompts}, or raise ValueError about the settings."""
    first, colon, last = options.x1.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last) <= 100):
        raise ValueError(f"x1 = {options.x1!r}, expected FIRST:LAST+1 within 0:100")
    if not re.fullmatch(r"\d+(,\d+)*", options.shots):
        raise ValueError(f"shots = {options.shots!r}, expected numbers with commas")
    prompts = {}
    for task, shots in itertools.product(options.tasks.split(","),
                                         map(int, options.shots.split(","))):
        if task in OPERATIONS:
            prompts[task, shots] = [prompt for x1 in range(int(first), int(last))
                                    for prompt in arithmetic(task, shots, x1)]
        elif task == "triviaqa" and options.questions:
            prompts[task, shots] = trivia(read_questions(options.questions), shots)
        else:
            raise ValueError("triviaqa needs --questions=FILE" if task == "triviaqa" else
                             f"no task called {task}; there are {', '.join(OPERATIONS)}, triviaqa")
    return prompts


def answer_all(model, tokenizer, task, prompts):
    """Return (right, log-probability of the right answer) of each prompt."""
    texts = generate_until(model, tokenizer, [prompt.text for prompt in prompts],
                           n_tokens=ANSWER_TOKENS[task])
    logprobs = iter(loglikelihood(model, tokenizer, [
        (prompt.text, continuation)
        for prompt in prompts for continuation in prompt.continuations]))
    return [(given_answer(task, text) in prompt.answers,
             float(np.logaddexp.reduce([next(logprobs)[0] for _ in prompt.continuations])))
            for prompt, text in zip(prompts, texts)]


def read_rows(path, mend=False):
    """Return the rows of a CSV of `evaluate`, if it is there, without a torn last line.

    mend: cut that off the file too, which is only for who writes it: a reader may see it half done.
    """
    found = Path(path).read_bytes() if os.path.exists(path) else b""
    if not found:  # new, or locked and nothing else yet
        return []
    if not found.startswith(f"{','.join(HEADER)}\n".encode()):
        raise ValueError(f"{path}: its first line is not {','.join(HEADER)}; name another "
                         "--results")
    whole = found[:found.rfind(b"\n") + 1]
    if mend and whole != found:
        os.truncate(path, len(whole))
    return list(csv.DictReader(io.StringIO(whole.decode())))


def append_rows(path, rows):
    with open(path, "a", newline="", encoding="utf8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows if file.tell() else [HEADER, *rows])


def grouped(path):
    """{(model, step, tokens, task, shots): [(term, item, correct, logprob)]} of `evaluate`."""
    groups = {}
    for row in read_rows(path):
        try:
            values = row["term"], row["item"], int(row["correct"]), float(row["logprob"])
        except (TypeError, ValueError):
            raise ValueError(f"{path}: not a row of `evaluate`: {','.join(map(str, row.values()))}"
                             ) from None
        groups.setdefault(tuple(row[name] for name in HEADER[:5]), []).append(values)
    if not groups:
        raise ValueError(f"{path}: holds no answers; `evaluate --results={path}` makes them")
    return groups
