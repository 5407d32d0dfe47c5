"""Settings from files and flags: one flat namespace over frozen dataclasses.

    python train.py configs/pythia_70m.py --micro_batch_size=8

A positional argument is a Python file of bare `name = value` lines, a flag is `--name=value`; they
are read in the order given and the later wins. Every dataclass declares and documents its own
settings, so `--help` simply prints their source. A user's mistake is one line and exit code 2.
"""

import ast
import dataclasses
import difflib
import errno
import inspect
import os
import runpy
import stat
import sys
import types
import typing
from contextlib import contextmanager
from pathlib import Path


def fail(message, everywhere=True):
    """End the program with one line on stderr and exit code 2: a mistake the user can mend.

    everywhere: torchrun's processes all meet it, so that the first may speak for them.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank == "0" or not everywhere:
        print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr)
    sys.exit(2)


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
        if error.errno == errno.ENOSPC:  # which says only that some disk is full
            error.filename = path
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


def parse(argv, *schemas):
    """Return one instance of each dataclass in `schemas`, filled from `argv`.

    Raises SystemExit(2), after one line that says what was found and expected, on an unknown name,
    a value of the wrong type, an unreadable file or a missing setting without a default.
    """
    fields = {field.name: (field, schema)
              for schema in schemas for field in dataclasses.fields(schema)}
    assert len(fields) == sum(len(dataclasses.fields(s)) for s in schemas), (
        "two schemas share a name")
    if {"--help", "-h"} & set(argv):
        declared = [kind for schema in schemas for kind in reversed(schema.__mro__)
                    if kind is not object]
        # A declaration is its own manual; what it checks is not.
        print("\n\n".join(inspect.getsource(kind).split("\n    def ")[0].split("\n    @")[0].strip()
                          for kind in declared))
        sys.exit(0)
    values = {}
    for argument in argv:
        if (argument[:2] == "--" and argument[2:] in fields
                and fields[argument[2:]][0].type in (bool, "bool")):
            argument += "=True"  # --push
        where, settings = ("command line", _flag(argument)) if argument.startswith("-") else (
            argument, _file(argument))
        for name, value in settings.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                fail(f"{where}: no setting called {name}"
                     + (f", did you mean {near[0]}?" if near else "; --help lists them all"))
            values[name] = _typed(where, name, value, _types(fields[name]))
    missing = [f"--{name}" for name, (field, _) in fields.items() if name not in values
               and field.default is dataclasses.MISSING]
    if missing:
        fail(f"missing: {', '.join(missing)} (--help explains every setting)")
    try:
        built = [schema(**{n: v for n, v in values.items() if fields[n][1] is schema})
                 for schema in schemas]
    except ValueError as error:  # a dataclass refuses a combination in __post_init__
        fail(str(error))
    return built[0] if len(built) == 1 else built


def command(argv, commands):
    """Run `commands[argv[0]] = (schema, function)` on the rest of `argv`: `data.py view --step=3`.

    A third entry names the settings that may come without a flag: "source output" makes
    `import A B` mean `import --source=A --output=B`, and "folders..." joins all with commas.
    """
    if not argv or argv[0] not in commands:
        listing = "\n".join(f"  {name:10} {function.__doc__.strip().splitlines()[0]}"
                            for name, (_, function, *_) in commands.items())
        if argv and argv[0] in ("--help", "-h"):
            print(f"commands (COMMAND --help lists its settings):\n{listing}")
            sys.exit(0)
        fail(f"command line: expected one of {', '.join(commands)}"
             + (f", found {argv[0]}" if argv else "") + "; --help says what they do")
    schema, function, *names = commands[argv[0]]
    run(function, parse(_named(argv[1:], *names), schema))


def _named(argv, names=None):
    """Return `argv` with its positional arguments as flags, if `names` says which."""
    plain = [argument for argument in argv if not argument.startswith("-")]
    if names is None or not plain:
        return argv
    if names.endswith("..."):
        names, plain = names.removesuffix("..."), [",".join(plain)]
    if len(plain) > len(names.split()):
        fail(f"command line: found {' '.join(plain)}, expected {names}")
    return [argument for argument in argv if argument.startswith("-")] + [
        f"--{name}={value}" for name, value in zip(names.split(), plain)]


def run(function, *arguments):
    """Call a script's main; what only the user can mend (ValueError, OSError) ends in one line."""
    try:
        result = function(*arguments)
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # `... | head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror
             else error.strerror or str(error), everywhere=False)
    except ValueError as error:
        fail(str(error), everywhere=False)
    except (OverflowError, MemoryError) as error:
        fail(f"a setting is too large: {error}", everywhere=False)
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


def _flag(argument):
    name, equals, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
        fail(f"command line: found {argument}, expected --name=value")
    return {name: _Text(value)}


def _file(path):
    if not path.endswith(".py"):
        fail(f"command line: found {path}, expected --name=value or a config file ending in .py")
    try:
        settings = runpy.run_path(path)
    except Exception as error:  # whatever a config file does wrong, the user reads one line
        fail(f"{path}: no such file" if isinstance(error, FileNotFoundError) and not
             os.path.exists(path) else
             f"{path}: cannot read this config: {type(error).__name__}: {error}")
    return {name: value for name, value in settings.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


class _Text(str):
    """A flag's value before its type is known (a config file's values arrive typed)."""


def _types(entry):
    field, schema = entry
    hint = typing.get_type_hints(schema)[field.name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _typed(where, name, value, allowed):
    """Return `value` as an `allowed` type. 3e11 fills an int, 1 a float, None a `str | None`."""
    if isinstance(value, _Text):
        text = str(value)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
        if str in allowed and not (value is None and types.NoneType in allowed):
            value = text  # a path may look like a number
    if int in allowed and type(value) in (int, float) and abs(value) >= 2**63:
        fail(f"{where}: {name} = {value!r} is too large")
    for kind in allowed:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if kind is int and type(value) is float and value.is_integer():
            return int(value)
    expected = " or ".join(kind.__name__ for kind in allowed)
    fail(f"{where}: {name} = {value!r} is not {expected}"
         + (": write True or False" if bool in allowed else ""))
