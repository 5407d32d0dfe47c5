"""Shows which texts a run saw at any step and where they come from, and finds when it saw a text.

    python batch_viewer.py view --data=data/pile --step=71500 [--rows=0:4] [--save=batch.npy]
    python batch_viewer.py find --data=data/pile --text="in the beginning"
    python batch_viewer.py find --data=data/pile --tokens=249,253,5068

It has the name of pythia's utils/batch_viewer.py. Steps count from 0: the update of step 0 makes
checkpoint step1.
"""

import os
import re
import sys
from bisect import bisect_left, bisect_right
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count

import numpy as np
from tqdm import tqdm

from config import check, command, expecting, replacing
from data import (MASKED, Order, OrderedData, TokenFile, load_npy, order_paths, ordered, read_notes,
                  span)
from interventions import IntervenedData, InterventionConfig
from prepare import in_workers, progress
from tokenizer import SPECIAL_RE, load_tokenizer

# ---------------------------------------------------------------------------- provenance


class Provenance:
    """Where documents come from (subset, file and line), and which rows their copies are served in.

    The documents of a baked file are those of the file it was baked from, if that is still there.
    """

    def __init__(self, data):
        self.data = baked_from(data) or data
        prefix = self.data.tokens.prefix
        self.path, self.notes = f"{prefix}_documents.npy", read_notes(prefix)
        self.table = load_npy(self.path) if os.path.exists(self.path) else None

    def describe(self, document):
        """Return "subset, file:line" of a document, as far as it is recorded."""
        if self.table is None:
            return "subset not recorded"
        with expecting(self.path, f"the table of {self.data.tokens.prefix}.idx"):
            if len(self.table) != len(self.data.tokens):
                raise ValueError(f"{len(self.table):,} entries, expected {len(self.data.tokens):,}")
            file, line, subset = self.table[document].tolist()
            return f"{self.notes['subsets'][subset]}, {self.notes['files'][file]}:{line}"

    @cached_property
    def inverses(self):
        """Return copies (documents, epochs) and row_of (samples,), kept beside the order's files.

        copies: where in doc_idx each document stands; row_of: in which row each sample is served.
        """
        stem, inverses = self.data.paths[0].removesuffix("_doc_idx.npy"), []
        for name, array in zip(("doc", "shuffle"), self.data.order[::2]):
            path = f"{stem}_inverse_{name}_idx.npy"
            if not os.path.exists(path):
                with replacing(path) as file:
                    np.save(file, np.argsort(array, kind="stable").astype(np.uint32))
            inverses.append(load_npy(path))
        return inverses[0].reshape(len(self.data.tokens), -1), inverses[1]

    def rows_of(self, document, start=0, length=None):
        """Return [(row, offset)] for each copy of a document: the rows with any of its tokens.

        With a length, only those that hold its `length` tokens from `start` whole, at `offset`.
        """
        (copies, row_of), (doc_idx, sample_idx, _) = self.inverses, self.data.order
        sizes, seq_length = self.data.tokens.sizes, self.data.seq_length
        stop = int(sizes[document]) if length is None else start + length
        # Sample s holds the tokens from begin(s) to begin(s + 1), both included.
        begin, samples = lambda s: tuple(sample_idx[s].tolist()), range(len(sample_idx))
        found = []
        for place in copies[document].tolist():
            first = max(bisect_left(samples, (place, start), key=begin) - 1, 0)
            last = bisect_right(samples, (place, stop - 1), key=begin)
            at, skipped = begin(first)
            offset = int(sizes[doc_idx[at:place]].sum(dtype=np.int64)) - skipped + start
            offsets = count(offset, -seq_length)  # in sample first, first + 1, ...
            found.append([(row, offset) for row, offset in zip(row_of[first:last].tolist(), offsets)
                          if row < len(self.data)
                          and (length is None or 0 <= offset <= seq_length + 1 - length)])
        return found


def baked_from(data):
    """Return the OrderedData that a file was baked from, None if it is gone or another by now."""
    with suppress(KeyError, TypeError, ValueError, OSError):
        job = read_notes(data.tokens.prefix)["baked_from"]
        # The path may be a stranger's, so an order is read there but none is built.
        if all(map(os.path.exists, order_paths(job["data"], **job["order"]))):
            source = OrderedData(job["data"], **job["order"])
            return source if source.tokens.n_tokens == job["tokens"] else None


# ---------------------------------------------------------------------------- view


@dataclass(frozen=True)
class View(InterventionConfig, Order):
    step: str = "0"  # 0-based: the update of step 0 makes checkpoint step1; 3:5 is steps 3, 4 and 5
    rows: str = ""  # which rows of each step, first:last+1; default: the first four
    save: str = ""  # a new BATCH.npy for all rows of the steps: uint16, int32 with an intervention
    tokenizer: str = "20B_tokenizer.json"

    def __post_init__(self):
        Order.__post_init__(self)
        InterventionConfig.__post_init__(self)


def view(options):
    """Print what the model saw at a step: text by document, with subset, source and repeats."""
    data, size = ordered(options), options.batch_size
    steps = span("step", options.step, min(options.steps, len(data) // size), end=1)
    places = span("rows", options.rows or f"0:{min(4, size)}", size)
    print(f"steps {steps[0]:,} to {steps[-1]:,}, rows {steps[0] * size:,} to "
          f"{steps.stop * size - 1:,} (all included), all seen by checkpoint step{steps.stop}")
    tokenizer = load_tokenizer(options.tokenizer)
    served = IntervenedData(data, tokenizer, options) if options.intervention else None
    if options.save:
        save_steps(options, served or data, steps)
        return
    provenance = Provenance(data)
    for step in steps:
        rows = served.step_rows(step, size) if served else None
        for place in places:
            print(f"\n=== row {step * size + place:,} (step {step:,}, row {place})")
            show_row(data, provenance, tokenizer, step * size + place, step * size)
            if served and place in served.changed:
                print(f"--- after {options.intervention}, {(rows[place] == MASKED).sum():,} tokens "
                      "of padding")
                print(tokenizer.decode(rows[place].tolist()))


def save_steps(options, data, steps):
    """Write all rows of the steps as one .npy."""
    if not options.save.endswith(".npy") or os.path.lexists(options.save):
        raise ValueError(f"save = {options.save}, expected the name of a new BATCH.npy")
    dtype = np.int32 if options.intervention else np.uint16  # MASKED is negative
    rows = np.concatenate([data.batch(step, options.batch_size)[0].astype(dtype)
                           for step in tqdm(steps, unit="step", disable=None)])
    with replacing(options.save) as file:
        np.save(file, rows)
    print(f"{options.save}: {len(rows):,} rows of {rows.shape[1]} tokens, {rows.dtype}")


def show_row(data, provenance, tokenizer, row, rows_before):
    """Print a row's documents; each says how many of its copies came before row `rows_before`."""
    ids, source = data.rows([row])[0], provenance.data
    # Documents are unknown in a published file, or in a baked one whose source has changed since.
    if source.preshuffled or not np.array_equal(source.rows([row])[0], ids):
        print(tokenizer.decode(ids.tolist()))
        return
    for document, start, stop in source.pieces(row):
        copies = provenance.rows_of(document)
        seen = sum(any(row < rows_before for row, _ in copy) for copy in copies)
        print(f"--- document {document:,} ({provenance.describe(document)}), tokens {start:,} to "
              f"{stop - 1:,} of {source.tokens.sizes[document]:,}; seen before: {seen} of "
              f"{len(copies)} copies")
        print(tokenizer.decode(source.tokens.read(document, start, stop).tolist()))


# ---------------------------------------------------------------------------- find


@dataclass(frozen=True)
class Find(Order):
    text: str = ""  # found wherever its bytes stand, however they were cut into tokens
    tokens: str = ""  # or ids with commas between them, found as exactly these tokens
    workers: int = 0  # processes; 0: one a core
    tokenizer: str = "20B_tokenizer.json"

    def __post_init__(self):
        Order.__post_init__(self)
        if bool(self.text) == bool(self.tokens):
            raise ValueError("find takes one of --text=TEXT and --tokens=12092,1533")
        if SPECIAL_RE.search(self.text):
            raise ValueError("<|endoftext|> and <|padding|> are no text: --tokens=0 or --tokens=1")
        check(self, "ids with commas between them", re.compile(r"(\d{1,5}(,\d{1,5})*)?").fullmatch,
              "tokens")


def find(options):
    """Find every step, row and offset at which a text or a sequence of tokens was seen.

    Text across the end of a document is found only if documents were baked into rows.
    """
    data, size = ordered(options), options.batch_size
    if options.tokens:
        text = "".join(chr(int(id_)) for id_ in options.tokens.split(","))
        spelled = list(map(chr, range(1 << 16)))
    else:
        tokenizer = load_tokenizer(options.tokenizer)
        text, spelled = tokenizer.normalize(options.text).encode(), tokenizer.token_bytes()
    found = search(data.tokens, text, spelled, options.workers)
    provenance, places = Provenance(data), []
    for first, length in tqdm(found, desc="rows", unit="place", disable=None):
        document, offset = document_at(data.tokens, first)
        copies, where = [[(document, offset)]], ""
        if not data.preshuffled:
            copies = provenance.rows_of(document, offset, length)
            where = f"; document {document:,} ({provenance.describe(document)})"
        places += [(row, within, length, where) for copy in copies for row, within in copy
                   if row < options.steps * size]
    for row, offset, length, where in sorted(places):
        print(f"step {row // size:,}, row {row % size:,} (row {row:,} of the order), tokens "
              f"{offset:,} to {offset + length - 1:,}{where}")
    print(f"{len(found):,} places in the file, seen {len(places):,} times in {options.steps:,} "
          "steps")


def anchors(tokens, text, spelled):
    """Return ids, as rare as possible, one of which stands wherever the text stands in the file.

    " banana" may be cut into " banana", " ban|ana", "s ban|an|as" ...: whatever the cut, some token
    covers its first "n", and only few tokens can, such as "ban" or "an", but not "and". Of the
    first bytes, that one is chosen whose tokens are rarest in a sample of the file.
    """
    covering = [set() for _ in text[:32]]  # for each byte, the ids that can cover it
    for id_, token in enumerate(spelled):
        for start in range(1 - len(token), len(covering)):  # where the token begins in the text
            first, end = max(start, 0), min(start + len(token), len(text))
            if token[first - start:end - start] == text[first:end]:
                for ids in covering[first:end]:
                    ids.add(id_)
    starts = np.linspace(0, max(tokens.n_tokens - 32768, 0), 64, dtype=np.int64).tolist()
    sample = [tokens.slice(start, min(start + 32768, tokens.n_tokens)) for start in starts]
    counts = np.bincount(np.concatenate(sample), minlength=1 << 16)
    return min(map(sorted, covering), key=lambda ids: counts[ids].sum())


def search(tokens, text, spelled, workers, block=1 << 22):
    """Return the sorted (first token, length) of all places that hold a text within a document.

    text: bytes, or a string with one character for each id. spelled: what each id adds to a text.
    """
    n, found = tokens.n_tokens, set()
    ranges = [(start, min(start + block, n)) for start in range(0, n, block)]
    workers = workers if len(ranges) > 1 else 1
    with progress(total=2 * n) as bar:
        for places in in_workers(search_range, ranges, workers, start_searching, tokens.prefix,
                                 text, spelled, anchors(tokens, text, spelled)):
            found.update(places)
            if len(found) > 10**7:
                raise ValueError("more than 10,000,000 places: search for something rarer")
            bar.update(2 * block)
    return sorted(found)


def start_searching(prefix, text, spelled, ids):
    global _search  # sent to each process once, not with each task
    is_anchor = np.zeros(1 << 16, dtype=bool)
    is_anchor[ids] = True
    _search = TokenFile(prefix), text, spelled, is_anchor


def search_range(start, stop, block=1 << 16):
    """Return the places, unsorted, around the anchors among tokens start..stop of the file.

    A block's arrays fit the processor's cache; larger blocks took four times as long.
    """
    (tokens, text, spelled, is_anchor), found = _search, []
    for first in range(start, stop, block):
        ids = tokens.slice(first, min(first + block, stop))
        for anchor in (first + np.flatnonzero(is_anchor[ids])).tolist():
            left, right = max(anchor - len(text), 0), anchor + len(text) + 1
            around = tokens.slice(left, min(right, tokens.n_tokens))
            pieces = [spelled[id_] for id_ in around.tolist()]
            joined = text[:0].join(pieces)
            begin = joined.find(text)
            while begin >= 0:
                ends = list(accumulate(map(len, pieces)))
                place, last = (left + bisect_right(ends, byte)
                               for byte in (begin, begin + len(text) - 1))
                document, offset = document_at(tokens, place)
                if offset + last - place < tokens.sizes[document]:
                    found.append((place, last - place + 1))
                begin = joined.find(text, begin + 1)
    return found


def document_at(tokens, place):
    """Return (document, offset in it) of a token of the file."""
    document = bisect_right(tokens.pointers, 2 * place) - 1
    return document, place - int(tokens.pointers[document]) // 2


if __name__ == "__main__":
    command(sys.argv[1:], {"view": (View, view), "find": (Find, find)})
