"""What all scripts share: settings, errors in one line, files written atomically, CSV tables.

    python train.py configs/pythia_70m.py --micro_batch_size=8

A positional argument is a Python file of `name = value` lines, a flag is `--name=value`. They are
read in the order given, and later values win. Each script declares its settings as frozen
dataclasses; `--help` prints their source. A user's mistake ends in one line and exit code 2.
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
import sys
import time
import typing
from contextlib import contextmanager, suppress
from pathlib import Path

# ---------------------------------------------------------------------------- settings


def parse(argv, *schemas):
    """Return one instance of each dataclass in `schemas`, filled from `argv`.

    All fields together form one flat namespace. A mistake in `argv` ends the program (see fail).
    """
    if "--help" in argv or "-h" in argv:
        for kind in [kind for schema in schemas for kind in reversed(schema.__mro__[:-1])]:
            # The fields and their comments are the manual; methods are not printed.
            print(re.split(r"\n    (?:def |@)", inspect.getsource(kind))[0].strip() + "\n")
        sys.exit(0)
    fields = {field.name: field for schema in schemas for field in dataclasses.fields(schema)}
    values = {}
    try:
        for argument in argv:
            if any("\ud800" <= char <= "\udfff" for char in argument):  # os.fsdecode's surrogates
                raise ValueError(f"{ascii(argument)}: not UTF-8, which file names have to be")
            for name, value in _read(argument).items():
                if name not in fields:
                    near = (difflib.get_close_matches(name, fields, n=1) or ["--help"])[0]
                    raise ValueError(f"{argument}: no setting called {name}, did you mean {near}?")
                values[name] = _typed(f"{argument}: {name}", value, fields[name].type)
        missing = [f"--{name}" for name, field in fields.items()
                   if name not in values and field.default is dataclasses.MISSING]
        if missing:
            raise ValueError(f"missing: {', '.join(missing)} (--help explains every setting)")
        built = [schema(**{name: value for name, value in values.items()
                           if name in schema.__dataclass_fields__}) for schema in schemas]
    except (ValueError, OSError) as error:
        fail(error)
    return built[0] if len(built) == 1 else built


def _read(argument):
    """Return {name: value} of a flag or of a config file."""
    if argument.startswith("--"):
        name, equals, text = argument[2:].partition("=")
        return {name: text if equals else True}  # --push
    if not argument.endswith(".py"):
        raise ValueError(f"found {argument}, expected --name=value or a config file, NAME.py")
    file_size(argument)
    with expecting(argument, "a config file"):
        settings = runpy.run_path(argument)
    return {name: value for name, value in settings.items()
            if not name.startswith("_") and not inspect.ismodule(value)}


def _typed(name, value, hint):
    """Return a value, parsed if it is text, as a type that `hint` allows: 3e11 becomes an int."""
    kinds = typing.get_args(hint) or (hint,)  # str | None has two
    with suppress(Exception):  # what cannot be converted is refused below
        if type(value) is str and (str not in kinds or value == "None" and hint is not str):
            value = ast.literal_eval(value)
        if type(value) is float and int in kinds and value.is_integer():
            value = int(value)
        elif type(value) is int and float in kinds:
            value = float(value)
    if type(value) not in kinds or type(value) is float and not math.isfinite(value):
        words = " or ".join(kind.__name__.removesuffix("Type") for kind in kinds)
        raise ValueError(f"{name} = {value!r} is not {words}; write --name=value"
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

    A third entry names settings that may be given without a flag: with "source output", `import A
    B` is `import --source=A --output=B`. If it names only one, that takes all words, with commas.
    """
    name, *arguments = argv or ["nothing"]
    if name in ("--help", "-h"):
        print("commands (COMMAND --help lists its settings):")
        for name, (_, function, *_) in commands.items():
            print(f"  {name:10} {function.__doc__.splitlines()[0]}")
        sys.exit(0)
    if name not in commands:
        fail(f"found {name}, expected --help or a command: {', '.join(commands)}")
    schema, function, *names = commands[name]
    if names:
        names = names[0].split()
        words = [argument for argument in arguments if not argument.startswith("-")]
        if len(names) == 1 and words:
            words = [",".join(words)]
        arguments = [argument for argument in arguments if argument.startswith("-")]
        arguments += [f"--{name}={word}" for name, word in zip(names, words)]
        arguments += words[len(names):]  # too many: parse refuses them
    run(function, parse(arguments, schema))


# ---------------------------------------------------------------------------- errors


def fail(message):
    """Print a message, or an exception's, as one line on stderr and exit with code 2.

    Under torchrun usually all processes meet the same mistake. The others wait, and torchrun ends
    them once the first has exited. One that is still alive then has met a mistake of its own.
    """
    rank, message = os.environ.get("LOCAL_RANK", "0"), str(message)
    if rank != "0":
        time.sleep(2)
        message = f"[rank {rank}] {message}"
    # Python's words, "[Errno 28] No space left on device: 'path'", name the file last.
    message = re.sub(r"\[Errno \S+\] (.+): '([^']+)'$", r"\2: \1", message)
    print(" ".join(message.splitlines()), file=sys.stderr)
    sys.exit(2)


def note(line):
    """Print a warning on stderr, under torchrun in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def run(function, *arguments):
    """Call a script's main function; errors that only the user can correct end in one line."""
    try:
        result = function(*arguments)
        if sys.stdout:  # it may be closed
            sys.stdout.flush()
        return result
    except BrokenPipeError:  # the reader of `... | head` has closed it
        os._exit(141)  # sys.exit would flush stdout again, and print that error
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        fail(error)
    except (OverflowError, MemoryError, RuntimeError) as error:
        no_memory = re.search("out of memory|(allocate|enough) memory|ALLOC_FAILED", str(error))
        if isinstance(error, RuntimeError) and not no_memory:
            raise  # a bug
        fail(f"a setting is too large, such as the (micro-)batch: {error}")
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, the same command continues", file=sys.stderr)
        sys.exit(130)


@contextmanager
def expecting(path, what):
    """Raise ValueError saying that `path` is not `what` if anything goes wrong in this block.

    For reading files from strangers: a damaged or hostile one may raise anything, even SystemExit.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).removeprefix(f"{path}: ").split())[:200]
        raise ValueError(f"{path}: not {what} ({type(error).__name__}: {words})") from None


# ---------------------------------------------------------------------------- files


@contextmanager
def replacing(path):
    """Open a file that replaces `path` only once it is complete and on the disk.

    Raises ValueError if `path` exists and is no regular file: a device or link would be replaced.
    """
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        raise ValueError(f"{path}: not a regular file; name another")
    temporary = f"{path}.{os.getpid()}.tmp"
    os.makedirs(os.path.dirname(temporary) or ".", exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # write() does not name the file, and np.save gives no errno
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(path))
    finally:
        Path(temporary).unlink(missing_ok=True)


LOCKS = []  # files that stay open, and so locked, until the process ends


def lock(path):
    """Return a file to append to, locked until it is closed; raise ValueError if it is locked."""
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
    """Write a JSON file atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path, limit=16 << 20):
    """Return the object in a JSON file, or raise ValueError naming the file.

    limit: bytes. Parsed JSON takes up to 30 times as much memory, and files come from strangers.
    """
    if file_size(path) > limit:
        raise ValueError(f"{path}: {file_size(path):,} bytes, expected at most {limit:,}")
    text = Path(path).read_bytes()
    with expecting(path, "JSON that holds an object"):
        return {**json.loads(text)}


def file_size(path):
    """Return a regular file's bytes, or raise ValueError: a pipe or a device would never end."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file")
    return os.path.getsize(path)


# ---------------------------------------------------------------------------- tables


def read_csv(path, torn=False, keep=lambda row: True):
    """Return the rows {column: cell} of a CSV file, or raise ValueError naming a broken line.

    torn: the file is one that we append to. It may have no rows yet, and a last line without a
    newline is left out, since a kill cut it short. keep(row) says which rows to return.
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
            row = dict(zip(names, cells, strict=True))
            if keep(row):
                rows.append(row)
            number = lines.line_num + 1
    except (ValueError, csv.Error):
        raise ValueError(f"{path}, line {number}: damaged, or not a row of this table; mend it or "
                         "move the file away") from None
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

    Opening it removes rows for which keep(row) is false, and a last line that was cut short by a
    kill or a full disk: that step or evaluation runs again. Raises ValueError if another line is
    damaged, or the first one does not name the columns, or keep(row) raises it.
    """

    def __init__(self, path, columns, keep=lambda row: True):
        self.file, header = lock(path), csv_lines([columns])
        before = Path(path).read_bytes()
        if not header.startswith(before[:len(header)]):  # a kill may have cut it short
            raise ValueError(f"{path}, line 1: found {before[:len(header)]!r}, expected "
                             f"{','.join(columns)}; mend it or move the file away")
        self.rows = read_csv(path, torn=True, keep=keep)
        text = header + csv_lines(row.values() for row in self.rows)
        if text != before:
            with replacing(os.path.realpath(path)) as file:
                file.write(text)
            self.file = lock(path)

    def append(self, *rows):
        text = csv_lines(rows)
        while text:  # one write, unless the disk gets full
            text = text[self.file.write(text):]
