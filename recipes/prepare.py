"""Write a data set once with its shorter side resized, so that every epoch decodes less.

    python recipes/prepare.py --output-dir data/imagenet-400                       # ILSVRC/imagenet-1k
    python recipes/prepare.py --dataset-name path/to/folder --output-dir data/small --size 256 --num-proc 16
    python recipes/prepare.py --output-dir data/imagenet-400 --verify              # check what was written
    python recipes/prepare.py --smoke                                              # seconds, on digits

The result is a folder of Parquet files that ``recipes/imagenet.py --dataset-name data/imagenet-400`` reads. It appears
under its name when it is complete; until then it is ``data/imagenet-400.incomplete``, where the same command goes on.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
from datasets import Dataset, Image

from pgt_hf.atomic import replacing
from pgt_hf.images import DEFAULT_DATASET, DIGITS, BadImageError, class_names, load_image_dataset, read_image, shrink
from pgt_hf.images.rules import DataSetName, OnBadImage
from pgt_hf.limits import Folder, Seed, Whole
from pgt_hf.programs import errors_in_one_line, parse

MANIFEST = "manifest.json"
ROW_GROUP = 100
SMOKE = {"dataset_name": DIGITS, "output_dir": "runs/prepared-digits", "size": 6, "images_per_shard": 200}


@dataclass
class PrepareArguments:
    dataset_name: DataSetName = field(default=DEFAULT_DATASET, metadata={"help": "Hub id, folder, or 'digits'."})
    output_dir: Folder = field(default="data/prepared", metadata={"help": "The folder to write."})
    size: Annotated[int, Whole("[1, 65500]")] = field(
        default=400, metadata={"help": "Longest shorter side in pixels; 256 to 400 is usual."}
    )
    quality: Annotated[int, Whole("[1, 95]")] = field(
        default=90, metadata={"help": "JPEG quality of the images that are resized, 1 to 95."}
    )
    images_per_shard: Annotated[int, Whole("[1, 1000000]")] = field(
        default=1000, metadata={"help": "Images in one Parquet file."}
    )
    num_proc: Annotated[int, Whole("[1, 10000]")] = field(default=os.cpu_count() or 1, metadata={"help": "Processes."})
    on_bad_image: OnBadImage = field(default="error", metadata={"help": "'error' stops, 'skip' leaves it out."})
    seed: Seed = field(default=0, metadata={"help": "Draws a validation split where the data set has none."})
    verify: bool = field(default=False, metadata={"help": "Only check what is in --output-dir."})
    smoke: bool = field(default=False, metadata={"help": f"Set {SMOKE}"})


def main() -> None:
    args, _ = parse(PrepareArguments, description=__doc__, defaults={}, smoke=SMOKE)
    with errors_in_one_line():
        if not args.verify:
            prepare(args)
        problems = verify(Path(args.output_dir))
    if problems:
        sys.exit(f"error: {args.output_dir} is not what its {MANIFEST} says:\n  " + "\n  ".join(problems))
    tell(Path(args.output_dir))


def prepare(args: PrepareArguments) -> None:
    """Writes every shard that is not there yet, then gives the folder its name."""
    output = Path(args.output_dir)
    if output.exists():
        raise FileExistsError(f"{output} is there already: check it with --verify, or choose another --output-dir")
    splits = load_image_dataset(args.dataset_name, seed=args.seed)
    if splits["train"] is splits["validation"]:  # one split that serves as both is written once
        splits = {"validation": splits["validation"]}

    folder = output.with_name(output.name + ".incomplete")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("dataset_name", "size", "quality", "images_per_shard", "seed")}
    settings |= {"on_bad_image": args.on_bad_image, "rows": {key: split.num_rows for key, split in splits.items()}}
    go_on(folder / ".settings.json", settings)

    shards = []
    for key, split in splits.items():
        count = -(-split.num_rows // args.images_per_shard)
        names = [f"{key}-{number:05}-of-{count:05}.parquet" for number in range(count)]
        write = partial(
            write_shard,
            split=split.cast_column("image", Image(decode=False)),
            key=key,
            folder=folder,
            size=args.size,
            quality=args.quality,
            images_per_shard=args.images_per_shard,
            skip_bad=args.on_bad_image == "skip",
        )
        todo = [number for number, name in enumerate(names) if not (folder / name).exists()]
        if todo:
            rows = Dataset.from_dict({"shard": todo, "name": [names[number] for number in todo]})
            processes = min(args.num_proc, len(todo))
            rows.map(write, num_proc=processes if processes > 1 else None, load_from_cache_file=False, desc=key)
        shards += [json.loads(record(folder / name).read_text(encoding="utf-8")) for name in names]

    manifest: dict[str, Any] = settings | {"classes": class_names(next(iter(splits.values()))), "shards": shards}
    write_json(folder / MANIFEST, manifest)
    for leftover in folder.glob(".*"):
        leftover.unlink()
    folder.rename(output)


def go_on(path: Path, settings: dict[str, Any]) -> None:
    """What a killed run has written is of use only under the settings that it was written with."""
    if not path.exists():
        write_json(path, settings)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    other = [
        f"{key}={before.get(key)!r}, now {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if other:
        raise ValueError(f"{path.parent} was begun with other settings ({'; '.join(other)}): use these, or delete it")


def write_shard(
    row: dict[str, Any],
    split: Dataset,
    key: str,
    folder: Path,
    size: int,
    quality: int,
    images_per_shard: int,
    skip_bad: bool,
) -> dict[str, Any]:
    """One Parquet file and the record of what is in it. The file comes last: where it is, both are."""
    start = row["shard"] * images_per_shard
    images, labels, bad, resized = [], [], [], 0
    for index in range(start, min(start + images_per_shard, split.num_rows)):
        example = split[index]
        try:
            before = read_image(example["image"])
            after = shrink(before, size, quality)
        except BadImageError as error:
            if not skip_bad:
                raise BadImageError(f"image {index} of {key}: {error}; --on-bad-image skip leaves it out") from error
            bad.append(index)
            continue
        resized += after is not before
        images.append({"bytes": after, "path": name_of(example["image"]["path"])})
        labels.append(example["label"])

    path = folder / row["name"]
    features = split.features.copy()
    features["image"] = Image()
    with replacing(path) as draft:
        table = Dataset.from_dict({"image": images, "label": labels}, features=features).data.table
        # Small row groups, as the Hub's image sets have them: a stream reads one at a time.
        pq.write_table(table.cast(features.arrow_schema), draft, row_group_size=ROW_GROUP)
        found = {"name": path.name, "split": key, "images": len(labels), "resized": resized, "bad": bad}
        found |= {"bytes": draft.stat().st_size, "sha256": checksum(draft)}
        write_json(record(path), found)
    return row


def verify(folder: Path) -> list[str]:
    """What is wrong with a prepared folder, in words; nothing if it is what its manifest says."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it is no folder that this program has finished")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    problems = []
    for shard in manifest["shards"]:
        file = folder / shard["name"]
        if not file.is_file():
            problems.append(f"{file.name} is missing")
        elif checksum(file) != shard["sha256"]:
            problems.append(f"{file.name} has changed: its checksum is another")
        elif (rows := pq.read_metadata(file).num_rows) != shard["images"]:
            problems.append(f"{file.name} has {rows} images, not {shard['images']}")
    known = {shard["name"] for shard in manifest["shards"]}
    problems += [f"{file.name} does not belong here" for file in folder.glob("*.parquet") if file.name not in known]
    for split, rows in manifest["rows"].items():
        found = sum(shard["images"] + len(shard["bad"]) for shard in manifest["shards"] if shard["split"] == split)
        if found != rows:
            problems.append(f"{split} has {found} images, bad ones included, and its source {rows}")
    return problems


def tell(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for split in manifest["rows"]:
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        images, resized, size = (sum(shard[key] for shard in shards) for key in ("images", "resized", "bytes"))
        bad = [index for shard in shards for index in shard["bad"]]
        print(f"{split:12}{images:>10,} images, {resized:,} resized, {size / 2**20:,.1f} MiB in {len(shards)} files")
        if bad:
            print(f"{'':12}{len(bad):>10,} left out, since they could not be decoded: {bad}")
    print(f"{folder} is complete, and every checksum is right")


def record(path: Path) -> Path:
    """Where a shard's entry in the manifest waits for the others; hidden, so that ``datasets`` does not read it."""
    return path.with_name(f".{path.name}.json")


def name_of(path: str | None) -> str | None:
    """The file's own name: where it lay on this machine is nobody's business."""
    return None if path is None else path.replace("\\", "/").rsplit("/", 1)[-1]


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=2), encoding="utf-8")


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
