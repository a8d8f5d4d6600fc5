"""Pictures of everything recorded in training runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis.diagnostics import History
from ..analysis.figures import require_matplotlib
from ..analysis.run_plots import (
    FINALS,
    plot_against_alpha,
    plot_filter_norms,
    plot_gradients,
    plot_logits,
    plot_normalization,
    plot_probabilities,
    plot_training_curve,
)
from ..limits import checked
from .record import CURVE, DIAGNOSTICS, read_history

_PICTURES = {
    "logits": (plot_logits, "logit_norm"),
    "filters": (plot_filter_norms, "filter/"),
    "gradients": (plot_gradients, "gradient/"),
    "normalization": (plot_normalization, "weight_norm/"),
    "probabilities": (plot_probabilities, "curve_power_sums"),
}


@checked
def draw_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Draws everything that runs have recorded into their folders ``plots``, and returns the pictures' paths.

    With several runs, their final values are drawn against alpha, in the first one's folder.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: A folder holds no record of a run.

    Example:
        >>> draw_runs(["runs/digits"])
    """
    require_matplotlib()
    if not len(folders):
        raise ValueError("folders must name at least one run, got none")
    drawn: list[Path] = []
    runs: dict[str, dict[str, float]] = {}
    for folder, (data, history) in {Path(folder): _recorded(Path(folder)) for folder in folders}.items():
        (folder / "plots").mkdir(exist_ok=True)
        title = folder.name + (f", alpha = {data['alpha'][-1]:g}" if data else "")
        for name, (draw, needed) in _PICTURES.items():
            if any(key.startswith(needed) for key in data):
                drawn.append(folder / "plots" / f"{name}.png")
                draw(data, drawn[-1], title)
        if history:
            drawn.append(folder / "plots" / CURVE)
            plot_training_curve(history, drawn[-1], title)
        runs[str(folder)] = _final_values(data, history)
    runs = {name: run for name, run in runs.items() if "alpha" in run}
    if len(runs) > 1:
        drawn.append(Path(folders[0], "plots", "against_alpha.png"))
        plot_against_alpha(runs, drawn[-1])
    return drawn


def _recorded(folder: Path) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """What was recorded for the pictures, and what was logged."""
    recorded, history = folder / DIAGNOSTICS, read_history(folder)
    data = History.read(recorded) if recorded.is_file() else {}
    if not data and not history:
        raise FileNotFoundError(f"{folder} has no record of a run: no {DIAGNOSTICS}, no history, no checkpoint")
    return data, history


def _final_values(data: Mapping[str, Any], history: list[dict[str, Any]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for entry in history:
        values |= {key: entry[key] for key in FINALS if key in entry}
        if "powergrad_alpha" in entry:
            values["alpha"] = entry["powergrad_alpha"]
    recorded = {key: float(data[key][-1]) for key in ("alpha", "logit_norm", "gradient_cosine") if key in data}
    return recorded | values
