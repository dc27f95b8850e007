"""Sines and cosines of multiples of 1/8 degree, from integer arithmetic alone.

A maths library may differ in the last bit between machines; this table does not.
"""

import numpy as np

EIGHTHS = 8
"""Angle units per degree."""
CIRCLE = 360 * EIGHTHS
SINE_BITS = 40
"""SINE holds round(sin * 2**40)."""

_PI = 3141592653589793238462643383279502884197
_PI_DIGITS = 39
_BITS = 160


def _sine_table() -> np.ndarray:
    """Rotate (1, 0) by 1/8 degree again and again in 160-bit fixed point."""
    one = 1 << _BITS
    angle = (_PI << _BITS) // (180 * EIGHTHS * 10**_PI_DIGITS)
    sine, cosine, term = 0, 0, one
    for power in range(40):
        sign = -1 if power % 4 >= 2 else 1
        if power % 2:
            sine += sign * term
        else:
            cosine += sign * term
        term = (term * angle >> _BITS) // (power + 1)
    quarter = CIRCLE // 4
    values = []
    x, y = one, 0
    for _ in range(quarter + 1):
        values.append((y + (1 << (_BITS - SINE_BITS - 1))) >> (_BITS - SINE_BITS))
        x, y = (x * cosine - y * sine) >> _BITS, (x * sine + y * cosine) >> _BITS
    first = np.array(values, np.int64)
    half = np.concatenate([first, first[-2:0:-1]])
    return np.concatenate([half, -half])


SINE = _sine_table()
"""(2880,) int64: sine of each multiple of 1/8 degree, times 2**40."""
COSINE = np.roll(SINE, -CIRCLE // 4)
"""(2880,) int64: cosine likewise."""
