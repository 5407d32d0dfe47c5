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
from config import lock
from eval import find_all, generate_until, loglikelihood
from studies.results import Checkpoints, first_and_last
from parallel import Processes
from studies.term_questions import arithmetic, given_answer, OPERATIONS, read_questions, trivia
from tokenizer import load_tokenizer

HEADER = ("model", "step", "tokens", "task", "shots", "term", "item", "correct", "logprob")
KEY = ("model", "step", "task", "shots", "term", "item")
ANSWER_TOKENS = {"times": 16, "plus": 16, "triviaqa": 32}


@dataclass(frozen=True)
class Evaluate(Checkpoints):
    model: str  # run folder, checkpoint folder or Hugging Face folder; several with commas
    tasks: str = "times,plus"  # times, plus, triviaqa
    shots: str = "0,2,4,8,16"
    x1: str = "0:100"  # first:last+1 of the arithmetic's first operands
    questions: str = ""  # TriviaQA's questions and answers, one JSON object a line
    results: str = "term_frequency.csv"  # rows are appended; what it holds is not computed again
    tokenizer: str = "20B_tokenizer.json"


def evaluate(options):
    """Ask every checkpoint every question: is its greedy answer right, how probable the right?"""
    prompts = all_prompts(options)
    folders = find_all(options.model, options.steps)
    tokenizer, device = load_tokenizer(options.tokenizer), Processes(options.device).device
    lock(options.results, f"{options.results}: another evaluation writes it; wait for it or name "
         "another file")
    rows = read_rows(options.results, mend=True)
    for (task, _), asked in prompts.items():
        if task == "triviaqa" and any(row["task"] == task and row["item"] != asked[0].item
                                      for row in rows):
            raise ValueError(f"{options.results}: holds answers to other questions than "
                             f"{options.questions} has now; name another --results")
    done = {tuple(row[name] for name in KEY) for row in rows}
    todo = []  # (checkpoint, (task, shots), prompts without an answer)
    for entry in folders:
        for (task, shots), asked in prompts.items():
            key = (entry[0], entry[1], task, str(shots))
            rest = [prompt for prompt in asked if (*key, prompt.term, prompt.item) not in done]
            if rest:
                todo.append((entry, (task, shots), rest))
    total, loaded = sum(len(asked) for *_, asked in todo), None
    with tqdm(total=total, unit="prompt", disable=None) as bar:
        for entry, group, asked in todo:
            if entry != loaded:
                loaded, model = entry, checkpoints.load_model(entry[3], device)
            ask(model, tokenizer, entry, group, asked, options.results, bar)
    print(f"{options.results}: {total:,} prompts answered, "
          f"{len(folders) * sum(map(len, prompts.values())) - total:,} were there")


def ask(model, tokenizer, entry, group, prompts, path, bar):
    """Append a checkpoint's answers to the prompts of one task and number of shots to the CSV."""
    (name, step, tokens, _), (task, shots) = entry, group
    bar.set_description(f"{name} step {step} {task} {shots}-shot")
    L, n_tokens = model.config.seq_length, ANSWER_TOKENS[task]
    cut = sum(len(tokenizer.encode(prompt.text)) > L - n_tokens for prompt in prompts)
    if cut:
        tqdm.write(f"{cut:,} of {len(prompts):,} prompts are longer than the model's {L:,} "
                   f"tokens less {n_tokens} for an answer, and lose their beginning")
    results = []
    for start in range(0, len(prompts), 1000):
        some = prompts[start:start + 1000]
        answers = answer_all(model, tokenizer, task, some)
        append_rows(path, [(name, step, tokens, task, shots, prompt.term, prompt.item, int(right),
                            f"{logprob:.6g}") for prompt, (right, logprob) in zip(some, answers)])
        results += answers
        bar.update(len(some))
    accuracy, logprob = np.mean(results, axis=0)
    tqdm.write(f"{name} step {step:>6} | {task} {shots:>2}-shot | acc {accuracy:.4f} | "
               f"log-probability {logprob:.4f} (n {len(prompts):,})")


def all_prompts(options):
    """Return {(task, shots): prompts}, or raise ValueError about the settings."""
    first, last = first_and_last("x1", options.x1, 100)
    if not re.fullmatch(r"\d+(,\d+)*", options.shots):
        raise ValueError(f"shots = {options.shots!r}, expected numbers with commas")
    prompts = {}
    for task, shots in itertools.product(options.tasks.split(","),
                                         map(int, options.shots.split(","))):
        if task in OPERATIONS:
            prompts[task, shots] = [prompt for x1 in range(first, last)
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
    requests = [(prompt.text, words) for prompt in prompts for words in prompt.continuations]
    logprobs = [logprob for logprob, _ in loglikelihood(model, tokenizer, requests)]
    answers, first = [], 0  # the first of a prompt's own log-probabilities
    for prompt, text in zip(prompts, texts):
        last = first + len(prompt.continuations)
        answers.append((given_answer(task, text) in prompt.answers,
                        float(np.logaddexp.reduce(logprobs[first:last]))))
        first = last
    return answers


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
