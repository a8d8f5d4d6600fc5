"""Searches that several workers share: on sqlite, on a journal, and on PostgreSQL where it is installed."""

import glob
import json
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import event

from pgt_hf.analysis import Point
from pgt_hf.trainer import (
    ReportToStudy,
    completed_points,
    open_storage,
    open_study,
    paired_points,
    run_trials,
    shared_study,
)

GRID = [{"alpha": alpha, "learning_rate": rate} for rate in (0.1, 0.2) for alpha in (0.25, 0.5, 0.75)]


class Postgres:
    """A server of this test's own."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("initdb") or max(glob.glob("/usr/lib/postgresql/*/bin/initdb"), default=None)
        if found is None:
            pytest.skip("PostgreSQL is not installed")
        pytest.importorskip("psycopg")
        self.bin, self.data = Path(found).parent, folder / "data"
        self.user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
        folder.chmod(0o777)
        self.call("initdb", "-D", str(self.data), "-A", "trust", "-U", "pgt")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def call(self, program: str, *arguments: str) -> None:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
        subprocess.run([str(self.bin / program), *arguments], check=True, user=self.user, timeout=60, **silent)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.data} -c fsync=off"
        self.call("pg_ctl", "-D", str(self.data), "-o", options, "-w", "start")

    def stop(self) -> None:
        self.call("pg_ctl", "-D", str(self.data), "-m", "fast", "-w", "stop")

    def url(self, name: str) -> str:
        import psycopg

        with psycopg.connect(host="127.0.0.1", port=self.port, user="pgt", dbname="postgres", autocommit=True) as one:
            one.execute(f'create database "{name}"')
        return f"postgresql://pgt:secret@127.0.0.1:{self.port}/{name}"


@pytest.fixture(scope="module")
def postgres():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        server = Postgres(Path(folder))
        yield server
        server.stop()


@pytest.fixture(params=["sqlite", "journal", "postgres"])
def storage_name(request, tmp_path):
    if request.param == "postgres":
        return request.getfixturevalue("postgres").url(f"search{time.monotonic_ns()}")
    return {"journal": f"journal:{tmp_path}/search.log", "sqlite": f"sqlite:///{tmp_path}/search.db"}[request.param]


@pytest.fixture
def impatient(monkeypatch):
    """A beat every 50 ms, and silence after 1.5 seconds."""
    monkeypatch.setattr(shared_study, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(shared_study, "_SILENT_SECONDS", 1.5)
    monkeypatch.setattr(shared_study, "_POLL_SECONDS", 0.1)


def study_in(storage_name, **identity):
    storage = open_storage(storage_name, ".")
    return open_study(storage, "search", optuna.samplers.RandomSampler(), optuna.pruners.NopPruner(), identity)


class Objective:
    """Scores a setting by its alpha, and remembers what it was asked for, by all workers."""

    def __init__(self, seconds=0.0):
        self.seconds, self.trained = seconds, []

    def __call__(self, trial):
        setting = trial.suggest_float("alpha", 0.0, 1.0), trial.suggest_float("learning_rate", 0.01, 1.0, log=True)
        self.trained.append(setting)
        with ReportToStudy(trial, prune=False) as watch:
            end = time.monotonic() + self.seconds
            while time.monotonic() < end:
                watch.on_step_end(None, None, None)
                time.sleep(0.01)
            trial.set_user_attr("scores", [setting[0]])
        return setting[0]


def work(storage_name, objective, budget, grid, workers=1):
    """What each of the workers takes for the result."""
    results, errors = [], []

    def worker():
        try:
            study = study_in(storage_name)
            run_trials(study, budget, objective, 1, "search", grid)
            results.append(completed_points(study, budget, grid))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=worker) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    if errors:
        raise errors[0]
    assert len(results) == workers
    return results


@pytest.mark.slow
def test_workers_train_each_setting_of_a_grid_once_and_agree_on_the_result(storage_name, impatient):
    objective = Objective(seconds=0.05)
    results = work(storage_name, objective, len(GRID), GRID, workers=3)
    assert sorted(objective.trained) == sorted(tuple(setting.values()) for setting in GRID)
    assert results[0] == results[1] == results[2]
    assert [{"alpha": point.alpha, "learning_rate": point.learning_rate} for point in results[0]] == GRID


@pytest.mark.slow
def test_workers_draw_different_settings_whatever_training_does_to_the_global_generators(storage_name, impatient):
    from transformers import set_seed

    class Seeded(Objective):
        def __call__(self, trial):
            value = super().__call__(trial)
            set_seed(0)
            return value

    objective = Seeded(seconds=0.05)
    results = work(storage_name, objective, 5, None, workers=3)
    assert len(objective.trained) == len(set(objective.trained)) == 5  # and no surplus trial was trained
    assert results[0] == results[1] == results[2] and len(results[0]) == 5


def test_a_surplus_trial_never_changes_the_result(tmp_path):
    study = study_in(f"sqlite:///{tmp_path / 'search.db'}")

    def end(trial, value):
        trial.suggest_float("alpha", 0, 1), trial.suggest_float("learning_rate", 0.01, 1, log=True)
        trial.set_user_attr("scores", [value])
        study.tell(trial, value)

    trials = [study.ask() for _ in range(3)]  # for a budget of 2: three workers asked at once
    end(trials[0], 0.5)
    end(trials[2], 0.9)
    assert len(completed_points(study, 2)) == 1  # the second is not done, and the third does not stand in for it
    end(trials[1], 0.6)
    assert [point.mean for point in completed_points(study, 2)] == [0.5, 0.6]


@pytest.mark.slow
def test_a_silent_workers_setting_is_trained_again_and_a_live_ones_is_not(storage_name, impatient):
    study = study_in(storage_name)
    for setting in GRID[:2]:
        study.enqueue_trial(setting)
    dead = study.ask()  # a worker that was killed; host and process number play no part
    objective = Objective(seconds=3)  # twice as long as silence may last
    work(storage_name, objective, 2, GRID[:2], workers=2)
    assert sorted(objective.trained) == sorted(tuple(setting.values()) for setting in GRID[:2])
    assert study.trials[dead.number].state == TrialState.FAIL


def test_a_worker_whose_trial_was_taken_drops_it_and_goes_on(storage_name, impatient, caplog):
    class Robbed(Objective):
        def __call__(self, trial):
            if not self.trained:
                study_in(storage_name).tell(trial.number, state=TrialState.FAIL)
                self.seconds = 60  # it does not train to the end first
            else:
                self.seconds = 0
            try:
                return super().__call__(trial)
            finally:
                self.trained.append(None)

    begun = time.monotonic()
    (result,) = work(storage_name, Robbed(), 2, GRID[:2])
    assert [point.alpha for point in result] == [0.25, 0.5]
    assert time.monotonic() - begun < 30
    assert "trial 0 was given to another worker" in caplog.text


def test_an_error_of_the_training_ends_the_worker_and_frees_the_setting(tmp_path):
    def fails(trial):
        raise RuntimeError("out of memory")

    name = f"sqlite:///{tmp_path / 'search.db'}"
    with pytest.raises(RuntimeError, match="out of memory"):
        work(name, fails, 2, GRID[:2])
    assert [trial.state for trial in study_in(name).trials] == [TrialState.FAIL, TrialState.WAITING]


@pytest.mark.slow
def test_a_database_that_goes_away_is_waited_for(postgres, impatient, caplog):
    name = postgres.url("away")
    objective = Objective(seconds=0.7)
    worker = threading.Thread(target=work, args=(name, objective, 4, GRID[:4]))
    worker.start()
    for _ in range(600):  # until the study is open
        if objective.trained:
            break
        time.sleep(0.1)
    postgres.stop()
    for _ in range(600):  # until the worker has asked for it
        if "trying again" in caplog.text:
            break
        time.sleep(0.1)
    postgres.start()
    worker.join(60)
    points = completed_points(study_in(name), 4, GRID[:4])
    assert [point.alpha for point in points] == [0.25, 0.5, 0.75, 0.25]
    told = [record.message for record in caplog.records if "trying again" in record.message]
    assert len(told) == 1 and "\n" not in told[0]


def test_a_connection_that_is_cut_in_a_query_is_opened_again(postgres):
    import psycopg

    study, cut = study_in(postgres.url("cut")), []
    study.enqueue_trial(GRID[0])

    def close_all(connection, cursor, statement, *_):
        if "FROM trials" in statement and not cut:
            cut.append(statement)
            with psycopg.connect(host="127.0.0.1", port=postgres.port, user="pgt", dbname="postgres") as one:
                one.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = 'cut'")

    event.listen(study._storage._backend.engine, "before_cursor_execute", close_all)
    assert study.ask().number == 0 and cut


@pytest.mark.slow
def test_a_connection_that_the_server_closes_when_idle_is_opened_again(postgres, monkeypatch, caplog):
    name = postgres.url("idle")
    monkeypatch.setattr(shared_study, "_BEAT_SECONDS", 60)
    work(f"{name}?options=-c%20idle_session_timeout%3D300", Objective(seconds=1), 2, GRID[:2])
    assert not [record for record in caplog.records if "trying again" in record.message]  # it was noticed in time


def test_a_locked_database_is_waited_for_and_given_up_with_one_line(tmp_path, caplog):
    name = f"sqlite:///{tmp_path / 'search.db'}?timeout=0.1"
    study = study_in(name)
    other = sqlite3.connect(tmp_path / "search.db", isolation_level=None, check_same_thread=False)
    other.execute("begin exclusive")
    threading.Timer(1, other.execute, ["commit"]).start()
    study.set_user_attr("a", 1)
    assert [record.message for record in caplog.records if "database is locked" in record.message]
    other.execute("begin exclusive")
    study._storage._backend.patience = 0.3
    with pytest.raises(ConnectionError, match=r"^the storage of the search cannot be used: database is locked$"):
        study.set_user_attr("a", 2)
    other.execute("commit")


def test_a_journal_outlives_a_full_disk_and_a_torn_line(tmp_path):
    file = tmp_path / "search.log"
    study = study_in(f"journal:{file}")
    study._storage._backend.patience = 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, before[1]))  # room for half a line
    try:
        with pytest.raises(ConnectionError, match=f"cannot be used: .*File too large: '{file}'"):
            study.set_user_attr("a", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with open(file, "a") as torn:
        torn.write('{"op_code":2,"worker_id":"what a killed wor')
    study.set_user_attr("a", 2)
    assert [json.loads(line) for line in file.read_text().splitlines()]  # all of them whole
    assert study_in(f"journal:{file}").user_attrs["a"] == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("banana://x", "banana"),
        ("nothing", "Could not parse"),
        ("journal:", "must be the URL of a database"),
        ("journal:{}/no/search.log", "No such file or directory"),
        ("journal:{}/ruined.log", "ruined.log is damaged, or not a journal"),
        ("sqlite:///{}/no/search.db", "unable to open database file"),
        ("sqlite:///{}/ruined.log", "file is not a database"),
        ("mysql://me:secret@localhost/x", "No module named 'MySQLdb'"),
        ("postgresql://me:secret@127.0.0.1:9/search", "onnection"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_in_one_line(tmp_path, monkeypatch, name, says):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "ruined.log").write_text('{"op_code":0,"wor{"op_code":0}\n{"op_code":1}\n' * 100)
    with pytest.raises(ValueError, match=f"storage .*{says}") as error:
        open_storage(name.format(tmp_path), tmp_path / "out")
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_only_the_seeds_asked_for_are_compared(tmp_path):
    study = study_in(f"sqlite:///{tmp_path / 'search.db'}")
    for seed in (1, 2, 3, 4):
        for side in ("pgt", "baseline"):
            study.add_trial(
                optuna.create_trial(
                    params={"side": side, "seed": seed},
                    distributions={
                        "side": optuna.distributions.CategoricalDistribution(["pgt", "baseline"]),
                        "seed": optuna.distributions.IntDistribution(1, 4),
                    },
                    value=seed / 10,
                )
            )
    sides = {"pgt": Point(0.5, 0.1, ()), "baseline": Point(1.0, 0.1, ())}
    assert paired_points(study, sides, range(1, 4))["pgt"].scores == (0.1, 0.2, 0.3)
