"""pydicom's own test files are read to the pixels that a table holds, whatever library decodes them.

The table was written with other codecs (pylibjpeg's libjpeg and openjpeg). Lossless frames and uncompressed ones are
held by a checksum; those of lossy JPEG and JPEG 2000, whose decoders may round differently, by 64 values of their
components and the mean.
"""

import hashlib
import json
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.uid import JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1

from medfl_ray.data.formats.dicom_series import decode_pixels, read_dicom
from medfl_ray.errors import UnreadableFile

# pydicom remarks on the odd files that are the point of these tests.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FOLDER = Path(pydicom.data.__file__).parent
TABLE = json.loads(Path(__file__).with_name("pydicom_pixels.json").read_text(encoding="utf-8"))
GREY_LEVELS = 1


@pytest.mark.parametrize("name", TABLE)
def test_a_file_of_pydicom_has_the_pixels_of_the_table(name):
    expected = TABLE[name]
    components = np.ascontiguousarray(pixel_array(pydicom.dcmread(FOLDER / name, force=True), raw=True))
    assert list(components.shape) == expected["shape"]
    if "sha256" in expected:
        little = components.astype(components.dtype.newbyteorder("<"))
        assert hashlib.sha256(little.tobytes()).hexdigest().startswith(expected["sha256"])
        return
    places = np.linspace(0, components.size - 1, len(expected["at"])).astype(int)
    found = components.ravel()[places].astype(np.int64)
    assert np.abs(found - expected["at"]).max() <= GREY_LEVELS
    assert components.mean() == pytest.approx(expected["mean"], abs=0.05)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if "volume" in row])
def test_a_file_of_pydicom_that_is_an_image_is_read_as_one(name):
    volume = read_dicom(FOLDER / name)
    assert list(volume.array.shape) == TABLE[name]["volume"]
    assert np.isfinite(volume.array).all()


def test_the_table_holds_what_pydicom_brings():
    assert len(TABLE) == 101
    assert sum("volume" in row for row in TABLE.values()) == 92
    assert sum("at" in row for row in TABLE.values()) == 18


def jpeg(ct, frame, syntax, bits):
    """One slice of a series with a JPEG frame as its pixels."""
    slice_ = ct.slices[0]
    slice_.file_meta.TransferSyntaxUID = syntax
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = (8 if bits <= 8 else 16), bits, bits - 1
    slice_.PixelRepresentation = 0
    slice_.PixelData = encapsulate([frame])
    slice_["PixelData"].is_undefined_length = True
    return slice_


def pixels_like(ct, bits):
    rows, columns = ct.slices[0].Rows, ct.slices[0].Columns
    values = np.random.default_rng(bits).integers(0, 2**bits, (rows, columns))
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


@pytest.mark.parametrize("bits", [8, 10, 12, 15, 16])
@pytest.mark.parametrize(("syntax", "predictor"), [(JPEGLosslessSV1, 1), (JPEGLossless, 4), (JPEGLossless, 7)])
def test_lossless_frames_of_every_depth_come_back_bit_for_bit(dicom, bits, syntax, predictor):
    ct = dicom()
    pixels = pixels_like(ct, bits)
    frame = imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=predictor, bitspersample=bits)
    assert np.array_equal(decode_pixels(jpeg(ct, frame, syntax, bits)), pixels)


def test_signed_lossless_pixels_keep_their_sign(dicom):
    ct = dicom()
    signed = pixels_like(ct, 16).view(np.int16)
    frame = imagecodecs.jpeg8_encode(signed.view(np.uint16), lossless=True, bitspersample=16)
    slice_ = jpeg(ct, frame, JPEGLosslessSV1, 16)
    slice_.PixelRepresentation = 1
    assert (signed < 0).any()
    assert np.array_equal(decode_pixels(slice_), signed)


def test_eight_bits_within_sixteen_are_widened(dicom):
    ct = dicom()
    pixels = pixels_like(ct, 8)
    frame = imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=8)
    slice_ = jpeg(ct, frame, JPEGLosslessSV1, 16)
    assert np.array_equal(decode_pixels(slice_), pixels.astype(np.uint16))


@pytest.mark.parametrize("bits", [8, 12])
def test_an_extended_frame_is_near_the_image_that_it_was_made_of(dicom, bits):
    ct = dicom()
    ramp = np.add.outer(np.arange(ct.slices[0].Rows), np.arange(ct.slices[0].Columns)) * 2
    pixels = ramp.astype(np.uint8 if bits == 8 else np.uint16)
    frame = imagecodecs.jpeg8_encode(pixels, level=100, bitspersample=bits)
    decoded = decode_pixels(jpeg(ct, frame, JPEGExtended12Bit, bits))
    assert np.abs(decoded.astype(int) - pixels.astype(int)).max() <= 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frame: frame[: len(frame) // 2],
        lambda frame: frame[:-2],
        lambda frame: frame[:30],
        lambda frame: b"\xff\xd8\xff\xd9",
        lambda frame: b"no JPEG at all, and of an odd length",
    ],
)
def test_a_frame_that_is_cut_off_or_none_is_refused(dicom, spoil):
    ct = dicom()
    frame = imagecodecs.jpeg8_encode(pixels_like(ct, 12), lossless=True, bitspersample=12)
    with pytest.raises(UnreadableFile, match="cannot be decoded"):
        decode_pixels(jpeg(ct, spoil(frame), JPEGLosslessSV1, 12))


def test_a_frame_of_another_size_than_its_header_says_is_refused_before_it_is_decoded(dicom, monkeypatch):
    ct = dicom()
    frame = imagecodecs.jpeg8_encode(np.zeros((3000, 2000), np.uint16), lossless=True, bitspersample=12)
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableFile, match="cannot be decoded"):
        decode_pixels(jpeg(ct, frame, JPEGLosslessSV1, 12))
    with pytest.raises(UnreadableFile, match="cannot be decoded"):
        decode_pixels(jpeg(ct, imagecodecs.jpeg8_encode(pixels_like(ct, 12), lossless=True), JPEGLosslessSV1, 8))
