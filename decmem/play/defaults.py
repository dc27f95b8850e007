"""What a session of the live page starts with, and the bounds it is kept in."""

from dataclasses import dataclass

FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class Pace:
    """How a device dreams.

    Args:
        steps: denoising steps a chunk. chunk: latents a chunk.
        retrieved: at most so many blocks read where the preset reads more than it was trained with;
            None sets no limit.
        supersample: rays per pixel side of the truth beside the dream.
        threads: of the truth's renderer.
        painters: worlds whose known frames are rendered at once, beside the model's work; with 0
            they are part of it.
    """

    steps: int
    chunk: int
    retrieved: int | None
    supersample: int
    threads: int
    painters: int


# One-latent chunks answer soonest. On two cores every pass counts, every block read, every ray.
PACES = {
    "cpu": Pace(steps=2, chunk=1, retrieved=16, supersample=1, threads=1, painters=0),
    "cuda": Pace(steps=4, chunk=1, retrieved=None, supersample=2, threads=4, painters=4),
}


@dataclass(frozen=True)
class Bounds:
    """What the server allows.

    Args:
        sessions: worlds at once; more visitors queue.
        message_bytes, messages_per_second: of one client. strikes: bad messages in a row, after
            which it is shown out. unseen: chunks sent that it has not painted yet.
        picture_bytes, video_bytes, track_bytes, world_bytes: of an upload.
        memory_frames: 1 + 4n frames of a block world are walked before the person steers.
        video_frames: the newest frames of an uploaded video that are remembered. video_read: the
            most it may have. unpacked_bytes: of a track.
        keep_seconds: a world waits so long for a connection that was lost.
        idle_seconds: generation stops when nobody has steered for so long.
        send_seconds: a client that takes in nothing for so long is let go.
        files: files to take home that are kept per session. branches: of one world.
        steps, guidance: the most that may be asked for.
        together: latents up to which a world is dreamt along with others on a GPU; 0: never.
        latents, bank_bytes: length and size of its bank at which a world stops.
    """

    sessions: int = 4
    message_bytes: int = 64 * 2**10
    messages_per_second: int = 60
    strikes: int = 30
    unseen: int = 2
    picture_bytes: int = 16 * 2**20
    video_bytes: int = 256 * 2**20
    track_bytes: int = 16 * 2**20
    world_bytes: int = 256 * 2**20
    memory_frames: int = 221
    video_frames: int = 801
    video_read: int = 6000
    unpacked_bytes: int = 256 * 2**20
    keep_seconds: float = 300.0
    idle_seconds: float = 300.0
    send_seconds: float = 20.0
    files: int = 4
    branches: int = 12
    steps: int = 50
    guidance: float = 20.0
    together: int = 1024
    latents: int = 4000
    bank_bytes: int = 4 * 2**30

    @property
    def uploads(self) -> dict[str, int]:
        """Largest upload of each kind, in bytes."""
        return {
            "picture": self.picture_bytes,
            "video": self.video_bytes,
            "track": self.track_bytes,
            "world": self.world_bytes,
        }
