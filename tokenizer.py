"""The GPT-NeoX-20B tokenizer of every Pythia model, as a tiktoken encoding.

Source: 20B_tokenizer.json of EleutherAI/pythia (utils/), sha256 56ac4821…c985ade: byte-level BPE
with 50,254 entries, of which 0 is <|endoftext|> and 1 <|padding|>, and 23 added tokens for 24 to
2 spaces (50254 to 50276). tests/test_tokenizer.py checks that encode returns the ids of the
original, which is Hugging Face's `tokenizers` with this file.
"""

import hashlib
import json
import os
import re
import unicodedata
from functools import lru_cache

import numpy as np
import tiktoken

from config import expecting, read_json, sha256_of

ENDOFTEXT = 0  # Pythia has no other token for the beginning of a text
N_TOKENS = 50277  # the model's embeddings from here on are padding
SPECIAL = {"<|endoftext|>": 0, "<|padding|>": 1}
SPECIAL_RE = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
DIGEST = "2a9639ede0a484e3aa7254504a8ff6fa60bb8873ec8c504d95fe618b48f63bf0"  # see _digest

# The original first cuts every run of 2 to 24 spaces out of the text, longest and leftmost first,
# and then splits each part in between by GPT-2's pattern, as if it stood alone. In one pattern:
# runs of spaces first, and the rule for white space stops before one (where `(?!\S)` always holds).
# The other rules take at most one space, and never one of two.
PATTERN = "|".join((r" {2,24}", r"'(?:s|t|re|ve|m|ll|d)", r" ?\p{L}+", r" ?\p{N}+",
                    r" ?[^\s\p{L}\p{N}]+", r"(?:(?!  )\s)+(?!\S)", r"\s"))

# tiktoken's regex engine fails on a million blanks in a row. For such runs, these are the pattern's
# \s and its rules for white space.
BLANK = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_RUN = re.compile(f"(?<!{BLANK})(?={BLANK}{{100000}})")  # the position where one begins
BLANK_PIECE = re.compile(rf" {{2,24}}|(?:(?!  ){BLANK})+(?={BLANK}|\Z)")

# The original normalizes by Unicode 9, in which combining marks that were added later are ordinary
# characters: they neither compose nor change places. These are all of them, up to Unicode 18.
NEWER = "".join("-".join(chr(int(code, 16)) for code in span.split("-")) for span in """
    5C8-5C9 7FD 897-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA A82C 105C9-105E4 10D24-10F85
    11070 1133B 11382-11391 113C2-113C8 113CE-113D0 1145E 11839-1183A 11935-11A99 11D42-1611E
    16121-1612F 16D63-16FF1 1D127-1D128 1D250-1D281 1E08F-1E6F5""".split())
KNOWN = re.compile(f"[^{NEWER}]+")
# Runs of marks (with a combining class) known to Unicode 9. There are none from U+20000 on.
MARKS = re.compile("[" + "".join(
    char for char in map(chr, range(0x20000))
    if unicodedata.combining(char) and KNOWN.match(char)) + "]{2,}")


class Tokenizer:
    """encode(text) -> list of ids; decode(ids) -> text. The same bytes in and out, but for NFC."""

    def __init__(self, path):
        """Read a 20B_tokenizer.json (or the same tokenizer saved by transformers)."""
        with expecting(path, "the GPT-NeoX-20B tokenizer, which `make tokenizer` downloads"):
            spec = read_json(path)
            if _digest(spec) != DIGEST:
                raise ValueError("its vocabulary, merges, added tokens or rules differ")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        # GPT-2 writes each byte as a printable character; printable bytes stand for themselves.
        to_byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        # tiktoken merges the pair of lowest id first, the original that of lowest merge rank. The
        # ids are in the order of the merges.
        tokens = {bytes(to_byte[c] for c in symbols): rank
                  for symbols, rank in spec["model"]["vocab"].items() if symbols not in SPECIAL}
        # The vocabulary has tokens for runs of spaces, too. The added tokens always win, so encode
        # never returns these, but decode must know them: they become special tokens here.
        shadowed = {" " * n: tokens.pop(b" " * n) for n in range(2, 25) if b" " * n in tokens}
        tokens |= {b" " * n: 50278 - n for n in range(2, 25)}
        self.encoding = tiktoken.Encoding("gpt-neox-20b", pat_str=PATTERN, mergeable_ranks=tokens,
                                          special_tokens=SPECIAL | shadowed)

    def encode(self, text):
        """Return the ids of text; a literal <|endoftext|> or <|padding|> becomes its id."""
        return self.encode_array(text).tolist()

    def encode_lines(self, text):
        """Return encode(text) from a cache of lines, since prompts share most of their lines.

        No token crosses the position before a newline that follows a non-blank character.
        """
        return [token for piece in re.split(r"(?<=\S)(?=\n)", text)
                for token in encode_piece(self, piece)]

    def encode_array(self, text):
        """Return encode(text) as an array; a lone surrogate becomes U+FFFD, as in tiktoken."""
        arrays = [np.empty(0, np.uint32)]
        for part in SPECIAL_RE.split(text) if "<|" in text else [text]:
            if part in SPECIAL:  # cut out before NFC sees its neighbours
                arrays.append([SPECIAL[part]])
            elif part:
                part = self.normalize(part)
                try:
                    arrays.append(self.encoding.encode_to_numpy(part, disallowed_special=()))
                except ValueError:  # a lone surrogate, or too many blanks for the regex engine
                    arrays += self._around_long_runs(part)
        return np.concatenate(arrays)

    def _around_long_runs(self, text):
        """Yield the ids of the parts of a text, cut only where the pattern begins a new piece.

        The pattern begins a piece where a run of blanks begins, since its rules for other
        characters end before a blank. From there BLANK_PIECE matches the pattern's pieces one by
        one. The rest begins with a piece as well, and the pattern never looks back.
        """
        for part in LONG_RUN.split(text):
            done = 0
            while piece := BLANK_PIECE.match(part, done):
                yield self.encoding._encode_single_piece(piece[0])
                done = piece.end()
            yield self.encoding.encode(part[done:], disallowed_special=())

    def decode(self, ids):
        """Return the text of ids: invalid UTF-8 becomes U+FFFD, ids out of range are skipped."""
        return self.encoding.decode([id_ for id_ in ids if 0 <= id_ < N_TOKENS])

    def token_bytes(self):
        """Return the bytes of each uint16 id; for ids without text, 0xFF, which no text has."""
        return [b"\xff" if id_ in (0, 1) or id_ >= N_TOKENS
                else self.encoding.decode_single_token_bytes(id_) for id_ in range(1 << 16)]

    @staticmethod
    def normalize(text):
        """Return text in the tokenizer's own NFC, as every text is before it is encoded."""
        if text.isascii() or unicodedata.is_normalized("NFC", text):  # so it is in Unicode 9
            return text
        # Sort each run of combining marks by class, stably, for which Python's NFC takes quadratic
        # time. NFC decomposes marks before it sorts them, but only into marks of the same class.
        for char in "\u0f73\u0f75\u0f81":  # no marks themselves, but they decompose into marks
            text = text.replace(char, unicodedata.normalize("NFD", char))
        text = MARKS.sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), text)
        return KNOWN.sub(lambda part: unicodedata.normalize("NFC", part[0]), text)


encode_piece = lru_cache(maxsize=1 << 16)(Tokenizer.encode)


_loaded = {}  # {SHA-256 of a file: its Tokenizer}


@lru_cache
def load_tokenizer(path):
    """Return the Tokenizer of a file; equal files, as in a run's checkpoints, share one."""
    small = os.path.isfile(path) and os.path.getsize(path) <= 1 << 24
    digest = sha256_of(path) if small else path  # which Tokenizer refuses
    if digest not in _loaded:
        _loaded[digest] = Tokenizer(path)
    return _loaded[digest]


def _digest(spec):
    """Return the SHA-256 of all in a tokenizer.json that decides the ids, whoever saved it."""
    splitter = spec["pre_tokenizer"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    model = {key: value for key, value in spec["model"].items() if value} | {"merges": merges}
    added = [[token[key] for key in ("id", "content", "single_word", "lstrip", "rstrip")]
             for token in spec["added_tokens"]]
    facts = [spec["normalizer"], splitter["type"], splitter["add_prefix_space"],
             splitter.get("use_regex", True), model, added]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
