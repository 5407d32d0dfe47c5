"""What every script begins and ends with: settings, one-line errors, whole files, tables.

    python train.py configs/pythia_70m.py --micro_batch_size=8

A positional argument is a Python file of bare `name = value` lines, a flag is `--name=value`. They
are read in the order given, and a later one wins. Each script declares its settings as frozen
dataclasses, so `--help` simply prints their source. A user's mistake is one line and exit code 2.
"""

import ast
import csv
import dataclasses
import difflib
import fcntl
import hashlib
import inspect
import io
import json
import math
import os
import re
import runpy
import stat
import sys
import time
import typing
from contextlib import contextmanager, suppress
from pathlib import Path

# ---------------------------------------------------------------------------- settings


def parse(argv, *schemas):
    """Return one instance of each dataclass in `schemas`, filled from `argv`.

    All fields together form one flat namespace. Ends the program (see fail) on an unknown name, a
    value of the wrong type, an unreadable file or a missing setting without a default.
    """
    if "--help" in argv or "-h" in argv:
        for kind in [kind for schema in schemas for kind in reversed(schema.__mro__[:-1])]:
            # The fields with their comments are the manual; the methods behind them are not.
            print(inspect.getsource(kind).split("\n    def ")[0].split("\n    @")[0].strip() + "\n")
        sys.exit(0)
    fields = {field.name: field for schema in schemas for field in dataclasses.fields(schema)}
    values = {}
    for argument in argv:
        for name, value in _read(argument).items():
            where = "command line" if argument.startswith("-") else argument
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1) or ["--help"]
                fail(f"{where}: no setting called {name}, did you mean {near[0]}?")
            values[name] = _typed(f"{where}: {name}", value, fields[name].type)
    missing = [f"--{name}" for name, field in fields.items()
               if name not in values and field.default is dataclasses.MISSING]
    if missing:
        fail(f"missing: {', '.join(missing)} (--help explains every setting)")
    try:
        built = [schema(**{name: value for name, value in values.items()
                           if name in schema.__dataclass_fields__}) for schema in schemas]
    except ValueError as error:  # a dataclass refuses a value in __post_init__
        fail(str(error))
    return built[0] if len(built) == 1 else built


def _read(argument):
    """Return {name: value} of a flag or of a config file."""
    name, equals, text = argument.removeprefix("--").partition("=")
    if argument.startswith("--"):
        return {name: text if equals else True}  # --push
    if not argument.endswith(".py"):
        fail(f"command line: found {argument}, expected --name=value or a config file, NAME.py")
    try:
        file_size(argument)
        settings = runpy.run_path(argument)
    except BaseException as error:  # whatever it does wrong, the user reads one line
        words = " ".join(str(error).split())
        fail(f"{argument}: cannot read this config: {type(error).__name__}: {words}")
    return {name: value for name, value in settings.items()
            if not name.startswith("_") and not inspect.ismodule(value)}


def _typed(name, value, hint):
    """Return a value, or what its text says, as a type that `hint` allows: 3e11 fills an int."""
    kinds = typing.get_args(hint) or (hint,)  # str | None has two
    if value == "None" and hint is not str or type(value) is str and str not in kinds:
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if type(value) is float and int in kinds and value.is_integer():
        value = int(value)
    elif type(value) is int and float in kinds:
        value = float(value)
    if type(value) not in kinds or type(value) is float and not math.isfinite(value):
        words = " or ".join(kind.__name__ for kind in kinds)
        fail(f"{name} = {value!r} is not {words}; write --name=value"
             + (", True or False" if bool in kinds else ""))
    return value


def check(settings, expected, holds, *names):
    """Raise ValueError unless holds(value) for each of these settings that is not None."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} = {value!r}, expected {expected}")


def command(argv, commands):
    """Run commands[argv[0]] = (schema, function) on the rest: `prepare.py tokenize --input=a.txt`.

    A third entry names settings that may come without a flag: with "source output", `import A B`
    is `import --source=A --output=B`. A single one takes all that follow, with commas.
    """
    name, *arguments = argv or [""]
    if name in ("--help", "-h"):
        print("commands (COMMAND --help lists its settings):")
        for name, (_, function, *_) in commands.items():
            print(f"  {name:10} {function.__doc__.strip().splitlines()[0]}")
        sys.exit(0)
    if name not in commands:
        fail(f"command line: expected one of {', '.join(commands)}, found {name or 'nothing'}; "
             "--help says what they do")
    schema, function, *names = commands[name]
    if names:
        plain = [argument for argument in arguments if not argument.startswith("-")]
        arguments = [argument for argument in arguments if argument.startswith("-")]
        names = names[0].split()
        if len(plain) > len(names) > 1:
            fail(f"command line: expected {' '.join(names)}, found {' '.join(plain)}")
        if len(names) == 1 and plain:
            plain = [",".join(plain)]
        arguments += [f"--{name}={value}" for name, value in zip(names, plain)]
    run(function, parse(arguments, schema))


# ---------------------------------------------------------------------------- errors


def fail(message):
    """End the program with one line on stderr and exit code 2: a mistake the user can mend.

    torchrun's processes usually all meet this mistake, and it ends the others as soon as the first
    one has spoken. One that lives on after that has met a mistake of its own.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        time.sleep(2)
        message = f"[rank {rank}] {message}"
    print(message, file=sys.stderr)
    sys.exit(2)


def note(line):
    """Print a line on stderr that is no mistake but must be seen; under torchrun the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def run(function, *arguments):
    """Call a script's main function; what only the user can mend ends in one line."""
    try:
        result = function(*arguments)
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # the reader of `... | head` has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        fail(explain(error))
    except (OverflowError, MemoryError, RuntimeError) as error:
        no_memory = re.search("out of memory|(allocate|enough) memory|ALLOC_FAILED", str(error))
        if isinstance(error, RuntimeError) and not no_memory:
            raise  # a fault of ours
        fail("a setting is too large, such as the (micro-)batch: " + str(error).partition("\n")[0])
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


def explain(error):
    """Return the line that a user reads for an exception: an OSError names its file first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).splitlines())


# ---------------------------------------------------------------------------- files


@contextmanager
def expecting(path, what):
    """Raise ValueError saying that `path` is not `what` if anything goes wrong in this block.

    For reading what a stranger wrote: a damaged or hostile file raises whatever it likes.
    """
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).removeprefix(f"{path}: ").split())[:200]
        raise ValueError(f"{path}: not {what} ({type(error).__name__}: {words})") from None


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
        error.filename = error.filename or path  # write() does not name it
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


LOCKS = []  # files that stay open, and so locked, for as long as the process lives


def lock(path):
    """Return a file to append to, locked until it is closed, or raise ValueError if it is."""
    if os.path.exists(path):
        file_size(path)  # refuses a pipe
    file = open(path, "ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path}: another process is writing there; wait for it or name another "
                         "place") from None
    except OSError:  # a file system without locks
        pass
    return file


def sha256_of(path):
    """Return the SHA-256 of a file in hex, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


# ---------------------------------------------------------------------------- tables


def read_csv(path, torn=False):
    """Return the rows {column: cell} of a CSV file, or raise ValueError naming a broken line.

    torn: the file is one that we append to. It may have no rows yet, and a last line without its
    newline was cut by a kill: it is left out.
    """
    file_size(path)  # refuses a pipe
    text = Path(path).read_bytes()
    if torn:
        text = text[:text.rfind(b"\n") + 1]
    text = io.StringIO(text.decode("utf-8-sig", "surrogateescape"), newline="")
    lines, rows, number = csv.reader(text, strict=True), [], 1
    try:
        names = next(lines, [])
        number += 1
        for cells in filter(None, lines):
            rows.append(dict(zip(names, cells, strict=True)))
            number = lines.line_num + 1
    except (ValueError, csv.Error):
        raise ValueError(f"{path}, line {number}: is no row of this CSV file; mend it or move the "
                         "file away") from None
    if not rows and not torn:
        raise ValueError(f"{path}: holds no rows")
    return rows


def csv_lines(rows):
    """Return rows of cells as the bytes of CSV lines; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf8", "surrogateescape")


class Table:
    """A CSV file that one process at a time appends rows to; `rows` are those it had.

    A kill or a full disk can tear only the last line, whose step or evaluation is done again. Rows
    for which keep(row) is false are deleted, because they will be written again. Raises ValueError
    if another line is damaged or the first one does not name the columns.
    """

    def __init__(self, path, columns, keep=lambda row: True):
        self.file, header = lock(path), csv_lines([columns])
        before = Path(path).read_bytes()
        if not header.startswith(before[:len(header)]):  # a kill may have cut it
            raise ValueError(f"{path}, line 1: found {before[:len(header)]!r}, expected "
                             f"{','.join(columns)}; mend it or move the file away")
        rows = read_csv(path, torn=True)
        try:
            self.rows = list(filter(keep, rows))
        except ValueError as error:  # of keep, for a cell that is no number
            raise ValueError(f"{path}: {error}; mend it or move the file away") from None
        text = header + csv_lines(row.values() for row in self.rows)
        if text != before:
            with replacing(os.path.realpath(path)) as file:
                file.write(text)
            self.file = lock(path)

    def append(self, *rows):
        text = csv_lines(rows)
        while text:  # written at once, unless the disk gets full
            text = text[self.file.write(text):]
