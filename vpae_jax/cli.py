"""How programs start and end: flags in, and bad input out in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags, logging

from vpae_jax.types import UserError

EXIT_BAD_INPUT = 2


def launch(main: Callable[[list[str]], None]) -> None:
    """Runs a program under absl. `UserError`, and a flag that does not parse, end it with one line and status 2."""
    try:
        app.run(_without_trace(main), flags_parser=_parse)
    except UserError as error:
        _fail(str(error))


def _without_trace(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # JAX's and Orbax's remarks on every start and save
        try:
            main(argv)
        except UserError as error:
            _fail(str(error))

    return run


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))
    # `ml_collections` reads the config file and its overrides while parsing: a key that does not exist ends here.
    except (AttributeError, KeyError) as error:
        _fail(f"config key {' '.join(str(error).split())}")
    except OSError as error:
        _fail(" ".join(str(error).split()))
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; options are written --name=value")
    return rest


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)
