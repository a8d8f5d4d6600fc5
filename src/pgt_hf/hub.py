"""To the Hub and back: a run's model as one repository that timm, transformers and ``pipeline`` load.

    python -m pgt_hf.hub push runs/digits --repo-id alice/digits

A repository gets safetensors, config.json, the model card, the training curve and the report; never a pickle, never a
run's raw settings. To load it, the libraries' own functions are enough.
"""

import argparse
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session

from .card import CONFIG, CURVE, EMA, REPORT, WEIGHTS, Run, dataset_terms, is_hub_id, model_card, read_run
from .training_state import unpack_checkpoint
from .weights import read_header, rewrite_safetensors

__all__ = ["check_push_access", "prepare_release", "pull_checkpoint", "push_release", "push_run"]

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
# What besides the weights belongs to a model, for processors and tokenizers of any kind.
_MODEL_FILES = (
    CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "adapter_config.json",
)  # fmt: skip
_TEXT = (".json", ".jsonl", ".md", ".html", ".txt")
_PREFIX = "timm_model."  # what transformers puts before the names that timm gave a network's weights; it reads both


def check_push_access(repo_id: str, token: str | None = None, *, private: bool | None = None) -> str:
    """Makes sure, before anything is trained or uploaded, that the repository can be written to.

    It is created where it does not exist, since only that shows whether the token may.

    Args:
        repo_id: "name" or "owner/name".
        token: A token with write access; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        private: Whether a new repository is private; by default what the owner's settings say.

    Returns:
        The full "owner/name".

    Raises:
        ValueError: ``repo_id`` is not the form of a name.
        PermissionError: There is no token, it is not valid, or it may not write there.
        ConnectionError: The Hub could not be asked.

    Example:
        >>> check_push_access("alice/digits")
        'alice/digits'
    """
    api = HfApi(token=token)
    advice = "make a token with write access at https://huggingface.co/settings/tokens and run `hf auth login`"
    if token is None and get_token() is None:
        raise PermissionError(f"no Hugging Face token was found for pushing to {repo_id!r}; {advice}")
    try:
        found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(found, write=True)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 402, 403, 404):
            reason = "is not valid" if status == 401 else f"may not write to {repo_id!r} (HTTP {status})"
            raise PermissionError(f"the Hugging Face token {reason}; {advice}") from error
        raise ConnectionError(f"the Hub at {constants.ENDPOINT} answered HTTP {status}") from error
    except ValueError:
        raise
    except Exception as error:  # the transport's own errors are huggingface_hub's to choose
        raise ConnectionError(f"the Hub at {constants.ENDPOINT} could not be reached: {error}") from error
    return found


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
    """Writes what a repository will hold into a folder, without a network: to look at it, or for ``push_release``.

    Args:
        folder: A run: config.json and model.safetensors as ``save_model`` writes them, and what was recorded beside.
        target: Written to; made where it does not exist.
        repo_id: Where the model will be, for the code in the card.
        checkpoint: Take the model from this checkpoint of the run, and describe the run as it was then.
        fold: Multiply the head by alpha, so that the model's softmax gives the probabilities that PGT trained. Else
            the logits are those of the trained model, bit for bit.
        ema: Take the moving average's weights from the subfolder ``ema`` where there is one.
        license: The licence of the weights, as the Hub names it; none is claimed when not given.
        tags: More tags for the card.
        base_model: The Hub id of the model that training started from.
        pictures: Show images of the data set in the report; by default if its licence is known to allow that.

    Returns:
        ``target``.

    Raises:
        FileNotFoundError: There is no model with safetensors weights in ``folder``.
        ValueError: A file would reveal a token or a path of this machine; or ``fold`` is asked for and alpha is not
            known or cannot be folded.

    Example:
        >>> prepare_release("runs/digits", "release", "alice/digits", fold=True)
    """
    run_folder, target = Path(folder), Path(target)
    source = Path(checkpoint or folder)
    averaged = ema and (source / EMA / CONFIG).is_file()
    model = source / EMA if averaged else source
    run = read_run(run_folder, checkpoint, ema=averaged)
    target.mkdir(parents=True, exist_ok=True)

    settings = run.settings.get("card") or {}
    config = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    if run.alpha is not None:
        config |= {"powergrad_alpha": run.alpha, "powergrad_folded": fold}
    if not any(model.glob("*.safetensors")):
        raise FileNotFoundError(f"there is no {WEIGHTS} in {model}; only safetensors are published")
    prefix = _PREFIX if config.get("model_type") == "timm_wrapper" else ""
    with tempfile.TemporaryDirectory(dir=target) as folded:
        origin = _fold(model, Path(folded), run.alpha) if fold else model
        for path in origin.glob("*.safetensors"):
            rewrite_safetensors(path, target / path.name, remove_prefix=prefix)
        for path in origin.glob("*.safetensors.index.json"):
            _copy_index(path, target / path.name, prefix)
    for name in _MODEL_FILES:
        if (model / name).is_file():
            content = config if name == CONFIG else None
            _copy_without_paths(model / name, target / name, content)
    run = replace(run, config=config)
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no curve and no report: they need matplotlib (pip install 'pgt_hf[plots]')")
    else:
        _add_curve(target, run)
        if checkpoint is None:  # the evaluation that it shows is the final model's
            _add_report(run_folder, target, run, pictures)
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


def push_release(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload model",
) -> CommitInfo:
    """Uploads a folder, all of it in one commit: a push that breaks off leaves the repository as it was.

    Args:
        folder: What ``prepare_release`` wrote.
        repo_id: "name" or "owner/name"; made where it does not exist.
        token: A token with write access; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        private: Whether a new repository is private.
        revision: A branch, made where it does not exist; by default "main".
        message: The commit's title.

    Raises:
        PermissionError, ConnectionError, ValueError: As ``check_push_access``.
        OSError: The Hub failed or refused during the upload.

    Example:
        >>> push_release("release", "alice/digits", private=True)
    """
    api = HfApi(token=token)
    repo_id = check_push_access(repo_id, token, private=private)
    try:
        if revision not in (None, constants.DEFAULT_REVISION) and not str(revision).startswith("refs/"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        return _commit(api, Path(folder), repo_id, revision, message, _offers_xet(repo_id, revision, token))
    except ValueError:
        raise
    except Exception as error:  # the upload threads wrap what they met in a RuntimeError
        reason = " ".join(str(error.__cause__ or error).split())
        raise OSError(f"the push to {repo_id!r} broke off: {reason}") from error


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
    """Publishes the model of a run folder; what ``python -m pgt_hf.hub push`` calls.

    Args:
        folder: The run's folder.
        repo_id: "name" or "owner/name"; by default what the run was told (``hub_model_id``), else the folder's name.
        token: A token with write access; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        private: Whether a new repository is private.
        revision: A branch, made where it does not exist; by default "main".
        message: The commit's title.
        **release: As ``prepare_release`` takes them: ``fold``, ``ema``, ``license``, ``tags``, ``base_model``,
            ``pictures``.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, OSError, ValueError: As the functions that it calls.

    Example:
        >>> push_run("runs/digits", "alice/digits", private=True, license="apache-2.0")
    """
    settings = read_run(folder).settings
    wanted = repo_id or settings.get("hub_model_id") or Path(folder).resolve().name
    full = check_push_access(wanted, token, private=private)
    with tempfile.TemporaryDirectory() as release_folder:
        prepare_release(folder, release_folder, full, **release)
        return push_release(release_folder, full, token=token, private=private, revision=revision, message=message)


def pull_checkpoint(
    repo_id: str,
    run: str | os.PathLike[str],
    *,
    checkpoint: str = LAST_CHECKPOINT,
    token: str | None = None,
    revision: str | None = None,
) -> Path:
    """Fetches a checkpoint that ``hub_strategy="checkpoint"`` or "all_checkpoints" pushed, to go on from it here.

    Args:
        repo_id: The repository.
        run: The run's folder on this machine; the checkpoint goes there as ``checkpoint-N``.
        checkpoint: The checkpoint's folder in the repository.
        token: For a private repository; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        revision: A branch, tag or commit; by default "main".

    Returns:
        The folder for ``trainer.train(resume_from_checkpoint=...)``.

    Raises:
        FileNotFoundError: The repository holds no such checkpoint.
        FileExistsError: The run has that checkpoint already.
        OSError: The Hub could not be reached or refused.

    Example:
        >>> trainer.train(resume_from_checkpoint=pull_checkpoint("alice/digits", "runs/digits"))
    """
    snapshot = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=f"{checkpoint}/*")
    return unpack_checkpoint(Path(snapshot, checkpoint), run)


def push_command(folder: str | os.PathLike[str], repo_id: str, **options: Any) -> str:
    """The shell command that pushes a run later.

    Example:
        >>> push_command("runs/digits", "alice/digits", private=True)
        'python -m pgt_hf.hub push runs/digits --repo-id alice/digits --private'
    """
    words = ["python", "-m", "pgt_hf.hub", "push", str(folder), "--repo-id", repo_id]
    for name, value in options.items():
        if value:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def refuse_leaks(folder: Path, private_paths: Sequence[str] = ()) -> None:
    """Raises if a text file, or the header of a safetensors file, holds a token or a path of this machine.

    Raises:
        ValueError: One does; the message names the file, not the secret.
    """
    tokens = {get_token(), os.environ.get("HF_TOKEN")}
    tokens |= {value for name, value in os.environ.items() if re.search(r"(TOKEN|SECRET|PASSWORD|API_KEY)$", name)}
    secrets = {"a token or password": [token for token in tokens if token and len(token) >= 8]}
    secrets["a path of this machine"] = [path for path in {str(Path.home()), *private_paths} if len(path) > 1]
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            text = json.dumps(read_header(path))
        elif path.suffix in _TEXT:
            text = path.read_text(encoding="utf-8", errors="replace")
        else:
            continue
        for what, values in secrets.items():
            if any(value in text for value in values):
                raise ValueError(f"{path.relative_to(folder)} holds {what}, so nothing was published")


def _add_curve(target: Path, run: Run) -> None:
    from .plots import plot_training_curve

    with suppress(ValueError):  # nothing that can be drawn has been logged
        plot_training_curve(run.history, target / CURVE)


def _add_report(folder: Path, target: Path, run: Run, pictures: bool | None) -> None:
    from .report import write_report

    allowed = dataset_terms(run.dataset).redistributable if pictures is None else pictures
    write_report(folder, target / REPORT, run=run, pictures=allowed)


def _fold(model: Path, target: Path, alpha: float | None) -> Path:
    """The model with alpha in its head; it is loaded, so that any architecture's head is found as in training."""
    import transformers

    from . import models  # noqa: F401  registers this package's timm variants
    from .heads import fold_powergrad

    if alpha is None:
        raise ValueError(f"fold needs the alpha of the training, and neither {CONFIG} nor the run's settings hold it")
    config = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    network = getattr(transformers, config["architectures"][0]).from_pretrained(model, dtype="auto")
    fold_powergrad(network, alpha)
    network.save_pretrained(target)
    return target


def _copy_index(source: Path, target: Path, prefix: str) -> None:
    """The table that says which of several weight files holds a tensor."""
    index = json.loads(source.read_text(encoding="utf-8"))
    index["weight_map"] = {name.removeprefix(prefix): file for name, file in index["weight_map"].items()}
    target.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_without_paths(source: Path, target: Path, content: dict[str, Any] | None) -> None:
    """Copies a model's file; in JSON, the folder that it was once loaded from is left out."""
    if source.suffix != ".json" or source.name in ("tokenizer.json", "vocab.json"):
        shutil.copyfile(source, target)
        return
    content = json.loads(source.read_text(encoding="utf-8")) if content is None else content
    for key in ("_name_or_path", "name_or_path"):
        if not is_hub_id(str(content.get(key, ""))):
            content.pop(key, None)
    target.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _commit(api: HfApi, folder: Path, repo_id: str, revision: str | None, message: str, with_xet: bool) -> CommitInfo:
    with ExitStack() as stack:
        # A Hub without xet is sent open files: for them huggingface_hub takes the older protocol, LFS.
        operations = [
            CommitOperationAdd(
                path.relative_to(folder).as_posix(), str(path) if with_xet else stack.enter_context(path.open("rb"))
            )
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def _offers_xet(repo_id: str, revision: str | None, token: str | None) -> bool:
    """Whether the Hub gives out xet tokens; huggingface_hub itself takes that for granted."""
    branch = (revision or constants.DEFAULT_REVISION).replace("/", "%2F")
    url = f"{constants.ENDPOINT}/api/models/{repo_id}/xet-write-token/{branch}"
    return get_session().get(url, headers=build_hf_headers(token=token)).status_code == 200


def _release_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "fold": options.fold,
        "ema": not options.no_ema,
        "license": options.license,
        "base_model": options.base_model,
        "pictures": options.pictures or None,  # else what the data set's licence allows
    }


def _export(options: argparse.Namespace) -> Path:
    name = options.repo_id or f"you/{Path(options.run).resolve().name}"
    return prepare_release(options.run, options.target, name, **_release_options(options))


def _push(options: argparse.Namespace) -> str:
    private = options.private or None  # else the owner's settings hold
    where = {"private": private, "revision": options.revision, "message": options.message}
    return push_run(options.run, options.repo_id, **where, **_release_options(options)).commit_url


def _pull(options: argparse.Namespace) -> Path:
    return pull_checkpoint(options.repo_id, options.run, checkpoint=options.checkpoint, revision=options.revision)


_COMMANDS = {"push": _push, "export": _export, "pull": _pull}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Example:
        >>> main(["push", "runs/digits", "--repo-id", "alice/digits"])
    """
    parser = argparse.ArgumentParser(prog="python -m pgt_hf.hub", description="Publish a run's model on the Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="push a run's model, card, curve and report")
    export = commands.add_parser("export", help="write what would be pushed into a folder, to look at it")
    for command in (push, export):
        command.add_argument("run", help="the run's folder")
        command.add_argument("--repo-id", help="owner/name; by default what the run was told, or its folder's name")
        command.add_argument("--fold", action="store_true", help="multiply the head by alpha: calibrated softmax")
        command.add_argument("--no-ema", action="store_true", help="the last weights, not their moving average")
        command.add_argument("--license", help="the licence of the weights, such as apache-2.0")
        command.add_argument("--pictures", action="store_true", help="show the data set's images in the report")
        command.add_argument("--base-model", help="Hub id of the model that training started from")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", help="branch to push to; made where it does not exist")
    push.add_argument("--message", default="Upload model", help="title of the commit")
    export.add_argument("target", help="the folder to write")
    pull = commands.add_parser("pull", help="fetch a checkpoint that was pushed, to go on from it")
    pull.add_argument("repo_id", help="owner/name")
    pull.add_argument("run", help="the run's folder on this machine")
    pull.add_argument("--checkpoint", default=LAST_CHECKPOINT, help="its folder in the repository")
    pull.add_argument("--revision", help="branch, tag or commit")
    options = parser.parse_args(arguments)
    try:
        print(_COMMANDS[options.command](options))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
