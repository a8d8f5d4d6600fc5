"""Optuna studies that several workers share, each a process of its own, on one machine or many.

If a worker dies, the others take over its setting, and a search that is started again continues: the storage knows
what is done.
"""

import os
import random
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..analysis.comparison import Point
from ..limits import WritableFile, check_type

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_SILENT_SECONDS = 1800  # a worker on another machine that has reported nothing for so long is given up


def become_worker() -> int:
    """Turns each process of a launcher into an independent worker with its own GPU, and returns its number."""
    rank, local = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK")
    if local is not None:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[int(local)] if gpus and "," in gpus else gpus or local
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return rank


class Storage:
    """What ``open_storage`` takes: the URL of a database whose driver is installed, or ``journal:FILE``."""

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless it is one; a file is tried for writing."""
        check_type(name, value, str)
        shown = re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", value)  # without a password
        message = f"{name} must be the URL of a database, such as sqlite:///FILE, or journal:FILE, got {shown!r}"
        if value.startswith("journal:"):
            if not value.removeprefix("journal:"):
                raise ValueError(message)
            WritableFile().check(name, value.removeprefix("journal:"))
            return
        try:
            url = make_url(value)
            url.get_dialect().import_dbapi()
        except (ArgumentError, ImportError) as error:
            raise ValueError(f"{message}: {error}") from error
        if url.get_backend_name() == "sqlite" and url.database:
            file = Path(url.database)
            WritableFile().check(name, file)
            if file.exists() and file.stat().st_size and not file.read_bytes()[:16].startswith(b"SQLite format 3"):
                raise ValueError(f"{message}: the file is no SQLite database")


def open_storage(name: str | None, output_dir: str | os.PathLike[str]) -> Any:
    """The storage of a search: any RDB URL, ``journal:FILE``, or by default an SQLite file in ``output_dir``."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    if name and name.startswith("journal:"):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(name.removeprefix("journal:")))
    url = name or f"sqlite:///{Path(output_dir, 'search.db').resolve()}"
    for attempt in range(10):
        try:
            return optuna.storages.RDBStorage(url)
        except DBAPIError:  # another worker is making the very same tables
            if attempt == 9:
                raise
            time.sleep(1)


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
    grid: list[dict[str, Any]] | None = None,
) -> None:
    """Trains until this worker and the others have done ``budget`` trials, and waits for the last ones.

    With a ``grid``, each trial is one of its settings that is neither done nor being trained.
    """
    sampler = study.sampler
    with tqdm(total=budget, desc=name, disable=rank > 0) as bar:
        while True:
            trials = study.get_trials(deepcopy=False)
            done = [trial.params for trial in trials if trial.state in _FINISHED]
            running = [t.params for t in trials if t.state == TrialState.RUNNING and not _give_up(study, t)]
            if grid is not None:
                done = [setting for setting in grid if setting in done]
            bar.update(len(done) - bar.n)
            if len(done) >= budget:
                return
            if len(done) + len(running) >= budget:
                time.sleep(1)
                continue
            if grid is not None:
                left = [setting for setting in grid if setting not in done and setting not in running]
                study.sampler = optuna.samplers.PartialFixedSampler(random.choice(left), sampler)
            study.optimize(objective, n_trials=1)


def _give_up(study: optuna.Study, trial: Any) -> bool:
    """Whether a running trial's worker is dead; the trial then fails, and its setting is free again."""
    host, _, pid = trial.user_attrs.get("worker", "").rpartition(":")
    heard = trial.user_attrs.get("heard", trial.datetime_start.timestamp())
    here = host == socket.gethostname()
    dead = (here and not _alive(int(pid))) or time.time() - heard > _SILENT_SECONDS
    if dead:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return dead


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # between two trials of this worker: the number was another process's before
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


class ReportToStudy(TrainerCallback):
    """Reports a trial's score, seed after seed, and prunes it if it is behind the others."""

    def __init__(self, trial: Any, prune: bool) -> None:
        self.trial = trial
        self.prune = prune
        self.evaluations = 0
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.trial.set_user_attr("heard", time.time())
        self.trial.report(metrics["eval_top1"], self.evaluations)
        self.evaluations += 1
        if self.prune and self.trial.should_prune():
            raise optuna.TrialPruned


def completed_points(study: optuna.Study, budget: int) -> list[Point]:
    """The completed settings among the first ``budget`` different ones, so that each side gets as many."""
    finished: dict[tuple[float, float], Any] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state in _FINISHED:
            finished.setdefault((trial.params["alpha"], trial.params["learning_rate"]), trial)
    return [
        Point(*setting, tuple(trial.user_attrs["scores"]))
        for setting, trial in list(finished.items())[:budget]
        if trial.state == TrialState.COMPLETE
    ]


def paired_points(study: optuna.Study, settings: Mapping[str, Point]) -> dict[str, Point]:
    """Each side's scores over the seeds that all sides were trained with, in the same order.

    The study's trials have the parameters ``side`` and ``seed``; ``settings`` has each side's alpha and learning rate.
    """
    done: dict[str, dict[int, float]] = {side: {} for side in settings}
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            done[trial.params["side"]][trial.params["seed"]] = trial.value
    shared = sorted(set.intersection(*(set(scores) for scores in done.values())))
    return {
        side: Point(point.alpha, point.learning_rate, tuple(done[side][seed] for seed in shared))
        for side, point in settings.items()
    }
