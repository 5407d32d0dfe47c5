"""What the model saw at any step, as text, and where it comes from: `view` of data.py."""

import os
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from config import replacing
from data import MASKED, Order, OrderedData, batch_rows, load_npy, order_paths, ordered, read_json
from pile.writer import PROVENANCE
from studies.interventions import IntervenedData, InterventionConfig
from tokenizer import load_tokenizer

# --------------------------------------------------------------------------- where things come from


class Provenance:
    """For each row its documents, for each document its subset, source, and the rows it came in.

    data: OrderedData. A baked order is traced to the token file it was baked from, if that is
    there.
    """

    def __init__(self, data):
        self.data = _baked_from(data) or data
        self.known = not self.data.preshuffled
        self.names = None
        prefix = self.data.tokens.prefix
        if self.known and os.path.exists(f"{prefix}_documents.npy"):
            self.names, self.table = (
                read_json(f"{prefix}.json"), load_npy(f"{prefix}_documents.npy"))
            if (self.table.dtype != PROVENANCE
                    or self.table.shape != (len(self.data.tokens),)
                    or any(not isinstance(self.names.get(key), list)
                           or len(self.names[key]) <= self.table[column].max()
                           for key, column in (("subsets", "subset"), ("files", "file")))):
                raise ValueError(f"{prefix}_documents.npy and {prefix}.json do not belong to "
                                 f"{prefix}.idx ({len(self.data.tokens):,} documents); tokenize "
                                 "again")

    def describe(self, document):
        """Return "subset, file:line" of a document, as far as it is recorded."""
        if self.names is None:
            return "subset not recorded"
        file, line, subset = self.table[document].tolist()
        return f"{self.names['subsets'][subset]}, {self.names['files'][file]}:{line}"

    def appearances(self, document):
        """Return the rows in which each copy of a document has tokens: a sorted list a copy."""
        sample_idx = self.data.order[1]
        begins = lambda sample: sample_idx[sample, 0]
        copies = []
        for position in self._inverse("doc")[document].tolist():
            # From the sample that begins before this place and reaches it, to the last that begins
            # in it.
            first = max(bisect_left(range(len(sample_idx)), position, key=begins) - 1, 0)
            last = min(bisect_right(range(len(sample_idx)), position, key=begins),
                       len(sample_idx) - 1)
            copies.append(sorted(self._inverse("shuffle")[first:last].tolist()))
        return copies

    def rows_of(self, document, offset, length):
        """Yield (row, offset in it) of served rows with `length` tokens of a document whole."""
        sample_idx, sizes = self.data.order[1], self.data.tokens.sizes
        for position in self._inverse("doc")[document].tolist():
            place = (position, offset)
            after = bisect_right(range(len(sample_idx)), place,
                                 key=lambda s: tuple(sample_idx[s].tolist()))
            # A first token of one sample is the last of another.
            for sample in (after - 1, after - 2):
                if not 0 <= sample < len(sample_idx) - 1:
                    continue
                (first, start) = sample_idx[sample].tolist()
                between = self.data.order[0][first:position]
                within = int(sizes[between].sum(dtype=np.int64)) - start + offset
                row = int(self._inverse("shuffle")[sample])
                if (0 <= within and within + length <= self.data.seq_length + 1
                        and row < len(self.data)):
                    yield row, within

    def _inverse(self, name):
        """Return each value's place in doc_idx, (documents, epochs), or shuffle_idx, (samples,).

        Made once, beside the order's own files, so that the next look takes no time.
        """
        cache = self.__dict__.setdefault("_inverses", {})
        if name in cache:
            return cache[name]
        array = self.data.order[0 if name == "doc" else 2]
        path = self.data.order_path.replace("_doc_idx.npy", f"_inverse_{name}_idx.npy")
        if not os.path.exists(path):
            if name == "shuffle":
                inverse = np.empty(len(array), dtype=np.uint32)
                inverse[array] = np.arange(len(array), dtype=np.uint32)
            else:  # every document comes once an epoch
                inverse = np.argsort(array, kind="stable").astype(np.uint32).reshape(
                    len(self.data.tokens), -1)
            with replacing(path) as file:
                np.save(file, inverse)
        inverse = load_npy(path)
        some = np.linspace(0, len(inverse) - 1, 300, dtype=np.int64)
        if inverse.size != len(array) or (
                array[inverse[some].reshape(len(some), -1)] != some[:, None]).any():
            raise ValueError(f"{path}: does not belong to {self.data.order_path}; delete it to "
                             "rebuild")
        cache[name] = inverse
        return inverse


def _baked_from(data):
    """Return the OrderedData a baked file was made from, None unless there, whole, and the same."""
    summary = f"{data.tokens.prefix}.json"
    if not data.preshuffled or not os.path.exists(summary):
        return None
    try:
        job = read_json(summary)["baked_from"]
        order = [int(job["order"][name]) for name in ("seq_length", "num_samples", "seed")]
        # The name comes out of a file: nothing is built beside it, only what is there is read.
        if not all(map(os.path.exists, order_paths(str(job["data"]), *order))):
            return None
        source = OrderedData(str(job["data"]), *order)
    except (KeyError, TypeError, ValueError, OSError):
        return None
    return None if source.preshuffled or source.tokens.n_tokens != job.get("tokens") else source


# ---------------------------------------------------------------------------- view


@dataclass(frozen=True)
class View(InterventionConfig, Order):
    step: str = "0"  # 0-based: the update of step 0 makes checkpoint step1; 3:5 is steps 3, 4 and 5
    rows: str = ""  # which of each step's rows, first:last+1; default: the first four
    # BATCH.npy: write all rows of the steps, (steps * batch_size, seq_length + 1) uint16
    save: str = ""
    tokenizer: str = "20B_tokenizer.json"

    def __post_init__(self):
        Order.__post_init__(self)
        InterventionConfig.__post_init__(self)


def view(options):
    """Print what the model saw at a step: text by document, with subset, source and repeats."""
    first_step, last_step = _range(options.step, "step", inclusive=True)
    first, last = _range(options.rows or f"0:{min(4, options.batch_size)}", "rows", inclusive=False)
    data = ordered(options)
    steps = min(options.steps, len(data) // options.batch_size)
    if last_step >= steps:
        raise ValueError(f"step = {options.step}, but there are {steps:,} steps of "
                         f"{options.batch_size} rows, the last is {steps - 1:,}")
    if last > options.batch_size:
        raise ValueError(f"rows = {options.rows!r}, but a step has {options.batch_size} rows, "
                         f"the last is {options.batch_size - 1}")
    numbers = np.arange(first_step * options.batch_size, (last_step + 1) * options.batch_size)
    shown = f"step {first_step:,}" + (
        f" to {last_step:,} (both included)" if last_step > first_step else "")
    print(f"{shown}: rows {numbers[0]:,} to {numbers[-1]:,} (both included); "
          f"checkpoint step{last_step + 1} is the first to have seen them all")
    tokenizer = load_tokenizer(options.tokenizer)
    served = IntervenedData(data, tokenizer, options) if options.intervention else None
    if options.save:
        return save_steps(options, served or data, range(first_step, last_step + 1))
    provenance = Provenance(data)
    for step in range(first_step, last_step + 1):
        rows = served.step_rows(step, options.batch_size) if served else None
        for row in batch_rows(step, options.batch_size)[0][first:last].tolist():
            place = row - step * options.batch_size
            print(f"\n=== row {row:,} (step {step:,}, row {place})")
            show_row(data, provenance, tokenizer, row, step * options.batch_size)
            if served and place in served.changed:
                padding = (rows[place] == MASKED).sum()
                print(f"--- after {options.intervention}"
                      + (f", {padding:,} tokens of padding" if padding else ""))
                print(tokenizer.decode(rows[place].tolist()))


def save_steps(options, data, steps):
    """Write all rows of the steps as one .npy, a step at a time."""
    # uint16 as the token file; padding that an intervention made is a negative id and wants more.
    dtype = np.dtype("<i4" if options.intervention else "<u2")
    shape = (len(steps) * options.batch_size, options.seq_length + 1)
    with replacing(options.save) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        for step in tqdm(steps, unit="step", disable=None):
            file.write(data.batch(step, options.batch_size).astype(dtype).data)
    print(f"{options.save}: {shape[0]:,} rows of {shape[1]} tokens, {dtype}")


def show_row(data, provenance, tokenizer, row, rows_before):
    """Print a row's documents; each says how many copies had begun before row `rows_before`."""
    ids = data.rows([row])[0]
    # A published preshuffled file is text alone. A baked file is looked up where it came from, if
    # that is the same.
    if not provenance.known or not np.array_equal(provenance.data.rows([row])[0], ids):
        return print(tokenizer.decode(ids.tolist()))
    for document, start, stop in provenance.data.pieces(row):
        copies = provenance.appearances(document)
        seen = sum(rows[0] < rows_before for rows in copies if rows)
        print(f"--- document {document:,} ({provenance.describe(document)}), tokens {start:,} to "
              f"{stop - 1:,} of {provenance.data.tokens.sizes[document]:,}; seen before: {seen} of "
              f"{len(copies)} copies")
        print(tokenizer.decode(provenance.data.tokens.read(document, start, stop).tolist()))


def _range(text, name, inclusive):
    """Return (first, last) of "3" or "3:5"; unless `inclusive`, last is one beyond and 3 is 3:4."""
    if match := re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text):
        first = int(match[1])
        last = int(match[2]) if match[2] else first + (not inclusive)
        if first < last + inclusive:
            return first, last
    raise ValueError(f"{name} = {text!r}, expected a number or first:last"
                     + ("" if inclusive else "+1"))
