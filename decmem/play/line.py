"""A line to one client: what is sent never waits for ever, what is heard is checked first."""

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import MutableMapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from decmem.errors import UserError
from decmem.play.defaults import Bounds
from decmem.play.protocol import error_message, packed, read_message

_log = logging.getLogger(__name__)


class Line:
    """One WebSocket, accepted. Whatever happens to it, nobody else notices."""

    def __init__(self, socket: WebSocket, bounds: Bounds) -> None:
        self.socket = socket
        self.bounds = bounds
        self.open = True
        self._turn = asyncio.Lock()
        self._times: deque[float] = deque()
        self._strikes: deque[float] = deque()
        self._logged: set[str] = set()
        self._scolded = 0.0
        self._hearing: asyncio.Future[Any] | None = None

    async def tell(self, kind: str, **fields: Any) -> None:
        """A JSON message."""
        await self._send({"text": json.dumps({"type": kind, **fields}, allow_nan=False)})

    async def hand(self, header: dict[str, Any], parts: list[tuple[dict[str, Any], bytes]]) -> None:
        """A binary message."""
        await self._send({"bytes": packed(header, parts)})

    async def complain(self, error: UserError) -> None:
        """Tells the client of its error; each kind of error is logged once."""
        if error.argument not in self._logged:
            self._logged.add(error.argument)
            _log.warning("a client's message was refused: %s", " ".join(str(error).split())[:300])
        message = error_message(error)
        await self.tell(message.pop("type"), **message)

    async def close(self, reason: str | None = None) -> None:
        """Ends the connection; with a reason the client is told to forget its world."""
        if reason is not None:
            await self.tell("bye", reason=reason)
        if self.open:
            self.open = False
            with contextlib.suppress(Exception):
                async with asyncio.timeout(5):
                    await self.socket.close()

    async def message(self) -> dict[str, Any] | None:
        """The next sound thing the client says; None when it is gone or was shown out."""
        while self.open:
            raw = await self._receive()
            if raw is None or raw["type"] != "websocket.receive":
                break
            try:
                self._count(time.monotonic())
                text = raw.get("text")
                said = raw.get("bytes") or b"" if text is None else text
                return read_message(said, self.bounds.message_bytes)
            except UserError as error:
                await self.blame(error)
        self.open = False
        return None

    async def blame(self, error: UserError) -> None:
        """Complains; who keeps on is shown out."""
        now = time.monotonic()
        self._strikes.append(now)
        while self._strikes[0] < now - 10:
            self._strikes.popleft()
        if len(self._strikes) >= self.bounds.strikes:
            _log.warning("a client kept sending bad messages and was shown out")
            await self.close("too many bad messages")
            return
        # One answer a second is enough for who talks too fast.
        if error.argument != "messages" or now - self._scolded > 1:
            self._scolded = now
            await self.complain(error)

    async def _receive(self) -> MutableMapping[str, Any] | None:
        """What comes next; None where the line was lost, or given up meanwhile."""
        hearing = self._hearing = asyncio.ensure_future(self.socket.receive())
        try:
            await asyncio.wait({hearing})
        finally:
            hearing.cancel()
        if hearing.cancelled():
            return None
        try:
            return hearing.result()
        except (WebSocketDisconnect, RuntimeError):
            return None

    def _count(self, now: float) -> None:
        self._times.append(now)
        while self._times[0] <= now - 1:
            self._times.popleft()
        most = self.bounds.messages_per_second
        if len(self._times) > most:
            raise UserError("messages", f"more than {most} in a second", "Send fewer")

    async def _send(self, message: dict[str, Any]) -> None:
        if not self.open:
            return
        try:
            async with self._turn, asyncio.timeout(self.bounds.send_seconds):
                await self.socket.send({"type": "websocket.send", **message})
        except TimeoutError:
            _log.warning(
                "a client took in nothing for %g s and was let go", self.bounds.send_seconds
            )
            # No farewell, it would wait behind the rest. Nor is the connection's end waited for:
            # it comes when the last byte is taken in, so perhaps never.
            self.open = False
            if self._hearing is not None:
                self._hearing.cancel()
        except (WebSocketDisconnect, RuntimeError, OSError):
            self.open = False
