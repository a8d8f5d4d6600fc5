"""Images per second from JPEG files to normalised batches: ours, ours on prepared data, timm's loader, torchvision's.

    python -m benchmarks.input_pipeline                       # one process, one thread, 128, 160 and 224 pixels
    python -m benchmarks.input_pipeline --workers 1 2         # the DataLoader's processes instead
    python -m benchmarks.input_pipeline --profile             # where the time of one image goes

All sides do the recipe's augmentation (crop of 0.08 to 1 of the area, flip, colour jitter 0.4, bicubic), on the same
images, alternated in one run; each ratio is the median of the paired ratios. Without workers a second is a second of
CPU time, so that other work on the machine counts less; with workers it is one of the clock.
"""

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader, create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from pgt_hf.images import (
    ImageDataset,
    ImageTransform,
    collate,
    decode,
    load_image_dataset,
    normalize,
    read_image,
    seed_sample,
    shrink,
    transforms,
)

SHARED = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample"
SCALE, JITTER = (0.08, 1.0), 0.4
Batches = Callable[[], Iterator[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=SHARED, help="folder of Parquet; JPEG files are made where there is none")
    parser.add_argument("--images", type=int, default=256, help="so many of them, the same for every side")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 160, 224], help="pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="processes of the DataLoader; 0 is none")
    parser.add_argument("--prepared", type=int, nargs="+", default=[256, 400], help="shorter sides of prepared data")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="print the parts of one image's time, and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)

    files = jpeg_files(Path(args.data), args.images)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, ", end="")
    print(f"Pillow {PIL.__version__}, {torch.backends.cpu.get_cpu_capability()}; {len(files)} JPEG files, ", end="")
    print(f"{sum(map(len, files)) / len(files) / 1000:.0f} kB each, {args.rounds} rounds\n")
    if args.profile:
        for size in args.sizes:
            profile(files, size)
        return

    print("| pixels | workers | side | images/s | ratio to timm |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_folder(files, Path(folder))
        prepared = {side: [shrink(file, side, quality=90) for file in files] for side in args.prepared}
        for size, workers in itertools.product(args.sizes, args.workers):
            common = {"size": size, "batch_size": args.batch_size, "workers": workers}
            sides = {"timm": timm_batches(folder, **common), "torchvision": torchvision_batches(folder, **common)}
            sides["ours"] = our_batches(files, **common)
            for side, smaller in prepared.items():
                sides[f"ours, prepared at {side}"] = our_batches(smaller, **common)
            compare(sides, size, workers, len(files), args.rounds)


def compare(sides: dict[str, Batches], size: int, workers: int, images: int, rounds: int) -> None:
    clock = time.perf_counter if workers else time.process_time
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, batches in sides.items():
            start = clock()
            assert sum(len(batch) for batch in batches()) == images
            if number:  # the first round warms up
                times[name].append(clock() - start)
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["timm"], taken, strict=True))
        print(f"| {size} | {workers} | {name} | {images / statistics.median(taken):.0f} | {ratio:.2f} |", flush=True)


def our_batches(files: list[bytes], size: int, batch_size: int, workers: int) -> Batches:
    features = Features({"image": Image(), "label": Value("int64")})
    columns = {"image": [{"bytes": file, "path": None} for file in files], "label": [0] * len(files)}
    transform = our_transform(size)
    loader = DataLoader(
        ImageDataset(Dataset.from_dict(columns, features=features), transform),
        batch_size,
        shuffle=True,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: (normalize(batch["pixel_values"], transform.mean, transform.std) for batch in loader)


def timm_batches(folder: str, size: int, batch_size: int, workers: int) -> Batches:
    """As timm's train.py makes it, prefetcher and all; it normalises by batch too."""
    loader = create_loader(
        create_dataset("", root=folder),
        input_size=(3, size, size),
        batch_size=batch_size,
        is_training=True,
        scale=SCALE,
        color_jitter=JITTER,
        interpolation="bicubic",
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
        pin_memory=False,
    )
    loader.loader.batch_sampler.drop_last = False  # it would drop the last images, and count fewer than the others
    return lambda: (images for images, _ in loader)


def torchvision_batches(folder: str, size: int, batch_size: int, workers: int) -> Batches:
    """As torchvision's references/classification has it, with the colour jitter that the others do."""
    steps = [
        v2.RandomResizedCrop(size, scale=SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(JITTER, JITTER, JITTER),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        v2.ToPureTensor(),
    ]
    loader = DataLoader(
        torchvision.datasets.ImageFolder(folder, v2.Compose(steps)),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: (images for images, _ in loader)


def our_transform(size: int) -> ImageTransform:
    config = {"input_size": (3, size, size), "interpolation": "bicubic"}
    return ImageTransform(config, training=True, normalize=False, scale=SCALE, color_jitter=JITTER)


def profile(files: list[bytes], size: int) -> None:
    """Each part of each image at its best of several times, then the mean over the images."""
    best: defaultdict[tuple[str, str, int], float] = defaultdict(lambda: float("inf"))

    def timed(side: str, part: str, number: int, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        best[side, part, number] = min(best[side, part, number], time.perf_counter() - start)
        return result

    ours = our_transform(size)
    (interpolation,) = ours._interpolations
    peer = create_transform(
        size, is_training=True, scale=SCALE, color_jitter=JITTER, interpolation="bicubic", normalize=False
    )
    for _, (number, file) in itertools.product(range(7), enumerate(files)):
        seed_sample(0, 0, number)
        image = timed("timm", "decode", number, lambda file: Pictures.open(io.BytesIO(file)).convert("RGB"), file)
        for step in peer.transforms:
            image = timed("timm", type(step).__name__, number, step, image)
        timed("ours", "seed", number, seed_sample, 0, 0, number)
        region, target = timed("ours", "decode and crop", number, decode, file, ours._plan)
        image = timed("ours", "resize", number, transforms._resize, region.convert("RGB"), target, interpolation)
        for step in ours._steps:
            image = timed("ours", type(step).__name__.strip("_"), number, step, image)
    print(f"{size} pixels")
    for side in ("timm", "ours"):
        parts: defaultdict[str, float] = defaultdict(float)
        for (whose, part, _), seconds in best.items():
            parts[part] += 1e6 * seconds / len(files) if whose == side else 0
        total = sum(parts.values())
        for part, microseconds in parts.items():
            if microseconds:
                print(f"  {side:6}{part:36}{microseconds:8.0f} us {microseconds / total:6.1%}")
        print(f"  {side:6}{'total':36}{total:8.0f} us")


def jpeg_files(folder: Path, count: int) -> list[bytes]:
    if not folder.is_dir():
        print(f"{folder} is not there: these are made images")
        return [made_jpeg(number) for number in range(count)]
    split = load_image_dataset(str(folder), max_eval_samples=count)["validation"]
    return [read_image(cell) for cell in split.cast_column("image", Image(decode=False))["image"]]


def made_jpeg(number: int) -> bytes:
    """500 x 375 pixels and about 110 kB, as ImageNet's median has them."""
    rng = np.random.default_rng(number)
    coarse = Pictures.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8)).resize((500, 375))
    pixels = np.asarray(coarse) + rng.normal(0, 12, size=(375, 500, 3))
    file = io.BytesIO()
    Pictures.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_folder(files: list[bytes], folder: Path) -> None:
    for number, file in enumerate(files):
        path = folder / f"{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file)


if __name__ == "__main__":
    main()
