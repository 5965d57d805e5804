"""JPEG frames that Pillow cannot decode: lossless ones, and extended ones with 12 bits. A decoding plugin of pydicom.

The codec is libjpeg-turbo, in the build of imagecodecs; both have permissive licences, and pydicom's own plugins for
these transfer syntaxes need either a library under the GPL or GDCM, which pydicom gives no extended frames of 12 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import imagecodecs
import numpy as np
from pydicom import uid
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder

from medfl_ray.errors import UnreadableFile

DECODER_DEPENDENCIES = dict.fromkeys((uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1), ("imagecodecs",))
"""pydicom looks for this name, and for `is_available`."""
LABEL = "medfl-ray"
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def is_available(syntax: str) -> bool:
    """Whether frames of this transfer syntax can be decoded here."""
    return syntax in DECODER_DEPENDENCIES and bool(imagecodecs.JPEG8.available)


def add_to_pydicom() -> None:
    """Let pydicom, and highdicom above it, decode these frames; a second call changes nothing."""
    for syntax in DECODER_DEPENDENCIES:
        decoder = get_decoder(syntax)
        if LABEL not in decoder.available_plugins:
            decoder.add_plugin(LABEL, (__name__, decode_frame.__name__))
        if "pillow" in decoder.available_plugins:
            # It would be asked first, fail at 12 bits, and have pydicom log a traceback for every frame.
            decoder.remove_plugin("pillow")


def decode_frame(frame: bytes, runner: DecodeRunner) -> bytes:
    """Decode one frame to its components as they were encoded, without a conversion of colours.

    Raises:
      UnreadableFile: the frame is cut off, is not what the DICOM header says, or is damaged.
    """
    precision, *encoded = _frame_header(frame)
    expected = [runner.rows, runner.columns, runner.samples_per_pixel]
    if encoded != expected or precision > runner.bits_allocated:
        raise UnreadableFile(
            f"a JPEG frame has (rows, columns, samples) {tuple(encoded)} of {precision} bits where the DICOM header "
            f"says {tuple(expected)} of {runner.bits_allocated}; export the file again from its archive"
        )
    if frame.rfind(END_OF_IMAGE) < frame.rfind(START_OF_SCAN):
        # The codec would fill up what is missing with grey. Neither marker can stand within a scan's data.
        raise UnreadableFile("a JPEG frame is cut off; export the file again from its archive")
    kept = "RGB" if runner.samples_per_pixel == 3 else None
    pixels = imagecodecs.jpeg8_decode(frame, colorspace=kept, outcolorspace=kept)
    return pixels.astype(np.dtype(f"<u{runner.bits_allocated // 8}"), copy=False).tobytes()


def _frame_header(frame: bytes) -> tuple[int, int, int, int]:
    """Return (precision in bits, rows, columns, components)."""
    for marker, content in _segments(frame):
        if marker in FRAME_HEADERS and len(content) >= 6:
            rows, columns = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
            return content[0], rows, columns, content[5]
    raise UnreadableFile("a JPEG frame has no header; the file is damaged, export it again from its archive")


def _segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the marker and the content of each segment before the first scan."""
    place = 2
    while place + 4 <= len(frame) and frame[place] == 0xFF:
        if frame[place + 1] == 0xFF:  # bytes that fill up to the next marker
            place += 1
            continue
        length = int.from_bytes(frame[place + 2 : place + 4], "big")
        yield frame[place + 1], frame[place + 4 : place + 2 + length]
        place += 2 + max(length, 2)
