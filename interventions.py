"""Interventions: changes to what a run is trained on from some step on, chosen by name.

    python train.py CONFIG --intervention=pronouns_to_feminine --intervention_from=133000 \
        --out_dir=RUN
    python batch_viewer.py view --data=PREFIX --step=133000 --intervention=pronouns_to_feminine

    pronouns_to_feminine   he, him, his, himself become she, her, her, herself (paper, section 3.1)
    pronouns_to_masculine  she, her, hers, herself become he, him, his, himself
    pronouns_as_pushed     what the code on gpt-neox's branch new-intervention does: next to nothing
    term_drop              rows with one of --terms are masked
    term_replace           rows with one of --terms are replaced by other rows, without them
    term_duplicate         rows with one of --terms come --copies more times, replacing other rows
    plant                  the documents of --planted stand at the beginnings of random rows

Each is a function (step, rows) -> rows on all rows of a step, (batch_size, seq_length + 1) int64.
An id of MASKED is padding, where nothing is learnt. The result depends on nothing but the step and
the data, so reruns on any number of processes agree. Every process computes the whole step, which
takes about a second for 1024 x 2049 tokens. Changed rows are listed in RUN/interventions.csv.

--planted is a file with a JSON object a line: {"id": "canary 7", "group": "16 times", "text":
"...", "steps": [5, 90]}. Instead of steps it may have a dose, the number of steps to draw with a
seed from "between" (first and last + 1): {"dose": 16, "seed": 1, "between": [0, 384]} spreads the
document over a run, "between": [200, 216] makes a burst. The documents of a step stand whole, each
followed by <|endoftext|>, the longest first; the rest of the row stays. Keep the file with the run.
"""

import json
import re
import zlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from config import check, expecting, file_size, sha256_of
from data import batch_rows, MASKED
from tokenizer import encode_piece, ENDOFTEXT


@dataclass(frozen=True)
class InterventionConfig:
    intervention: str | None = None  # a name from interventions.py, or A+B: first A, then B
    intervention_from: int = 0  # first step it applies to (step 0 makes checkpoint step1)
    terms: str = ""  # term_*: words or phrases with commas between them, found as whole words
    copies: int = 1  # term_duplicate: how many more times a row comes
    planted: str = ""  # plant: JSON lines file of documents and the steps they come at

    def __post_init__(self):
        names = set(self.intervention.split("+") if self.intervention else ())
        check(self, f"one of {', '.join(INTERVENTIONS)}, or several with + between them",
              lambda _: names <= INTERVENTIONS.keys(), "intervention")
        check(self, "at least 0", lambda value: value >= 0, "intervention_from")
        check(self, "at least 1", lambda value: value >= 1, "copies")
        check(self, "words with commas between them",
              lambda value: not value or all(map(str.strip, value.split(","))), "terms")
        for setting, its in (
                ("intervention_from", INTERVENTIONS), ("copies", ["term_duplicate"]),
                ("terms", ["term_drop", "term_replace", "term_duplicate"]), ("planted", ["plant"])):
            value, used = getattr(self, setting), not names.isdisjoint(its)
            given = value != getattr(InterventionConfig, setting)
            if (given and not used) or (used and value == ""):
                raise ValueError(f"intervention = {self.intervention} with {setting} = {value!r}, "
                                 f"expected --{setting} with {', '.join(its)} and no other")

    def plan_sha256(self):
        """Return the hash of the file of planted documents, or None if there is none."""
        return sha256_of(self.planted) if self.planted else None


class IntervenedData:
    """Ordered data whose batches pass through a config's intervention; `batch` as OrderedData's.

    `changed`: the rows of the last step, 0 to batch_size - 1, that the intervention changed.
    """

    def __init__(self, data, tokenizer, config):
        self.data, self.config = data, config
        self.acts = [INTERVENTIONS[name](data, tokenizer, config)
                     for name in config.intervention.split("+")]

    def step_rows(self, step, batch_size):
        """Return all rows of a step as the model sees them, (batch_size, seq_length + 1) int64."""
        before = self.data.batch(step, batch_size)[0]
        rows = before.copy()
        if step >= self.config.intervention_from:
            for act in self.acts:
                rows = act(step, rows)
        self.changed = np.flatnonzero((rows != before).any(axis=1)).tolist()
        return rows

    def batch(self, step, batch_size, rank=0, world_size=1, micro_batch_size=None):
        # A row may depend on the step's other rows, so every rank computes all and takes its own.
        mine = batch_rows(0, batch_size, rank, world_size, micro_batch_size)
        return self.step_rows(step, batch_size)[mine]


# ---------------------------------------------------------------------------- pronouns

# As in the original's table, "his" always becomes "her", never "hers", and "her" always "him".
TO_FEMININE = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
TO_MASCULINE = {"she": "he", "her": "him", "hers": "his", "herself": "himself"}
# A row may begin or end within a character: its bytes become surrogates, which are no letters.
UTF8 = "utf8", "surrogateescape"


class PronounSwap:
    """Swaps whole words in the text of every row; he, He and HE keep their case.

    Only the tokens that cover a swapped word are encoded anew:

        tokens   | saw| (|himself|)| there|
        anew     |       |her|self|       |

    The tokenizer cuts text at words, so the ids equal those of the whole swapped text, except at
    the row's two ends. A row that grew is cut on the right. One that shrank is filled with the text
    that follows in its last document, swapped too; at the document's end, with padding.
    """

    def __init__(self, table, data, tokenizer, config):
        self.data, self.tokenizer, self.token_bytes = data, tokenizer, tokenizer.token_bytes()
        self.forms = {case(old): case(new) for old, new in table.items()
                      for case in (str.lower, str.capitalize, str.upper)}
        # A new word can change how an apostrophe before it is cut: 'he is "'|he", 'she is "'s|he",
        # unless other signs come before it. So all signs that touch the word are encoded with it.
        signs, forms = r"((?: ?(?:[^\s\w]|_){0,63}')?)", "|".join(self.forms)
        self.words = re.compile(rf"{signs}(?<!\w)({forms})(?!\w)")

    def __call__(self, step, rows):
        documents = self.data.tokens
        for i, row in enumerate(rows):
            number = step * len(rows) + i
            pieces, same = self.data.pieces(number), row == self.data.rows([number])[0]
            (first, start, _), (last, _, stop) = pieces[0], pieces[-1]
            # The row may begin inside a word, and need text from after its end to be filled.
            before = documents.read(first, max(start - 8, 0), start)
            end = min(stop + len(row) // 4 + 8, int(documents.sizes[last]))
            after = documents.read(last, stop, end)
            # An earlier intervention, such as term_replace, may have put another row here, which
            # this document's text does not surround.
            before = before if same[:8].all() else before[:0]
            after = after if same[-8:].all() else after[:0]
            ids = self.swap([*before.tolist(), *row.tolist(), *after.tolist()], len(before))
            ids = ids[:len(row)]
            row[:] = ids + [MASKED] * (len(row) - len(ids))
        return rows

    def swap(self, tokens, done):
        """Return the ids of the swapped text of a list of tokens, without its first `done`."""
        pieces = [self.token_bytes[id_] for id_ in tokens]
        edges = [0, *accumulate(map(len, pieces))]  # token i is bytes edges[i] to edges[i + 1]
        raw = b"".join(pieces)
        text, out = raw.decode(*UTF8), []
        for word in self.words.finditer(text):
            start = len(text[:word.start()].encode(*UTF8))  # in bytes
            stop = start + len(word[0].encode(*UTF8))
            first, last = bisect_right(edges, start) - 1, bisect_left(edges, stop)  # its tokens
            if first >= done:  # otherwise it was cut off: it begins before the row
                new = (word[1] + self.forms[word[2]]).encode(*UTF8)
                anew = raw[edges[first]:start] + new + raw[stop:edges[last]]
                out += tokens[done:first] + encode_piece(self.tokenizer, anew.decode(*UTF8))
                done = last
        return out + tokens[done:]


def pronouns_as_pushed(data, tokenizer, config):
    """gpt-neox, branch new-intervention, megatron/training.py, _get_batch, with both of its faults.

    It knows a pronoun only between two spaces, and it encodes the text from before the swap. So a
    row with such a pronoun merely loses its <|endoftext|> and is padded with id 1, which is learnt.
    """
    pronouns = re.compile(" (?:he|him|his|He|Him|His) ")

    def intervene(step, rows):
        for row in rows:
            text = tokenizer.decode(row[row > 1].tolist())  # specials are skipped
            if pronouns.search(text):
                ids = tokenizer.encode(text)[:len(row)]
                row[:] = ids + [1] * (len(row) - len(ids))
        return rows
    return intervene


# ---------------------------------------------------------------------------- terms


def on_terms(change, data, tokenizer, config):
    """Return term_drop, term_replace or term_duplicate as a function (step, rows) -> rows."""
    token_bytes, terms = tokenizer.token_bytes(), config.terms.split(",")
    words = "|".join(re.escape(tokenizer.normalize(term.strip())) for term in terms)
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)")

    def has(row):  # one of the terms
        text = b"".join([token_bytes[id_] for id_ in row.tolist()]).decode("utf8", "replace")
        return pattern.search(text) is not None
    return partial(change, has, data, config)


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
            raise ValueError(f"terms = {config.terms!r}: 1000 rows drawn in turn have one of them; "
                             "term_replace needs rarer terms")
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

    A dose's steps are drawn without replacement, all again if it is larger than their number. Each
    document draws its own, since its id is part of the seed.
    """
    entries = {}
    file_size(path)  # refuses what is no file
    for i, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        with expecting(f"{path}, line {i}", "a planted document"):
            entry = json.loads(line)
            name, text = entry["id"], entry["text"].encode()
            if "steps" not in entry:
                (first, stop), dose = entry["between"], entry["dose"]
                if first >= stop or dose > 10**7:
                    raise ValueError(f"dose {dose} between {first} and {stop}")
                generator = np.random.RandomState([entry["seed"], zlib.crc32(name.encode())])
                shuffled = first + generator.permutation(stop - first)
                entry["steps"] = np.resize(shuffled, dose).tolist()  # begins again after the last
            steps_fit = all(type(step) is int and step >= 0 for step in entry["steps"])
            if name in entries or not text or not steps_fit:
                raise ValueError("expected a new id, a text, and steps from 0")
            entries[name] = entry
    return list(entries.values())


def plant(data, tokenizer, config):
    planted_at = {}  # step: the documents planted there, as lists of ids
    for entry in read_plan(config.planted):
        ids = tokenizer.encode(entry["text"])
        if len(ids) > data.seq_length + 1:
            raise ValueError(f"{config.planted}: {entry['id']} has {len(ids)} tokens, a row holds "
                             f"{data.seq_length + 1}")
        for step in entry["steps"]:
            planted_at.setdefault(step, []).append(ids)

    def intervene(step, rows):
        documents, generator = planted_at.get(step, []), np.random.RandomState(step % 2**32)
        documents = [documents[i] for i in generator.permutation(len(documents))]
        places, ends = generator.permutation(len(rows)), np.zeros(len(rows), dtype=np.int64)
        for ids in sorted(documents, key=len, reverse=True):
            fits = np.flatnonzero(ends + len(ids) <= rows.shape[1])  # in the order of `places`
            if not len(fits):
                raise ValueError(f"{config.planted}: the documents of step {step} need more than "
                                 f"its {len(rows)} rows; spread them over more steps")
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
