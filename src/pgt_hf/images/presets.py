"""The published ImageNet runs as settings of ``recipes/imagenet.py``, one row each, and recipes of other papers.

From Das et al., arXiv 2111.12495v3, tables 1 to 3: 100 epochs, global batch 1024 unless said, SGD with Nesterov
momentum 0.9, weight decay 5e-4, 5 epochs of warm-up from a thousandth of the peak rate, 0.4 at batch 1024. The paper
does not say how the rate follows the batch (here: linearly), nor how AGC and gradient clipping were set (here: 0.01
and 1.0).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What every published run shares. ``base_lr`` is the peak rate at a batch of 1024.
PAPER: dict[str, Any] = {
    "optim": "powergrad_sgd", "optim_args": "momentum=0.9,nesterov=true", "weight_decay": 5e-4, "alpha": 1.0,
    "base_lr": 0.4, "global_batch": 1024, "num_train_epochs": 100, "warmup_epochs": 5.0, "warmup_lr": 0.001,
    "schedule": "cosine", "decay_epochs": [30, 60, 90],
    "image_size": 224, "min_crop": 0.08, "color_jitter": 0.4,
}  # fmt: skip
AGC = {"clip_mode": "agc", "clip_value": 0.01}
GC = {"clip_mode": "norm", "clip_value": 1.0}
SMOOTH = {"label_smoothing_factor": 0.1}

# Close to A3 of Wightman et al., "ResNet strikes back" (arXiv 2110.00476), which trains with a sigmoid loss; PGT needs
# a softmax.
A3: dict[str, Any] = {
    "model_name": "resnet50",
    "optim": "powergrad_lamb", "optim_args": None, "weight_decay": 0.02, "max_grad_norm": 0.0, "alpha": 1.0,
    "base_lr": 0.004, "global_batch": 2048, "num_train_epochs": 100, "warmup_epochs": 5.0, "warmup_lr": 0.0125,
    "schedule": "cosine", "min_lr": 1e-6,
    "image_size": 160, "eval_image_size": 224, "crop_pct": 0.95, "channels_last": True,
    "color_jitter": 0.0, "auto_augment": "rand-m6-mstd0.5-inc1", "mixup": 0.1, "cutmix": 1.0,
}  # fmt: skip

# torchvision's references for VGG: a tenth of the usual rate, step decay, 90 epochs.
VGG: dict[str, Any] = PAPER | {"base_lr": 0.04, "schedule": "step", "num_train_epochs": 90, "color_jitter": 0.0}

# DeiT (Touvron et al., arXiv 2012.12877) without distillation and repeated augmentation, cut to 100 epochs; ConvNeXt's
# own recipe (arXiv 2201.03545) differs from it by no more than the stochastic depth.
TRANSFORMER: dict[str, Any] = {
    "optim": "powergrad_adamw", "optim_args": None, "weight_decay": 0.05, "alpha": 1.0,
    "base_lr": 0.001, "global_batch": 1024, "num_train_epochs": 100, "warmup_epochs": 5.0, "warmup_lr": 0.001,
    "schedule": "cosine", "min_lr": 1e-5, "drop_path": 0.1, "label_smoothing_factor": 0.1,
    "image_size": 224, "min_crop": 0.08, "color_jitter": 0.0, "auto_augment": "rand-m9-mstd0.5-inc1",
    "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25,
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A run: the settings, as arguments of the recipe, and the published top-1 accuracies in percent."""

    settings: dict[str, Any]
    train_top1: float | None = None
    top1: float | None = None


def _paper(model_name: str, train_top1: float, top1: float, **settings: Any) -> Preset:
    return Preset(PAPER | {"model_name": model_name} | settings, train_top1, top1)


def _norm_free(batch: int, train_top1: float, top1: float, **settings: Any) -> Preset:
    return _paper("resnet18", train_top1, top1, norm_free=True, global_batch=batch, **settings)


PRESETS: dict[str, Preset] = {
    "seresnet50_cosine": _paper("seresnet50", 81.5, 77.218),
    "seresnet50_cosine_pgt": _paper("seresnet50", 82.47, 77.952, alpha=0.3),
    "resnet50_cosine": _paper("resnet50", 79.18, 76.56),
    "resnet50_cosine_pgt": _paper("resnet50", 79.68, 77.216, alpha=0.05),
    "resnet50_cosine_pgt0.3": _paper("resnet50", 79.43, 76.886, alpha=0.3),
    "resnet50_cosine_ls": _paper("resnet50", 78.81, 76.698, **SMOOTH),
    "resnet50_cosine_pgt_ls": _paper("resnet50", 77.69, 76.39, alpha=0.05, **SMOOTH),
    "resnet50_cosine_pgt0.3_ls": _paper("resnet50", 78.47, 76.968, alpha=0.3, **SMOOTH),
    "resnet50_step": _paper("resnet50", 78.99, 75.97, schedule="step"),
    # The paper's table of results says alpha = 0.05; its ablation and its checkpoint say 0.3.
    "resnet50_step_pgt": _paper("resnet50", 79.56, 76.494, schedule="step", alpha=0.3),
    "resnet101_cosine": _paper("resnet101", 82.29, 77.896),
    "resnet101_cosine_pgt": _paper("resnet101", 83.1, 78.258, alpha=0.3),
    "seresnet18_cosine": _paper("seresnet18", 71.42, 71.09),
    "seresnet18_cosine_pgt": _paper("seresnet18", 71.6, 71.436, alpha=0.25),
    "resnet18_step": _paper("resnet18", 69.95, 69.704, schedule="step"),
    "resnet18_step_pgt": _paper("resnet18", 70.3, 69.844, schedule="step", alpha=0.25),
    "resnet18_cosine": _paper("resnet18", 70.38, 70.208),
    "resnet18_cosine_pgt": _paper("resnet18", 70.53, 70.298, alpha=0.25),
    "normfree18_1024": _norm_free(1024, 66.27, 64.816),
    "normfree18_1024_pgt": _norm_free(1024, 66.62, 65.498, alpha=0.92),
    "normfree18_512": _norm_free(512, 68.02, 66.552),
    "normfree18_512_pgt": _norm_free(512, 69.5, 67.236, alpha=0.25),
    "normfree18_256": _norm_free(256, 68.86, 66.796),
    "normfree18_256_pgt": _norm_free(256, 69.97, 67.814, alpha=0.25),
    "normfree18_256_gc": _norm_free(256, 69.04, 67.064, **GC),
    "normfree18_256_agc": _norm_free(256, 69.06, 67.298, **AGC),
    "normfree18_256_gc_pgt": _norm_free(256, 68.67, 67.088, alpha=0.25, **GC),
    "normfree18_256_agc_pgt": _norm_free(256, 70.92, 68.856, alpha=0.25, **AGC),
    # Recipes of others, to which the paper has no counterpart: add an alpha with --alpha.
    "vgg16": Preset(VGG | {"model_name": "vgg16"}),
    "vgg16_bn": Preset(VGG | {"model_name": "vgg16_bn"}),
    "convnext_tiny": Preset(TRANSFORMER | {"model_name": "convnext_tiny"}),
    "vit_small": Preset(TRANSFORMER | {"model_name": "vit_small_patch16_224"}),
    "resnet50_a3": Preset(A3),
}


def published_top1(arguments: Mapping[str, Any]) -> float | None:
    """What was published of a run with these arguments; nothing, if they differ from their preset's.

    Example:
        >>> published_top1({"preset": "resnet50_cosine", "dataset_name": "digits", "max_steps": 20})
    """
    preset = PRESETS.get(arguments.get("preset") or "", Preset({}))
    whole = {
        "dataset_name": "ILSVRC/imagenet-1k",
        "max_train_samples": None,
        "max_eval_samples": None,
        "max_steps": -1,
    }
    whole |= {"learning_rate": None, "pretrained": False}
    same = all(arguments.get(name) == value for name, value in (whole | preset.settings).items())
    return preset.top1 if same else None


def preset_table() -> str:
    """The presets as a table in Markdown, with the published top-1 in percent, if any.

    Example:
        >>> print(preset_table().splitlines()[2].split("|")[1].strip())
        seresnet50_cosine
    """
    lines = [
        "| preset | model | schedule | epochs | batch | lr | alpha | clipping | smoothing | train top-1 | top-1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        get = preset.settings.get
        model = preset.settings["model_name"] + (" without norm" if get("norm_free") else "")
        clipping = f"{get('clip_mode')} {get('clip_value')}" if get("clip_mode") else "-"
        rate = preset.settings["base_lr"] * preset.settings["global_batch"] / 1024
        published = [f"{value:g}" if value else "-" for value in (preset.train_top1, preset.top1)]
        cells = [name, model, get("schedule"), get("num_train_epochs"), get("global_batch"), f"{rate:g}", get("alpha")]
        cells += [clipping, get("label_smoothing_factor", "-"), *published]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
