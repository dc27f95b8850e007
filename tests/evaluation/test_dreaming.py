"""What evaluation asks of a session."""

import numpy as np
import torch

from decmem.evaluation.dreaming import through_codec
from decmem.presets import TINY
from decmem.rollout import Session
from decmem.world.episode import render_episode


def test_the_codec_row_is_that_of_the_whole_clip() -> None:
    torch.manual_seed(0)
    session = Session(TINY.build_codec().eval(), TINY.build_model().eval())
    episode = render_episode(1, "free", 21, TINY.model.size, supersample=1)
    whole = session.codec_roundtrip(episode.frames)
    for bank in (1, 5, 13):
        coded = through_codec(session, episode, bank, 0)
        np.testing.assert_array_equal(coded, whole[bank:])
