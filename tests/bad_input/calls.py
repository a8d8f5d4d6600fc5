"""Wrong calls of the public API: every function, each argument with the wrong values of its kind.

A row is a call that is right, and the kind of each argument to spoil. What is right is called too, in several types
(numpy's numbers, integers for floats), and must be taken.
"""

import tempfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import Call
from torch import nn

import pgt_hf
from pgt_hf import analysis, hub, images, runs, text, trainer

NAN, INF = float("nan"), float("inf")
NOT_NUMBERS = ["0.5", True, [0.5], {}, 1j, torch.tensor([0.5, 0.5]), np.array([0.5, 0.5]), object]
# By kind: values of the wrong type, and of the right type but out of range.
WRONG: dict[str, list[Any]] = {
    "data": [None, 5, ["a"], {}, 0.5],
    "alpha": [
        *NOT_NUMBERS, None, NAN, INF, -0.1, torch.tensor(NAN), torch.tensor(-1.0), torch.tensor(True), torch.tensor(1j)
    ],
    "share": [*NOT_NUMBERS, NAN, -0.1, 1.5, INF],
    "fraction": [*NOT_NUMBERS, NAN, -0.1, 1, INF],
    "positive": [*NOT_NUMBERS, NAN, 0, -1, INF],
    "nonnegative": [*NOT_NUMBERS, NAN, -1, INF],
    "count": ["3", True, [3], {}, 1j, 2.5, NAN, 0, -1],
    "many": ["3", True, [3], {}, 2.5, NAN, 0, -1],
    "at_least_2": ["3", True, [3], 2.5, NAN, 0, 1, -1],
    "vocabulary": ["300", True, [300], 2.5, NAN, 258, 0, -1],
    "index": ["3", True, [3], {}, 2.5, -1],
    "integer": ["3", True, [3], {}, 2.5, None],
    "seed": ["3", True, [3], 2.5, -1, 2**32],
    "flag": ["yes", 2, [], 0.5],
    "tensor": [None, "z", [1.0], 5, np.zeros(3), object()],
    "tensor_or_none": ["z", [1.0], 5, np.zeros(3), object()],
    "module": [None, "resnet18", 5, [], nn.Linear, torch.zeros(2)],
    "name": ["nope!", "", 5, ["sgd"], None],
    "name_or_none": ["nope!", "", 5, ["sgd"]],
    "column": [5, ["label"], {}],
    "path": [None, 5, ["a"], {}, 0.5],
    "path_or_none": [5, ["a"], {}, 0.5],
    "names": [None, 5, "ab", [], ["a"], ["a", "a"], [1, 2]],
    "mapping": [None, 5, "ab", [1]],
    "counts": [None, 5, "ab", [0], [1.5], ["a"]],
    "scores": [None, 5, "ab", [], ["a"], [NAN, 1.0], [True, 0.5]],
    "pair_or_none": [0.5, "ab", ("a", "b"), (0.1,), (NAN, 1.0), (0.5, 0.1), (-1.0, 0.5)],
    "pair": [None, 0.5, "ab", ("a", "b"), (0.1,), (NAN, 1.0), (0.5, 0.1), (-1.0, 0.5)],
    "function": [5, "top1", [len]],
    "callbacks": [5, "early", trainer.DivergenceCallback],
    "optimizers": [5, torch.optim.SGD, (None,), [None, None, None]],
    "no_examples": [[]],
    "shape": ["cosin", "", 5, None, ["step"]],
}  # fmt: skip
# Values that are right although their types are unusual.
FINE: dict[str, list[Any]] = {
    "data": [Path("digits")],
    "alpha": [1, np.float32(0.5), np.float64(0.5), np.int64(1), np.array(0.5), Decimal("0.5"), torch.tensor(0.5)],
    "share": [0, 1, np.float32(0.5), np.int64(1)],
    "fraction": [0, np.float32(0.5)],
    "positive": [1, np.float32(0.5)],
    "nonnegative": [0, np.float32(0.5)],
    "count": [np.int64(3), np.uint8(3)],
    "at_least_2": [np.int64(3)],
    "seed": [np.int64(3), 0],
}


def calls() -> list[Call]:
    """Every right call, and every wrong one."""
    found: list[Call] = []
    for name, function, arguments, kinds in (*_rows(), *_more_rows()):
        found.append(Call(name, function, arguments, fine=True))
        for argument, kind in kinds.items():
            found += [Call(name, function, arguments, argument, value) for value in WRONG[kind]]
            found += [Call(name, function, arguments, argument, value, fine=True) for value in FINE.get(kind, ())]
    for name, function, arguments, wrong in _special():
        found += [Call(name, function, arguments, argument, value) for argument, value in wrong]
    return found


def logits(n: int = 12, c: int = 3) -> torch.Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(0))


def labels(n: int = 12, c: int = 3) -> torch.Tensor:
    return torch.arange(n) % c


def one_hot() -> torch.Tensor:
    return nn.functional.one_hot(labels(), 3).float()


def network() -> Any:
    return images.create_model("resnet10t", ["a", "b", "c"], image_size=32)


@cache
def digits() -> Any:
    return images.load_image_dataset("digits", max_train_samples=64, max_eval_samples=20)


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="bad-input-"), "run")
    images.create_model("resnet10t", [str(i) for i in range(10)], image_size=32).save_pretrained(path)
    return path


def transform(**options: Any) -> images.ImageTransform:
    return images.ImageTransform({"input_size": (3, 32, 32)}, **{"training": True} | options)


def config(**wrong: Any) -> images.ImageTransform:
    """Of a transform; numpy's arrays are taken, as ``mean`` here."""
    wrong = {"mean": np.full(3, 0.5)} | wrong
    return images.ImageTransform({"input_size": (3, 32, 32)} | wrong, training=False)


def training(**options: Any) -> Any:
    return pgt_hf.ImageTrainingArguments(
        **{"output_dir": "out", "report_to": "none", "use_cpu": True, "optim": "powergrad_sgd"} | options
    )


def sgd(**options: Any) -> Any:
    return pgt_hf.create_optimizer(**{"model": nn.Linear(4, 3), "opt": "powergrad_sgd", "lr": 0.1} | options)


def scheduler(**options: Any) -> Any:
    return pgt_hf.AlphaScheduler(**{"optimizer": sgd(), "total_steps": 10} | options)


def attached_loss(weight: Any) -> Any:
    return pgt_hf.PowerGradCrossEntropyLoss(0.5, weight=weight)


Row = tuple[str, Callable[..., Any], Callable[[], dict[str, Any]], dict[str, str]]


def _rows() -> Iterator[Row]:
    z, y = logits, labels
    losses = {"weight": "tensor_or_none", "label_smoothing": "share", "reduction": "name", "alpha": "alpha"}
    yield "powergrad_log_softmax", pgt_hf.powergrad_log_softmax, lambda: {"input": z(), "alpha": 0.5}, {
        "input": "tensor", "dim": "integer", "alpha": "alpha",
    }  # fmt: skip
    yield "powergrad_cross_entropy", pgt_hf.powergrad_cross_entropy, lambda: {
        "input": z(), "target": y(), "alpha": 0.5,
    }, {"input": "tensor", "target": "tensor", **losses}  # fmt: skip
    if hasattr(nn.functional, "linear_cross_entropy"):
        yield "powergrad_linear_cross_entropy", pgt_hf.powergrad_linear_cross_entropy, lambda: {
            "input": torch.randn(12, 4), "linear_weight": torch.randn(3, 4), "target": y(), "alpha": 0.5,
        }, {"input": "tensor", "linear_weight": "tensor", "target": "tensor", "alpha": "alpha"}  # fmt: skip
    yield "PowerGradCrossEntropyLoss", pgt_hf.PowerGradCrossEntropyLoss, lambda: {"alpha": 0.5}, {
        **losses, "ignore_index": "integer",
    }  # fmt: skip
    yield "attach_powergrad", pgt_hf.attach_powergrad, lambda: {"model": nn.Linear(4, 3), "alpha": 0.5}, {
        "model": "module", "alpha": "alpha", "head": "name_or_none",
    }  # fmt: skip
    yield "fold_powergrad", pgt_hf.fold_powergrad, lambda: {"model": nn.Linear(4, 3), "alpha": 0.5}, {
        "model": "module", "alpha": "alpha",
    }  # fmt: skip
    yield "create_optimizer", sgd, dict, {
        "model": "module", "opt": "name", "lr": "nonnegative", "alpha": "alpha", "clip_mode": "name_or_none",
        "head": "name_or_none", "momentum": "fraction", "weight_decay": "nonnegative", "nesterov": "flag",
        "layer_decay": "positive",
    }  # fmt: skip
    yield (
        "create_optimizer, clipped",
        sgd,
        lambda: {"clip_mode": "norm", "clip_value": 1.0},
        {"clip_value": "positive"},
    )
    yield "bind_powergrad", pgt_hf.bind_powergrad, lambda: _plain(), {"model": "module", "alpha": "alpha"}
    yield "list_optimizers", pgt_hf.list_optimizers, dict, {"filter": "column"}
    yield "AlphaScheduler", scheduler, dict, {
        "total_steps": "count", "shape": "shape", "end_alpha": "alpha", "warmup_steps": "index",
    }  # fmt: skip
    yield "AlphaScheduleCallback", pgt_hf.AlphaScheduleCallback, dict, {
        "shape": "shape", "end_alpha": "alpha", "warmup_steps": "nonnegative",
    }  # fmt: skip
    yield "powergrad_hp_space", pgt_hf.powergrad_hp_space, lambda: {"learning_rate": (0.01, 1.0)}, {
        "learning_rate": "pair", "alpha": "pair",
    }  # fmt: skip
    yield "ImageTrainingArguments", training, dict, {
        "alpha": "share", "clip_mode": "name_or_none", "powergrad_head": "column", "hub_timeout": "positive",
        "hub_fold": "flag", "learning_rate": "nonnegative", "weight_decay": "nonnegative",
        "num_train_epochs": "positive",
        "per_device_train_batch_size": "count", "per_device_eval_batch_size": "count", "warmup_steps": "nonnegative",
        "gradient_accumulation_steps": "count", "max_grad_norm": "nonnegative", "label_smoothing_factor": "share",
        "seed": "seed", "dataloader_num_workers": "index", "optim": "name", "schedule": "name_or_none",
        "warmup_epochs": "nonnegative", "warmup_lr": "share", "decay_rate": "share",
        "mixup": "nonnegative", "cutmix": "nonnegative", "random_erasing": "share", "ema_decay": "fraction",
        "channels_last": "flag", "save_total_limit": "count", "logging_steps": "positive",
    }  # fmt: skip
    yield "ImageTrainingArguments, Adam", training, lambda: {"optim": "powergrad_adamw"}, {
        "adam_beta1": "fraction", "adam_beta2": "fraction",
    }  # fmt: skip
    yield "ImageSourceArguments", images.ImageSourceArguments, dict, {"on_bad_image": "name"}
    yield "ImageDataArguments", images.ImageDataArguments, dict, {
        "max_train_samples": "count", "max_eval_samples": "count", "image_size": "count", "hflip": "share",
        "min_crop": "positive", "color_jitter": "nonnegative", "on_bad_image": "name", "auto_augment": "name_or_none",
    }  # fmt: skip
    yield "FinetuningArguments", images.FinetuningArguments, dict, {
        "mode": "name", "layer_decay": "positive", "head_lr_scale": "positive", "lora_rank": "count",
        "lora_scale": "positive", "class_weights": "name_or_none", "patience": "count", "fold": "flag",
    }  # fmt: skip
    yield "DiagnosticsCallback", trainer.DiagnosticsCallback, dict, {"interval": "count"}
    yield "DivergenceCallback", trainer.DivergenceCallback, dict, {"max_skipped": "count"}
    yield "create_model", images.create_model, lambda: {"name": "resnet10t", "label_names": ["a", "b"]}, {
        "name": "name", "label_names": "names", "image_size": "count", "norm_free": "flag", "small_images": "flag",
    }  # fmt: skip
    yield (
        "load_classifier",
        images.load_classifier,
        lambda: {"name": folder()},
        {"name": "path", "weights": "path_or_none"},
    )
    yield "match_labels", images.match_labels, lambda: {"dataset_names": ["a"], "model_names": ["a", "b"]}, {
        "dataset_names": "mapping", "model_names": "mapping",
    }  # fmt: skip
    yield "ImageTransform", transform, dict, {
        "training": "flag", "normalize": "flag", "hflip": "share", "color_jitter": "nonnegative",
        "auto_augment": "name_or_none", "interpolation": "name", "scale": "pair_or_none",
    }  # fmt: skip
    yield "load_image_dataset", images.load_image_dataset, lambda: {"name": "digits"}, {
        "name": "data", "image_column": "column", "label_column": "column", "max_train_samples": "count",
        "max_eval_samples": "count", "seed": "seed", "streaming": "flag",
    }  # fmt: skip
    yield "ImageDataset", images.ImageDataset, lambda: {"split": digits()["train"], "transform": transform()}, {
        "split": "mapping", "transform": "mapping", "seed": "seed", "on_bad_image": "name",
    }  # fmt: skip
    yield "set_epoch", images.ImageDataset(digits()["train"], transform()).set_epoch, lambda: {"epoch": 1}, {
        "epoch": "index",
    }  # fmt: skip
    yield "ImageStream", _stream, dict, {
        "batch_size": "count", "num_samples": "many", "rank": "index", "world_size": "count", "seed": "seed",
        "block_size": "count", "on_bad_image": "name",
    }  # fmt: skip
    yield "replace_head", images.replace_head, lambda: {"model": network(), "label_names": ["x", "y"]}, {
        "model": "module", "label_names": "names",
    }  # fmt: skip
    yield "set_image_size", images.set_image_size, lambda: {"model": network(), "side": 64}, {
        "model": "module", "side": "count",
    }  # fmt: skip
    yield "freeze_backbone", images.freeze_backbone, lambda: {"model": network()}, {"model": "module"}
    yield "parameter_groups", images.parameter_groups, lambda: {"model": network(), "lr": 0.1}, {
        "model": "module", "lr": "positive", "weight_decay": "nonnegative", "layer_decay": "positive",
        "head_lr_scale": "positive",
    }  # fmt: skip
    yield "add_lora", images.add_lora, lambda: {"model": network()}, {
        "model": "module", "rank": "count", "scale": "positive", "dropout": "fraction",
    }  # fmt: skip
    yield "class_weights", images.class_weights, lambda: {"labels": [0, 1, 1], "classes": 2}, {"classes": "count"}
    yield "Corrupted", images.Corrupted, lambda: {"transform": config(), "kind": "contrast", "level": 3}, {
        "transform": "mapping", "kind": "name", "level": "count",
    }  # fmt: skip
    yield "shrink", images.shrink, lambda: {"image": _png(), "shorter_side": 4, "quality": 90}, {
        "shorter_side": "count", "quality": "count",
    }  # fmt: skip
    yield "top_k_accuracy", analysis.top_k_accuracy, lambda: {"ranked": [[2, 0]], "labels": [2]}, {"k": "counts"}
    yield "reliability", analysis.reliability, lambda: {"confidence": [0.9, 0.8], "hits": [1, 0]}, {"bins": "count"}
    yield "score_logits", analysis.score_logits, lambda: {"logits": z(), "labels": y()}, {
        "logits": "tensor", "labels": "tensor",
    }  # fmt: skip
    yield "ClassificationMetrics", analysis.ClassificationMetrics, dict, {"top_k": "count", "bins": "count"}
    yield "compare_calibration", analysis.compare_calibration, lambda: {"logits": z(), "labels": y(), "alpha": 0.5}, {
        "logits": "tensor", "labels": "tensor", "bins": "count", "seed": "seed",
    }  # fmt: skip
    yield "confusion_matrix", analysis.confusion_matrix, lambda: {
        "labels": [0, 1], "predicted": [0, 1], "classes": 2,
    }, {"classes": "count"}  # fmt: skip
    yield "interval", analysis.interval, lambda: {"values": [0.1, 0.2]}, {"values": "scores"}
    yield "compare", analysis.compare, lambda: {"method": [0.1, 0.2], "baseline": [0.1, 0.3]}, {
        "method": "scores", "baseline": "scores",
    }  # fmt: skip
    yield "logit_statistics", analysis.logit_statistics, lambda: {"logits": z()}, {"logits": "tensor"}
    yield "filter_norms", analysis.filter_norms, lambda: {"model": nn.Linear(2, 2)}, {"model": "module"}
    yield "gradient_norms", analysis.gradient_norms, lambda: {"model": nn.Linear(2, 2)}, {"model": "module"}
    yield "normalized_layers", analysis.normalized_layers, lambda: {"model": nn.Linear(2, 2)}, {"model": "module"}
    yield "gradient_cosine", analysis.gradient_cosine, lambda: {"logits": z(), "target": one_hot(), "alpha": 0.5}, {
        "logits": "tensor", "target": "tensor", "alpha": "nonnegative",
    }  # fmt: skip
    yield "log_power_sum", analysis.log_power_sum, lambda: {"logits": z(), "alpha": 0.5}, {
        "logits": "tensor", "alpha": "nonnegative",
    }  # fmt: skip
    yield (
        "lemma_threshold",
        analysis.lemma_threshold,
        lambda: {"power_sum": 4.0, "alpha": 0.5},
        {"alpha": "nonnegative"},
    )
    yield "History", analysis.History, dict, {"capacity": "at_least_2"}
    yield "load_labelled_text", text.load_labelled_text, lambda: {"name": "docstrings", "max_train_samples": 40}, {
        "name": "path", "text_column": "column", "label_column": "column", "max_train_samples": "count",
        "max_eval_samples": "count", "seed": "seed",
    }  # fmt: skip
    yield "read_run", runs.read_run, lambda: {"folder": folder()}, {"folder": "path", "checkpoint": "path_or_none"}
    yield "draw_runs", runs.draw_runs, lambda: {"folders": [_history()]}, {"folders": "mapping"}
    yield "predict_images", runs.predict_images, lambda: {"folder": folder(), "paths": [_png_file()]}, {
        "folder": "path", "top": "count",
    }  # fmt: skip
    yield "prepare_release", hub.prepare_release, lambda: {
        "folder": folder(), "target": folder().with_name("release"), "repo_id": "a/b",
    }, {"folder": "path", "target": "path", "repo_id": "name", "license": "name_or_none", "fold": "flag"}  # fmt: skip


def _more_rows() -> Iterator[Row]:
    """Of what a finished run, a report or the Hub needs."""
    z, y = logits, labels
    yield "best_calibrated", analysis.best_calibrated, lambda: {"found": _calibration()}, {"found": "mapping"}
    yield "calibration_table", analysis.calibration_table, lambda: {"found": _calibration()}, {"found": "mapping"}
    yield "verdict", analysis.verdict, lambda: {
        "confirmed": {side: analysis.Point(0.5, 0.1, (0.9, 0.8)) for side in ("pgt", "baseline")},
        "rates": (0.01, 1.0), "labels": [0, 1] * 20,
    }, {"confirmed": "mapping", "rates": "pair"}  # fmt: skip
    yield "ranked_classes", analysis.ranked_classes, lambda: {"logits": z()}, {"logits": "tensor", "k": "count"}
    yield "probability_scores", analysis.probability_scores, lambda: {
        "scores": [[-0.1, 0.9, 0.8]], "hits": [1],
    }, {"bins": "count"}  # fmt: skip
    yield "worst_mistakes", analysis.worst_mistakes, lambda: {
        "labels": [0, 1], "predicted": [1, 1], "confidence": [0.6, 0.9], "most": 2,
    }, {"most": "index"}  # fmt: skip
    yield "zeroed_filters", analysis.zeroed_filters, lambda: {"norms": [torch.ones(3)]}, {"threshold": "nonnegative"}
    yield "turned_angle", analysis.turned_angle, lambda: {"before": torch.ones(3), "after": torch.ones(3)}, {
        "before": "tensor", "after": "tensor",
    }  # fmt: skip
    yield "recover_target", analysis.recover_target, lambda: {"logits": z(), "grad": z(), "alpha": 0.5}, {
        "logits": "tensor", "grad": "tensor", "alpha": "nonnegative", "label_smoothing": "share",
    }  # fmt: skip
    yield "probability_histograms", analysis.probability_histograms, lambda: {
        "logits": z(), "target": one_hot(), "alpha": 0.5,
    }, {"logits": "tensor", "target": "tensor", "alpha": "nonnegative"}  # fmt: skip
    yield "normalization_statistics", analysis.normalization_statistics, lambda: _plain(), {
        "model": "module", "optimizer": "module",
    }  # fmt: skip
    yield "Evaluation.from_logits", analysis.Evaluation.from_logits, lambda: {
        "logits": z(), "labels": y(), "names": ["a", "b", "c"],
    }, {"logits": "tensor", "labels": "tensor", "names": "mapping", "mistakes": "index"}  # fmt: skip
    yield "examine", analysis.examine, lambda: {"model": _digit_network(), "dataset": _validation()}, {
        "model": "module", "dataset": "mapping", "alpha": "nonnegative", "mistakes": "index", "max_images": "count",
        "batch_size": "count",
    }  # fmt: skip
    yield "plot_confusion", analysis.plot_confusion, lambda: {
        "counts": [[1, 0], [0, 1]], "names": ["a", "b"], "path": folder().with_name("c.png"),
    }, {"names": "mapping", "path": "path"}  # fmt: skip
    yield "plot_training_curve", analysis.plot_training_curve, lambda: {
        "history": [{"epoch": 1, "loss": 1.0}], "path": folder().with_name("t.png"),
    }, {"history": "mapping", "path": "path"}  # fmt: skip
    yield "plot_reliability", analysis.plot_reliability, lambda: {
        "diagrams": {"raw": analysis.reliability([0.9], [1])}, "path": folder().with_name("r.png"),
    }, {"diagrams": "mapping", "path": "path", "columns": "count"}  # fmt: skip
    yield "plot_images", analysis.plot_images, lambda: {
        "images": [np.zeros((4, 4))], "captions": ["a"], "path": folder().with_name("i.png"),
    }, {"images": "mapping", "captions": "mapping", "path": "path"}  # fmt: skip
    yield "History.add", analysis.History().add, lambda: {"step": 1, "values": {}}, {
        "step": "integer", "values": "mapping",
    }  # fmt: skip
    yield "History.read", analysis.History.read, lambda: {"path": _snapshots()}, {"path": "path"}
    yield "normalize", images.normalize, lambda: {
        "images": torch.zeros(1, 3, 2, 2), "mean": (0.5,) * 3, "std": (0.5,) * 3,
    }, {"images": "tensor", "mean": "mapping", "std": "mapping"}  # fmt: skip
    yield "collate", images.collate, lambda: {"examples": [{"pixel_values": torch.zeros(3, 2, 2), "labels": 1}]}, {
        "examples": "mapping",
    }  # fmt: skip
    yield "read_upright", images.read_upright, lambda: {"image": _png()}, {"shorter_side": "count"}
    yield "load_weights", images.load_weights, lambda: _weights(), {"model": "module", "path": "path"}
    yield "preprocessing", images.preprocessing, lambda: {"model": network(), "name": folder()}, {
        "model": "module", "image_size": "count",
    }  # fmt: skip
    yield "load_plain_text", text.load_plain_text, lambda: {"name": "stdlib"}, {
        "name": "path", "text_column": "column", "seed": "seed",
    }  # fmt: skip
    yield "train_tokenizer", text.train_tokenizer, lambda: {"texts": ["a b"], "vocab_size": 300}, {
        "vocab_size": "vocabulary", "texts": "mapping",
    }  # fmt: skip
    for name in ("read_record", "read_history", "read_evaluation", "model_folder"):
        yield name, getattr(runs, name), lambda: {"folder": folder()}, {"folder": "path"}
    yield "run_folder", runs.run_folder, lambda: {"model": folder()}, {"model": "path"}
    yield "add_to_record", runs.add_to_record, lambda: {"folder": folder(), "content": {}}, {
        "folder": "path", "content": "mapping",
    }  # fmt: skip
    yield "write_evaluation", runs.write_evaluation, lambda: {
        "folder": _history(), "evaluation": _evaluation(),
    }, {"folder": "path", "evaluation": "mapping"}  # fmt: skip
    yield "write_report", runs.write_report, lambda: {"folder": folder()}, {
        "folder": "path", "target": "path_or_none", "pictures": "flag",
    }  # fmt: skip
    yield "report_run", runs.report_run, lambda: {"folder": folder(), "dataset_name": "digits", "max_images": 8}, {
        "folder": "path", "mistakes": "index", "max_images": "count",
    }  # fmt: skip
    yield "load_validation", runs.load_validation, lambda: {"model": folder(), "dataset_name": "digits"}, {
        "model": "path", "max_eval_samples": "count", "seed": "seed", "image_column": "column",
    }  # fmt: skip
    yield "PublishCallback", hub.PublishCallback, dict, {
        "repo_id": "name_or_none", "strategy": "name", "timeout": "positive", "fold": "flag", "always": "flag",
    }  # fmt: skip
    yield "latest_checkpoint", trainer.latest_checkpoint, lambda: {"folder": folder()}, {"folder": "path"}
    yield "get_alpha", scheduler().get_alpha, lambda: {"step": 3}, {"step": "integer"}
    yield "handle.alpha", _set_alpha, lambda: {"alpha": 0.5}, {"alpha": "alpha"}
    yield "param group", _set_group, lambda: {"alpha": 0.5}, {"alpha": "alpha"}
    yield "PowerGradTrainer", _trainer, dict, {
        "model": "module", "args": "path_or_none", "data_collator": "function", "compute_metrics": "function",
        "preprocess_logits_for_metrics": "function", "callbacks": "callbacks", "optimizers": "optimizers",
        "train_dataset": "no_examples",
    }  # fmt: skip
    yield "ImageTrainer", _image_trainer, dict, {
        "model": "module", "args": "path", "class_weights": "tensor_or_none",
    }  # fmt: skip


def _special() -> Iterator[tuple[str, Callable[..., Any], Callable[[], dict[str, Any]], list[tuple[str, Any]]]]:
    """What is wrong in its own way."""
    yield "powergrad_cross_entropy", pgt_hf.powergrad_cross_entropy, lambda: {
        "input": logits(), "target": labels(), "alpha": 0.5,
    }, [
        ("input", torch.ones(12, 3, dtype=torch.int64)), ("input", torch.tensor(1.0)), ("target", labels(5)),
        ("target", labels().int()), ("target", torch.rand(12, 4)), ("weight", torch.ones(4)),
        ("weight", torch.ones(3, dtype=torch.bool)), ("label_smoothing", None),
    ]  # fmt: skip
    yield "PowerGradCrossEntropyLoss", attached_loss, dict, [
        ("weight", torch.tensor([1.0, NAN])), ("weight", torch.tensor([1.0, -1.0])), ("weight", torch.ones(2, 2)),
    ]  # fmt: skip
    yield "create_optimizer", sgd, dict, [
        ("clip_value", 1.0), ("clip_mode", "norm"), ("model", nn.ReLU()), ("momentum", 5), ("betas", (0.9, 2)),
        ("lr", torch.tensor([0.1])), ("opt", "sgd"), ("opt", "powergrad_sdg"),
    ]  # fmt: skip
    yield (
        "bind_powergrad",
        pgt_hf.bind_powergrad,
        lambda: _plain(),
        [("optimizer", _plain()["optimizer"]), ("optimizer", 5)],
    )
    yield "AlphaScheduler", scheduler, dict, [
        ("optimizer", torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)), ("optimizer", None), ("warmup_steps", 11),
        ("last_epoch", -9),
    ]  # fmt: skip
    yield "fold_powergrad", pgt_hf.fold_powergrad, lambda: {"model": nn.Linear(4, 3), "alpha": 0.5}, [
        ("alpha", 0), ("model", _folded()), ("model", nn.ReLU()),
    ]  # fmt: skip
    yield "fold_powergrad", pgt_hf.fold_powergrad, lambda: {"model": _alpha_in_config()}, [("alpha", 0.5)]
    yield "ImageTransform", config, dict, [
        ("crop_pct", 0.0), ("crop_pct", 5), ("mean", (0.5,)), ("std", (0.5,)), ("interpolation", "cubicc"),
        ("input_size", (32, 32)), ("input_size", (1, 32, 32)), ("std", (0.0, 1.0, 1.0)), ("mean", (NAN, 0.0, 0.0)),
    ]  # fmt: skip
    yield "create_model", images.create_model, lambda: {
        "name": "vit_tiny_patch16_224", "label_names": ["a", "b"],
    }, [("image_size", 33), ("name", "resnet18.fake_tag")]  # fmt: skip
    yield "class_weights", images.class_weights, lambda: {"labels": [0, 1], "classes": 2}, [
        ("labels", [0.5, 1.0]), ("labels", [[0], [1]]), ("labels", ["a"]), ("labels", [True, False]), ("labels", [2]),
        ("labels", []),
    ]  # fmt: skip
    yield "reliability", analysis.reliability, lambda: {"confidence": [0.9], "hits": [1]}, [
        ("confidence", [NAN]), ("confidence", [2.0]), ("confidence", []), ("hits", [1, 0]),
    ]  # fmt: skip
    yield "score_logits", analysis.score_logits, lambda: {"logits": logits(), "labels": labels()}, [
        ("labels", labels().float()), ("labels", labels(5)), ("logits", logits()[0]), ("labels", labels() + 9),
    ]  # fmt: skip
    yield "compare_calibration", analysis.compare_calibration, lambda: {"logits": logits(), "labels": labels()}, [
        ("logits", logits()[0]), ("logits", logits() * NAN), ("labels", labels() * 0 - 100),
    ]  # fmt: skip
    yield "confusion_matrix", analysis.confusion_matrix, lambda: {"labels": [0], "predicted": [0], "classes": 2}, [
        ("labels", [0.5]), ("labels", [5]), ("predicted", [5]), ("predicted", ["a"]),
    ]  # fmt: skip
    yield "ImageDataset", images.ImageDataset, lambda: {"split": digits()["train"], "transform": transform()}, [
        ("split", transform()),
    ]  # fmt: skip
    yield "replace_head", images.replace_head, lambda: {"model": network(), "label_names": ["x", "y"]}, [
        ("model", nn.Linear(2, 2)),
    ]  # fmt: skip
    yield (
        "freeze_backbone",
        images.freeze_backbone,
        lambda: {"model": network()},
        [("model", nn.Sequential(nn.ReLU()))],
    )
    yield "steps", lambda milestones: pgt_hf.schedules.steps(*milestones), dict, [
        ("milestones", [None]), ("milestones", [0.5, 0.2]), ("milestones", ["a"]), ("milestones", [NAN]),
        ("milestones", [2.0]), ("milestones", []),
    ]  # fmt: skip
    yield "prepare_release", hub.prepare_release, lambda: {
        "folder": folder(), "target": folder().with_name("release"), "repo_id": "a/b",
    }, [("target", folder()), ("repo_id", "a/b/c"), ("repo_id", "../x"), ("license", "not-a-licence")]  # fmt: skip
    yield "ImageTrainingArguments", training, dict, [
        ("decay_epochs", []), ("decay_epochs", [-1]), ("decay_epochs", 5), ("decay_epochs", "30"),
        ("optim_args", "lr=5"),
        ("lr_scheduler_type", "cosin"), ("clip_value", 1.0), ("clip_mode", "norm"), ("fp16", True), ("max_steps", 0),
        ("optim_args", "momentum"), ("decay_epochs", [60, 30]), ("optim_args", {"momentum": 0.9}), ("report_to", 5),
        ("metric_for_best_model", 5), ("output_dir", "a\0b"),
    ]  # fmt: skip
    yield "ImageTrainer", _image_trainer, dict, [
        ("mean", 0.5), ("mean", (0.5,)), ("std", (0.0,) * 3), ("class_weights", torch.tensor([1.0, NAN, 1.0])),
    ]  # fmt: skip
    yield "create_optimizer", sgd, lambda: {"opt": "powergrad_adamw"}, [("betas", (0.9,)), ("momentum", 0.9)]
    yield "collate", images.collate, lambda: {"examples": []}, [("examples", [])]


def _plain() -> dict[str, Any]:
    model = nn.Linear(4, 3)
    return {"optimizer": torch.optim.SGD(model.parameters(), 0.1), "model": model}


def _folded() -> Any:
    return pgt_hf.fold_powergrad(_alpha_in_config(0.5), 0.5)


def _alpha_in_config(alpha: float = 0.25) -> Any:
    model = network()
    model.config.powergrad_alpha, model.config.powergrad_folded = alpha, False
    return model


def _stream(**options: Any) -> Any:
    split = images.load_image_dataset("digits", max_train_samples=64, streaming=True)["train"]
    return images.ImageStream(split, transform(), **{"batch_size": 4, "num_samples": 64} | options)


@cache
def _png_file() -> Path:
    from PIL import Image

    path = folder().with_name("one.png")
    Image.new("RGB", (16, 16), "red").save(path)
    return path


def _png() -> bytes:
    return _png_file().read_bytes()


@cache
def _history() -> Path:
    path = folder().with_name("history")
    path.mkdir()
    (path / "history.jsonl").write_text(
        '{"epoch": 1, "step": 1, "loss": 1.0}\n{"epoch": 2, "step": 2, "loss": 0.5}\n', encoding="utf-8"
    )
    return path


def _calibration() -> Any:
    return analysis.compare_calibration(logits(), labels(), 0.5)


def _evaluation() -> Any:
    return analysis.Evaluation.from_logits(logits(), labels(), ["a", "b", "c"])


@cache
def _validation() -> Any:
    split = images.load_image_dataset("digits", max_eval_samples=8)["validation"]
    return images.ImageDataset(split, config())


def _digit_network() -> Any:
    return images.create_model("resnet10t", [str(i) for i in range(10)], image_size=32)


@cache
def _snapshots() -> Path:
    history = analysis.History()
    history.add(0, {"alpha": 0.5})
    history.save(path := folder().with_name("diagnostics.npz"))
    return path


def _weights() -> dict[str, Any]:
    model = nn.Linear(4, 3)
    torch.save(model.state_dict(), path := folder().with_name("weights.pth"))
    return {"model": model, "path": path}


def _set_alpha(alpha: Any) -> None:
    pgt_hf.attach_powergrad(nn.Linear(4, 3), 0.5).alpha = alpha


def _set_group(alpha: Any) -> None:
    sgd().param_groups[0]["powergrad_alpha"] = alpha


def _trainer(**options: Any) -> Any:
    return pgt_hf.PowerGradTrainer(**{"model": network(), "args": training()} | options)


def _image_trainer(**options: Any) -> Any:
    return pgt_hf.ImageTrainer(**{"model": network(), "args": training()} | options)
