"""One training of the study, and everything that is noted of it."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from pgt_hf import ImageTrainer, ImageTrainingArguments
from pgt_hf.analysis import compare_calibration, filter_norms, logit_statistics, zeroed_filters
from pgt_hf.heads import last_linear
from pgt_hf.images import collate, create_model, normalize
from pgt_hf.runs.record import DIAGNOSTICS
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback

from .images import CROP, Images, Split
from .settings import Setting

__all__ = ["train"]

NETWORK = "test_resnet"  # timm's smallest ResNet: 4 stages of one block, 32 to 96 channels, 0.4 million weights
EPOCHS = {"tiny-imagenet": 5.0, "fashion-mnist": 5.0}
BATCH = 128
CLIP_VALUE = {"agc": 0.01, "norm": 1.0}
SMALL_NORM = 0.1  # a tenth of a fresh filter's norm: on its way to zero
TRAIN_PROBE = 2_000  # training images, without augmentation, that the training accuracy is measured on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train(
    setting: Setting, learning_rate: float, seed: int, splits: dict[str, Split], diagnostics: Path | None = None
) -> dict[str, Any]:
    """Trains a network anew and measures it.

    Args:
        setting: How to train.
        learning_rate: The peak of the cosine schedule.
        seed: Of initialisation, order, crops and flips.
        splits: As ``images.read`` gives them.
        diagnostics: Where ``DiagnosticsCallback``'s file is to go, if it is wanted.

    Returns:
        Accuracies as shares, losses in nats, statistics of logits, features and filters, seconds; None where a run
        that diverged has none.
    """
    transformers_logging.set_verbosity_error()
    started = time.perf_counter()
    set_seed(seed)
    classes = int(splits["train"].labels.max()) + 1
    model = create_model(
        NETWORK, [str(label) for label in range(classes)], image_size=CROP, norm_free=setting.network == "norm-free"
    )
    (head,) = last_linear(model)
    optimizer = prepare_method(model, head, setting, learning_rate)
    guard = DivergenceCallback()
    with tempfile.TemporaryDirectory() as folder:
        args = ImageTrainingArguments(
            folder,
            alpha=setting.alpha if setting.method == "pgt" else 1.0,
            clip_mode=setting.clip,
            clip_value=None if setting.clip is None else CLIP_VALUE[setting.clip],
            max_grad_norm=0.0,
            label_smoothing_factor=setting.label_smoothing,
            learning_rate=learning_rate,
            schedule="cosine",
            warmup_epochs=0.5,
            warmup_lr=0.0,  # so that the schedules of all groups are proportional
            num_train_epochs=EPOCHS[setting.data],
            per_device_train_batch_size=BATCH,
            dataloader_drop_last=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            bf16=True,
            use_cpu=True,
            channels_last=True,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = ImageTrainer(
            model,
            args,
            mean=MEAN,
            std=STD,
            train_dataset=Images(splits["train"], seed),
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=[guard, *([DiagnosticsCallback(interval=20)] if diagnostics else [])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if diagnostics:
            diagnostics.parent.mkdir(parents=True, exist_ok=True)
            Path(folder, DIAGNOSTICS).replace(diagnostics)
    result = {"verdict": guard.verdict, "last_loss": _last_loss(trainer.state.log_history)}
    result |= measure(model, head, splits, setting)
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def prepare_method(model: nn.Module, head: nn.Module, setting: Setting, learning_rate: float) -> torch.optim.SGD:
    """Changes the model as temperature or parts ask, and gives its optimizer; PGT itself is the trainer's part."""
    alpha, parts = setting.alpha, setting.parts
    if setting.method == "temperature":
        head.register_forward_hook(lambda module, args, logits: alpha * logits)
    if "init" in parts:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(alpha)
    if "features" in parts:
        head.register_forward_pre_hook(lambda module, args: _divide_gradient(args[0], alpha))
    of_head = {id(parameter) for parameter in head.parameters()}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        groups.setdefault((id(parameter) in of_head, parameter.ndim > 1), []).append(parameter)
    return torch.optim.SGD(
        [
            {
                "params": parameters,
                "lr": learning_rate * (alpha if in_head and "rate" in parts else 1.0),
                "weight_decay": decayed * setting.weight_decay / (alpha if in_head and "decay" in parts else 1.0),
            }
            for (in_head, decayed), parameters in groups.items()
        ],
        lr=learning_rate,
        momentum=0.9,
        nesterov=True,
    )


def _divide_gradient(features: Tensor, alpha: float) -> None:
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient / alpha)


@torch.no_grad()
def measure(model: nn.Module, head: nn.Module, splits: dict[str, Split], setting: Setting) -> dict[str, Any]:
    """Accuracy on all splits; the rest on the test images."""
    model.eval()
    found: dict[str, Any] = {}
    probe = Split(splits["train"].images[:TRAIN_PROBE], splits["train"].labels[:TRAIN_PROBE])
    for name, split in (("train", probe), ("select", splits["select"]), ("test", splits["test"])):
        logits, feature_norm = _logits(model, head, split)
        hits = logits.topk(5).indices == split.labels[:, None]
        found[f"{name}_top1"] = hits[:, 0].double().mean().item()
        found[f"{name}_loss"] = nn.functional.cross_entropy(logits, split.labels).item()
    found["test_top5"] = hits.any(dim=1).double().mean().item()
    found |= {key: value.item() for key, value in logit_statistics(logits).items()} | {"feature_norm": feature_norm}
    if logits.isfinite().all():
        scale = setting.alpha if setting.method == "pgt" else 1.0
        for kind, scores in compare_calibration(logits, split.labels, scale).items():
            found |= {f"{kind}_nll": scores.nll, f"{kind}_ece": scores.ece}
    layers = dict(model.named_modules())
    norms = torch.cat([norm for name, norm in filter_norms(model).items() if layers[name] is not head])
    of_head = {id(parameter) for parameter in head.parameters()}
    backbone = [parameter for parameter in model.parameters() if id(parameter) not in of_head]
    found |= {
        "filters": len(norms),
        "zeroed_filters": zeroed_filters([norms]).item(),
        "small_filters": zeroed_filters([norms], SMALL_NORM).item(),
        "smallest_filter": norms.min().item(),
        "head_norm": head.weight.norm().item(),
        "checksum": sum(parameter.double().abs().sum().item() for parameter in backbone),
    }
    return {key: _rounded(value) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    """To float32's digits; what is not finite has no place in JSON."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _logits(model: nn.Module, head: nn.Module, split: Split) -> tuple[Tensor, float]:
    norms: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: norms.append(args[0].float().norm(dim=1)))
    logits = []
    for start in range(0, len(split.labels), 500):
        images = normalize(split.centre(start, start + 500), MEAN, STD)
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(model(images.contiguous(memory_format=torch.channels_last)).logits.float())
    hook.remove()
    return torch.cat(logits), torch.cat(norms).mean().item()


def _last_loss(history: list[dict[str, Any]]) -> float | None:
    return next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)
