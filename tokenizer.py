"""The GPT-NeoX-20B tokenizer of every Pythia model, as a tiktoken encoding.

Source: 20B_tokenizer.json of EleutherAI/pythia (utils/), sha256 56ac4821…c985ade: byte-level BPE
of 50,254 entries, of which 0 is <|endoftext|> and 1 <|padding|>, and 23 added tokens of 24 to
2 spaces (50254 to 50276). tests/test_tokenizer.py holds encode equal to the original's.
"""

import json
import os
import re
import unicodedata

import numpy as np
import tiktoken

ENDOFTEXT = 0  # also Pythia's only beginning of text
N_TOKENS = 50277  # the model's rows above this are padding
SPECIAL = {"<|endoftext|>": 0, "<|padding|>": 1}

# The original first cuts every run of 2 to 24 spaces out of the text, longest and leftmost first,
# and then splits what lies between by GPT-2's pattern, each piece as if it stood alone. In one
# pattern: space runs first, and the whitespace rules must stop before one (a run of spaces ends a
# piece, so `(?!\S)` holds there of itself). All other rules take at most one space, never one of
# two.
PATTERN = "|".join((
    r" {2,24}",
    r"'(?:s|t|re|ve|m|ll|d)",
    r" ?\p{L}+",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    r"(?:(?!  )\s)+(?!\S)",
    r"\s",
))


class Tokenizer:
    """encode(text) -> list of ids; decode(ids) -> text. The same bytes in and out, but for NFC."""

    def __init__(self, path):
        """Read a 20B_tokenizer.json (or the same tokenizer saved by transformers).

        Raises ValueError if it is any other tokenizer, OSError if it cannot be read.
        """
        self.path = path
        try:
            with open(path, encoding="utf8") as file:
                spec = json.load(file)
            ranks, merges = spec["model"]["vocab"], spec["model"]["merges"]
            added = {t["id"]: t["content"] for t in spec["added_tokens"]}
            # tiktoken merges the pair of lowest id first; the original the pair of lowest merge
            # rank. The two agree because ids follow the merges, which is checked here.
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
            sound = (all(ranks[a + b] == 245 + i for i, (a, b) in enumerate(pairs))
                     and len(ranks) == 50254 and len(pairs) == 50009
                     and added == {0: "<|endoftext|>", 1: "<|padding|>"}
                     | {50278 - n: " " * n for n in range(2, 25)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from None
        if not sound:
            raise ValueError(f"{path}: not the GPT-NeoX-20B tokenizer (its vocabulary, merges or "
                             "added tokens differ); `make tokenizer` gets the right one")
        to_byte = _byte_symbols()
        tokens = {bytes(to_byte[c] for c in symbols): rank
                  for symbols, rank in ranks.items() if rank not in added}
        # The vocabulary has space runs of its own. The added ones always win, so encode never makes
        # them, but decode must know them: tiktoken finds them as specials, which encode ignores.
        shadowed = {" " * n: tokens.pop(b" " * n) for n in range(2, 25) if b" " * n in tokens}
        for n in range(2, 25):
            tokens[b" " * n] = 50278 - n
        self.encoding = tiktoken.Encoding("gpt-neox-20b", pat_str=PATTERN, mergeable_ranks=tokens,
                                          special_tokens=SPECIAL | shadowed)

    def encode(self, text):
        """Return the ids of text; a literal <|endoftext|> or <|padding|> becomes its id."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """Return encode(text) as an array; a lone surrogate becomes U+FFFD, as in tiktoken."""
        parts = _SPECIAL_RE.split(text) if "<|" in text else [text]
        arrays = []
        for part in parts:  # specials are cut out before NFC sees their neighbours
            if part in SPECIAL:
                arrays.append(np.array([SPECIAL[part]], dtype=np.uint32))
            elif part:
                part = _nfc(part)
                if not part.isascii():
                    part = part.encode("utf16", "surrogatepass").decode("utf16", "replace")
                arrays.append(self.encoding.encode_to_numpy(part, disallowed_special=()))
        return (np.concatenate(arrays) if len(arrays) > 1 else
                arrays[0] if arrays else np.empty(0, np.uint32))

    def decode(self, ids):
        """Return ids' text: specials spelled out, broken UTF-8 as U+FFFD, non-ids as nothing."""
        return self.encoding.decode([id_ for id_ in ids if 0 <= id_ < N_TOKENS])

    def token_bytes(self):
        """Return the bytes of each of 2^16 ids of token files; no text has those of specials."""
        return [b"\xff" if id_ in (0, 1) or id_ >= N_TOKENS
                else self.encoding.decode_single_token_bytes(id_)
                for id_ in range(1 << 16)]

    @staticmethod
    def normalize(text):
        """Return text in the tokenizer's own NFC, as every text is before it is encoded."""
        return _nfc(text)


def load_tokenizer(path):
    """Return the Tokenizer at a path, or raise ValueError that says where to get one."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such tokenizer; `make tokenizer` gets it, --tokenizer=PATH "
                         "names it")
    return Tokenizer(path)


_SPECIAL_RE = re.compile("(" + "|".join(re.escape(name) for name in SPECIAL) + ")")

# The original's normaliser knows Unicode 9: to it, every mark that Unicode has added since is an
# inert character, which neither composes nor is reordered. These are all of them, up to Unicode 18
# (found by comparing the two on every code point); text is normalised between them.
_NEWER = re.compile("([" + "".join(
    "-".join(chr(int(code, 16)) for code in span.split("-")) for span in """
    5C8-5C9 7FD 897-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA A82C 105C9-105E4 10D24-10F85
    11070 1133B 11382-11391 113C2-113C8 113CE-113D0 1145E 11839-1183A 11935-11A99 11D42-1611E
    16121-1612F 16D63-16FF1 1D127-1D128 1D250-1D281 1E08F-1E6F5""".split()) + "]+)")


def _nfc(text):
    if text.isascii():
        return text
    if not _NEWER.search(text):
        return unicodedata.normalize("NFC", text)
    pieces = _NEWER.split(text)
    pieces[::2] = [unicodedata.normalize("NFC", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _byte_symbols():
    """Map GPT-2's printable stand-in of each byte back to it: printables stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
