"""One training of the study, and everything that is noted of it."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from pgt_hf import bind_powergrad
from pgt_hf.analysis import (
    History,
    compare_calibration,
    filter_norms,
    logit_statistics,
    normalization_statistics,
    normalized_layers,
    turned_angle,
    zeroed_filters,
)
from pgt_hf.heads import last_linear
from pgt_hf.images import create_model, normalize

from .images import Split
from .settings import SCALES, Setting

__all__ = ["Stop", "never", "train"]

CLIP_VALUE = {"agc": 0.01, "norm": 1.0}
WARMUP = 1.0  # epochs, from a learning rate of 0
SMALL_NORM = 0.1  # a tenth of a fresh filter's norm: on its way to zero
TRAIN_PROBE = 2_000  # training images, without augmentation, that the training accuracy is measured on
SNAPSHOTS = 100  # of diagnostics in a training
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Stop = Callable[[int, float], bool]  # told an epoch and the accuracy after it: whether to end the training


def never(epoch: int, top1: float) -> bool:
    """The training goes to its end."""
    return False


def train(
    setting: Setting,
    learning_rate: float,
    seed: int,
    splits: dict[str, Split],
    stop: Stop = never,
    diagnostics: Path | None = None,
) -> dict[str, Any]:
    """Trains a network anew, on the device of the images, and measures it.

    Args:
        setting: How to train.
        learning_rate: The peak of the cosine schedule.
        seed: Of initialisation, order, crops and flips.
        splits: As ``images.read`` gives them.
        stop: Told each epoch and the accuracy on the images of the search; True ends the training, as a pruner does.
        diagnostics: Where snapshots of filters and norms are to go, if they are wanted.

    Returns:
        Accuracies as shares, losses in nats, statistics of logits, features and filters, seconds; None where a run
        that diverged has none. ``curve`` is the accuracy on the images of the search after each epoch.
    """
    started = time.perf_counter()
    scale, images = SCALES[setting.scale], splits["train"]
    device = images.images.device.type
    set_seed(seed)
    model = create_model(
        scale.network,
        [str(label) for label in range(int(images.labels.max()) + 1)],
        image_size=scale.crop,
        norm_free=setting.network == "norm-free",
    ).to(device, memory_format=torch.channels_last)
    (head,) = last_linear(model)
    optimizer = prepare_method(model, head, setting, learning_rate)
    epoch_steps = len(images) // setting.batch
    steps = scale.epochs * epoch_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, WARMUP * epoch_steps, steps))
    history = History()
    curve: list[float] = []
    verdict = None
    while verdict is None and len(curve) < scale.epochs:
        model.train()
        losses = torch.zeros((), device=device)
        for number, (index, draws) in enumerate(images.batches(setting.batch, scale.crop, seed, len(curve))):
            pixels = normalize(images.crops(index, draws, scale.crop), MEAN, STD)
            with torch.autocast(device, torch.bfloat16, enabled=in_bfloat16(device)):
                logits = model(pixels).logits
            loss = nn.functional.cross_entropy(
                logits.float(), images.labels[index], label_smoothing=setting.label_smoothing
            )
            loss.backward()
            losses += loss.detach()
            step = len(curve) * epoch_steps + number
            if diagnostics and step % max(1, steps // SNAPSHOTS) == 0:
                history.add(step, step_and_watch(model, optimizer))
            else:
                optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        curve.append(top1(model, splits["select"], scale.crop))
        if not losses.isfinite():
            verdict = "divergence"
        elif stop(len(curve), curve[-1]):
            verdict = "pruned"
    if diagnostics:
        diagnostics.parent.mkdir(parents=True, exist_ok=True)
        history.save(diagnostics)
    result = {
        "verdict": verdict,
        "steps": steps,
        "decay_time": learning_rate * setting.weight_decay * steps,
        "last_loss": _rounded(losses.item() / epoch_steps),
        "curve": [_rounded(value) for value in curve],
    }
    result |= measure(model, head, splits, setting)
    precision = "bfloat16" if in_bfloat16(device) else "float32"
    return result | {"device": device, "precision": precision, "seconds": round(time.perf_counter() - started, 1)}


def in_bfloat16(device: str) -> bool:
    """Not on a processor without instructions for it, where it takes several times as long as float32."""
    return device != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def step_and_watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Takes an optimizer step; the norms of all filters and what the step does to normalised layers."""
    found = {f"filter/{name}": norms.half() for name, norms in filter_norms(model).items()}
    found |= normalization_statistics(model, optimizer)
    layers = {name: layer for name, (layer, _) in normalized_layers(model).items()}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    optimizer.step()
    found |= {f"angle/{name}": turned_angle(before[name], layer.weight) for name, layer in layers.items()}
    return {key: value.cpu() for key, value in found.items()}


def cosine(step: int, warmup: float, steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up from 0, then half a cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def prepare_method(model: nn.Module, head: nn.Module, setting: Setting, learning_rate: float) -> torch.optim.Optimizer:
    """Changes the model as the method asks, and gives its optimizer."""
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
    options: list[dict[str, Any]] = []
    for (in_head, matrix), parameters in groups.items():
        rate = alpha if in_head and "rate" in parts else 1.0
        if "norms" in parts and not in_head and not matrix:
            rate = 1 / alpha
        decay = setting.weight_decay / (alpha if in_head and "decay" in parts else 1.0)
        options.append({"params": parameters, "lr": rate * learning_rate, "weight_decay": matrix * decay})
    optimizer: torch.optim.Optimizer
    if setting.optimizer == "sgd":
        optimizer = torch.optim.SGD(options, lr=learning_rate, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(options, lr=learning_rate)
    clip_value = None if setting.clip is None else CLIP_VALUE[setting.clip]
    pgt = alpha if setting.method == "pgt" else 1.0
    return bind_powergrad(optimizer, model, alpha=pgt, clip_mode=setting.clip, clip_value=clip_value)


def _divide_gradient(features: Tensor, alpha: float) -> None:
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient / alpha)


def top1(model: nn.Module, split: Split, crop: int) -> float:
    return (_logits(model, split, crop).argmax(dim=1) == split.labels).double().mean().item()


@torch.no_grad()
def measure(model: nn.Module, head: nn.Module, splits: dict[str, Split], setting: Setting) -> dict[str, Any]:
    """Accuracy on all splits; the rest on the test images."""
    found: dict[str, Any] = {}
    probe = Split(splits["train"].images[:: len(splits["train"]) // TRAIN_PROBE or 1],
                  splits["train"].labels[:: len(splits["train"]) // TRAIN_PROBE or 1])  # fmt: skip
    norms: list[Tensor] = []
    for name, split in (("train", probe), ("select", splits["select"]), ("test", splits["test"])):
        norms.clear()
        hook = head.register_forward_pre_hook(lambda module, args: norms.append(args[0].float().norm(dim=1)))
        logits = _logits(model, split, SCALES[setting.scale].crop)
        hook.remove()
        hits = logits.topk(5).indices == split.labels[:, None]
        found[f"{name}_top1"] = hits[:, 0].double().mean().item()
        found[f"{name}_loss"] = nn.functional.cross_entropy(logits, split.labels).item()
    found |= {"test_top5": hits.any(dim=1).double().mean().item(), "feature_norm": torch.cat(norms).mean().item()}
    found |= {key: value.item() for key, value in logit_statistics(logits).items()}
    if logits.isfinite().all():
        factor = setting.alpha if setting.method == "pgt" else 1.0
        for kind, scores in compare_calibration(logits.cpu(), splits["test"].labels.cpu(), factor).items():
            found |= {f"{kind}_nll": scores.nll, f"{kind}_ece": scores.ece}
    layers = dict(model.named_modules())
    filters = torch.cat([norm for name, norm in filter_norms(model).items() if layers[name] is not head])
    of_head = {id(parameter) for parameter in head.parameters()}
    backbone = [parameter for parameter in model.parameters() if id(parameter) not in of_head]
    found |= {
        "filters": len(filters),
        "zeroed_filters": zeroed_filters([filters]).item(),
        "small_filters": zeroed_filters([filters], SMALL_NORM).item(),
        "smallest_filter": filters.min().item(),
        "head_norm": head.weight.norm().item(),
        "checksum": sum(parameter.double().abs().sum().item() for parameter in backbone),
    }
    return {key: _rounded(value) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    """To float32's digits; what is not finite has no place in JSON."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None


@torch.no_grad()
def _logits(model: nn.Module, split: Split, crop: int) -> Tensor:
    model.eval()
    logits = []
    for start in range(0, len(split), 500):
        pixels = normalize(split.centre(slice(start, start + 500), crop), MEAN, STD)
        device = pixels.device.type
        with torch.autocast(device, torch.bfloat16, enabled=in_bfloat16(device)):
            logits.append(model(pixels.contiguous(memory_format=torch.channels_last)).logits.float())
    return torch.cat(logits)
