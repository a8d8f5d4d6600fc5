"""A run's model as one repository that timm, transformers and ``pipeline`` load.

It contains safetensors, config.json, the model card, the training curve and the report; never a pickle or a run's raw
settings.
"""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, snapshot_download

from ..extras import require
from ..limits import WritableFolder, checked
from ..runs.dataset_terms import dataset_terms
from ..runs.record import CONFIG, CURVE, REPORT, WEIGHTS, Run, is_hub_id, model_folder, read_evaluation, read_run
from .card import check_claims, model_card
from .checkpoint_files import unpack_checkpoint
from .safetensors_layout import read_header, rewrite_safetensors
from .upload import check_push_access, check_repo_id, push_release, refuse_leaks

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
# The files of a model besides its weights, for processors and tokenizers of any kind.
_MODEL_FILES = (
    CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "adapter_config.json",
)  # fmt: skip
_PREFIX = "timm_model."  # transformers' prefix of timm's names for weights; it reads them without it as well


@checked
def prepare_release(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    repo_id: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    fold: bool = False,
    ema: bool = True,
    license: str | None = None,
    tags: Sequence[str] = (),
    base_model: str | None = None,
    pictures: bool | None = None,
) -> Path:
    """Writes a repository's files to a folder, offline, for review or for ``push_release``; returns the folder.

    Args:
        folder: A run, with config.json and model.safetensors as ``save_model`` writes them.
        target: The folder to write to; created if it does not exist.
        repo_id: The repository's name, for the code in the card.
        checkpoint: Take the model from this checkpoint of the run, and describe the run as it was then.
        fold: Multiply the head by alpha, so that the model's softmax gives the probabilities that PGT trained. By
            default the logits are those of the trained model, bit for bit.
        ema: Take the moving average's weights from the subfolder ``ema``, if there is one.
        license: The licence of the weights, as the Hub names it; none is claimed by default.
        tags: More tags for the card.
        base_model: The Hub id of the model that training started from.
        pictures: Show images of the data set in the report; by default if its licence is known to allow it.

    Raises:
        FileNotFoundError: There is no model with safetensors weights in ``folder``.
        ValueError: A file would reveal a token or a path of this machine, or alpha cannot be folded.

    Example:
        >>> prepare_release("runs/digits", "release", "alice/digits", fold=True)
    """
    run_folder, target = Path(folder), Path(target)
    check_repo_id(repo_id)
    check_claims(license, base_model)
    WritableFolder().check("target", target)
    if target.resolve() in {place.resolve() for place in (run_folder, Path(checkpoint or folder))}:
        raise ValueError(f"target must be another folder than the run's own, got {os.fspath(target)!r}")
    source = Path(checkpoint or folder)
    model = model_folder(source) if ema else source
    averaged = model != source
    run = read_run(run_folder, checkpoint, ema=averaged)
    settings = run.settings.get("card") or {}
    config = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    fold = fold and not config.get("powergrad_folded")  # as fine-tuning with --fold saves it
    if fold and run.alpha is None:
        raise ValueError(f"fold needs the training's alpha, which neither {CONFIG} nor the run's settings contain")
    if run.alpha is not None:
        config |= {"powergrad_alpha": run.alpha, "powergrad_folded": fold or bool(config.get("powergrad_folded"))}
    if not any(model.glob("*.safetensors")):
        raise FileNotFoundError(f"there is no {WEIGHTS} in {model}; only safetensors are published")
    for path in model.glob("*.safetensors"):
        read_header(path)  # raises for a damaged file, before anything is written
    if "model_type" not in config:
        raise ValueError(f"{os.fspath(model / CONFIG)!r} must be the config of a model, it names no model_type")

    target.mkdir(parents=True, exist_ok=True)
    prefix = _PREFIX if config.get("model_type") == "timm_wrapper" else ""
    with tempfile.TemporaryDirectory(dir=target) as folded:
        origin = _fold(model, Path(folded), run.alpha) if fold and run.alpha is not None else model
        for path in origin.glob("*.safetensors"):
            rewrite_safetensors(path, target / path.name, remove_prefix=prefix)
        for path in origin.glob("*.safetensors.index.json"):
            _copy_index(path, target / path.name, prefix)
    for name in _MODEL_FILES:
        if (model / name).is_file():
            content = config if name == CONFIG else None
            _copy_without_paths(model / name, target / name, content)
    run = replace(run, config=config)
    if fold:
        run = run.folded()
    try:
        require("matplotlib", "a curve and a report")
        require("evaluate", "a report")
    except ImportError as error:
        logger.warning("nothing is drawn: %s", error)
    else:
        from ..analysis.run_plots import plot_training_curve

        with suppress(ValueError):  # nothing that can be drawn has been logged
            plot_training_curve(run.history, target / CURVE)
        if checkpoint is None:  # the evaluation that it shows is the final model's
            _add_report(run_folder, target, run, fold, pictures)
    card = model_card(
        run,
        repo_id,
        license=license or settings.get("license"),
        tags=[*(settings.get("tags") or ()), *tags],
        base_model=base_model or settings.get("base_model"),
        ema=averaged,
        files=[path.name for path in target.iterdir()],
    )
    (target / "README.md").write_text(card, encoding="utf-8")
    refuse_leaks(target, [str(run_folder.absolute()), str(source.absolute())])
    return target


@checked
def push_run(
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload model",
    **release: Any,
) -> CommitInfo:
    """Publishes the model of a run, like ``pgt-hf push``.

    ``repo_id`` defaults to the recorded ``hub_model_id`` or the folder's name. ``release`` are options of
    ``prepare_release``, the others those of ``push_release``.

    Example:
        >>> push_run("runs/digits", "alice/digits", private=True, license="apache-2.0")
    """
    settings = read_run(folder).settings
    wanted = repo_id or settings.get("hub_model_id") or Path(folder).resolve().name
    check_repo_id(wanted)
    check_claims(**release)  # before the repository is created
    full = check_push_access(wanted, token, private=private)
    with tempfile.TemporaryDirectory() as release_folder:
        prepare_release(folder, release_folder, full, **release)
        return push_release(release_folder, full, token=token, private=private, revision=revision, message=message)


@checked
def pull_checkpoint(
    repo_id: str,
    run: str | os.PathLike[str],
    *,
    checkpoint: str = LAST_CHECKPOINT,
    token: str | None = None,
    revision: str | None = None,
) -> Path:
    """Downloads a checkpoint that ``hub_strategy="checkpoint"`` or "all_checkpoints" pushed, to resume from it.

    Args:
        repo_id: The repository.
        run: The run's local folder; the checkpoint becomes ``checkpoint-N`` in it.
        checkpoint: The checkpoint's folder in the repository.
        token: For a private repository; by default that of ``hf auth login`` or ``HF_TOKEN``.
        revision: A branch, tag or commit; by default "main".

    Raises:
        FileNotFoundError: The repository has no such checkpoint.
        FileExistsError: The run already has that checkpoint.
        OSError: The Hub could not be reached, or refused.

    Example:
        >>> trainer.train(resume_from_checkpoint=pull_checkpoint("alice/digits", "runs/digits"))
    """
    check_repo_id(repo_id)
    if not re.fullmatch(r"[\w-][\w.-]*", checkpoint):
        raise ValueError(f"checkpoint must be the name of a folder in the repository, got {checkpoint!r}")
    WritableFolder().check("run", run)
    try:
        snapshot = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=f"{checkpoint}/*")
    except OSError as error:
        raise OSError(f"{repo_id!r} cannot be read: {' '.join(str(error).split())}") from error
    return unpack_checkpoint(Path(snapshot, checkpoint), run)


def _add_report(folder: Path, target: Path, run: Run, fold: bool, pictures: bool | None) -> None:
    from ..runs.report import write_report

    allowed = dataset_terms(run.dataset).redistributable if pictures is None else pictures
    evaluation = read_evaluation(folder)
    if fold and evaluation is not None and run.alpha:
        evaluation = evaluation.folded(run.alpha)
    write_report(folder, target / REPORT, run=run, evaluation=evaluation, pictures=allowed)


def _fold(model: Path, target: Path, alpha: float) -> Path:
    """The model with alpha in its head; it is loaded to find the head as in training."""
    import transformers

    from ..heads import fold_powergrad
    from ..images import models  # noqa: F401  registers this package's timm variants

    config = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    network = getattr(transformers, config["architectures"][0]).from_pretrained(model, dtype="auto")
    fold_powergrad(network, alpha)
    network.save_pretrained(target)
    return target


def _copy_index(source: Path, target: Path, prefix: str) -> None:
    """Copies the table that maps tensors to one of several weight files."""
    index = json.loads(source.read_text(encoding="utf-8"))
    index["weight_map"] = {name.removeprefix(prefix): file for name, file in index["weight_map"].items()}
    target.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_without_paths(source: Path, target: Path, content: dict[str, Any] | None) -> None:
    """Copies a model's file; JSON without the local folder that the model was loaded from."""
    if source.suffix != ".json" or source.name in ("tokenizer.json", "vocab.json"):
        shutil.copyfile(source, target)
        return
    content = json.loads(source.read_text(encoding="utf-8")) if content is None else content
    for key in ("_name_or_path", "name_or_path"):
        if not is_hub_id(str(content.get(key, ""))):
            content.pop(key, None)
    target.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
