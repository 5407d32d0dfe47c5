"""Check a run's checkpoints: hashes, duplicates, weights of another step. Prove a run by replay.

    python verify.py verify runs/mini             # or several folders, of any published form
    python verify.py diff runs/mini/step512 OTHER

`train.py --replay` and `--restore` repeat steps of a run; `prove` compares them with the original.

No model is run, and only one tensor at a time is in memory. Norms are exact. Distances come from
the same 2,048 random values of a tensor in every checkpoint (accurate to about 2 %). The table has
a checkpoint's relative distance from the first one and its cosine with the previous one, means of
its matrices, and the median of their detours.

Training moves through weight space in small steps, so a checkpoint lies between its neighbours. The
detour of a tensor is the sum of its squared distances from both neighbours, over the square of the
neighbours' distance from each other:

    step 64 ----- step 128 ----- step 256        1/2 on a straight line, 1 on a random walk, 2 if
                                                 there is nothing but noise
    step 64 ------------------- step 256         far more for weights that belong elsewhere, and at
              step 128, of another run           least 1.4 where two neighbours were exchanged

A tensor is reported if its detour exceeds MATRIX_DETOUR or VECTOR_DETOUR; all of a checkpoint's
tensors are if the median of its matrices exceeds MIDDLE_DETOUR. A stray lengthens its neighbours'
detours too, so of these only the one with the largest numerator minus denominator is reported.

Without a manifest two defects stay hidden: a few values that changed by less than their tensor
moves between two checkpoints, and biases and LayerNorms of a neighbouring checkpoint.
"""

import hashlib
import itertools
import json
import math
import re
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mode

import torch
from torch.nn.functional import max_pool1d, pad
from tqdm import tqdm

from checkpoints import (checkpoint_steps, compare_with_manifest, identify, is_whole, moments_of,
                         open_any, open_file, read_manifest, read_training, saved_steps,
                         step_folders, weight_files)
from config import check, command, expecting, file_size, read_csv, read_json, write_json

SAMPLED = 2048  # values of a tensor, at most; 154 checkpoints of a 12B take 550 MB
BLOCK = 16  # zeros side by side, which a matrix of random numbers does not have
# The longest detours allowed. In honest runs the longest were 1.5, 4.6 and 1.0.
MATRIX_DETOUR = 2.5
VECTOR_DETOUR = 18.0  # of biases and LayerNorms, which are noisier
MIDDLE_DETOUR = 1.25  # of the median of a checkpoint's matrices
FLOOR = 1e-3  # of a tensor's norm: shorter distances may be the rounding of float16
# The first checkpoint may be END times as far from the second as this from the third; likewise at
# the end.
END = 6
SAME_RUN = 0.05  # least cosine of neighbours, mean of matrices; unrelated ones have below 0.01


@contextmanager
def noting(problems, folder):
    """Add an error in this block to a checkpoint folder's problems, and go on behind the block."""
    try:
        yield
    except (OSError, ValueError) as error:
        problems.append(" ".join(str(error).split()).removeprefix(f"{folder}/"))


class Scan:
    """What is known of a checkpoint after all its files have been read."""

    def __init__(self, step, folder):
        self.step, self.folder = step, folder
        self.updates = max(1, step)  # successful ones; the first has learning rate 0
        self.config = None  # the ModelConfig; None: the weights could not be read
        self.hashed = None  # files that agree with the manifest; None: there is no manifest
        self.norms, self.samples = {}, {}  # of each tensor; some of its values in float32
        self.shapes, self.bytes = {}, 0
        # Distance from the first checkpoint, cosine with the one before, detour: see check_path.
        self.place = (math.nan,) * 3
        self.problems = []
        with noting(self.problems, folder):
            self.updates = max(1, read_training(folder, step).get("updates", step))
        with noting(self.problems, folder):
            self.hashed, problems = compare_with_manifest(folder)
            self.problems += [f"{ascii(name)[1:-1]:.200}: {problem}"
                              for name, problem in problems.items()]
            if self.hashed is None and (folder / "training.json").exists():
                self.problems.append("manifest.json is not there")
        for path in (*folder.glob("*.bin"), *folder.glob("*.pt")):
            with noting(self.problems, folder), expecting(path, "an intact archive"):
                file_size(path)  # refuses a pipe, from which reading would wait for ever
                with zipfile.ZipFile(path) as archive:
                    # torch.save never compresses; a stranger's record could swell without end.
                    swollen = [info.filename for info in archive.infolist() if info.compress_type]
                    if damaged := swollen or archive.testzip():
                        raise ValueError(f"wrong checksum, or compressed: {damaged}")
        with noting(self.problems, folder):
            config, tensors = open_any(folder)
            for name, tensor in tensors.items():
                self.measure(name, tensor)
            self.config = config

    def measure(self, name, tensor):
        """Note a tensor's norm, some values, and whether any are NaN, infinite or zero pages."""
        self.shapes[name], self.bytes = tensor.shape, self.bytes + tensor.nbytes
        tensor = tensor.reshape(-1)
        # The square of any finite float32 fits float64, so a norm that is not finite is NaN or inf.
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
        if not math.isfinite(norm):
            broken = tensor.numel() - tensor.isfinite().sum()
            self.problems.append(f"{name}: {broken:,} values are NaN or infinite")
        if len(self.shapes[name]) == 2 and len(tensor) - tensor.count_nonzero() >= BLOCK:
            blocks = tensor[:len(tensor) // BLOCK * BLOCK].view(-1, BLOCK)
            if zeros := BLOCK * (~blocks.any(1)).sum().item():  # pages that never reached the disk
                self.problems.append(f"{name}: {zeros:,} values side by side are 0")
        if (count := len(tensor)) > SAMPLED:
            generator = torch.Generator().manual_seed(count)
            tensor = tensor[torch.randint(count, (SAMPLED,), generator=generator)]
        self.norms[name], self.samples[name] = norm, tensor.float()


def one_model(scans):
    """Return the scans of the most common model, without those that could not be read."""
    read = [here for here in scans if here.config]
    usual = mode([here.config for here in read] or [None])
    for here in read:
        if here.config != usual:
            other = asdict(here.config).items() - asdict(usual).items()
            here.problems.append(f"another model than the others: {dict(other)}")
    return [here for here in read if here.config == usual]


# ---------------------------------------------------------------------------- the path


def distances(scans, name):
    """Return a tensor's norms (n,) and its distances between any two of n checkpoints, (n, n)."""
    norms = torch.tensor([here.norms[name] for here in scans], dtype=torch.float64)
    samples = torch.stack([here.samples[name] for here in scans]).double()
    apart = torch.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist")
    whole = apart * math.sqrt(scans[0].shapes[name].numel() / samples.shape[1])
    # A value that was not sampled still changes the norm: the distance is at least that much.
    return norms, whole.maximum((norms[:, None] - norms).abs())


def strays(apart, floors, matrix, steps):
    """Return where tensors are off the path, (M, n) bool, and the median detour of matrices, (n,).

    apart: distances (M, n, n). The detour is drawn in the module's docstring. For the first and the
    last checkpoint it is the squared distance from the only neighbour, over END**2 times that of
    the next pair (more if the next pair is fewer training steps apart).
    """
    if len(steps) < 3:
        return torch.zeros(apart.shape[:2], dtype=torch.bool), [math.nan] * len(steps)
    near, across = (apart.diagonal(k, 1, 2).square() for k in (1, 2))  # (M, n - 1), (M, n - 2)
    gaps = steps.diff().clamp_min(1)
    first, last = (END * ratio.clamp_min(1) for ratio in (gaps[0] / gaps[1], gaps[-1] / gaps[-2]))
    via = pad(near, (1, 0)) + pad(near, (0, 1))
    direct = torch.cat((first**2 * near[:, 1:2], across, last**2 * near[:, -2:-1]), 1)
    rounding = floors[:, None].square()
    detour, excess = torch.where(direct > rounding, via / direct, 0), (via - direct) / rounding
    # All matrices together, as one more tensor, show neighbours that were exchanged.
    middle = detour[matrix].nanmedian(0).values
    detour = torch.cat((detour, middle[None]))
    excess = torch.cat((excess, excess[matrix].nansum(0)[None]))
    limits = pad(torch.where(matrix, MATRIX_DETOUR, VECTOR_DETOUR), (0, 1), value=MIDDLE_DETOUR)
    # A stray lengthens the way through its neighbours too, but by less.
    off = (detour > limits[:, None]) & (excess == max_pool1d(excess, 3, stride=1, padding=1))
    return off[:-1] | off[-1], middle


def check_path(scans):
    """Note the tensors that do not belong to their step, and each checkpoint's place in the path.

    scans: of one model, in order.
    """
    if len(scans) < 2:
        return
    names, steps = list(scans[0].samples), torch.tensor([float(here.step) for here in scans])
    matrix = torch.tensor([len(scans[0].shapes[name]) == 2 for name in names])
    norms, apart = map(torch.stack, zip(*(distances(scans, name) for name in names)))
    floors = (FLOOR * norms.nan_to_num(math.inf).amin(1)).clamp_min(1e-30)
    off, middle = strays(apart, floors, matrix, steps)
    from_first = (apart[matrix, 0] / norms[matrix, :1]).nanmean(0)
    before, after = norms[matrix, :-1], norms[matrix, 1:]
    between = apart[matrix].diagonal(1, 1, 2)
    cosines = (before**2 + after**2 - between**2) / (2 * before * after)
    cosines = cosines.clamp(-1, 1).nanmean(0)  # rounding errors exceed 1 if one norm is 1e38
    for i, here in enumerate(scans):
        here.place = from_first[i], cosines[i - 1] if i else math.nan, middle[i]
        note_tensors(here, names, off[:, i], "off the path between their neighbours")
        for j, other in enumerate(scans[:i]):
            equal = apart[:, i, j] == 0
            # In float16 LayerNorms stay exactly 1 for many steps. Equal vectors are copies only if
            # they moved away and came back, or if all matrices are equal too.
            returned = apart[:, i, j:i].amax(1) > 2 * floors
            equal &= matrix | returned | equal[matrix].all()
            if equal.any() and here.updates != other.updates:
                note_tensors(here, names, equal, f"equal to step {other.step}'s")
                break
        close = [cosines[k] for k in (i - 1, i)
                 if 0 <= k < len(cosines) and steps[k + 1] - steps[k] <= 2000]
        if close and max(close) < SAME_RUN:
            here.problems.append("unrelated to the checkpoints beside it: their cosine is "
                                 f"{max(close):.3f}")


def note_tensors(here, names, which, words):
    """Note a problem of the tensors `which`, (M,) bool, of a checkpoint, if there are any."""
    if some := list(itertools.compress(names, which)):
        files = weight_files(here.folder)
        of = [path.name for path in files if open_file(path).keys() & set(some)]
        where = f" of {', '.join(of)}" if 0 < len(of) < len(files) else ""
        here.problems.append(f"{len(some)} of {len(names)} tensors{where} ({min(some)}"
                             f"{', ...' * (len(some) > 1)}) are {words}")


# ---------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verify:
    folders: str  # a run (its step0, step1, ... are checked) or checkpoints, separated by commas
    steps: str | None = None  # expected: 0,1,512 or any; default: the run's, else Pythia's 154

    def __post_init__(self):
        check(self, "any, or numbers with commas", re.compile(r"any|\d+(,\d+)*").fullmatch, "steps")


def find(folders):
    """Return the run folder, or None for single checkpoints, and [(step, folder)] in order."""
    paths = [Path(folder) for folder in folders.split(",")]
    if len(paths) == 1 and step_folders(paths[0]):
        return paths[0], step_folders(paths[0])
    found = [(identify(path.resolve())[1], path) for path in paths]
    if bad := [path for step, path in found if step is None]:
        raise ValueError(f"{bad[0]}: neither a run (a folder with step0, step1, ... in it, given "
                         "alone) nor a checkpoint folder named stepN")
    return None, sorted(found)


def missing_steps(run, expected, there):
    """Return which of a run's checkpoints are not there; `expected`: the user's --steps."""
    if expected == "any" or not (run or expected):
        return []
    if expected:
        wanted = map(int, expected.split(","))
    elif not (run / "config.json").exists():  # a download
        wanted = checkpoint_steps(143000)
    else:
        settings, last = read_json(run / "config.json"), there[-1]  # a run may be under way
        with expecting(run / "config.json", "the settings of a run"):
            every = max(settings["checkpoint_every"], last // 100_000)  # 100,000 steps at most
            wanted = checkpoint_steps(last, every)
        parent = identify(settings.get("branch_from"))[1]  # None: it is no branch
        wanted = [step for step in wanted if parent is None or step > parent]
    return [step for step in wanted if step not in there]


def verify(options):
    """Check a run: hashes, missing steps, copies, NaN, weights that belong to another step."""
    run, found = find(options.folders)
    problems, there = [], [step for step, _ in found]
    if missing := missing_steps(run, options.steps, there):
        problems.append(f"missing {len(missing)} scheduled checkpoints: {str(missing[:20])[1:-1]} "
                        "(--steps=any if that is intended)")
    if run and there[-1] > 0 and (run / "metrics.csv").exists():
        with noting(problems, run):
            read_chain(run)
    scans = [Scan(step, folder) for step, folder in tqdm(found, unit="checkpoint", disable=None)]
    check_path(one_model(scans))
    print(f"{'step':>7} {'size':>10} {'hashed':>7} {'norm':>9} {'from first':>10} "
          f"{'to previous':>11} {'detour':>7}  problems")
    for here in scans:
        problems += [f"step {here.step}: {problem}" for problem in here.problems]
        hashed = "-" if here.hashed is None else f"{here.hashed} ok"
        norm = math.sqrt(sum(norm**2 for norm in here.norms.values()))
        distance, cosine, detour = here.place
        line = (f"{here.step:7} {here.bytes / 1e6:7,.1f} MB {hashed:>7} {norm:9,.3f} "
                f"{distance:10.4f} {cosine:11.5f} {detour:7.2f}  {len(here.problems) or '-'}")
        print(line.replace("nan", "  -"))
    for problem in problems:
        print(problem)
    if bare := sum(not (folder / "manifest.json").exists() for _, folder in found):
        print(f"{bare} have no manifest: their files cannot be compared with what was saved")
    print(f"{len(scans)} checkpoints up to step {there[-1]}, {len(problems)} problems")
    if problems:
        sys.exit(1)


# ---------------------------------------------------------------------------- the proof of a run

# Columns of metrics.csv that must be equal when a step is repeated, and their names in messages.
PROVED = {"batch_sha256": "data", "learning_rate": "rate", "loss_scale": "loss scale",
          "loss": "loss", "grad_norm": "gradient"}  # causes before their effects
TOLERANCE = 0.01  # of the loss, relative, where hardware or versions differ
# Of launches.jsonl: what cannot change the numbers.
NOT_COMPUTED = {"started", "command", "host", "device", "check_data", "git_commit"}


def row_digests(batch):
    """Return the SHA-256 of each row of ids (A, B, T + 1), as int32, in A strings of bytes."""
    return [b"".join(hashlib.sha256(row).digest() for row in rows) for rows in batch.astype("<i4")]


def batch_sha256(digests):
    """Return the SHA-256 of a step's rows in order, from the row_digests of every process, by rank.

    Every process has a part of each micro-batch.
    """
    in_order = itertools.chain.from_iterable(zip(*digests))
    return hashlib.sha256(b"".join(in_order)).hexdigest()


def link(before, row):
    """Return a step's digest: SHA-256 of the digest before it, its number and PROVED columns."""
    cells = [before, row["step"], *(row[name] for name in PROVED)]
    return hashlib.sha256(",".join(map(str, cells)).encode()).hexdigest()


def read_chain(run, first=None, last=None):
    """Return {step: row} of the steps first to last - 1 in RUN/metrics.csv, by default of all.

    Raises ValueError at the first step that is missing, whose digest is not that of its line and
    the digest before it, or that contradicts the digest saved with the checkpoint after it.
    """
    path, saved = Path(run) / "metrics.csv", {}  # {step: digest of the steps before it}
    for step, folder in step_folders(run):
        _, digest, state = read_manifest(folder)
        if state:
            saved[step] = digest
    with expecting(path, "a table of all steps and their digests"):
        rows = {int(row["step"]): row for row in read_csv(path, torn=True)}
        digests = {step + 1: row["digest"] for step, row in rows.items()} | saved
        if first is None:
            first, last = min(rows, default=0), max(digests, default=0)
        for step in range(first, last):
            row, before = rows.get(step), digests.get(step)  # none before a branch's first step
            if not row or row["digest"] != digests[step + 1] or before and (
                    link(before, row) != row["digest"]):
                raise ValueError(f"step {step} is not there, or does not follow from the line "
                                 "before it, or contradicts the next checkpoint")
    return {step: rows[step] for step in range(first, last)}


def first_tensor(a, b):
    """Return the name of the first tensor that differs in two checkpoints of ours, or None.

    Moments that --state_every has removed are compared by the manifests' hash of all tensors.
    """
    ours, theirs = (open_any(folder)[1] | moments_of(folder) for folder in (a, b))
    for name in ours:
        # As bytes, since 0 and -0 are equal as numbers.
        if name in theirs and not torch.equal(ours[name].view(torch.uint8),
                                              theirs[name].view(torch.uint8)):
            return name
    hashes = {read_manifest(folder)[2] for folder in (a, b)}
    return "the moments, by their hash" if len(hashes - {None}) > 1 else None


def launches(run):
    """Return the objects in RUN/launches.jsonl, without lines that a full disk cut short."""
    found, path = [], Path(run) / "launches.jsonl"
    file_size(path)  # refuses a pipe
    for line in open(path, errors="replace"):
        with suppress(ValueError, TypeError, RecursionError):
            found.append(dict(json.loads(line)))
    if not found:
        raise ValueError(f"{path}: does not say how the run was computed")
    return found


def differences(before, now, but):
    """Return a line for each name, except `but`, that both objects have with different values."""
    return [f"{name} was {before[name]!r}, is {value!r}" for name, value in now.items()
            if name not in but and before.get(name, value) != value]


@dataclass(frozen=True)
class ProofConfig:
    replay: str | None = None  # RUN/stepA:B: repeat steps A to B of a run and compare them
    restore: str | None = None  # RUN/stepN: make step N again from the full state before it


def last_settings(run, schemas):
    """Return {setting: value} of these dataclasses at the last launch of a run."""
    settings = read_json(Path(run) / "config.json") | launches(run)[-1]
    known = {field.name for schema in schemas for field in fields(schema)}
    return {name: value for name, value in settings.items() if name in known - NOT_COMPUTED}


def repeat_command(argv, schemas):
    """Return the command line that repeats steps of a run and (run, first, last); or argv, None.

    argv: the user's --replay or --restore, and settings of how to compute. Steps first to last - 1
    will be repeated, from the last full state before those asked for. schemas: train.py's.
    """
    asked = [word.rstrip("/") for word in argv if re.match("--(replay|restore)=", word)]
    if not asked:
        return argv, None
    found = re.fullmatch(r"--(replay|restore)=(.+)/step(?:(\d{1,15}):)?(\d{1,15})", asked[-1])
    if len(asked) > 1 or not found or (found[1] == "replay") != bool(found[3]):
        raise ValueError(f"{' '.join(asked)}: expected one --replay=RUN/stepA:B or "
                         "--restore=RUN/stepN")
    run, last = Path(found[2]), int(found[4])
    wanted = int(found[3] or last - 1)
    settings = last_settings(run, schemas)
    states = [identify(settings.get("branch_from"))[1] or 0, *saved_steps(run, state=True)]
    first = max([step for step in states if step <= wanted], default=last)
    if not first <= wanted < last:
        raise ValueError(f"{asked[0]}: expected steps in order, from {states[0]} on" + (
            f"; what came before is in {settings['branch_from']}" if states[0] else ""))
    read_chain(run, first, last)
    settings |= {"out_dir": f"{run}_{found[1]}_{asked[0].rpartition('/')[2].replace(':', '_')}",
                 "twin": False}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [*flags, *argv, f"--stop_at={last}"], (run, first, last)


def begin_again(out_dir, proof):
    """Make the folder of a repetition, with the run's settings and a link to where it begins."""
    (run, first, last), folder = proof, Path(out_dir)
    if folder.resolve() == run.resolve() or last in saved_steps(folder):
        raise ValueError(f"{folder}: already has step{last}; name another --out_dir, or, if it is "
                         "an earlier repetition, move it away")
    if (folder / "config.json").exists():
        return  # the repetition was interrupted and goes on
    folder.mkdir(parents=True, exist_ok=True)
    state, ours = run / f"step{first}", folder / f"step{first}"
    if first and state.exists() and not ours.exists():  # not a branch's first, which its parent has
        ours.symlink_to(state.resolve())
    # Without the data's hashes: if the data changed, the replay names the step that read it.
    write_json(folder / "config.json", {
        name: value for name, value in read_json(run / "config.json").items()
        if name not in ("data_tokens", "data_sha256", "order_sha256")})


def prove(proof, repetition):
    """Compare steps of a run, repeat_command's (run, first, last), with their repetition.

    repetition: the run folder of the repeated steps. Prints that they are proved, or ends with exit
    code 1 and the first difference. On other hardware or versions only data and learning rates must
    be equal, and losses within TOLERANCE. Raises ValueError if a checkpoint is damaged.
    """
    run, first, last = proof
    ours, theirs = read_chain(run, first, last), read_chain(repetition, first, last)
    found = []  # (column of PROVED or "tensors", the line that says it), in order
    for step in range(first, last + 1):
        saved, again = run / f"step{step}", repetition / f"step{step}"
        if saved.exists() and not is_whole(saved):
            raise ValueError(f"{saved}: damaged, a file is missing or cut")
        if saved.exists() and is_whole(again) and not again.is_symlink():
            if tensor := first_tensor(saved, again):
                found.append(("tensors", f"step{step}: weights or moments differ, first {tensor}"))
        for name, what in PROVED.items() if step < last else ():
            before, now = ours[step][name], theirs[step][name]
            if before != now:
                found.append((name, f"step {step}: {what} differs, {before}, again {now}"))
    if not found:
        print(f"steps {first} to {last} proved: {last - first} equal to the bit")
        return
    launched = itertools.product(launches(run), launches(repetition))
    others = {words for before, now in launched for words in differences(before, now, NOT_COMPUTED)}
    differing = {name for name, _ in found}
    apart = max(abs(float(theirs[step]["loss"]) / float(ours[step]["loss"]) - 1) for step in ours)
    if (not others or differing == {"tensors"} or differing & {"batch_sha256", "learning_rate"}
            or not apart <= TOLERANCE):
        print(found[0][1])
        sys.exit(1)
    print(f"steps {first} to {last}: the same data and learning rates, losses within {apart:.2g} "
          f"of them (at most {TOLERANCE} is allowed). Bits differ, as they may with "
          f"{', '.join(sorted(others))}; {found[0][1]}")


# ---------------------------------------------------------------------------- diff


@dataclass(frozen=True)
class Diff:
    a: str  # a checkpoint folder of any published form
    b: str


def diff(options):
    """Compare two checkpoints tensor by tensor; exit code 1 if they differ."""
    (config_a, a), (config_b, b) = open_any(options.a), open_any(options.b)
    for name, value in asdict(config_a).items():
        if value != getattr(config_b, name):
            print(f"config: {name} is {value} and {getattr(config_b, name)}")
    print(f"{'tensor':50} {'shape':>14} {'max |a-b|':>10} {'mean |a-b|':>10} {'|a-b|/|b|':>10}")
    both = [name for name in a if name in b and a[name].shape == b[name].shape]
    differing = sorted((a.keys() | b.keys()) - set(both))
    for name in differing:
        print(f"{name:50} is not in both in one shape")
    for name in tqdm(both, disable=None, leave=False):
        x, y = a[name].double(), b[name].double()
        if not torch.equal(x, y):
            differing.append(name)
        norm, delta = y.norm(), (x - y).abs()
        relative = f"{delta.norm() / norm:10.3g}" if norm else f"{'-':>10}"
        tqdm.write(f"{name:50} {'x'.join(map(str, x.shape)):>14} {delta.max():10.3g} "
                   f"{delta.mean():10.3g} {relative}")
    print(f"{len(differing)} of {len(a.keys() | b.keys())} tensors differ")
    if differing or config_a != config_b:
        sys.exit(1)


if __name__ == "__main__":
    command(sys.argv[1:], {"verify": (Verify, verify, "folders"), "diff": (Diff, diff, "a b")})
