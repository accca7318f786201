"""What the tests of finding a model share."""

import pytest

from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model

HUGE = 10**12


def refused(path, part=None):
    """The one line with which a model is refused, on being found or on being asked for a part that cannot be read; with
    a part, on its being opened."""
    with pytest.raises(UserError) as error:
        model = find_model(path)
        for name in model.unreadable if part is None else [part]:
            with model.part(name).open():
                pass
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def opened(path, part):
    """The config of a part whose every tensor fits."""
    source = find_model(path).part(part)
    with source.open():
        return source.config


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}
