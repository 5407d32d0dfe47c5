"""What every script here begins and ends with: settings, processes, one-line errors, whole files.

    python train.py configs/pythia_70m.py --micro_batch_size=8

A positional argument is a Python file of bare `name = value` lines, a flag is `--name=value`. They
are read in the order given, and a later one wins. Each script declares its settings as frozen
dataclasses, so `--help` simply prints their source. A user's mistake is one line and exit code 2.
"""

import ast
import dataclasses
import difflib
import errno
import inspect
import json
import os
import runpy
import stat
import sys
import types
import typing
from contextlib import contextmanager
from pathlib import Path

# ---------------------------------------------------------------------------- settings


def parse(argv, *schemas):
    """Return one instance of each dataclass in `schemas`, filled from `argv`.

    All fields together form one flat namespace. Ends the program (see fail) on an unknown name, a
    value of the wrong type, an unreadable file or a missing setting without a default.
    """
    owners = {field.name: schema for schema in schemas for field in dataclasses.fields(schema)}
    allowed = {name: hint for schema in schemas
               for name, hint in typing.get_type_hints(schema).items()}
    assert len(owners) == sum(len(dataclasses.fields(schema)) for schema in schemas), (
        "two schemas share a name")
    if "--help" in argv or "-h" in argv:
        _print_help(schemas)
        sys.exit(0)
    values = {}
    for argument in argv:
        if argument.startswith("-"):
            if allowed.get(argument[2:]) is bool:
                argument += "=True"  # --push
            where, settings = "command line", _read_flag(argument)
        else:
            where, settings = argument, _read_config(argument)
        for name, value in settings.items():
            if name not in owners:
                near = difflib.get_close_matches(name, owners, n=1)
                fail(f"{where}: no setting called {name}"
                     + (f", did you mean {near[0]}?" if near else "; --help lists them all"))
            values[name] = _typed(where, name, value, allowed[name])
    missing = [f"--{field.name}" for schema in schemas for field in dataclasses.fields(schema)
               if field.name not in values and field.default is dataclasses.MISSING]
    if missing:
        fail(f"missing: {', '.join(missing)} (--help explains every setting)")
    try:
        built = [schema(**{name: value for name, value in values.items() if owners[name] is schema})
                 for schema in schemas]
    except ValueError as error:  # a dataclass refuses a combination in __post_init__
        fail(str(error))
    return built[0] if len(built) == 1 else built


def command(argv, commands):
    """Run `commands[argv[0]] = (schema, function)` on the rest: `prepare.py tokenize --input=a.txt`.

    A third entry names the settings that may come without a flag: "source output" makes
    `import A B` mean `import --source=A --output=B`, and "folders..." joins all with commas.
    """
    if not argv or argv[0] not in commands:
        if argv and argv[0] in ("--help", "-h"):
            print("commands (COMMAND --help lists its settings):")
            for name, (_, function, *_) in commands.items():
                print(f"  {name:10} {function.__doc__.strip().splitlines()[0]}")
            sys.exit(0)
        fail(f"command line: expected one of {', '.join(commands)}"
             + (f", found {argv[0]}" if argv else "") + "; --help says what they do")
    schema, function, *names = commands[argv[0]]
    run(function, parse(_with_flags(argv[1:], *names), schema))


def check(settings, expected, holds, *names):
    """Raise ValueError unless holds(value) for each of these settings that is not None."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} = {value!r}, expected {expected}")


def _print_help(schemas):
    kinds = [kind for schema in schemas for kind in reversed(schema.__mro__) if kind is not object]
    for kind in kinds:  # the fields with their comments, not the methods behind them
        print(inspect.getsource(kind).split("\n    def ")[0].split("\n    @")[0].strip() + "\n")


def _with_flags(argv, names=""):
    """Return `argv` with its positional arguments as flags, in the order of `names`."""
    flags = [argument for argument in argv if argument.startswith("-")]
    plain = [argument for argument in argv if not argument.startswith("-")]
    if not names:
        return argv
    if names.endswith("...") and plain:
        names, plain = names.removesuffix("..."), [",".join(plain)]
    if len(plain) > len(names.split()):
        fail(f"command line: found {' '.join(plain)}, expected {names}")
    return flags + [f"--{name}={value}" for name, value in zip(names.split(), plain)]


class _Text(str):
    """A flag's value before its type is known (a config file's values arrive typed)."""


def _read_flag(argument):
    name, equals, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
        fail(f"command line: found {argument}, expected --name=value")
    return {name: _Text(value)}


def _read_config(path):
    if not path.endswith(".py"):
        fail(f"command line: found {path}, expected --name=value or a config file ending in .py")
    if not os.path.exists(path):
        fail(f"{path}: no such file")
    try:
        settings = runpy.run_path(path)
    except Exception as error:  # whatever a config file does wrong, the user reads one line
        fail(f"{path}: cannot read this config: {type(error).__name__}: {error}")
    return {name: value for name, value in settings.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def _typed(where, name, value, hint):
    """Return `value` as a type that `hint` allows: 3e11 fills an int, 1 a float."""
    kinds = typing.get_args(hint) or (hint,)  # str | None has two
    if isinstance(value, _Text):
        text = str(value)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
        if str in kinds and not (value is None and types.NoneType in kinds):
            value = text  # a path may look like a number
    if int in kinds and type(value) in (int, float) and abs(value) >= 2**63:
        fail(f"{where}: {name} = {value!r} is too large")
    for kind in kinds:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if kind is int and type(value) is float and value.is_integer():
            return int(value)
    fail(f"{where}: {name} = {value!r} is not {' or '.join(kind.__name__ for kind in kinds)}"
         + (": write True or False" if bool in kinds else ""))


# ---------------------------------------------------------------------------- errors


def fail(message, everywhere=True):
    """End the program with one line on stderr and exit code 2: a mistake the user can mend.

    everywhere: all of torchrun's processes meet this mistake, so the first one speaks for them.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank == "0" or not everywhere:
        print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr)
    sys.exit(2)


def run(function, *arguments):
    """Call a script's main function; what only the user can mend ends in one line."""
    try:
        result = function(*arguments)
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        fail(explain(error), everywhere=False)
    except (OverflowError, MemoryError) as error:
        fail(f"a setting is too large: {error}", everywhere=False)
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


def explain(error):
    """Return the line that a user reads for an exception: an OSError names its file first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


# ---------------------------------------------------------------------------- files


@contextmanager
def replacing(path):
    """Open a file that takes the place of `path` only once it is complete and on the disk.

    Raises ValueError if `path` is there and no regular file: a device or link would be replaced.
    """
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError(f"{path}: not a regular file; name another")
    temporary = f"{path}.{os.getpid()}.tmp"
    os.makedirs(os.path.dirname(temporary) or ".", exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # which by itself says only that some disk is full
            error.filename = path
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file that appears whole."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path, limit=16 << 20):
    """Return the object in a JSON file, or raise ValueError naming the file.

    limit: bytes. Parsed JSON takes up to 30 times as much memory, and files come from strangers.
    """
    if file_size(path) > limit:
        raise ValueError(f"{path}: {file_size(path):,} bytes, expected at most {limit:,}")
    try:
        value = json.loads(Path(path).read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def file_size(path):
    """Return a regular file's bytes, or raise ValueError: a pipe or a device would never end."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file")
    return status.st_size


# ---------------------------------------------------------------------------- processes


class Processes:
    """This process among those that torchrun started; alone, it is rank 0 of 1.

    device: "auto", "cpu" or "cuda". timeout: a timedelta, how long a process may wait for another;
    None is torch's default.
    """

    def __init__(self, device="auto", timeout=None):
        import torch  # here, since commands that only read token files start faster without
        import torch.distributed as dist
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device = {device!r}, expected auto, cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda', but this torch sees no GPU; "
                             "--device=cpu computes without")
        if device != "cpu" and torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            if on_this_node > 1:  # torchrun leaves one thread to each
                torch.set_num_threads(max(1, os.cpu_count() // on_this_node))
        if self.count > 1:
            # What hosts exchange goes over gloo, past the GPUs, which need not stop for it.
            backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=timeout)

    def mean(self, values):
        """Return the mean over processes of a tensor's values, as a list; waits for the device."""
        import torch.distributed as dist
        values = values.double()
        if self.count > 1:
            dist.all_reduce(values)
        return (values / self.count).tolist()

    def any(self, flag):
        """Return whether the flag is true on one process at least."""
        import torch
        import torch.distributed as dist
        if self.count == 1:
            return bool(flag)
        flag = torch.tensor(float(flag))  # on the host: over gloo
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def gather(self, value):
        """Return a list of every process's value, any picklable object, by rank."""
        import torch.distributed as dist
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)  # on the host, over gloo
        return values

    def together(self, act, first_alone=False):
        """Return act() of this process, once all have done it; first_alone: the others only wait.

        A user's mistake in one process ends all of them, and the first one tells it.
        """
        result = problem = None
        try:
            if self.rank == 0 or not first_alone:
                result = act()
        except (ValueError, OSError) as error:
            problem = explain(error)
        problems = [words for words in self.gather(problem) if words]
        if problems and self.rank > 0:
            sys.exit(2)
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return result
