"""Where any text or token sequence was seen, steps, rows and offsets: `find` of data.py."""

import os
import re
import time
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

from data import Order, TokenFile, ordered
from pile.prepare import serve_parent
from pile.viewer import Provenance
from tokenizer import load_tokenizer

@dataclass(frozen=True)
class Find(Order):
    text: str = ""  # found wherever its bytes stand, however they were cut into tokens
    tokens: str = ""  # or ids with commas: found as exactly these tokens
    limit: int = 100  # print so many places; all are counted
    workers: int = 0  # processes; 0: one a core
    tokenizer: str = "20B_tokenizer.json"


def find(options):
    """Find every step, row and offset at which a text or a token sequence was seen.

    A text is searched by one of its bytes. However the text was cut into tokens, some token covers
    that byte, and only so many tokens of the vocabulary fit there with the bytes of the text around
    it. Those are looked for in the token file, and each hit is decided by decoding its
    neighbourhood. The byte taken is the one whose tokens are rarest in a sample of the file. What
    stands across the end of a document is found only where documents were baked into rows.
    """
    if bool(options.text) == bool(options.tokens):
        raise ValueError("find takes one of --text=TEXT and --tokens=12092,1533")
    tokenizer = load_tokenizer(options.tokenizer)
    if options.tokens and not (re.fullmatch(r"\d{1,5}(,\d{1,5})*", options.tokens)
                               and max(map(int, options.tokens.split(","))) < 1 << 16):
        raise ValueError(f"tokens = {options.tokens!r}, expected ids below 65,536 with commas")
    data = ordered(options)
    data.tokens.require_uint16()
    counts = sample_counts(data.tokens)
    if options.tokens:
        pattern = TokenPattern([int(id_) for id_ in options.tokens.split(",")], counts)
    else:
        pattern = TextPattern(tokenizer.normalize(options.text).encode(),
                              tokenizer.token_bytes(), counts)
    began = time.perf_counter()
    found = search(data.tokens.prefix, data.tokens.n_tokens, pattern,
                   options.workers or os.cpu_count())
    seconds = time.perf_counter() - began
    provenance, n_rows, places = Provenance(data), options.steps * options.batch_size, []
    for first, length in tqdm(found, desc="rows", unit="place", disable=None):
        places += [place for place in rows_with(data, provenance, first, length)
                   if place[0] < n_rows]
    places.sort()
    for row, offset, length, document in places[:options.limit]:
        where = "" if data.preshuffled else (
            f"; document {document:,} ({provenance.describe(document)})")
        print(f"step {row // options.batch_size:,}, row {row % options.batch_size:,} (row {row:,} "
              f"of the order), tokens {offset:,} to {offset + length - 1:,}{where}")
    if (more := len(places) - options.limit) > 0:
        print(f"... and {more:,} more; --limit=N shows more")
    size = data.tokens.n_tokens * data.tokens.dtype.itemsize / 1e9
    print(f"{len(found):,} places in the file, seen {len(places):,} times in {options.steps:,} "
          f"steps; searched {size:.3f} GB in {seconds:.2f} s, {size / seconds:.2f} GB/s")


class TokenPattern:
    """A sequence of ids, searched by the rarest of them.

    A pattern has: anchors, ids of which one is in every match; left and right, the ids that can
    stand 1, 2, ... before and after an anchor; reach, how many tokens around an anchor decide a
    hit.
    """

    def __init__(self, ids, counts):
        self.ids, self.reach = np.array(ids), len(ids)
        self.rarest = min(range(len(ids)), key=lambda i: counts[ids[i]])
        self.anchors = [ids[self.rarest]]
        self.left = [[id_] for id_ in ids[:self.rarest][::-1]]
        self.right = [[id_] for id_ in ids[self.rarest + 1:]]

    def matches(self, tokens, at):
        """Yield (first, length) of the matches whose anchor is tokens[at]."""
        first = at - self.rarest
        if first >= 0 and np.array_equal(tokens[first:first + len(self.ids)], self.ids):
            yield first, len(self.ids)


class TextPattern:
    """Bytes, searched by the tokens that fit over one of them; same fields as TokenPattern's."""

    def __init__(self, text, token_bytes, counts):
        self.text, self.token_bytes, self.reach = text, token_bytes, len(text)
        # Where each token fits, by the place in the text where it begins (negative: before the
        # text).
        longest = max(map(len, token_bytes))
        self.fits = {start: [] for start in range(1 - longest, len(text))}
        # The tokens that are these bytes, and those that go on after them.
        whole, beginning = {}, {}
        for id_, token in enumerate(token_bytes):
            whole.setdefault(token, []).append(id_)
            for n in range(1, len(token)):
                beginning.setdefault(token[:n], []).append(id_)
                # The text begins inside it.
                if text.startswith(token[n:]) or token[n:].startswith(text):
                    self.fits[-n].append(id_)
        for start in range(len(text)):
            for stop in range(start + 1, min(start + longest, len(text)) + 1):
                self.fits[start] += whole.get(text[start:stop], ())
            if len(text) - start < longest:
                self.fits[start] += beginning.get(text[start:], ())
        cost = np.zeros(len(text))  # of each byte: how often its tokens occur
        for start, ids in self.fits.items():
            for id_ in ids:
                cost[max(start, 0):start + len(token_bytes[id_])] += counts[id_]
        byte = int(np.argmin(cost))
        self.starts = {}
        for start in range(byte + 1 - max(map(len, token_bytes)), byte + 1):
            for id_ in self.fits.get(start, ()):
                if start + len(token_bytes[id_]) > byte:
                    self.starts.setdefault(id_, []).append(start)
        self.anchors = sorted(self.starts)
        placed = [(start, id_) for id_, starts in self.starts.items() for start in starts]
        self.left = list(self._neighbours({start for start, _ in placed}, "left"))
        self.right = list(self._neighbours(
            {start + len(token_bytes[id_]) for start, id_ in placed}, "right"))

    def _neighbours(self, places, side, most=4):
        """Yield the ids that can come next on one side of tokens that end at any of these places.

        It stops where the text may already be over, since anything can follow then.
        """
        for _ in range(most):
            if side == "right":
                if max(places) >= len(self.text):
                    return
                fits = [(start, id_) for start in places for id_ in self.fits[start]]
                places = {start + len(self.token_bytes[id_]) for start, id_ in fits}
            else:
                if min(places) <= 0:
                    return
                fits = [(start, id_) for start, ids in self.fits.items() for id_ in ids
                        if start + len(self.token_bytes[id_]) in places]
                places = {start for start, _ in fits}
            if not fits:
                return
            yield sorted({id_ for _, id_ in fits})

    def matches(self, tokens, at):
        """Yield (first, length) of tokens that hold the text; tokens[at] covers the chosen byte."""
        pieces = [self.token_bytes[id_] for id_ in tokens]
        ends = np.cumsum([len(piece) for piece in pieces])
        joined, anchor = b"".join(pieces), int(ends[at]) - len(pieces[at])
        for start in self.starts[int(tokens[at])]:
            begin = anchor - start
            if begin >= 0 and joined[begin:begin + len(self.text)] == self.text:
                first, last = np.searchsorted(
                    ends, (begin, begin + len(self.text) - 1), side="right")
                yield int(first), int(last - first + 1)


def sample_counts(tokens, blocks=64, size=1 << 15):
    """Return how often each id occurs in a spread-out sample of the file."""
    starts = np.linspace(0, max(tokens.n_tokens - size, 0), blocks, dtype=np.int64).tolist()
    return sum(np.bincount(tokens.slice(start, min(start + size, tokens.n_tokens)),
                           minlength=1 << 16)
               for start in starts)


def search(prefix, n_tokens, pattern, workers, block=1 << 24):
    """Return the sorted (first token, length) of all matches within documents, on all cores."""
    ranges = [(start, min(start + block, n_tokens), block // 16)
              for start in range(0, n_tokens, block)]
    found = set()
    with tqdm(total=n_tokens * 2, unit="B", unit_scale=True, disable=None) as bar:
        if workers == 1 or len(ranges) == 1:
            _start_searching(prefix, pattern)
            for span in ranges:
                found.update(search_range(*span))
                bar.update(2 * (span[1] - span[0]))
        else:
            with ProcessPoolExecutor(workers, get_context("spawn"), _start_searching,
                                     (prefix, pattern)) as pool:
                for span, matches in zip(ranges, pool.map(search_range, *zip(*ranges))):
                    found.update(matches)
                    bar.update(2 * (span[1] - span[0]))
    return sorted(found)


def _start_searching(prefix, pattern):
    global _tokens, _pattern, _tables
    serve_parent()
    _tokens, _pattern = TokenFile(prefix), pattern
    _tables = {offset: np.zeros(1 << 16, dtype=bool)
               for offset in range(-len(pattern.left), len(pattern.right) + 1)}
    for offset, ids in ((0, pattern.anchors), *((-i, ids) for i, ids in enumerate(pattern.left, 1)),
                        *enumerate(pattern.right, 1)):
        _tables[offset][ids] = True


def search_range(start, stop, block):
    """Return the matches whose anchor lies in tokens start..stop."""
    found = []
    before, after = len(_pattern.left), len(_pattern.right)
    for first in range(start, stop, block):
        # A block with its neighbours, as far as the file has them; hits on its rim are decided
        # without them.
        low, high = max(first - before, 0), min(first + block + after, _tokens.n_tokens)
        ids = _tokens.slice(low, high)
        # Comparing is faster than looking up while there is little to compare.
        is_anchor = (np.logical_or.reduce([ids == id_ for id_ in _pattern.anchors])
                     if len(_pattern.anchors) <= 12 else _tables[0].take(ids, mode="clip"))
        hits = np.flatnonzero(is_anchor[first - low:min(first + block, stop) - low]) + first - low
        for offset, table in _tables.items():
            at = hits + offset
            inside = (at >= 0) & (at < len(ids))
            hits = hits[~inside | table[ids[np.where(inside, at, 0)]]]
        for position in (low + hits).tolist():
            document = document_at(_tokens, position)
            begin = int(_tokens.pointers[document]) // _tokens.dtype.itemsize
            left = max(begin, position - _pattern.reach)
            right = min(begin + int(_tokens.sizes[document]), position + _pattern.reach + 1)
            found += [(left + i, n) for i, n in _pattern.matches(
                _tokens.slice(left, right), position - left)]
    return found


def document_at(tokens, position):
    """Return the document that holds a token of the file."""
    place = position * tokens.dtype.itemsize
    return bisect_right(range(len(tokens)), place,
                        key=lambda document: tokens.pointers[document]) - 1


def rows_with(data, provenance, first, length):
    """Yield (row, offset, length, document) of the rows where tokens first.. were served whole."""
    document = document_at(data.tokens, first)
    offset = first - int(data.tokens.pointers[document]) // data.tokens.dtype.itemsize
    if data.preshuffled:
        yield document, offset, length, document
    else:
        for row, within in provenance.rows_of(document, offset, length):
            yield row, within, length, document
