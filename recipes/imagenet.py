"""Train a timm network with the PowerGrad Transform on ImageNet, or on any data set shaped like it.

    accelerate launch recipes/imagenet.py                                       # ILSVRC/imagenet-1k, ResNet-50
    accelerate launch recipes/imagenet.py --dataset-name digits                 # a minute on a laptop, no download
    accelerate launch recipes/imagenet.py --dataset-name path/to/folder --model-name resnet18 --alpha 0.25

``--help`` lists every option; those of ``transformers.TrainingArguments`` are among them.
"""

import json
import logging
import os
import shlex
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments
from pgt_hf.data import DEFAULT_DATASET, DIGITS, ImageDataset, check_access, class_names, load_image_dataset
from pgt_hf.metrics import ClassificationMetrics
from pgt_hf.models import create_model, load
from pgt_hf.plots import plot_training_curve, require_matplotlib
from pgt_hf.transforms import ImageTransform, collate

CPUS_PER_PROCESS = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

# The paper's setting (arXiv 2111.12495); whatever is given on the command line wins.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/imagenet",
    "alpha": 0.25,
    "optim": "powergrad_sgd",
    "optim_args": "momentum=0.9,nesterov=true",
    "learning_rate": None,  # from base_lr and the batch
    "weight_decay": 5e-4,
    "max_grad_norm": 0.0,
    "num_train_epochs": 100,
    "warmup_steps": 0.05,  # a share of all steps
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 256,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 50,
    "report_to": "none",
    "dataloader_num_workers": min(8, CPUS_PER_PROCESS),
    "dataloader_pin_memory": torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
    "remove_unused_columns": False,  # the transform needs the image
}
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    DIGITS: {
        "output_dir": "runs/digits",
        "model_name": "resnet10t",
        "image_size": 32,
        "min_crop": 0.7,
        "hflip": 0.0,  # a mirrored 2 is no 2
        "base_lr": 0.8,
        "num_train_epochs": 12,
        "per_device_train_batch_size": 32,
        "logging_steps": 5,
        "dataloader_num_workers": 0,
    },
}


@dataclass
class ModelArguments:
    model_name: str = field(default="resnet50", metadata={"help": "A timm model, or the folder of a trained one."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights."})
    norm_free: bool = field(default=False, metadata={"help": "Remove the normalisation layers (ResNets)."})
    small_images: bool = field(default=False, metadata={"help": "A stem that keeps the image's size (ResNets)."})
    base_lr: float = field(
        default=0.4, metadata={"help": "Learning rate at a batch of 1024, scaled to yours; --learning-rate overrides."}
    )


@dataclass
class DataArguments:
    dataset_name: str = field(
        default=DEFAULT_DATASET, metadata={"help": "Hub id, folder of Parquet files or images, or 'digits'."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if not found by itself."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if not found by itself."})
    image_size: int = field(default=224, metadata={"help": "Side of the training and evaluation images in pixels."})
    min_crop: float = field(default=0.08, metadata={"help": "Smallest random crop, as a share of the image's area."})
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    color_jitter: float = field(default=0.4, metadata={"help": "Strength of the colour jitter in training."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})
    eval_only: bool = field(default=False, metadata={"help": "Evaluate --model-name (a trained folder) and stop."})


class SetEpoch(TrainerCallback):
    """With several processes, Accelerate's loader tells the epoch to its sampler alone, not to the data set."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


def main() -> None:
    started = time.perf_counter()
    model_args, data_args, args = parse()
    set_seed(args.seed)
    if args.process_index > 0:
        logging.getLogger("pgt_hf").setLevel(logging.ERROR)

    try:
        with args.main_process_first(desc="loading the data set"):
            dataset = load_image_dataset(
                data_args.dataset_name,
                image_column=data_args.image_column,
                label_column=data_args.label_column,
                max_train_samples=data_args.max_train_samples,
                max_eval_samples=data_args.max_eval_samples,
                seed=args.seed,
            )
        model = build_model(model_args, data_args, class_names(dataset["train"]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    preprocessing = model.config.pretrained_cfg
    augmentation = {
        "scale": (data_args.min_crop, 1.0),
        "hflip": data_args.hflip,
        "color_jitter": data_args.color_jitter,
    }
    metrics = ClassificationMetrics(alpha=args.alpha)
    trainer = PowerGradTrainer(
        model,
        args,
        train_dataset=ImageDataset(
            dataset["train"], ImageTransform(preprocessing, training=True, **augmentation), seed=args.seed
        ),
        eval_dataset=ImageDataset(dataset["validation"], ImageTransform(preprocessing, training=False)),
        data_collator=collate,
        callbacks=[SetEpoch()],
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess,
    )

    if not data_args.eval_only:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
    results = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return

    report = {
        "dataset": data_args.dataset_name,
        "model": model_args.model_name,
        "train_images": dataset["train"].num_rows,
        "eval_images": dataset["validation"].num_rows,
        "top1": results["eval_top1"],
        "top5": results.get("eval_top5"),
        "eval_loss": results["eval_loss"],
        "train_loss": last(trainer.state.log_history, "train_loss"),
        "alpha": args.alpha,
        "seed": args.seed,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "learning_rate": args.learning_rate,
        "batch": global_batch(args),
        "world_size": args.world_size,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {package: version(package) for package in ("torch", "transformers", "timm", "accelerate")},
    }
    tell(report)
    if not data_args.eval_only:
        write(report, trainer.state.log_history, Path(args.output_dir))
        length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        tell_what_next(args.output_dir, more=f"--{length.replace('_', '-')} {2 * getattr(args, length):g}")


def parse() -> tuple[ModelArguments, DataArguments, PowerGradTrainingArguments]:
    """The command line over the data set's defaults over the paper's; stops here if the data cannot be had."""
    parser = HfArgumentParser((ModelArguments, DataArguments, PowerGradTrainingArguments), description=__doc__)
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset-name", "--dataset_name", default=DEFAULT_DATASET)
    dataset_name = first.parse_known_args()[0].dataset_name
    parser.set_defaults(**DEFAULTS | DATASET_DEFAULTS.get(dataset_name, {}))
    parser.parse_known_args()  # --help ends here
    try:
        check_access(dataset_name)
        require_matplotlib()
    except (PermissionError, ImportError) as error:
        sys.exit(f"error: {error}")
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    if args.learning_rate is None:
        args.learning_rate = model_args.base_lr * global_batch(args) / 1024
    if args.resume_from_checkpoint == "auto":
        args.resume_from_checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    return model_args, data_args, args


def global_batch(args: PowerGradTrainingArguments) -> int:
    """Images per optimizer step, over all processes."""
    return args.train_batch_size * args.world_size * args.gradient_accumulation_steps


def build_model(model_args: ModelArguments, data_args: DataArguments, names: list[str]) -> Any:
    if not Path(model_args.model_name, "config.json").is_file():
        if data_args.eval_only and not model_args.pretrained:
            raise ValueError(
                f"--eval-only needs a trained model; --model-name is no folder of one: {model_args.model_name}"
            )
        return create_model(
            model_args.model_name,
            names,
            image_size=data_args.image_size,
            pretrained=model_args.pretrained,
            norm_free=model_args.norm_free,
            small_images=model_args.small_images,
        )
    model = load(model_args.model_name)
    if list(model.config.id2label.values()) != names:
        raise ValueError(f"{model_args.model_name} was trained on other classes than {data_args.dataset_name} has")
    return model


def last(history: list[dict[str, Any]], key: str) -> Any:
    return next((entry[key] for entry in reversed(history) if key in entry), None)


def tell(report: dict[str, Any]) -> None:
    rows = {key: f"{report[key]:.2%}" for key in ("top1", "top5") if report[key] is not None}
    rows |= {key: f"{report[key]:.4g}" for key in ("eval_loss", "train_loss", "seconds") if report[key] is not None}
    print(f"\n{report['model']} on {report['dataset']}, {report['eval_images']:,} evaluation images")
    print("\n".join(f"  {key:12}{value:>10}" for key, value in rows.items()))


def write(report: dict[str, Any], history: list[dict[str, Any]], folder: Path) -> None:
    (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_training_curve(history, folder / "training_curve.png", f"{report['model']}, alpha = {report['alpha']}")


def tell_what_next(output_dir: str, more: str) -> None:
    same, where = shlex.join(sys.argv), shlex.quote(output_dir)
    print(f"""
Written to {output_dir}
  metrics.json         these numbers, and what they were made with
  training_curve.png   loss, accuracy and learning rate
  model.safetensors    the model, with config.json: transformers' auto classes and pipelines read it
  checkpoint-*         to go on from

What next
  evaluate   python {same} --model-name {where} --eval-only
  go on      accelerate launch {same} --resume-from-checkpoint auto {more}
  compare    accelerate launch {same} --alpha 1 --output-dir {shlex.quote(output_dir + "-plain")}
  publish    hf upload <you>/<name of the model> {where} . --exclude "checkpoint-*"
""")


if __name__ == "__main__":
    main()
