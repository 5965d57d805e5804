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
HALF_BLOCK = 2048  # the arrays of one pass stay in the processor's cache: three times as quick as one long pass
MANTISSA = np.int64(2**53 - 1)
SIGN_BIT = np.int64(-(2**63))
SINE_TERMS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8))


class GaussianNoise:
    """A stream of Gaussian noise; takes no seed, because anyone who knows the noise can take it off again.

    Every value is the sum of four independent draws over two: the gaps between the floating-point values
    that one draw can take would give away the exact sum beneath it.

    Source: Mironov 2012 (the attack); Holohan and Braghin 2021, arXiv:2107.10138, section 5.1 (the sum);
    Box and Muller 1958 (each draw).
    """

    def __init__(self) -> None:
        self._stream: CipherContext | None = None
        self._process = -1
        self._zeros = bytes(2 * NUM_SUMMED * HALF_BLOCK * 8)
        self._words = np.empty((2, NUM_SUMMED, HALF_BLOCK), np.int64)
        self._floats = np.empty((4, NUM_SUMMED, HALF_BLOCK))  # written anew by every pass: allocating takes longer

    def draw(self, size: int, std: float) -> Floats:
        """Return `size` independent draws of mean 0 and standard deviation `std`, in float64.

        Raises:
          PrivacyConfigError: std is not a number above 0.
        """
        if not (math.isfinite(std) and std > 0):
            raise PrivacyConfigError(f"the noise's standard deviation is {std!r}; it must be a number above 0")
        self._stream = None  # a key for each draw: a copy of this machine's memory must not repeat the next one
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
        sine to the last bit and the cosine is the root that is left. The arrays hold until the next call.
        """
        self._fill_words()
        radius_words, angle_words = self._words
        radius, cosine, sine, square = self._floats
        radius_words &= MANTISSA
        np.add(radius_words, 1.0, out=radius)
        radius *= 2.0**-53  # in (0, 1]: never the log of 0
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        np.bitwise_and(angle_words, MANTISSA, out=radius_words)
        angle = np.multiply(radius_words, math.pi / 2 * 2.0**-53, out=cosine)
        angle -= math.pi / 4
        _sine(angle, square, sine)
        np.multiply(sine, sine, out=square)
        np.subtract(1.0, square, out=cosine)
        np.sqrt(cosine, out=cosine)
        self._turn(radius, cosine, sine)
        return radius, cosine, sine

    def _turn(self, radius: Floats, cosine: Floats, sine: Floats) -> None:
        """Set the radius' sign and swap cosine and sine as the angle words say, bit by bit and in place."""
        swap, words = self._words
        bits, cosine_bits, sine_bits = (values.view(np.int64) for values in (radius, cosine, sine))
        np.left_shift(words, 1, out=swap)
        np.right_shift(swap, 63, out=swap)  # all ones where the two are to be swapped, otherwise zeros
        swap &= cosine_bits ^ sine_bits
        cosine_bits ^= swap
        sine_bits ^= swap
        words &= SIGN_BIT
        bits |= words

    def _fill_words(self) -> None:
        if self._stream is None or self._process != os.getpid():  # a forked child must not repeat its parent's stream
            key = algorithms.AES(os.urandom(32))
            self._stream = Cipher(key, modes.CTR(os.urandom(16))).encryptor()
            self._process = os.getpid()
        self._stream.update_into(self._zeros, self._words.data.cast("B"))

    def __reduce__(self) -> tuple[type[GaussianNoise], tuple[()]]:
        """A copy in another process starts a stream of its own."""
        return GaussianNoise, ()


def _sine(angle: Floats, square: Floats, out: Floats) -> Floats:
    """Write the sine of angles in [-pi/4, pi/4] to `out`: eight terms of its series, whose rest is below 5e-17."""
    np.multiply(angle, angle, out=square)
    np.multiply(square, SINE_TERMS[-1], out=out)
    for term in SINE_TERMS[-2:0:-1]:
        out += term
        out *= square
    out += 1.0
    out *= angle
    return out
