"""How programs start and end. Bad input ends a program with one line and exit status 2, Ctrl-C with status 130.

Training reads its config through absl's flags, as `ml_collections` requires; the other programs use plain parsers.
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
EXIT_INTERRUPTED = 130  # the status that shells use for Ctrl-C
# Precisions in which networks run and weights are written.
DTYPES = ("float32", "bfloat16")
DTYPE_HELP = "precision of the networks; by default bfloat16 on accelerators, float32 on CPUs"

# Python's messages that absl passes on, and what was expected.
_EXPECTED = {"invalid literal for int()": "a whole number", "could not convert string to float": "a number"}
HELP = {"--help", "-h", "-help", "--helpfull", "--helpshort"}

Main = Callable[[list[str]], None]


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a bad command line like any other bad input.

    It accepts no abbreviations and keeps the docstring's line breaks. Arguments of type `Path` must not be addresses,
    and arguments of type `float` must be finite.

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
    """Parses a finite number. Raises `ArgumentTypeError` for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def local_devices(asked: int | None) -> list[Any]:
    """Returns the first `asked` devices of this process, by default all. Raises `UserError` if it has fewer, or for a
    number below 1."""
    found = jax.local_devices()
    if asked is None:
        return found
    if not 1 <= asked <= len(found):
        raise UserError(f"--devices={asked}: this process has {len(found)}; give a number from 1 to {len(found)}")
    return found[:asked]


def run(main: Main, argv: list[str] | None = None) -> None:
    """Runs a program on its arguments, by default those of the command line; `UserError` ends it with one line."""
    _begin()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _end_interrupted()


def launch(main: Main, check: Callable[[list[str]], None], page: Callable[[list[str]], str]) -> None:
    """Runs a program under absl; `UserError`, or a flag that does not parse, ends it with one line.

    Args:
      check: raises `UserError` for arguments that name an unknown config key.
      page: returns what --help shows after the program's flags: the keys of the config that the arguments name.
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
        logging.set_verbosity(logging.WARNING)  # silences JAX's and Orbax's messages on every start and save
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
    """Rewords absl's message about a value that does not parse, without Python's own wording."""
    for said, expected in _EXPECTED.items():
        where, found, _ = error.removeprefix("flag ").partition(f": {said}")
        if found:
            return f"{where}: expected {expected}"
    return error


def _begin() -> None:
    """Sets up JAX for the machine's accelerators, and prints every `Note` on one line; other warnings are unchanged."""
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
