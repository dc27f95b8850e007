"""``decmem play``: walk in the dream, in a browser."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Play:
    """Open a page in which you walk through a dreamed world: W A S D, mouse or arrow keys, touch.

    Example: decmem play --world 7
    """

    world: int | None = None
    """Begin at once in the block world of this seed."""

    memory: Path | None = None
    """Begin at once in this saved world (.world), picture, or video with its track.npz beside."""

    host: str = "127.0.0.1"
    """Where to listen. Other machines reach 0.0.0.0: there is no password."""

    port: int = 8377
    """Which port; 0 takes a free one."""

    no_browser: bool = False
    """Do not open a browser."""

    steps: int | None = None
    """Denoising steps per chunk; by default 2 on a CPU and 4 on a GPU."""

    device: str = "auto"
    """auto, cpu or cuda."""

    preset: str = "pocket"
    """Which model."""

    weights: Path | None = None
    """Other weights of the same preset."""

    codec_weights: Path | None = None
    """The codec those weights were trained with, where it is not the shipped one."""

    max_sessions: int = 4
    """Worlds at once; more visitors queue."""

    allow_origin: tuple[str, ...] = ()
    """Other web origins that may connect, such as https://example.org."""

    def run(self) -> None:
        """Serve until interrupted."""
        from dataclasses import replace

        from decmem.errors import UserError

        try:
            from decmem.play.opening import kind_of
            from decmem.play.server import serve
            from decmem.play.studio import Studio
        except ImportError as error:
            raise UserError(
                "play", f"{error.name} is not installed", "pip install 'decmem[play]'"
            ) from error
        from decmem.play.defaults import Bounds

        if self.max_sessions < 1:
            raise UserError("max_sessions", f"{self.max_sessions}", "Allow at least 1")
        if not 0 <= self.port < 2**16:
            raise UserError("port", f"{self.port}", "Give 0 to 65535")
        if self.world is not None and not 0 <= self.world < 2**63:
            raise UserError("world", f"{self.world}", "Give a whole number from 0")
        if self.memory is not None:
            kind_of(self.memory)
        bounds = replace(Bounds(), sessions=self.max_sessions)
        studio = Studio.open(
            self.preset, self.weights, self.codec_weights, self.device, self.steps, bounds
        )
        if self.memory is not None:
            studio.opening = {"from": "file", "path": self.memory}
        elif self.world is not None:
            studio.opening = {"from": "seed", "seed": self.world}
        serve(studio, self.host, self.port, self.allow_origin, not self.no_browser)
