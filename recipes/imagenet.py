"""Train a timm network with the PowerGrad Transform on ImageNet, or on any data set shaped like it.

    accelerate launch recipes/imagenet.py                                       # ILSVRC/imagenet-1k, ResNet-50
    accelerate launch recipes/imagenet.py --preset list                         # the published runs, by name
    accelerate launch recipes/imagenet.py --preset resnet50_cosine_pgt
    accelerate launch recipes/imagenet.py --dataset-name digits                 # a minute on a laptop, no download
    accelerate launch recipes/imagenet.py --config runs/imagenet/run.json       # the same run again
    accelerate launch recipes/imagenet.py --resume auto                         # resume it where it was stopped

A flag wins over --config, --config over --preset, --preset over the defaults below. ``--help`` lists the options,
``--help-all`` also the rest of ``transformers.TrainingArguments``. docs/imagenet.md explains the run folder.
"""

import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from pgt_hf import ImageTrainer, ImageTrainingArguments
from pgt_hf.analysis import ClassificationMetrics, Evaluation, calibration_table, require_matplotlib
from pgt_hf.images import (
    DEFAULT_DATASET,
    DIGITS,
    PAPER,
    PRESETS,
    CropPct,
    ImageDataArguments,
    ImageStream,
    ImageTransform,
    Side,
    TimmName,
    class_names,
    collate,
    create_model,
    load_classifier,
    num_images,
    preset_table,
    published_top1,
)
from pgt_hf.limits import Count, ExistingPath, Needs, Number, OneOf, Rate, Whole
from pgt_hf.programs import (
    IMAGE_DEFAULTS,
    RunArguments,
    begin,
    errors_in_one_line,
    fit_global_batch,
    next_commands,
    parse,
    read_config,
    tell,
)
from pgt_hf.runs import RunFolder, command, describe_data, recipe, warn_on_failure, write_report
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback, StopOnSigterm

DEFAULTS: dict[str, Any] = IMAGE_DEFAULTS | PAPER
DEFAULTS |= {
    "output_dir": "runs/imagenet",
    "dataset_name": DEFAULT_DATASET,
    "alpha": 0.25,
    "learning_rate": None,  # from base_lr and the batch
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 256,
    "save_total_limit": 2,
    "channels_last": True,
    "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # the paper's runs were in mixed precision
}
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    DIGITS: {  # hflip: a mirrored 2 is no 2
        "output_dir": "runs/digits", "model_name": "resnet10t", "image_size": 32, "min_crop": 0.7, "hflip": 0.0,
        "base_lr": 0.8, "global_batch": 64, "warmup_epochs": 0.6, "num_train_epochs": 12,
        "dataloader_num_workers": 0,
    },
}  # fmt: skip
SHOWN = ("top1", "top5", "ema_top1", "ema_top5", "loss", "train_loss", "bad_images", "seconds")
SMOKE = {"dataset_name": DIGITS, "max_steps": 20, "max_eval_samples": 100}


@dataclass
class ModelArguments:
    model_name: Annotated[str, TimmName(folder=True)] = field(
        default="resnet50", metadata={"help": "A timm model, or the folder of a trained one."}
    )
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights."})
    norm_free: bool = field(default=False, metadata={"help": "Remove the normalisation layers (ResNets)."})
    small_images: bool = field(default=False, metadata={"help": "A stem that keeps the image's size (ResNets)."})
    drop_path: Annotated[float, Number("[0, 1)")] = field(
        default=0.0, metadata={"help": "Stochastic depth: probability of leaving out a block."}
    )


@dataclass
class DataArguments(ImageDataArguments):
    streaming: bool = field(default=False, metadata={"help": "Read the images without downloading them."})
    train_images: Annotated[Count | None, Needs("streaming")] = field(
        default=None, metadata={"help": "Images per epoch, where a stream cannot tell."}
    )
    eval_image_size: Side | None = field(default=None, metadata={"help": "Side of the evaluation images, if other."})
    crop_pct: CropPct | None = field(default=None, metadata={"help": "Share of the side that evaluation keeps."})


@dataclass
class RecipeArguments(RunArguments):
    preset: Annotated[str | None, OneOf(("list", *PRESETS))] = field(
        default=None, metadata={"help": "A published run; 'list' prints them."}
    )
    config: Annotated[str | None, ExistingPath("file")] = field(default=None, metadata={"help": "A run.json to redo."})
    global_batch: Count = field(default=1024, metadata={"help": "Images per update, over all processes and steps."})
    base_lr: Rate = field(default=0.4, metadata={"help": "Learning rate at a batch of 1024, scaled to yours."})
    diagnostics: bool = field(default=True, metadata={"help": "Record logits, filters, gradients (whole parameters)."})
    report: bool = field(default=True, metadata={"help": "Write report.html: calibration, confusion, worst mistakes."})


def main() -> None:
    # parse
    stop = StopOnSigterm().listen()
    model_args, data_args, run_args, args, config = parse(
        ModelArguments, DataArguments, RecipeArguments, ImageTrainingArguments, description=__doc__,
        defaults=choose_defaults, early=("dataset_name", "preset", "config"), adjust=fit_global_batch,
    )  # fmt: skip
    resume = begin(args, run_args.resume)

    # build
    with errors_in_one_line():
        require_matplotlib()
        with args.main_process_first(desc="loading the data set"):
            splits = data_args.load(args.seed, streaming=data_args.streaming)
        model = build_model(model_args, data_args, class_names(splits["validation"]))
        train, validation = build_data(splits, data_args, model.config.pretrained_cfg, args)
        metrics = ClassificationMetrics(alpha=args.alpha)
        data = describe_data(data_args.dataset_name, splits)
        title = f"{model_args.model_name}, alpha = {args.alpha}"
        record = RunFolder(args.output_dir, {"arguments": config, "data": data, "seed": args.seed}, title)
        record.check_resume(resume, run_args.allow_changed_data)
        guard = DivergenceCallback()
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

    # train
    trainer.train(resume_from_checkpoint=resume)
    stop.leave(trainer)
    guard.leave(trainer)
    trainer.save_model()
    metrics.keep_logits = run_args.report
    results = trainer.evaluate()  # of the averaged model last, if there is one
    results["bad_images"] = trainer.bad_images()

    # report
    if trainer.is_world_process_zero():
        more = {"model": model_args.model_name, "published_top1": published_top1(config)}
        more |= {"train_images": data["train"]["images"], "eval_images": data["validation"]["images"]}
        summary, evaluation = record.finish(trainer, results, **more), None
        if run_args.report:
            with warn_on_failure("the report"):
                names = class_names(splits["validation"])
                evaluation = Evaluation.from_logits(*metrics.kept, names, validation, alpha=args.alpha)
                summary = record.finish(trainer, results, evaluation, **more)
                write_report(args.output_dir)
        say(summary, args, evaluation)
    if args.push_to_hub:
        trainer.push_to_hub(dataset=data_args.dataset_name)
    trainer.end()


def choose_defaults(early: Namespace) -> dict[str, Any]:
    """The defaults of this command line, from the data set, the preset and the configuration that it names."""
    if early.preset == "list":
        print(preset_table())
        sys.exit()
    saved = read_config(early.config) if early.config is not None else {}
    preset = saved.get("preset") if early.preset is None else early.preset
    if early.smoke:
        saved |= SMOKE
    dataset_name = early.dataset_name or saved.get("dataset_name", DEFAULT_DATASET)
    chosen = PRESETS[preset].settings if preset in PRESETS else {}
    return DEFAULTS | DATASET_DEFAULTS.get(dataset_name, {}) | chosen | saved | {"dataset_name": dataset_name}


def build_model(model_args: ModelArguments, data_args: DataArguments, names: list[str]) -> Any:
    if Path(model_args.model_name).is_dir():
        model = load_classifier(model_args.model_name)
        if list(model.config.id2label.values()) != names:
            other = f"{model_args.model_name!r}, which has others"
            raise ValueError(f"model_name must name a model with the classes of {data_args.dataset_name}, got {other}")
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


def build_data(splits: Any, data_args: DataArguments, preprocessing: dict[str, Any], args: Any) -> tuple[Any, Any]:
    """Training and evaluation images, uint8: the rest is done on the device."""
    on_device = args.device.type == "cuda"
    if not data_args.streaming:
        return data_args.datasets(splits, preprocessing, args.seed, on_device=on_device)
    images = data_args.train_images or data_args.max_train_samples or num_images(splits["train"])
    if images is None:
        raise ValueError("this stream does not say how many images it has; give --train-images")
    Whole(f"[{args.per_device_train_batch_size * args.world_size}, inf)").check("train_images", images)
    train = ImageStream(
        splits["train"],
        data_args.augmentation(preprocessing, on_device=on_device),
        batch_size=args.per_device_train_batch_size,
        num_samples=images,
        rank=args.process_index,
        world_size=args.world_size,
        seed=args.seed,
        on_bad_image=data_args.on_bad_image,
    )
    return train, data_args.evaluation(splits, ImageTransform(preprocessing, training=False, normalize=False))


def say(summary: dict[str, Any], args: ImageTrainingArguments, evaluation: Evaluation | None) -> None:
    results = {key: summary.get(key) for key in SHOWN}
    if summary["published_top1"]:
        results["published top-1"] = summary["published_top1"] / 100
    then = {
        "predict": command("pgt-hf", "predict", args.output_dir, "IMAGE"),
        "evaluate": command("python", recipe("evaluate_images.py"), args.output_dir),
    }
    heading = f"{summary['model']} on {summary['dataset']}, {summary['eval_images']:,} evaluation images"
    table = evaluation and calibration_table(evaluation.calibration)
    tell(heading, results, args.output_dir, then | next_commands(args), table=table)


if __name__ == "__main__":
    main()
