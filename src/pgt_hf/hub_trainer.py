"""Trainer's way to the Hub, such that no failure of the Hub stops a training or loses a checkpoint.

What is uploaded is copied first and sent by a thread of its own, so training and the rotation of checkpoints go on
beside it. What could not be pushed is said, with the command that pushes it later.
"""

import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy

from .arguments import PowerGradTrainingArguments
from .card import model_card, read_run
from .hub import LAST_CHECKPOINT, check_push_access, prepare_release, push_command, push_release
from .training_state import pack_checkpoint

__all__ = ["HubTrainer"]

logger = logging.getLogger(__name__)

_PACKAGES = ("pgt_hf", "torch", "transformers", "timm", "accelerate", "datasets")
_STAGE = "_hub-"  # folders of what is being uploaded, in the output folder
_FIRST_ANSWER = 60.0  # seconds that the Hub may take before training starts without it


class HubTrainer(Trainer):
    """Trainer whose pushes hold what ``prepare_release`` writes, and whose Hub may fail.

    ``push_to_hub`` and the ``hub_*`` arguments mean what they mean in Trainer. A token that is refused, or that may
    not write to the repository, is an error before the first step; a Hub that cannot be reached then is a warning. In
    training, a push that fails is a warning. The end of training, and ``push_to_hub()``, which returns None in that
    case, log what was not pushed and how to push it later.

    Raises:
        PermissionError: ``args.push_to_hub``, and the token is missing, refused, or may not write there.
        ValueError: ``args.push_to_hub``, and the model is none that could be loaded from the Hub.

    Example:
        >>> args = PowerGradTrainingArguments("out", push_to_hub=True, hub_model_id="alice/digits")
        >>> trainer = HubTrainer(model, args, train_dataset=dataset)
    """

    args: PowerGradTrainingArguments
    unpushed: str | None = None  # what the last failed push was to bring, until one succeeds
    _push: "_Background | None" = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not self.is_world_process_zero():
            return
        if not hasattr(self.model, "config"):
            raise ValueError(
                f"push_to_hub needs a transformers model, got a {type(self.model).__name__}, which could not be "
                "loaded from the Hub; pgt_hf.models.create_model makes one of any timm network"
            )
        for stage in Path(self.args.output_dir).glob(f"{_STAGE}*"):  # of a program that was killed while it pushed
            shutil.rmtree(stage, ignore_errors=True)
        self.hub_model_id = self._repo_id()
        private = self.args.hub_private_repo if private is None else private
        asking = _Background(lambda: check_push_access(self._repo_id(), token or self.args.hub_token, private=private))
        try:
            self.hub_model_id = asking.result(min(_FIRST_ANSWER, self.args.hub_timeout))
        except (ConnectionError, TimeoutError) as error:
            logger.warning("%s. Training starts all the same; each push will try again.", error)

    def create_model_card(
        self,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
    ) -> None:
        """Writes README.md, and what it was made from, into the output folder, which must hold the model already.

        Args:
            license: The licence of the weights, as the Hub names it.
            tags: More tags.
            finetuned_from: The Hub id of the model that training started from.
            dataset: The Hub id or name of the data set, where no recipe has recorded it.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        self._record({"license": license, "tags": tags, "base_model": finetuned_from}, dataset)
        folder = Path(self.args.output_dir)
        files = [path.name for path in folder.iterdir()]
        card = model_card(
            read_run(folder), self._repo_id(), license=license, tags=tags, base_model=finetuned_from, files=files
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._wait_for_push()
        where: dict[str, Any] = {"token": token, "revision": revision, "private": private}
        self._start_push("the model", commit_message or "End of training", **where)
        return self._finish_current_push() if blocking else None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        token, self.args.hub_token = self.args.hub_token, None  # training_args.bin keeps the arguments as they are
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._push is not None and self._push.is_alive() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        checkpoint = Path(checkpoint_folder)
        self._start_push(f"the model of {checkpoint.name}", f"Training in progress, {when}", checkpoint)

    def _finish_current_push(self) -> CommitInfo | None:
        info = self._wait_for_push()
        if self.unpushed is not None:
            options = {
                "private": self.args.hub_private_repo,
                "revision": self.args.hub_revision,
                "fold": self.args.hub_fold,
            }
            command = push_command(self.args.output_dir, self._repo_id(), **options)
            logger.error(
                "NOT PUSHED: %s. Nothing is lost: it lies in %s. To push it later:\n    %s",
                self.unpushed,
                self.args.output_dir,
                command,
            )
        return info

    def _repo_id(self) -> str:
        known = getattr(self, "hub_model_id", None) or self.args.hub_model_id
        return known or Path(self.args.output_dir).absolute().name

    def _wait_for_push(self) -> CommitInfo | None:
        if self._push is None:
            return None
        try:
            return self._push.result(self.args.hub_timeout)
        except TimeoutError as error:
            self._note_failure("the model", error)
            return None

    def _start_push(
        self,
        what: str,
        message: str,
        checkpoint: Path | None = None,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Copies now, uploads in the background, after an earlier upload that is still under way."""
        folder = Path(self.args.output_dir)
        where: dict[str, Any] = {
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "private": self.args.hub_private_repo if private is None else private,
        }
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))
        try:
            if checkpoint is not None:
                self._record({}, None)
                self._add_checkpoint(checkpoint, stage)
            prepare_release(folder, stage, self._repo_id(), checkpoint=checkpoint, fold=self.args.hub_fold)
        except Exception as error:  # a full disk, a model that cannot be folded: no reason to stop either
            shutil.rmtree(stage, ignore_errors=True)
            self._note_failure(what, error)
            return
        earlier = self._push

        def upload() -> CommitInfo | None:
            if earlier is not None:
                earlier.join()
            try:
                info = push_release(stage, self._repo_id(), message=message, **where)
            except Exception as error:  # whatever the Hub does, training goes on
                self._note_failure(what, error)
                return None
            finally:
                shutil.rmtree(stage, ignore_errors=True)
            self.unpushed = None
            logger.info("pushed %s: %s", what, info.commit_url)
            return info

        self._push = _Background(upload)

    def _add_checkpoint(self, checkpoint: Path, stage: Path) -> None:
        """What training resumes from, where ``hub_strategy`` asks for it."""
        names = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        name = names.get(self.args.hub_strategy)
        if name is not None:
            pack_checkpoint(checkpoint, stage / name)

    def _note_failure(self, what: str, error: Exception) -> None:
        self.unpushed = f"{what} to {self._repo_id()} ({type(error).__name__}: {error})"
        logger.warning("could not push %s", self.unpushed)

    def _record(self, card: dict[str, Any], dataset: str | None) -> None:
        """What a later push needs to know; it stays in the output folder, on this machine."""
        folder = Path(self.args.output_dir)
        path = folder / "trainer_run.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        card = {key: value for key, value in card.items() if value} or earlier.get("card", {})
        content = {
            "arguments": self.args.to_dict(),  # with its tokens masked
            "hub_model_id": self._repo_id(),
            "batch": self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            "world_size": self.args.world_size,
            "versions": {name: found for name in _PACKAGES if (found := _version(name))},
            "dataset_name": dataset or earlier.get("dataset_name"),
            "card": card,
        }
        path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        self.state.save_to_json(str(folder / "trainer_state.json"))


class _Background(threading.Thread):
    """A call in a thread that does not keep the program alive."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call, self._value = call, None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

    def result(self, timeout: float) -> Any:
        self.join(timeout)
        if self.is_alive():
            raise TimeoutError(f"the Hub has not answered within {timeout:g} seconds")
        if self._error is not None:
            raise self._error
        return self._value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
