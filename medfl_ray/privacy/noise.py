"""Gaussian noise from AES-256 in counter mode, keyed by the operating system."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from medfl_ray.errors import PrivacyConfigError

Floats = npt.NDArray[np.float64]
NUM_SUMMED = 4
BLOCK = 8192


class GaussianNoise:
    """A stream of Gaussian noise; takes no seed, because whoever knows the noise can take it off again.

    Every value is the sum of four independent draws over two: the gaps between the floating-point values
    that one draw can take would give away the exact sum beneath it.

    Source: Mironov 2012 (the attack); Holohan and Braghin 2021, arXiv:2107.10138, section 5.1 (the sum).
    """

    def __init__(self) -> None:
        self._stream: CipherContext | None = None
        self._process = -1

    def draw(self, size: int, std: float) -> Floats:
        """Return `size` independent draws of mean 0 and standard deviation `std`, in float64.

        Raises:
          PrivacyConfigError: std is not a number above 0.
        """
        if not (np.isfinite(std) and std > 0):
            raise PrivacyConfigError(f"the noise's standard deviation is {std!r}; it must be a number above 0")
        noise = np.empty(size)
        for start in range(0, size, BLOCK):
            noise[start : start + BLOCK] = self._summed(min(BLOCK, size - start))
        noise *= std / np.sqrt(NUM_SUMMED)
        return noise

    def _summed(self, size: int) -> Floats:
        half = -(-size // 2)
        radius_bits, angle_bits = self._words(2 * NUM_SUMMED * half).reshape(2, NUM_SUMMED, half)
        # (0, 1]: the logarithm of 0 never occurs
        radius = np.sqrt(-2.0 * np.log(((radius_bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53))
        angle = (angle_bits >> np.uint64(11)) * (2.0 * np.pi * 2.0**-53)
        both = np.concatenate([(radius * np.cos(angle)).sum(axis=0), (radius * np.sin(angle)).sum(axis=0)])
        return both[:size]

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        if self._stream is None or self._process != os.getpid():  # a forked child must not repeat its parent's stream
            key = algorithms.AES(os.urandom(32))
            self._stream = Cipher(key, modes.CTR(os.urandom(16))).encryptor()
            self._process = os.getpid()
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)

    def __reduce__(self) -> tuple[type[GaussianNoise], tuple[()]]:
        """A copy in another process starts a stream of its own."""
        return GaussianNoise, ()
