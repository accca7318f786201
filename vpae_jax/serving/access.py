"""Who may talk to the server: only its own pages. Other sites open in the same browser are turned away.

A site elsewhere can make a visitor's browser send requests to this server: across origins, which the Origin header
reveals, or after pointing its own name at this machine (DNS rebinding), which the Host header reveals.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; media-src 'self'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reached from this machine alone."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def refusal(host: str | None, origin: str | None, bound: str, names: frozenset[str]) -> str | None:
    """Why a request is turned away, in one line; None if it is not.

    Args:
      host: its Host header.
      origin: its Origin header.
      bound: the address that the server is bound to.
      names: of this machine, under which it may be asked for if it is bound to the network.
    """
    name = _name(f"//{host}")
    address = None if name is None else _address(name)
    if address is not None:  # no name, so nobody can have pointed it here
        known = address.is_loopback or not is_loopback(bound)
    else:
        known = name == "localhost" or (not is_loopback(bound) and name in names | {bound.lower()})
    if not known:
        return f"host {host!r} is not this server's; open the address that the program printed"
    if origin is not None and urlsplit(origin).netloc.lower() != str(host).lower():
        return f"origin {origin!r} is another site; only this server's own page may ask"
    return None


def own_names() -> frozenset[str]:
    """Names of this machine."""
    return frozenset(name.lower() for name in (socket.gethostname(), socket.getfqdn()))


class Access:
    """Middleware that turns other sites away with status 403, and adds `HEADERS` to every answer.

    Args:
      app: what answers the others.
      bound, names: as of `refusal`.
    """

    def __init__(self, app: ASGIApp, bound: str, names: frozenset[str]) -> None:
        self.app, self.bound, self.names = app, bound, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        reason = refusal(headers.get("host"), headers.get("origin"), self.bound, self.names)
        if reason is None:
            await self.app(scope, receive, with_headers)
        else:
            await JSONResponse({"error": reason}, HTTPStatus.FORBIDDEN)(scope, receive, with_headers)


def _name(netloc: str) -> str | None:
    try:
        return urlsplit(netloc).hostname
    except ValueError:  # a bracket that does not close
        return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
