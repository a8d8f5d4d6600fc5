"""Images per second from JPEG files to batches: ours beside timm, torchvision, FFCV and DALI, where installed.

    python -m benchmarks.input_pipeline                       # one process, one thread, photos and prepared data
    python -m benchmarks.input_pipeline --workers 1 2         # the DataLoader's processes instead
    python -m benchmarks.input_pipeline --rows 1281167        # a data set of so many rows beside a small one
    python -m benchmarks.input_pipeline --profile             # where the time of one image goes

All sides do the recipe's augmentation (crop of 0.08 to 1 of the area, flip, bicubic where they have it; with and
without colour jitter), on the same images, alternated in one run; each ratio is the median of the paired ratios.
Without workers a second is a second of CPU time, so that other work on the machine counts less; with workers it is one
of the clock. "on a GPU" is the CPU's part where each side leaves to a GPU what it can: the GPU's part is not measured.
"""

import argparse
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as Pictures
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from benchmarks import peers
from benchmarks.peers import Batches, Setting
from pgt_hf.images import (
    ImageDataset,
    ImageTransform,
    arrow_files,
    collate,
    decode,
    load_image_dataset,
    map_arrow,
    normalize,
    read_image,
    seed_sample,
    shrink,
    transforms,
    write_arrow,
)

SHARED = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample"
SCALE, JITTER = (0.08, 1.0), 0.4
FEATURES = Features({"image": Image(), "label": Value("int64")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=SHARED, help="folder of Parquet; JPEG files are made where there is none")
    parser.add_argument("--images", type=int, default=256, help="so many of them, the same for every side")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="processes of the DataLoader; 0 is none")
    parser.add_argument("--prepared", type=int, nargs="*", default=[256], help="shorter sides of prepared data")
    parser.add_argument("--rest", nargs="+", default=["on a GPU", "on the CPU"], help="where the rest is done")
    parser.add_argument("--jitter", type=float, nargs="+", default=[JITTER, 0.0])
    parser.add_argument("--sides", nargs="+", help="some of the sides; ours is always one")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", help="read from data sets of so many rows, and stop")
    parser.add_argument("--profile", action="store_true", help="print the parts of one image's time, and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)

    files = jpeg_files(Path(args.data), args.images)
    found = {"torch": torch.__version__, "Pillow": PIL.__version__, "simplejpeg": simplejpeg()} | peers.installed()
    print(", ".join(f"{name} {number}" for name, number in found.items()), end="; ")
    print(f"{torch.backends.cpu.get_cpu_capability()}, {len(files)} JPEG files, ", end="")
    print(f"{sum(map(len, files)) / len(files) / 1000:.0f} kB each, {args.rounds} rounds\n")
    if args.profile:
        for size in args.sizes:
            profile(files, size)
        return
    if args.rows:
        growth(files, Setting(args.sizes[0], args.jitter[0], False, args.batch_size, 0, SCALE), args.rows, args.rounds)
        return

    data = {"photos": files} | {
        f"prepared at {side}": [shrink(file, side, 90) for file in files] for side in args.prepared
    }
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for (name, some), size, jitter, rest, workers in itertools.product(
        data.items(), args.sizes, args.jitter, args.rest, args.workers
    ):
        setting = Setting(size, jitter, rest == "on a GPU", args.batch_size, workers, SCALE)
        with tempfile.TemporaryDirectory() as folder:
            sides = all_sides(some, setting, Path(folder), raw=int(name.split()[-1]) if name != "photos" else None)
            if args.sides:
                sides = {side: make for side, make in sides.items() if side in ("ours", *args.sides)}
            made = {side: make() for side, make in sides.items()}
            place = f"{name} | {size} | {jitter:g} | {rest} | {workers}"
            rows[place] = {
                side: (rate, ratio) for side, rate, ratio in compare(made, workers, len(files), args.rounds)
            }
        print(place, {side: f"{rate:.0f} images/s" for side, (rate, _) in rows[place].items()}, file=sys.stderr)
    print(table(rows))


def table(rows: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Images per second for ours, and for each peer how many times as fast ours is."""
    ours = [side for side in ("ours", "ours, raw") if any(side in row for row in rows.values())]
    theirs = list(dict.fromkeys(side for row in rows.values() for side in row if side not in ours))
    head = ["data", "pixels", "jitter", "rest", "workers", *(f"{side}, images/s" for side in ours), *theirs]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for place, row in rows.items():
        cells = [f"{row[side][0]:.0f}" if side in row else "-" for side in ours]
        cells += [f"{row[side][1]:.2f}" if side in row else "-" for side in theirs]
        lines.append(f"| {place} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def all_sides(files: list[bytes], setting: Setting, folder: Path, raw: int | None) -> dict[str, Callable[[], Batches]]:
    """Makers of what is installed; raw pixels only of prepared data, of photos they would take ten times the disk."""
    pictures = folder / "jpeg"
    write_folder(files, pictures)
    sides: dict[str, Callable[[], Batches]] = {"ours": lambda: our_batches(files, setting, folder / "ours")}
    if raw is not None:
        sides["ours, raw"] = lambda: our_batches([shrink(file, raw, None) for file in files], setting, folder / "raw")
    sides["timm"] = lambda: peers.timm_loader(str(pictures), setting)
    sides["torchvision (PIL)"] = lambda: peers.torchvision_loader(str(pictures), setting)
    sides["torchvision (tensor)"] = lambda: peers.torchvision_loader(str(pictures), setting, tensors=True)
    if "FFCV" in peers.installed():
        sides["FFCV (JPEG)"] = lambda: peers.ffcv_loader(files, setting, folder)
        if raw is not None:
            sides["FFCV (raw)"] = lambda: peers.ffcv_loader(files, setting, folder, raw=True)
    if "DALI" in peers.installed():
        sides["DALI (cubic)"] = lambda: peers.dali_loader(str(pictures), setting)
        sides["DALI (linear)"] = lambda: peers.dali_loader(str(pictures), setting, "linear")
    return sides


def compare(sides: dict[str, Batches], workers: int, images: int, rounds: int) -> Iterator[tuple[str, float, float]]:
    """Each side's images per second, and how many times as fast ours is: raw pixels against raw pixels."""
    clock = time.perf_counter if workers else time.process_time
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, batches in sides.items():
            start = clock()
            assert sum(len(batch) for batch in batches()) == images, name
            if number:  # the first round warms up
                times[name].append(clock() - start)
    for name, taken in times.items():
        ours = times["ours, raw" if name == "FFCV (raw)" else "ours"]
        ratio = statistics.median(a / b for a, b in zip(taken, ours, strict=True))
        yield name, images / statistics.median(taken), ratio


def growth(files: list[bytes], setting: Setting, rows: list[int], rounds: int) -> None:
    """As many random images from each data set; the large ones hold the same files over and over, in many chunks."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {"ours": our_batches(files, setting, Path(folder, "ours"))}
        sides |= {f"{number:,}": our_batches(files, setting, Path(folder, str(number)), number) for number in rows}
        print("| rows | images/s | time of an image |\n|---|---|---|")
        for name, rate, ratio in compare(sides, setting.workers, len(files), rounds):
            print(f"| {len(files) if name == 'ours' else name} | {rate:.0f} | {ratio:.2f} |")


def our_batches(files: list[bytes], setting: Setting, folder: Path, rows: int = 0) -> Batches:
    """From Arrow files on the disk, as a data set in the cache of ``datasets`` is; repeated up to ``rows`` rows."""
    cells = {"image": [{"bytes": file, "path": None} for file in files], "label": [0] * len(files)}
    folder.mkdir()
    table = Dataset.from_dict(cells, features=FEATURES).data.table
    write_arrow([table], table.schema, folder / "train-0.arrow")
    split = concatenate_datasets([map_arrow(arrow_files(folder))["train"]] * max(1, rows // len(files)))
    transform = our_transform(setting.size, setting.color_jitter, on_device=setting.on_device)
    loader = DataLoader(
        ImageDataset(split, transform),
        setting.batch_size,
        sampler=torch.randint(len(split), (len(files),)).tolist() if rows else RandomSampler(split),
        collate_fn=collate,
        num_workers=setting.workers,
        persistent_workers=setting.workers > 0,
    )

    def batches() -> Iterator[Tensor]:
        for batch in loader:
            images = batch["pixel_values"]
            yield images if setting.on_device else normalize(images, transform.mean, transform.std)

    return batches


def our_transform(size: int, color_jitter: float = JITTER, on_device: bool = False) -> ImageTransform:
    config = {"input_size": (3, size, size), "interpolation": "bicubic"}
    return ImageTransform(
        config, training=True, normalize=False, on_device=on_device, scale=SCALE, color_jitter=color_jitter
    )


def simplejpeg() -> str:
    try:
        return version("simplejpeg")
    except PackageNotFoundError:
        return "is not installed, Pillow decodes"


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
        region = torch.from_numpy(region).permute(2, 0, 1)
        image = timed("ours", "resize", number, transforms._resize, region, target, interpolation)
        for step in ours._steps:
            image = timed("ours", type(step).__name__.strip("_"), number, step, image)
    print(f"| {size} pixels | microseconds per image | share |\n|---|---|---|")
    for side in ("timm", "ours"):
        parts: defaultdict[str, float] = defaultdict(float)
        for (whose, part, _), seconds in best.items():
            parts[part] += 1e6 * seconds / len(files) if whose == side else 0
        total = sum(parts.values())
        for part, microseconds in parts.items():
            if microseconds:
                print(f"| {side}: {part} | {microseconds:.0f} | {microseconds / total:.0%} |")
        print(f"| {side}: total | {total:.0f} | |")


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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)


if __name__ == "__main__":
    main()
