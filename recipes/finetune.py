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

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import timm
from transformers import EarlyStoppingCallback

from pgt_hf import ImageTrainer, ImageTrainingArguments, create_optimizer, fold_powergrad
from pgt_hf.analysis import (
    ClassificationMetrics,
    Evaluation,
    calibration_table,
    plot_confusion,
    plot_mistakes,
    require_matplotlib,
)
from pgt_hf.images import (
    DIGITS,
    MODES,
    FinetuningArguments,
    ImageDataArguments,
    ImageDataset,
    add_lora,
    class_names,
    class_weights,
    collate,
    create_model,
    freeze_backbone,
    load_classifier,
    parameter_groups,
    preprocessing,
    replace_head,
    set_image_size,
)
from pgt_hf.programs import IMAGE_DEFAULTS, RunArguments, begin, errors_in_one_line, next_commands, parse, tell
from pgt_hf.runs import RunFolder, command, describe_data, recipe, warn_on_failure, write_report
from pgt_hf.trainer import DivergenceCallback, StopOnSigterm, parse_optim_args

SHOWN = ("top1", "top5", "loss", "best_epoch", "bad_images", "seconds")
DEFAULTS: dict[str, Any] = IMAGE_DEFAULTS | {
    "output_dir": "runs/finetune",
    "min_crop": 0.35,
    "color_jitter": 0.0,
    "optim": "powergrad_adamw",
    "weight_decay": 0.05,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "load_best_model_at_end": True,
    "metric_for_best_model": "top1",
}
SMOKE: dict[str, Any] = {  # hflip: a mirrored 2 is no 2
    "dataset_name": DIGITS, "model_name": "resnet10t", "pretrained": False, "image_size": 32, "hflip": 0.0,
    "min_crop": 0.7, "max_train_samples": 320, "max_eval_samples": 101, "learning_rate": 2e-3, "num_train_epochs": 2,
    "logging_steps": 2, "dataloader_num_workers": 0,
}  # fmt: skip


def main() -> None:
    # parse
    stop = StopOnSigterm().listen()
    model_args, data_args, run_args, args, config = parse(
        FinetuningArguments, ImageDataArguments, RunArguments, ImageTrainingArguments,
        description=__doc__, defaults=choose_defaults, smoke=SMOKE, early=("mode",), adjust=check,
    )  # fmt: skip
    resume = begin(args, run_args.resume)

    # build
    with errors_in_one_line():
        require_matplotlib()
        with args.main_process_first(desc="loading data and model"):
            splits = data_args.load(args.seed)
            names = class_names(splits["train"])
            model = build_model(model_args, data_args.image_size, names)
        train, validation, processor = build_data(splits, model, model_args.model_name, data_args, args)
        model = choose_trained(model, model_args)
        metrics = ClassificationMetrics(alpha=args.alpha)
        data = describe_data(data_args.dataset_name, splits)
        title = f"{model_args.model_name}, {model_args.mode}, alpha = {args.alpha}"
        record = RunFolder(args.output_dir, {"arguments": config, "data": data, "seed": args.seed}, title)
        record.check_resume(resume, run_args.allow_changed_data)
        guard = DivergenceCallback()
        trainer = ImageTrainer(
            model,
            args,
            mean=processor and processor.image_mean,
            std=processor and processor.image_std,
            class_weights=class_weights(splits["train"]["label"], len(names)) if model_args.class_weights else None,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collate,
            processing_class=processor,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.preprocess,
            optimizer_cls_and_kwargs=(lambda: create_optimizer, optimizer_options(model_args, args)),
            callbacks=[record, stop, guard],
        )
        if model_args.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(model_args.patience))

    # train
    trainer.train(resume_from_checkpoint=resume)
    stop.leave(trainer)
    guard.leave(trainer)
    if model_args.mode == "lora":
        trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    trainer.use_ema()
    if model_args.fold:
        fold_powergrad(trainer.model, args.alpha)
        metrics.alpha = None  # the model's probabilities are the folded ones
    trainer.save_model()
    metrics.keep_logits = True
    results = trainer.predict(validation, metric_key_prefix="eval").metrics  # of the model that is saved
    bad_images = trainer.bad_images()

    # report
    if trainer.is_world_process_zero():
        evaluation = None
        key = "eval_top1" if args.ema_decay is None else "eval_ema_top1"
        top1 = {entry["epoch"]: entry[key] for entry in trainer.state.log_history if key in entry}
        more = {"model": model_args.model_name, "weights": model_args.weights, "mode": model_args.mode}
        more |= {"train_images": data["train"]["images"], "eval_images": data["validation"]["images"]}
        more |= {"best_epoch": max(top1, key=top1.__getitem__, default=None), "folded": model_args.fold}
        more |= {"last_epoch_top1": list(top1.values())[-1] if top1 else None, "bad_images": bad_images}
        summary = record.finish(trainer, results, **more)
        with warn_on_failure("the report"):
            evaluation = Evaluation.from_logits(*metrics.kept, names, validation, alpha=metrics.alpha)
            folder = Path(args.output_dir)
            summary = record.finish(trainer, results, evaluation, **more)
            plot_confusion(evaluation.confusion, names, folder / "confusion_matrix.png", title)
            plot_mistakes(evaluation, splits["validation"], folder / "mistakes.png", title)
            write_report(folder)
        say(summary, args, evaluation)
    trainer.end()


def choose_defaults(early: Namespace) -> dict[str, Any]:
    return DEFAULTS | {"learning_rate": MODES.get(early.mode or FinetuningArguments.mode)}


def check(settings: Namespace, given: set[str]) -> None:
    if settings.ema_decay is not None and "metric_for_best_model" not in given:
        settings.metric_for_best_model = "ema_top1"
    if not settings.optim.startswith("powergrad_"):
        raise ValueError(f"optim must begin with 'powergrad_', as powergrad_adamw, got {settings.optim!r}")
    if settings.mode == "lora" and settings.ema_decay is not None:
        raise ValueError(f"ema_decay must be left out with --mode lora, got {settings.ema_decay}")
    if settings.fold and settings.alpha == 0:
        raise ValueError("fold must be left out with --alpha 0, where every probability would be 1/C, got true")
    if not settings.pretrained and not timm.is_model(settings.model_name):
        raise ValueError(f"model_name must be a timm model with --pretrained false, got {settings.model_name!r}")
    if "layer_decay" in (settings.optim_args or ""):  # the layers are grouped here
        raise ValueError(f"optim_args must leave layer_decay to --layer-decay, got {settings.optim_args!r}")


def build_model(model_args: FinetuningArguments, image_size: int | None, names: list[str]) -> Any:
    if not model_args.pretrained:
        return create_model(model_args.model_name, names, image_size=image_size or 224)
    model = replace_head(load_classifier(model_args.model_name, model_args.weights), names)
    return model if image_size is None else set_image_size(model, image_size)


def build_data(
    splits: Any, model: Any, model_name: str, data_args: ImageDataArguments, args: Any
) -> tuple[ImageDataset, ImageDataset, Any]:
    """Training and evaluation images; and the image processor, to be saved with a model that is not timm's."""
    config = getattr(model.config, "pretrained_cfg", None)
    on_device = args.device.type == "cuda"
    if config is not None:
        return *data_args.datasets(splits, config, args.seed, on_device=on_device), None
    evaluate = preprocessing(model, model_name)
    processor = evaluate.processor
    size = dict(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)
    side = size.get("height") or size["shortest_edge"]
    config = {"input_size": (3, side, side), "mean": processor.image_mean, "std": processor.image_std}
    train, _ = data_args.datasets(splits, config, args.seed, on_device=on_device)
    return train, data_args.evaluation(splits, evaluate), processor


def choose_trained(model: Any, model_args: FinetuningArguments) -> Any:
    if model_args.mode == "lora":
        return add_lora(model, model_args.lora_rank, scale=model_args.lora_scale, dropout=model_args.lora_dropout)
    return freeze_backbone(model) if model_args.mode == "linear" else model


def optimizer_options(model_args: FinetuningArguments, args: ImageTrainingArguments) -> dict[str, Any]:
    name = str(getattr(args.optim, "value", args.optim))
    groups = partial(
        parameter_groups,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        layer_decay=model_args.layer_decay if model_args.mode == "layer-decay" else None,
        head_lr_scale=model_args.head_lr_scale,
    )
    options = args.powergrad_options() | parse_optim_args(name, args.optim_args)
    return options | {"opt": name, "lr": args.learning_rate, "param_group_fn": groups}


def say(summary: dict[str, Any], args: ImageTrainingArguments, evaluation: Evaluation | None) -> None:
    then = {
        "predict": command("pgt-hf", "predict", args.output_dir, "IMAGE"),
        "evaluate": command("python", recipe("evaluate_images.py"), args.output_dir),
    }
    files = {"confusion_matrix.png": "which class was taken for which", "mistakes.png": "the worst mistakes"}
    heading = f"{summary['model']} ({summary['mode']}) on {summary['dataset']}, {summary['eval_images']:,} images"
    results = {key: summary.get(key) for key in SHOWN}
    table = evaluation and calibration_table(evaluation.calibration)
    tell(heading, results, args.output_dir, then | next_commands(args), files, table)
    print("\nThe best epoch was chosen on these validation images: a new set's accuracy will be a little lower.")


if __name__ == "__main__":
    main()
