"""Who may speak to the server at all: pages of its own, and those it was told to allow."""

import ipaddress
import logging
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from decmem.errors import UserError
from decmem.play.protocol import error_message

_log = logging.getLogger(__name__)


class Gate:
    """Refuses other origins, and names that are not this machine's (a page that points its own
    name here would pass for the same origin).

    Args:
        host: what the server is bound to. allowed: origins such as `https://example.org`.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: tuple[str, ...]) -> None:
        self.app = app
        self.allowed = {origin.rstrip("/").lower() for origin in allowed}
        names = {host, "localhost", socket.gethostname(), f"{socket.gethostname()}.local"}
        names |= {urlsplit(origin).hostname or "" for origin in self.allowed}
        self.names = {name.lower() for name in names}
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            error = self._refusal(Headers(scope=scope))
            if error is not None:
                if str(error) not in self._logged and len(self._logged) < 100:
                    self._logged.add(str(error))
                    _log.warning("a request was refused: %s", error)
                await self._refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> UserError | None:
        host = headers.get("host", "").lower()
        name = _name_of(f"//{host}")
        if name not in self.names and not _is_address(name):
            return UserError("host", f"{host[:80]!r} is not this server", "Use its address")
        origin = headers.get("origin", "").lower().rstrip("/")
        if not origin or origin in self.allowed:
            return None
        if origin.partition("://")[2] == host:
            return None
        return UserError("origin", f"{origin[:80]!r} is not allowed", "Start with --allow-origin")

    async def _refuse(self, error: UserError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": error.argument})
            return
        body = {"error": {k: v for k, v in error_message(error).items() if k != "type"}}
        await JSONResponse(body, status_code=403)(scope, receive, send)


def _name_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
