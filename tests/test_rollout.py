"""The session on a small random model: what it generates depends on what it should, no more."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from decmem.codec import Autoencoder, CodecConfig
from decmem.errors import UserError
from decmem.experiment import to_plain
from decmem.memory import DecoupledMemory, MemoryConfig, PositionConfig, Reach
from decmem.memory.quantised import FP8
from decmem.model import ModelConfig, WorldModel, initialise
from decmem.rollout import Session
from decmem.sampler import Running, Sampler
from decmem.shards import save_weights
from decmem.world.camera import intrinsics, look
from decmem.world.kinematics import integrate

SIZE = (32, 48)
CONFIG = ModelConfig(
    size=SIZE,
    latent_channels=4,
    width=40,
    layers=2,
    ffn_multiple=2,
    time_width=16,
    patch=1,
    reading=MemoryConfig(Reach(window=2, write_chunk=1), retrieved=6),
    position=PositionConfig(
        camera=8, space=8, time=4, space_base=100.0, time_base=100.0, reach=64.0, global_time=False
    ),
    chunk_sizes=(1, 2, 4),
)
CODEC = CodecConfig(
    channels=4, widths=(8, 8, 8), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1)
)


def shaken(part: torch.nn.Module) -> torch.nn.Module:
    """Random parameters everywhere: fresh branches are silent."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return part.eval().requires_grad_(False)


def new_model(config: ModelConfig = CONFIG) -> WorldModel:
    model = WorldModel(config)
    initialise(model)
    return shaken(model)


@pytest.fixture(scope="module")
def codec() -> Autoencoder:
    torch.manual_seed(0)
    return shaken(Autoencoder(CODEC))


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return new_model()


@pytest.fixture(scope="module")
def session(codec: Autoencoder, model: WorldModel) -> Callable[..., Session]:
    """A session of two denoising steps."""

    def made(**settings) -> Session:
        return Session(codec, settings.pop("model", model), **{"steps": 2} | settings)

    return made


class Known(NamedTuple):
    """What a session observes."""

    frames: np.ndarray
    actions: np.ndarray
    world_to_camera: np.ndarray
    intrinsics: np.ndarray

    def stretch(self, first: int, last: int) -> "Known":
        """Frames [first, last) of one world."""
        return Known(*(x[first:last] for x in self))


def acted(frames: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    actions = np.zeros((frames, 6), np.float32)
    actions[:, 0] = 1
    actions[:, 2] = random.integers(-40, 41, frames) / 8
    return actions


def known(frames: int = 17, worlds: int = 1) -> Known:
    """Random pictures on a walk; the batch dimension is left out for one world."""
    made = []
    for w in range(worlds):
        pictures = np.random.default_rng(w).integers(0, 256, (frames, *SIZE, 3), np.uint8)
        actions = acted(frames, seed=w)
        poses = integrate(look((10.0 * w, 1.6, -3.0), 40.0 * w, -10.0), actions)
        made.append((pictures, actions, poses, np.tile(intrinsics(SIZE), (frames, 1, 1))))
    stacked = [np.stack(x) for x in zip(*made, strict=True)]
    return Known(*(x[0] for x in stacked)) if worlds == 1 else Known(*stacked)


def future(frames: int, worlds: int = 1) -> np.ndarray:
    actions = np.stack([acted(frames, seed=10 + w) for w in range(worlds)])
    return actions[0] if worlds == 1 else actions


def dreamt(session: Session, latents: int) -> Tensor:
    """The last latents the session made."""
    assert session.latents is not None
    return session.latents[:, -latents:]


def assert_alike(one: np.ndarray, other: np.ndarray) -> None:
    """Equal but for the order of floating point sums."""
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_pieces_of_the_same_chunks_make_the_same_frames(
    chunk: int, session: Callable[..., Session]
) -> None:
    whole, pieces = session(chunk=chunk), session(chunk=chunk)
    actions = future(16)
    for one in (whole, pieces):
        one.observe(*known())
    at_once = whole.step(actions)
    assert at_once.shape == (16, *SIZE, 3)
    assert at_once.dtype == np.uint8
    step = 4 * chunk
    in_pieces = np.concatenate([pieces.step(actions[i : i + step]) for i in range(0, 16, step)])
    torch.testing.assert_close(dreamt(pieces, 4), dreamt(whole, 4), atol=1e-5, rtol=1e-5)
    assert_alike(at_once, in_pieces)
    assert (whole.frames, whole.length) == (33, 9)


def test_smaller_chunks_take_what_is_left(session: Callable[..., Session]) -> None:
    one = session(chunk=4)
    one.observe(*known())
    assert one.step(future(28)).shape[0] == 28  # 4 + 2 + 1 latents
    assert one.length == 12


def test_batch_company_changes_nothing(session: Callable[..., Session]) -> None:
    together = session(batch=2, seeds=[5, 9])
    together.observe(*known(worlds=2))
    frames = together.step(future(16, worlds=2))
    assert frames.shape == (2, 16, *SIZE, 3)
    for w, seed in enumerate((5, 9)):
        alone = session(seeds=[seed])
        alone.observe(*(x[w] for x in known(worlds=2)))
        got = alone.step(future(16, worlds=2)[w])
        expected = dreamt(together, 4)[w : w + 1]
        torch.testing.assert_close(dreamt(alone, 4), expected, atol=1e-5, rtol=1e-5)
        assert_alike(got, frames[w])


def test_same_seed_same_frames(session: Callable[..., Session]) -> None:
    made = []
    for seed in (3, 3, 4):
        one = session(seeds=[seed])
        one.observe(*known())
        made.append(one.step(future(16)))
    assert np.array_equal(made[0], made[1])
    assert (made[0] != made[2]).mean() > 0.5


def test_noise_depends_on_seed_and_place_alone(session: Callable[..., Session]) -> None:
    one, two = session(seeds=[3]), session(batch=2, seeds=[4, 3])
    noise = one.sampler.noise(one.seeds, [4, 5, 6])
    assert torch.equal(two.sampler.noise(two.seeds, [5, 6])[1], noise[0, 1:])
    corners = two.sampler.noise(two.seeds, [4, 5, 6])[:, :, 0, 0, 0]
    assert len(corners.unique()) == 6
    assert noise.mean().abs() < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_reset_forgets_the_world(session: Callable[..., Session]) -> None:
    one, fresh = session(), session()
    one.observe(*known())
    one.step(future(4))
    one.reset()
    assert (one.length, one.frames, one.latents, one.bank) == (0, 0, None, None)
    for each in (one, fresh):
        each.observe(*known(13))
    assert np.array_equal(one.step(future(8)), fresh.step(future(8)))


def test_observing_in_pieces_is_observing_at_once(session: Callable[..., Session]) -> None:
    whole, pieces = session(), session()
    data = known(25)
    whole.observe(*data)
    pieces.observe(*data.stretch(0, 9))
    pieces.observe(*data.stretch(9, 25))
    assert whole.length == pieces.length == 7
    actions = future(16)
    frames = whole.step(actions)
    assert_alike(pieces.step(actions), frames)
    torch.testing.assert_close(dreamt(pieces, 4), dreamt(whole, 4), atol=1e-5, rtol=1e-5)


def test_what_was_dreamt_can_be_corrected_by_observing(session: Callable[..., Session]) -> None:
    one, other = session(), session()
    data = known(25)
    for each in (one, other):
        each.observe(*data.stretch(0, 9))
        each.step(data.actions[9:13], data.world_to_camera[9:13])
    one.observe(*data.stretch(13, 17))
    assert one.length == 5
    assert one.step(future(4)).shape == (4, *SIZE, 3)
    other.observe(*data.stretch(13, 17)._replace(frames=255 - data.frames[13:17]))
    assert not torch.equal(dreamt(one, 1), dreamt(other, 1))


def test_first_frame_alone_is_enough(session: Callable[..., Session]) -> None:
    one = session()
    one.observe(*known(1))
    assert one.step(future(16)).std() > 0
    assert one.length == 5


def test_arguments_are_never_changed(session: Callable[..., Session]) -> None:
    one, data, actions = session(), known(), future(16)
    poses = integrate(data.world_to_camera[-1], np.concatenate((actions[:1] * 0, actions)))[1:]
    before = [x.copy() for x in (*data, actions, poses)]
    one.observe(*data)
    one.step(actions, poses)
    one.step(actions)
    for x, copy in zip((*data, actions, poses), before, strict=True):
        assert np.array_equal(x, copy)


def test_poses_are_integrated_from_the_actions(session: Callable[..., Session]) -> None:
    free, given = session(), session()
    data, actions = known(), future(32)
    poses = integrate(data.world_to_camera[-1], np.concatenate((actions[:1] * 0, actions)))[1:]
    for one in (free, given):
        one.observe(*data)
    frames = free.step(actions)
    given.step(actions[:16], poses[:16])
    assert_alike(given.step(actions[16:], poses[16:]), frames[16:])
    elsewhere = session()
    elsewhere.observe(*data)
    elsewhere.step(actions, poses[::-1].copy())
    assert (dreamt(elsewhere, 8) - dreamt(free, 8)).abs().max() > 1e-2


def test_what_was_dreamt_is_written_to_the_bank(session: Callable[..., Session]) -> None:
    one, other = session(), session()
    for each in (one, other):
        each.observe(*known())
    one.step(future(8))
    assert one.conditions is not None
    other.sampler.write(other.bank, dreamt(one, 2), one.conditions[5:])
    assert one.bank is not None
    assert other.bank is not None
    for a, b in zip(one.bank.layers, other.bank.layers, strict=True):
        assert torch.equal(a.keys[:, :, :7], b.keys[:, :, :7])
        assert torch.equal(a.values[:, :, :7], b.values[:, :, :7])


def test_a_trace_for_gradients_is_neither_kept_nor_felt(codec: Autoencoder) -> None:
    model = new_model().requires_grad_(True)
    one, other = (Session(codec, model, steps=2) for _ in range(2))
    made = []
    for each, traced in ((one, True), (other, False)):
        each.observe(*known())
        bank, past = each.bank, each.conditions
        assert bank is not None
        assert past is not None
        noise = each.sampler.noise(each.seeds, [5, 6])
        with torch.set_grad_enabled(traced):
            made.append(each.sampler.generate(bank, past[3:], noise))
            each.sampler.write(bank, made[-1], past[3:])
    assert not made[0].requires_grad
    assert torch.equal(made[0], made[1])
    assert one.bank is not None
    assert other.bank is not None
    for a, b in zip(one.bank.layers, other.bank.layers, strict=True):
        assert not a.keys.requires_grad
        assert torch.equal(a.keys[:, :, :7], b.keys[:, :, :7])
        assert torch.equal(a.values[:, :, :7], b.values[:, :, :7])


def test_the_last_lens_goes_on(session: Callable[..., Session]) -> None:
    one, data = session(), known()
    zoom = np.linspace(1.0, 1.5, 17)[:, None, None] * [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    one.observe(*data._replace(intrinsics=data.intrinsics * np.where(zoom, zoom, 1.0)))
    one.step(future(8))
    assert one.conditions is not None
    lens = one.conditions.lens[0]
    assert torch.equal(lens[5:], lens[4].expand(2, 4))
    assert lens[4, 0] > lens[0, 0]


def test_far_from_the_origin_is_as_good_as_near(session: Callable[..., Session]) -> None:
    near, far, data = session(), session(), known()
    near.observe(*data)
    moved = data.world_to_camera.copy()
    moved[:, :3, 3] -= moved[:, :3, :3] @ np.array([1e6, 0.0, -1e6])
    far.observe(*data._replace(world_to_camera=moved))
    for one in (near, far):
        one.step(future(4))
    torch.testing.assert_close(dreamt(far, 1), dreamt(near, 1), atol=1e-4, rtol=1e-4)


def test_guidance(session: Callable[..., Session]) -> None:
    made = {}
    for guidance in (None, 1.0, 0.0, 3.0):
        one = session(guidance=guidance)
        one.observe(*known())
        one.step(future(4))
        made[guidance] = dreamt(one, 1)
    torch.testing.assert_close(made[1.0], made[None], atol=1e-4, rtol=1e-4)
    assert (made[3.0] - made[1.0]).abs().max() > 1e-3
    # One chunk: without guidance's conditional half the actions are not heard.
    deaf = session(guidance=0.0)
    deaf.observe(*known())
    still = np.zeros((4, 6), np.float32)
    poses = integrate(known().world_to_camera[-1], np.concatenate((still[:1], future(4))))[1:]
    deaf.step(still, poses)
    assert torch.equal(dreamt(deaf, 1), made[0.0])


def closed(model: WorldModel) -> WorldModel:
    """The same model whose gates let nothing through."""
    twin = new_model(model.config)
    for module in twin.modules():
        if isinstance(module, DecoupledMemory):
            module.gate.weight.zero_()
            module.gate.bias.fill_(-200.0)
    return twin


def test_global_memory_off_is_a_closed_gate(
    session: Callable[..., Session], model: WorldModel
) -> None:
    off, shut, on = session(), session(model=closed(model)), session()
    off.global_memory = False
    for one in (off, shut, on):
        one.observe(*known(33))
        one.step(future(16))
    assert torch.equal(dreamt(off, 4), dreamt(shut, 4))
    assert (dreamt(on, 4) - dreamt(off, 4)).abs().max() > 1e-2


def test_shuffled_history_changes_far_memory_only(
    session: Callable[..., Session], model: WorldModel
) -> None:
    def dream(which: WorldModel, shuffle: bool) -> Tensor:
        one = session(model=which, batch=2)
        one.observe(*known(33, worlds=2))
        if shuffle:
            one.shuffle_history([1, 0])
        one.step(future(4, worlds=2))
        return dreamt(one, 1)

    assert (dream(model, True) - dream(model, False)).abs().max() > 1e-3
    without = closed(model)
    assert torch.equal(dream(without, True), dream(without, False))


def test_k_may_be_chosen_when_reading(session: Callable[..., Session]) -> None:
    few, usual, trained = session(retrieved=1), session(retrieved=6), session()
    for one in (few, usual, trained):
        one.observe(*known(33))
        one.step(future(4))
    assert torch.equal(dreamt(usual, 1), dreamt(trained, 1))
    assert not torch.equal(dreamt(few, 1), dreamt(trained, 1))


def strides(metres: float, frames: int, start: np.ndarray) -> np.ndarray:
    """Poses that move sideways in long strides."""
    poses = np.tile(start, (frames, 1, 1))
    poses[:, 0, 3] -= metres * (1 + np.arange(frames))
    return poses


def test_long_walks_move_the_anchor_and_nothing_else(
    session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = known()
    poses = strides(2.0, 24, data.world_to_camera[-1])  # 48 m: within reach, past half of it
    walker, rooted = session(), session()
    for one in (walker, rooted):
        one.observe(*data)
    assert walker.bank is not None
    assert rooted.bank is not None
    anchor = walker.bank.anchor.clone()
    walker.step(future(24), poses)
    assert (walker.bank.anchor - anchor).norm() > 30
    monkeypatch.setattr(Sampler, "_keep_near", lambda self, bank, conditions: None)
    rooted.step(future(24), poses)
    assert torch.equal(rooted.bank.anchor, anchor)
    torch.testing.assert_close(dreamt(walker, 6), dreamt(rooted, 6), atol=1e-3, rtol=1e-3)


def test_very_long_walks_stay_finite(session: Callable[..., Session]) -> None:
    one = session(chunk=4)
    data = known()
    one.observe(*data)
    one.step(future(80), strides(500.0, 80, data.world_to_camera[-1]))
    made = dreamt(one, 20)
    assert made.isfinite().all()
    # The last chunks are no wilder than the first.
    assert made[:, -4:].std() < 2 * made[:, :4].std()
    for layer in one.bank.layers:
        assert layer.keys[:, :, : one.length].abs().max() < 1e3


def test_roundtrip_through_the_codec(session: Callable[..., Session], codec: Autoencoder) -> None:
    frames = known().frames
    coded = session().codec_roundtrip(frames)
    expected = codec.decode(codec.encode(torch.from_numpy(frames)[None]))[0].numpy()
    assert np.array_equal(coded, expected)
    pair = session(batch=2).codec_roundtrip(known(worlds=2).frames)
    assert_alike(pair[0], coded)


def test_clocks_run(session: Callable[..., Session]) -> None:
    one = session()
    one.observe(*known())
    assert one.timings["rollout"] == 0
    one.step(future(4))
    assert set(one.timings) == {"encode", "prefill", "rollout", "decode"}
    assert all(seconds > 0 for seconds in one.timings.values())


@pytest.fixture(scope="module")
def usual(session: Callable[..., Session]) -> np.ndarray:
    """What comes after `known()` when nothing goes wrong."""
    one = session()
    one.observe(*known())
    return one.step(future(4))


def broken(**changes: np.ndarray) -> Known:
    return known()._replace(**changes)


def spoilt(x: np.ndarray, value: float, *at: int) -> np.ndarray:
    x = x.copy()
    x[at] = value
    return x


OBSERVATIONS = {
    "16-frames": (lambda: known(16), "frames: 16 frames, expected 1 [+] 4n"),
    "no-frames": (lambda: known().stretch(0, 0), "frames: 0 frames"),
    "wrong-size": (lambda: broken(frames=known().frames[:, :24]), "frames: pictures of 24 x 48"),
    "float-frames": (
        lambda: broken(frames=known().frames / 255),
        "frames: numbers of type float64",
    ),
    "actions-short": (lambda: broken(actions=acted(16)), "actions: 16 for 17 frames"),
    "poses-short": (
        lambda: broken(world_to_camera=known(16).world_to_camera),
        "world_to_camera: 16 for 17",
    ),
    "lenses-short": (lambda: broken(intrinsics=known(16).intrinsics), "intrinsics: 16 for 17"),
    "flat-actions": (lambda: broken(actions=acted(17)[0]), "actions: shape"),
    "action-out-of-range": (
        lambda: broken(actions=spoilt(acted(17), 99.0, 3, 2)),
        "actions: yaw is 99 in frame 4",
    ),
    "pose-not-rigid": (
        lambda: broken(world_to_camera=known().world_to_camera * 2),
        "world_to_camera: pose 1 is not rigid",
    ),
    "pose-not-a-number": (
        lambda: broken(world_to_camera=spoilt(known().world_to_camera, np.nan, 5, 0, 3)),
        "world_to_camera: pose 6 is not rigid",
    ),
}


@pytest.mark.parametrize(("make", "message"), OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_bad_observations_are_refused_and_leave_no_trace(
    make: Callable[[], Known], message: str, session: Callable[..., Session], usual: np.ndarray
) -> None:
    one = session()
    # As a user meets it: without the run-time checks of these tests.
    with pytest.raises(UserError, match=message):
        inspect.unwrap(Session.observe)(one, *make())
    assert one.length == 0
    one.observe(*known())
    assert np.array_equal(one.step(future(4)), usual)


def test_later_observations_have_4n_frames(session: Callable[..., Session]) -> None:
    one = session()
    one.observe(*known())
    with pytest.raises(UserError, match=r"frames: 5 frames, expected 4n"):
        one.observe(*known(5))


STEPS = {
    "no-actions": (lambda: (future(0),), "actions: 0 actions, expected a multiple of 4"),
    "5-actions": (lambda: (future(5),), "actions: 5 actions"),
    "out-of-range": (lambda: (spoilt(future(4), 2.0, 1, 0),), "actions: forward is 2 in frame 2"),
    "not-a-number": (lambda: (spoilt(future(4), np.nan, 0, 2),), "actions: yaw is nan"),
    "five-columns": (lambda: (future(4)[:, :5],), "actions: shape .4, 5."),
    "two-worlds": (lambda: (future(4, worlds=2),), "actions: shape .2, 4, 6. for 1 worlds"),
    "few-poses": (
        lambda: (future(8), known().world_to_camera[:4]),
        "world_to_camera: 4 for 8 actions",
    ),
    "not-rigid": (
        lambda: (future(4), known().world_to_camera[:4] + 0.1),
        "world_to_camera: pose 1 is not rigid",
    ),
}


@pytest.mark.parametrize(("make", "message"), STEPS.values(), ids=STEPS)
def test_bad_steps_are_refused_and_leave_no_trace(
    make: Callable[[], tuple], message: str, session: Callable[..., Session], usual: np.ndarray
) -> None:
    one = session()
    one.observe(*known())
    with pytest.raises(UserError, match=message):
        inspect.unwrap(Session.step)(one, *make())
    assert np.array_equal(one.step(future(4)), usual)


def test_nothing_is_made_of_nothing(session: Callable[..., Session]) -> None:
    with pytest.raises(UserError, match="Call observe first"):
        session().step(future(4))
    with pytest.raises(UserError, match="Call observe first"):
        session().shuffle_history([0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 3}, "chunk: 3 latents, trained with"),
        ({"chunk": 0}, "chunk: 0 latents, trained with"),
        ({"steps": 0}, "steps: 0 denoising steps"),
        ({"batch": 2, "seeds": [1]}, "seeds: 1 for 2 worlds"),
    ],
)
def test_bad_settings_are_refused(
    settings: dict, message: str, session: Callable[..., Session]
) -> None:
    with pytest.raises(UserError, match=message):
        session(**settings)


def test_chunks_that_no_size_divides_are_refused_before_anything_is_made(
    session: Callable[..., Session],
) -> None:
    pairs = new_model(dataclasses.replace(CONFIG, chunk_sizes=(2, 4)))
    one = session(model=pairs)
    one.observe(*known())
    with pytest.raises(UserError, match=r"actions: 1 latents are left.*multiple of 8 actions"):
        one.step(future(12))
    assert one.length == 5


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, codec: Autoencoder, model: WorldModel) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_weights(folder / "m.safetensors", model.state_dict(), {"model": to_plain(CONFIG)})
    save_weights(folder / "c.safetensors", codec.state_dict(), {"codec": to_plain(CODEC)})
    return folder


def test_a_session_opens_from_files(stored: Path) -> None:
    one = Session.open("tiny", stored / "m.safetensors", stored / "c.safetensors", device="cpu")
    assert (one.steps, one.guidance, one.chunk) == (4, None, 4)
    assert one.weights_sha256 is not None
    one.observe(*known(5))
    assert one.step(future(4)).shape == (4, *SIZE, 3)
    other = Session.open(
        "tiny", stored / "m.safetensors", stored / "c.safetensors", device="cpu",
        steps=1, guidance=2.0, chunk=1, retrieved=3, batch=2, seeds=[4, 5],
    )  # fmt: skip
    assert (other.steps, other.guidance, other.chunk, other.retrieved) == (1, 2.0, 1, 3)
    assert other.seeds == [4, 5]


def test_a_session_s_products_may_be_in_8_bits(stored: Path) -> None:
    files = (stored / "m.safetensors", stored / "c.safetensors")
    rounded = Session.open("tiny", *files, device="cpu", gemm_dtype=torch.float8_e4m3fn)
    whole = Session.open("tiny", *files, device="cpu")
    made = []
    for one in (rounded, whole):
        one.observe(*known())
        one.step(future(4))
        made.append(one.latents[:, -1])
    assert rounded.model.blocks[0].ffn.up.weight.dtype == torch.float8_e4m3fn
    assert 0 < (made[0] - made[1]).abs().max() < made[1].abs().max()


def test_weights_that_do_not_belong_together_are_refused(stored: Path) -> None:
    foreign = Autoencoder(dataclasses.replace(CODEC, channels=8))
    path = stored / "foreign.safetensors"
    save_weights(path, foreign.state_dict(), {"codec": to_plain(foreign.config)})
    with pytest.raises(UserError, match="4 latent channels and a codec of 8"):
        Session.open("tiny", stored / "m.safetensors", path, device="cpu")
    with pytest.raises(UserError, match="holds codec, not a model"):
        Session.open("tiny", stored / "c.safetensors", stored / "c.safetensors", device="cpu")
    with pytest.raises(UserError, match="missing"):
        Session.open("tiny", stored / "none.safetensors", stored / "c.safetensors", device="cpu")
    with pytest.raises(UserError, match="preset: 'huge' is unknown"):
        Session.open("huge")


def test_rewinding_and_replaying_makes_the_same_frames(session: Callable[..., Session]) -> None:
    one, straight = session(chunk=2), session(chunk=2)
    for each in (one, straight):
        each.observe(*known())
    actions = future(24)
    expected = straight.step(actions)
    one.step(actions[:16])
    one.step(-actions[16:24])
    one.rewind(5 + 4)
    assert (one.length, one.frames) == (9, 33)
    assert np.array_equal(one.step(actions[16:]), expected[16:])
    assert torch.equal(dreamt(one, 6), dreamt(straight, 6))
    # Into what was observed, too: the dream goes on from a picture it was shown.
    one.rewind(3)
    short = session(chunk=2)
    short.observe(*known().stretch(0, 9))
    assert_alike(one.step(actions), short.step(actions))
    torch.testing.assert_close(dreamt(one, 6), dreamt(short, 6), atol=1e-5, rtol=1e-5)


def test_rewinding_moves_the_anchor_back(session: Callable[..., Session]) -> None:
    one, data = session(), known()
    one.observe(*data)
    assert one.bank is not None
    anchor = one.bank.anchor.clone()
    poses = strides(2.0, 24, data.world_to_camera[-1])
    first = one.step(future(24), poses)
    assert not torch.equal(one.bank.anchor, anchor)
    made = dreamt(one, 6)
    one.rewind(5)
    assert torch.equal(one.bank.anchor, anchor)
    assert_alike(one.step(future(24), poses), first)
    torch.testing.assert_close(dreamt(one, 6), made, atol=1e-5, rtol=1e-5)


def test_rewinding_into_a_chunk_writes_its_rest_anew(codec: Autoencoder) -> None:
    """Where the latents of a chunk see each other in the write pass, none may see what is gone."""
    seeing = dataclasses.replace(CONFIG, reading=MemoryConfig(Reach(window=2), retrieved=6))
    model = new_model(seeing)
    one, short = (Session(codec, model, steps=1) for _ in range(2))
    one.observe(*known(29))
    short.observe(*known(29).stretch(0, 21))
    one.rewind(6)  # of chunks of 4: two of the second are left
    assert one.bank is not None
    assert short.bank is not None
    short.bank.truncate(6)
    short.bank.rebase(one.bank.anchor)
    for a, b in zip(one.bank.layers, short.bank.layers, strict=True):
        torch.testing.assert_close(a.keys[:, :, :6], b.keys[:, :, :6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("latents", [0, 6, -1])
def test_what_never_was_cannot_be_returned_to(
    latents: int, session: Callable[..., Session]
) -> None:
    one = session()
    with pytest.raises(UserError, match="nothing is known"):
        one.rewind(1)
    one.observe(*known())
    with pytest.raises(UserError, match=r"latents: .* the world has 1 to 5"):
        one.rewind(latents)


def test_forks_go_their_own_ways(session: Callable[..., Session]) -> None:
    one = session()
    one.observe(*known())
    one.step(future(4))
    twin = one.fork()
    straight = one.step(future(8))
    aside = twin.step(-future(8))
    assert (one.length, twin.length) == (8, 8)
    assert not np.array_equal(straight, aside)
    twin.rewind(6)
    assert np.array_equal(twin.step(future(8)), straight)
    assert one.length == 8


def saved_and_loaded(one: Session, session: Callable[..., Session], path: Path, **more) -> Session:
    one.save(path, {"told": "by a test"})
    other = session(**more)
    assert other.load(path) == {"told": "by a test"}
    return other


def test_a_saved_world_goes_on_as_the_unsaved_one(
    session: Callable[..., Session], tmp_path: Path
) -> None:
    data = known()
    one = session(seeds=[7], steps=1, chunk=1)
    one.observe(*data)
    one.global_memory = False
    one.step(future(4))
    one.global_memory, one.retrieved, one.chunk = True, 3, 2
    one.step(future(24), strides(2.0, 24, data.world_to_camera[-1]))  # far: the anchor moves
    path = tmp_path / "a.world"
    other = saved_and_loaded(one, session, path, steps=3)
    assert (other.steps, other.chunk, other.retrieved, other.seeds) == (1, 2, 3, [7])
    assert (other.length, other.frames) == (one.length, one.frames)
    assert one.bank is not None
    assert other.bank is not None
    assert path.stat().st_size < one.length * one.bank.bytes_per_latent
    for a, b in zip(one.bank.layers, other.bank.layers, strict=True):
        assert torch.equal(a.keys[:, :, : one.length], b.keys[:, :, : one.length])
        assert torch.equal(a.pooled[:, :, : one.length * 6], b.pooled[:, :, : one.length * 6])
    assert np.array_equal(other.step(future(8)), one.step(future(8)))
    assert torch.equal(dreamt(other, 2), dreamt(one, 2))
    other.rewind(5)
    one.rewind(5)
    assert_alike(other.step(future(8)), one.step(future(8)))


def test_a_session_becomes_another_branch_without_building_what_they_share(
    session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = session(chunk=1)
    one.observe(*known())
    one.step(future(8))
    left = one.snapshot()
    one.rewind(6)
    one.step(-future(8))
    written = []
    write = Sampler.write
    monkeypatch.setattr(
        Sampler, "write", lambda *given: (written.append(given[2].shape[1]), write(*given))
    )
    assert list(one.restore(left)) == [7]
    assert written == [1]
    straight = session(chunk=1)
    straight.observe(*known())
    straight.step(future(8))
    assert np.array_equal(one.step(future(4)), straight.step(future(4)))


def test_damaged_worlds_are_refused(session: Callable[..., Session], tmp_path: Path) -> None:
    one = session()
    with pytest.raises(UserError, match="nothing was observed"):
        one.save(tmp_path / "none.world")
    one.observe(*known())
    path = tmp_path / "a.world"
    one.save(path)
    whole = path.read_bytes()
    for broken, problem in (
        (whole[:-100], "damaged"),
        (b"", "damaged"),
        (whole.replace(b"decmem-world/1", b"decmem-world/9"), "format 'decmem-world/9'"),
        (whole.replace(b'\\"latents\\": 5', b'\\"latents\\": 4'), "do not add up"),
        (whole.replace(b'\\"seeds\\": [0]', b'\\"seeds\\": [] '), "seeds"),
    ):
        assert broken != whole
        path.write_bytes(broken)
        with pytest.raises(UserError, match=problem):
            session().load(path)
    with pytest.raises(UserError, match="no file"):
        one.load(tmp_path / "absent.world")


def test_worlds_of_other_models_are_refused(
    codec: Autoencoder, session: Callable[..., Session], model: WorldModel, tmp_path: Path
) -> None:
    one = Session(codec, model, codec_sha256="one", sha256="one")
    one.observe(*known())
    one.save(tmp_path / "a.world")
    with pytest.raises(UserError, match="another codec"):
        Session(codec, model, codec_sha256="two").load(tmp_path / "a.world")
    with pytest.raises(UserError, match="latents of shape"):
        session(batch=2).load(tmp_path / "a.world")


def test_a_single_picture_is_enough(session: Callable[..., Session]) -> None:
    one = session()
    one.observe_picture(known().frames[0])
    assert one.step(future(8)).shape == (8, *SIZE, 3)
    assert (one.length, one.frames) == (3, 9)
    with pytest.raises(UserError, match="begun already"):
        one.observe_picture(known().frames[0])


def test_settings_change_between_chunks(session: Callable[..., Session]) -> None:
    one, other = session(steps=1, chunk=1), session(steps=3, chunk=1, guidance=2.0, retrieved=2)
    for each in (one, other):
        each.observe(*known(33))
    one.steps, one.guidance, one.retrieved = 3, 2.0, 2
    # The bank was read with another k while it was written: only the chunk itself is compared.
    other.history = one.fork().history
    assert np.array_equal(one.step(future(4)), other.step(future(4)))
    for name, value in (("steps", 0), ("chunk", 3), ("retrieved", 0), ("guidance", float("nan"))):
        broken = one.fork()
        setattr(broken, name, value)
        with pytest.raises(UserError, match=name):
            broken.step(future(4))


def test_the_lens_shows_what_was_read_and_changes_nothing(session: Callable[..., Session]) -> None:
    plain, watched = session(chunk=2), session(chunk=2)
    watched.lens = True
    for one in (plain, watched):
        one.observe(*known(33))
    assert np.array_equal(plain.step(future(8)), watched.step(future(8)))
    assert plain.seen is None
    lens = watched.seen
    assert lens is not None
    assert len(lens.lists) == len(lens.strength) == CONFIG.layers
    known_blocks = watched.length * 6
    counts = lens.counts(6, known_blocks)
    # Each of 2 layers, 2 heads and 2 latents reads k = 6 blocks for each of the 6 regions.
    assert counts.sum(-1).tolist() == [[2 * 2 * 2 * 6] * 6]
    assert torch.equal(counts, lens.counts(6, known_blocks, 0) + lens.counts(6, known_blocks, 1))
    assert not counts[:, :, 9 * 6 :].any()  # the chunk itself is no memory yet
    strength = lens.strengths()
    assert strength.shape == (1, 2, 6)
    assert ((strength > 0) & (strength < 1)).all()


def test_the_lens_measures_both_branches(codec: Autoencoder, model: WorldModel) -> None:
    one = Session(codec, closed(model), steps=1, chunk=1)
    one.lens = True
    one.observe(*known(33))
    one.step(future(4))
    assert one.seen is not None
    assert not one.seen.strengths().any()
    one.global_memory = False
    one.step(future(4))
    assert one.seen.lists == []


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_deferred_write_pass_changes_nothing(
    chunk: int, guidance: float | None, session: Callable[..., Session]
) -> None:
    prompt, late = (session(chunk=chunk, guidance=guidance) for _ in range(2))
    late.deferred = True
    data = known()
    poses = strides(2.0, 24, data.world_to_camera[-1])  # far enough for the anchor to move
    for one in (prompt, late):
        one.observe(*data)
    assert_alike(late.step(future(24), poses), prompt.step(future(24), poses))
    torch.testing.assert_close(dreamt(late, 6), dreamt(prompt, 6), atol=1e-5, rtol=1e-5)
    # What changes how the bank is written comes after what is owed to it.
    late.lens = True
    for one in (prompt, late):
        one.retrieved, one.steps = 2, 1
        one.step(future(8))
    torch.testing.assert_close(dreamt(late, 2), dreamt(prompt, 2), atol=1e-5, rtol=1e-5)
    assert late.seen is not None
    assert late.seen.strengths().shape[1] == chunk
    twin = late.fork()
    for one in (prompt, late, twin):
        one.rewind(9)
        one.step(future(8))
        torch.testing.assert_close(dreamt(one, 2), dreamt(prompt, 2), atol=1e-5, rtol=1e-5)


def test_a_deferred_write_pass_saves_a_pass(
    session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = session(steps=2, chunk=1)
    one.deferred = True
    one.observe(*known())
    one.step(future(4))
    passes = []
    forward = WorldModel.forward
    monkeypatch.setattr(
        WorldModel, "forward", lambda *given: (passes.append(1), forward(*given))[1]
    )
    one.step(future(16))
    assert len(passes) == 4 * 2
    assert one.bank is not None
    assert one.bank.length == one.length == 10


def test_known_latents_need_no_coding(
    session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = session(), session()
    one.observe(*known())
    latents = one.latents
    monkeypatch.setattr(other.codec, "encode", lambda *_: pytest.fail("coded again"))
    other.observe(*known(), latents=latents)
    assert np.array_equal(one.step(future(8)), other.step(future(8)))


def test_a_session_runs_as_it_is_told(session: Callable[..., Session]) -> None:
    data, actions = known(), future(16)
    told = Running(graphs="eager", bank_dtype=FP8, room=9, limit=9)
    one, plain = session(running=told), session()
    for each in (one, plain):
        each.observe(*data)
        each.step(actions)
    assert one.bank is not None
    assert one.bank.dtype == FP8
    assert one.bank.engine is not None
    assert (dreamt(one, 4) - dreamt(plain, 4)).abs().mean() < 0.3 * dreamt(plain, 4).std()
    twin = one.fork().bank
    assert twin is not None
    assert twin.engine is None
    with pytest.raises(UserError, match="the bank was made for 9"):
        one.step(actions)
    assert one.length == 9
