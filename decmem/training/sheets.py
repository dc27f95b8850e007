"""Sample sheets: what a model makes, beside the truth, as one picture."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from decmem.codec import Codec
from decmem.flow import FlowConfig
from decmem.model import WorldModel
from decmem.rollout import Session
from decmem.sampler import Running
from decmem.storage import atomic_file
from decmem.world.episode import Episode


def write_sheet(path: Path, rows: list[UInt8[np.ndarray, "F H W 3"]]) -> None:
    """Rows of frames as one PNG."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    with atomic_file(path) as temporary:
        Image.fromarray(sheet).save(temporary)


def codec_sheet(codec: Codec, episodes: list[Episode], columns: int = 6) -> list[np.ndarray]:
    """Truth above reconstruction, for each episode."""
    rows = []
    for episode in episodes:
        frames = torch.from_numpy(episode.frames[None])
        coded = codec.decode(codec.encode(frames))[0].cpu().numpy()
        shown = np.linspace(1, len(coded) - 1, columns).astype(int)
        rows += [episode.frames[shown], coded[shown]]
    return rows


def memory_sheet(
    codec: Codec,
    model: WorldModel,
    flow_config: FlowConfig,
    episodes: list[Episode],
    known: int,
    columns: int = 8,
) -> list[np.ndarray]:
    """Truth above dream after `known` frames of memory, for each episode."""
    rows = []
    for i, episode in enumerate(episodes):
        # A few chunks each: recording graphs would cost more than it saves.
        running = Running(graphs="off")
        session = Session(codec, model, flow_config=flow_config, seeds=[i], running=running)
        session.observe(*_parts(episode, known))
        future = (len(episode.frames) - known) // 4 * 4
        later = slice(known, known + future)
        dream = session.step(episode.actions[later], episode.world_to_camera[later])
        shown = np.linspace(0, future - 1, columns).astype(int)
        rows += [episode.frames[later][shown], dream[shown]]
    return rows


def _parts(episode: Episode, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first so many frames, with all that is known of them."""
    first = slice(frames)
    return (
        episode.frames[first],
        episode.actions[first],
        episode.world_to_camera[first],
        episode.intrinsics[first],
    )
