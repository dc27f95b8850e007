"""Quality measures against hand-worked numbers and independent brute force."""

import math

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from decmem.evaluation import quality


def frames(value: int, count: int = 1, height: int = 12, width: int = 13) -> np.ndarray:
    return np.full((count, height, width, 3), value, dtype=np.uint8)


def noise(seed: int, count: int = 2, height: int = 14, width: int = 17) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_psnr_of_a_known_offset() -> None:
    # Every value off by 51 = 255 / 5: MSE 1/25, so 10 log10(25) = 13.979 dB.
    assert quality.psnr_per_frame(frames(151), frames(100)) == pytest.approx([13.9794000867])


def test_psnr_is_symmetric_in_sign_and_does_not_wrap_around() -> None:
    up = quality.psnr_per_frame(frames(255), frames(0))
    down = quality.psnr_per_frame(frames(0), frames(255))
    assert up == pytest.approx([0.0])
    assert down == pytest.approx([0.0])


def test_equal_frames_reach_the_cap_and_no_more() -> None:
    truth = noise(0)
    assert quality.psnr_per_frame(truth, truth) == pytest.approx([60.0, 60.0])
    almost = truth.copy()
    almost[0, 0, 0, 0] ^= 1  # one value off by one: 77 dB uncapped
    assert quality.psnr_per_frame(almost, truth)[0] == pytest.approx(60.0)


def test_per_frame_mean_pooled_and_legacy_differ_as_defined() -> None:
    truth = frames(100, count=2)
    prediction = truth.copy()
    prediction[0] += 51  # MSE 0.04 -> 13.979 dB
    prediction[1] += 5  # MSE 1/2601 -> 34.151 dB
    assert quality.psnr_per_frame(prediction, truth).mean() == pytest.approx(24.0654, abs=1e-3)
    pooled = 10 * math.log10(2 / (0.04 + 1 / 2601))
    assert quality.psnr_pooled(prediction, truth) == pytest.approx(pooled)
    legacy = quality.psnr_legacy_worldmem(prediction, truth)
    assert legacy - pooled == pytest.approx(6.0206, abs=1e-4)


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """The definition with four plain loops: one channel at a time, one window at a time."""
    ramp = np.array([[i * i + j * j for j in range(-5, 6)] for i in range(-5, 6)])
    window = np.exp(-ramp / 4.5)
    window /= window.sum()
    scores = []
    for channel in range(3):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                a = x[top : top + 11, left : left + 11, channel] / 255.0
                b = y[top : top + 11, left : left + 11, channel] / 255.0
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                scores.append(
                    (2 * ma * mb + 1e-4)
                    * (2 * cov + 9e-4)
                    / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
                )
    return float(np.mean(scores))


def test_ssim_equals_brute_force() -> None:
    x, y = noise(1), noise(2)
    y[0] = (0.7 * x[0] + 0.3 * y[0]).astype(np.uint8)
    expected = [ssim_by_hand(a, b) for a, b in zip(x, y, strict=True)]
    assert quality.ssim_per_frame(x, y) == pytest.approx(expected, abs=1e-12)


def test_ssim_of_flat_frames_is_the_luminance_term() -> None:
    # Constant 0.2 against constant 0.8: (2 * 0.16 + 1e-4) / (0.04 + 0.64 + 1e-4).
    value = (0.32 + 1e-4) / (0.68 + 1e-4)
    assert quality.ssim_per_frame(frames(51), frames(204)) == pytest.approx([value])
    assert quality.ssim_per_frame(frames(51), frames(51)) == pytest.approx([1.0])


def test_ssim_needs_a_whole_window() -> None:
    with pytest.raises(ValueError, match="smaller than 11x11"):
        quality.ssim_per_frame(frames(0, height=10), frames(0, height=10))


def test_gradient_energy_of_stripes() -> None:
    # Columns alternate 0 and 255: every horizontal difference is 1, every vertical one 0.
    stripes = frames(0)
    stripes[:, :, ::2] = 255
    assert quality.gradient_energy(stripes) == pytest.approx([1.0])
    assert quality.gradient_energy(stripes.swapaxes(1, 2)) == pytest.approx([1.0])
    half = stripes // 255 * 51  # contrast 1/5: energy 1/25
    assert quality.sharpness(half, stripes) == pytest.approx(0.04)


def test_sharpness_is_the_ratio_of_means_and_absent_for_a_flat_truth() -> None:
    stripes = frames(0, count=2)
    stripes[0, :, ::2] = 255
    both = np.concatenate([stripes[:1], stripes[:1]])
    assert quality.sharpness(both, stripes) == pytest.approx(2.0)
    assert quality.sharpness(stripes, frames(7, count=2)) is None


def test_sizes_must_agree() -> None:
    # The run-time shape checks, where they are on, come first.
    with pytest.raises((ValueError, TypeCheckError), match=r"same count|Type-check"):
        quality.psnr_per_frame(frames(0), frames(0, count=2))
