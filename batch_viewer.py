"""What the model saw at any step, as text, where it comes from, and when any text was seen.

    python batch_viewer.py view --data=data/pile --step=71500 [--rows=0:4] [--save=batch.npy]
    python batch_viewer.py find --data=data/pile --text="in the beginning"
    python batch_viewer.py find --data=data/pile --tokens=249,253,5068

The name is that of pythia's utils/batch_viewer.py. Steps count from 0: the update of step 0 makes
checkpoint step1.
"""

import os
import re
import sys
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tqdm import tqdm

from config import command, replacing
from data import (MASKED, PROVENANCE, Order, OrderedData, TokenFile, load_npy, order_paths, ordered,
                  read_notes, span)
from interventions import IntervenedData, InterventionConfig
from prepare import in_workers, progress
from tokenizer import SPECIAL_RE, load_tokenizer

# ---------------------------------------------------------------------------- where it comes from


class Provenance:
    """For each row its documents, for each document its subset, source, and the rows it came in.

    A baked order is traced to the token file it was baked from, if that is there.
    """

    def __init__(self, data):
        self.data = _baked_from(data) or data
        self.known, self.table = not self.data.preshuffled, None
        prefix, n = self.data.tokens.prefix, len(self.data.tokens)
        if self.known and os.path.exists(f"{prefix}_documents.npy"):
            self.table, notes = load_npy(f"{prefix}_documents.npy"), read_notes(prefix)
            self.subsets, self.files = notes.get("subsets"), notes.get("files")
            if (self.table.shape != (n,) or self.table.dtype != PROVENANCE
                    or type(self.subsets) is not list or type(self.files) is not list):
                raise ValueError(f"{prefix}_documents.npy and {prefix}.json do not belong to "
                                 f"{prefix}.idx ({n:,} documents); tokenize")

    def describe(self, document):
        """Return "subset, file:line" of a document, as far as it is recorded."""
        if self.table is None:
            return "subset not recorded"
        file, line, subset = self.table[document].tolist()
        return f"{self.subsets[subset]}, {self.files[file]}:{line}"

    @cached_property
    def copies(self):
        """Where in doc_idx the copies of each document are, (documents, epochs)."""
        return self._inverse("doc", self.data.order[0]).reshape(len(self.data.tokens), -1)

    @cached_property
    def row_of(self):
        """In which row each sample is served, (samples,)."""
        return self._inverse("shuffle", self.data.order[2])

    def _inverse(self, name, array):
        """Return where an array's values stand in it, by value; kept beside the order's files."""
        path = self.data.paths[0].replace("_doc_idx.npy", f"_inverse_{name}_idx.npy")
        if not os.path.exists(path):
            with replacing(path) as file:
                np.save(file, np.argsort(array, kind="stable").astype(np.uint32))
        return load_npy(path)

    def _samples(self, position, start, stop):
        """Return the range of the samples with any of tokens start..stop of a copy in doc_idx.

        Sample s is the tokens from sample_idx[s] to sample_idx[s + 1], both included.
        """
        sample_idx = self.data.order[1]
        samples, begins = range(len(sample_idx) - 1), lambda s: tuple(sample_idx[s].tolist())
        first = bisect_left(samples, (position, start), key=begins) - 1
        return range(max(first, 0), bisect_right(samples, (position, stop - 1), key=begins))

    def appearances(self, document):
        """Return the rows in which each copy of a document has tokens: a sorted list a copy."""
        size = int(self.data.tokens.sizes[document])
        return [sorted(self.row_of[self._samples(position, 0, size)].tolist())
                for position in self.copies[document].tolist()]

    def rows_of(self, document, offset, length):
        """Yield (row, offset in it) of served rows with `length` tokens of a document whole."""
        doc_idx, sample_idx, _ = self.data.order
        for position in self.copies[document].tolist():
            for sample in self._samples(position, offset, offset + 1):
                first, start = sample_idx[sample].tolist()
                before = self.data.tokens.sizes[doc_idx[first:position]].sum(dtype=np.int64)
                within, row = int(before) - start + offset, int(self.row_of[sample])
                if 0 <= within <= self.data.seq_length + 1 - length and row < len(self.data):
                    yield row, within


def _baked_from(data):
    """Return the OrderedData a baked file was made from, None unless there, whole, and the same."""
    try:
        job = read_notes(data.tokens.prefix)["baked_from"]
        # The path may be a stranger's: an order is read there, but none is built.
        if not all(map(os.path.exists, order_paths(job["data"], **job["order"]))):
            return None
        source = OrderedData(job["data"], **job["order"])
        return source if source.tokens.n_tokens == job["tokens"] else None
    except (KeyError, TypeError, ValueError, OSError):
        return None


# ---------------------------------------------------------------------------- view


@dataclass(frozen=True)
class View(InterventionConfig, Order):
    step: str = "0"  # 0-based: the update of step 0 makes checkpoint step1; 3:5 is steps 3, 4 and 5
    rows: str = ""  # which of each step's rows, first:last+1; default: the first four
    # BATCH.npy for all rows of the steps: (steps * batch_size, seq_length + 1), uint16 as in the
    # token file, or int32 after an intervention
    save: str = ""
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
          f"{steps.stop * size - 1:,} (all included); checkpoint step{steps.stop} is the first to "
          "have seen them all")
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
    dtype = np.int32 if options.intervention else np.uint16  # an intervention may write MASKED
    rows = np.concatenate([data.batch(step, options.batch_size)[0].astype(dtype)
                           for step in tqdm(steps, unit="step", disable=None)])
    with replacing(options.save) as file:
        np.save(file, rows)
    print(f"{options.save}: {len(rows):,} rows of {rows.shape[1]} tokens, {rows.dtype}")


def show_row(data, provenance, tokenizer, row, rows_before):
    """Print a row's documents; each says how many copies had begun before row `rows_before`."""
    ids = data.rows([row])[0]
    # Of a published preshuffled file only the text is known, and of a baked one if the file that it
    # was baked from has other tokens by now.
    if not provenance.known or not np.array_equal(provenance.data.rows([row])[0], ids):
        print(tokenizer.decode(ids.tolist()))
        return
    for document, start, stop in provenance.data.pieces(row):
        copies = provenance.appearances(document)
        seen = sum(rows[0] < rows_before for rows in copies if rows)
        print(f"--- document {document:,} ({provenance.describe(document)}), tokens {start:,} to "
              f"{stop - 1:,} of {provenance.data.tokens.sizes[document]:,}; seen before: {seen} of "
              f"{len(copies)} copies")
        print(tokenizer.decode(provenance.data.tokens.read(document, start, stop).tolist()))


# ---------------------------------------------------------------------------- find


@dataclass(frozen=True)
class Find(Order):
    text: str = ""  # found wherever its bytes stand, however they were cut into tokens
    tokens: str = ""  # or ids with commas: found as exactly these tokens
    workers: int = 0  # processes; 0: one a core
    tokenizer: str = "20B_tokenizer.json"

    def __post_init__(self):
        Order.__post_init__(self)
        if bool(self.text) == bool(self.tokens):
            raise ValueError("find takes one of --text=TEXT and --tokens=12092,1533")
        if SPECIAL_RE.search(self.text):
            raise ValueError("<|endoftext|> and <|padding|> are no text: --tokens=0 or --tokens=1")


def find(options):
    """Find every step, row and offset at which a text or a token sequence was seen.

    A text is searched by the tokens that can cover one of its bytes, the byte whose tokens are
    rarest in a sample of the file; each hit is decided by decoding its neighbourhood. What stands
    across the end of a document is found only where documents were baked into rows.
    """
    data, size = ordered(options), options.batch_size
    if options.tokens:
        if not re.fullmatch(r"\d{1,5}(,\d{1,5})*", options.tokens):
            raise ValueError(f"tokens = {options.tokens!r}, expected ids with commas")
        text = "".join(chr(int(id_)) for id_ in options.tokens.split(","))
        pattern = Pattern(text, IDS, data.tokens)
    else:
        tokenizer = load_tokenizer(options.tokenizer)
        text = tokenizer.normalize(options.text).encode()
        pattern = Pattern(text, tokenizer.token_bytes(), data.tokens)
    found = search(data.tokens.prefix, data.tokens.n_tokens, pattern, options.workers)
    provenance, places = Provenance(data), []
    for first, length in tqdm(found, desc="rows", unit="place", disable=None):
        document, offset = document_at(data.tokens, first)
        rows, where = [(document, offset)], ""
        if not data.preshuffled:
            rows = provenance.rows_of(document, offset, length)
            where = f"; document {document:,} ({provenance.describe(document)})"
        places += [(row, within, length, where) for row, within in rows
                   if row < options.steps * size]
    for row, offset, length, where in sorted(places):
        print(f"step {row // size:,}, row {row % size:,} (row {row:,} of the order), tokens "
              f"{offset:,} to {offset + length - 1:,}{where}")
    print(f"{len(found):,} places in the file, seen {len(places):,} times in {options.steps:,} "
          "steps")


IDS = [chr(id_) for id_ in range(1 << 16)]  # each id spelled as a character of its own


class Pattern:
    """A text in bytes, or ids as characters, searched by the tokens that can cover one of them.

    " banana" may be cut into " banana", " ban|ana", "s ban|an|as" ...: whatever the cut, some token
    covers its first "n", and only tokens that agree with the bytes around it can, as "ban" or "an".
    `reach` tokens around such a token, an anchor, decide a hit.
    """

    def __init__(self, text, spelled, tokens, most=32):
        self.text, self.spelled, self.reach = text, spelled, len(text)
        # For each of the first `most` bytes, the ids of all tokens that can cover it.
        covering = [set() for _ in text[:most]]
        for id_, token in enumerate(spelled):
            for start in range(1 - len(token), len(covering)):  # where the token begins in the text
                first, end = max(start, 0), min(start + len(token), len(text))
                if token[first - start:end - start] == text[first:end]:
                    for byte in range(first, min(end, len(covering))):
                        covering[byte].add(id_)
        counts = sample_counts(tokens)
        self.anchors = sorted(min(covering, key=lambda ids: sum(counts[id_] for id_ in ids)))

    def matches(self, tokens):
        """Yield (first, length) of the tokens that hold the text, wherever it stands in them."""
        pieces = [self.spelled[id_] for id_ in tokens.tolist()]
        joined = self.text[:0].join(pieces)
        begin = joined.find(self.text)
        if begin < 0:  # as nearly always: nothing more is worth computing
            return
        ends = np.cumsum([len(piece) for piece in pieces])
        while begin >= 0:
            edges = (begin, begin + len(self.text) - 1)
            first, last = np.searchsorted(ends, edges, side="right").tolist()
            yield first, last - first + 1
            begin = joined.find(self.text, begin + 1)


def sample_counts(tokens, blocks=64, size=1 << 15):
    """Return how often each id occurs in a spread-out sample of the file."""
    starts = np.linspace(0, max(tokens.n_tokens - size, 0), blocks, dtype=np.int64).tolist()
    sample = [tokens.slice(start, min(start + size, tokens.n_tokens)) for start in starts]
    return np.bincount(np.concatenate(sample), minlength=1 << 16)


def search(prefix, n_tokens, pattern, workers, block=1 << 22):
    """Return the sorted (first token, length) of all matches within documents, on all cores."""
    ranges = [(start, min(start + block, n_tokens)) for start in range(0, n_tokens, block)]
    found = set()
    workers = 1 if len(ranges) == 1 else workers
    with progress(total=2 * n_tokens) as bar:
        for matches in in_workers(search_range, ranges, workers, _start_searching, prefix, pattern):
            found.update(matches)
            if len(found) > 10**7:
                raise ValueError("more than 10,000,000 places: search for something rarer")
            bar.update(2 * block)
    return sorted(found)


def _start_searching(prefix, pattern):
    global _tokens, _pattern  # sent to a process once, not with each task
    _tokens, _pattern = TokenFile(prefix), pattern


def search_range(start, stop, block=1 << 16):
    """Return the matches around the anchors among tokens start..stop of the file.

    A block's arrays fit the processor's cache: larger ones took four times as long.
    """
    found, is_anchor = [], np.zeros(1 << 16, dtype=bool)
    is_anchor[_pattern.anchors] = True
    for first in range(start, stop, block):
        low = max(first - _pattern.reach, 0)
        high = min(first + block + _pattern.reach, _tokens.n_tokens)
        ids = _tokens.slice(low, high)
        for at in np.flatnonzero(is_anchor[ids]).tolist():
            left = max(at - _pattern.reach, 0)
            for begin, length in _pattern.matches(ids[left:at + _pattern.reach + 1]):
                place = low + left + begin
                document, offset = document_at(_tokens, place)
                if offset + length <= _tokens.sizes[document]:
                    found.append((place, length))
    return found


def document_at(tokens, place):
    """Return (document, offset in it) of a token of the file."""
    document = bisect_right(tokens.pointers, 2 * place) - 1
    return document, place - int(tokens.pointers[document]) // 2


if __name__ == "__main__":
    command(sys.argv[1:], {"view": (View, view), "find": (Find, find)})
