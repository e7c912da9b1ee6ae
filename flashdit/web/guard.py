"""Which requests reach the page: from its own page, for its own names, routes and files, of bounded size."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashdit.shared.paths import resolved

MAX_BODY = 2**18  # bytes: a request names options and classes, and carries no files
API, FILE = "/gradio_api/", "/gradio_api/file="
CALL, JOIN = f"{API}call/", f"{API}queue/join"
READ = ("/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/assets/", "/static/")
READ += tuple(
    API + name for name in ("info", "queue/data", "heartbeat/", "startup-events", "call/", "theme.css")
)
SENT = tuple(API + name for name in ("queue/join", "call/", "cancel", "reset"))
"""The routes that the page and its API need; what else gradio serves (uploads, a proxy, links that write
files) is refused."""


def host_name(netloc: str) -> str:
    """Returns the name in `name`, `name:port` or `[IPv6]:port`, in lower case; empty where it is none."""
    try:
        parts = urlsplit(f"//{netloc}")
        _ = parts.port  # raises unless it is a number
    except ValueError:
        return ""
    return parts.hostname or "" if parts.netloc == netloc and "@" not in netloc else ""


def is_loopback(name: str) -> bool:
    """Returns whether a name is one of this machine alone."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application in front of another one; what it refuses is one sentence with a status of 4XX.

    A page that was visited elsewhere can make a browser send requests here, under a name of its own that
    leads here, too: so Host and Origin must be loopback names or `hosts`, at any port.

    Args:
        app: What is guarded.
        hosts: Names and addresses that pass beside the loopback ones.
        folder: Files are served from here alone.
        inputs: How many inputs each function of the page takes, by its name and by its number.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str],
        folder: Path,
        inputs: Mapping[Any, int] = MappingProxyType({}),
    ):
        self.app, self.folder, self.inputs = app, resolved(folder), inputs
        self.hosts = {host.strip("[]").lower() for host in hosts} - {""}  # a request may name no host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with what is wrong."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # nothing here uses one
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        refusal = self._refused_sender(headers) or self._refused_route(scope)
        status, body = 403, None
        if refusal is None and scope["method"] == "POST":
            body = await _read(headers, receive)
            if body is None:
                status, refusal = 413, f"a request's body must have at most {MAX_BODY:,} bytes"
            else:
                status, refusal = 400, self._refused_inputs(scope["path"], body)
        if refusal is not None:
            response = PlainTextResponse(refusal + "\n", status, {"Connection": "close"})
            await response(scope, receive, send)
            return
        # gradio must not answer an origin: what comes from this page needs no CORS headers.
        kept = [(name, value) for name, value in scope["headers"] if name != b"origin"]
        await self.app({**scope, "headers": kept}, _replay(body, receive), send)

    def _passes(self, name: str) -> bool:
        """Returns whether this is a name of the page."""
        return is_loopback(name) or name in self.hosts

    def _refused_sender(self, headers: Headers) -> str | None:
        """Returns what is wrong with where a request goes to or comes from."""
        asked = headers.getlist("host")
        forwarded = ",".join(headers.getlist("x-forwarded-host")).split(",")
        for host in [*(asked or [""]), *(name.strip() for name in forwarded if name)]:
            if not self._passes(host_name(host)):
                return (
                    f"Host must be a loopback name, --host or an --allow-host of `flashdit app`, got {host!r}"
                )
        for origin in headers.getlist("origin"):
            scheme, _, netloc = origin.partition("://")
            if scheme not in ("http", "https") or not self._passes(host_name(netloc)):
                return f"Origin must be this page, or an --allow-host of `flashdit app`, got {origin!r}"
        # Pictures and scripts of another page come without an Origin; a link to this page is welcome.
        is_link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        if headers.get("sec-fetch-site") == "cross-site" and not is_link:
            return "requests from another site's page are refused"
        return None

    def _refused_inputs(self, path: str, body: bytes) -> str | None:
        """Returns what is wrong with the number of a request's inputs, of which gradio logs a traceback."""
        try:
            request = json.loads(body)
            name = request["fn_index"] if path == JOIN else path.removeprefix(CALL).strip("/")
            given = len(request["data"])
            if self.inputs and name not in self.inputs:
                return f"the page has no function {name!r}"
            wanted = self.inputs.get(name, 0)
        except (ValueError, LookupError, TypeError, RecursionError):  # gradio answers what is no request
            return None
        return None if given >= wanted else f"data must have {wanted} inputs, got {given}"

    def _refused_route(self, scope: Scope) -> str | None:
        """Returns what is wrong with what a request asks for."""
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD") and path.startswith(FILE):
            wanted = path.removeprefix(FILE)
            inside = "\0" not in wanted and self.folder in resolved(wanted).parents
            return None if inside else "only pictures that this page has made are served"
        routes = {"GET": READ, "HEAD": READ, "POST": SENT}.get(method, ())
        if ".." not in path.split("/") and (path.startswith(routes) or (path == "/" and routes is READ)):
            return None
        return f"{method} {path} is no route of this page"


async def _read(headers: Headers, receive: Receive) -> bytes | None:
    """Returns a request's body; None if it is too large, as stated or as it comes."""
    if int(headers.get("content-length", 0)) > MAX_BODY:
        return None
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        more = message.get("more_body", False)
    return body


def _replay(body: bytes | None, receive: Receive) -> Receive:
    """Returns what gives a body that has been read, then what else comes."""
    waiting = [] if body is None else [body]

    async def replayed() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed
