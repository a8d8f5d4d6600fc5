"""A short form of the campaigns of this folder; ``make faults`` runs all of them."""

import pytest
from checkpoints import damages, kills, train, weights
from kill_at_file_events import kill_at

pytestmark = pytest.mark.slow


def test_training_survives_a_kill_and_a_damaged_file_with_the_same_bits(tmp_path):
    kill_at(None, lambda: train(tmp_path / "whole"), tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    damaged = [result for _, result in damages(tmp_path, expected, every=29)]
    killed = dict(kills(tmp_path, expected, every=75))
    assert damaged and set(damaged) == {"survived"}
    assert killed and set(killed.values()) == {"survived"}, killed
