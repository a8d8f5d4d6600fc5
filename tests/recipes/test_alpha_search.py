"""``recipes/alpha_search.py``: two workers on one storage, resumable, the same budget for both sides."""

import csv
import sys

import optuna
import pytest
from launch import ROOT, TWO, as_program, run
from optuna.trial import TrialState
from PIL import Image

from pgt_hf.trainer import shared_study

sys.path.insert(0, str(ROOT / "recipes"))
import alpha_search  # noqa: E402

pytestmark = pytest.mark.slow

RECIPE = str(ROOT / "recipes" / "alpha_search.py")


def call(*arguments):
    """In this process, which has everything imported."""
    with as_program(RECIPE, *arguments):
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


def trained(study):
    return [trial for trial in study.trials if trial.state == TrialState.COMPLETE]


def test_both_sides_get_the_same_number_of_trials_and_the_confirmation_new_seeds(searched):
    by_name = studies(searched[0])
    search = {name: study for name, study in by_name.items() if "confirm" not in name}
    (confirm,) = (study for name, study in by_name.items() if "confirm" in name)
    done = {name: trained(study) for name, study in search.items()}
    assert {len(trials) for trials in done.values()} == {2}
    assert {trial.params["alpha"] for trial in done["alpha_search/baseline"]} == {1.0}
    assert {trial.params["alpha"] for trial in done["alpha_search/pgt"]} == {0.1, 0.5}
    assert {round(trial.params["learning_rate"], 6) for trial in done["alpha_search/baseline"]} == {0.05, 0.2}
    assert {trial.params["seed"] for trial in trained(confirm)} == {1000, 1001}


def test_two_workers_shared_the_trials(searched):
    trials = [trial for study in studies(searched[0]).values() for trial in trained(study)]
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
    sentences = (folder / "results.md").read_text().split("\n\n")[0].splitlines()
    verdicts = ("No difference found", "PGT is better by", "PGT is worse by", "Not decided", "Nothing was learned")
    assert sentences[-1].startswith(verdicts)
    assert [printed.count(sentence) for sentence in sentences] == [1] * len(sentences)  # by one worker
    with Image.open(folder / "heat_map.png") as picture:
        assert min(picture.size) > 200


def test_a_finished_search_trains_nothing_when_it_is_started_again(searched, monkeypatch, capsys):
    def trained(*args):
        raise AssertionError("it trained again")

    monkeypatch.setattr(alpha_search, "train", trained)
    call("--smoke", "--output-dir", str(searched[0]))
    assert (searched[0] / "results.md").read_text().splitlines()[0] in capsys.readouterr().out


def test_a_search_with_other_settings_is_not_mixed_into_the_storage(searched):
    with pytest.raises(SystemExit, match=r"the storage holds another search, with epochs=1; give another"):
        call("--smoke", "--output-dir", str(searched[0]), "--epochs", "2")


def test_what_a_killed_worker_left_is_trained_by_another_through_a_journal(tmp_path, monkeypatch):
    scores = iter([0.5, 0.6] * 20)
    monkeypatch.setattr(alpha_search, "train", lambda *args: next(scores))
    monkeypatch.setattr(shared_study, "_SILENT_SECONDS", 3)
    journal = ["--smoke", "--output-dir", str(tmp_path), "--storage", f"journal:{tmp_path / 'journal.log'}"]
    storage = alpha_search.open_storage(journal[-1], str(tmp_path))
    with as_program(RECIPE, *journal):
        args, _ = alpha_search.parse(
            alpha_search.SearchArguments, description="", defaults=alpha_search.DEFAULTS, smoke=alpha_search.SMOKE
        )
    study = alpha_search.open_side(storage, "pgt", args.load(), args)
    for setting in alpha_search.grid_of("pgt", args):
        study.enqueue_trial(setting)
    killed = study.ask()
    call(*journal)
    assert study.trials[killed.number].state == TrialState.FAIL
    assert {trial.params["alpha"] for trial in trained(study)} == {0.1, 0.5}
    assert len(trained(study)) == 2
    assert (tmp_path / "results.md").exists()


def test_a_smaller_number_of_seeds_is_confirmed_with_just_those(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alpha_search, "train", lambda setting, seed, *args: (0.5 + setting["alpha"] + seed % 7) / 10)
    for seeds in ("4", "3"):
        call("--smoke", "--output-dir", str(tmp_path), "--confirm-seeds", seeds)
        with open(tmp_path / "results.csv", newline="") as file:
            assert [row["seeds"] for row in csv.DictReader(file)][:2] == [seeds, seeds]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_other_samplers_draw_alpha_and_learning_rate_within_their_bounds(tmp_path, monkeypatch, sampler):
    monkeypatch.setattr(alpha_search, "train", lambda setting, seed, *args: setting["alpha"] + seed / 1e4)
    call("--smoke", "--sampler", sampler, "--trials", "12", "--output-dir", str(tmp_path))
    with open(tmp_path / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "search"]
    alphas = [float(row["alpha"]) for row in rows if row["side"] == "pgt"]
    assert len(alphas) == 12 and 0.1 <= min(alphas) < max(alphas) <= 0.5
    assert all(0.05 <= float(row["learning_rate"]) <= 0.2 for row in rows)
    verdict = (tmp_path / "results.md").read_text().split("\n\n")[0].splitlines()[-1]
    assert verdict.startswith("Not decided: PGT minus baseline is -")  # by as much with each seed
    assert "on each of the 2 seeds" in verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "tpe"], "--trials must be given with --sampler tpe"),
        (["--alphas", "0.5", "1"], r"--alphas must be a number in \[0, 1\), got 1.0"),
        (["--alphas", "0.5", "0.5"], r"--alphas must name at least one, and none twice"),
        (["--lr-low", "0"], r"--lr-low must be a number in \(0, 1e6\], got 0.0"),
        (["--lr-low", "1", "--lr-high", "0.1"], "--lr-high must be above --lr-low, 1.0, got 0.1"),
        (["--epochs", "0"], r"--epochs must be a number in \(0, 1e9\], got 0"),
        (
            ["--batch-size", "100000"],
            "--batch-size must be at most 1437, the training images for each process, got 100000",
        ),
        (["--model-name", "resnet1O"], "resnet1O"),
        (["--image-size", "0"], r"--image-size must be a whole number in \[1, 8192\], got 0"),
        (["--storage", "banana://x"], "--storage must be the URL of a database, .*, got 'banana://x'"),
        (["--confirm-seeds", "1"], r"--confirm-seeds must be a whole number in \[2, 10000\], got 1"),
        (["--seeds", "0"], r"--seeds must be a whole number in \[1, 10000\], got 0"),
    ],
)
def test_bad_options_are_named_before_anything_is_trained(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        call("--output-dir", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_help_keeps_its_examples(capsys):
    with pytest.raises(SystemExit):
        call("--help")
    assert "accelerate launch recipes/alpha_search.py --sampler tpe --trials 40" in capsys.readouterr().out
