"""The model card of a run, generated from its recorded settings and results.

Only listed fields are shown, so that no path, host or token in a run's settings reaches the card.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2  # comes with torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..limits import RepoId, checked, near
from ..runs.dataset_terms import Terms, dataset_terms
from ..runs.record import CURVE, METRICS, REPORT, Run, architecture, is_hub_id, shown_metrics, shown_settings

TASKS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
}

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = tuple(Path(__file__).with_name("licenses.txt").read_text(encoding="utf-8").split())

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(),
    trim_blocks=True,
    lstrip_blocks=True,
)


def check_claims(license: str | None = None, base_model: str | None = None, **others: Any) -> None:
    """Raises an error unless the licence, if any, is one of the Hub's, and the base model, if any, a Hub id."""
    if license is not None and license not in LICENSES:
        raise ValueError(
            f"license must be one of the Hub's {len(LICENSES)}, such as apache-2.0, mit, cc-by-4.0 or other, got "
            f"{license!r}{near(license, LICENSES)}"
        )
    if base_model is not None:
        RepoId().check("base_model", base_model)


@checked
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
        run: The result of ``read_run``; ``run.config["powergrad_folded"]`` says whether alpha is in the weights.
        repo_id: The repository's name, for the code in the card.
        license: The licence of the weights, as the Hub names it ("apache-2.0"); none is claimed by default.
        tags: More tags.
        base_model: The Hub id of the model that training started from.
        ema: Whether the weights are an exponential moving average.
        files: The files in the repository; the card shows the curve and the report if they are among them.

    Raises:
        ValueError: ``license`` is none of the Hub's, or huggingface_hub does not accept the metadata.

    Example:
        >>> print(model_card(read_run("runs/digits"), "alice/digits"))
    """
    RepoId().check("repo_id", repo_id)
    check_claims(license)
    task, terms = _task(run.config), dataset_terms(run.dataset)
    is_timm = run.config.get("model_type") == "timm_wrapper"
    libraries = ["timm", "transformers"] if is_timm else ["transformers"]
    data = ModelCardData(
        license=license,
        library_name=libraries[0],
        pipeline_tag=task or None,
        tags=sorted({*filter(None, [task]), "powergrad-transform", "arxiv:2111.12495", *libraries, *tags}),
        datasets=[run.dataset] if run.dataset and "/" in run.dataset else None,
        base_model=base_model,
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(run, task, terms) or None,
    )
    images, versions = run.settings.get("eval_images"), run.settings.get("packages") or {}
    card = _TEMPLATES.get_template("card.md").render(
        metadata=data.to_yaml(),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        network=architecture(run.config),
        model_class=_model_class(run.config),
        alpha=run.alpha,
        terms=terms,
        ema=ema,
        metrics=shown_metrics(run),
        images=images if isinstance(images, int) else None,
        task=task,
        timm=is_timm,
        # This package makes its ResNet variant known to timm.
        first="import pgt_hf.models  # pip install pgt_hf\n" if run.config.get("architecture") == "pgt_resnet" else "",
        probabilities=_calibration(run),
        settings=shown_settings(run),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        curve=CURVE,
        report=REPORT,
        files=set(files),
        license=license,
    )
    return ModelCard(card).content


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


def _calibration(run: Run) -> str:
    """What training fitted, and which probabilities were measured to be best."""
    alpha, folded = run.alpha, run.config.get("powergrad_folded")
    sentences = ["A pipeline's scores are `softmax(z)`, where `z` are the logits of these weights."]
    if alpha is None or alpha == 1:
        sentences.append("The model was trained with plain cross-entropy, which fits them.")
    elif folded:
        sentences.append(
            f"They are what training fitted: the factor alpha = {alpha:g} has been multiplied into the head "
            "(`powergrad_folded` in config.json)."
        )
    else:
        sentences.append(f"Training fitted `softmax({alpha:g} * z)`, which is less sharp.")
    if len(run.nll_by_scale) > 1:
        found = [f"{nll:.4g} for `{_formula(scale, alpha)}`" for scale, nll in run.nll_by_scale.items()]
        sentences.append(
            f"On the validation set, the negative log-likelihood was {', '.join(found[:-1])} and {found[-1]}: take "
            f"`{_formula(run.scale, alpha)}` for probabilities. The best class is the same."
        )
    elif alpha not in (None, 1) and not folded:
        sentences.append("Which of the two is calibrated better has not been measured.")
    return " ".join(sentences)


def _formula(scale: float, alpha: float | None) -> str:
    if scale == 1:
        return "softmax(z)"
    return f"softmax({scale:g} * z)" if scale == alpha else f"softmax(z / {1 / scale:.3g})"


def _model_class(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or ["AutoModel"])[0]


def _task(config: Mapping[str, Any]) -> str:
    return next((task for suffix, task in TASKS.items() if _model_class(config).endswith(suffix)), "")
