"""Equal and nearly equal documents removed, as the deduplicated Pile: MinHash LSH at Jaccard 0.87.

The command `dedup` of data.py. On one machine and in memory (about 1 kB a document that stays); the
README names a pipeline for more.
"""

import csv
import hashlib
import io
import json
import os
from dataclasses import dataclass

from tqdm import tqdm

from config import replacing
from pile.prepare import chunks, documents, input_files


@dataclass(frozen=True)
class Dedup:
    input: str  # as for tokenize
    output: str  # .jsonl of the documents that stay, in their order
    # CSV of what was removed and which document stands for it; default OUTPUT.removed.csv
    report: str = ""
    near: bool = True  # also near duplicates; False: equal texts only
    # Jaccard similarity of the sets of words' n-grams, as the deduplicated Pile's
    threshold: float = 0.87
    ngram: int = 5  # words
    # of MinHash: the similarity's standard error is at most 1 / (2 sqrt(permutations))
    permutations: int = 128

    def __post_init__(self):
        if not (0 < self.threshold <= 1 and self.ngram >= 1 and self.permutations >= 16):
            raise ValueError(f"threshold = {self.threshold}, ngram = {self.ngram}, permutations = "
                             f"{self.permutations}: expected 0 < threshold <= 1, ngram >= 1, "
                             "permutations >= 16")


def dedup(options):
    """Remove equal and nearly equal documents; the first of each cluster stays."""
    # exact: digest of a text -> (who stands for it, kind, similarity)
    exact, kept, rows, clusters = {}, 0, [], {}
    similar = _Near(options) if options.near else None
    paths = input_files(options.input)
    report = options.report or f"{options.output}.removed.csv"
    if ({os.path.realpath(options.output), os.path.realpath(report)}
            & set(map(os.path.realpath, paths))):
        raise ValueError(f"output = {options.output}, report = {report}: one of the inputs, name "
                         "another")
    with (replacing(options.output) as output,
          tqdm(total=sum(map(os.path.getsize, paths)), unit="B", unit_scale=True,
               disable=None) as bar):
        for chunk, _, advance in chunks(paths, None):
            for line, record in documents(chunk, _refuse):
                place = f"{chunk[1]}:{line}"
                digest = hashlib.sha256(record["text"].encode("utf8", "surrogatepass")).digest()
                first, kind, similarity = exact.get(digest, (None, "near", 0.0))
                if first is None and similar:
                    first, similarity = similar.find_or_add(place, record["text"])
                if first is None:
                    kept += 1
                    output.write(json.dumps(record).encode() + b"\n")
                    exact[digest] = place, "equal", 1.0
                else:
                    clusters[first] = clusters.get(first, 1) + 1
                    rows.append((place, first, kind, f"{similarity:.3f}"))
                    exact[digest] = first, kind, similarity
            bar.update(advance)
        if not kept:
            raise ValueError(f"{options.input}: holds no documents")
    with replacing(report) as file:
        text = io.StringIO()
        csv.writer(text).writerows([("removed", "stands_for_it", "kind", "similarity"), *rows])
        file.write(text.getvalue().encode())
    equal = sum(row[2] == "equal" for row in rows)
    print(f"{options.output}: {kept:,} documents stay, {len(rows):,} removed ({equal:,} of them "
          f"equal), {len(clusters):,} clusters, the largest of "
          f"{max(clusters.values(), default=1):,}; {report}")


def _refuse(message):
    raise ValueError(message)


class _Near:
    """MinHash LSH over documents that stay, by datasketch; candidates are held to the threshold.

    The weights prefer candidates too many to candidates missed: at similarity 0.87 it finds 88 % of
    the pairs, at 0.9 96 % (datasketch's own balance: 45 % and 68 %).
    """

    def __init__(self, options):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ValueError("near duplicates need datasketch: pip install datasketch; or "
                             "--near=False") from None
        self.options, self.hashes = options, {}
        self.minhash = lambda: MinHash(num_perm=options.permutations, seed=1)
        self.index = MinHashLSH(threshold=options.threshold, num_perm=options.permutations,
                                weights=(0.1, 0.9))

    def find_or_add(self, place, text):
        """Return (place of the most similar document that stays, similarity), or (None, 0) and keep
        this one.
        """
        words, n = text.split(), self.options.ngram
        minhash = self.minhash()
        minhash.update_batch({" ".join(words[i:i + n]).encode("utf8", "surrogatepass")
                              for i in range(max(1, len(words) - n + 1))})
        candidates = [(minhash.jaccard(self.hashes[key]), key) for key in self.index.query(minhash)]
        similarity, first = max(candidates, default=(0.0, None))
        if similarity >= self.options.threshold:
            return first, similarity
        self.index.insert(place, minhash)
        self.hashes[place] = minhash
        return None, 0.0
