"""Picture quality: how close generated frames are to the rendered truth.

Every function takes uint8 RGB frames ``(F, H, W, 3)`` of the same size and works in float64 on
values divided by 255, so the data range is 1. Nothing here knows where frames come from.
"""

import numpy as np
from jaxtyping import Float64, UInt8

PSNR_CAP_DB = 60.0
"""PSNR of equal frames, and the most any frame can score."""

SSIM_SIDE, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def _same_size(prediction: np.ndarray, truth: np.ndarray) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction: shape {prediction.shape}, but truth has {truth.shape}; "
            "compare frames of the same count and size"
        )


def mean_squared_error(
    prediction: UInt8[np.ndarray, "F H W 3"], truth: UInt8[np.ndarray, "F H W 3"]
) -> Float64[np.ndarray, "F"]:
    """Mean over pixels and channels of the squared difference, one value a frame, on [0, 1]."""
    _same_size(prediction, truth)
    errors = []
    for made, real in zip(prediction, truth, strict=True):  # one frame fits the cache, all do not
        difference = np.subtract(made, real, dtype=np.float64).ravel()
        errors.append(np.dot(difference, difference) / difference.size)
    return np.array(errors) / 255.0**2


def _decibels(error: Float64[np.ndarray, "F"]) -> Float64[np.ndarray, "F"]:
    floor = 10.0 ** (-PSNR_CAP_DB / 10.0)
    return -10.0 * np.log10(np.maximum(error, floor))


def psnr_per_frame(
    prediction: UInt8[np.ndarray, "F H W 3"], truth: UInt8[np.ndarray, "F H W 3"]
) -> Float64[np.ndarray, "F"]:
    """``10 log10(1 / MSE)`` of every frame in dB, at most 60. The headline figure of a window is
    the plain mean of these values over the window's frames."""
    return _decibels(mean_squared_error(prediction, truth))


def psnr_pooled(
    prediction: UInt8[np.ndarray, "F H W 3"], truth: UInt8[np.ndarray, "F H W 3"]
) -> float:
    """``10 log10(1 / MSE)`` with one MSE over all frames, in dB, at most 60. Never above the mean
    of the per-frame values (Jensen), as long as no frame reaches the cap."""
    return float(_decibels(mean_squared_error(prediction, truth).mean(keepdims=True))[0])


def psnr_legacy_worldmem(
    prediction: UInt8[np.ndarray, "F H W 3"], truth: UInt8[np.ndarray, "F H W 3"]
) -> float:
    """The pooled PSNR as WorldMem computed it before December 2025: a data range of 2 on images in
    [0, 1], which adds 20 log10(2) = 6.02 dB. Only for comparison with figures of that time."""
    return psnr_pooled(prediction, truth) + 20.0 * float(np.log10(2.0))


def _gaussian_rows(length: int) -> np.ndarray:
    """(length - 10, length): each row the Gaussian window at one place where it fits whole."""
    offsets = np.arange(SSIM_SIDE) - SSIM_SIDE // 2
    weights = np.exp(-(offsets**2) / (2.0 * SSIM_SIGMA**2))
    rows = np.zeros((length - SSIM_SIDE + 1, length))
    for place in range(len(rows)):
        rows[place, place : place + SSIM_SIDE] = weights / weights.sum()
    return rows


def _blur(images: np.ndarray) -> np.ndarray:
    """(H, W, C) to (H - 10, W - 10, C): the weighted mean wherever the whole window fits."""
    height, width, channels = images.shape
    rows = _gaussian_rows(height) @ images.reshape(height, width * channels)
    return _gaussian_rows(width) @ rows.reshape(-1, width, channels)


def ssim_per_frame(
    prediction: UInt8[np.ndarray, "F H W 3"], truth: UInt8[np.ndarray, "F H W 3"]
) -> Float64[np.ndarray, "F"]:
    """Structural similarity (Wang et al., 2004) of every frame, in [-1, 1].

    Per RGB channel, then the mean over channels and positions: an 11x11 Gaussian window of sigma
    1.5 at the positions where it fits whole, weighted (not sample) variances, data range 1,
    C1 = 0.01^2, C2 = 0.03^2. Raises ValueError for frames smaller than the window.
    """
    _same_size(prediction, truth)
    if min(truth.shape[1:3]) < SSIM_SIDE:
        raise ValueError(f"truth: {truth.shape[1]}x{truth.shape[2]} is smaller than 11x11")
    return np.array([_ssim(x / 255.0, y / 255.0) for x, y in zip(prediction, truth, strict=True)])


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    moments = _blur(np.concatenate([x, y, x * x, y * y, x * y], axis=2))
    mean_x, mean_y, square_x, square_y, product = np.split(moments, 5, axis=2)
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    spread = square_x - mean_x**2 + square_y - mean_y**2
    structure = (2 * (product - mean_x * mean_y) + SSIM_C2) / (spread + SSIM_C2)
    return float((luminance * structure).mean())


def gradient_energy(frames: UInt8[np.ndarray, "F H W 3"]) -> Float64[np.ndarray, "F"]:
    """How much detail a frame carries: the mean squared difference between horizontal neighbours
    plus that between vertical neighbours, over pixels and channels, on [0, 1], one value a frame.
    """
    values = frames / 255.0
    across = np.square(np.diff(values, axis=2)).mean(axis=(1, 2, 3))
    down = np.square(np.diff(values, axis=1)).mean(axis=(1, 2, 3))
    return across + down


def sharpness(
    prediction: UInt8[np.ndarray, "F H W 3"], truth: UInt8[np.ndarray, "F H W 3"]
) -> float | None:
    """Gradient energy of the prediction over that of the truth, both averaged over the frames
    first: 1 is as detailed as the truth, below 1 blurred. None where the truth is flat."""
    _same_size(prediction, truth)
    reference = float(gradient_energy(truth).mean())
    return float(gradient_energy(prediction).mean()) / reference if reference > 0 else None
