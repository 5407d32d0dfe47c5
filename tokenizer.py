"""The GPT-NeoX-20B tokenizer of every Pythia model, as a tiktoken encoding.

Source: 20B_tokenizer.json of EleutherAI/pythia (utils/), sha256 56ac4821…c985ade: byte-level BPE
of 50,254 entries, of which 0 is <|endoftext|> and 1 <|padding|>, and 23 added tokens of 24 to
2 spaces (50254 to 50276). tests/test_tokenizer.py holds encode equal to the original's.
"""

import hashlib
import json
import re
import unicodedata
from functools import lru_cache

import numpy as np
import tiktoken

from config import read_json

ENDOFTEXT = 0  # also Pythia's only beginning of text
N_TOKENS = 50277  # the model's rows above this are padding
SPECIAL = {"<|endoftext|>": 0, "<|padding|>": 1}
SPECIAL_RE = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
DIGEST = "2a9639ede0a484e3aa7254504a8ff6fa60bb8873ec8c504d95fe618b48f63bf0"  # see _digest

# The original first cuts every run of 2 to 24 spaces out of the text, longest and leftmost first,
# and then splits what lies between by GPT-2's pattern, each part as if it stood alone. In one
# pattern: space runs first, and the whitespace rules must stop before one (where `(?!\S)` holds of
# itself). All other rules take at most one space, never one of two.
PATTERN = "|".join((r" {2,24}", r"'(?:s|t|re|ve|m|ll|d)", r" ?\p{L}+", r" ?\p{N}+",
                    r" ?[^\s\p{L}\p{N}]+", r"(?:(?!  )\s)+(?!\S)", r"\s"))

# The pattern's \s and its rules for blanks: tiktoken's engine gives up on a million in a row.
BLANK = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_RUN = re.compile(f"(?<!{BLANK})(?={BLANK}{{100000}})")  # where one begins
BLANK_PIECE = re.compile(rf" {{2,24}}|(?:(?!  ){BLANK})+(?={BLANK}|\Z)")


class Tokenizer:
    """encode(text) -> list of ids; decode(ids) -> text. The same bytes in and out, but for NFC."""

    def __init__(self, path):
        """Read a 20B_tokenizer.json (or the same tokenizer saved by transformers)."""
        self.path = path
        try:
            spec = read_json(path)
            if _digest(spec) != DIGEST:
                raise ValueError("its vocabulary, merges, added tokens or rules differ")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: not the GPT-NeoX-20B tokenizer ({error}); `make tokenizer` "
                             "gets it") from None
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        # GPT-2's printable stand-ins of bytes: printable ones stand for themselves.
        to_byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        # tiktoken merges the pair of lowest id first, the original by merge rank: ids follow it.
        tokens = {bytes(to_byte[c] for c in symbols): rank
                  for symbols, rank in spec["model"]["vocab"].items() if symbols not in SPECIAL}
        # The vocabulary has space runs of its own. The added ones always win, so encode never makes
        # them, but decode must know them: tiktoken finds them as specials, which encode ignores.
        shadowed = {" " * n: tokens.pop(b" " * n) for n in range(2, 25) if b" " * n in tokens}
        tokens |= {b" " * n: 50278 - n for n in range(2, 25)}
        self.encoding = tiktoken.Encoding("gpt-neox-20b", pat_str=PATTERN, mergeable_ranks=tokens,
                                          special_tokens=SPECIAL | shadowed)

    def encode(self, text):
        """Return the ids of text; a literal <|endoftext|> or <|padding|> becomes its id."""
        return self.encode_array(text).tolist()

    def encode_lines(self, text):
        """Return encode(text) from a cache of lines, of which prompts have most in common.

        No token reaches over the start of a newline that follows anything but white space.
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
                except ValueError:  # a lone surrogate, or the pattern's engine gave up
                    arrays += self._around_long_runs(part)
        return np.concatenate(arrays)

    def _around_long_runs(self, text):
        """Yield the ids of a text's parts: every cut made here is one of the pattern's own.

        A run of blanks begins a piece, as the rules for other characters never go on into a blank.
        From there BLANK_PIECE takes the pattern's pieces one by one. Where it ends a piece begins
        as well, and the pattern looks ahead but never back.
        """
        for part in LONG_RUN.split(text):
            done = 0
            while piece := BLANK_PIECE.match(part, done):
                yield self.encoding._encode_single_piece(piece[0])
                done = piece.end()
            yield self.encoding.encode(part[done:], disallowed_special=())

    def decode(self, ids):
        """Return ids' text: specials spelled out, broken UTF-8 as U+FFFD, non-ids as nothing."""
        return self.encoding.decode([id_ for id_ in ids if 0 <= id_ < N_TOKENS])

    def token_bytes(self):
        """Return the bytes of each of 2^16 ids of token files; no text has those of specials."""
        return [b"\xff" if id_ in (0, 1) or id_ >= N_TOKENS
                else self.encoding.decode_single_token_bytes(id_) for id_ in range(1 << 16)]

    @staticmethod
    def normalize(text):
        """Return text in the tokenizer's own NFC, as every text is before it is encoded."""
        if text.isascii() or unicodedata.is_normalized("NFC", text):  # so it is in Unicode 9
            return text
        pieces = _NEWER.split(_sort_marks(text))
        pieces[::2] = [unicodedata.normalize("NFC", piece) for piece in pieces[::2]]
        return "".join(pieces)


encode_piece = lru_cache(maxsize=1 << 16)(Tokenizer.encode)


@lru_cache
def load_tokenizer(path):
    """Return the Tokenizer at a path, read once a process."""
    return Tokenizer(path)


def _sort_marks(text):
    """Return text with each run of marks sorted by class, stably, which NFC need not do any more.

    Python's NFC would take the square of a run's length. It sorts after it has decomposed every
    character, to the same end: marks decompose into marks of their own class.
    """
    for char in "\u0f73\u0f75\u0f81":  # the only characters that are no marks but become some
        text = text.replace(char, unicodedata.normalize("NFD", char))
    return _MARKS.sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), text)


def _digest(spec):
    """Return the SHA-256 of what decides the ids in a parsed tokenizer.json, whoever saved it."""
    splitter = spec["pre_tokenizer"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    model = {key: value for key, value in spec["model"].items() if value} | {"merges": merges}
    added = [[token[key] for key in ("id", "content", "single_word", "lstrip", "rstrip")]
             for token in spec["added_tokens"]]
    facts = [spec["normalizer"], splitter["type"], splitter["add_prefix_space"],
             splitter.get("use_regex", True), model, added]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# The original's normaliser knows Unicode 9: to it, a mark that Unicode has added since is an inert
# character, which neither composes nor is reordered. These are all of them, up to Unicode 18.
_NEWER = re.compile("([" + "".join(
    "-".join(chr(int(code, 16)) for code in span.split("-")) for span in """
    5C8-5C9 7FD 897-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA A82C 105C9-105E4 10D24-10F85
    11070 1133B 11382-11391 113C2-113C8 113CE-113D0 1145E 11839-1183A 11935-11A99 11D42-1611E
    16121-1612F 16D63-16FF1 1D127-1D128 1D250-1D281 1E08F-1E6F5""".split()) + "]+)")
# Runs of the marks that it knows, those with a combining class; from U+20000 on there are none.
_MARKS = re.compile("[" + "".join(
    char for char in map(chr, range(0x20000))
    if unicodedata.combining(char) and not _NEWER.match(char)) + "]{2,}")
