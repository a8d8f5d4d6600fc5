"""Images per second of whole training: ours, a plain timm-style loop, and transformers' image-classification example.

    python -m benchmarks.training                              # resnet18, 160 pixels, CPU, float32
    python -m benchmarks.training --sizes 128 224 --precisions float32 bfloat16 --workers 1
    accelerate launch --num_processes 2 -m benchmarks.training --peers
    python -m benchmarks.training --overhead                   # a step with PGT against one without
    python -m benchmarks.training --profile                    # where the time of ours goes

Each peer and ours train the same network on the same images with the same batch and threads, in one process, in turns;
each figure is a median over the rounds, each ratio the median of the rounds' ratios. On the CPU without workers the
clock is the processor's time of this process, which other programs on the machine do not stretch.
"""

import argparse
import copy
import itertools
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from timm.data import create_loader
from torch.profiler import ProfilerActivity, profile
from torchvision import transforms as tv
from transformers import AutoImageProcessor, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from benchmarks.images import labelled_images
from pgt_hf import ImageTrainer, ImageTrainingArguments, attach_powergrad
from pgt_hf.images import ImageDataset, ImageTransform, class_names, collate, create_model, to_rgb

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
Side = Callable[[Any, argparse.Namespace], float]


def now(args: argparse.Namespace) -> float:
    return time.process_time() if args.device == "cpu" and not args.workers else time.perf_counter()


class Clock(TrainerCallback):
    """Notes when each step ends; the first step (start-up, first batch) is not counted."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now(self.settings))

    def rate(self, batch: int) -> float:
        return batch * (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])


def trainer_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": args.batch,
        "dataloader_num_workers": args.workers,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": args.device != "cpu",
        "max_steps": args.steps + 1,
        "learning_rate": SGD["lr"],
        "weight_decay": SGD["weight_decay"],
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "use_cpu": args.device == "cpu",
        "bf16": args.bf16,
    }


def ours(dataset: Any, args: argparse.Namespace, color_jitter: float = 0.4) -> float:
    model = create_model(args.model, class_names(dataset), image_size=args.size)
    transform = ImageTransform(model.config.pretrained_cfg, training=True, normalize=False, color_jitter=color_jitter)
    settings = trainer_settings(args) | {"alpha": 0.25, "channels_last": True, "max_grad_norm": 0.0}
    settings["torch_compile"] = args.compile
    arguments = ImageTrainingArguments(**settings, optim="powergrad_sgd", optim_args="momentum=0.9,nesterov=true")
    clock = Clock(args)
    trainer = ImageTrainer(
        model, arguments, train_dataset=ImageDataset(dataset, transform), data_collator=collate, callbacks=[clock]
    )
    trainer.train()
    return clock.rate(args.batch * arguments.world_size)


class PilImages(torch.utils.data.Dataset):
    """What timm's own data set classes yield: a PIL image, transformed, and its label."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        example = self.dataset[index]
        return self.transform(to_rgb(example["image"])), example["label"]


def timm_loop(dataset: Any, args: argparse.Namespace) -> float:
    """timm's loader with its prefetcher and transforms, its model, torch's loss and optimizer, and a loop."""
    loader = create_loader(
        PilImages(dataset),
        input_size=(3, args.size, args.size),
        batch_size=args.batch,
        is_training=True,
        color_jitter=0.4,
        re_prob=0.0,
        num_workers=args.workers,
        device=torch.device(args.device),
        pin_memory=args.device != "cpu",
        persistent_workers=False,
    )
    model = timm.create_model(args.model, num_classes=len(class_names(dataset))).to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    ends: list[float] = []
    for images, target in loader:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(now(args))
        if len(ends) > args.steps:
            break
    return args.batch * (len(ends) - 1) / (ends[-1] - ends[0])


def transformers_example(dataset: Any, args: argparse.Namespace) -> float:
    """examples/pytorch/image-classification: AutoImageProcessor's size, mean and std, torchvision, ``Trainer``."""
    model = create_model(args.model, class_names(dataset), image_size=args.size)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    config = processor.data_config
    augment = tv.Compose(
        [
            tv.RandomResizedCrop(config["input_size"][-1]),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(config["mean"], config["std"]),
        ]
    )

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": [augment(image.convert("RGB")) for image in batch["image"]], "label": batch["label"]}

    def stack(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["label"] for example in examples]),
        }

    clock = Clock(args)
    arguments = TrainingArguments(**trainer_settings(args))
    Trainer(
        model, arguments, train_dataset=dataset.with_transform(transform), data_collator=stack, callbacks=[clock]
    ).train()
    return clock.rate(args.batch * arguments.world_size)


# Each peer, and ours with the same augmentation: the example jitters no colours.
PEERS: dict[str, tuple[Side, Side]] = {
    "timm": (timm_loop, ours),
    "transformers' example": (transformers_example, lambda dataset, args: ours(dataset, args, color_jitter=0.0)),
}
ALONE: dict[str, tuple[Side, Side]] = {"none": (lambda dataset, args: math.nan, ours)}


def measure_overhead(args: argparse.Namespace) -> None:
    """A step of the network with PGT attached and one without, in turn; then the same of the part that differs."""
    network = timm.create_model(args.model).to(args.device).train()
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    features = torch.randn(args.batch, network.num_features, device=args.device, requires_grad=True)
    whole, plain, _ = paired_steps(network, images, args.rounds, args)
    low, middle, high = (100 * share for share in whole)
    print(
        f"{args.model}, {args.size} pixels, batch {args.batch}: step {1e3 * plain:.1f} ms; PGT adds {middle:+.2f}% "
        f"(quartiles {low:+.2f}%, {high:+.2f}%) over {args.rounds} pairs"
    )
    _, head_alone, added = paired_steps(network.get_classifier(), features, 20 * args.rounds, args)
    print(
        f"classifier and loss alone: {1e3 * head_alone:.3f} ms; PGT adds {1e3 * added:+.3f} ms, which is "
        f"{100 * added / plain:+.3f}% of the step"
    )


def paired_steps(
    model: torch.nn.Module, inputs: torch.Tensor, rounds: int, args: argparse.Namespace
) -> tuple[list[float], float, float]:
    """Quartiles of what PGT adds, as a share; the plain step's median seconds; the median difference in seconds."""
    target = torch.randint(1000, (args.batch,), device=args.device)
    models = {False: model, True: copy.deepcopy(model)}
    attach_powergrad(models[True], alpha=0.25)
    optimizers = {attached: torch.optim.SGD(side.parameters(), **SGD) for attached, side in models.items()}

    def step(attached: bool) -> float:
        start = now(args)
        F.cross_entropy(models[attached](inputs), target).backward()
        optimizers[attached].step()
        optimizers[attached].zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return now(args) - start

    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(-1, rounds):  # the first warms up
        for attached in (True, False) if turn % 2 else (False, True):
            taken = step(attached)
            if turn >= 0:
                seconds[attached].append(taken)
    pairs = list(zip(seconds[True], seconds[False], strict=True))
    shares = statistics.quantiles([ours / plain - 1 for ours, plain in pairs], n=4)
    return shares, statistics.median(seconds[False]), statistics.median([ours - plain for ours, plain in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", help="a folder that datasets.load_dataset reads; else the ImageNet sample, or made images"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160], help="pixels")
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="ours with --torch-compile, the peers as they are")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    args.size, args.bf16 = args.sizes[0], args.precisions[0] == "bfloat16"
    if args.overhead:
        measure_overhead(args)
        return
    dataset = labelled_images(args.data, minimum=args.batch * (args.steps + 1))
    if args.profile:
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            ours(dataset, args)
        print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
        return

    first = int(os.environ.get("RANK", "0")) == 0
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} thread(s)"
    if first:
        print(
            f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}, "
            f"{platform.machine()}, {where}, {os.environ.get('WORLD_SIZE', '1')} process(es), {args.workers} "
            f"worker(s); {args.model}, batch {args.batch}, {args.rounds} rounds of {args.steps} steps\n"
        )
        print("| pixels | precision | peer | peer's images/s | ours | ours is so many times as fast |")
        print("|---|---|---|---|---|---|")
    for size, precision in itertools.product(args.sizes, args.precisions):
        args.size, args.bf16 = size, precision == "bfloat16"
        for name, (peer, own) in ({name: PEERS[name] for name in args.peers} or ALONE).items():
            with redirect_stdout(sys.stderr):  # Trainer prints its logs
                pairs = [(peer(dataset, args), own(dataset, args)) for _ in range(args.rounds)]
            rates = [statistics.median(side) for side in zip(*pairs, strict=True)]
            ratio = statistics.median(b / a for a, b in pairs)
            if first:
                print(f"| {size} | {precision} | {name} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
