import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from pgt_hf.analysis import best_calibrated, calibration_table, compare_calibration


def drawn(count: int, seed: int = 1, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from their softmax: calibrated as they stand."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return log_loss(labels, logits.double().softmax(-1), labels=range(logits.size(1)))


def test_folding_at_alpha_is_what_calibrates_logits_of_a_model_trained_at_alpha(device):
    logits, labels = drawn(5000)
    scores = compare_calibration((logits / 0.25).to(device), labels.to(device), alpha=0.25)
    assert scores["raw"].ece > 0.1
    assert scores["folded"].ece < 0.02
    assert scores["folded"].temperatures == (4.0,)
    assert scores["fitted"].temperatures == pytest.approx((4, 4), rel=0.1)
    assert scores["folded"].nll == pytest.approx(scores["fitted"].nll, rel=0.01)


@pytest.mark.slow
def test_each_half_is_scored_at_the_temperature_that_fits_the_other_half_best():
    logits, labels = drawn(60)
    halves = torch.randperm(60, generator=torch.Generator().manual_seed(3)).split(30)
    found = compare_calibration(logits, labels, seed=3)["fitted"]

    def at(half: torch.Tensor, temperature: float) -> float:
        return loss(logits[half] / temperature, labels[half])

    for half, temperature in zip(halves, found.temperatures, strict=True):
        assert all(at(half, temperature) <= at(half, other) + 1e-9 for other in np.geomspace(0.05, 50, 100))
    expected = [at(half, temperature) for half, temperature in zip(halves, reversed(found.temperatures), strict=True)]
    assert found.nll == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_images_without_a_label_are_left_out():
    logits, labels = drawn(100)
    padded = torch.cat([logits, torch.full((20, 4), 1e9)]), torch.cat([labels, torch.full((20,), -100)])
    for ours, expected in zip(compare_calibration(*padded).values(), compare_calibration(logits, labels).values()):
        assert (ours.nll, ours.ece, ours.brier) == (expected.nll, expected.ece, expected.brier)


def test_no_temperature_is_fitted_where_a_half_holds_no_mistake():
    assert list(compare_calibration(9 * torch.eye(4), torch.arange(4), alpha=0.5)) == ["raw", "folded"]
    assert "holds no mistake" in calibration_table(compare_calibration(9 * torch.eye(4), torch.arange(4)))


@pytest.mark.parametrize(("temperature", "best"), [(1, "raw"), (4, "folded"), (2, "fitted")])
def test_probabilities_that_the_labels_were_drawn_from_are_the_ones_to_use(temperature, best):
    logits, labels = drawn(5000)
    found = compare_calibration(temperature * logits, labels, alpha=0.25)
    assert best_calibrated(found) == best or found[best].nll == pytest.approx(found["fitted"].nll, rel=1e-3)
    assert found["fitted"].temperature == pytest.approx(temperature, rel=0.05)
    assert f"Lowest NLL: {best_calibrated(found)}, softmax(z" in calibration_table(found)


@pytest.mark.parametrize("alpha", [None, 1, 0])
def test_where_nothing_can_be_folded_there_is_no_folded_row(alpha):
    assert list(compare_calibration(*drawn(50), alpha=alpha)) == ["raw", "fitted"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_calibration(torch.tensor([[0.0, float("nan")]]), torch.tensor([0])), "logits must be finite"),
        (
            lambda: compare_calibration(torch.zeros(1, 3), torch.tensor([-100])),
            "at least 1 image to score, got -100 alone",
        ),
        (lambda: compare_calibration(torch.zeros(2, 3), torch.tensor([0, 1]), alpha=-1), "alpha must lie in"),
    ],
)
def test_what_cannot_be_calibrated_is_an_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()
