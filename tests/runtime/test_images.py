from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from wsss_deploy.errors import ImageError
from wsss_deploy.images import MAX_PIXELS, load_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(RGB).save(path)
    return path


def test_every_kind_of_source_gives_the_same_image(png):
    torch = pytest.importorskip("torch")
    planes = torch.from_numpy(RGB.copy()).permute(2, 0, 1)
    with png.open("rb") as file:
        sources = [
            png,
            str(png),
            png.read_bytes(),
            bytearray(png.read_bytes()),
            memoryview(png.read_bytes()),
            file,
            io.BytesIO(png.read_bytes()),
            Image.open(png),
            RGB,
            RGB[:, ::-1][:, ::-1],
            RGB.astype(np.uint16) * 257,
            RGB.astype(np.float64) / 255,
            (RGB / 255).astype(np.float32),
            planes,
            planes.float() / 255,
            (planes.float() / 255).requires_grad_(),
        ]
        for source in sources:
            loaded = load_image(source)
            assert loaded.dtype == np.uint8
            assert loaded.flags.c_contiguous
            np.testing.assert_array_equal(loaded, RGB)


def test_the_result_is_a_copy():
    source = RGB.copy()
    load_image(source)[:] = 0
    np.testing.assert_array_equal(source, RGB)
    grey = np.zeros((4, 4), np.uint8)
    assert not np.shares_memory(load_image(grey), grey)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    # How each stored picture has to be turned to be upright, from the EXIF standard, in numpy's words.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(RGB), exif=exif)), upright(RGB))


def test_exif_orientation_of_a_16_bit_image_and_of_nonsense():
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.array([[0, 65535, 257]], np.uint16))
    assert load_image(encoded(wide, "TIFF", exif=exif)).tolist() == [[[0] * 3], [[255] * 3], [[1] * 3]]
    exif[0x0112] = 77
    assert load_image(encoded(Image.fromarray(RGB), exif=exif)).shape == RGB.shape
    assert load_image(encoded(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0garbage")).shape == RGB.shape


def test_grey_modes():
    grey = RGB[..., 0]
    three = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(load_image(Image.fromarray(grey)), three)
    np.testing.assert_array_equal(load_image(grey), three)
    np.testing.assert_array_equal(load_image(grey[..., None]), three)
    bits = Image.fromarray(grey > 127)
    assert bits.mode == "1"
    np.testing.assert_array_equal(load_image(bits), np.where(three > 127, 255, 0))


@pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBA", "RGBa"])
def test_alpha_is_composed_over_white(mode):
    opaque = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
    opaque.putpixel((1, 0), (10, 10, 10, 0))
    if mode == "PA":  # Pillow's own conversion to PA drops alpha
        image = Image.new("PA", (2, 1))
        image.putpalette([10, 10, 10])
        image.putpixel((0, 0), (0, 255))
    else:
        image = opaque.convert("LA").convert("La") if mode == "La" else opaque.convert(mode)
    assert image.mode == mode
    assert load_image(image).tolist() == [[[10, 10, 10], [255, 255, 255]]]


def test_half_transparent_arrays_and_palettes():
    assert load_image(np.array([[[0, 100, 200, 51]]], np.uint8)).tolist() == [[[204, 224, 244]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    assert load_image(encoded(palette)).tolist() == [[[1, 2, 3], [9, 9, 9]]]
    assert load_image(encoded(palette, transparency=1)).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    assert load_image(encoded(Image.new("RGB", (1, 1), "red"), transparency=(255, 0, 0))).tolist() == [[[255] * 3]]


def test_cmyk_ycbcr_and_hsv():
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    for source in (encoded(red.convert("CMYK"), "JPEG"), encoded(red.convert("CMYK"), "TIFF")):
        assert np.abs(load_image(source).astype(int) - (200, 30, 30)).max() < 8
    for mode in ("CMYK", "YCbCr", "HSV"):
        assert np.abs(load_image(red.convert(mode)).astype(int) - (200, 30, 30)).max() < 4


def test_16_bit_values_scale_by_257(tmp_path):
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    for kind in ("PNG", "TIFF"):
        assert load_image(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == expected
    assert load_image(values)[0, :, 0].tolist() == expected
    assert load_image(values.astype(">u2"))[0, :, 0].tolist() == expected
    big = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert load_image(big)[0, :, 0].tolist() == expected
    assert load_image(Image.fromarray(values.astype(np.int32)))[0, :, 0].tolist() == expected
    assert load_image(Image.fromarray(np.array([[0, 255]], np.int32)))[0, :, 0].tolist() == [0, 255]


def test_float_modes():
    assert load_image(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))[0, :, 0].tolist() == [0, 128, 255]
    assert load_image(Image.fromarray(np.array([[0, 100, 255]], np.float32)))[0, :, 0].tolist() == [0, 100, 255]
    for bad in ([[0.0, -1.0]], [[0.0, 256.0]], [[0.0, np.nan]]):
        with pytest.raises(ImageError, match="expected 0 to 255"):
            load_image(Image.fromarray(np.array(bad, np.float32)))
    with pytest.raises(ImageError, match="expected 0 to 65535"):
        load_image(Image.fromarray(np.array([[0, 65536]], np.int32)))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (5000, 1, 3), (1, 3), (3, 3, 3)])
def test_thin_and_tiny_images(shape):
    assert load_image(np.zeros(shape, np.uint8)).shape == (*shape[:2], 3)


@pytest.mark.parametrize(
    ("array", "found", "remedy"),
    [
        (np.zeros((3, 40, 60), np.uint8), r"\(3, 40, 60\)", r"transpose\(1, 2, 0\)"),
        (np.zeros((40, 60, 2), np.uint8), r"\(40, 60, 2\)", r"\(H, W, 3\)"),
        (np.zeros((2, 40, 60, 3), np.uint8), "batch", "predict_batch"),
        (np.zeros(7, np.uint8), r"\(7,\)", r"\(H, W, 3\)"),
        (np.zeros((0, 9, 3), np.uint8), "no pixels", "1 x 1"),
        (np.zeros((4, 4, 3), np.int64), "int64", "astype"),
        (np.zeros((4, 4, 3), bool), "bool", "uint8"),
        (np.zeros((4, 4, 3), object), "object", "uint8"),
        (np.full((4, 4, 3), 200.0), "200", "divide by 255"),
        (np.full((4, 4, 3), -1.0), "-1", r"\[0, 1\]"),
        (np.full((4, 4, 3), np.nan), "nan", r"\[0, 1\]"),
    ],
)
def test_wrong_arrays_say_what_to_do(array, found, remedy):
    with pytest.raises(ImageError, match=found) as raised:
        load_image(array)
    raised.match(remedy)


def test_tensors():
    torch = pytest.importorskip("torch")
    planes = torch.from_numpy(RGB.copy()).permute(2, 0, 1)
    assert load_image(planes[0]).shape == (6, 9, 3)
    assert load_image(planes[:1]).shape == (6, 9, 3)
    assert load_image(torch.ones(4, 2, 2, dtype=torch.uint8) * 255).min() == 255
    assert load_image(torch.ones(3, 2, 2, dtype=torch.bfloat16)).min() == 255
    for tensor, remedy in [
        (planes.permute(1, 2, 0), r"permute\(2, 0, 1\)"),
        (planes[None], "predict_batch"),
        (planes.float(), "divide by 255"),
        (planes.long(), "uint8"),
    ]:
        with pytest.raises(ImageError, match=remedy):
            load_image(tensor)


def test_paths_that_are_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    for path, remedy in [
        (tmp_path / "absent.png", "no such image file"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty.png", r"empty \(0 bytes\)"),
        (tmp_path / "text.jpg", "not an image in a known format"),
        ("https://example.org/a.png", "download"),
        ("a\0b.png", "check the path"),
        ("x" * 300, "check the path"),
    ]:
        with pytest.raises(ImageError, match=remedy) as raised:
            load_image(path)
        assert str(path).split("\0")[0][:20] in str(raised.value)
    for source in (b"", None, 3, {"a": 1}, io.StringIO("text")):
        with pytest.raises(ImageError):
            load_image(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_files_are_named(kind, tmp_path):
    content = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    for part in (0.02, 0.3, 0.9):
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(ImageError, match=f"cut.{kind.lower()}"):
            load_image(path)


def test_flipped_bits_never_escape_as_another_error():
    content = encoded(Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)))
    for _ in range(200):
        damaged = bytearray(content)
        for position in RNG.integers(0, len(content), 3):
            damaged[position] ^= 1 << int(RNG.integers(8))
        with suppress(ImageError):  # anything else would escape
            assert load_image(bytes(damaged)).ndim == 3


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def test_decompression_bomb(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50_000, 50_000))
    with pytest.raises(ImageError, match=r"bomb\.png.*(pixels|megapixels)"):
        load_image(path)
    assert before == Image.MAX_IMAGE_PIXELS


def test_own_limit_holds_without_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="the limit is 179"):
        load_image(png_header(50_000, 50_000))
    huge = np.broadcast_to(np.zeros((1, 1), np.uint8), (MAX_PIXELS // 1000 + 1, 1000))  # one byte of memory
    with pytest.raises(ImageError, match="megapixels"):
        load_image(huge)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    loaded = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert loaded[0, 0].tolist() == [255, 0, 0]


def test_real_photos(shared):
    for path in sorted((shared / "data" / "voc_animals" / "images").iterdir())[:2]:
        np.testing.assert_array_equal(load_image(path), np.asarray(Image.open(path).convert("RGB")))
