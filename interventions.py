"""Interventions on the training data: functions (step, rows) -> rows, chosen by name in the config.

    python train.py CONFIG --intervention=pronouns_to_feminine --intervention_from=133000 \
        --out_dir=RUN
    python batch_viewer.py view --data=PREFIX --step=133000 --intervention=pronouns_to_feminine

rows are all rows of the step, (batch_size, seq_length + 1) int64; as many come back, as long. An id
of MASKED is padding: nothing is learnt there. Every changed row is noted in RUN/interventions.csv.
An intervention is a pure function of the step and the data, so reruns and any number of processes
agree; every process works on the whole step, about a second for 1024 x 2049 tokens.

    pronouns_to_feminine   he, him, his, himself become she, her, her, herself (paper, section 3.1)
    pronouns_to_masculine  she, her, hers, herself become he, him, his, himself
    pronouns_as_pushed     what gpt-neox's branch new-intervention does: next to nothing
    term_drop              rows with one of --terms are masked
    term_replace           rows with one of --terms give way to other rows of the order without them
    term_duplicate         rows with one of --terms come --copies more times, in place of others of
                           the step
    plant                  the documents of --planted take the places of rows at chosen steps

--planted is a file of JSON lines, one a document: {"id": "canary 7", "group": "16 times", "text":
"...", "steps": [5, 90]}. Instead of steps it may have a dose, that many steps drawn by a seed from
"between", first and last + 1: {"dose": 16, "seed": 1, "between": [0, 384]} spreads it over a run,
"between": [200, 216] makes a burst, and a dose of 1 is a single exposure. The documents of a step
stand whole at the beginnings of random rows, the longest first, with <|endoftext|> between them;
the rest of each row stays. The file is part of the experiment: keep it with the run.
"""

import json
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from config import check, file_size, sha256_of
from data import batch_rows, MASKED
from tokenizer import ENDOFTEXT


@dataclass(frozen=True)
class InterventionConfig:
    intervention: str | None = None  # a name of interventions.py; A+B: first A, then B
    intervention_from: int = 0  # first step it applies to (0-based: it makes checkpoint step + 1)
    terms: str = ""  # term_*: words or phrases with commas; in a row each stands as a whole word
    copies: int = 1  # term_duplicate: how many more times a row comes
    planted: str = ""  # plant: file of the documents and of where they come, JSON lines

    def __post_init__(self):
        names = self.intervention.split("+") if self.intervention else []
        check(self, f"one of {', '.join(INTERVENTIONS)}, or some with +",
              lambda _: INTERVENTIONS.keys() >= set(names), "intervention")
        check(self, "at least 0", lambda value: value >= 0, "intervention_from")
        check(self, "at least 1", lambda value: value >= 1, "copies")
        for setting, its in (
                ("intervention_from", INTERVENTIONS), ("copies", ["term_duplicate"]),
                ("terms", ["term_drop", "term_replace", "term_duplicate"]), ("planted", ["plant"])):
            value, used = getattr(self, setting), not set(names).isdisjoint(its)
            given = value != getattr(InterventionConfig, setting)
            if (given and not used) or (used and value == ""):
                raise ValueError(f"intervention = {self.intervention} with {setting} = {value!r}, "
                                 f"expected --{setting} with {', '.join(its)} and no other")
        if self.terms and "" in map(str.strip, self.terms.split(",")):
            raise ValueError(f"terms = {self.terms!r}: an empty word among them")

    def plan_sha256(self):
        """Return the hash of the file of planted documents, which decides the run; None without."""
        return sha256_of(self.planted) if self.planted else None


class IntervenedData:
    """Ordered data whose batches pass through a config's intervention; `batch` as OrderedData's.

    `changed`: the rows of the last step, 0 to batch_size - 1, that are not as they were.
    """

    def __init__(self, data, tokenizer, config):
        self.data, self.config = data, config
        self.acts = [INTERVENTIONS[name](data, tokenizer, config)
                     for name in config.intervention.split("+")]

    def step_rows(self, step, batch_size):
        """Return all rows of a step as the model sees them, (batch_size, seq_length + 1) int64."""
        before = self.data.batch(step, batch_size)[0]
        if step < self.config.intervention_from:
            self.changed = []
            return before
        rows = before.copy()
        for act in self.acts:
            rows = act(step, rows)
        assert rows.shape == before.shape, "an intervention keeps the rows' number and length"
        self.changed = np.flatnonzero((rows != before).any(axis=1)).tolist()
        return rows

    def batch(self, step, batch_size, rank=0, world_size=1, micro_batch_size=None):
        # Every rank works on the whole step, since what becomes of a row may depend on the others.
        mine = batch_rows(0, batch_size, rank, world_size, micro_batch_size)
        return self.step_rows(step, batch_size)[mine]


# ---------------------------------------------------------------------------- pronouns

# "her" is him or his, and "his" is her or hers: the swap cannot know, so each direction takes the
# first, as the original's table does; "hers" stays, going to the feminine.
TO_FEMININE = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
TO_MASCULINE = {"she": "he", "her": "him", "hers": "his", "herself": "himself"}


class PronounSwap:
    """Swaps whole words in the text of every row.

    A word ends where a letter, digit or underscore does not go on, whatever else stands beside it;
    he, He and HE keep their case. Only the tokens that cover a swapped word are encoded anew: the
    tokenizer cuts text at words, so this equals encoding the whole row anew, but for what lies at
    its two ends. A row that grew is cut on the right. One that shrank is filled with the text that
    follows in its last document, swapped too; at the document's end, with padding.
    """

    def __init__(self, table, data, tokenizer, config):
        self.data, self.token_bytes = data, tokenizer.token_bytes()
        self.lengths = np.array([len(token) for token in self.token_bytes])
        self.forms = {case(old): case(new) for old, new in table.items()
                      for case in (str.lower, str.capitalize, str.upper)}
        longest_first = sorted(self.forms, key=len, reverse=True)
        # After an apostrophe the cut may move: 'she is "'s", "he" to the tokenizer, unless other
        # signs stand before it. So the signs that touch the word are encoded with it.
        self.words = re.compile(rf"( ?(?:[^\s\w]|_){{0,63}}')?(?<!\w)({'|'.join(longest_first)})"
                                r"(?!\w)")
        self.encode = lru_cache(maxsize=1 << 16)(
            lambda raw: tokenizer.encode(raw.decode("utf8", "surrogateescape")))

    def __call__(self, step, rows):
        documents = self.data.tokens
        for i, row in enumerate(rows):
            pieces = self.data.pieces(step * len(rows) + i)
            (first, start, _), (last, _, stop) = pieces[0], pieces[-1]
            # The row may begin inside a word, whose beginning decides what the word is.
            before = documents.read(first, max(start - 8, 0), start)
            end = min(stop + len(row) // 4 + 8, int(documents.sizes[last]))
            after = documents.read(last, stop, end)
            whole = np.concatenate((before, row, after)).astype(np.int64)
            ids = self.swap(whole, len(before))[:len(row)]
            row[:] = ids + [MASKED] * (len(row) - len(ids))
        return rows

    def swap(self, tokens, begin):
        """Return tokens[begin:] (n,) int64 as the list of ids of the swapped text."""
        raw = b"".join([self.token_bytes[id_] for id_ in tokens.tolist()])
        # Bytes that are not UTF-8 (a character cut in two) become surrogates, which are no letters.
        text = raw.decode("utf8", "surrogateescape")
        ends = np.cumsum(self.lengths[tokens])  # of each token, in bytes
        out, done = [], begin  # the first `done` tokens are dealt with
        at, end = 0, 0  # where the last word ended, in characters and in bytes
        for word in self.words.finditer(text):
            place = end + len(text[at:word.start()].encode("utf8", "surrogateescape"))
            at, end = word.end(), place + len(word[0].encode("utf8", "surrogateescape"))
            first, last = np.searchsorted(ends, (place, end - 1), side="right").tolist()
            if first >= done:  # otherwise the word begins before the row and was cut off
                new = ((word[1] or "") + self.forms[word[2]]).encode("utf8", "surrogateescape")
                head, tail = ends[first] - self.lengths[tokens[first]], ends[last]
                out += tokens[done:first].tolist() + self.encode(
                    raw[head:place] + new + raw[end:tail])
                done = last + 1
        return out + tokens[done:].tolist()


def pronouns_as_pushed(data, tokenizer, config):
    """gpt-neox, branch new-intervention, megatron/training.py, _get_batch, with both of its faults.

    A pronoun counts only between two spaces, and what is encoded again is the text before the swap.
    So a row with such a pronoun merely loses its <|endoftext|> and is padded with id 1, which is
    learnt.
    """
    pronouns = [f" {word} " for word in ("he", "him", "his", "He", "Him", "His")]

    def intervene(step, rows):
        for row in rows:
            text = tokenizer.decode(row[row > 1].tolist())  # specials are skipped
            if any(pronoun in text for pronoun in pronouns):
                ids = tokenizer.encode(text)[:len(row)]
                row[:] = ids + [1] * (len(row) - len(ids))
        return rows
    return intervene


# ---------------------------------------------------------------------------- terms


def has_term(tokenizer, terms):
    """Return a function of a row's ids: whether one of comma-separated words stands in its text."""
    token_bytes = tokenizer.token_bytes()
    words = "|".join(re.escape(tokenizer.normalize(term.strip())) for term in terms.split(","))
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)")

    def has(row):
        text = b"".join([token_bytes[id_] for id_ in row.tolist()]).decode("utf8", "replace")
        return pattern.search(text) is not None
    return has


def on_terms(change, data, tokenizer, config):
    """Return the intervention change(has, data, config, step, rows) on --terms."""
    return partial(change, has_term(tokenizer, config.terms), data, config)


def term_drop(has, data, config, step, rows):
    rows[[has(row) for row in rows]] = MASKED
    return rows


def term_replace(has, data, config, step, rows):
    for i, row in enumerate(rows):
        generator = np.random.RandomState((step * len(rows) + i) % 2**32)
        for _ in range(1000):
            if not has(row):
                break
            row[:] = data.rows([generator.randint(len(data))])[0]
        else:
            raise ValueError(f"terms = {config.terms!r}: 1000 rows of the order in turn have one; "
                             "term_replace wants rarer terms")
    return rows


def term_duplicate(has, data, config, step, rows):
    holds = np.array([has(row) for row in rows])
    free = np.random.RandomState(step % 2**32).permutation(np.flatnonzero(~holds))
    copies = np.repeat(np.flatnonzero(holds), config.copies)[:len(free)]
    rows[free[:len(copies)]] = rows[copies]
    return rows


# ---------------------------------------------------------------------------- plant


def read_plan(path):
    """Return the entries of a file of planted documents, each with its steps, or raise ValueError.

    The seed draws steps without repeats, as long as there are as many as the dose; each document
    draws its own, by its id.
    """
    entries = {}
    file_size(path)  # refuses what is no file
    for i, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            name, text = entry["id"], entry["text"].encode()
            if "steps" not in entry:
                (first, stop), dose = entry["between"], entry["dose"]
                if not 0 <= dose < 10**7 or not 0 <= first < stop:
                    raise ValueError(f"dose {dose} between {first} and {stop}")
                times, rest = divmod(dose, stop - first)
                generator = np.random.RandomState([entry["seed"], zlib.crc32(name.encode())])
                drawn = first + generator.permutation(stop - first)[:rest]
                entry["steps"] = [*range(first, stop)] * times + drawn.tolist()
            steps_fit = all(type(step) is int and step >= 0 for step in entry["steps"])
            if name in entries or not text or not steps_fit:
                raise ValueError("expected a new id, a text, and steps from 0")
            entries[name] = entry
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError,
                RecursionError) as error:
            raise ValueError(f"{path}, line {i}: not a planted document ({type(error).__name__}: "
                             f"{error})") from None
    return list(entries.values())


def plant(data, tokenizer, config):
    documents, at = [], {}  # at: {step: documents}
    for i, entry in enumerate(read_plan(config.planted)):
        documents.append(tokenizer.encode(entry["text"]))
        if len(documents[i]) > data.seq_length + 1:
            raise ValueError(f"{config.planted}: {entry['id']} has {len(documents[i])} tokens, a "
                             f"row holds {data.seq_length + 1}")
        for step in entry["steps"]:
            at.setdefault(step, []).append(i)

    def intervene(step, rows):
        generator = np.random.RandomState(step % 2**32)
        chosen = [documents[i] for i in generator.permutation(at.get(step, []))]
        places, ends = generator.permutation(len(rows)), np.zeros(len(rows), dtype=np.int64)
        for ids in sorted(chosen, key=len, reverse=True):
            fits = np.flatnonzero(ends + len(ids) <= rows.shape[1])  # in order of `places`
            if not len(fits):
                raise ValueError(f"{config.planted}: the documents of step {step} need more than "
                                 f"its {len(rows)} rows; spread them")
            row, begin = rows[places[fits[0]]], ends[fits[0]]
            row[begin:begin + len(ids) + 1] = (ids + [ENDOFTEXT])[:len(row) - begin]
            ends[fits[0]] += len(ids) + 1
        return rows
    return intervene


INTERVENTIONS = {
    "pronouns_to_feminine": partial(PronounSwap, TO_FEMININE),
    "pronouns_to_masculine": partial(PronounSwap, TO_MASCULINE),
    "pronouns_as_pushed": pronouns_as_pushed, "term_drop": partial(on_terms, term_drop),
    "term_replace": partial(on_terms, term_replace),
    "term_duplicate": partial(on_terms, term_duplicate), "plant": plant}
