"""Who may come in: a limited number of guests, a queue, and worlds kept for those who come back."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from decmem.errors import UserError
from decmem.play.guest import Guest
from decmem.play.ledger import ledger
from decmem.play.line import Line
from decmem.play.parcels import Parcels
from decmem.play.protocol import check_version
from decmem.play.studio import Stopped, Studio
from decmem.play.troupe import Troupe

_log = logging.getLogger(__name__)
_HELLO_SECONDS = 20.0
_SWEEP_SECONDS = 1.0
_FAREWELL_SECONDS = 3.0


class Lobby:
    """All guests of a server, and who waits for a place."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.parcels = Parcels(studio.bounds.files)
        self.guests: dict[str, Guest] = {}
        self._queue: list[Line] = []
        self._changed = asyncio.Event()
        self._sweeper = asyncio.create_task(self._sweep())

    async def visit(self, line: Line) -> None:
        """One connection from its first message to its end."""
        try:
            hello = await self._hello(line)
            if hello is None:
                return
            guest = self.guests.get(hello.get("session") or "")
            # Whatever is said while waiting has no world to go to.
            guest = guest or await self._wait_for_place(line)
            if guest is None:
                return
            await self._serve(guest, line)
        except Stopped:
            pass
        finally:
            await line.close()

    async def _hello(self, line: Line) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                hello = await line.message()
        except TimeoutError:
            return None
        if hello is None:
            return None
        try:
            if hello["type"] != "hello":
                raise UserError("type", f"{hello['type']} came first", "Say hello first")
            check_version(hello["version"])
        except UserError as error:
            await line.complain(error)
            return None
        return hello

    async def _wait_for_place(self, line: Line) -> Guest | None:
        most = self.studio.bounds.sessions
        if not self._queue and len(self.guests) < most:
            return self._welcome()
        self._queue.append(line)
        heard = asyncio.ensure_future(line.message())
        told = 0
        try:
            while True:
                position = self._queue.index(line) + 1
                if position == 1 and len(self.guests) < most:
                    return self._welcome()
                if position != told:
                    told = position
                    text = f"All {most} worlds are taken. Your turn comes when somebody leaves."
                    await line.tell("queue", position=position, limit=most, message=text)
                change = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({heard, change}, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                if heard.done():
                    if heard.result() is None:
                        return None
                    await line.blame(UserError("type", "you wait in the queue", "Wait for hello"))
                    heard = asyncio.ensure_future(line.message())
        finally:
            self._queue.remove(line)
            self._announce()
            heard.cancel()

    def _welcome(self) -> Guest:
        if self.studio.closed:
            raise Stopped
        guest = Guest(self.studio, self.parcels)
        self.guests[guest.token] = guest
        return guest

    async def _serve(self, guest: Guest, line: Line) -> None:
        await guest.attach(line)
        try:
            while (message := await line.message()) is not None:
                try:
                    if message["type"] == "hello":
                        raise UserError("type", "hello was said already", "Say it once")
                    if message["type"] == "bye":
                        await self.dismiss(guest, "you left")
                        return
                    guest.hear(message)
                except UserError as error:
                    await line.blame(error)
        finally:
            guest.detach(line)

    async def dismiss(self, guest: Guest, reason: str) -> None:
        """Ends a guest's world."""
        self.guests.pop(guest.token, None)
        line = guest.line
        await guest.close()
        if line is not None:
            await line.close(reason)
        self._announce()
        await self.studio.work(_give_back, self.studio.troupe, lambda: not self.guests)

    async def holdings(self) -> dict[str, int | None]:
        """What all worlds hold now, in bytes; see `ledger`."""
        journeys = [guest.journey for guest in self.guests.values()]
        worlds = [journey.session for journey in journeys if journey is not None]
        device, troupe = self.studio.session.device, self.studio.troupe
        return await self.studio.work(
            lambda: ledger(worlds, device, None if troupe is None else troupe.stable)
        )

    async def close(self) -> None:
        """Ends everything, the second time nothing. Whoever waits for work is let go first."""
        self._sweeper.cancel()
        self.studio.close()
        leaving = [self._let_go(guest) for guest in self.guests.values()]
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await asyncio.gather(*leaving)
        except TimeoutError:
            _log.warning("not all visitors took in that the server stops")
        self.parcels.close()

    async def _let_go(self, guest: Guest) -> None:
        with contextlib.suppress(Stopped):
            await self.dismiss(guest, "the server stops")

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _sweep(self) -> None:
        """Lets go of worlds whose guests did not come back."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            keep = self.studio.bounds.keep_seconds
            for guest in list(self.guests.values()):
                away = time.monotonic() - guest.left_at
                # A guest without a world, or one others wait for, is not kept as long.
                patience = min(keep, 20.0) if self._queue or not guest.begun else keep
                if guest.line is None and away > patience:
                    try:
                        await self.dismiss(guest, "gone")
                    except Exception:
                        _log.exception("a world could not be let go")


def _give_back(troupe: Troupe | None, deserted: Callable[[], bool]) -> None:
    """Hands freed memory back to the system: PyTorch would keep what it once took of a GPU, and
    glibc what many threads once held."""
    gc.collect()
    if troupe is not None:
        troupe.rest()
        gc.collect()
    if torch.cuda.is_initialized():
        # cuBLAS keeps 32 MiB for every stream that graphs were ever recorded beside. Graphs that
        # are still there would go on writing to it.
        if deserted() and (troupe is None or troupe.stable is None):
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
