"""Train a timm network with the PowerGrad Transform on ImageNet, or on any data set shaped like it.

    accelerate launch recipes/imagenet.py                                       # ILSVRC/imagenet-1k, ResNet-50
    accelerate launch recipes/imagenet.py --preset list                         # the published runs, by name
    accelerate launch recipes/imagenet.py --preset resnet50_cosine_pgt
    accelerate launch recipes/imagenet.py --dataset-name digits                 # a minute on a laptop, no download
    accelerate launch recipes/imagenet.py --config runs/imagenet/run.json       # the same run again
    accelerate launch recipes/imagenet.py --resume auto                         # go on where it was stopped

A flag wins over --config, --config over --preset, --preset over the defaults below. ``--help`` lists every option;
those of ``transformers.TrainingArguments`` are among them. docs/imagenet.md explains the run folder.
"""

import json
import logging
import os
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, set_seed

from pgt_hf import ImageTrainingArguments
from pgt_hf.analysis import ClassificationMetrics, examine, require_matplotlib
from pgt_hf.images import (
    DEFAULT_DATASET,
    DIGITS,
    PAPER,
    PRESETS,
    ImageDataset,
    ImageStream,
    ImageTransform,
    check_access,
    class_names,
    collate,
    create_model,
    load,
    load_image_dataset,
    num_images,
    preset_table,
)
from pgt_hf.runs import RunFolder, command_line, describe_data, write_evaluation, write_report
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback, ImageTrainer, StopOnSigterm, find_checkpoint

CPUS_PER_PROCESS = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
SIGTERM_STATUS = 143  # 128 + SIGTERM: a scheduler sees that the run was stopped and is not finished

DEFAULTS: dict[str, Any] = PAPER | {
    "output_dir": "runs/imagenet",
    "model_name": "resnet50",
    "alpha": 0.25,
    "learning_rate": None,  # from base_lr and the batch
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 256,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 50,
    "report_to": "none",
    "dataloader_num_workers": min(8, CPUS_PER_PROCESS),
    "dataloader_pin_memory": torch.cuda.is_available(),
    "dataloader_drop_last": True,
    "ddp_find_unused_parameters": False,
    "remove_unused_columns": False,
    "channels_last": True,
    "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # the paper's runs were in mixed precision
}
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    DIGITS: {
        "output_dir": "runs/digits",
        "model_name": "resnet10t",
        "image_size": 32,
        "min_crop": 0.7,
        "hflip": 0.0,  # a mirrored 2 is no 2
        "base_lr": 0.8,
        "global_batch": 64,
        "warmup_epochs": 0.6,
        "num_train_epochs": 12,
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
    drop_path: float = field(default=0.0, metadata={"help": "Stochastic depth: probability of leaving out a block."})


@dataclass
class DataArguments:
    dataset_name: str = field(
        default=DEFAULT_DATASET, metadata={"help": "Hub id, folder of Parquet files or images, or 'digits'."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if not found by itself."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if not found by itself."})
    streaming: bool = field(default=False, metadata={"help": "Read the training images without downloading them."})
    train_images: int | None = field(default=None, metadata={"help": "Images per epoch, where a stream cannot tell."})
    image_size: int = field(default=224, metadata={"help": "Side of the training images in pixels."})
    eval_image_size: int | None = field(default=None, metadata={"help": "Side of the evaluation images, if other."})
    crop_pct: float | None = field(default=None, metadata={"help": "Share of the side that evaluation keeps."})
    min_crop: float = field(default=0.08, metadata={"help": "Smallest random crop, as a share of the image's area."})
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    color_jitter: float = field(default=0.4, metadata={"help": "Strength of the colour jitter in training."})
    auto_augment: str | None = field(default=None, metadata={"help": "timm's RandAugment, as rand-m9-mstd0.5-inc1."})
    on_bad_image: str = field(default="error", metadata={"help": "'error', or 'skip' and count what cannot be read."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})


@dataclass
class RunArguments:
    preset: str | None = field(default=None, metadata={"help": "A published run by name; 'list' prints them."})
    config: str | None = field(default=None, metadata={"help": "The run.json of a run to repeat."})
    resume: str | None = field(default=None, metadata={"help": "A checkpoint, or 'auto': the newest one, if any."})
    global_batch: int = field(
        default=1024, metadata={"help": "Images per update, over all processes; accumulation is worked out."}
    )
    base_lr: float = field(
        default=0.4, metadata={"help": "Learning rate at a batch of 1024, scaled to yours; --learning-rate overrides."}
    )
    diagnostics: bool = field(
        default=True, metadata={"help": "Record the paper's quantities; needs whole parameters."}
    )
    report: bool = field(default=True, metadata={"help": "Write report.html, after one more look at the images."})
    smoke: bool = field(default=False, metadata={"help": "A few steps on digits, to see that everything works."})


def main() -> None:
    started = time.perf_counter()
    model_args, data_args, run_args, args, config = parse()
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
                streaming=data_args.streaming,
            )
        model = build_model(model_args, data_args, class_names(dataset["validation"]))
        train, validation = build_data(dataset, data_args, model.config.pretrained_cfg, args)
        resume = find_checkpoint(run_args.resume, args.output_dir)
        metrics = ClassificationMetrics(alpha=args.alpha)
        data = describe_data(data_args.dataset_name, dataset)
        title = f"{model_args.model_name}, alpha = {args.alpha}"
        record = RunFolder(args.output_dir, {"arguments": config, "data": data, "seed": args.seed}, title)
        stop, guard = StopOnSigterm(), DivergenceCallback()
        trainer = ImageTrainer(
            model,
            args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collate,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.preprocess,
            callbacks=[record, stop, guard],
        )
        if run_args.diagnostics and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.add_callback(DiagnosticsCallback())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    trainer.train(resume_from_checkpoint=resume)
    if stop.stopped:
        if trainer.is_world_process_zero():
            again = f"accelerate launch {command_line()} --resume auto"
            print(f"\nStopped by SIGTERM at step {trainer.state.global_step}; go on with: {again}")
        trainer.end()
        sys.exit(SIGTERM_STATUS)
    if guard.verdict:
        trainer.end()
        sys.exit(f"error: {guard.message}")
    trainer.save_model()
    results = trainer.evaluate()
    results["bad_images"] = trainer.bad_images()
    if trainer.is_world_process_zero():
        seconds = round(time.perf_counter() - started, 1)
        report = summarize(results, model_args, data, args, run_args, trainer.state, seconds)
        record.finish(report)
        tell(report)
        if run_args.report:
            best = model if trainer.ema is None else trainer.ema.module
            write_evaluation(args.output_dir, examine(best, validation, alpha=args.alpha))
            write_report(args.output_dir)
        tell_what_next(args, data_args)
    if args.push_to_hub:
        trainer.push_to_hub(dataset=data_args.dataset_name)
    trainer.end()


def parse() -> tuple[ModelArguments, DataArguments, RunArguments, ImageTrainingArguments, dict[str, Any]]:
    """Flags over --config over --preset over defaults; stops here if anything asked for cannot be had.

    The last value is the resolved configuration, which ``--config`` takes.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RunArguments, ImageTrainingArguments), description=__doc__
    )
    try:
        parser.set_defaults(**preset_and_config(parser))
        namespace = parser.parse_args()
        check_access(namespace.dataset_name)
        require_matplotlib()
        config = {key: plain(value) for key, value in vars(namespace).items() if key not in ("config", "resume")}
        fit_batch(namespace)
        model_args, data_args, run_args, args = parser.parse_dict(vars(namespace))
    except (OSError, ImportError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    return model_args, data_args, run_args, args, config


def preset_and_config(parser: ArgumentParser) -> dict[str, Any]:
    """The defaults of this command line, from the data set, the preset and the configuration that it names."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset-name", "--dataset_name")
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--smoke", action="store_true")
    early = first.parse_known_args()[0]
    if early.preset == "list":
        print(preset_table())
        sys.exit()
    saved = json.loads(Path(early.config).read_text(encoding="utf-8"))["arguments"] if early.config else {}
    if unknown := set(saved) - {action.dest for action in parser._actions}:
        raise ValueError(f"--config {early.config} names arguments that do not exist: {', '.join(sorted(unknown))}")
    preset = early.preset or saved.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset must be 'list' or one of {', '.join(PRESETS)}, got {preset!r}")
    if early.smoke:
        saved |= {"dataset_name": DIGITS, "max_steps": 20, "max_eval_samples": 100}
    dataset_name = early.dataset_name or saved.get("dataset_name", DEFAULT_DATASET)
    chosen = PRESETS[preset].settings if preset else {}
    return DEFAULTS | DATASET_DEFAULTS.get(dataset_name, {}) | chosen | saved | {"dataset_name": dataset_name}


def fit_batch(settings: Namespace) -> None:
    """Sets batch per process, accumulation and learning rate, so that a global batch is the same on any machine."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    each, rest = divmod(settings.global_batch, processes)
    if rest or each < 1:
        raise ValueError(f"--global-batch {settings.global_batch} cannot be divided over {processes} processes")
    largest = settings.per_device_train_batch_size
    steps = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= largest)
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = each // steps, steps
    if settings.learning_rate is None:
        settings.learning_rate = settings.base_lr * settings.global_batch / 1024


def build_model(model_args: ModelArguments, data_args: DataArguments, names: list[str]) -> Any:
    if Path(model_args.model_name, "config.json").is_file():
        model = load(model_args.model_name)
        if list(model.config.id2label.values()) != names:
            raise ValueError(f"{model_args.model_name} was trained on other classes than {data_args.dataset_name} has")
        return model
    model = create_model(
        model_args.model_name,
        names,
        image_size=data_args.eval_image_size or data_args.image_size,
        pretrained=model_args.pretrained,
        norm_free=model_args.norm_free,
        small_images=model_args.small_images,
        **({"drop_path_rate": model_args.drop_path} if model_args.drop_path else {}),
    )
    if data_args.crop_pct is not None:
        model.config.pretrained_cfg["crop_pct"] = data_args.crop_pct
    return model


def build_data(dataset: Any, data_args: DataArguments, preprocessing: dict[str, Any], args: Any) -> tuple[Any, Any]:
    """Training and evaluation images, uint8: the trainer normalises them on the device."""
    side = data_args.image_size
    augment = ImageTransform(
        preprocessing | {"input_size": (3, side, side)},
        training=True,
        normalize=False,
        scale=(data_args.min_crop, 1.0),
        hflip=data_args.hflip,
        color_jitter=data_args.color_jitter,
        auto_augment=data_args.auto_augment,
    )
    options = {"seed": args.seed, "on_bad_image": data_args.on_bad_image}
    validation = ImageDataset(
        dataset["validation"], ImageTransform(preprocessing, training=False, normalize=False), **options
    )
    if not data_args.streaming:
        return ImageDataset(dataset["train"], augment, **options), validation
    images = data_args.train_images or data_args.max_train_samples or num_images(dataset["train"])
    if images is None:
        raise ValueError("this stream does not say how many images it has; give --train-images")
    train = ImageStream(
        dataset["train"],
        augment,
        batch_size=args.per_device_train_batch_size,
        num_samples=images,
        rank=args.process_index,
        world_size=args.world_size,
        **options,
    )
    return train, validation


def summarize(
    results: dict[str, Any],
    model_args: ModelArguments,
    data: dict[str, Any],
    args: ImageTrainingArguments,
    run_args: RunArguments,
    state: Any,
    seconds: float,
) -> dict[str, Any]:
    """What metrics.json holds: the results, and what is needed to read them."""
    preset = PRESETS.get(run_args.preset or "")
    train_loss = next((entry["train_loss"] for entry in reversed(state.log_history) if "train_loss" in entry), None)
    timing = ("runtime", "per_second", "preparation_time", "epoch")
    return {
        "model": model_args.model_name,
        "dataset": data["name"],
        "train_images": data["train"]["images"],
        "eval_images": data["validation"]["images"],
        **{key.removeprefix("eval_"): value for key, value in results.items() if not key.endswith(timing)},
        "train_loss": train_loss,
        "published_top1": preset.top1 if preset else None,
        "alpha": args.alpha,
        "seed": args.seed,
        "epochs": state.epoch,
        "steps": state.global_step,
        "learning_rate": args.learning_rate,
        "batch": run_args.global_batch,
        "world_size": args.world_size,
        "seconds": seconds,
    }


def tell(report: dict[str, Any]) -> None:
    shares = ("top1", "top5", "ema_top1", "ema_top5", "ece", "ece_folded")
    print(f"\n{report['model']} on {report['dataset']}, {report['eval_images']:,} evaluation images")
    for key in (*shares, "nll", "nll_folded", "train_loss", "bad_images", "seconds"):
        if report.get(key):
            print(f"  {key:12}{f'{report[key]:.2%}' if key in shares else f'{report[key]:.4g}':>10}")
    if report["published_top1"]:
        print(f"  {'published':12}{report['published_top1'] / 100:>10.2%}   (top-1 of this preset)")


def tell_what_next(args: ImageTrainingArguments, data_args: DataArguments) -> None:
    where, data = shlex.quote(args.output_dir), shlex.quote(data_args.dataset_name)
    same = command_line()
    ema = "\n  ema/                 the averaged model, in the same form" if args.ema_decay is not None else ""
    print(f"""
Written to {args.output_dir}
  metrics.json         these numbers, and what they were made with
  run.json             arguments, code, data, seed, environment; --config repeats the run
  history.jsonl        everything that was logged, a line each
  training_curve.png   loss, accuracy and learning rate
  report.html          curves, calibration, confusion, worst mistakes, in one page
  diagnostics.npz      logits, filters, gradients; drawn by pgt-hf plot {where}
  model.safetensors    the model, with config.json: transformers' auto classes and pipelines read it{ema}
  checkpoint-*         to go on from

What next
  evaluate   python recipes/evaluate.py {where} --dataset-name {data}
  go on      accelerate launch {same} --resume auto --num-train-epochs {2 * args.num_train_epochs:g}
  compare    accelerate launch {same} --alpha 1 --output-dir {shlex.quote(args.output_dir + "-plain")}
  publish    pgt-hf push {where} --repo-id <you>/<name of the model>
""")


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


if __name__ == "__main__":
    main()
