"""Documents to ids beside the tokenizers library, and the search of a token file."""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass

from config import fail
from data import TokenFile
from pile import find as search, prepare
from pile.writer import TokenWriter
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokenize:
    input: str = "data/demo/train.jsonl"
    tokenizer: str = "20B_tokenizer.json"
    rounds: int = 5


def tokenize(options):
    """Time the encoding of documents on one core, in turn with the tokenizers library."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer as Original
    ours, theirs = Tokenizer(options.tokenizer), Original.from_file(options.tokenizer)
    chunks = prepare.chunks(prepare.input_files(options.input), None)
    texts = [record["text"] for chunk, _, _ in chunks
             for _, record in prepare.documents(chunk, fail)]
    contenders = {
        "ours": lambda: [ours.encode_array(text) for text in texts],
        "tokenizers encode": lambda: [theirs.encode(text).ids for text in texts],
        "tokenizers encode_batch_fast": lambda: [
            one.ids for one in theirs.encode_batch_fast(texts)]}
    taken, ids = {who: [] for who in contenders}, {}
    for _ in range(options.rounds):
        for who, encode in contenders.items():
            start = time.perf_counter()
            ids[who] = encode()
            taken[who].append(time.perf_counter() - start)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {size:.1f} MB, one core, {options.rounds} rounds; medians")
    for who in contenders:
        same = all(list(a) == list(b) for a, b in zip(ids["ours"], ids[who]))
        ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken[who]))
        print(f"{who:30} {size / statistics.median(taken[who]):6.2f} MB/s   "
              f"ours is {ratio:5.2f}x   {'same ids' if same else 'OTHER IDS'}")


@dataclass(frozen=True)
class Find:
    data: str = "data/demo/train"
    text: str = "the waters of Shiloah"
    tokens: str = "45190"  # an id that is rare in the demo's text
    gigabytes: float = 2.0
    tokenizer: str = "20B_tokenizer.json"


def find(options):
    """Time the search of a text and of a token on one core and on all."""
    token_file, tokenizer = TokenFile(options.data), Tokenizer(options.tokenizer)
    times = max(1, round(options.gigabytes * 1e9 / 2 / token_file.n_tokens))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writer = TokenWriter(f"{folder}/long", "bench")
        for _ in range(times):
            writer.append(token_file.slice(0, token_file.n_tokens), token_file.sizes)
        writer.finish({})
        counts = search.sample_counts(TokenFile(f"{folder}/long"))
        n_tokens, patterns = times * token_file.n_tokens, {
            f"text {options.text!r}": search.TextPattern(
                options.text.encode(), tokenizer.token_bytes(), counts),
            f"tokens {options.tokens}": search.TokenPattern(
                [int(i) for i in options.tokens.split(",")], counts)}
        for name, pattern in patterns.items():
            for workers in (1, os.cpu_count()):
                start = time.perf_counter()
                found = search.search(f"{folder}/long", n_tokens, pattern, workers)
                seconds = time.perf_counter() - start
                print(f"{name}: {len(found):,} places in {2 * n_tokens / 1e9:.2f} GB, {workers} "
                      f"process(es), {seconds:.2f} s, {2 * n_tokens / 1e9 / seconds:.2f} GB/s")
