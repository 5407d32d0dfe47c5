"""Which checkpoint is this really? Hashes, duplicates, breaks in the weights' path; a run's proof.

    python verify.py verify runs/mini             # or several folders, of any published form
    python verify.py diff runs/mini/step512 OTHER

`train.py --replay` and `--restore` take steps of a run again; what they compare is here too.

No model is run; one tensor at a time is in memory. Hashes are compared with the manifest and norms
are exact. Distances and cosines come from the same 2,048 random entries of a tensor in every
checkpoint (within about 2 %), and no distance is less than the difference of norms.

Training moves through weight space in small steps, so a checkpoint lies between its neighbours. Its
"way" is the sum of its squared distances from both, over the square of theirs from each other:

    step 64 ----- step 128 ----- step 256        1/2 on a straight line, 1 on a random walk, 2 if
                                                 there is nothing but noise
    step 64 ------------------- step 256         far more for weights that belong elsewhere, and at
              step 128, of another run           least 1.4 where two neighbours were exchanged

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
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import (checkpoint_steps, compare_with_manifest, identify, is_whole, moments_of,
                         open_any, open_file, read_manifest, read_training, saved_steps,
                         step_folders, weight_files)
from config import check, command, expecting, file_size, read_csv, read_json, write_json

ENTRIES = 2048  # of every tensor at most; 154 checkpoints of a 12B take 550 MB
BLOCK = 16  # zeros side by side that no matrix of random numbers has
MATRIX_WAY = 2.5  # the longest way of a matrix; of honest runs 1.5 was seen
VECTOR_WAY = 18.0  # of a bias or LayerNorm, which are noisier; 4.6 was seen
MIDDLE_WAY = 1.25  # of half a checkpoint's matrices; 1.0 was seen
END = 6  # first and last may lie this many times as far from the next as the step behind suggests
SAME_RUN = 0.05  # cosine of neighbours, mean of matrices; unrelated ones have less than 0.01


class Scan:
    """What is known of a checkpoint after its bytes have been read."""

    def __init__(self, step, folder):
        self.step, self.folder = step, folder
        self.updates = step  # successful ones; the first has learning rate 0
        self.config = None  # the ModelConfig; None: the tensors are not those of any Pythia
        self.hashed = None  # files that agree with the manifest; None: there is no manifest
        self.norms, self.samples = {}, {}  # of each tensor; some of its entries in float32
        self.shapes, self.bytes = {}, 0
        # Distance from the first checkpoint, cosine with the one before, middle way: check_path's.
        self.place = (math.nan,) * 3
        self.problems = []


def scan(step, folder):
    """Return the Scan of a checkpoint: files against the manifest, then every tensor."""
    found = Scan(step, folder)
    with noting(found, "training.json"):
        found.updates = read_training(folder, step).get("updates", step)
    check_files(found)
    with noting(found):
        found.config, tensors = open_any(folder)
        for name, tensor in tensors.items():
            measure(found, name, tensor)
    return found


@contextmanager
def noting(found, name=""):
    """Note an error of a file as a problem of its checkpoint and go on behind the block."""
    try:
        yield
    except OSError as error:  # a broken disk, a name too long, no permission
        name = name or Path(error.filename or ".").name or found.folder.name
        found.problems.append(f"{name:.50}: {error.strerror}")
    except ValueError as error:
        found.problems.append(str(error).removeprefix(f"{found.folder}/"))


def check_files(found):
    """Compare every file with the manifest, and torch.save's archives with their own checksums."""
    with noting(found, "manifest.json"):
        found.hashed, problems = compare_with_manifest(found.folder)
        found.problems += problems
        if found.hashed is None and (found.folder / "training.json").exists():
            found.problems.append("manifest.json is not there")
    for path in (*found.folder.glob("*.bin"), *found.folder.glob("*.pt")):
        with noting(found, path.name):
            check_archive(path)


def check_archive(path):
    """Raise ValueError unless a torch.save file's records are intact by their own checksums."""
    file_size(path)  # refuses a pipe, from which reading would wait for ever
    with expecting(path, "an intact archive"), zipfile.ZipFile(path) as archive:
        # torch.save never compresses; a stranger's record could swell without end.
        swollen = [record.filename for record in archive.infolist() if record.compress_type]
        if damaged := swollen or archive.testzip():
            raise ValueError(f"wrong checksum, or compressed: {damaged}")


def measure(found, name, tensor):
    """Read a tensor; note its norm, some entries and whether it is finite and no part is empty."""
    found.shapes[name], found.bytes = tensor.shape, found.bytes + tensor.nbytes
    tensor = tensor.reshape(-1)
    # The square of any finite float32 fits float64, so a norm that is not finite means NaN or inf.
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
    if not math.isfinite(norm):
        broken = tensor.numel() - tensor.isfinite().sum()
        found.problems.append(f"{name}: {broken:,} values are NaN or infinite")
    if len(found.shapes[name]) == 2 and len(tensor) - tensor.count_nonzero() >= BLOCK:
        blocks = tensor[:len(tensor) // BLOCK * BLOCK].view(-1, BLOCK)
        if zeros := BLOCK * (~blocks.any(1)).sum().item():  # pages that never reached the disk
            found.problems.append(f"{name}: {zeros:,} values side by side are 0")
    if (count := len(tensor)) > ENTRIES:
        generator = torch.Generator().manual_seed(count)
        tensor = tensor[torch.randint(count, (ENTRIES,), generator=generator)]
    found.norms[name], found.samples[name] = norm, tensor.float()


def one_model(scans):
    """Return the scans of the commonest model that were read to the end; note those of another."""
    kinds = Counter((here.config, frozenset(here.samples)) for here in scans if here.config)
    if not kinds:
        return []
    (usual, names), _ = kinds.most_common(1)[0]
    for here in scans:
        if here.config not in (None, usual):
            other = asdict(here.config).items() - asdict(usual).items()
            here.problems.append(f"another model than the others: {dict(other)}")
    return [here for here in scans if here.config == usual and here.samples.keys() == names]


# ---------------------------------------------------------------------------- the path


class Trajectory:
    """How far n checkpoints of one model, in order, are apart, for each of its M tensors."""

    def __init__(self, scans):
        self.scans, self.names = scans, list(scans[0].samples)
        sizes, self.apart = map(torch.stack, zip(*map(self.distances, self.names)))
        self.matrix = torch.tensor([len(scans[0].shapes[name]) == 2 for name in self.names])
        self.smallest = sizes.nan_to_num(math.inf).amin(1)  # the least norm that each tensor has
        # float16 rounds early steps away, so that distances below these floors mean nothing.
        self.floors = (1e-3 * self.smallest).clamp_min(1e-30)

    def distances(self, name):
        """Return a tensor's norms, (n,), and distances between any two checkpoints, (n, n)."""
        norms = torch.tensor([here.norms[name] for here in self.scans], dtype=torch.float64)
        stack = torch.stack([here.samples[name] for here in self.scans]).double()
        apart = torch.cdist(stack, stack, compute_mode="donot_use_mm_for_euclid_dist")
        count = self.scans[0].shapes[name].numel()
        whole = apart * math.sqrt(count / stack.shape[1])
        # A value that was not sampled still moves the norm: the distance is at least that much.
        return norms, whole.maximum((norms[:, None] - norms).abs())

    def compare(self, i, j):
        """Return checkpoint i's relative distance from j and cosine with it, means of matrices."""
        pairs = [(self.scans[i].samples[name], self.scans[j].samples[name])
                 for name, is_matrix in zip(self.names, self.matrix) if is_matrix]
        distances = [(a - b).norm() / b.norm() for a, b in pairs]
        cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in pairs]
        return float(sum(distances) / len(pairs)), float(sum(cosines) / len(pairs))

    def note(self, i, which, words):
        """Note a problem of checkpoint i's tensors `which`, (M,) bool, if they are any."""
        here, far = self.scans[i], [name for name, is_far in zip(self.names, which) if is_far]
        if far:
            files = weight_files(here.folder)
            of = [path.name for path in files if open_file(path).keys() & set(far)]
            where = f" of {', '.join(of)}" if 0 < len(of) < len(files) else ""
            here.problems.append(f"{len(far)} of {len(self.names)} tensors{where} ({min(far)}"
                                 f"{', ...' * (len(far) > 1)}) are {words}")

    def note_copies(self, i):
        """Note which tensors of checkpoint i are equal to an earlier one's, once each."""
        here, left = self.scans[i], torch.ones(len(self.names), dtype=torch.bool)
        for j, other in enumerate(self.scans[:i]):
            # The first update has learning rate 0, so that only the second changes anything.
            if here.updates == other.updates or max(here.updates, other.updates) < 2:
                continue
            equal = left & (self.apart[:, i, j] == 0)
            # In float16 LayerNorms stay exactly 1 for many steps. Equal vectors are copies only if
            # they moved away and came back, or if all matrices are equal too.
            away = self.apart[:, i, j:i].amax(1) > 2 * self.floors
            equal &= self.matrix | away | equal[self.matrix].all()
            left &= ~equal
            self.note(i, equal, f"equal to step {other.step}'s")

    def note_strays(self):
        """Note the tensors that are off the path; return each checkpoint's middle way of matrices.

        Ways are those of the module's docstring. The first and last checkpoint have one neighbour:
        there it is the squared distance to it, over END**2 times the squared step behind it, scaled
        to the number of training steps between.
        """
        next_to, beyond = (self.apart.diagonal(k, 1, 2).square() for k in (1, 2))
        through = torch.cat((next_to[:, :1], next_to[:, :-1] + next_to[:, 1:], next_to[:, -1:]), 1)
        steps = torch.tensor([float(here.step) for here in self.scans]).diff().clamp_min(1)
        first, last = (END * max(1, gap) for gap in (steps[0] / steps[1], steps[-1] / steps[-2]))
        past = torch.cat((first**2 * next_to[:, 1:2], beyond, last**2 * next_to[:, -2:-1]), 1)
        way = torch.where(past > self.floors[:, None].square(), through / past, 0)
        # One that is out of place makes the way through its neighbours longer too, but by less.
        detour = through - past
        far = (way > torch.where(self.matrix, MATRIX_WAY, VECTOR_WAY)[:, None]) & peaks(detour)
        middle = way[self.matrix].nanmedian(0).values
        relative = detour / self.smallest[:, None].square()
        far |= (middle > MIDDLE_WAY) & peaks(relative[self.matrix].nansum(0)[None])
        for i in range(len(self.scans)):
            self.note(i, far[:, i], "off the path between their neighbours")
        return middle.tolist()


def peaks(values):
    """Return where (M, n) values are no smaller than the two beside them."""
    return values == torch.nn.functional.max_pool1d(values, 3, stride=1, padding=1)


def check_path(scans):
    """Note every checkpoint whose tensors do not belong where it stands, and its place in the path.

    scans: of one model, in order.
    """
    if len(scans) < 2:
        return
    path, cosines = Trajectory(scans), []
    middle = path.note_strays() if len(scans) > 2 else [math.nan] * 2
    for i, here in enumerate(scans):
        path.note_copies(i)
        cosines.append(path.compare(i, max(i - 1, 0))[1])
        here.place = path.compare(i, 0)[0], cosines[i], middle[i]
    for i, here in enumerate(scans):
        beside = [cosines[k] for k in (i, i + 1) if 0 < k < len(scans)
                  and scans[k].step - scans[k - 1].step <= 2000]
        if beside and max(beside) < SAME_RUN:
            here.problems.append("unrelated to the checkpoints beside it: their cosine is "
                                 f"{max(beside):.3f}")


# ---------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verify:
    folders: str  # a run (its step0, step1, ... are checked) or checkpoints, separated by commas
    steps: str | None = None  # expected: 0,1,512 or any; default: the run's, else Pythia's 154

    def __post_init__(self):
        check(self, "any, or numbers with commas", re.compile(r"any|\d+(,\d+)*").fullmatch, "steps")


def find(folders):
    """Return the run folder or None, and [(step, folder)] in order, of what the user named."""
    paths = [Path(folder) for folder in folders.split(",")]
    if len(paths) == 1 and step_folders(paths[0]):
        return paths[0], step_folders(paths[0])
    found = [(identify(path.resolve())[1], path) for path in paths]
    if bad := [path for step, path in found if step is None]:
        raise ValueError(f"{bad[0]}: neither a run (step0, step1, ... in it, named alone) nor a "
                         "checkpoint called stepN, by which name they are told apart")
    return None, sorted(found)


def branch_step(settings):
    """Return the step that a run of these settings branched from; None if it did not."""
    parent = re.search(r"step(\d{1,9})/*$", str(settings.get("branch_from")))
    return parent and int(parent[1])


def missing_steps(run, expected, there):
    """Return which of a run's checkpoints are not there; `expected`: the user's --steps."""
    if expected == "any" or not (run or expected):
        return []
    if expected:
        wanted = map(int, expected.split(","))
    elif not (run / "config.json").exists():  # a download
        wanted = checkpoint_steps(143000)
    else:
        settings = read_json(run / "config.json")
        every, last = settings.get("checkpoint_every"), there[-1]
        if type(every) is not int or not 1 <= every or last > 100_000 * every:
            raise ValueError(f"{run}/config.json: checkpoint_every = {every!r}, expected at most "
                             f"100,000 checkpoints up to step {last}; --steps=any asks for none")
        # A branch does not have the checkpoint that it began from, and a run may be under way.
        parent = branch_step(settings)
        wanted = [step for step in checkpoint_steps(last, every) if parent is None or step > parent]
    return [step for step in wanted if step not in there]


def verify(options):
    """Check a run: hashes, steps, duplicates, NaN, weights that do not belong where they stand."""
    run, found = find(options.folders)
    problems, there = [], [step for step, _ in found]
    if missing := missing_steps(run, options.steps, there):
        listed = ", ".join(map(str, missing[:20])) + ", ..." * (len(missing) > 20)
        problems.append(f"missing {len(missing)} scheduled checkpoints: {listed} (--steps=any if "
                        "they are meant to be)")
    if run and there[-1] > 0 and (run / "metrics.csv").exists():
        try:
            read_chain(run)
        except ValueError as error:
            problems.append(str(error))
    scans = [scan(step, folder) for step, folder in tqdm(found, unit="checkpoint", disable=None)]
    check_path(one_model(scans))
    print_table(scans)
    problems += [f"step {here.step}: {problem}" for here in scans for problem in here.problems]
    for problem in problems:
        print(problem)
    if bare := sum(here.hashed is None for here in scans):
        print(f"{bare} have no manifest: their files cannot be compared with what was saved")
    print(f"{len(scans)} checkpoints up to step {there[-1]}, {len(problems)} problems")
    if problems:
        sys.exit(1)


def print_table(scans):
    """Print a line a checkpoint: how large it is, what was hashed, and its place in the path."""
    print(f"{'step':>7} {'size':>10} {'hashed':>7} {'norm':>9} {'from first':>10} "
          f"{'to previous':>11} {'between':>7}  problems")
    for here in scans:
        hashed = "-" if here.hashed is None else f"{here.hashed} ok"
        norm = math.sqrt(sum(norm**2 for norm in here.norms.values()))
        first, previous, between = here.place
        line = (f"{here.step:7} {here.bytes / 1e6:7,.1f} MB {hashed:>7} {norm:9,.3f} {first:10.4f} "
                f"{previous:11.5f} {between:7.2f}  {len(here.problems) or '-'}")
        print(line.replace("nan", "  -"))


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
                                 "before it, or not to the next checkpoint")
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
    found = []
    for line in open(Path(run) / "launches.jsonl", errors="replace"):
        with suppress(ValueError, TypeError, RecursionError):
            found.append(dict(json.loads(line)))
    if not found:
        raise ValueError(f"{run}/launches.jsonl: does not say how the run was computed")
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
    asked = [word for word in argv if re.match("--(replay|restore)=", word)]
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
        raise ValueError(f"{folder}: has these steps already; move it away or name another "
                         "--out_dir")
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
    code 1 and the first difference. On other hardware or versions losses may differ by TOLERANCE,
    and all but data and learning rates at will. Raises ValueError if a checkpoint is damaged.
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
