"""One training of the study, and everything that is noted of it."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import set_seed

from pgt_hf import bind_powergrad
from pgt_hf.analysis import History, filter_norms, normalization_statistics, normalized_layers, turned_angle
from pgt_hf.atomic import replacing
from pgt_hf.heads import last_linear

from .settings import SCALES, Setting

__all__ = ["Stop", "Task", "in_bfloat16", "never", "train"]

CLIP_VALUE = {"agc": 0.01, "norm": 1.0}
WARMUP = 1.0  # epochs, from a learning rate of 0
SNAPSHOTS = 100  # of diagnostics in a training

Stop = Callable[[int, float], bool]  # told an epoch and the score after it: whether to end the training


def never(epoch: int, score: float) -> bool:
    """The training goes to its end."""
    return False


class Task(Protocol):
    """What is trained: images or text of one scale, on one device."""

    device: str

    def create(self, setting: Setting) -> nn.Module:
        """The network that a training starts from."""

    def epoch_steps(self, setting: Setting) -> int:
        """Steps between two looks at the score."""

    def losses(self, model: nn.Module, setting: Setting, seed: int, epoch: int) -> Iterator[Tensor]:
        """The loss of each step of an epoch, made when it is asked for."""

    def score(self, model: nn.Module, setting: Setting) -> float:
        """What a search maximises, on data of its own, in [0, 1]."""

    def measure(self, model: nn.Module, head: nn.Module, setting: Setting) -> dict[str, Any]:
        """What is noted of a trained network."""


def train(
    setting: Setting,
    learning_rate: float,
    seed: int,
    task: Task,
    stop: Stop = never,
    diagnostics: Path | None = None,
    weights: Path | None = None,
) -> dict[str, Any]:
    """Trains a network and measures it.

    Args:
        setting: How to train.
        learning_rate: The peak of the cosine schedule.
        seed: Of initialisation, order, crops and flips.
        task: What to train on.
        stop: Told each epoch and the score after it; True ends the training, as a pruner does.
        diagnostics: Where snapshots of filters and norms are to go, if they are wanted.
        weights: Where the trained network is to go, if it is wanted.

    Returns:
        Accuracies as shares, losses in nats, statistics of logits, features and filters, seconds; None where a run
        that diverged has none. ``curve`` is the score after each epoch.
    """
    started = time.perf_counter()
    epochs = SCALES[setting.scale].epochs
    set_seed(seed)
    model = task.create(setting).to(task.device)
    (head,) = last_linear(model)
    optimizer = prepare_method(model, head, setting, learning_rate)
    epoch_steps = task.epoch_steps(setting)
    steps = epochs * epoch_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, WARMUP * epoch_steps, steps))
    history = History()
    curve: list[float] = []
    verdict = None
    while verdict is None and len(curve) < epochs:
        model.train()
        losses = torch.zeros((), device=task.device)
        for number, loss in enumerate(task.losses(model, setting, seed, len(curve))):
            loss.backward()
            losses += loss.detach()
            step = len(curve) * epoch_steps + number
            if diagnostics and step % max(1, steps // SNAPSHOTS) == 0:
                history.add(step, step_and_watch(model, optimizer))
            else:
                optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        curve.append(task.score(model.eval(), setting))
        if not losses.isfinite():
            verdict = "divergence"
        elif stop(len(curve), curve[-1]):
            verdict = "pruned"
    if diagnostics:
        diagnostics.parent.mkdir(parents=True, exist_ok=True)
        history.save(diagnostics)
    if weights:
        with replacing(weights) as draft:
            torch.save(model.state_dict(), draft)
    result = {
        "verdict": verdict,
        "steps": steps,
        "decay_time": learning_rate * setting.weight_decay * steps,
        "last_loss": _rounded(losses.item() / epoch_steps),
        "curve": [_rounded(value) for value in curve],
    }
    result |= {key: _rounded(value) for key, value in task.measure(model, head, setting).items()}
    precision = "bfloat16" if in_bfloat16(task.device) else "float32"
    return result | {
        "device": task.device,
        "precision": precision,
        "seconds": round(time.perf_counter() - started, 1),
    }


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


def _rounded(value: Any) -> Any:
    """To float32's digits; what is not finite has no place in JSON."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None
