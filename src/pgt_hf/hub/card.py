"""The model card of a run, generated from its recorded settings and results.

Only listed fields are shown, so that no path, host or token in a run's settings reaches the card.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..limits import RepoId, checked, near
from ..runs.dataset_terms import Terms, dataset_terms
from ..runs.record import CURVE, METRICS, REPORT, Run, architecture, is_hub_id, shown_settings

TASKS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
}


# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = tuple(Path(__file__).with_name("licenses.txt").read_text(encoding="utf-8").split())


def check_license(license: str) -> None:
    """Raises ValueError unless it is a licence as the Hub names them.

    Example:
        >>> check_license("apache-2.0")
    """
    if license not in LICENSES:
        raise ValueError(
            f"license must be one of the Hub's {len(LICENSES)}, such as apache-2.0, mit, cc-by-4.0 or other, got "
            f"{license!r}{near(license, LICENSES)}"
        )


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
        run: What ``read_run`` read; ``run.config["powergrad_folded"]`` says whether alpha is in the weights.
        repo_id: Where the model will be, as the code in the card names it.
        license: The model's own licence, as the Hub names it ("apache-2.0"); none is claimed when not given.
        tags: More tags.
        base_model: The Hub id of the model that training started from.
        ema: Whether the weights are an exponential moving average.
        files: What lies beside the card; the curve and the report are shown if they are among them.

    Raises:
        ValueError: ``license`` is none of the Hub's, or huggingface_hub does not accept the metadata.

    Example:
        >>> print(model_card(read_run("runs/digits"), "alice/digits"))
    """
    RepoId().check("repo_id", repo_id)
    if license is not None:
        check_license(license)
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
    unlicensed = "" if license else "\n\nThe author of this model has named no licence for its weights."
    card = _read("card.md").substitute(
        metadata=data.to_yaml(),
        name=repo_id.split("/")[-1],
        summary=f"`{architecture(run.config)}`, {how}{_alpha(run)} on {terms.name}. The weights are {weights}.",
        results=_results(run),
        usage=_usage(run.config, repo_id, task),
        probabilities=_calibration(run),
        training=_training(run, files),
        data=f"{terms.name[0].upper()}{terms.name[1:]}. {terms.licence}{unlicensed}",
    )
    return ModelCard(card).content


def _read(name: str) -> Template:
    return Template(Path(__file__).with_name(name).read_text(encoding="utf-8"))


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
    """Code that runs as it is."""
    if task != "image-classification":
        return _read("usage.md").substitute(repo_id=repo_id, model_class=_model_class(config)).strip()
    # This package makes its ResNet variant known to timm.
    first = "import pgt_hf.models  # pip install pgt_hf\n" if config.get("architecture") == "pgt_resnet" else ""
    text = _read("usage_images.md").substitute(repo_id=repo_id, first=first)
    return (text if _is_timm(config) else text.partition("timm:\n")[0]).strip()


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


def _training(run: Run, files: set[str]) -> str:
    rows = [f"| {key} | {value} |" for key, value in shown_settings(run)]
    table = ["| setting | value |", "|---|---|", *rows] if rows else ["No settings have been recorded."]
    versions = run.settings.get("packages")
    known = ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else "not recorded"
    lines = [*table, "", f"Versions: {known}."]
    if CURVE in files:
        lines += ["", f"![Training curve]({CURVE})"]
    if REPORT in files:
        lines += ["", f"[{REPORT}]({REPORT}): curves, confusion, worst mistakes and calibration on one page."]
    return "\n".join(lines)


def _model_class(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or ["AutoModel"])[0]


def _task(config: Mapping[str, Any]) -> str:
    return next((task for suffix, task in TASKS.items() if _model_class(config).endswith(suffix)), "")


def _is_timm(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "timm_wrapper"


def _libraries(config: Mapping[str, Any]) -> list[str]:
    return ["transformers", "timm"] if _is_timm(config) else ["transformers"]
