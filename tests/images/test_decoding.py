"""One decoder for all that people have on disk: right, or a ``BadImageError`` that says which image and why."""

import io
import logging
import os
import random
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pgt_hf.analysis import Mistake, plot_mistakes
from pgt_hf.images import BadImageError, ImageDataset, ImageTransform, collate, preprocessing, read_upright
from pgt_hf.images.dataset import thumbnail

CONFIG = {"input_size": (3, 16, 16), "crop_pct": 1.0}
FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})


def photo(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] + np.array([0, 10, 20])
    return Image.fromarray(pixels.clip(max=255).astype(np.uint8))


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def split_of(files: list[bytes | Path | None]) -> Dataset:
    cells = [
        None if file is None else {"bytes": None, "path": str(file)} if isinstance(file, Path)
        else {"bytes": file, "path": f"{i}.png"}
        for i, file in enumerate(files)
    ]  # fmt: skip
    return Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(len(files))]}, features=FEATURES)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "I;16"])
def test_png_with_any_byte_changed_is_a_bad_image(mode):
    whole = photo().convert("L").point(lambda v: v * 200, "I") if mode == "I;16" else photo().convert(mode)
    whole = file_of(whole.convert("I;16") if mode == "I;16" else whole)
    read_upright(whole)
    draw = random.Random(0)
    for place in [*range(60), *draw.choices(range(60, len(whole)), k=60), *range(len(whole) - 12, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        with pytest.raises(BadImageError):
            read_upright(bytes(damaged))


def test_png_may_end_in_something_else():
    assert read_upright(file_of(photo()) + b"left over").tobytes() == photo().tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_upright_in_every_format(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    upright = read_upright(file_of(photo(), kind, exif=exif, **({"quality": 100} if kind != "TIFF" else {})))
    turned = photo()
    turned.getexif()[ExifTags.Base.Orientation] = orientation
    expected = ImageOps.exif_transpose(turned)
    assert upright.size == expected.size
    assert np.abs(np.asarray(upright, dtype=int) - np.asarray(expected, dtype=int)).mean() < 4


def test_exif_that_cannot_be_written_again_does_no_harm_to_the_image():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\3\0\0\x87i\0\4\0\0\0\1\xff\xff\xff\xff"
    assert read_upright(file_of(photo(), "JPEG", exif=exif)).size == (60, 40)


def levels(top: float, dtype: str) -> np.ndarray:
    return (np.linspace(0, top, 64).reshape(8, 8)).astype(dtype)


def raw_tiff(pixels: np.ndarray) -> bytes:
    """A big-endian TIFF, which Pillow reads and does not write."""
    height, width = pixels.shape
    entries = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 3, height), (279, 4, pixels.nbytes)]
    directory = len(entries).to_bytes(2, "big")
    for tag, kind, value in entries:
        field = value.to_bytes(2, "big") + b"\0\0" if kind == 3 else value.to_bytes(4, "big")
        directory += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + field
    data = pixels.astype(">u2").tobytes()
    return b"MM\0*" + (8 + len(data)).to_bytes(4, "big") + data + directory + bytes(4)


BRIGHT = {  # file, its brightest value of 255
    "16-bit PNG": (lambda: file_of(Image.fromarray(levels(65535, "uint16"))), 255),
    "16-bit TIFF": (lambda: file_of(Image.fromarray(levels(65535, "uint16")), "TIFF"), 255),
    "16-bit big-endian TIFF": (lambda: raw_tiff(levels(65535, "uint16")), 255),
    "16-bit mode I": (lambda: file_of(Image.fromarray(levels(65535, "int32")), "TIFF"), 255),
    "16-bit PGM": (lambda: b"P5 8 8 65535 " + levels(65535, ">u2").tobytes(), 255),
    "12 bits in a 16-bit PNG": (lambda: file_of(Image.fromarray(levels(4095, "uint16"))), 255),
    "12 bits, big-endian": (lambda: raw_tiff(levels(4095, "uint16")), 255),
    "8 bits in a 16-bit PNG": (lambda: file_of(Image.fromarray(levels(200, "uint16"))), 200),
    "32-bit mode I": (lambda: file_of(Image.fromarray(levels(2**31 - 1, "int32")), "TIFF"), 255),
    "8 bits in mode I": (lambda: file_of(Image.fromarray(levels(200, "int32")), "TIFF"), 200),
    "floats in 0..1": (lambda: file_of(Image.fromarray(levels(1, "float32")), "TIFF"), 255),
    "floats in 0..255": (lambda: file_of(Image.fromarray(levels(200, "float32")), "TIFF"), 200),
    "floats of 16 bits": (lambda: file_of(Image.fromarray(levels(65535, "float32")), "TIFF"), 255),
}


@pytest.mark.parametrize("kind", BRIGHT)
def test_grey_of_more_than_8_bits_keeps_its_brightness(kind):
    make, brightest = BRIGHT[kind]
    for image in (make(), Image.open(io.BytesIO(make()))):  # as a file, and opened by somebody else
        pixels = np.asarray(read_upright(image), dtype=int)
        expected = np.linspace(0, brightest, 64).reshape(8, 8)
        assert pixels.shape == (8, 8, 3) and np.abs(pixels - expected[..., None]).max() <= 1.01


def deep_png(pixels: np.ndarray, colour: int, *, exif: bytes = b"") -> bytes:
    """A PNG of 16 bits in colour or with alpha, which Pillow reads and does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
    chunks = [(b"IHDR", header), *([(b"eXIf", exif)] if exif else []), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_tiff(pixels: np.ndarray, order: str, *, packed: bool = False, planar: bool = False) -> bytes:
    """A TIFF of 16 bits in colour, as one strip, or one for each colour."""
    height, width, _ = pixels.shape
    planes = np.moveaxis(pixels, -1, 0) if planar else pixels[None]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) if packed else strip for strip in strips]
    endian = "little" if order == "<" else "big"

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, endian)

    def field(values: list[int], size: int) -> tuple[int, bytes]:
        return len(values), b"".join(number(value, size) for value in values)

    places = np.cumsum([8, *map(len, strips)]).tolist()
    entries = {256: (3, [width]), 257: (3, [height]), 258: (3, [16, 16, 16]), 259: (3, [8 if packed else 1])}
    entries |= {262: (3, [2]), 273: (4, places[:-1]), 277: (3, [3]), 278: (3, [height])}
    entries |= {279: (4, [len(strip) for strip in strips]), 284: (3, [2 if planar else 1])}
    start = places[-1] + places[-1] % 2
    beyond, more = start + 2 + 12 * len(entries) + 4, b""
    directory = number(len(entries), 2)
    for tag, (kind, values) in entries.items():
        count, content = field(values, 2 if kind == 3 else 4)
        directory += number(tag, 2) + number(kind, 2) + number(count, 4)
        if len(content) <= 4:
            directory += content.ljust(4, b"\0")
        else:
            directory += number(beyond + len(more), 4)
            more += content
    head = (b"II" if order == "<" else b"MM") + number(42, 2) + number(start, 4)
    return head + b"".join(strips) + b"\0" * (places[-1] % 2) + directory + number(0, 4) + more


def colour(top: int, channels: int = 3) -> np.ndarray:
    pixels = np.stack([np.linspace(0, top * share, 48).reshape(6, 8) for share in (1, 0.5, 0.25)], axis=-1)
    alpha = np.full((6, 8, 1), 65535)
    return np.concatenate([pixels[..., : channels - 1], alpha], axis=-1) if channels in (2, 4) else pixels


DEEP = {
    "PNG": lambda top: deep_png(colour(top), 2),
    "PNG with alpha": lambda top: deep_png(colour(top, 4), 6),
    "grey PNG with alpha": lambda top: deep_png(colour(top, 2), 4),
    **{
        f"TIFF {order} {'packed' * packed} {'planar' * planar}": (
            lambda top, order=order, packed=packed, planar=planar: deep_tiff(
                colour(top), order, packed=packed, planar=planar
            )
        )
        for order in "<>" for packed, planar in ((False, False), (False, True), (True, False))
    },
}  # fmt: skip


@pytest.mark.parametrize(("top", "brightest"), [(65535, 255), (4095, 255), (200, 200)])
@pytest.mark.parametrize("kind", DEEP)
def test_colour_of_16_bits_keeps_its_brightness_however_many_of_them_it_uses(kind, top, brightest):
    pixels = np.asarray(read_upright(DEEP[kind](top)), dtype=int)
    expected = colour(top)[..., [0, 0, 0] if "grey" in kind else [0, 1, 2]] * brightest / top
    assert pixels.shape == (6, 8, 3) and np.abs(pixels - expected).max() <= 1.01


def test_compressed_planes_of_16_bits_are_right_or_refused():
    bright = read_upright(deep_tiff(colour(65535), "<", packed=True, planar=True))
    assert bright.tobytes() == read_upright(deep_tiff(colour(65535), "<")).tobytes()
    with pytest.raises(BadImageError, match="few of them used, in compressed planes"):
        read_upright(deep_tiff(colour(4095), "<", packed=True, planar=True))


def test_palette_with_alpha_is_read_without_a_warning(recwarn):
    palette = photo().quantize(16)
    found = read_upright(file_of(palette, transparency=bytes(range(0, 256, 16))))
    assert found.tobytes() == palette.convert("RGB").tobytes()
    assert not recwarn.list


def test_dark_colour_of_16_bits_is_upright_too():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = read_upright(deep_png(colour(4095), 2, exif=exif.tobytes()[6:]))
    assert turned == read_upright(deep_png(colour(4095), 2)).transpose(Image.Transpose.ROTATE_270)


def test_values_that_are_no_grey_levels_are_black():
    pixels = np.array([[np.nan, -3.0, 0.0, 0.5, 1.0, np.inf]], dtype=np.float32)
    found = np.asarray(read_upright(file_of(Image.fromarray(pixels), "TIFF")))
    assert found[0, :, 0].tolist() == [0, 0, 0, 128, 255, 0]


@pytest.mark.parametrize(
    ("kind", "options"), [(kind, {}) for kind in ("PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG")]
    + [("TIFF", {"compression": "tiff_lzw"}), ("JPEG", {"progressive": True})],
)  # fmt: skip
def test_size_is_refused_by_the_header_alone(kind, options, monkeypatch):
    """Most of the pixels are cut off: who decodes first complains of that."""
    file = file_of(Image.effect_noise((400, 400), 80).convert("RGB"), kind, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    cut = file if kind == "PNG" or options else file[: len(file) // 2] if kind != "TIFF" else file
    loaded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loaded.append(kind))
    with pytest.raises(BadImageError, match="400 x 400 pixels|160000 pixels|exceeds limit|cannot be decoded"):
        read_upright(cut)
    assert not loaded


def test_progressive_jpeg_counts_whole_whatever_it_is_reduced_to(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500 * 500)
    big = photo(800, 800)
    assert read_upright(file_of(big, "JPEG"), 32).size == (32, 32)
    with pytest.raises(BadImageError, match="800 x 800 pixels"):
        read_upright(file_of(big, "JPEG", progressive=True), 32)


NO_PIXELS = {
    "it is empty, damaged": b"",
    "a web page": b"<!DOCTYPE html><html>404</html>",
    "perhaps SVG": b'<?xml version="1.0"?><svg/>',
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "it is HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "it is JPEG XL": b"\xff\x0a0000",
    "it is a PDF": b"%PDF-1.4",
    "it is an archive": b"PK\x03\x04....",
    "PostScript, which is not run": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "no pixels: 0 x 5|damaged": b"P6\n0 5\n255\n",
}


@pytest.mark.parametrize("says", NO_PIXELS)
def test_what_is_no_image_is_refused_by_what_it_is(says):
    transform = ImageTransform(CONFIG, training=True)
    for read in (read_upright, transform):
        with pytest.raises(BadImageError, match=says):
            read(NO_PIXELS[says])


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 300, "/dev/zero", "/dev/stdin", "~"])
def test_path_that_no_image_can_have_is_a_bad_image(path):
    split = split_of([Path(path)])
    with pytest.raises(BadImageError, match="image 0"):
        ImageDataset(split, ImageTransform(CONFIG, training=False))[0]


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(BadImageError, match=r"x.png\): the file cannot be read: it is a device or a pipe"):
        ImageDataset(split_of([tmp_path / "x.png"]), ImageTransform(CONFIG, training=False))[0]


def bad_files(folder: Path) -> dict[str, bytes | Path | None]:
    (folder / "locked").mkdir()
    return {
        "the cell is empty": None,
        "empty, damaged or in no known format": b"",
        "Truncated File Read": file_of(photo(), "JPEG")[:-500],
        "truncated or damaged": file_of(photo())[:-40],
        "No such file": folder / "nowhere.png",
        "Is a directory": folder / "locked",
        "exceeds limit": file_of(Image.new("1", (400, 400))),
    }


def transformers_model() -> ViTForImageClassification:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=16, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "evaluation", "transformers"])
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_of_any_kind_are_skipped_or_named(kind, workers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    if kind == "transformers":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
        transform = preprocessing(transformers_model(), tmp_path / "model")
    else:
        transform = ImageTransform(CONFIG, training=kind == "training")
    bad = bad_files(tmp_path)
    split = split_of([file_of(photo()), *bad.values(), raw_tiff(levels(65535, "uint16"))])
    images = ImageDataset(split, transform, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        how = "forkserver" if workers else None  # where Pillow's limit has to be told to the worker
        (batch,) = DataLoader(
            images, len(images), num_workers=workers, collate_fn=collate, multiprocessing_context=how
        )
    assert batch["labels"].tolist() == [0, *[-100] * len(bad), 0]
    assert images.bad_images == len(bad)
    assert [bool(image.any()) for image in batch["pixel_values"]] == [label == 0 for label in batch["labels"]]
    if not workers:
        for index, (says, record) in enumerate(zip(bad, caplog.records, strict=True), start=1):
            assert record.message.startswith(f"image {index} ") and says in record.message
    strict = ImageDataset(split, transform)
    for index, (says, file) in enumerate(bad.items(), start=1):
        path = "" if file is None else str(file) if isinstance(file, Path) else f"{index}.png"
        with pytest.raises(BadImageError) as error:
            strict[index]
        assert f"image {index}" in str(error.value) and says in str(error.value) and path in str(error.value)


def test_transformers_models_see_images_upright(tmp_path):
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    transform = preprocessing(transformers_model(), tmp_path)
    turned, plain = (transform(file_of(photo(), **options)) for options in ({"exif": exif}, {}))
    torch.testing.assert_close(turned, plain.transpose(1, 2).flip(2), atol=0.03, rtol=0)


def test_error_of_a_setting_is_not_taken_for_a_bad_image():
    with pytest.raises(ValueError, match="scale must be a number in .0, 1., got -1.0") as error:
        ImageTransform(CONFIG, training=True, scale=(-1.0, -0.5))(file_of(photo()))
    assert not isinstance(error.value, BadImageError)


def test_mistakes_are_drawn_whatever_the_images_are(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300)
    giant = file_of(photo(1000, 800), "JPEG")
    split = split_of([giant, b"nothing", tmp_path / "nowhere.png", None, file_of(photo())])
    assert [thumbnail(split, i, 32) and thumbnail(split, i, 32).size for i in range(5)] == [
        (32, 26), None, None, None, (32, 21),
    ]  # fmt: skip
    evaluation = SimpleNamespace(
        names=["cat", "dog"], probabilities="softmax(z)", mistakes=[Mistake(i, 0, 1, 0.9) for i in range(5)]
    )
    plot_mistakes(evaluation, split, tmp_path / "mistakes.png")
    assert (tmp_path / "mistakes.png").is_file()
