"""What all sessions of a server share: the model, its worker thread, and the bounds."""

import asyncio
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float32

from decmem.play.defaults import PACES, Bounds, Pace
from decmem.play.journey import Chunk, Journey
from decmem.play.steering import Steering
from decmem.play.troupe import Troupe
from decmem.rollout import Session

Result = TypeVar("Result")


class Stopped(Exception):
    """The server stops: what was asked for will not be done."""


class Studio:
    """One model, loaded once.

    Args:
        session: opened with the weights all worlds share. preset: its name. bounds: of the server.
        pace: of the device. worker: the thread. together: whether worlds share passes.

    Model work runs in one thread, a piece of one world after a piece of another, in the order
    they ask: the event loop never waits for it, and nobody starves. Chunks that are due at the
    same time are dreamt `together`, on a GPU where None: elsewhere a pass gains nothing by it.
    """

    def __init__(
        self,
        session: Session,
        preset: str,
        bounds: Bounds,
        pace: Pace,
        worker: ThreadPoolExecutor | None = None,
        together: bool | None = None,
    ) -> None:
        self.session = session
        self.preset = preset
        self.bounds = bounds
        self.pace = pace
        # The start every new guest is given: the fields of a `start`, or a file of the server's.
        self.opening: dict[str, Any] | None = None
        self.worker = worker or ThreadPoolExecutor(1, "model")
        if together is None:
            together = session.device.type == "cuda" and bounds.together > 0
        self.troupe = Troupe(bounds) if together else None
        self.painters = ThreadPoolExecutor(pace.painters, "painter") if pace.painters else None
        self.closed = False

    @classmethod
    def open(
        cls,
        preset: str,
        weights: Path | None,
        codec_weights: Path | None,
        device: str,
        steps: int | None,
        bounds: Bounds,
    ) -> "Studio":
        """Loads the model. Raises `UserError` as `Session.open` does."""
        # Model work is in the worker and nowhere else, loading included: OpenMP keeps a team for
        # every thread that ever computed, and with more of them than cores it stops spinning,
        # which on two cores makes each pass take twice as long.
        worker = ThreadPoolExecutor(1, "model")
        opening = partial(Session.open, preset, weights, codec_weights, device=device)
        session = worker.submit(opening).result()
        pace = PACES["cuda" if session.device.type == "cuda" else "cpu"]
        session.deferred = True
        session.steps = pace.steps if steps is None else steps
        if pace.retrieved is not None and session.retrieved is not None:
            session.retrieved = min(pace.retrieved, session.retrieved)
        sizes = session.config.chunk_sizes
        session.chunk = pace.chunk if pace.chunk in sizes else min(sizes)
        _ = session.sampler  # the steps are checked here
        return cls(session, preset, bounds, pace, worker)

    def journey(self, noise_seed: int) -> Journey:
        """A new world, empty."""
        return Journey(self.session.fresh([noise_seed]), self.pace, self.painters)

    def warm_up(self) -> None:
        """Has everything compiled and loaded while the browser still opens."""

        def walk() -> None:
            journey = self.journey(0)
            for _ in journey.begin_seed(0, 5):
                pass
            journey.go(Steering().actions(4 * journey.session.chunk))
            journey.close()

        self.worker.submit(walk)

    async def work(self, piece: Callable[..., Result], *given: Any) -> Result:
        """Runs model work in its thread. Raises `Stopped` where it will not be done."""
        if self.closed:
            raise Stopped
        return await self.until(self.worker.submit(piece, *given))

    async def until(self, done: "Future[Result]") -> Result:
        """What other threads make. Raises `Stopped` where they will not."""
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # Not who waits was called off, but what is waited for.
            if self.closed and task is not None and not task.cancelling():
                raise Stopped from None
            raise

    async def go(self, journey: Journey, actions: Float32[np.ndarray, "F A"]) -> Chunk:
        """The next chunk of a world. Raises `Stopped` where there will be none."""
        if self.troupe is None or self.closed:
            return await self.work(journey.go, actions)
        return await self.until(self.troupe.ask(journey, actions, self.worker))

    async def advance(self, pieces: Iterator[Result]) -> Result | None:
        """The next piece of longer work; None when it is done."""
        return await self.work(next, pieces, None)

    @property
    def max_k(self) -> int:
        """Most blocks a client may ask to be retrieved."""
        return max(64, 4 * self.session.config.reading.retrieved)

    @property
    def machine(self) -> str:
        """The device, for people."""
        if self.session.device.type == "cuda":
            return torch.cuda.get_device_name(self.session.device)
        threads = torch.get_num_threads()
        return f"CPU ({platform.machine()}), {threads} thread{'s' * (threads != 1)}"

    def introduction(self) -> dict[str, Any]:
        """The part of `hello` that is the same for everybody."""
        session, bounds = self.session, self.bounds
        config = session.config
        return {
            "preset": self.preset,
            "size": list(config.size),
            "fps": 10,
            "layers": config.layers,
            "blocks": list(config.blocks),
            "latent_frames": 4,
            "max_k": self.max_k,
            "chunk_sizes": list(config.chunk_sizes),
            "limits": {
                "upload_bytes": bounds.uploads,
                "messages_per_second": bounds.messages_per_second,
                "message_bytes": bounds.message_bytes,
            },
            "machine": self.machine,
            "weights": (session.weights_sha256 or "")[:12],
        }

    def close(self) -> None:
        """Ends the threads once what they are at is done; whoever waits for more is told."""
        self.closed = True
        if self.troupe is not None:
            self.troupe.close()
        for threads in (self.worker, self.painters):
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)
