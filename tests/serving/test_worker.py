"""When clips are made: while the user types, or by a button."""

import pytest

from vpae_jax.serving.worker import MAX_TYPING_SECONDS, decide


@pytest.mark.parametrize(
    ("seconds", "generate", "typing", "said"),
    [
        (0.2, "auto", True, "Clips follow your typing: a request took 0.2 s"),
        (MAX_TYPING_SECONDS, "auto", True, "Clips follow"),
        (95.0, "auto", False, "Clips are made when you press Generate: a request took 95.0 s"),
        (95.0, "typing", True, "Clips follow your typing (--generate=typing; 95.0 s per request"),
        (0.2, "button", False, "Clips are made when you press Generate (--generate=button; 0.2 s"),
    ],
)
def test_the_measured_time_decides_unless_told(seconds, generate, typing, said):
    decided, line = decide(seconds, generate)
    assert decided is typing and line.startswith(said)
