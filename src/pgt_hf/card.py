"""The model card of a run, made from what its folder says was really run.

Nothing is copied into a card by default: the fields that it may show are listed here, so that a path, a host or a
token that stands in a run's settings does not reach it.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ["Run", "Terms", "dataset_terms", "model_card", "read_run"]

CONFIG, WEIGHTS, CURVE, REPORT = "config.json", "model.safetensors", "training_curve.png", "report.html"
EMA = "ema"  # the subfolder where ImageTrainer keeps the averaged model, which is then the one to publish
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# key in metrics.json, or after "eval_" in the history: (type in the model-index, name, shown in percent)
METRICS: dict[str, tuple[str, str, bool]] = {
    "top1": ("accuracy", "Top-1 accuracy", True),
    "accuracy": ("accuracy", "Accuracy", True),
    "top5": ("top_5_accuracy", "Top-5 accuracy", True),
    "loss": ("loss", "Loss", False),
    "nll": ("nll", "Negative log-likelihood, softmax(z)", False),
    "nll_folded": ("nll", "Negative log-likelihood, softmax(alpha z)", False),
    "ece": ("ece", "Expected calibration error, softmax(z)", False),
    "ece_folded": ("ece", "Expected calibration error, softmax(alpha z)", False),
    "brier": ("brier_score", "Brier score, softmax(z)", False),
    "brier_folded": ("brier_score", "Brier score, softmax(alpha z)", False),
}
HYPERPARAMETERS = (
    "alpha", "preset", "optim", "optim_args", "learning_rate", "base_lr", "weight_decay", "lr_scheduler_type",
    "warmup_steps", "warmup_epochs", "num_train_epochs", "epochs", "max_steps", "steps", "batch", "global_batch",
    "batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_grad_norm",
    "clip_mode", "clip_value", "label_smoothing", "label_smoothing_factor", "mixup", "cutmix", "random_erasing",
    "auto_augment", "drop_path", "drop_path_rate", "ema_decay", "model_ema_decay", "image_size", "min_crop", "hflip",
    "color_jitter", "norm_free", "small_images", "pretrained", "bf16", "fp16", "torch_compile", "seed",
)  # fmt: skip
_OFF, _TELLING_AT_ZERO = ("0", "-1"), ("alpha", "weight_decay", "seed")
_KEPT = ("versions", "packages", "card")  # sections of the settings that are read as such
TASKS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
}
CITATION = """@article{das2021altering,
  title   = {Altering Backward Pass Gradients improves Convergence},
  author  = {Das, Bishshoy and Mondal, Milton and Lall, Brejesh and Joshi, Shiv Dutt and Dutta Roy, Sumantra},
  journal = {arXiv preprint arXiv:2111.12495},
  year    = {2021}
}"""


@dataclass(frozen=True)
class Terms:
    """What is known of a data set: its name, what its licence allows, whether its images may be shown in public."""

    name: str
    licence: str
    redistributable: bool = False


_IMAGENET = (
    "Terms of access of ImageNet: non-commercial research and education only, and the images may not be passed on. "
    "Whoever uses a model trained on it has to judge what that means for the intended use."
)
DATASETS = {
    "ILSVRC/imagenet-1k": Terms("ImageNet-1K (ILSVRC 2012)", _IMAGENET),
    "zh-plus/tiny-imagenet": Terms("Tiny-ImageNet", f"A subset of ImageNet. {_IMAGENET}"),
    "digits": Terms(
        "Optical Recognition of Handwritten Digits (UCI, the part in scikit-learn)",
        "CC BY 4.0 (Alpaydin and Kaynak, UCI Machine Learning Repository).",
        redistributable=True,
    ),
}


@dataclass(frozen=True)
class Run:
    """What a run folder says: the model's config, flat settings, metrics and the log history."""

    config: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def alpha(self) -> float | None:
        """The alpha of the training, if it is known."""
        return self.settings.get("alpha", self.config.get("powergrad_alpha"))

    @property
    def dataset(self) -> str | None:
        """The data set's Hub id, "digits", or the last part of a local path."""
        name = self.settings.get("dataset_name") or self.settings.get("dataset")
        if not isinstance(name, str) or not name:
            return None
        return name if is_hub_id(name) else Path(name).name


def read_run(
    folder: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None, ema: bool = False
) -> Run:
    """Reads what a run left behind: config.json, run.json, trainer_run.json, metrics.json, the history.

    Args:
        folder: The run's folder.
        checkpoint: A checkpoint in it, to describe the run as it was then: metrics and history are the checkpoint's.
        ema: Take the metrics of the moving average, where it was evaluated as well.

    Raises:
        FileNotFoundError: There is no config.json, hence no model.

    Example:
        >>> read_run("runs/digits").alpha
        0.25
    """
    run, model = Path(folder), Path(checkpoint or folder)
    config = _json(model / CONFIG)
    if config is None:
        raise FileNotFoundError(f"there is no model in {model}: {CONFIG} is missing")
    settings: dict[str, Any] = {}
    for name in ("trainer_run.json", "run.json"):
        settings |= _flatten(_json(run / name) or {})
    metrics = {} if checkpoint else _flatten(_json(run / "metrics.json") or {})
    settings |= {key: value for key, value in metrics.items() if not _is_metric(key)}
    history = _history(run, model)
    evaluated: dict[str, Any] = next(
        (entry for entry in reversed(history) if any(key.startswith("eval_") for key in entry)), {}
    )
    found = {key.removeprefix("eval_"): value for key, value in (evaluated | metrics).items()}
    if ema:
        found = {key.removeprefix("ema_"): value for key, value in found.items() if key.startswith("ema_")} or found
    if "nll" in found:  # the same quantity
        found.pop("loss", None)
    return Run(config, settings, {key: found[key] for key in METRICS if _is_number(found.get(key))}, history)


def dataset_terms(name: str | None) -> Terms:
    """The licence and terms of a data set, or where to find them.

    Example:
        >>> dataset_terms("digits").redistributable
        True
    """
    if name is None:
        return Terms("an unrecorded data set", "The run does not say which data it was trained on.")
    if name in DATASETS:
        return DATASETS[name]
    if "/" in name:
        return Terms(name, f"See the data set's own page, https://huggingface.co/datasets/{name}.")
    return Terms(f"{name} (a local data set)", "A local data set: the terms of its owner hold.")


def model_card(
    run: Run,
    repo_id: str,
    *,
    license: str | None = None,
    tags: Iterable[str] = (),
    base_model: str | None = None,
    ema: bool = False,
    files: Iterable[str] = (),
) -> str:
    """Writes the card: metadata with a model-index, results, code to use the model, training, data, citation.

    Args:
        run: What ``read_run`` read; ``run.config["powergrad_folded"]`` says whether alpha is in the weights.
        repo_id: Where the model will be, as the code in the card names it.
        license: The model's own licence, as the Hub names it ("apache-2.0"); none is claimed when not given.
        tags: More tags.
        base_model: The Hub id of the model that training started from.
        ema: Whether the weights are an exponential moving average.
        files: What lies beside the card; the curve and the report are shown if they are among them.

    Raises:
        ValueError: huggingface_hub does not accept the metadata.

    Example:
        >>> print(model_card(read_run("runs/digits"), "alice/digits"))
    """
    task, terms, files = _task(run.config), dataset_terms(run.dataset), set(files)
    data = ModelCardData(
        license=license,
        library_name="timm" if _is_timm(run.config) else "transformers",
        pipeline_tag=task or None,
        tags=sorted(
            {*filter(None, [task]), "powergrad-transform", "arxiv:2111.12495", *_libraries(run.config), *tags}
        ),
        datasets=[run.dataset] if run.dataset and "/" in run.dataset else None,
        base_model=base_model,
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(run, task, terms) or None,
    )
    how = "trained with the PowerGrad Transform" if run.alpha is not None else "trained"
    weights = "an exponential moving average of those of training" if ema else "the last ones of training"
    sections = [
        f"# {repo_id.split('/')[-1]}",
        f"`{architecture(run.config)}`, {how}{_alpha(run)} on {terms.name}. The weights are {weights}.",
        "## Results\n\n" + _results(run),
        "## How to use it\n\n" + _usage(run.config, repo_id, task),
        "## Probabilities\n\n" + _calibration(run),
        "## Training\n\n" + _training(run, files),
        f"## Data\n\n{terms.name[0].upper()}{terms.name[1:]}. {terms.licence}"
        + ("" if license else "\n\nThe author of this model has named no licence for its weights."),
        "## Citation\n\n```bibtex\n" + CITATION + "\n```",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    return card.content


def is_hub_id(name: str) -> bool:
    """Whether a name is that of something on the Hub rather than of a local file or folder."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def architecture(config: Mapping[str, Any]) -> str:
    """The network's name, as timm or transformers knows it."""
    base = (config.get("model_args") or {}).get("base")
    return str(base or config.get("architecture") or config.get("model_type") or "model")


def shown_settings(run: Run) -> list[tuple[str, str]]:
    """The settings of a run that may be shown in public, as text."""
    shown = ((key, _public(run.settings.get(key))) for key in HYPERPARAMETERS)
    return [(key, text) for key, text in shown if text is not None and (text not in _OFF or key in _TELLING_AT_ZERO)]


def _alpha(run: Run) -> str:
    return f" (alpha = {run.alpha:g})" if run.alpha is not None else ""


def _eval_results(run: Run, task: str, terms: Terms) -> list[EvalResult]:
    kind = run.dataset or "unknown"
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=kind if is_hub_id(kind) else re.sub(r"[^\w.-]+", "-", kind),
            dataset_name=terms.name,
            dataset_split="validation",
            metric_type=METRICS[key][0],
            metric_name=METRICS[key][1],
            metric_value=float(f"{value:.6g}"),
        )
        for key, value in run.metrics.items()
    ]


def _results(run: Run) -> str:
    if not run.metrics:
        return "No evaluation has been recorded."
    images = run.settings.get("eval_images")
    where = f"On the {images:,} validation images:" if isinstance(images, int) else "On the validation set:"
    rows = [
        f"| {METRICS[key][1]} | {f'{value:.2%}' if METRICS[key][2] else f'{value:.4g}'} |"
        for key, value in run.metrics.items()
    ]
    return "\n".join([where, "", "| metric | value |", "|---|---|", *rows])


def _usage(config: Mapping[str, Any], repo_id: str, task: str) -> str:
    if task != "image-classification":
        return _block(f"""
            import transformers

            model = transformers.{_model_class(config)}.from_pretrained("{repo_id}")
        """)
    variant = "import pgt_hf.models  # pip install pgt_hf: makes this ResNet variant known to timm\n"
    first = variant if config.get("architecture") == "pgt_resnet" else ""
    blocks = [
        "A pipeline:\n\n"
        + _block(f"""
            from transformers import pipeline

            print(pipeline("image-classification", "{repo_id}")("image.jpg"))
        """).replace("```python\n", "```python\n" + first),
        "transformers:\n\n"
        + _block(f"""
            import torch
            from PIL import Image
            from transformers import AutoImageProcessor, AutoModelForImageClassification

            processor = AutoImageProcessor.from_pretrained("{repo_id}")
            model = AutoModelForImageClassification.from_pretrained("{repo_id}").eval()
            image = Image.open("image.jpg").convert("RGB")
            with torch.no_grad():
                logits = model(**processor(image, return_tensors="pt")).logits
            print(model.config.id2label[logits.argmax().item()])
        """).replace("```python\n", "```python\n" + first),
    ]
    if _is_timm(config):
        blocks.append(
            "timm:\n\n"
            + _block(f"""
                import timm
                import torch
                from PIL import Image

                model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
                transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
                image = Image.open("image.jpg").convert("RGB")
                with torch.no_grad():
                    logits = model(transform(image).unsqueeze(0))
                print(model.pretrained_cfg["label_names"][logits.argmax().item()])
            """).replace("```python\n", "```python\n" + first)
        )
    return "\n\n".join(blocks)


def _calibration(run: Run) -> str:
    alpha = run.alpha
    if alpha is None or alpha == 1:
        return "The model was trained with plain cross-entropy on its logits `z`: its probabilities are `softmax(z)`."
    fitted = f"Training fitted `softmax({alpha:g} * z)`, where `z` are the logits that it computed."
    advice = "The softmax of `z` itself is sharper, and as a rule over-confident."
    if {"ece", "ece_folded"} <= set(run.metrics):
        raw, folded = run.metrics["ece"], run.metrics["ece_folded"]
        better = f"softmax({alpha:g} * z)" if folded <= raw else "softmax(z)"
        advice = (
            f"On the validation set the expected calibration error was {raw:.4g} for `softmax(z)` and {folded:.4g} "
            f"for `softmax({alpha:g} * z)`: take `{better}` for probabilities. The best class is the same."
        )
    if run.config.get("powergrad_folded"):
        here = (
            f"In these weights the factor {alpha:g} has been multiplied into the head (`powergrad_folded` in "
            f"config.json): their logits are `{alpha:g} * z`, and a pipeline's scores are `softmax({alpha:g} * z)`."
        )
    else:
        here = "These weights give `z`; a pipeline's scores are `softmax(z)`."
    return f"{fitted} {here} {advice}"


def _training(run: Run, files: set[str]) -> str:
    rows = [f"| {key} | {value} |" for key, value in shown_settings(run)]
    table = ["| setting | value |", "|---|---|", *rows] if rows else ["No settings have been recorded."]
    versions = run.settings.get("versions") or run.settings.get("packages")
    known = ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else "not recorded"
    lines = [*table, "", f"Versions: {known}."]
    if CURVE in files:
        lines += ["", f"![Training curve]({CURVE})"]
    if REPORT in files:
        lines += ["", f"[{REPORT}]({REPORT}): curves, confusion, worst mistakes and calibration on one page."]
    return "\n".join(lines)


def _public(value: Any) -> str | None:
    """A setting as the card may show it: numbers, flags that are on, and words that are no path."""
    if value is None or value is False or isinstance(value, (dict, list)):
        return None
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if text and not re.search(r"[/\\|<>\n]", text) else None


def _model_class(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or ["AutoModel"])[0]


def _task(config: Mapping[str, Any]) -> str:
    return next((task for suffix, task in TASKS.items() if _model_class(config).endswith(suffix)), "")


def _is_timm(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "timm_wrapper"


def _libraries(config: Mapping[str, Any]) -> list[str]:
    return ["transformers", "timm"] if _is_timm(config) else ["transformers"]


def _block(code: str) -> str:
    lines = code.strip("\n").rstrip().splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "```python\n" + "\n".join(line[indent:] for line in lines) + "\n```"


def _history(run: Path, model: Path) -> list[dict[str, Any]]:
    """The log entries: of the model's own folder, else of the run, else of its newest checkpoint."""
    state = _json(model / "trainer_state.json")
    if state is not None and model != run:
        return state["log_history"]
    lines = run / "history.jsonl"
    if lines.is_file():
        return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    newest = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)[-1:]
    state = state or next((_json(path) for path in newest), None)
    return state["log_history"] if state else []


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of settings as one level, the outer one's values before those of the sections in it."""
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
