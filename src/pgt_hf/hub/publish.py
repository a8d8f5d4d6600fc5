"""``PublishCallback``: pushes a Trainer's model to the Hub; no Hub failure stops training or loses a file.

Files are copied first and uploaded by a thread while training goes on. A failed push is logged with the command that
pushes it later.
"""

import logging
import math
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import CommitInfo
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from ..limits import OneOf, Positive, checked
from ..runs.environment import package_versions
from ..runs.folder import add_to_record
from ..runs.record import STATE, read_record, read_run
from .card import model_card
from .checkpoint_files import pack_checkpoint
from .release import LAST_CHECKPOINT, prepare_release
from .upload import check_push_access, check_repo_id, push_release

logger = logging.getLogger(__name__)

_STAGE = "_hub-"  # folders of what is being uploaded, in the output folder
_FIRST_ANSWER = 60.0  # seconds that the Hub may take before training starts without it


class PublishCallback(TrainerCallback):
    """Publishes what ``prepare_release`` writes, at each checkpoint and when ``push`` is called after training.

    A token that may not write to the repository is an error before the first step; an unreachable Hub is a warning,
    then and while training. The end of training and ``push`` log what was not pushed, and how to push it later. Only
    the first process talks to the Hub.

    ``PowerGradTrainer`` adds it if ``push_to_hub=True``, with the ``hub_*`` arguments.

    Args:
        repo_id: "name" or "owner/name"; by default the output folder's name.
        token: A token with write access; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        private: Whether a new repository is private; by default what the owner's settings say.
        revision: A branch, created if it does not exist; by default "main".
        strategy: "end" pushes nothing before ``push`` is called, "every_save" the model of each checkpoint,
            "checkpoint" also what training resumes from, "all_checkpoints" that of every checkpoint.
        always: Push at a checkpoint even if an earlier upload is still under way.
        fold: Publish weights with alpha multiplied into the head.
        timeout: Seconds that training may wait for the Hub, in all. After that nothing is pushed any more; the files
            stay in the output folder.

    Raises:
        PermissionError: When a Trainer is made: the token is missing, refused, or may not write there.
        TypeError, ValueError: An argument is not allowed; when a Trainer is made: its model could not be loaded from
            the Hub.

    Example:
        >>> publish = PublishCallback("alice/digits")
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[publish])
        >>> trainer.train()
        >>> publish.push(trainer, dataset="digits")
    """

    @checked
    def __init__(
        self,
        repo_id: str | None = None,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        strategy: Annotated[str, OneOf([known.value for known in HubStrategy])] = "every_save",
        always: bool = False,
        fold: bool = False,
        timeout: Positive = 600.0,
    ) -> None:
        if repo_id is not None:
            check_repo_id(repo_id)
        self.repo_id = repo_id
        self.unpushed: str | None = None  # what the last push failed to bring
        self._where: dict[str, Any] = {"token": token, "private": private, "revision": revision}
        self._strategy, self._always, self._fold, self._left = HubStrategy(strategy), always, fold, timeout
        self._upload: Future[CommitInfo | None] | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Checks, before the first step, that the token may write to the repository."""
        if not state.is_world_process_zero:
            return
        model = kwargs.get("model")
        if not hasattr(model, "config"):
            raise ValueError(
                f"publishing needs a transformers model, got a {type(model).__name__}, which could not be loaded from "
                "the Hub; pgt_hf.images.create_model makes one of any timm network"
            )
        _remove_stages(args)  # of a program that was killed while it pushed
        self.repo_id = self.repo_id or Path(str(args.output_dir)).absolute().name
        token, private = self._where["token"], self._where["private"]
        asking = _in_background(partial(check_push_access, self.repo_id, token, private=private))
        try:
            self.repo_id = self._result(asking, _FIRST_ANSWER)
        except (ConnectionError, TimeoutError) as error:
            logger.warning("%s. Training starts anyway; each push will try again.", error)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if not state.is_world_process_zero or self._strategy == HubStrategy.END or not checkpoint.is_dir():
            return
        if self._upload is not None and not self._upload.done() and not self._always:
            return
        by_steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {state.global_step}" if by_steps else f"epoch {int(state.epoch or 0)}"
        self._record(args, state)
        self._start(f"the model of {checkpoint.name}", f"Training in progress, {when}", args, self._where, checkpoint)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._finish(args)

    def push(
        self,
        trainer: Any,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """Saves and publishes the trainer's model as it is now; call it on all processes.

        ``token``, ``revision`` and ``private`` override the callback's own; ``card`` goes to ``write_card``.

        Returns:
            The commit; None if the push failed, is still under way, or is another process's.
        """
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        self.write_card(trainer, **card)
        self._wait(trainer.args)
        given = {"token": token, "revision": revision, "private": private}
        where = self._where | {key: value for key, value in given.items() if value is not None}
        if self._left > 0:
            self._start("the model", commit_message or "End of training", trainer.args, where)
        return self._finish(trainer.args) if blocking else None

    def write_card(
        self,
        trainer: Any,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
    ) -> None:
        """Writes README.md into the output folder, which must hold the model already, and records its sources.

        Args:
            trainer: Any Trainer that has this callback.
            license: The licence of the weights, as the Hub names it.
            tags: More tags.
            finetuned_from: The Hub id of the model that training started from.
            dataset: The Hub id or name of the data set, if no recipe has recorded it.
        """
        if not trainer.is_world_process_zero():
            return
        folder = Path(trainer.args.output_dir)
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        known = {"license": license, "tags": tags, "base_model": finetuned_from}
        self._record(trainer.args, trainer.state, {key: value for key, value in known.items() if value}, dataset)
        files = [path.name for path in folder.iterdir()]
        run = read_run(folder)
        card = model_card(run, str(self.repo_id), license=license, tags=tags, base_model=finetuned_from, files=files)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _record(
        self, args: Any, state: TrainerState, card: dict[str, Any] | None = None, dataset: str | None = None
    ) -> None:
        """Records what a later push needs, in the output folder."""
        known = read_record(args.output_dir)
        content: dict[str, Any] = {"hub_model_id": self.repo_id}
        if card:
            content["card"] = card
        if dataset:
            content["dataset_name"] = dataset
        if "environment" not in known:  # no RunFolder keeps the record
            content |= {
                "arguments": args.to_dict(),  # with its tokens masked
                "batch": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
                "world_size": args.world_size,
                "packages": package_versions(),
            }
        add_to_record(args.output_dir, content)
        state.save_to_json(str(Path(args.output_dir, STATE)))

    def _start(
        self, what: str, message: str, args: Any, where: dict[str, Any], checkpoint: Path | None = None
    ) -> None:
        """Copies now; uploads in the background, after any earlier upload."""
        folder, repo_id = Path(args.output_dir), str(self.repo_id)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))
        try:
            if checkpoint is not None and self._strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                name = LAST_CHECKPOINT if self._strategy == HubStrategy.CHECKPOINT else checkpoint.name
                pack_checkpoint(checkpoint, stage / name)
            prepare_release(folder, stage, repo_id, checkpoint=checkpoint, fold=self._fold)
        except Exception as error:  # a full disk, a model that cannot be folded: no reason to stop either
            shutil.rmtree(stage, ignore_errors=True)
            self._note_failure(what, error)
            return

        def upload() -> CommitInfo | None:
            try:
                info = push_release(stage, repo_id, message=message, **where)
            except Exception as error:  # whatever the Hub does, training goes on
                self._note_failure(what, error)
                return None
            finally:
                shutil.rmtree(stage, ignore_errors=True)
            self.unpushed = None
            logger.info("pushed %s: %s", what, info.commit_url)
            return info

        self._upload = _in_background(upload, after=self._upload)

    def _wait(self, args: Any) -> CommitInfo | None:
        if self._upload is None:
            return None
        try:
            return self._result(self._upload)
        except TimeoutError as error:
            self._note_failure("the model", error)
            _remove_stages(args)
            return None

    def _result(self, call: Future[Any], most: float = math.inf) -> Any:
        """Waits for the Hub, at most for what is left of ``timeout``."""
        started, patience = time.monotonic(), max(0.0, min(most, self._left))
        answered = wait([call], patience).done
        self._left -= time.monotonic() - started
        if not answered:
            raise TimeoutError(f"the Hub has not answered within {patience:.3g} seconds")
        return call.result()

    def _finish(self, args: Any) -> CommitInfo | None:
        info = self._wait(args)
        if self.unpushed is not None:
            words = ["pgt-hf", "push", str(args.output_dir), "--repo-id", str(self.repo_id)]
            words += ["--private"] * bool(self._where["private"]) + ["--fold"] * self._fold
            words += ["--revision", self._where["revision"]] if self._where["revision"] else []
            logger.error(
                "NOT PUSHED: %s. Nothing is lost: the files are in %s. To push them later:\n    %s",
                self.unpushed,
                args.output_dir,
                shlex.join(words),
            )
        return info

    def _note_failure(self, what: str, error: Exception) -> None:
        self.unpushed = f"{what} to {self.repo_id} ({type(error).__name__}: {error})"
        logger.warning("could not push %s", self.unpushed)


def take_over(trainer: Any) -> PublishCallback:
    """Replaces Trainer's own methods for the Hub by those of its ``PublishCallback``, made if there is none."""
    callbacks = trainer.callback_handler.callbacks
    publish = next((callback for callback in callbacks if isinstance(callback, PublishCallback)), None)
    if publish is None:
        args = trainer.args
        publish = PublishCallback(
            args.hub_model_id,
            token=args.hub_token,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            strategy=args.hub_strategy,
            always=args.hub_always_push,
            fold=getattr(args, "hub_fold", False),
            timeout=getattr(args, "hub_timeout", 600.0),
        )
        trainer.add_callback(publish)
    publish.repo_id = publish.repo_id or Path(trainer.args.output_dir).absolute().name
    trainer.hub_model_id = publish.repo_id
    trainer.push_to_hub = partial(publish.push, trainer)
    trainer.create_model_card = partial(publish.write_card, trainer)
    trainer._push_from_checkpoint = trainer._finish_current_push = lambda *_: None  # the callback does these
    return publish


def _remove_stages(args: Any) -> None:
    for stage in Path(str(args.output_dir)).glob(f"{_STAGE}*"):
        shutil.rmtree(stage, ignore_errors=True)


def _in_background(call: Callable[[], Any], after: Future[Any] | None = None) -> Future[Any]:
    """Runs a call in a thread which, unlike an executor's, does not keep the program alive."""
    future: Future[Any] = Future()

    def run() -> None:
        if after is not None:
            wait([after])
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
