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
import json
import logging
import os
import statistics
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pgt_hf import powergrad_cross_entropy
from pgt_hf.analysis import plot_adaptation, require_matplotlib
from pgt_hf.functional import check_alpha
from pgt_hf.images import (
    CORRUPTIONS,
    DIGITS,
    Corrupted,
    DomainAdversary,
    ImageDataset,
    ImageTransform,
    class_names,
    collate,
    confident_labels,
    entropy,
    load_image_dataset,
    reversal_strength,
    train_norms_alone,
)
from pgt_hf.runs import describe_code, describe_environment

METHODS = ("source-only", "bn", "tent", "pseudo-labels", "dann")
SMOKE = {"alphas": [1.0, 0.25], "targets": ["contrast:3"], "epochs": 1, "adapt_epochs": 1, "max_train_samples": 192}
SMOKE |= {"max_eval_samples": 101, "image_size": 24, "batch": 32, "num_workers": 0}


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    pass


def main() -> None:
    args = parse()
    accelerator = Accelerator()
    if not accelerator.is_main_process:
        logging.getLogger("pgt_hf").setLevel(logging.ERROR)
    try:
        with accelerator.main_process_first():
            source, names = load(args, args.dataset_name, None)
            targets = {name: load(args, name, names)[0] for name in args.targets}
        needed = args.batch * accelerator.num_processes
        for name, domain in {args.dataset_name: source, **targets}.items():
            if len(domain["train"]) < needed:
                raise ValueError(f"--batch: {name} has {len(domain['train'])} training images, a step takes {needed}")
        build_network(args, len(names))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")

    folder, rows = Path(args.output_dir), []
    grid = list(product(args.seeds, args.alphas))
    bar = tqdm(total=len(grid) * len(targets) * len(args.methods), disable=not accelerator.is_main_process)
    for seed, alpha in grid:
        set_seed(seed)
        run = Run(accelerator, args, alpha, source)
        network = run.train(build_network(args, len(names)))
        for name, method in product(targets, args.methods):
            set_seed(seed)
            adapted = run.adapt(method, deepcopy(network), targets[name], lambda: build_network(args, len(names)))
            accuracies = [run.accuracy(adapted, domain["validation"]) for domain in (source, targets[name])]
            rows.append([alpha, seed, name, method, *accuracies])
            bar.update()
            bar.set_postfix_str(f"alpha {alpha:g}, {name}, {method}: {accuracies[1]:.1%}")
    bar.close()
    if accelerator.is_main_process:
        report(rows, folder, args)
    accelerator.end_training()


class Run:
    """One seed and one alpha: the training on the source, and every adaptation from it."""

    def __init__(self, accelerator: Accelerator, args: Namespace, alpha: float, source: dict[str, ImageDataset]):
        self.accelerator, self.args, self.alpha, self.source = accelerator, args, alpha, source

    def train(self, network: nn.Module) -> nn.Module:
        """On the source alone."""

        def loss(model: nn.Module, source: tuple[Tensor, Tensor], progress: float) -> Tensor:
            return self.cross_entropy(model(source[0]), source[1])

        return self.fit(network, loss, self.args.epochs, self.args.lr, [self.source["train"]])

    def adapt(
        self, method: str, network: nn.Module, target: dict[str, ImageDataset], fresh: Callable[[], nn.Module]
    ) -> nn.Module:
        """``network``, as trained on the source, or one of its own where the method starts from nothing."""
        both = [self.source["train"], target["train"]]
        if method == "bn":
            self.take_statistics(network, target["train"])
        if method == "tent":
            train_norms_alone(network)
            network = self.fit(network, self.tent, self.args.adapt_epochs, self.args.adapt_lr, [target["train"]])
            self.take_statistics(network, target["train"])
        if method == "pseudo-labels":
            network = self.fit(network, self.pseudo_labels, self.args.adapt_epochs, self.args.adapt_lr, both)
        if method == "dann":
            adversary = DomainAdversary(fresh())
            network = self.fit(adversary, self.adversarial, self.args.epochs, self.args.lr, both).network
        return network

    # --- the losses

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return powergrad_cross_entropy(logits, labels, alpha=self.alpha)

    def tent(self, model: nn.Module, target: tuple[Tensor, Tensor], progress: float) -> Tensor:
        return entropy(model(target[0]), scale=self.alpha)

    def pseudo_labels(
        self, model: nn.Module, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], progress: float
    ) -> Tensor:
        logits = model(torch.cat([source[0], target[0]]))  # one pass: batch norm sees both domains
        ours, theirs = logits.split([len(source[0]), len(target[0])])
        labels = confident_labels(theirs, self.args.threshold, scale=self.alpha)
        sure = powergrad_cross_entropy(theirs, labels, reduction="sum", alpha=self.alpha) / len(labels)
        return self.cross_entropy(ours, source[1]) + sure

    def adversarial(
        self, model: nn.Module, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], progress: float
    ) -> Tensor:
        strength = self.args.adversary * reversal_strength(progress)
        logits, domains = model(torch.cat([source[0], target[0]]), strength)
        truth = torch.zeros_like(domains)
        truth[len(source[0]) :] = 1
        told_apart = nn.functional.binary_cross_entropy_with_logits(domains, truth)
        return self.cross_entropy(logits[: len(source[0])], source[1]) + told_apart

    # --- the loop

    def fit(self, network: Any, loss: Callable[..., Tensor], epochs: int, lr: float, data: list[ImageDataset]) -> Any:
        """SGD with Nesterov momentum and one cycle of the learning rate; an epoch is one of the first data set."""
        if epochs == 0:
            return network.to(self.accelerator.device)
        loaders = [self.loader(images, shuffle=True) for images in data]
        options = {"momentum": 0.9, "weight_decay": self.args.weight_decay}
        optimizer = create_optimizer_v2(network, "sgd", lr=lr, **options)
        model, optimizer = self.accelerator.prepare(network, optimizer)
        steps = epochs * len(loaders[0])
        schedule = OneCycleLR(optimizer, lr, total_steps=steps + 1, cycle_momentum=False)
        model.train()
        batches = zip(*(endless(loader) for loader in loaders), strict=True)
        for step in range(steps):
            for images in data:
                images.set_epoch(step // len(loaders[0]))
            value = loss(model, *next(batches), step / steps)
            self.accelerator.backward(value)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        trained = self.accelerator.unwrap_model(model)
        self.accelerator.free_memory()
        self.average_statistics(trained)
        return trained

    def take_statistics(self, network: nn.Module, images: ImageDataset) -> None:
        loader = self.loader(images, shuffle=True)  # in order, a batch could be of one class
        network.requires_grad_(False)
        with torch.no_grad():
            update_bn((batch["pixel_values"] for batch in loader), network)
        self.average_statistics(network)

    def average_statistics(self, network: nn.Module) -> None:
        """Each process has batch norm statistics of its own part of the images."""
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    @torch.no_grad()
    def accuracy(self, network: nn.Module, images: ImageDataset) -> float:
        network.eval()
        right = total = 0
        for batch in self.loader(images, shuffle=False):
            best = network(batch["pixel_values"]).argmax(dim=1)
            best, labels = self.accelerator.gather_for_metrics((best, batch["labels"]))
            right, total = right + int((best == labels).sum()), total + len(labels)
        return right / total

    def loader(self, images: ImageDataset, shuffle: bool) -> Any:
        options = {"num_workers": self.args.num_workers, "collate_fn": collate, "drop_last": shuffle}
        return self.accelerator.prepare(DataLoader(images, self.args.batch, shuffle=shuffle, **options))


def endless(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for batch in loader:
            yield batch["pixel_values"], batch["labels"]


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=_Help, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset-name", default=DIGITS, help="the source: Hub id, folder of images, CSV or Parquet, or 'digits'")
    add("--targets", nargs="+", default=["gaussian_noise:3", "contrast:3"], help="corruption:level, or a data set")
    add("--methods", nargs="+", default=list(METHODS), help=f"some of {', '.join(METHODS)}")
    add("--alphas", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1], help="the grid; 1 is the baseline")
    add("--seeds", nargs="+", type=int, default=[0], help="a run of everything for each")
    add("--model-name", default="resnet10t", help="a timm network")
    add("--pretrained", action="store_true", help="start from timm's weights")
    add("--image-size", type=int, default=32, help="side in pixels")
    add("--min-crop", type=float, default=0.7, help="smallest random crop, as a share of the image's area")
    add("--hflip", type=float, help="probability of a horizontal flip; default 0.5, and 0 for digits")
    add("--epochs", type=int, default=8, help="on the source, and of dann")
    add("--adapt-epochs", type=int, default=2, help="of tent and pseudo-labels")
    add("--lr", type=float, default=0.05, help="peak learning rate on the source, and of dann")
    add("--adapt-lr", type=float, default=0.005, help="the same, of tent and pseudo-labels")
    add("--weight-decay", type=float, default=5e-4, help="on weight matrices")
    add("--threshold", type=float, default=0.9, help="least probability of a pseudo-label")
    add("--adversary", type=float, default=1.0, help="largest strength of dann's reversed gradient")
    add("--batch", type=int, default=64, help="images per process and domain")
    add("--max-train-samples", type=int, help="train on so many images of each domain only")
    add("--max-eval-samples", type=int, help="evaluate on so many images of each domain only")
    add("--num-workers", type=int, default=min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    add("--output-dir", default="runs/domain_adaptation", help="where table, picture and figures are written")
    add("--smoke", action="store_true", help="everything once, on few digits: less than a minute")
    parser.set_defaults(**SMOKE if "--smoke" in sys.argv else {})
    args = parser.parse_args()
    try:
        if unknown := set(args.methods) - set(METHODS):
            raise ValueError(f"--methods must be some of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
        for alpha in args.alphas:
            if check_alpha(alpha) == 0:
                raise ValueError("--alphas must be above 0, got 0: softmax(0 z) has no most probable class")
        for name in ("epochs", "adapt_epochs", "batch", "image_size"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        if not 0 <= args.threshold <= 1:
            raise ValueError(f"--threshold must lie in [0, 1], got {args.threshold}")
        if not timm.is_model(args.model_name):
            raise ValueError(f"--model-name must be a timm network, got {args.model_name!r}")
        require_matplotlib()
    except (ImportError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    return args


def load(args: Namespace, name: str, names: list[str] | None) -> tuple[dict[str, ImageDataset], list[str]]:
    """Training and validation images of a domain; its classes must be ``names``, in any order the data set likes."""
    kind, colon, level = name.partition(":")
    if names is None or kind not in CORRUPTIONS or not colon:
        dataset_name, corrupted = name, None
    elif level not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"--targets: the level of {kind} must be from 1 to 5, got {level!r}")
    else:
        dataset_name, corrupted = args.dataset_name, (kind, int(level))
    limits = {"max_train_samples": args.max_train_samples, "max_eval_samples": args.max_eval_samples}
    splits = load_image_dataset(dataset_name, **limits)
    found = class_names(splits["train"])
    if names is not None and sorted(found) != sorted(names):
        raise ValueError(f"--targets: {name} has other classes than {args.dataset_name}: {found[:5]}, {names[:5]}")
    if names is not None and found != names:
        splits = splits.map(lambda label: {"label": names.index(found[label])}, input_columns="label")
    hflip = args.hflip if args.hflip is not None else 0.0 if args.dataset_name == DIGITS else 0.5
    size = {"input_size": (3, args.image_size, args.image_size), "crop_pct": 1.0}
    transforms = {
        "train": ImageTransform(size, training=True, scale=(args.min_crop, 1.0), hflip=hflip, color_jitter=0.0),
        "validation": ImageTransform(size, training=False),
    }
    domain = {}
    for split, transform in transforms.items():
        seen: Any = transform if corrupted is None else Corrupted(transform, *corrupted)
        domain[split] = ImageDataset(splits[split], seen)
    return domain, found if names is None else names


def build_network(args: Namespace, classes: int) -> nn.Module:
    return timm.create_model(args.model_name, pretrained=args.pretrained, num_classes=classes)


def report(rows: list[list[Any]], folder: Path, args: Namespace) -> None:
    """results.csv with every run, table.md with means and deviations over the seeds, and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["alpha", "seed", "target", "method", "source_top1", "target_top1"])
        writer.writerows(rows)
    made = {"arguments": vars(args), "code": describe_code(), "environment": describe_environment(1)}
    made["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    (folder / "run.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    table = markdown(rows, args)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    plot_adaptation(rows, folder / "target_accuracy.png", f"{args.model_name} on {args.dataset_name}")
    print(f"\n{table}\n\nTop-1 on source / target in percent, mean of {len(args.seeds)} seed(s).")
    print(f"Written to {folder}: results.csv, table.md, target_accuracy.png, run.json")


def markdown(rows: list[list[Any]], args: Namespace) -> str:
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
