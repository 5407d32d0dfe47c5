"""Which checkpoint is this really? Hashes, duplicates and breaks in the path the weights took.

    python verify.py verify runs/mini             # or several folders, of any published form
    python verify.py diff runs/mini/step512 OTHER

No model is run, and one tensor at a time is in memory. Every byte is read: hashes are compared with
the manifest, norms are exact. Distances and cosines come from the same 2,048 random entries of a
tensor in every checkpoint (within about 2 %), and no distance is less than the difference of norms.

Training moves through weight space in small steps, so a checkpoint lies between its neighbours:

    step 64 ----- step 128 ----- step 256        its distance to the nearer one, over theirs to each
                                                 other, is about 1/2; noise alone would make it 1
    step 64 ------------------- step 256         weights that belong elsewhere are far from both,
              step 128, of another run           and often near to where they belong

Two neighbours in each other's place stay near; there the path gets shorter once both are exchanged.

Without a manifest not all can be seen: not a few values that changed by less than their tensor
moves between two checkpoints anyway, as after a flipped bit that made one small, and not the biases
and LayerNorms of the checkpoint beside.
"""

import math
import re
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import (checkpoint_steps, files_of, manifest_of, one_line, open_any, read_training,
                         sha256_of, step_folders)
from config import command, file_size, read_json

ENTRIES = 2048  # of every tensor at most; 154 checkpoints of a 12B take 550 MB
BLOCK = 16  # zeros side by side that no matrix of random numbers has
RATIO = 1.5  # a distance over the neighbours' to each other that no honest matrix has
VECTOR_RATIO = 3.0  # the same for biases and LayerNorms, which are noisier
FAR = 0.1  # relative distance that no matrix at either end has from its neighbour by accident
VECTOR_FAR = 3.0  # the same for biases, which grow from 0 at first, and LayerNorms
SAME_INIT = 0.05  # cosine to step 0 of all matrices together; unrelated ones have less than 0.01
EXCHANGED = 1.25  # squared steps of the path over those after an exchange; honest up to 0.7


class Scan:
    """What is known of a checkpoint after its bytes have been read."""

    def __init__(self, step, folder):
        self.step, self.folder = step, folder
        self.updates = step  # successful ones; the first has learning rate 0
        self.config = None  # the ModelConfig; None: the tensors are not those of any Pythia
        self.bytes = 0
        self.hashed = None  # files that agree with the manifest; None: there is no manifest
        self.norms, self.shapes = {}, {}  # of each tensor
        self.samples, self.files = {}, {}  # some of its entries in float32, its file's name
        self.problems = []


def scan(step, folder):
    """Return the Scan of a checkpoint: files against the manifest, then every tensor."""
    found = Scan(step, folder)
    with noting(found, "training.json"):
        found.updates = read_training(folder, step).get("updates", step)
    with ThreadPoolExecutor(1) as hasher:  # while this thread measures: the disk is read once
        hashes = hasher.submit(check_files, found)
        with noting(found):
            found.config, tensors = open_any(folder)
            for name, stored in tensors.items():
                measure(found, name, stored)
                found.bytes += stored.nbytes
        with noting(found):
            hashes.result()
    return found


@contextmanager
def noting(found, name=""):
    """Make what is wrong with a file, or cannot be read, a problem of its checkpoint, no end."""
    try:
        yield
    except OSError as error:  # a broken disk, a name too long, no permission
        name = name or Path(error.filename or ".").name or found.folder.name
        found.problems.append(f"{name}: {error.strerror}")
    except ValueError as error:
        found.problems.append(str(error).removeprefix(f"{found.folder}/"))


def check_files(found):
    """Compare every file with the manifest, and torch.save's archives with their own checksums."""
    with noting(found, "manifest.json"):
        if (found.folder / "manifest.json").exists():
            entries, found.hashed = manifest_of(found.folder), 0
            for name, entry in entries.items():
                check_file(found, name, entry)
            for name in sorted(files_of(found.folder).keys() - entries.keys() - {"manifest.json"}):
                found.problems.append(f"{ascii(name)[1:-1]}: not in the manifest")
        elif (found.folder / "training.json").exists():
            found.problems.append("manifest.json is not there")
    for path in (*found.folder.glob("*.bin"), *found.folder.glob("*.pt")):
        with noting(found, path.name):
            check_archive(path)


def check_archive(path):
    """Raise ValueError unless a torch.save file's records are intact by their own checksums."""
    file_size(path)  # refuses a pipe, from which reading would wait for ever
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save never compresses; a stranger's record could swell without end.
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("compressed records, which torch.save never writes")
            damaged = archive.testzip()
            if damaged:
                raise ValueError(f"checksum of {damaged} is wrong")
    except Exception as error:  # a broken archive raises whatever it likes
        raise ValueError(f"{path}: {one_line(error)}") from None


def check_file(found, name, entry):
    """Compare one file with its entry in the manifest, {"bytes": N, "sha256": HEX}."""
    path = found.folder / name
    with noting(found, name):
        if not path.is_file():
            found.problems.append(f"{name}: in the manifest but not there")
        elif path.stat().st_size != entry.get("bytes"):
            found.problems.append(f"{name}: {path.stat().st_size:,} bytes, the manifest says "
                                  f"{entry.get('bytes')!r}")
        elif sha256_of(path) != entry.get("sha256"):
            found.problems.append(f"{name}: its SHA-256 is not the manifest's")
        else:
            found.hashed += 1


def measure(found, name, stored):
    """Read a tensor; note its norm, some entries and whether it is finite and no part is empty."""
    tensor, zeros = stored.read().reshape(-1), 0
    # The square of any finite float32 fits float64, so a sum that is not finite means NaN or inf.
    square = 0.0
    for chunk in tensor.split(1 << 20):
        if len(stored.shape) == 2 and len(chunk) - chunk.count_nonzero() >= BLOCK:
            blocks = chunk[:len(chunk) // BLOCK * BLOCK].view(-1, BLOCK)
            zeros += BLOCK * (~blocks.any(1)).sum().item()
        chunk = chunk.double()
        square += chunk.dot(chunk).item()
    if not math.isfinite(square):
        broken = tensor.numel() - tensor.isfinite().sum()
        found.problems.append(f"{name}: {broken:,} values are NaN or infinite")
    if zeros:  # such as pages that never reached the disk, or rows that were cut out
        found.problems.append(f"{name}: {zeros:,} values side by side are 0")
    found.norms[name], found.files[name] = math.sqrt(square), stored.path.name
    found.shapes[name], count = stored.shape, tensor.numel()
    if count > ENTRIES:
        generator = torch.Generator().manual_seed(count)
        tensor = tensor[torch.randint(count, (ENTRIES,), generator=generator)]
    found.samples[name] = tensor.float()


def one_model(scans):
    """Return the scans of the commonest model that were read to the end; note those of another."""
    kinds = Counter((here.config, frozenset(here.samples)) for here in scans if here.config)
    if not kinds:
        return []
    (usual, names), _ = kinds.most_common(1)[0]
    for here in scans:
        if here.config not in (None, usual):
            differences = [f"{name} is {value}, the run's {getattr(usual, name)}"
                           for name, value in asdict(here.config).items()
                           if value != getattr(usual, name)]
            here.problems.append(f"another model: {', '.join(differences)}")
    return [here for here in scans if here.config == usual and here.samples.keys() == names]


def distances(scans, name):
    """Return a tensor's norms, (n,), and its distances between any two of n checkpoints, (n, n)."""
    norms = torch.tensor([here.norms[name] for here in scans], dtype=torch.float64)
    stack = torch.stack([here.samples[name] for here in scans]).double()
    apart = torch.cdist(stack, stack, compute_mode="donot_use_mm_for_euclid_dist")
    whole = apart * math.sqrt(math.prod(scans[0].shapes[name]) / stack.shape[1])
    # A value that was not sampled still moves the norm, and the distance is at least that much.
    return norms, whole.maximum((norms[:, None] - norms).abs())


def check_path(scans):
    """Note every checkpoint whose tensors do not belong where it stands; return {step: ratio}.

    scans: of one model, in order. ratio: the largest distance of a tensor to the nearer neighbour,
    over the neighbours' distance to each other.
    """
    if len(scans) < 2:
        return {}
    names = list(scans[0].samples)
    sizes, apart = map(torch.stack, zip(*(distances(scans, name) for name in names)))
    matrix = torch.tensor([len(scans[0].shapes[name]) == 2 for name in names])
    # float16 rounds early steps away, so distances below these floors mean nothing. (Biases begin
    # at 0, where the floor would be 0 too.)
    floors = (1e-3 * sizes).clamp_min(1e-30)
    ratios, noted = {}, set()

    def note(i, which, words):
        far = [name for name, is_far in zip(names, which.tolist()) if is_far]
        if far:
            noted.add(i)
            scans[i].problems.append(f"{_tensors(scans[i], far)} {words}")

    for i in range(len(scans)):
        for j, equal in duplicates(scans, apart, matrix, floors, i):
            note(i, equal, f"equal to step {scans[j].step}'s")
    noted.clear()
    for i, here in enumerate(scans):
        if 0 < i < len(scans) - 1:
            nearer = apart[:, i, [i - 1, i + 1]].amin(1)
            ratio = nearer / apart[:, i - 1, i + 1].clamp_min(floors[:, i])
            far = ratio > torch.where(matrix, RATIO, VECTOR_RATIO)
            ratios[here.step] = ratio.max().item()
            note(i, far, f"up to {ratio.where(far, 0).max():.1f} times as far from steps "
                 f"{scans[i - 1].step} and {scans[i + 1].step} as these are apart")
        elif len(scans) > 2:
            beside = 1 if i == 0 else i - 1
            note(i, too_far(scans, sizes, apart, matrix, floors, i),
                 f"too far from step {scans[beside].step} to stand beside it")
        other, belongs = elsewhere(apart, i, floors[:, i])
        if belongs.any():
            note(i, belongs, f"nearer to step {scans[other].step} and its neighbour than to "
                             "their own")
    for i in range(len(scans) - 1):
        moved = apart[:, i, i + 1] > floors[:, i]
        swapped = exchanged(apart, i) & moved
        # Noise exchanges single tensors, a real exchange nearly all of them.
        if not {i, i + 1} & noted and swapped.sum() >= 0.9 * moved.sum():
            note(i, swapped, f"in the place of step {scans[i + 1].step}'s: the path is shorter "
                             "with both exchanged")
    check_descent(scans, [name for name, is_matrix in zip(names, matrix) if is_matrix])
    return ratios


def too_far(scans, sizes, apart, matrix, floors, i):
    """Return which tensors of the first or last checkpoint are far from the one beside it, (M,)."""
    one, two = (1, 2) if i == 0 else (i - 1, i - 2)
    gap = abs(scans[i].step - scans[one].step) / max(1, abs(scans[one].step - scans[two].step))
    limit = torch.where(matrix, FAR, VECTOR_FAR) * sizes[:, one]
    far = apart[:, i, one] > limit.maximum(3 * max(1, gap) * apart[:, one, two])
    return far & (apart[:, one, two] > floors[:, one])  # steps 0 and 1 are equal


def check_descent(scans, matrices):
    """Note a step 0 from which the next checkpoint does not descend."""
    start, first = scans[0], scans[1]
    cosine = mean([torch.cosine_similarity(start.samples[name], first.samples[name], dim=0)
                   for name in matrices])
    if start.step == 0 and first.step <= 2000 and cosine < SAME_INIT:
        start.problems.append(f"step {first.step} does not descend from it: their cosine is "
                              f"{cosine:.3f}")


def elsewhere(apart, i, floor):
    """Return the place j where checkpoint i fits better, and which matrices do, (M,) bool.

    There it is nearer to j and to one beside j than to the two on either side of its own place. (A
    copy of it standing elsewhere is near too, but what is beside the copy is not.)
    """
    count = apart.shape[1]
    own = apart[:, i, [k for k in range(count) if 1 <= abs(k - i) <= 2]].amin(1)
    best, belongs, nearest = None, torch.zeros(len(apart), dtype=torch.bool), math.inf
    for j in (j for j in range(count) if abs(j - i) > 2):
        beside = [k for k in (j - 1, j + 1) if 0 <= k < count and abs(k - i) > 2]
        if beside:
            there = apart[:, i, j].maximum(apart[:, i, beside].amin(1))
            fits = (RATIO * there < own) & (own > floor)
            if fits.any() and (fits.sum(), -there.sum()) > (belongs.sum(), -nearest):
                best, belongs, nearest = j, fits, there.sum()
    return best, belongs


def exchanged(apart, i):
    """Return whose path is shorter with checkpoints i and i + 1 exchanged, (M,) bool."""
    j, square = i + 1, apart.square()
    keep = swap = torch.zeros(len(apart), dtype=apart.dtype)
    if i > 0:
        keep, swap = keep + square[:, i - 1, i], swap + square[:, i - 1, j]
    if j + 1 < apart.shape[1]:
        keep, swap = keep + square[:, j, j + 1], swap + square[:, i, j + 1]
    return keep > EXCHANGED * swap


def duplicates(scans, apart, matrix, floors, i):
    """Give every earlier checkpoint j and which tensors of checkpoint i are first equal there."""
    left = torch.ones(len(apart), dtype=torch.bool)
    for j in range(i):
        # Before the second update nothing has changed: the first has learning rate 0.
        updates = scans[i].updates, scans[j].updates
        if updates[0] != updates[1] and max(updates) > 1:
            equal = left & (apart[:, i, j] == 0)
            # In float16 LayerNorms stay exactly 1 for many steps. Equal vectors are copies only if
            # they moved away and came back, or if all matrices are equal too.
            away = apart[:, i, j:i].amax(1) > 2 * floors[:, i]
            equal &= matrix | away | equal[matrix].all()
            left &= ~equal
            yield j, equal


def _tensors(found, names):
    """Return "3 of 28 tensors of SHARD (NAME, ...) are"; SHARD: if it is one of several files."""
    files = {found.files[name] for name in names}
    where = f" of {', '.join(sorted(files))}" if files != set(found.files.values()) else ""
    if len(names) == len(found.samples):
        return f"all {len(names)} tensors are"
    example = min(names) + ", ..." * (len(names) > 1)
    return f"{len(names)} of {len(found.samples)} tensors{where} ({example}) are"


# ---------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verify:
    folders: str  # a run (its step0, step1, ... are checked) or checkpoints, separated by commas
    steps: str | None = None  # expected: 0,1,512 or any; default: the run's, else Pythia's 154


def find(folders):
    """Return the run folder or None, and [(step, folder)] in order, of what the user named."""
    paths = [Path(folder) for folder in folders.split(",")]
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder")
    if len(paths) == 1 and step_folders(paths[0]):
        return paths[0], step_folders(paths[0])
    found = []
    for path in paths:
        match = re.fullmatch(r"(?:global_)?step(\d+)", path.resolve().name)
        if not match:
            raise ValueError(f"{path}: neither a run (step0, step1, ... in it, named alone) nor a "
                             "checkpoint called stepN, by which name they are told apart")
        found.append((int(match[1]), path))
    return None, sorted(found)


def scheduled_steps(run, expected):
    """Return the steps of a run's checkpoints that are to be there once it has ended."""
    if expected is None:
        settings = read_json(run / "config.json") if (run / "config.json").exists() else {}
        steps, every = settings.get("steps", 143000), settings.get("checkpoint_every", 1000)
        for number in (steps, every):
            if type(number) is not int or not 1 <= number <= 1 << 30 or steps > 100_000 * every:
                raise ValueError(f"{run}/config.json: steps {steps!r}, checkpoint_every {every!r}: "
                                 "expected a schedule of at most 100,000 checkpoints; --steps=any "
                                 "checks without one")
        # A branch does not have the checkpoint that it began from; its parent has it.
        parent = re.search(r"step(\d{1,9})/*$", str(settings.get("branch_from")))
        return [step for step in checkpoint_steps(steps, every)
                if not parent or step > int(parent[1])]
    if expected == "any":
        return []
    if not re.fullmatch(r"\d+(,\d+)*", expected):
        raise ValueError(f"steps = {expected!r}, expected numbers with commas, or any")
    return [int(step) for step in expected.split(",")]


def verify(options):
    """Check a run: hashes, steps, duplicates, NaN, weights that do not belong where they stand."""
    run, found = find(options.folders)
    problems, there, extent = [], [step for step, _ in found], ""
    wanted = scheduled_steps(run, options.steps) if run or options.steps else []
    ours = options.steps is None and run and (run / "config.json").exists()
    # A run of ours may be under way; a download is expected to be complete.
    if ours and wanted[-1:] > there[-1:]:
        extent = f" up to step {there[-1]} of {wanted[-1]}"
        wanted = [step for step in wanted if step <= there[-1]]
    missing = [step for step in wanted if step not in there]
    if missing:
        listed = ", ".join(map(str, missing[:20])) + ", ..." * (len(missing) > 20)
        problems.append(f"missing {len(missing)} scheduled checkpoints: {listed} (--steps=any if "
                        "they are meant to be)")
    scans = [scan(step, folder) for step, folder in tqdm(found, unit="checkpoint", disable=None)]
    usual = one_model(scans)
    ratios = check_path(usual)
    print_table(scans, usual, ratios)
    problems += [f"step {here.step}: {problem}" for here in scans for problem in here.problems]
    for problem in problems:
        print(problem)
    if bare := sum(here.hashed is None for here in scans):
        print(f"{bare} have no manifest: their files cannot be compared with what was saved")
    print(f"{len(scans)} checkpoints{extent}, {len(problems)} problem{'s' * (len(problems) != 1)}")
    if problems:
        sys.exit(1)


def print_table(scans, usual, ratios):
    """Print a line a checkpoint: its matrices' mean distance and cosine and their largest ratio.

    usual: the checkpoints of one model. Distances are relative to the first one's norm.
    """
    print(f"{'step':>7} {'size':>10} {'hashed':>7} {'norm':>9} {'from first':>10} "
          f"{'to previous':>11} {'between':>7}  problems")
    for here in scans:
        norm = math.sqrt(sum(norm**2 for norm in here.norms.values())) if here.norms else math.nan
        matrices = [name for name, shape in here.shapes.items() if len(shape) == 2]
        distance = cosine = math.nan
        if here in usual:
            place, first = usual.index(here), usual[0].samples
            distance = mean([(here.samples[name] - first[name]).norm() / first[name].norm()
                             for name in matrices])
            if place:
                before = usual[place - 1].samples
                cosine = mean([torch.cosine_similarity(here.samples[name], before[name], dim=0)
                               for name in matrices])
        hashed = "-" if here.hashed is None else f"{here.hashed} ok"
        print(f"{here.step:7} {here.bytes / 1e6:7,.1f} MB {hashed:>7} {number(norm, 9, 3)} "
              f"{number(distance, 10, 4)} {number(cosine, 11, 5)} "
              f"{number(ratios.get(here.step, math.nan), 7, 2)}  {len(here.problems) or '-'}")


def mean(values):
    return float(sum(values) / len(values)) if values else math.nan


def number(value, width, digits):
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:{width},.{digits}f}"


# ---------------------------------------------------------------------------- diff


@dataclass(frozen=True)
class Diff:
    a: str  # a checkpoint folder of any published form
    b: str


def diff(options):
    """Compare two checkpoints tensor by tensor; exit code 1 if they differ."""
    (config_a, a), (config_b, b) = open_any(options.a), open_any(options.b)
    fields = asdict(config_a), asdict(config_b)
    configs = [name for name in fields[0] if fields[0][name] != fields[1][name]]
    for name in configs:
        print(f"config: {name} is {fields[0][name]} and {fields[1][name]}")
    print(f"{'tensor':50} {'shape':>14} {'max |a-b|':>10} {'mean |a-b|':>10} {'|a-b|/|b|':>10}")
    differing = sorted(a.keys() ^ b.keys())
    for name in differing:
        print(f"{name:50} only in {options.a if name in a else options.b}")
    for name in tqdm([name for name in a if name in b], disable=None, leave=False):
        line = f"{name:50} {'x'.join(map(str, a[name].shape)):>14}"
        if a[name].shape != b[name].shape:
            differing.append(name)
            tqdm.write(f"{line} {'x'.join(map(str, b[name].shape)):>14} in {options.b}")
            continue
        largest, total, square, norm, equal = torch.zeros(()).double(), 0.0, 0.0, 0.0, True
        chunks = (stored.read().reshape(-1).split(1 << 20) for stored in (a[name], b[name]))
        for x, y in zip(*chunks):
            x, y = x.double(), y.double()
            delta = (x - y).abs()
            equal = equal and torch.equal(x, y)
            largest = largest.maximum(delta.max())  # Python's max would lose a NaN
            total += delta.sum().item()
            square, norm = square + delta.square().sum().item(), norm + y.square().sum().item()
        if not equal:
            differing.append(name)
        tqdm.write(f"{line} {largest:10.3g} {total / max(1, math.prod(a[name].shape)):10.3g} "
                   + (f"{math.sqrt(square / norm):10.3g}" if norm else f"{'-':>10}"))
    print(f"{len(differing)} of {len(a.keys() | b.keys())} tensors differ"
          + (f", dtypes {_dtypes(a)} and {_dtypes(b)}" if _dtypes(a) != _dtypes(b) else "")
          + (f"; configs differ: {', '.join(configs)}" if configs else ""))
    if differing or configs:
        sys.exit(1)


def _dtypes(tensors):
    names = {str(stored.dtype).removeprefix("torch.") for stored in tensors.values()}
    return "/".join(sorted(names))


if __name__ == "__main__":
    command(sys.argv[1:], {"verify": (Verify, verify, "folders..."), "diff": (Diff, diff, "a b")})
