"""Optuna studies that several workers share, each a process of its own, on one machine or many.

If a worker dies, the others take over its setting, and a search that is started again continues: the storage knows
what is done. Optuna's own heartbeat does not do: journals have none, and it ends at the first error of the database.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..analysis.comparison import Point

_log = logging.getLogger("pgt_hf.search")
_WORKER = uuid.uuid4().hex  # host names and process numbers are not unique: containers share them
_BEAT_SECONDS = 10.0  # how often a worker says that it is alive
_POLL_SECONDS = 1.0  # how often a worker that has nothing to do looks for what the others have done
_SILENT_SECONDS = 90.0  # a worker that has said nothing for so long is given up


def become_worker() -> int:
    """Turns each process of a launcher into an independent worker with its own GPU, and returns its number."""
    rank, local = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK")
    if local is not None:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[int(local)] if gpus and "," in gpus else gpus or local
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return rank


def open_study(storage: Any, name: str, sampler: Any, pruner: Any, identity: Mapping[str, Any]) -> optuna.Study:
    """Opens or creates a study; ``identity`` holds the JSON values that make this search what it is.

    Raises:
        ValueError: The storage holds a study of that name with another identity.
    """
    study = optuna.create_study(
        storage=storage, study_name=name, sampler=sampler, pruner=pruner, direction="maximize", load_if_exists=True
    )
    found = study.user_attrs.get("search", identity)
    if changed := [key for key in identity if found.get(key) != identity[key]]:
        was = ", ".join(f"{key}={found.get(key)!r}" for key in changed)
        raise ValueError(f"the storage holds another search, with {was}; give another --output-dir or --storage")
    study.set_user_attr("search", dict(identity))
    return study


def run_trials(
    study: optuna.Study,
    budget: int,
    objective: Callable[[Any], float],
    rank: int,
    name: str,
    grid: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Trains until all workers together have done ``budget`` trials, and waits for the last ones.

    With a ``grid`` of ``budget`` settings, each is trained once. ``objective`` must keep a ``ReportToStudy`` open.
    """
    beats = _Beats(study)
    with tqdm(total=budget, desc=name, disable=rank > 0) as bar:
        while True:
            trials = study.get_trials(deepcopy=False)
            counted = _counted(trials, budget, grid)
            done = sum(trial.state.is_finished() for trial in counted)
            bar.update(done - bar.n)
            if done == budget:
                return
            if grid is not None and len(counted) < budget:
                there = [_setting(trial) for trial in counted]
                for setting in grid:
                    if setting not in there:
                        study.enqueue_trial(dict(setting))
            elif len(counted) == budget and not any(trial.state == TrialState.WAITING for trial in counted):
                bar.set_postfix_str("waiting for the trials of other workers")
                beats.fail_dead([trial for trial in counted if trial.state == TrialState.RUNNING])
                time.sleep(_POLL_SECONDS)
                continue
            bar.set_postfix_str("")
            trial = study.ask()
            if any(trial.number == one.number for one in _counted(study.get_trials(deepcopy=False), budget, grid)):
                _train(study, trial, objective)
            else:  # another worker was first
                _tell(study, trial.number, state=TrialState.FAIL)


def _counted(trials: Sequence[Any], budget: int, grid: Sequence[Mapping[str, Any]] | None) -> list[Any]:
    """The trials that make up the search: the first of each setting, or without a grid the first ones.

    Once they are finished, every worker finds the same ones, whatever else was begun meanwhile.
    """
    good = [trial for trial in trials if trial.state != TrialState.FAIL]
    if grid is None:
        return good[:budget]
    first = [next((trial for trial in good if _setting(trial) == setting), None) for setting in grid]
    return [trial for trial in first if trial is not None]


def _setting(trial: Any) -> Any:
    return trial.system_attrs.get("fixed_params")  # it is there before the parameters are


def _train(study: optuna.Study, trial: Any, objective: Callable[[Any], float]) -> None:
    try:
        _tell(study, trial.number, objective(trial))
    except optuna.TrialPruned:
        _tell(study, trial.number, state=TrialState.PRUNED)
    except UpdateFinishedTrialError:
        _log.warning("trial %d was given to another worker; this one goes on with the next", trial.number)
    except BaseException as error:
        if not isinstance(error, ConnectionError):  # there is no one to tell
            _tell(study, trial.number, state=TrialState.FAIL)
        raise


def _tell(study: optuna.Study, number: int, value: float | None = None, state: Any = None) -> None:
    with suppress(UpdateFinishedTrialError):
        study.tell(number, value, state, skip_if_finished=True)


class _Beats:
    """Finds dead workers: their trials' beats no longer change, by this worker's own clock."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self.heard: dict[int, tuple[Any, float]] = {}
        self.looked = time.monotonic()

    def fail_dead(self, running: Sequence[Any]) -> None:
        now = time.monotonic()
        if now - self.looked > 10 * _POLL_SECONDS:  # this worker was busy, or the storage away
            self.heard.clear()
        self.looked = now
        for trial in running:
            beat = trial.user_attrs.get("beat")
            last, since = self.heard.setdefault(trial.number, (beat, now))
            if beat != last:
                self.heard[trial.number] = (beat, now)
            elif now - since > _SILENT_SECONDS:
                _tell(self.study, trial.number, state=TrialState.FAIL)


class ReportToStudy(TrainerCallback):
    """Reports a trial's score, seed after seed, and prunes it if it is behind the others.

    While it is open, a thread says that this worker is alive. If the trial is given to another worker all the same,
    Optuna's ``UpdateFinishedTrialError`` ends the training, and ``run_trials`` goes on with the next trial.

    Example:
        >>> with ReportToStudy(trial, prune=False) as watch:
        ...     ImageTrainer(model, args, callbacks=[watch]).train()
    """

    def __init__(self, trial: Any, prune: bool) -> None:
        self.trial = trial
        self.prune = prune
        self.evaluations = 0
        self.lost = False
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self.trial.set_user_attr("worker", _WORKER)
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.closed.set()
        self.thread.join()

    def _beat(self) -> None:
        beat = 0
        try:
            while not self.closed.wait(_BEAT_SECONDS):
                beat += 1
                self.trial.set_user_attr("beat", beat)
        except UpdateFinishedTrialError:
            self.lost = True
        except ConnectionError:
            pass  # the training will raise it too

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.lost:
            raise UpdateFinishedTrialError(f"trial {self.trial.number} was given to another worker")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.trial.report(metrics["eval_top1"], self.evaluations)
        self.evaluations += 1
        if self.prune and self.trial.should_prune():
            raise optuna.TrialPruned


def completed_points(study: optuna.Study, budget: int, grid: Sequence[Mapping[str, Any]] | None = None) -> list[Point]:
    """The settings that were trained to their end, among the trials that ``run_trials`` has counted."""
    return [
        Point(trial.params["alpha"], trial.params["learning_rate"], tuple(trial.user_attrs["scores"]))
        for trial in _counted(study.get_trials(deepcopy=False), budget, grid)
        if trial.state == TrialState.COMPLETE
    ]


def paired_points(study: optuna.Study, settings: Mapping[str, Point], seeds: Collection[int]) -> dict[str, Point]:
    """Each side's scores over those of ``seeds`` that all sides were trained with, in the same order.

    The study's trials have the parameters ``side`` and ``seed``; ``settings`` has each side's alpha and learning rate.
    """
    done: dict[str, dict[int, float]] = {side: {} for side in settings}
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            done[trial.params["side"]].setdefault(trial.params["seed"], trial.value)
    shared = [seed for seed in seeds if all(seed in scores for scores in done.values())]
    return {
        side: Point(point.alpha, point.learning_rate, tuple(done[side][seed] for seed in shared))
        for side, point in settings.items()
    }
