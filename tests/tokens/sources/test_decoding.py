"""Pixels of odd image files: made here byte by byte or by Pillow, with the values that they must have in RGB."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convexhead.errors import InputError
from convexhead.tokens import BrokenImageError, extract, open_source
from convexhead.tokens.sources.decode import decode_image

# Pillow warns of what it repairs or leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DEEP = np.array([[0, 100, 257, 32768], [65535, 40000, 128, 129]], np.uint16)
# v / 65535 * 255, rounded: 0, .39, 1, 127.5+, 255, 155.6, .498, .502
SHALLOW = np.array([[0, 0, 1, 128], [255, 156, 0, 1]], np.uint8)
GREY = np.array([[0, 60, 120], [255, 10, 200]], np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)


def png(samples: NDArray[Any], colour: int, bits: int, *chunks: bytes) -> bytes:
    """Write a PNG file; Pillow cannot write the deep ones."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = samples.astype(">u2" if bits == 16 else "u1")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, colour, 0, 0, 0)
    more = b"".join(chunk(each[:4], each[4:]) for each in chunks)
    end = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + end


def tiff(values: NDArray[Any], *, order: str = "<", white: int = 1, bits: int = 0, kind: int = 1, **tags: int) -> bytes:
    """Write a plain grey TIFF file of one strip; ``kind`` is its sample format."""
    height, width = values.shape
    data = values.tobytes()
    entries = {256: width, 257: height, 258: bits or values.itemsize * 8, 259: 1, 262: white, 277: 1, 278: height}
    entries |= {279: len(data), 339: kind} | {int(tag[1:]): value for tag, value in tags.items()}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    table = b"".join(struct.pack(f"{order}HHII", t, 4, 1, v) for t, v in sorted({**entries, 273: start}.items()))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(entries) + 1) + table + b"\0\0\0\0" + data


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(content: bytes) -> NDArray[np.uint8]:
    image = decode_image(io.BytesIO(content), "x")
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(values[..., None], 3, 2).astype(np.uint8)


TWELVE = np.array([[0, 4095, 2048, 1024]], np.uint16)


def pack_12(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack pairs of 12-bit values into three bytes."""
    a, b = values[..., ::2].astype(int), values[..., 1::2].astype(int)
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).reshape(len(values), -1).astype(np.uint8)


def tiff_12() -> bytes:
    content = tiff(pack_12(TWELVE), bits=12)
    # The packed row is 6 bytes, the image 4 values wide.
    return content.replace(struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4))


FLOATS = (DEEP / 65535).astype(np.float32)


VALUES: dict[str, tuple[bytes, NDArray[Any]]] = {
    "PNG, 16-bit grey": (png(DEEP, 0, 16), grey(SHALLOW)),
    "TIFF, 16-bit, Intel": (tiff(DEEP), grey(SHALLOW)),
    "TIFF, 16-bit, Motorola": (tiff(DEEP.astype(">u2"), order=">"), grey(SHALLOW)),
    "TIFF, 16-bit, small is white": (tiff(65535 - DEEP, white=0), grey(SHALLOW)),
    "TIFF, 12-bit": (tiff_12(), grey(np.array([[0, 255, 128, 64]]))),
    "TIFF, 16-bit, compressed": (
        saved(Image.fromarray(DEEP), "TIFF", compression="tiff_adobe_deflate"),
        grey(SHALLOW),
    ),
    "TIFF, float": (tiff(FLOATS, kind=3), grey(SHALLOW)),
    "TIFF, float, Motorola": (tiff(FLOATS.astype(">f4"), kind=3, order=">"), grey(SHALLOW)),
    "TIFF, float, small is white": (tiff(1 - FLOATS, kind=3, white=0), grey(SHALLOW)),
    "PGM, 16-bit": (b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes(), grey(SHALLOW)),
    "PGM, up to 1000": (b"P5 3 1 1000\n" + np.array([0, 500, 1000], ">u2").tobytes(), grey(np.array([[0, 128, 255]]))),
    "PNG, 16-bit colour: high byte": (png(np.stack([DEEP] * 3, -1), 2, 16), grey(DEEP >> 8)),
    "PNG, 16-bit grey with alpha": (png(np.stack([DEEP, DEEP[::-1]], -1), 4, 16), grey(DEEP >> 8)),
    "PNG, 16-bit RGBA": (png(np.stack([DEEP] * 3 + [DEEP[::-1]], -1), 6, 16), grey(DEEP >> 8)),
    "PNG, RGBA: alpha dropped": (saved(Image.fromarray(np.dstack([COLOUR, GREY])), "PNG"), COLOUR),
    "PNG, LA": (saved(Image.fromarray(np.dstack([GREY, GREY[::-1]])), "PNG"), grey(GREY)),
    "PNG, gamma is not applied": (png(GREY, 0, 8, b"gAMA" + struct.pack(">I", 100000)), grey(GREY)),
    "PNG, 1 bit": (saved(Image.fromarray(GREY > 100), "PNG"), grey((GREY > 100) * 255)),
    "BMP, 1 bit": (saved(Image.fromarray(GREY > 100), "BMP"), grey((GREY > 100) * 255)),
    "BMP": (saved(Image.fromarray(COLOUR), "BMP"), COLOUR),
    "TIFF, 8-bit, small is white": (tiff(255 - GREY, white=0), grey(GREY)),
    "TIFF, CMYK": (
        saved(Image.fromarray(np.dstack([255 - COLOUR, 0 * GREY]), "CMYK"), "TIFF"),
        COLOUR,
    ),
    "WebP, lossless": (saved(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR),
}


@pytest.mark.parametrize("case", VALUES)
def test_values(case: str) -> None:
    content, expected = VALUES[case]
    np.testing.assert_array_equal(decode(content), expected)


def test_palette_is_looked_up_and_its_transparency_dropped() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for kind, options in (("PNG", {"transparency": 1}), ("GIF", {"transparency": 1}), ("BMP", {})):
        np.testing.assert_array_equal(
            decode(saved(image, kind, **options)), [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
        )
    la = image.copy()
    la.putalpha(Image.fromarray(np.array([[0, 255, 9]], np.uint8)))
    np.testing.assert_array_equal(decode(saved(la, "TIFF"))[0, 0], [10, 20, 30])


def test_jpeg_in_cmyk_is_not_a_negative() -> None:
    """Adobe writes inverted inks; either way paper is white and full inks are dark."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:, 3] = 255
    pixels = decode(saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)).astype(int)
    assert pixels[:, :7].min() > 245
    assert pixels[:, 9:].max() < 10


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_animations_give_their_first_frame(kind: str) -> None:
    dark, light = (Image.new("RGB", (16, 16), (value,) * 3) for value in (40, 200))
    lighter = Image.new("RGB", (16, 16), (230,) * 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(dark, kind, save_all=True, append_images=[light, lighter], **options)
    with Image.open(io.BytesIO(content)) as image:
        assert getattr(image, "n_frames", 1) == 3
    np.testing.assert_allclose(decode(content), 40, atol=2)


# Where EXIF has the first row and the first column of the stored pixels, as (row, column) of the upright image.
SCENE = np.kron(np.array([[0, 60, 120], [180, 220, 255]], np.uint8), np.ones((16, 16), np.uint8))
STORED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],  # first row top, first column right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.T,  # left, top
    6: lambda a: a.T[::-1],  # right, top: rows are the upright columns from the right
    7: lambda a: a.T[::-1, ::-1],  # right, bottom
    8: lambda a: a.T[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("tag", STORED)
def test_orientation(kind: str, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    image = Image.fromarray(np.ascontiguousarray(STORED[tag](SCENE)))
    upright = decode(saved(image, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {})))
    assert upright.shape == (*SCENE.shape, 3)
    np.testing.assert_allclose(upright[8::16, 8::16, 0], SCENE[8::16, 8::16], atol=3)


def test_orientation_of_deep_images() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = grey(np.rot90(SHALLOW, -1))
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    np.testing.assert_array_equal(decode(png(DEEP, 0, 16, chunk)), turned)
    np.testing.assert_array_equal(decode(tiff(DEEP, _274=6)), turned)


def odd_exif() -> dict[str, bytes]:
    """EXIF blocks that are wrong in one way each."""
    odd = {"empty": b"", "no EXIF": b"hello", "only a head": b"Exif\0\0II*\0"}
    for name, entry in {
        "tag 0": (0x0112, 3, 1, 0),
        "tag 9": (0x0112, 3, 1, 9),
        "tag 70000": (0x0112, 4, 1, 70000),
        "a text": (0x0112, 2, 4, 0x41424344),
        "rational out of the file": (0x0112, 5, 1, 10**9),
        "of type 99": (0x0112, 99, 1, 6),
        "10^9 of them": (0x0112, 3, 10**9, 8),
    }.items():
        odd[name] = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", *entry) + bytes(4)
    # An upright image with another tag that cannot be written back: text where a number should be.
    more = struct.pack("<HHIHH", 0x0112, 3, 1, 1, 0) + struct.pack("<HHII", 0x0100, 2, 4, 0x41424344)
    odd["another tag"] = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + more + bytes(4)
    return odd


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", odd_exif())
def test_odd_exif_turns_nothing(kind: str, name: str) -> None:
    image = Image.fromarray(SCENE)
    content = saved(image, kind, exif=odd_exif()[name], **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_allclose(decode(content)[8::16, 8::16, 0], SCENE[8::16, 8::16], atol=3)


def test_odd_tag_beside_the_orientation() -> None:
    """The orientation counts although the rest of the block cannot be written back."""
    entries = struct.pack("<HHII", 0x0100, 1, 1, 0) + struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0)
    block = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    content = saved(Image.fromarray(SCENE), "PNG", exif=block)
    np.testing.assert_array_equal(decode(content)[..., 0], SCENE[::-1, ::-1])


def test_odd_metadata_of_tiff_files() -> None:
    """Numbers where XMP data, a text or a block of tags should be."""
    for tag in (270, 282, 306, 700, 34377, 34665, 34675, 34853, 40965):
        for value in (0, 8, 10**9, 2**32 - 1):
            content = tiff(GREY[::-1], **{f"_{tag}": value, "_274": 4})
            np.testing.assert_array_equal(decode(content), grey(GREY), err_msg=f"tag {tag} is {value}")


UNKNOWN: dict[str, bytes] = {
    "32-bit integers": tiff(DEEP.astype(np.int32), kind=2),
    "32-bit integers without sign": tiff(DEEP.astype(np.uint32)),
    "16-bit integers with sign": tiff(DEEP.astype(np.int16), kind=2),
    "floats up to 255": tiff(FLOATS * 255, kind=3),
    "floats from -1": tiff(FLOATS * 2 - 1, kind=3),
    "NaN": tiff(np.where(FLOATS > 0.5, np.nan, FLOATS).astype(np.float32), kind=3),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_range_is_refused_and_never_skipped(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "good.tif").write_bytes(tiff(FLOATS, kind=3))
    (folder / "odd.tif").write_bytes(UNKNOWN[case])
    with pytest.raises(InputError, match=r"odd\.tif.*black and white are unknown.*8 or 16 bits"):
        extract(folder.parent, "patches:2", tmp_path / "out", skip_broken=True)


def broken_files() -> dict[str, bytes]:
    whole = {
        "png": saved(Image.fromarray(COLOUR), "PNG"),
        "jpg": saved(Image.fromarray(SCENE), "JPEG"),
        "gif": saved(Image.fromarray(SCENE), "GIF"),
        "bmp": saved(Image.fromarray(COLOUR), "BMP"),
        "tif": tiff(DEEP),
        "webp": saved(Image.fromarray(SCENE), "WEBP"),
        "ppm": saved(Image.fromarray(COLOUR), "PPM"),
    }
    broken = {f"half.{kind}": content[: len(content) // 2] for kind, content in whole.items()}
    broken |= {"empty.png": b"", "text.jpg": b"hello", "zeros.gif": bytes(1000)}
    broken["crc.png"] = whole["png"][:30] + bytes([whole["png"][30] ^ 1]) + whole["png"][31:]
    broken["zlib.png"] = png(GREY, 0, 8).replace(b"\x78\x9c", b"\x78\x9d", 1)
    broken["bomb.png"] = png(np.zeros((1, 1), np.uint8), 0, 8).replace(
        b"IHDR" + struct.pack(">II", 1, 1), b"IHDR" + struct.pack(">II", 60_000, 60_000)
    )
    broken["five channels.tif"] = tiff(GREY, _277=5)
    broken["float colour.tif"] = tiff(FLOATS, kind=3, white=2)
    broken["no tags.tif"] = b"II*\0\x08\0\0\0\0\0"
    broken["strange maximum.ppm"] = b"P6 2 2 99999999\n" + bytes(12)
    return broken


def test_broken_files_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    names = []
    for name, content in broken_files().items():
        (folder / name).write_bytes(content)
        names.append(f"a/{name}")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to(tmp_path / "nothing")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    os.mkfifo(folder / "pipe.png")
    names += ["a/folder.png", "a/nowhere.png", "a/itself.png", "a/pipe.png"]
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "good.png")
    source = open_source(folder.parent)
    assert sorted(source.files("train")) == sorted([*names, "a/good.png"])
    for index, name in enumerate(source.files("train")):
        if name != "a/good.png":
            with pytest.raises(BrokenImageError, match=f"cannot read the image .*{name.split('/')[1]}': [^\n]+$"):
                source.load("train", index)
    store = extract(folder.parent, "patches:2", tmp_path / "out", skip_broken=True)
    assert store["train"].files == ["a/good.png"]
    assert sorted(store["train"].broken) == sorted(names)
    with pytest.raises(BrokenImageError):
        extract(folder.parent, "patches:2", tmp_path / "other")


@pytest.mark.parametrize(
    "error", [struct.error("odd"), SyntaxError("odd"), OverflowError(), MemoryError(), zlib.error("odd"), KeyError(7)]
)
def test_whatever_a_decoder_raises_is_a_broken_image(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    content = saved(Image.fromarray(COLOUR), "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(BrokenImageError, match=r"'x': [A-Za-z0-9]+$"):
        decode(content)


def test_random_damage_ends_in_an_image_or_a_broken_image() -> None:
    chance = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a text"
    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    whole = [saved(Image.fromarray(SCENE), kind, **({"exif": exif} if kind != "PPM" else {})) for kind in kinds]
    broken = 0
    for content in [*whole, tiff(DEEP), png(DEEP, 0, 16)]:
        for _ in range(40):
            damaged = bytearray(content)
            for at in chance.integers(0, min(len(damaged), 300), 3):
                damaged[at] = chance.integers(256)
            try:
                decode(bytes(damaged))
            except InputError:
                broken += 1
    assert broken > 40


def test_stores_of_deep_images_made_before_they_were_scaled_are_refused(tmp_path: Path) -> None:
    """The fingerprint of shallow images is what it was; that of deep ones is not."""
    (tmp_path / "a").mkdir()
    for content, same in (
        (saved(Image.fromarray(COLOUR), "PNG"), True),
        (png(DEEP, 0, 16), False),
        (tiff(DEEP), False),
    ):
        (tmp_path / "a" / "x.png").write_bytes(content)
        before = hashlib.sha256(f"a/x.png\0{hashlib.sha256(content).hexdigest()}\n".encode()).hexdigest()
        assert (open_source(tmp_path).fingerprint() == before) == same
