import io
import random

import numpy as np
import pytest
from launch import SHARED
from PIL import Image

from pgt_hf.images import load_image_dataset, read_image
from pgt_hf.images.jpeg import decode_rows

SAMPLE = SHARED / "imagenet-sample"


def jpeg(width: int, height: int, mode: str = "RGB", **options) -> bytes:
    rng = np.random.default_rng(width * height)
    image = Image.fromarray(rng.integers(256, size=(20, 30, 3), dtype=np.uint8)).resize((width, height))
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", **({"quality": 90} | options))
    return file.getvalue()


def by_pillow(file: bytes, reduction: int = 1) -> np.ndarray:
    image = Image.open(io.BytesIO(file))
    image.draft("RGB", (image.width // reduction, image.height // reduction))
    return np.asarray(image.convert("RGB"))


def check(file: bytes, rows: int, reduction: int) -> int:
    """Compares with Pillow; returns how many rows were decoded."""
    width, height = Image.open(io.BytesIO(file)).size
    pixels = decode_rows(file, width, height, rows, reduction)
    expected = by_pillow(file, reduction)
    assert len(pixels) >= rows
    np.testing.assert_array_equal(pixels[:rows], expected[:rows])
    return len(pixels)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:4:4"},
        {"mode": "L"},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"optimize": True, "comment": b"\xff\xda\xff\xd9"},
    ],
    ids=str,
)
def test_the_pixels_are_pillows(options, reduction):
    for width, height in ((321, 243), (128, 128), (97, 401)):
        file = jpeg(width, height, **options)
        scaled = -(-height // reduction)
        for rows in {min(8, scaled), scaled // 3, scaled // 2 + 1, scaled - 1, scaled}:
            decoded = check(file, rows, reduction)
            whole = "progressive" in options or "restart_marker_rows" in options
            assert decoded == (scaled if whole else min(rows + 2, scaled))


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="../shared/data is absent")
def test_the_pixels_are_pillows_on_photos():
    split = load_image_dataset(str(SAMPLE))["validation"].select(range(0, 1000, 20))
    draw, fast = random.Random(0), 0
    for image in split.with_format(None).data.column("image").to_pylist():
        file = read_image(image)
        opened = Image.open(io.BytesIO(file))
        if opened.mode in ("RGB", "L"):
            check(file, draw.randint(8, opened.height), 1)
            fast += 1
    assert fast > 40


DAMAGE = {
    "truncated": lambda file: file[: len(file) // 2],
    "without its last bytes": lambda file: file[:-40],
    "ended early": lambda file: file[: len(file) // 2] + b"\xff\xd9",
    "zeros at the end": lambda file: file[: len(file) // 2] + bytes(len(file) // 2),
    "a foreign block": lambda file: file[: len(file) // 2] + b"\xff\xc4" * 50 + file[len(file) // 2 + 100 :],
    "empty": lambda file: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_left_to_pillow(damage):
    file = jpeg(320, 240)
    check(file, 100, 1)
    broken = DAMAGE[damage](file)
    assert decode_rows(broken, 320, 240, 240) is None
    if damage != "ended early":  # libjpeg cannot know while it reads the part above
        assert decode_rows(broken, 320, 240, 20) is None


def test_what_it_cannot_read_is_left_to_pillow(monkeypatch):
    assert decode_rows(jpeg(6, 6), 6, 6, 6, 2) is None
    monkeypatch.setattr("pgt_hf.images.jpeg._simplejpeg", lambda: None)
    assert decode_rows(jpeg(64, 64), 64, 64, 64) is None
