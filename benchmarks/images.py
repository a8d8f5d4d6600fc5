"""The images that the benchmarks read: real photos where there are some, else noise of the same sizes."""

from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from pgt_hf.images import load_image_dataset

SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample"


def labelled_images(path: str | None = None, minimum: int = 0) -> datasets.Dataset:
    """Columns ``image`` (JPEG) and ``label``; repeated until there are at least ``minimum``."""
    source = path or (str(SAMPLE) if SAMPLE.is_dir() else None)
    images = load_image_dataset(source)["train"] if source else made_images()
    copies = -(-minimum // images.num_rows)
    return datasets.concatenate_datasets([images] * copies) if copies > 1 else images


def made_images(count: int = 128) -> datasets.Dataset:
    """JPEG of 500 x 375 pixels, ImageNet's median: smoothed noise, which compresses about as photos do."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        small = generator.integers(256, size=(47, 63, 3), dtype=np.uint8)
        images.append(Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(label) for label in range(1000)])}
    )
    labels = generator.integers(1000, size=count).tolist()
    return datasets.Dataset.from_dict({"image": [jpeg(image) for image in images], "label": labels}, features=features)


def jpeg(image: Image.Image) -> dict[str, object]:
    file = BytesIO()
    image.save(file, "JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": None}
