"""Fine-tune a pretrained image classifier on your own classes, with the PowerGrad Transform.

    accelerate launch recipes/finetune.py --dataset-name path/to/photos          # a folder of images for each class
    accelerate launch recipes/finetune.py --dataset-name labels.csv --mode lora
    accelerate launch recipes/finetune.py --dataset-name you/set --model-name google/vit-base-patch16-224
    accelerate launch recipes/finetune.py --dataset-name labels.csv --model-name resnet18 --weights resnet18.pth
    accelerate launch recipes/finetune.py --smoke                                # a few steps on digits

The model comes from the Hub (timm's and transformers' names alike) or a local folder; --weights takes a local file.
Its last layer is replaced by one for your classes. --mode says what is trained:

    linear        the last layer alone
    full          everything, at one learning rate
    layer-decay   everything, slower the further a layer is from the head (--layer-decay)
    lora          a low-rank update beside each layer (PEFT), merged into the weights at the end

The model of the best epoch is kept, evaluated and saved, so that pipeline("image-classification", model=folder) gives
its answers. docs/finetune.md explains the rest.
"""

import logging
import os
import shlex
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, HfArgumentParser, set_seed

from pgt_hf import ImageTrainingArguments, create_optimizer, fold_powergrad
from pgt_hf.analysis import (
    ClassificationMetrics,
    confusion_matrix,
    plot_confusion,
    plot_images,
    require_matplotlib,
    worst_mistakes,
)
from pgt_hf.images import (
    DIGITS,
    ImageDataset,
    ImageTransform,
    add_lora,
    check_access,
    class_names,
    class_weights,
    collate,
    create_model,
    freeze_backbone,
    load_classifier,
    load_image_dataset,
    merge_lora,
    parameter_groups,
    preprocessing,
    replace_head,
    set_image_size,
)
from pgt_hf.optim import PREFIX
from pgt_hf.runs import RunFolder, command_line, describe_data
from pgt_hf.trainer import ImageTrainer, StopOnSigterm, find_checkpoint, parse_optim_args

CPUS_PER_PROCESS = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
SIGTERM_STATUS = 143  # 128 + SIGTERM: a scheduler sees that the run was stopped and is not finished
MISTAKES = 36  # pictures on the sheet

# What is trained, and the learning rate (AdamW) where none is given.
MODES = {"linear": 1e-3, "full": 1e-4, "layer-decay": 5e-4, "lora": 1e-3}
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/finetune",
    "optim": "powergrad_adamw",
    "weight_decay": 0.05,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "max_grad_norm": 0.0,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "top1",
    "logging_steps": 20,
    "report_to": "none",
    "dataloader_num_workers": min(8, CPUS_PER_PROCESS),
    "dataloader_pin_memory": torch.cuda.is_available(),
    "dataloader_drop_last": True,
    "ddp_find_unused_parameters": False,
    "remove_unused_columns": False,
}
SMOKE: dict[str, Any] = {
    "dataset_name": DIGITS,
    "model_name": "resnet10t",
    "pretrained": False,
    "image_size": 32,
    "hflip": 0.0,  # a mirrored 2 is no 2
    "min_crop": 0.7,
    "max_train_samples": 320,
    "max_eval_samples": 101,
    "learning_rate": 2e-3,
    "num_train_epochs": 2,
    "logging_steps": 2,
    "dataloader_num_workers": 0,
}


@dataclass
class ModelArguments:
    model_name: str = field(
        default="resnet50.a1_in1k", metadata={"help": "timm name, Hub id, or the folder of a trained model."}
    )
    weights: str | None = field(default=None, metadata={"help": "Local file of the model's pretrained weights."})
    pretrained: bool = field(default=True, metadata={"help": "Begin with trained weights; else timm's random ones."})
    mode: str = field(default="full", metadata={"help": f"What is trained: {', '.join(MODES)}."})
    layer_decay: float = field(default=0.75, metadata={"help": "Learning rate of a layer / that of the one above it."})
    head_lr_scale: float = field(default=1.0, metadata={"help": "Learning rate of the new head, as a multiple."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA's updates."})
    lora_scale: float = field(default=2.0, metadata={"help": "What LoRA's updates are multiplied by."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of LoRA's updates."})
    class_weights: str | None = field(default=None, metadata={"help": "'balanced': all classes count the same."})
    patience: int | None = field(default=None, metadata={"help": "Stop after so many epochs without a better top-1."})
    fold: bool = field(default=False, metadata={"help": "Multiply the saved head by alpha: honest probabilities."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder of images, CSV or Parquet (file or folder), or 'digits'."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if not found by itself."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if not found by itself."})
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels, if not the model's (timm only)."})
    min_crop: float = field(default=0.35, metadata={"help": "Smallest random crop, as a share of the image's area."})
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    color_jitter: float = field(default=0.0, metadata={"help": "Strength of the colour jitter in training."})
    auto_augment: str | None = field(default=None, metadata={"help": "timm's RandAugment, as rand-m9-mstd0.5-inc1."})
    on_bad_image: str = field(default="error", metadata={"help": "'error', or 'skip' and count what cannot be read."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})


@dataclass
class RunArguments:
    resume: str | None = field(default=None, metadata={"help": "A checkpoint, or 'auto': the newest one, if any."})
    smoke: bool = field(default=False, metadata={"help": "A few steps on digits, to see that everything works."})


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    pass


def main() -> None:
    started = time.perf_counter()
    model_args, data_args, run_args, args, config = parse()
    set_seed(args.seed)
    if args.process_index > 0:
        logging.getLogger("pgt_hf").setLevel(logging.ERROR)

    try:
        with args.main_process_first(desc="loading data and model"):
            dataset = load_image_dataset(
                data_args.dataset_name,
                image_column=data_args.image_column,
                label_column=data_args.label_column,
                max_train_samples=data_args.max_train_samples,
                max_eval_samples=data_args.max_eval_samples,
                seed=args.seed,
            )
            names = class_names(dataset["train"])
            model = build_model(model_args, data_args, names)
        train, validation, processor = build_data(dataset, model, model_args.model_name, data_args, args.seed)
        if len(train) < args.per_device_train_batch_size * args.world_size:
            raise ValueError(
                f"--per-device-train-batch-size must be at most {len(train) // args.world_size}, the "
                f"training images of one process, got {args.per_device_train_batch_size}"
            )
        model = choose_trained(model, model_args)
        metrics = ClassificationMetrics(alpha=args.alpha)
        data = describe_data(data_args.dataset_name, dataset)
        title = f"{model_args.model_name}, {model_args.mode}, alpha = {args.alpha}"
        record = RunFolder(args.output_dir, {"arguments": config, "data": data, "seed": args.seed}, title)
        stop = StopOnSigterm()
        early = [] if model_args.patience is None else [EarlyStoppingCallback(model_args.patience)]
        trainer = ImageTrainer(
            model,
            args,
            mean=processor and processor.image_mean,
            std=processor and processor.image_std,
            class_weights=class_weights(dataset["train"]["label"], len(names)) if model_args.class_weights else None,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collate,
            processing_class=processor,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.preprocess,
            optimizer_cls_and_kwargs=(lambda: create_optimizer, optimizer_options(model_args, args)),
            callbacks=[record, stop, *early],
        )
        resume = find_checkpoint(run_args.resume, args.output_dir)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    trainer.train(resume_from_checkpoint=resume)
    if stop.stopped:
        if trainer.is_world_process_zero():
            again = f"{command_line()} --resume auto"
            print(f"\nStopped by SIGTERM at step {trainer.state.global_step}; go on with: accelerate launch {again}")
        trainer.end()
        sys.exit(SIGTERM_STATUS)
    if model_args.mode == "lora":
        trainer.model = trainer.model_wrapped = merge_lora(trainer.model)
    if model_args.fold:
        fold_powergrad(trainer.model, args.alpha)
        metrics.alpha = None  # the model's probabilities are the folded ones
    predicted = trainer.predict(validation, metric_key_prefix="eval")  # of the model that is saved
    trainer.save_model()
    bad_images = trainer.bad_images()
    if trainer.is_world_process_zero():
        draw_mistakes(predicted, dataset["validation"], names, Path(args.output_dir), title)
        seconds = round(time.perf_counter() - started, 1)
        report = summarize(predicted.metrics, model_args, data, args, trainer.state, bad_images, seconds)
        record.finish(report)
        tell(report, args.output_dir, data_args.dataset_name)
    trainer.end()


def parse() -> tuple[ModelArguments, DataArguments, RunArguments, ImageTrainingArguments, dict[str, Any]]:
    """The arguments, and all of them resolved, for run.json; stops here if anything asked for cannot be had."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RunArguments, ImageTrainingArguments),
        description=__doc__,
        formatter_class=_Help,
    )
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--smoke", action="store_true")
    parser.set_defaults(**DEFAULTS | (SMOKE if early.parse_known_args()[0].smoke else {}))
    namespace = parser.parse_args()
    try:
        if namespace.dataset_name is None:
            raise ValueError("--dataset-name must be given: a Hub id, a folder of images, a CSV or Parquet, or digits")
        if namespace.mode not in MODES:
            raise ValueError(f"--mode must be one of {', '.join(MODES)}, got {namespace.mode!r}")
        if namespace.class_weights not in (None, "balanced"):
            raise ValueError(f"--class-weights must be 'balanced' or left out, got {namespace.class_weights!r}")
        if not namespace.optim.startswith(PREFIX):
            raise ValueError(f"--optim must begin with {PREFIX!r}, as powergrad_adamw, got {namespace.optim!r}")
        if namespace.mode == "lora" and namespace.ema_decay is not None:
            raise ValueError(f"--ema-decay must be left out with --mode lora, got {namespace.ema_decay}")
        if namespace.fold and namespace.alpha == 0:
            raise ValueError("--fold must be left out with --alpha 0: every probability would be 1/C")
        check_access(namespace.dataset_name)
        require_matplotlib()
        if namespace.learning_rate is None:
            namespace.learning_rate = MODES[namespace.mode]
        config = {key: plain(value) for key, value in vars(namespace).items() if key != "resume"}
        model_args, data_args, run_args, args = parser.parse_dict(vars(namespace))
    except (OSError, ImportError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    return model_args, data_args, run_args, args, config


def build_model(model_args: ModelArguments, data_args: DataArguments, names: list[str]) -> Any:
    if not model_args.pretrained:
        return create_model(model_args.model_name, names, image_size=data_args.image_size or 224)
    model = replace_head(load_classifier(model_args.model_name, model_args.weights), names)
    return model if data_args.image_size is None else set_image_size(model, data_args.image_size)


def build_data(
    dataset: Any, model: Any, model_name: str, data_args: DataArguments, seed: int
) -> tuple[ImageDataset, ImageDataset, Any]:
    """Training and evaluation images; and the image processor, to be saved with a model that is not timm's."""
    config, processor = getattr(model.config, "pretrained_cfg", None), None
    if config is None:
        evaluate: Any = preprocessing(model, model_name)
        processor = evaluate.processor
        size = dict(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)
        side = size.get("height") or size["shortest_edge"]
        config = {"input_size": (3, side, side), "mean": processor.image_mean, "std": processor.image_std}
    else:
        evaluate = ImageTransform(config, training=False, normalize=False)
    augment = ImageTransform(
        config,
        training=True,
        normalize=False,  # the trainer does it on the device
        scale=(data_args.min_crop, 1.0),
        hflip=data_args.hflip,
        color_jitter=data_args.color_jitter,
        auto_augment=data_args.auto_augment,
    )
    options = {"seed": seed, "on_bad_image": data_args.on_bad_image}
    train = ImageDataset(dataset["train"], augment, **options)
    return train, ImageDataset(dataset["validation"], evaluate, **options), processor


def choose_trained(model: Any, model_args: ModelArguments) -> Any:
    if model_args.mode == "linear":
        return freeze_backbone(model)
    if model_args.mode == "lora":
        return add_lora(model, model_args.lora_rank, scale=model_args.lora_scale, dropout=model_args.lora_dropout)
    return model


def optimizer_options(model_args: ModelArguments, args: ImageTrainingArguments) -> dict[str, Any]:
    items = [item.split("=", 1) for item in (args.optim_args or "").replace(" ", "").split(",") if item]
    groups = partial(
        parameter_groups,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        layer_decay=model_args.layer_decay if model_args.mode == "layer-decay" else None,
        head_lr_scale=model_args.head_lr_scale,
    )
    options = args.powergrad_options() | parse_optim_args(str(plain(args.optim)), dict(items))
    return options | {"opt": plain(args.optim), "lr": args.learning_rate, "param_group_fn": groups}


def draw_mistakes(predicted: Any, images: Any, names: list[str], folder: Path, title: str) -> None:
    """confusion_matrix.png, and mistakes.png: the wrong images that the model was surest of."""
    truth, best, confidence = predicted.label_ids, predicted.predictions[0][:, 0], predicted.predictions[-1][:, 1]
    plot_confusion(confusion_matrix(truth, best, len(names)), names, folder / "confusion_matrix.png", title)
    if worst := worst_mistakes(truth, best, confidence, MISTAKES):
        captions = [f"{names[truth[i]]}\nnot {names[best[i]]}, {confidence[i]:.0%}" for i in worst]
        plot_images([images[i]["image"] for i in worst], captions, folder / "mistakes.png", title)


def summarize(
    results: dict[str, Any],
    model_args: ModelArguments,
    data: dict[str, Any],
    args: ImageTrainingArguments,
    state: Any,
    bad_images: int,
    seconds: float,
) -> dict[str, Any]:
    """What metrics.json holds: the results, and what is needed to read them."""
    timing = ("runtime", "per_second", "preparation_time", "epoch")
    accuracies = {entry["epoch"]: entry["eval_top1"] for entry in state.log_history if "eval_top1" in entry}
    return {
        "model": model_args.model_name,
        "weights": model_args.weights,
        "mode": model_args.mode,
        "dataset": data["name"],
        "train_images": data["train"]["images"],
        "eval_images": data["validation"]["images"],
        **{key.removeprefix("eval_"): value for key, value in results.items() if not key.endswith(timing)},
        "best_epoch": max(accuracies, key=accuracies.__getitem__, default=None),
        "epochs": state.epoch,
        "last_epoch_top1": list(accuracies.values())[-1] if accuracies else None,
        "bad_images": bad_images,
        "alpha": args.alpha,
        "folded": model_args.fold,
        "seed": args.seed,
        "steps": state.global_step,
        "learning_rate": args.learning_rate,
        "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "world_size": args.world_size,
        "seconds": seconds,
    }


def tell(report: dict[str, Any], folder: str, dataset_name: str) -> None:
    print(
        f"\n{report['model']} ({report['mode']}) on {report['dataset']}, {report['eval_images']:,} validation images"
    )
    for key in ("top1", "top5", "ece", "ece_folded"):
        if key in report:
            print(f"  {key:12}{report[key]:>10.2%}")
    for key in ("loss", "nll", "nll_folded", "best_epoch", "seconds"):
        if report.get(key) is not None:
            print(f"  {key:12}{report[key]:>10.4g}")
    where, data = shlex.quote(folder), shlex.quote(dataset_name)
    print(f"""
Written to {folder}
  model.safetensors, config.json   the model of the best epoch, as transformers reads it
  confusion_matrix.png             which class was taken for which
  mistakes.png                     the wrong images that it was surest of
  metrics.json, run.json           these numbers, and all that they were made with
  history.jsonl, training_curve.png

The best epoch was chosen on these validation images: the accuracy of a new set will be a little lower.

What next
  use        transformers.pipeline("image-classification", model={folder!r})("photo.jpg")
  evaluate   python recipes/evaluate.py {where} --dataset-name {data}
  compare    accelerate launch {command_line()} --alpha 1 --output-dir {shlex.quote(folder + "-plain")}
""")


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


if __name__ == "__main__":
    main()
