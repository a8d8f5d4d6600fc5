"""Train on one domain with the PowerGrad Transform, adapt to another without its labels, and report both, by alpha.

    accelerate launch recipes/domain_adaptation.py --smoke
    accelerate launch recipes/domain_adaptation.py --targets contrast:1 contrast:3 contrast:5 --methods source-only bn
    accelerate launch recipes/domain_adaptation.py --dataset-name office/art --targets office/clipart --image-size 224

A target is a corruption of the source's own images at a level from 1 to 5, as gaussian_noise:3, or another data set
with the same class names. Its labels serve the evaluation alone. The methods:

    source-only    nothing: the source's network on the target
    bn             batch norm's statistics are taken again, from target images
    tent           entropy of the target's predictions, minimised over the scales and shifts of the norms
    pseudo-labels  source images, and target images with the class that the network is sure of
    dann           features that a domain classifier cannot tell apart (gradient reversal), from scratch

PGT is in the cross-entropy of the source (and of the pseudo-labels). Entropies and thresholds read softmax(alpha z),
the probabilities that it trains. docs/domain_adaptation.md has results.
"""

import csv
import statistics
from argparse import Namespace
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import ClassLabel
from tqdm.auto import tqdm

from pgt_hf.analysis import plot_adaptation, require_matplotlib
from pgt_hf.atomic import replacing
from pgt_hf.images import (
    CORRUPTIONS,
    DIGITS,
    METHODS,
    AdaptationRun,
    Corrupted,
    ImageDataArguments,
    ImageDataset,
    ImageTransform,
    TargetName,
    TimmModel,
    check_methods,
    class_names,
    relabelled,
    timm_network,
)
from pgt_hf.limits import Count, Folder, Needs, Number, OneOf, Positive, Rate, Seed, Share, Text, Workers
from pgt_hf.programs import (
    errors_in_one_line,
    parse,
    quiet_other_processes,
    refuse_large_batch,
    refuse_other_run,
    refuse_other_settings,
    workers_per_process,
)
from pgt_hf.runs import add_to_record, claim_folder, describe_code, describe_data, describe_environment, read_record
from pgt_hf.trainer import StopOnSigterm

DEFAULTS: dict[str, Any] = {"dataset_name": DIGITS, "image_size": 32, "min_crop": 0.7, "color_jitter": 0.0}
SMOKE: dict[str, Any] = {
    "alphas": [1.0, 0.25], "targets": ["contrast:3"], "epochs": 1, "adapt_epochs": 1, "max_train_samples": 192,
    "max_eval_samples": 101, "image_size": 24, "batch": 32, "num_workers": 0,
    "output_dir": "runs/domain_adaptation-smoke",
}  # fmt: skip
RESULTS = "results.csv"
COLUMNS = ["alpha", "seed", "target", "method", "source_top1", "target_top1"]
GRID = {"alphas", "seeds", "targets", "methods", "output_dir", "num_workers", "smoke"}  # may change: rows stay valid


@dataclass
class AdaptationArguments:
    targets: list[TargetName] = field(
        default_factory=lambda: ["gaussian_noise:3", "contrast:3"],
        metadata={"help": "corruption:level of the source, --dataset-name, or another data set."},
    )
    target_config: Annotated[str | None, Text()] = field(
        default=None, metadata={"help": "The configuration of targets that are Hub data sets, if any."}
    )
    methods: list[Annotated[str, OneOf(METHODS)]] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Some of {', '.join(METHODS)}."}
    )
    alphas: list[Annotated[float, Number("(0, 1]")]] = field(
        default_factory=lambda: [1.0, 0.5, 0.25, 0.1], metadata={"help": "The grid; 1 is the baseline."}
    )
    seeds: list[Seed] = field(default_factory=lambda: [0], metadata={"help": "A run of everything for each."})
    model_name: TimmModel = field(default="resnet10t", metadata={"help": "A timm network."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights."})
    epochs: Count = field(default=8, metadata={"help": "On the source, and of dann."})
    adapt_epochs: Annotated[Count, Needs("methods", ("tent", "pseudo-labels"))] = field(
        default=2, metadata={"help": "Of tent and pseudo-labels."}
    )
    lr: Rate = field(default=0.05, metadata={"help": "Peak learning rate on the source, and of dann."})
    adapt_lr: Annotated[Rate, Needs("methods", ("tent", "pseudo-labels"))] = field(
        default=0.005, metadata={"help": "The same, of tent and pseudo-labels."}
    )
    weight_decay: Annotated[float, Number("[0, inf)")] = field(default=5e-4, metadata={"help": "On weight matrices."})
    threshold: Annotated[Share, Needs("methods", ("pseudo-labels",))] = field(
        default=0.9, metadata={"help": "Least probability of a pseudo-label."}
    )
    adversary: Annotated[Positive, Needs("methods", ("dann",))] = field(
        default=1.0, metadata={"help": "Largest strength of dann's reversed gradient."}
    )
    batch: Count = field(default=64, metadata={"help": "Images per process and domain."})
    num_workers: Workers = field(default=workers_per_process(), metadata={"help": "Data workers, per process."})
    output_dir: Folder = field(default="runs/domain_adaptation", metadata={"help": "Where everything is written."})
    smoke: bool = field(default=False, metadata={"help": "Everything once, on few digits: less than a minute."})


def main() -> None:
    StopOnSigterm().listen()
    data_args, args, config = parse(
        ImageDataArguments, AdaptationArguments,
        description=__doc__, defaults=choose_defaults, smoke=SMOKE, early=("dataset_name",),
    )  # fmt: skip
    accelerator = Accelerator()
    quiet_other_processes(accelerator.process_index)
    folder = Path(args.output_dir)
    with errors_in_one_line():
        refuse_other_run(folder, "targets")
        require_matplotlib()
        if args.target_config and all(name.partition(":")[0] in CORRUPTIONS for name in args.targets):
            raise ValueError(f"target_config must be left out, no target is a data set, got {args.target_config!r}")
        if data_args.dataset_name in args.targets:
            raise ValueError(f"targets must be other data than dataset_name, got {data_args.dataset_name!r} for both")
        with accelerator.main_process_first():
            source, names = load(data_args)
            targets = {name: load(data_args, name, names, args.target_config)[0] for name in args.targets}
        for name, domain in {data_args.dataset_name: source, **targets}.items():
            refuse_large_batch("batch", args.batch, len(domain["train"]), accelerator.num_processes, f" of {name}")
        side = data_args.image_size or 224
        fresh = partial(timm_network, args.model_name, len(names), side, pretrained=args.pretrained)
        check_methods(args.methods, fresh())
        data = describe_data(str(data_args.dataset_name), {key: part.split for key, part in source.items()})
        rows = begin(folder, config | {"data": data, "processes": accelerator.num_processes}, accelerator)

    grid, cells = list(product(args.seeds, args.alphas)), list(product(targets, args.methods))
    bar = tqdm(total=len(grid) * len(cells), disable=not accelerator.is_main_process)
    for seed, alpha in grid:
        missing = [cell for cell in cells if (alpha, seed, *cell) not in rows]
        bar.update(len(cells) - len(missing))
        if not missing:
            continue
        set_seed(seed)
        run = AdaptationRun(accelerator, args, alpha, source)
        network = run.train(fresh())
        for name, method in missing:
            set_seed(seed)
            adapted = run.adapt(method, deepcopy(network), targets[name], fresh)
            accuracies = [run.accuracy(adapted, domain["validation"]) for domain in (source, targets[name])]
            rows[alpha, seed, name, method] = accuracies
            if accelerator.is_main_process:
                with errors_in_one_line():
                    save(rows, folder)
            bar.update()
            bar.set_postfix_str(f"alpha {alpha:g}, {name}, {method}: {accuracies[1]:.1%}")
    bar.close()
    if accelerator.is_main_process:
        asked = [[alpha, seed, *cell, *rows[alpha, seed, *cell]] for seed, alpha in grid for cell in cells]
        report(asked, folder, args, str(data_args.dataset_name))
    accelerator.end_training()


def choose_defaults(early: Namespace) -> dict[str, Any]:
    digits = (early.dataset_name or DIGITS) == DIGITS
    return DEFAULTS | {"hflip": 0.0 if digits else 0.5}  # a mirrored 2 is no 2


def load(
    data_args: ImageDataArguments, target: str | None = None, names: list[str] | None = None, config: str | None = None
) -> tuple[dict[str, ImageDataset], list[str]]:
    """Images of the source, or of a target, whose classes must be ``names``, in any order the data set likes."""
    kind, _, level = str(target).partition(":")
    other = target is not None and kind not in CORRUPTIONS
    splits = (replace(data_args, dataset_name=target, dataset_config=config) if other else data_args).load()
    found, source = class_names(splits["train"]), data_args.dataset_name
    if names is not None and sorted(found) != sorted(names):
        raise ValueError(f"targets must have the classes of {source}, {names[:5]}, got {target!r} with {found[:5]}")
    if names is not None and found != names:
        codes = {label: names.index(name) for label, name in enumerate(found)}
        splits = {key: relabelled(split, ClassLabel(names=names), codes) for key, split in splits.items()}
    size = {"input_size": (3, data_args.image_size, data_args.image_size), "crop_pct": 1.0}
    transforms = {
        "train": data_args.augmentation(size, normalize=True),
        "validation": ImageTransform(size, training=False),
    }
    domain = {}
    for split, transform in transforms.items():
        seen: Any = Corrupted(transform, kind, int(level)) if kind in CORRUPTIONS else transform
        domain[split] = ImageDataset(splits[split], seen, on_bad_image=data_args.on_bad_image)
    return domain, found if names is None else names


def begin(folder: Path, arguments: dict[str, Any], accelerator: Accelerator) -> dict[Any, list[float]]:
    """What a stopped run with these settings has found: both accuracies by alpha, seed, target and method."""
    rows = {}
    if (folder / RESULTS).is_file():
        settings = {key: value for key, value in arguments.items() if key not in GRID}
        refuse_other_settings(folder, read_record(folder).get("arguments", {}), settings)
        with open(folder / RESULTS, encoding="utf-8", newline="") as file:
            for alpha, seed, target, method, *accuracies in list(csv.reader(file))[1:]:
                rows[float(alpha), int(seed), target, method] = [float(accuracy) for accuracy in accuracies]
    if accelerator.is_main_process:
        claim_folder(folder)
        made = {"code": describe_code(), "environment": describe_environment(accelerator.num_processes)}
        add_to_record(folder, {"arguments": arguments} | made)
    return rows


def save(rows: dict[Any, list[float]], folder: Path) -> None:
    with replacing(folder / RESULTS) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *([*cell, *accuracies] for cell, accuracies in rows.items())])


def report(rows: list[list[Any]], folder: Path, args: AdaptationArguments, dataset_name: str) -> None:
    """table.md, with means and deviations over the seeds, and the picture."""
    table = markdown(rows, args)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    plot_adaptation(rows, folder / "target_accuracy.png", f"{args.model_name} on {dataset_name}")
    print(f"\n{table}\n\nTop-1 on source / target in percent, mean of {len(args.seeds)} seed(s).")
    print(f"Written to {folder}: {RESULTS}, table.md, target_accuracy.png, run.json")


def markdown(rows: list[list[Any]], args: AdaptationArguments) -> str:
    cells = defaultdict(list)
    for alpha, _, target, method, source_top1, target_top1 in rows:
        cells[target, method, alpha].append((source_top1, target_top1))
    lines = ["| target | method | " + " | ".join(f"alpha {alpha:g}" for alpha in args.alphas) + " |"]
    lines.append("|---|---|" + "---|" * len(args.alphas))
    for target, method in product(args.targets, args.methods):
        shown = [
            " / ".join(mean(values) for values in zip(*cells[target, method, a], strict=True)) for a in args.alphas
        ]
        lines.append(f"| {target} | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def mean(values: tuple[float, ...]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
