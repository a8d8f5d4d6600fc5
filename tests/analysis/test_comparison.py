"""The search over alpha: the space, the statistics, the picture, and Trainer's own search with it."""

import random

import optuna
import pytest
from PIL import Image
from scipy.stats import ttest_rel
from tiny import Data, arguments, wrapper
from transformers import TrainerCallback

from pgt_hf import PowerGradTrainer, powergrad_hp_space
from pgt_hf.analysis import Point, compare, interval, plot_heat_map, verdict

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_the_space_covers_alpha_and_a_logarithmic_learning_rate():
    space = powergrad_hp_space(learning_rate=(0.001, 1.0), alpha=(0.1, 0.9))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [space(study.ask()) for _ in range(200)]
    assert all(0.1 <= point["alpha"] <= 0.9 and 0.001 <= point["learning_rate"] <= 1 for point in points)
    assert 0.2 < sum(point["learning_rate"] < 0.01 for point in points) / 200 < 0.45  # a third of the decades


@pytest.mark.parametrize(
    ("ranges", "name"),
    [
        ({"learning_rate": (0.0, 1.0)}, "learning_rate"),
        ({"learning_rate": (1.0, 0.1)}, "learning_rate"),
        ({"learning_rate": (0.1, 1.0), "alpha": (0.5, 0.1)}, "alpha"),
        ({"learning_rate": (0.1, 1.0), "alpha": (0.5, 1.5)}, "alpha"),
    ],
)
def test_empty_and_forbidden_ranges_are_named(ranges, name):
    with pytest.raises(ValueError, match=f"{name} must be "):
        powergrad_hp_space(**ranges)


def test_the_interval_is_that_of_the_paired_t_test():
    generator = random.Random(0)
    baseline = [0.9 + generator.gauss(0, 0.01) for _ in range(6)]
    method = [value + 0.01 + generator.gauss(0, 0.005) for value in baseline]
    result = compare(method, baseline)
    test = ttest_rel(method, baseline).confidence_interval(0.95)
    assert result.difference - result.half_width == pytest.approx(test.low)
    assert result.difference + result.half_width == pytest.approx(test.high)
    assert interval([0.5]) == (0.5, float("inf"))


@pytest.mark.parametrize(
    ("shift", "noise", "sentence"),
    [
        (0.02, 0.001, "PGT is better by 2.00 +- 0.18 points"),
        (-0.02, 0.001, "PGT is worse by 2.00 +- 0.18 points"),
        (0.001, 0.02, "No difference found: PGT minus baseline is +0.10 +- 3.67 points"),
    ],
)
def test_the_sentence_says_no_more_than_the_interval(shift, noise, sentence):
    baseline = [0.9, 0.91, 0.92, 0.93]
    method = [value + shift + noise * sign for value, sign in zip(baseline, (1, -1, 1, -1), strict=True)]
    result = compare(method, baseline)
    assert str(result).startswith(sentence)
    assert "4 seeds" in str(result)
    assert result.found == (noise < abs(shift))


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ([0.91, 0.92], "Not decided: PGT minus baseline is +1.00 points on each of the 2 seeds"),
        ([0.9, 0.91], "Not decided: PGT and the baseline scored the same on each of the 2 seeds"),
    ],
)
def test_equal_differences_prove_nothing(method, sentence):
    result = compare(method, [0.9, 0.91])  # 0.91 - 0.9 and 0.92 - 0.91 are not the same float
    assert str(result).startswith(sentence) and "+-" not in str(result)
    assert not result.found
    assert Point(1.0, 0.1, (0.5, 0.5)).cells()[-1] == "-"


def test_no_interval_is_printed_as_if_it_had_no_width():
    assert "by 1.00 +- 0.0001 points" in str(compare([0.91, 0.920001, 0.93], [0.9, 0.91, 0.92]))


LABELS = [0] * 60 + [1] * 40


def judge(baseline=(0.1, 0.9), pgt=(0.1, 0.9), rates=(0.001, 10.0), labels=LABELS):
    sides = {"baseline": (1.0, *baseline), "pgt": (0.5, *pgt)}
    points = {
        side: Point(alpha, rate, (top1, top1 + 0.01, top1 - 0.01 * alpha))
        for side, (alpha, rate, top1) in sides.items()
    }
    return verdict(points, rates, labels)


def test_a_sound_search_gets_its_verdict_alone():
    (sentence,) = judge()
    assert sentence.startswith("No difference found")


@pytest.mark.parametrize(("rate", "end", "flag"), [(0.001, "lower", "--lr-low"), (10.0, "upper", "--lr-high")])
def test_a_best_rate_at_the_end_of_its_range_is_said_first(rate, end, flag):
    first, last = judge(pgt=(rate, 0.9))
    assert first.startswith(f"The best learning rate of PGT, {rate:.3g}, lies at the {end} end of its range")
    assert flag in first and last.startswith("No difference found")


def test_a_search_in_which_everything_is_at_chance_says_so():
    (sentence,) = judge(baseline=(10.0, 0.6), pgt=(10.0, 0.65))  # 0.6 is chance, and 100 images tell 0.05 from nothing
    assert sentence.startswith("Nothing was learned: PGT and the baseline are no better than guessing")
    assert "60.0%" in sentence
    first, last = judge(baseline=(0.1, 0.6), pgt=(0.1, 0.9))
    assert first.startswith("Not a fair comparison: the baseline is no better") and last.startswith(
        "PGT is better by 30"
    )


@pytest.mark.parametrize(("method", "baseline"), [([0.9], [0.9]), ([0.9, 0.8], [0.9])])
def test_what_cannot_be_compared_is_an_error(method, baseline):
    with pytest.raises(ValueError, match="scores of the same seeds, at least 2"):
        compare(method, baseline)


@pytest.mark.parametrize("kind", ["grid", "random", "one"])
def test_the_heat_map_is_drawn_for_a_grid_and_for_scattered_points(tmp_path, kind):
    generator = random.Random(0)
    rates = {"grid": [0.01, 0.1, 1.0], "random": [10 ** generator.uniform(-3, 0) for _ in range(20)], "one": [0.1]}
    alphas = {"grid": [0.05, 0.5, 1.0], "random": [generator.random() for _ in range(20)], "one": [1.0]}
    points = [Point(alpha, rate, (generator.random(),)) for alpha in alphas[kind] for rate in rates[kind]]
    plot_heat_map(points, tmp_path / "map.png", kind)
    with Image.open(tmp_path / "map.png") as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(10**6)) > 50
    with pytest.raises(ValueError, match="points must hold"):
        plot_heat_map([], tmp_path / "none.png")


class Remember(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        group = inner.param_groups[0]
        self.seen.append((group["powergrad_alpha"], inner.powergrad.alpha, group["lr"], inner.powergrad.calls))


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["powergrad_sgd", pytest.param("sgd", marks=pytest.mark.long)])
def test_the_trainers_own_search_trains_each_trial_with_its_alpha_and_learning_rate(tmp_path, optim):
    trained = Remember()
    args = arguments(tmp_path, ours=True, optim=optim, max_steps=1, logging_strategy="no")
    trainer = PowerGradTrainer(
        args=args, model_init=lambda: wrapper(), train_dataset=Data(8), eval_dataset=Data(8), callbacks=[trained]
    )
    trials = []
    space = powergrad_hp_space((0.005, 0.5))

    def recorded(trial):
        trials.append(space(trial))
        return trials[-1]

    best = trainer.hyperparameter_search(recorded, n_trials=4)
    assert len({trial["alpha"] for trial in trials}) == 4
    for trial, (in_group, in_use, rate, calls) in zip(trials, trained.seen, strict=True):
        assert in_group == in_use == trial["alpha"]
        assert rate == trial["learning_rate"]
        assert calls == 1
    assert best.hyperparameters in trials


@pytest.mark.slow
def test_without_a_space_the_trainer_searches_around_its_own_learning_rate(tmp_path):
    trained = Remember()
    args = arguments(tmp_path, ours=True, optim="powergrad_sgd", max_steps=1, logging_strategy="no")
    trainer = PowerGradTrainer(
        args=args, model_init=lambda: wrapper(), train_dataset=Data(8), eval_dataset=Data(8), callbacks=[trained]
    )
    best = trainer.hyperparameter_search(n_trials=3, direction="maximize")
    assert set(best.hyperparameters) == {"alpha", "learning_rate"}
    assert all(0.05 <= alpha <= 1 and 0.005 <= rate <= 0.5 for alpha, _, rate, _ in trained.seen)
