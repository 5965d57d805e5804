"""Gaussian noise from AES-256 in counter mode, keyed by the operating system."""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from medfl_ray.errors import PrivacyConfigError

Floats = npt.NDArray[np.float64]

NUM_SUMMED = 4
HALF_BLOCK = 4096  # the arrays of one pass stay in the processor's cache: three times as quick as one long pass
MANTISSA = np.uint64(2**53 - 1)
SWAP_BIT = np.uint64(1 << 62)
SINE_TERMS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8))


class GaussianNoise:
    """A stream of Gaussian noise; takes no seed, because whoever knows the noise can take it off again.

    Every value is the sum of four independent draws over two: the gaps between the floating-point values
    that one draw can take would give away the exact sum beneath it.

    Source: Mironov 2012 (the attack); Holohan and Braghin 2021, arXiv:2107.10138, section 5.1 (the sum);
    Box and Muller 1958 (each draw).
    """

    def __init__(self) -> None:
        self._stream: CipherContext | None = None
        self._process = -1
        self._zeros = bytes(2 * NUM_SUMMED * HALF_BLOCK * 8)
        self._words = np.empty((2, NUM_SUMMED, HALF_BLOCK), np.uint64)

    def draw(self, size: int, std: float) -> Floats:
        """Return `size` independent draws of mean 0 and standard deviation `std`, in float64.

        Raises:
          PrivacyConfigError: std is not a number above 0.
        """
        if not (math.isfinite(std) and std > 0):
            raise PrivacyConfigError(f"the noise's standard deviation is {std!r}; it must be a number above 0")
        num_blocks = -(-size // (2 * HALF_BLOCK))
        noise = np.empty((num_blocks, 2, HALF_BLOCK))
        for block in noise:
            radius, cosine, sine = self._polar()
            np.multiply(cosine, radius, out=cosine).sum(axis=0, out=block[0])
            np.multiply(sine, radius, out=sine).sum(axis=0, out=block[1])
        values = noise.reshape(-1)[:size]
        values *= std / math.sqrt(NUM_SUMMED)
        return values

    def _polar(self) -> tuple[Floats, Floats, Floats]:
        """Return Rayleigh radii of either sign, and cosines and sines of uniform angles, each [4, HALF_BLOCK].

        The top bit of the second word is the radius' sign (half a turn), the next one swaps cosine and sine
        (a quarter turn); the rest is an angle between -45 and 45 degrees, where a short series gives the
        sine to the last bit and the cosine is the root that is left.
        """
        self._fill_words()
        radius_words, angle_words = self._words
        sign, swap = angle_words.view(np.float64), (angle_words & SWAP_BIT) != 0
        radius = ((radius_words & MANTISSA).astype(np.float64) + 1.0) * 2.0**-53  # in (0, 1]: never the log of 0
        radius = np.copysign(np.sqrt(-2.0 * np.log(radius)), sign)
        angle = (angle_words & MANTISSA).astype(np.float64) * (math.pi / 2 * 2.0**-53) - math.pi / 4
        sine = _sine(angle)
        cosine = np.sqrt(1.0 - sine * sine)
        return radius, np.where(swap, sine, cosine), np.where(swap, cosine, sine)

    def _fill_words(self) -> None:
        if self._stream is None or self._process != os.getpid():  # a forked child must not repeat its parent's stream
            key = algorithms.AES(os.urandom(32))
            self._stream = Cipher(key, modes.CTR(os.urandom(16))).encryptor()
            self._process = os.getpid()
        self._stream.update_into(self._zeros, self._words.data.cast("B"))

    def __reduce__(self) -> tuple[type[GaussianNoise], tuple[()]]:
        """A copy in another process starts a stream of its own."""
        return GaussianNoise, ()


def _sine(angle: Floats) -> Floats:
    """Return the sine of angles in [-pi/4, pi/4]: eight terms of its series, whose rest is below 5e-17."""
    square = angle * angle
    total: Floats = square * SINE_TERMS[-1]
    for term in SINE_TERMS[-2:0:-1]:
        total += term
        total *= square
    total += 1.0
    total *= angle
    return total
