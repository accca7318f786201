"""Which Host and Origin headers are the server's own."""

import pytest

from vpae_jax.serving.access import is_loopback, refusal

NAMES = frozenset({"tower"})


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", None),
        ("localhost:8000", "http://localhost:8000"),
        ("LOCALHOST:8000", "http://localhost:8000"),
        ("localhost:9000", "http://localhost:9000"),  # a tunnel
        ("[::1]:8000", "http://[::1]:8000"),
        ("127.0.0.1", None),
    ],
)
def test_its_own_page_may_ask(host, origin):
    assert refusal(host, origin, "127.0.0.1", NAMES) is None
    assert refusal(host, origin, "0.0.0.0", NAMES) is None


@pytest.mark.parametrize("host", ["192.168.0.7:8000", "[fe80::1]:8000", "tower:8000", "Tower"])
def test_the_network_may_ask_only_if_the_server_is_open_to_it(host):
    assert refusal(host, f"http://{host}", "0.0.0.0", NAMES) is None
    assert refusal(host, None, "192.168.0.7", NAMES) is None
    assert "is not this server's" in refusal(host, None, "127.0.0.1", NAMES)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1", None])
def test_a_name_that_somebody_points_here_may_not(host):
    for bound in ("127.0.0.1", "0.0.0.0", "::"):
        assert "is not this server's" in refusal(host, None, bound, NAMES)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://localhost:8001", "http://127.0.0.1:8000"]
)
def test_another_site_may_not(origin):
    for bound in ("127.0.0.1", "0.0.0.0"):
        assert "is another site" in refusal("localhost:8000", origin, bound, NAMES)


def test_loopback():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "tower")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
