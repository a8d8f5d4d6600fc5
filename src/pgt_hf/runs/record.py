"""Reads a run's folder; the only module that names its files."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..limits import HUB_ID, checked

if TYPE_CHECKING:
    from ..analysis.predictions import Evaluation

# Written by ``RunFolder``, by ``examine`` and by ``DiagnosticsCallback``.
RECORD, HISTORY, RESULTS, CURVE = "run.json", "history.jsonl", "metrics.json", "training_curve.png"
EVALUATION, REPORT, DIAGNOSTICS = "evaluation.json", "report.html", "diagnostics.npz"
# Written by transformers.
CONFIG, WEIGHTS, STATE = "config.json", "model.safetensors", "trainer_state.json"
EMA = "ema"  # the subfolder where ImageTrainer keeps the averaged model, which is then the one to publish

# What each of them contains.
CONTENTS = {
    RESULTS: "the results, and what they were made with",
    RECORD: "arguments, code, data, seed, environment",
    HISTORY: "everything that was logged, one entry per line",
    CURVE: "loss, accuracy and learning rate",
    REPORT: "curves, calibration, confusion, worst mistakes on one page",
    DIAGNOSTICS: "logits, filters, gradients; draw them with pgt-hf plot",
    WEIGHTS: "the model, with config.json: transformers' auto classes and pipelines read it",
    EMA: "the averaged model, in the same form",
    "checkpoint-*": "to resume from",
}


# key in metrics.json, or after "eval_" in the history: (type in the model-index, name, shown in percent)
METRICS: dict[str, tuple[str, str, bool]] = {
    "top1": ("accuracy", "Top-1 accuracy", True),
    "accuracy": ("accuracy", "Accuracy", True),
    "top5": ("top_5_accuracy", "Top-5 accuracy", True),
    "loss": ("loss", "Loss", False),
    "nll": ("nll", "Negative log-likelihood, softmax(z)", False),
    "nll_folded": ("nll", "Negative log-likelihood, softmax(alpha z)", False),
    "ece": ("ece", "Expected calibration error, softmax(z)", False),
    "nll_fitted": ("nll", "Negative log-likelihood, softmax(z / T)", False),
    "ece_folded": ("ece", "Expected calibration error, softmax(alpha z)", False),
    "ece_fitted": ("ece", "Expected calibration error, softmax(z / T)", False),
    "brier": ("brier_score", "Brier score, softmax(z)", False),
    "brier_folded": ("brier_score", "Brier score, softmax(alpha z)", False),
}

_HYPERPARAMETERS = (
    "alpha", "preset", "optim", "optim_args", "learning_rate", "weight_decay", "schedule", "lr_scheduler_type",
    "warmup_steps", "warmup_epochs", "epochs", "num_train_epochs", "steps", "max_steps", "batch", "batch_size",
    "global_batch", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_grad_norm",
    "clip_mode", "clip_value", "label_smoothing_factor", "mixup", "cutmix", "random_erasing",
    "auto_augment", "drop_path", "ema_decay", "image_size", "min_crop", "hflip",
    "color_jitter", "norm_free", "small_images", "pretrained", "bf16", "fp16", "torch_compile", "seed",
)  # fmt: skip

# Settings that say what was done, and those that they replace: if the first is known, the others are not shown.
_SUPERSEDED = {
    "schedule": ("lr_scheduler_type", "warmup_steps"),
    "epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "batch": ("batch_size", "global_batch", "per_device_train_batch_size", "gradient_accumulation_steps"),
}

_OFF, _TELLING_AT_ZERO = ("0", "-1"), ("alpha", "weight_decay", "seed")

_KEPT = ("packages", "card")  # sections of the settings that stay nested


@dataclass(frozen=True)
class Run:
    """A run: the model's config, flat settings, metrics and log history."""

    config: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def alpha(self) -> float | None:
        """The alpha of the training, if it is known."""
        return self.settings.get("alpha", self.config.get("powergrad_alpha"))

    @property
    def nll_by_scale(self) -> dict[float, float]:
        """The NLL of ``softmax(scale * z)`` on held-out images, for the scales that were measured: 1, alpha, 1/T."""
        scales = {"nll": 1.0, "nll_folded": self.alpha, "nll_fitted": 1 / self.settings.get("temperature", 1.0)}
        return {scale: self.metrics[key] for key, scale in scales.items() if scale and key in self.metrics}

    @property
    def scale(self) -> float:
        """The factor to the logits whose probabilities had the lowest NLL; 1 where nothing was measured."""
        return min(self.nll_by_scale, key=self.nll_by_scale.__getitem__, default=1.0)

    def folded(self) -> "Run":
        """The run as it is once alpha is multiplied into the head: what was folded are then the logits themselves."""
        metrics = {key: value for key, value in self.metrics.items() if f"{key}_folded" not in self.metrics}
        metrics = {key.removesuffix("_folded"): value for key, value in metrics.items()}
        settings = dict(self.settings)
        if "temperature" in settings and self.alpha:
            settings["temperature"] *= self.alpha
        return replace(self, config=self.config | {"powergrad_folded": True}, settings=settings, metrics=metrics)

    @property
    def dataset(self) -> str | None:
        """The data set's Hub id, "digits", or the last part of a local path."""
        name = self.settings.get("dataset_name") or self.settings.get("dataset")
        if not isinstance(name, str) or not name:
            return None
        local = self.settings.get("local_data") or not is_hub_id(name)
        return Path(name).name if local else name


@checked
def read_run(
    folder: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None, ema: bool | None = None
) -> Run:
    """Reads a run: the model's config, settings, metrics and history.

    Args:
        folder: The run's folder.
        checkpoint: A checkpoint in it, to describe the run as it was then.
        ema: Take the metrics of the moving average, if it was evaluated; by default if its weights are there.

    Raises:
        FileNotFoundError: There is no config.json, so there is no model.

    Example:
        >>> read_run("runs/digits").alpha
        0.25
    """
    run, model = Path(folder), Path(checkpoint or folder)
    config = _json(model / CONFIG)
    if config is None:
        raise FileNotFoundError(f"there is no model in {model}: {CONFIG} is missing")
    settings = _flatten(read_record(run))
    metrics = {} if checkpoint else _flatten(_json(run / RESULTS) or {})
    settings |= {key: value for key, value in metrics.items() if not _is_metric(key)}
    history = read_history(run, checkpoint)
    evaluated: dict[str, Any] = next(
        (entry for entry in reversed(history) if any(key.startswith("eval_") for key in entry)), {}
    )
    results = metrics if any(map(_is_metric, metrics)) else evaluated | metrics  # an older model's are not mixed in
    found = {key.removeprefix("eval_"): value for key, value in results.items()}
    if ema or (ema is None and model_folder(model) != model):
        found = {key.removeprefix("ema_"): value for key, value in found.items() if key.startswith("ema_")} or found
    if "nll" in found:  # the same quantity
        found.pop("loss", None)
    return Run(config, settings, {key: found[key] for key in METRICS if _is_number(found.get(key))}, history)


@checked
def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``run.json``: arguments, code, data, seed, environment; empty if there is none."""
    return _json(Path(folder, RECORD)) or {}


@checked
def read_history(
    folder: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None
) -> list[dict[str, Any]]:
    """The log entries of a checkpoint, if given; else of the run, else of its newest checkpoint."""
    run, lines = Path(folder), Path(folder, HISTORY)
    if checkpoint is None and lines.is_file():
        try:
            return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(
                f"{os.fspath(lines)!r} must hold JSON in every line, but cannot be read: {error}"
            ) from error
    newest = sorted(run.glob(f"checkpoint-*/{STATE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    states = [run / STATE, *newest] if checkpoint is None else [Path(checkpoint, STATE)]
    state = next(filter(None, map(_json, states)), None)
    return state["log_history"] if state else []


@checked
def read_evaluation(folder: str | os.PathLike[str]) -> "Evaluation | None":
    """What ``write_evaluation`` wrote to a folder, or None.

    Example:
        >>> read_evaluation("runs/digits").names[:2]
        ['0', '1']
    """
    from ..analysis.predictions import Evaluation

    content = _json(Path(folder, EVALUATION))
    return Evaluation.from_json(content) if content else None


@checked
def model_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder of the model to use: that of the averaged weights, if there are any, else the run's."""
    averaged = Path(folder, EMA)
    return averaged if (averaged / CONFIG).is_file() else Path(folder)


@checked
def run_folder(model: str | os.PathLike[str]) -> Path | None:
    """The run that a model's folder belongs to: the run itself, a checkpoint or the averaged model."""
    return next((place for place in (Path(model), Path(model).parent) if (place / RECORD).is_file()), None)


def is_hub_id(name: str) -> bool:
    """Whether a name is a Hub id rather than a local file or folder."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def architecture(config: Mapping[str, Any]) -> str:
    """The network's name, as timm or transformers knows it."""
    base = (config.get("model_args") or {}).get("base")
    return str(base or config.get("architecture") or config.get("model_type") or "model")


def shown_settings(run: Run) -> list[tuple[str, str]]:
    """A run's settings that may be shown in public, as text."""
    idle = {other for key, others in _SUPERSEDED.items() if run.settings.get(key) is not None for other in others}
    if run.settings.get("schedule") is None:
        idle |= {"warmup_epochs"}
    shown = ((key, _public(run.settings.get(key))) for key in _HYPERPARAMETERS if key not in idle)
    return [(key, text) for key, text in shown if text is not None and (text not in _OFF or key in _TELLING_AT_ZERO)]


def shown_metrics(run: Run) -> list[tuple[str, str, str]]:
    """A run's metrics as key, name and text."""
    return [
        (key, METRICS[key][1], f"{value:.2%}" if METRICS[key][2] else f"{value:.4g}")
        for key, value in run.metrics.items()
    ]


def _public(value: Any) -> str | None:
    """The text of numbers, of flags that are on, and of words that are no path."""
    if value is None or value is False or isinstance(value, (dict, list)):
        return None
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if text and not re.search(r"[/\\|<>\n]", text) else None


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} must hold JSON, but cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{os.fspath(path)!r} must hold an object of JSON, got a {type(found).__name__}")
    for key in ("arguments", "data"):
        if not isinstance(found.get(key, {}), dict):
            raise ValueError(f"{os.fspath(path)!r} must hold an object in {key!r}, got {str(found[key])[:60]}")
    return found


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings on one level; outer values win."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _KEPT or not isinstance(value, Mapping):
            flat.setdefault(key, value)
    for key, value in settings.items():
        if key not in flat:
            flat = _flatten(value) | flat
    return flat


def _is_metric(key: str) -> bool:
    return key.removeprefix("eval_") in METRICS


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
