"""``recipes/alpha_search.py``: two workers on one storage, resumable, the same budget for both sides."""

import csv
import os
import socket
import sys

import optuna
import pytest
from launch import ROOT, TWO, run
from optuna.trial import TrialState
from PIL import Image

from pgt_hf import powergrad_hp_space

sys.path.insert(0, str(ROOT / "recipes"))
import alpha_search  # noqa: E402

pytestmark = pytest.mark.slow

RECIPE = str(ROOT / "recipes" / "alpha_search.py")


def call(monkeypatch, *arguments):
    """In this process, which has everything imported."""
    monkeypatch.setattr(sys, "argv", [RECIPE, *arguments])
    monkeypatch.setattr(alpha_search, "quieten", lambda: None)  # the other tests of this process read the logs
    alpha_search.main()


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    printed = run(*TWO, RECIPE, "--smoke", cwd=folder).stdout
    return folder / "runs" / "alpha_search", printed


def studies(folder):
    storage = f"sqlite:///{folder / 'search.db'}"
    return {summary.study_name: optuna.load_study(study_name=summary.study_name, storage=storage)
            for summary in optuna.get_all_study_summaries(storage)}  # fmt: skip


def test_both_sides_get_the_same_number_of_trials_and_the_confirmation_new_seeds(searched):
    by_name = studies(searched[0])
    search = {name: study for name, study in by_name.items() if "confirm" not in name}
    (confirm,) = (study for name, study in by_name.items() if "confirm" in name)
    done = {name: [trial for trial in study.trials if trial.state.is_finished()] for name, study in search.items()}
    assert {len(trials) for trials in done.values()} <= {2, 3}  # two workers may begin a last one at once
    assert {trial.params["alpha"] for trial in done["alpha_search/baseline"]} == {1.0}
    assert {trial.params["alpha"] for trial in done["alpha_search/pgt"]} == {0.1, 0.5}
    assert {round(trial.params["learning_rate"], 6) for trial in done["alpha_search/baseline"]} == {0.05, 0.2}
    assert {trial.params["seed"] for trial in confirm.trials} == {1000, 1001}


def test_two_workers_shared_the_trials(searched):
    trials = [trial for study in studies(searched[0]).values() for trial in study.trials]
    assert len({trial.user_attrs["worker"] for trial in trials}) == 2


def test_the_report_has_table_sentence_and_picture(searched):
    folder, printed = searched
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["phase"], row["side"], row["seeds"]) for row in rows[:2]] == [
        ("confirm", "baseline", "2"),
        ("confirm", "pgt", "2"),
    ]
    assert len(rows) == 2 + 2 * 2
    sentence = (folder / "results.md").read_text().splitlines()[0]
    assert sentence.startswith(("No difference found", "PGT is better by", "PGT is worse by"))
    assert printed.count(sentence) == 1  # by one worker
    with Image.open(folder / "heat_map.png") as picture:
        assert min(picture.size) > 200


def test_a_finished_search_trains_nothing_when_it_is_started_again(searched, monkeypatch, capsys):
    def trained(*args):
        raise AssertionError("it trained again")

    monkeypatch.setattr(alpha_search, "train", trained)
    call(monkeypatch, "--smoke", "--output-dir", str(searched[0]))
    assert (searched[0] / "results.md").read_text().splitlines()[0] in capsys.readouterr().out


def test_a_search_with_other_settings_is_not_mixed_into_the_storage(searched, monkeypatch):
    with pytest.raises(SystemExit, match=r"the storage holds another search, with epochs=1; give another"):
        call(monkeypatch, "--smoke", "--output-dir", str(searched[0]), "--epochs", "2")


def test_what_a_killed_worker_left_is_trained_by_another_through_a_journal(tmp_path, monkeypatch):
    scores = iter([0.5, 0.6] * 20)
    monkeypatch.setattr(alpha_search, "train", lambda *args: next(scores))
    journal = ["--smoke", "--output-dir", str(tmp_path), "--storage", f"journal:{tmp_path / 'journal.log'}"]
    storage = alpha_search.open_storage(journal[-1], str(tmp_path))
    monkeypatch.setattr(sys, "argv", [RECIPE, *journal])
    study = alpha_search.open_side(storage, "pgt", alpha_search.read_arguments())
    study.sampler = optuna.samplers.PartialFixedSampler({"alpha": 0.5, "learning_rate": 0.05}, study.sampler)
    killed = study.ask()
    powergrad_hp_space((0.05, 0.2), (0.1, 0.5))(killed)
    killed.set_user_attr("worker", f"{socket.gethostname()}:{dead_process()}")
    call(monkeypatch, *journal)
    states = [trial.state for trial in study.trials]
    assert states[0] == TrialState.FAIL
    assert states.count(TrialState.COMPLETE) == 2
    assert {trial.params["alpha"] for trial in study.trials[1:]} == {0.1, 0.5}
    assert (tmp_path / "results.md").exists()


def dead_process():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_other_samplers_draw_alpha_and_learning_rate_within_their_bounds(tmp_path, monkeypatch, sampler):
    monkeypatch.setattr(alpha_search, "train", lambda setting, seed, *args: setting["alpha"] + seed / 1e4)
    call(monkeypatch, "--smoke", "--sampler", sampler, "--trials", "12", "--output-dir", str(tmp_path))
    with open(tmp_path / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "search"]
    alphas = [float(row["alpha"]) for row in rows if row["side"] == "pgt"]
    assert len(alphas) == 12 and 0.1 <= min(alphas) < max(alphas) <= 0.5
    assert all(0.05 <= float(row["learning_rate"]) <= 0.2 for row in rows)
    assert (tmp_path / "results.md").read_text().startswith("PGT is worse by")  # this score is alpha itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "tpe"], "--trials must be given with --sampler tpe"),
        (["--alphas", "0.5", "1"], r"--alphas must be a number in \[0, 1\), got 1.0"),
        (["--confirm-seeds", "1"], "--confirm-seeds must be a whole number of at least 2, got 1"),
        (["--seeds", "0"], "--seeds must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options_are_named_before_anything_is_trained(tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        call(monkeypatch, "--output-dir", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_help_keeps_its_examples(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    assert "accelerate launch recipes/alpha_search.py --sampler tpe --trials 40" in capsys.readouterr().out
