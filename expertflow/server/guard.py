"""Guard: what every request meets first. Who may ask, from where, under which name; and what every answer carries.

Plain ASGI, so that streams pass unbuffered. Other sites must not use a server of this machine through its user's
browser: a name that somebody points at 127.0.0.1 (DNS rebinding) fails by Host, a page elsewhere by Origin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertflow.server.errors import APIError, unexpected
from expertflow.server.settings import KEY_VARIABLE, ServerSettings

MOST_HEADER_BYTES = 16 * 1024
# Orchestrators ask these, and learn one word.
OPEN_PATHS = ("/health", "/health/live", "/health/ready")
# What a browser opens: it asks its user for the key as a password.
BROWSER_PATHS = ("/", "/live", "/stats", "/metrics")
_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """An ASGI application before another."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self._app = app
        self._keys = [_digest(key.encode()) for key in settings.api_key]
        self._max_body = settings.max_body_bytes
        self._hosts = {"localhost", settings.host.lower().strip("[]")}
        self._hosts |= {name.lower() for name in settings.allowed_host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:  # websockets: there are none
                await send({"type": "websocket.close", "code": 1008})
            return
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, send_with_headers)
        except APIError as error:
            if begun:
                raise
            await error.response()(scope, receive, send_with_headers)
        except Exception as error:
            told = unexpected(error, f"serving {scope['method']} {scope['path']!r}")
            if begun:
                raise  # the client sees a stream that breaks off; uvicorn closes the connection
            await told.response()(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        """Raises APIError. In this order, so that a page of another site learns nothing of keys."""
        headers = Headers(scope=scope)
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if size > MOST_HEADER_BYTES:
            raise APIError(431, f"{size} bytes of headers, and {MOST_HEADER_BYTES} are the limit; send fewer")
        self._check_host(headers.getlist("host"))
        self._check_origin(headers)
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers.getlist("authorization"), scope["path"])
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_body:
            raise too_large(self._max_body, f"a body of {length[:20]} bytes")

    def _check_host(self, hosts: Sequence[str]) -> None:
        name = _name_of(hosts[0]) if len(hosts) == 1 else None
        # An address cannot be pointed elsewhere.
        if name is None or not (name in self._hosts or _is_address(name)):
            shown = hosts[0][:100] if hosts else ""
            raise APIError(
                421,
                f"Host {shown!r} is not a name of this server; use its address, or start it with "
                f"--allowed-host NAME if that is meant",
                code="unknown_host",
            )

    def _check_origin(self, headers: Headers) -> None:
        origins, host = headers.getlist("origin"), headers["host"].lower()
        for origin in origins:
            if not _same_place(origin, host):
                raise APIError(
                    403,
                    f"a page of {origin[:100]!r} may not use this server; open the server's own page, or ask from a "
                    f"program instead of a browser",
                    code="foreign_origin",
                )
        # A link to the page may be followed from anywhere; nothing else may be fetched from elsewhere.
        if (
            headers.get("sec-fetch-site") in ("cross-site", "same-site")
            and headers.get("sec-fetch-mode") != "navigate"
        ):
            raise APIError(403, "a page of another site may not use this server", code="foreign_origin")

    def _check_key(self, given: Sequence[str], path: str) -> None:
        if not self._keys:
            return
        browser = path in BROWSER_PATHS or path.startswith("/page/")
        challenge = 'Basic realm="expertflow", charset="UTF-8"' if browser else "Bearer"
        if not given:
            raise APIError(
                401,
                "a key is missing; send it as 'Authorization: Bearer KEY', or in a browser as the password to any "
                "user name",
                code="missing_api_key",
                headers={"WWW-Authenticate": challenge},
            )
        key = _key_of(given[0]) if len(given) == 1 else None
        digest = _digest(b"" if key is None else key)
        # All of them, whichever fits: the time tells nothing. Digests, so that it does not tell the length either.
        fits = sum(hmac.compare_digest(digest, known) for known in self._keys)
        if key is None or not fits:
            raise APIError(
                401,
                f"the key is not one of this server's; send one that it was started with (--api-key-file, "
                f"{KEY_VARIABLE}) as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": challenge},
            )


def too_large(most: int, what: str) -> APIError:
    return APIError(
        413,
        f"{what}, and {most} are the limit; send a shorter prompt, or start the server with a larger --max-body",
        code="request_too_large",
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key_of(authorization: str) -> bytes | None:
    """Of "Bearer KEY", or the password of "Basic ...". None for what is neither."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode("latin-1", "replace")
    if scheme.lower() == "basic":
        try:
            _, colon, password = base64.b64decode(rest, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return None
        return password if colon else None
    return None


def _name_of(host: str) -> str | None:
    """Without port and brackets; None for what is no host."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises for what is no port
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_place(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host
