"""How programs start and end: arguments in, and bad input out in one line with exit status 2; Ctrl-C with 130.

Training reads its config through absl's flags, as `ml_collections` asks; the other programs have plain parsers.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from vpae_jax.config_files import resolved
from vpae_jax.files import local_path
from vpae_jax.runtime import platforms
from vpae_jax.types import Note, UserError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended
# Precisions that networks run in and that weights are written in.
DTYPES = ("float32", "bfloat16")
DTYPE_HELP = "precision of the networks; by default bfloat16 on accelerators, float32 on processors"

# What absl passes on of Python, and what it means.
_EXPECTED = {"invalid literal for int()": "a whole number", "could not convert string to float": "a number"}
HELP = {"--help", "-h", "-help", "--helpfull", "--helpshort"}

Main = Callable[[list[str]], None]


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as any other bad input; takes no abbreviations and keeps the docstring's lines. Its
    arguments of type `Path` are no addresses, those of type `float` no infinities.

    Args:
      prog: the command, for the help.
      description: the program's docstring.
    """

    def __init__(self, prog: str, description: str | None):
        kept: Any = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=kept, allow_abbrev=False)
        self.register("type", Path, local_path)
        self.register("type", float, finite)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def finite(text: str) -> float:
    """A number. Raises `ArgumentTypeError` for one that is infinite, or none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def local_devices(asked: int | None) -> list[Any]:
    """The first so many devices of this process, by default all. Raises `UserError` for more than it has, or none."""
    found = jax.local_devices()
    if asked is None:
        return found
    if not 1 <= asked <= len(found):
        raise UserError(f"--devices={asked}: this process has {len(found)}; ask for as many at most, and at least 1")
    return found[:asked]


def run(main: Main, argv: list[str] | None = None) -> None:
    """Runs a program on its arguments, by default the command line's; `UserError` ends it with one line."""
    _begin()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _end_interrupted()


def launch(main: Main, check: Callable[[list[str]], None], page: Callable[[list[str]], str]) -> None:
    """Runs a program under absl; `UserError`, and a flag that does not parse, end it with one line.

    Args:
      check: raises `UserError` for arguments that name no key of their config.
      page: what --help shows of the config that the arguments name, after the program's flags.
    """
    _begin()

    def parse(argv: list[str]) -> list[str]:
        if HELP & set(argv):
            print(f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}\n{page(argv)}")
            sys.exit(0)
        check(argv)
        return _parse(resolved(argv))

    try:
        app.run(_without_trace(main), flags_parser=parse)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _end_interrupted()


def _without_trace(main: Main) -> Main:
    def call(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # JAX's and Orbax's remarks on every start and save
        try:
            main(argv)
        except UserError as error:
            _fail(str(error))

    return call


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(_in_words(str(error)))
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; options are written --name=value")
    return rest


def _in_words(error: str) -> str:
    """What absl says of a value that does not parse, without Python's own words."""
    for said, expected in _EXPECTED.items():
        where, found, _ = error.removeprefix("flag ").partition(f": {said}")
        if found:
            return f"{where}: expected {expected}"
    return error


def _begin() -> None:
    """Prepares for the machine's accelerators, and shows every `Note` in one line; other warnings stay as they are."""
    platforms.prepare(os.environ, platforms.found())
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Note):
            print(f"note: {message}", file=sys.stderr)
        else:
            others(message, category, *where, **more)

    warnings.showwarning = show
    warnings.simplefilter("always", Note)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def _end_interrupted() -> NoReturn:
    print("interrupted; what was saved is kept", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)
