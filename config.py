"""What every script here begins and ends with: settings, processes, one-line errors, whole files.

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
import shutil
import stat
import sys
import time
import typing
from contextlib import contextmanager
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
    hints, values = {}, {}
    for schema in schemas:
        hints |= typing.get_type_hints(schema)
    for argument in argv:
        where = "command line" if argument.startswith("-") else argument
        for name, value in _read(argument, hints).items():
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                fail(f"{where}: no setting called {name}"
                     + (f", did you mean {near[0]}?" if near else "; --help lists them all"))
            values[name] = _typed(where, name, value, hints[name])
    missing = [f"--{field.name}" for schema in schemas for field in dataclasses.fields(schema)
               if field.name not in values and field.default is dataclasses.MISSING]
    if missing:
        fail(f"missing: {', '.join(missing)} (--help explains every setting)")
    built = []
    try:
        for schema in schemas:
            mine = values.keys() & typing.get_type_hints(schema)
            built.append(schema(**{name: values[name] for name in mine}))
    except ValueError as error:  # a dataclass refuses a value in __post_init__
        fail(str(error))
    return built[0] if len(built) == 1 else built


def _read(argument, hints):
    """Return {name: value} of a flag or of a config file."""
    if argument.startswith("--"):
        name, equals, text = argument[2:].partition("=")
        hint = hints.get(name)
        if not equals and hint is bool:
            text = "True"  # --push
        elif not equals:
            fail(f"command line: found {argument}, expected --name=value")
        if hint is str or (hint == str | None and text != "None"):
            return {name: text}  # a path may be digits
        try:
            return {name: ast.literal_eval(text)}
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return {name: text}
    if not argument.endswith(".py"):
        fail(f"command line: found {argument}, expected --name=value or a config file ending in "
             ".py")
    try:
        file_size(argument)
        settings = runpy.run_path(argument)
    except BaseException as error:  # whatever it does wrong, the user reads one line
        fail(f"{argument}: cannot read this config: {type(error).__name__}: "
             + " ".join(str(error).split()))
    return {name: value for name, value in settings.items()
            if not name.startswith("_") and not inspect.ismodule(value)}


def _typed(where, name, value, hint):
    """Return `value` as a type that `hint` allows: 3e11 fills an int, 1 a float."""
    kinds = typing.get_args(hint) or (hint,)  # str | None has two
    if type(value) is float and int in kinds and value.is_integer():
        value = int(value)
    elif type(value) is int and float in kinds:
        value = float(value)
    limit = {int: 2**63, float: math.inf}.get(type(value))
    if type(value) in kinds and (limit is None or abs(value) < limit):
        return value
    words = " or ".join({float: "finite float"}.get(kind, kind.__name__) for kind in kinds)
    fail(f"{where}: {name} = {value!r} is not {words}"
         + (": write True or False" if bool in kinds else ""))


def check(settings, expected, holds, *names):
    """Raise ValueError unless holds(value) for each of these settings that is not None."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} = {value!r}, expected {expected}")


def command(argv, commands):
    """Run commands[argv[0]] = (schema, function) on the rest: `prepare.py tokenize --input=a.txt`.

    A third entry names the settings that may come without a flag: "source output" makes
    `import A B` mean `import --source=A --output=B`, and "folders..." joins all with commas.
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
    plain = [argument for argument in arguments if not argument.startswith("-")]
    if names and plain:
        flags = [argument for argument in arguments if argument.startswith("-")]
        if names[0].endswith("..."):
            plain = [",".join(plain)]
        names = names[0].removesuffix("...").split()
        given = [f"--{name}={value}" for name, value in zip(names, plain)]
        arguments = flags + given + plain[len(names):]
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


NO_MEMORY = "out of memory|(allocate|enough) memory|ALLOC_FAILED"  # in torch's RuntimeErrors
MEMORY_SETTINGS = ("micro_batch_size", "batch_tokens", "batch_size")  # the first there is advised


def run(function, *arguments):
    """Call a script's main function; what only the user can mend ends in one line."""
    try:
        result = function(*arguments)
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # the reader of `... | head` has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(explain(error))
    except (OverflowError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error)):
            raise
        lower = [f"; lower --{name}={getattr(settings, name)}" for name in MEMORY_SETTINGS
                 for settings in arguments if hasattr(settings, name)]
        first_line = str(error)[:200].partition("\n")[0]
        fail(f"a setting is too large: {first_line}" + "".join(lower[:1]))
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

# What a cell of a column may be: a count, any number, a text that a line can hold.
COUNT, NUMBER = "[0-9]{1,18}", r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?|nan|-?inf"
TEXT = r"[^\r\n\ud800-\udfff]{0,1000}"


def read_lines(path):
    """Return (bytes, cells) of each line of a CSV file; cells are empty if it is no line of one.

    No cell of ours has a line break, so a damaged line takes no other with it.
    """
    file_size(path)  # refuses a pipe
    lines = []
    with open(path, "rb") as file:
        for line in file:
            try:
                [cells] = csv.reader([line.decode("utf-8-sig").rstrip("\r\n")], strict=True)
                if b'""' not in line and any('"' in cell for cell in cells):
                    cells = []  # a quote inside a cell is written twice
            except (ValueError, csv.Error):
                cells = []
            lines.append((line, cells))
    return lines


def read_csv(path):
    """Return the rows {column: cell} of any CSV file; ValueError names a broken line, or no row."""
    (_, names), *lines = read_lines(path) or [(b"", [])]
    for number, (line, cells) in enumerate(lines, 2):
        if line.strip() and (not names or len(cells) != len(names)):
            raise ValueError(f"{path}, line {number}: {line[:100]!r} is no row of a CSV file with "
                             f"{len(names)} columns")
    if not any(cells for _, cells in lines):
        raise ValueError(f"{path}: holds no rows")
    return [dict(zip(names, cells)) for _, cells in lines if cells]


def write_all(file, text):
    """Write bytes to an unbuffered file: all at once, unless the disk gets full, which names it."""
    try:
        while text:
            text = text[file.write(text):]
    except OSError as error:
        error.filename = file.name
        raise


class Table:
    """A CSV file that one process at a time repairs and appends to; `rows` are those it has.

    columns: {name: pattern of its cells}. A kill or a full disk can tear only the last line, whose
    step or evaluation is done again. A line that is torn or damaged goes, and PATH.damaged is the
    file as it was. Rows that keep(row) is false of go: they will be written again. Raises
    ValueError if the first line does not name the columns.
    """

    def __init__(self, path, columns, keep=lambda row: True):
        self.path, self.columns, self.rows = path, columns, []
        self.header = (",".join(columns) + "\n").encode()
        self.file = lock(path)
        (first, names), *lines = read_lines(path) or [(b"", [])]
        if names != list(columns) and (lines or not self.header.startswith(first)):
            raise ValueError(f"{path}, line 1: found {first[:200]!r}, expected "
                             f"{','.join(columns)}; mend it or move it away")
        for number, (line, cells) in enumerate(lines, 2):
            if (line.endswith(b"\n") and len(cells) == len(columns)
                    and all(map(re.fullmatch, columns.values(), cells))):
                self.rows.append(dict(zip(columns, cells)))
            elif line.strip():
                shutil.copyfile(path, f"{path}.damaged")
                note(f"{path}, line {number} is damaged and goes; {path}.damaged is the file as "
                     f"it was: {line[:200]!r}")
        self.keep(keep)

    def keep(self, holds):
        """Keep the rows that holds(row) is true of, here and in the file."""
        self.rows = list(filter(holds, self.rows))
        text = self.header + b"".join(self.line(row.values()) for row in self.rows)
        if text != Path(self.path).read_bytes():
            with replacing(os.path.realpath(self.path)) as file:
                file.write(text)
            self.file = lock(self.path)

    def append(self, *rows):
        write_all(self.file, b"".join(map(self.line, rows)))

    def line(self, row):
        """Return a row as a line, or raise ValueError for a cell that could not be read again."""
        cells, line = ["" if cell is None else str(cell) for cell in row], io.StringIO()
        for (name, pattern), cell in zip(self.columns.items(), cells, strict=True):
            if not re.fullmatch(pattern, cell):
                raise ValueError(f"{self.path}: cannot hold {name} = {cell[:100]!r}")
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue().encode()
