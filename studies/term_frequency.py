"""Does a model do better on what it saw more often, and does seeing it more often make it better?

Biderman et al. 2023, section 3.3: accuracy on arithmetic with operand x1, and on TriviaQA, against
how often x1, or question and answer together, stood in the training data so far. They find the
correlation from 2.8B parameters and about step 65,000 on, hardly any arithmetic up to 1B, and a gap
between frequent and rare operands that grows with training. With the paper's models and data:

    python -m studies.term_frequency count --data=data/pile-deduped/document --output=counts \\
        --questions=QUESTIONS --at=13000,39000,65000,91000,117000,143000
    python -m studies.term_frequency evaluate --model=pythia-160m-deduped/step13000 --results=R
    python -m studies.term_frequency evaluate --model=... --tasks=triviaqa --shots=4 \\
        --questions=QUESTIONS --results=R
    python -m studies.term_frequency analyse --counts=counts --results=R --output=terms
    python plots.py term_frequency --bins=terms_bins.csv --output=terms.png

For a run of ours `count` takes --steps, --batch_size, --seq_length and --seed of its config.json.
That is an observation. The experiment: two branches of one checkpoint, of which one sees some sums
more often, for each of several seeds. They are planted whole (interventions.py), or rows that have
a term as a whole word come more often:

    python train.py configs/mini.py --branch_from=RUN/step256 --out_dir=MORE --twin=True \\
        --intervention=term_duplicate --copies=4 --terms="What is 24 plus,What is 37 plus"
    python -m studies.term_frequency evaluate --model=MORE,MORE_twin --results=R
    python -m studies.term_frequency compare --branch=MORE --terms=24,37 --results=R

What is asked. Arithmetic: `Q:What is {x1} times {x2}? A:` (or plus), x1 in 0..99, x2 in 1..50,
behind k shots `Q:What is 3 times 4? A:12` with a blank line after each. They come from the 4,950
problems with another x1, as lm-eval 0.3 drew them: for every x1 a random.Random(42) shuffles the 50
prompts, then draws k + 1 for each of them, of which the first k are taken. A corpus of its own has
its own operands: ask those (--x1, --x2). TriviaQA: `Q:{question} A:`, its shots `Q:... A: answer`.
Right is, as in the paper's code, if the first run of one to five digits in at most 16 greedy
tokens, up to a newline, is the answer; for TriviaQA, if at most 32 tokens without case, punctuation
and articles are an accepted answer. That leaps from nothing to something late; the log-probability
of the right answer (for a number of `12` and of ` 12`, added) moves long before.

What is counted. COUNTS/0000512_0001000.json holds what stood in the rows of steps 512 to 999: for
"17", how many windows of "number near number" it is in (twice if it is in one twice); for "3 1",
how many rows have term 1 of question 3 and its answer. Windows are those of the paper's code
(EleutherAI/pythia, case-studies/term_frequency/run_freq_count.py): the text of a row with a space
before it; from every space, a number of one to five digits, a space, one to three words of letters,
digits, underscores and ASCII signs with white space behind each (as many as possible), and again up
to five digits. All numbers inside count, those within words too. The text is that of transformers'
decode at the time, which spelled <|endoftext|> out and took the space before . ? ! , and some
apostrophes away. Salient terms are those of Kandpal et al. 2023 (arXiv 2211.08411), but plain words
without case instead of linked entities: the one that is most often in a row with the answer.

The primary outcome is the slope: nats of the right answer per doubling of (1 + the count); the gap,
the most frequent tenth of the terms minus the rarest, is the paper's. Intervals are over terms,
which are what is treated, and in `compare` over seeds. Read correlations with care: small numbers
are frequent, and their answers short and easy; the month of May is often "may".

Cost: a row of 2049 tokens takes 0.45 ms of a core, 1.55 ms with 2,000 questions, so the 146,432,000
rows 18 or 63 core hours. A checkpoint answers 50,000 arithmetic prompts of 89 tokens on average. A
70m model on two CPU cores, with other work on them, did 14, 4.5, 2.9, 1.6 and 1.0 prompts/s at 0,
2, 4, 8 and 16 shots: 6.3 hours in all. Not measured on a GPU.
"""

import itertools
import random
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import checkpoints
from config import command, read_csv, read_json, write_json
from data import Order, ordered
from eval import find_all, first_and_last, generate_until, loglikelihood
from parallel import Processes
from prepare import in_workers
from studies.results import (Checkpoints, open_results, regression, tokenizer_of, write_csv,
                             write_table)
from tasks import digest, read_jsonl, text, texts, without_articles
from tokenizer import SPECIAL, load_tokenizer

OPERATIONS = {"times": lambda x1, x2: x1 * x2, "plus": lambda x1, x2: x1 + x2}
ANSWER_TOKENS = {"times": 16, "plus": 16, "triviaqa": 32}
BLOCK_ROWS = 256  # what a worker counts at a time

# ---------------------------------------------------------------------------- questions


class Question(NamedTuple):
    id: str
    text: str
    value: str  # the answer as the data set prefers it
    aliases: tuple  # all accepted answers

    @property
    def terms(self):
        """The salient terms of the question, as words.

        They are its names, runs of capitalised words with "of" and "the" within, but for the first
        word, which is always capitalised; without any name, its longest word.
        """
        names = re.findall(r"\b[A-Z]\w*(?:(?: of| the)* [A-Z]\w*)*", self.text.partition(" ")[2])
        names = names or [max(re.findall(r"\w+", self.text), key=len, default="")]
        return [name for name in dict.fromkeys(map(words_of, names)) if len(name) > 2]

    @property
    def answers(self):
        """The accepted answers as words but for those of one or two letters: other words too."""
        answers = dict.fromkeys(map(words_of, (self.value, *self.aliases)))
        return [answer for answer in answers if len(answer) > 2]


def words_of(passage):
    """Return the words of a text, without case or signs, with one space between them."""
    return " ".join(re.findall(r"\w+", passage.casefold()))


def read_questions(path):
    """Return the questions of a TriviaQA file, or raise ValueError naming the line that is none."""
    questions = [Question(text(doc, "question_id"), text(doc, "question"),
                          text(doc, "answer.value"), tuple(texts(doc, "answer.aliases")))
                 for doc in read_jsonl(path)]
    if len({question.id for question in questions}) < len(questions):
        raise ValueError(f"{path}: two questions of one id")
    return questions


class QuestionIndex:
    """Finds all questions' terms and answers in a text; each is filed under its first two words."""

    def __init__(self, questions):
        self.filed = {}  # one or two words: {phrase: [(question, term number or -1 for an answer)]}
        for q, question in enumerate(questions):
            phrases = [*enumerate(question.terms), *((-1, answer) for answer in question.answers)]
            for number, phrase in phrases:
                start = " ".join(phrase.split(" ")[:2])
                self.filed.setdefault(start, {}).setdefault(phrase, []).append((q, number))

    def found(self, row):
        """Return the (question, term) pairs whose term and answer are both in the text of a row."""
        joined = words_of(row)
        words = joined.split(" ")
        pairs = [f"{words[i]} {words[i + 1]}" for i in range(len(words) - 1)]
        present, padded = {*words, *pairs}, f" {joined} "
        terms, answered = [], set()
        for start in self.filed.keys() & present:
            for phrase, places in self.filed[start].items():
                # Most phrases miss a word here, which is found sooner than by searching the text.
                if phrase != start and not (present.issuperset(phrase.split(" "))
                                            and f" {phrase} " in padded):
                    continue
                terms += [place for place in places if place[1] >= 0]
                answered.update(question for question, term in places if term < 0)
        return [place for place in terms if place[0] in answered]


# ---------------------------------------------------------------------------- prompts


class Prompt(NamedTuple):
    term: str  # what is counted: x1, or the question's id
    item: str  # x2, or nothing
    text: str
    answers: tuple  # all that count as right
    continuations: tuple  # ways of saying the right answer, whose probabilities are added


def arithmetic(operation, shots, x1, x2s=range(1, 51)):
    """Return the prompts of an x1 with each x2, behind `shots` others each."""
    answer = OPERATIONS[operation]
    ask = lambda a, b: f"Q:What is {a} {operation} {b}? A:"
    pool = [(a, b) for a in range(100) if a != x1 for b in x2s]
    second, generator, prompts = list(x2s), random.Random(42), []
    generator.shuffle(second)
    for x2 in second:
        examples = generator.sample(pool, shots + 1)[:shots] if shots else []
        solved = "".join(f"{ask(a, b)}{answer(a, b)}\n\n" for a, b in examples)
        right = str(answer(x1, x2))
        prompts.append(Prompt(str(x1), str(x2), solved + ask(x1, x2), (right,),
                              (right, " " + right)))
    return prompts


def trivia(questions, shots):
    """Return a prompt for each question, behind `shots` others drawn from a random.Random(42)."""
    generator, prompts = random.Random(42), []
    if len(questions) <= shots:
        raise ValueError(f"{len(questions)} questions are too few for {shots} shots")
    for question in questions:
        examples = [other for other in generator.sample(questions, shots + 1)
                    if other != question][:shots]
        solved = "".join(f"Q:{other.text} A: {other.value}\n\n" for other in examples)
        accepted = tuple(map(without_articles, (question.value, *question.aliases)))
        prompts.append(Prompt(question.id, "", f"{solved}Q:{question.text} A:", accepted,
                              (" " + question.value,)))
    return prompts


def given_answer(task, generated):
    """Return what a generated text answers, in the form of Prompt.answers."""
    if task == "triviaqa":
        return without_articles(generated)
    number = re.search(r"\d{1,5}", generated)
    return number[0] if number else ""


# ---------------------------------------------------------------------------- numbers

# Possessive quantifiers: white space is no part of a word, so going back into one never helps.
_WORD = rf"[\w{re.escape(string.punctuation)}]++\s++"
_NUMBER = re.compile(r"\d{1,5}")
_WINDOW_START = re.compile(r" \d{1,5}(?= )")  # leaves the second space to the next number
_WINDOW = re.compile(rf" \d{{1,5}} (?:{_WORD}){{1,3}}\d{{1,5}}")

# transformers 4, PreTrainedTokenizerBase.clean_up_tokenization, which decode called unless told not
# to.
_TIDY = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def tidy(text):
    for spaced in _TIDY:
        text = text.replace(spaced, spaced.strip())
    return text


def numbers_near_numbers(text):
    """Return the numbers of every window in the text of one row; windows may overlap."""
    text, numbers = " " + tidy(text), []
    for start in _WINDOW_START.finditer(text):
        window = _WINDOW.match(text, start.start())
        if window:
            numbers += map(int, _NUMBER.findall(window[0]))
    return numbers


# ---------------------------------------------------------------------------- count


@dataclass(frozen=True)
class Count(Order):
    output: str = "counts"  # folder
    at: str = ""  # steps to count up to, with commas; empty: the steps of Pythia's checkpoints
    questions: str = ""  # TriviaQA's questions and answers, one JSON object a line
    workers: int = 0  # processes; 0: one a core
    tokenizer: str = "20B_tokenizer.json"


def count(options):
    """Count numbers near numbers, questions' terms with their answers, up to each checkpoint."""
    if not re.fullmatch(r"(\d+(,\d+)*)?", options.at):
        raise ValueError(f"at = {options.at!r}, expected steps with commas")
    at = (map(int, options.at.split(",")) if options.at else
          checkpoints.checkpoint_steps(options.steps))
    steps, data = sorted({0, *at}), ordered(options)
    if steps[-1] > options.steps or steps[-1] * options.batch_size > len(data):
        raise ValueError(f"at = {options.at}: step {steps[-1]:,} is beyond --steps={options.steps} "
                         f"or the {len(data):,} rows of {options.data}")
    load_tokenizer(options.tokenizer)
    questions = read_questions(options.questions) if options.questions else []
    open_results(Path(options.output) / "counts.json",
                 {field.name: getattr(options, field.name) for field in fields(Order)}
                 | {"at": steps, "questions": [question.id for question in questions],
                    "questions_hash": digest(questions) if questions else None})
    todo = {}  # file: [first row and last + 1 of each block]
    for a, b in itertools.pairwise(steps):
        if not (path := counts_path(options.output, a, b)).exists():
            last = b * options.batch_size
            todo[path] = [(start, min(start + BLOCK_ROWS, last))
                          for start in range(a * options.batch_size, last, BLOCK_ROWS)]
    blocks = list(itertools.chain(*todo.values()))
    results = in_workers(count_rows, blocks, options.workers, start_worker, options, questions)
    with tqdm(total=len(blocks), unit="block", disable=None) as bar:
        for path, its in todo.items():
            found = Counter()
            for _ in its:
                found.update(next(results))
                bar.update()
            write_json(path, dict(sorted(found.items())))
    rows = sum(stop - start for start, stop in blocks)
    print(f"{options.output}: {rows:,} rows counted now, "
          f"{steps[-1] * options.batch_size - rows:,} were there")


def counts_path(folder, first_step, last_step):
    return Path(folder) / f"{first_step:07}_{last_step:07}.json"


def start_worker(options, questions):
    global _data, _token_bytes, _index
    _data, _index = ordered(options), QuestionIndex(questions)
    _token_bytes = load_tokenizer(options.tokenizer).token_bytes()
    for name, id_ in SPECIAL.items():
        _token_bytes[id_] = name.encode()


def count_rows(start, stop):
    """Return the counts of rows start to stop - 1 of the order."""
    found = Counter()
    for row in _data.rows(range(start, stop)).tolist():
        text = b"".join([_token_bytes[id_] for id_ in row]).decode("utf8", "replace")
        found.update(map(str, numbers_near_numbers(text)))
        if _index.filed:
            found.update(f"{question} {term}" for question, term in _index.found(text))
    return found


def seen(folder):
    """Return {step: Counter of what was seen before it} of a folder of counts."""
    totals, total = {0: Counter()}, Counter()
    for a, b in itertools.pairwise(read_json(Path(folder) / "counts.json")["at"]):
        if not (path := counts_path(folder, a, b)).exists():
            break  # `count` was stopped
        total = totals[b] = total + Counter(read_json(path))
    return totals


def question_frequencies(folder):
    """Return {step: {question id: rows before it with the answer and the salient term}}.

    Salient is the term that is most often with the answer, over all that was counted.
    """
    ids = read_json(Path(folder) / "counts.json")["questions"]
    if not ids:
        raise ValueError(f"{folder}: counts no questions; `count --questions=FILE` does")
    at, salient = seen(folder), {}
    for key, _ in at[max(at)].most_common():
        if " " in key:
            salient.setdefault(ids[int(key.split(" ")[0])], key)
    return {step: {id_: found[key] for id_, key in salient.items()} for step, found in at.items()}


# ---------------------------------------------------------------------------- evaluate

HEADER = ("model", "step", "tokens", "task", "shots", "term", "item", "correct", "logprob")


@dataclass(frozen=True)
class Evaluate(Checkpoints):
    model: str  # run folder, checkpoint folder or Hugging Face folder; several with commas
    tasks: str = "times,plus"  # times, plus, triviaqa
    shots: str = "0,2,4,8,16"
    x1: str = "0:100"  # first:last+1 of the arithmetic's first operands
    x2: str = "1:51"  # and of the second
    questions: str = ""  # TriviaQA's questions and answers, one JSON object a line
    results: str = "term_frequency"  # folder; what it holds is not computed again
    tokenizer: str | None = None  # None: the models' own, else 20B_tokenizer.json


def evaluate(options):
    """Ask every checkpoint every question: is its greedy answer right, how probable the right?"""
    prompts, results, n = all_prompts(options), Path(options.results), 0
    folders = find_all(options.model, options.steps)
    tokenizer = tokenizer_of([folder for *_, folder in folders], options.tokenizer)
    device = Processes(options.device).device
    open_results(results / "asked.json", {
        "x1": options.x1, "x2": options.x2, "questions":
        digest(read_questions(options.questions)) if options.questions else None},
        "name another --results")
    for name, step, tokens, folder in folders:
        model = None
        for (task, shots), asked in prompts.items():
            path = results / f"{name}_step{step}_{task}_{shots}.csv"
            if path.exists():
                continue
            model = model or checkpoints.load_model(folder, device)
            L, n_tokens = model.config.seq_length, ANSWER_TOKENS[task]
            cut = sum(len(tokenizer.encode(prompt.text)) > L - n_tokens for prompt in asked)
            if cut:
                print(f"{cut:,} of {len(asked):,} prompts are longer than the model's {L:,} tokens "
                      f"less {n_tokens} for an answer, and lose their beginning")
            answers = answer_all(model, tokenizer, task, asked)
            write_csv(path, HEADER, [
                (name, step, tokens, task, shots, prompt.term, prompt.item, int(right), logprob)
                for prompt, (right, logprob) in zip(asked, answers)])
            n += len(asked)
            accuracy, logprob = np.mean(answers, axis=0)
            print(f"{name} step {step:>6} | {task} {shots:>2}-shot | acc {accuracy:.4f} | "
                  f"log-probability {logprob:.4f} (n {len(asked):,})", flush=True)
    print(f"{results}: {n:,} prompts answered, "
          f"{len(folders) * sum(map(len, prompts.values())) - n:,} were there")


def all_prompts(options):
    """Return {(task, shots): prompts}, or raise ValueError about the settings."""
    x1s = range(*first_and_last("x1", options.x1, 100))
    x2s = range(*first_and_last("x2", options.x2, 100))
    if not re.fullmatch(r"\d+(,\d+)*", options.shots):
        raise ValueError(f"shots = {options.shots!r}, expected numbers with commas")
    prompts = {}
    for task, shots in itertools.product(options.tasks.split(","),
                                         map(int, options.shots.split(","))):
        if task in OPERATIONS:
            prompts[task, shots] = [prompt for x1 in x1s
                                    for prompt in arithmetic(task, shots, x1, x2s)]
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


def grouped(folder):
    """{(model, step, tokens, task, shots): [(term, item, correct, logprob)]} of `evaluate`."""
    groups = {}
    for path in sorted(Path(folder).glob("*.csv")):
        try:
            for row in read_csv(path):
                groups.setdefault(tuple(row[name] for name in HEADER[:5]), []).append(
                    (row["term"], row["item"], int(row["correct"]), float(row["logprob"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not written by `evaluate` ({type(error).__name__}: {error})"
                             ) from None
    if not groups:
        raise ValueError(f"{folder}: holds no answers; `evaluate --results={folder}` makes them")
    return groups


# ---------------------------------------------------------------------------- analyse


@dataclass(frozen=True)
class Analyse:
    counts: str  # folder of `count`
    results: str = "term_frequency"  # folder of `evaluate`
    output: str = "term_frequency"  # OUTPUT_bins.csv and OUTPUT_gaps.csv are written


WHERE = HEADER[:5]
BINS = (*WHERE, "bins", "from", "to", "frequency", "n", "acc", "acc_stderr", "logprob",
        "logprob_stderr")
GAPS = (*WHERE, "n", "slope", "slope_low", "slope_high", "p", "least_frequency", "most_frequency",
        "acc_gap", "acc_low", "acc_high", "logprob_gap", "logprob_low", "logprob_high")


def analyse(options):
    """Compare what models do with how often they saw it: slope, bins, most minus least frequent."""
    groups = grouped(options.results)
    frequencies = {task: (question_frequencies if task == "triviaqa" else seen)(options.counts)
                   for task in {key[3] for key in groups}}
    bins, gaps, order = [], [], read_json(Path(options.counts) / "counts.json")
    a_step = order["batch_size"] * order["seq_length"]
    for (model, step, tokens, task, shots), answers in groups.items():
        if int(step or -1) not in frequencies[task]:
            raise ValueError(f"{options.counts}: does not count up to step {step or '(none)'} of "
                             f"{model}, only to {', '.join(map(str, frequencies[task]))}; see "
                             "`count --at`")
        if tokens and int(tokens) != int(step) * a_step:
            raise ValueError(f"{options.counts}: counts {int(step) * a_step:,} tokens up to step "
                             f"{step}, {model} has seen {int(tokens):,}; count in the order of its "
                             "config.json")
        before, where = frequencies[task][int(step)], (model, step, tokens, task, shots)
        means = np.array([(before.get(term, 0), *np.mean(values, axis=0))  # (terms, 3)
                          for term, values in by_term(answers).items()])
        bins += [(*where, *row) for row in binned(means, task)]
        terms = [term for term, *_ in answers]
        doublings = np.log2([1 + before.get(term, 0) for term in terms])
        slope = regression(np.array([[answer[3] for answer in answers]]), doublings, terms)[1]
        slope = (slope.value, slope.low, slope.high, slope.p) if np.ptp(doublings) else [None] * 4
        gaps.append((*where, len(means), *slope, *gap(means)))
    write_csv(f"{options.output}_bins.csv", BINS, bins)
    write_table(f"{options.output}_gaps.csv", GAPS, gaps)
    print("slope: nats per doubling of the count; gap: most frequent tenth minus least frequent "
          "tenth; 95 % intervals over the terms of one run: another seed may differ by more")


def by_term(answers):
    terms = {}
    for term, _, correct, logprob in answers:
        terms.setdefault(term, []).append((correct, logprob))
    return terms


def binned(means, task, tenths=10):
    """Yield rows of BINS behind the first five: the paper's bins, tenths of the terms by frequency.

    Equally frequent terms are in one tenth.
    """
    frequency = means[:, 0]
    edges = np.geomspace(1, 1e6, 7) if task == "triviaqa" else np.geomspace(1e5, 2e8, 20)
    members = [("paper", low, high, np.flatnonzero((low <= frequency) & (frequency < high)))
               for low, high in itertools.pairwise(edges.tolist())]
    tenth = np.searchsorted(np.sort(frequency), frequency) * tenths // len(means)
    for part in (np.flatnonzero(tenth == i) for i in np.unique(tenth)):
        members.append(("quantile", frequency[part].min(), frequency[part].max(), part))
    for name, low, high, part in members:
        if len(part):
            [acc], [logprob] = (regression(means[None, part, column]) for column in (1, 2))
            yield (name, low, high, means[part, 0].mean(), len(part), acc.value, acc.stderr,
                   logprob.value, logprob.stderr)


def gap(means):
    """Return the last eight of GAPS, of (terms, 3): frequency, accuracy, log-probability.

    With 100 operands a tenth is the paper's 10.
    """
    # Equally frequent terms (never seen, in a small corpus) must not stand by size, which itself
    # matters.
    order, tenth = np.random.RandomState(0).permutation(len(means)), max(1, len(means) // 10)
    order = order[np.argsort(means[order, 0], kind="stable")]
    ends = np.concatenate((order[:tenth], order[-tenth:]))
    low, high = (means[part, 0].mean() for part in (order[:tenth], order[-tenth:]))
    if low == high:
        return low, high, *[None] * 6
    acc, logprob = (regression(means[None, ends, column], np.repeat([-0.5, 0.5], tenth))[1]
                    for column in (1, 2))
    return low, high, acc.value, acc.low, acc.high, logprob.value, logprob.low, logprob.high


# ---------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Compare:
    branch: str  # runs that saw the terms more (or less) often; each beside its BRANCH_twin
    terms: str  # operands, or ids of questions
    results: str = "term_frequency"  # folder of `evaluate`, all models
    output: str = "term_compare.csv"


COMPARED = ("model", *WHERE[1:], "terms", "seeds", "n", "difference", "low", "high", "p", "over")


def compare(options):
    """Compare branches with their control twins: chosen terms, other terms, the difference."""
    groups, chosen = grouped(options.results), set(options.terms.split(","))
    branches = [Path(path).name for path in options.branch.split(",")]
    pairs, rows = [(branch, f"{branch}_twin") for branch in branches], []
    over = "terms and seeds" if len(branches) > 1 else "terms of one pair"
    for where in dict.fromkeys(key[1:] for key in groups):
        if not all((model, *where) in groups for pair in pairs for model in pair):
            continue
        seeds = [by_term_difference(groups[branch, *where], groups[twin, *where])
                 for branch, twin in pairs]
        if len({frozenset(seed) for seed in seeds}) > 1:
            raise ValueError(f"{options.results}: not the same terms for all of "
                             f"{', '.join(branches)} at step {where[0]}; run `evaluate` again")
        values = np.array([[seed[term] for term in seeds[0]] for seed in seeds])
        mine = np.array([term in chosen for term in seeds[0]])
        if mine.all() or not mine.any():
            continue
        for terms, n, found in (
                ("chosen", int(mine.sum()), regression(values[:, mine])[0]),
                ("others", int((~mine).sum()), regression(values[:, ~mine])[0]),
                ("chosen minus others", None, regression(values, mine)[1])):
            rows.append(("+".join(branches), *where, terms, len(seeds), n, found.value, found.low,
                         found.high, found.p, over))
    if not rows:
        raise ValueError(f"{options.results}: no checkpoint of all of "
                         f"{', '.join(itertools.chain(*pairs))} has answers with and without "
                         f"{options.terms}; it holds "
                         f"{', '.join(sorted({key[0] for key in groups}))}")
    write_table(options.output, COMPARED, rows)
    print("log-probability of the right answer, branch minus twin, nats")


def by_term_difference(branch, twin):
    """Return {term: mean difference in log-probability}: terms are what is treated, not prompts."""
    control = {(term, item): logprob for term, item, _, logprob in twin}
    found = {}
    for term, item, _, logprob in branch:
        if (term, item) in control:
            found.setdefault(term, []).append(logprob - control[term, item])
    return {term: np.mean(values) for term, values in found.items()}


COMMANDS = {"count": (Count, count), "evaluate": (Evaluate, evaluate),
            "analyse": (Analyse, analyse), "compare": (Compare, compare)}

if __name__ == "__main__":
    command(sys.argv[1:], COMMANDS)
