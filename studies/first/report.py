"""Draws the first study's figures and writes the tables of its README.md anew, from its rows.

python -m studies.first.report
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pgt_hf.analysis import Comparison, History, compare, new_figure, save

from ..settings import PARTS, SEARCH_SEEDS, Setting
from ..tables import accuracy, difference, header, line, mean, place

__all__ = ["main"]

HERE = Path(__file__).parent
ALPHAS = (1.0, 0.5, 0.25, 0.1, 0.05)
PAIRS = [(data, network) for data in ("tiny-imagenet", "fashion-mnist") for network in ("bn", "norm-free")]
STEPS = {"tiny-imagenet": 780, "fashion-mnist": 390}  # of a training
COLUMNS = ("learning rate", "lr wd T", "seeds", "test top-1 (%)")
PGT = 0.25  # the alpha of the rows that are not about alpha
Row = dict[str, Any]


def main() -> None:
    """Everything that is drawn or tabulated, in place."""
    study = Study(read_rows())
    place(HERE / "README.md", {name: table(study) for name, table in TABLES.items()})
    for name, draw in FIGURES.items():
        save(draw(study), HERE / "figures" / f"{name}.png", None)


def read_rows() -> list[Row]:
    lines = (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in lines]


def equivalents(setting: Setting) -> list[tuple[Setting, float]]:
    """Two other ways to write a run of PGT, exact under SGD, with the factors on its learning rate."""
    alpha, decay = setting.alpha, setting.weight_decay
    return [
        (replace(setting, method="parts", parts=tuple(PARTS)), 1.0),
        (replace(setting, method="temperature", weight_decay=alpha * decay), 1 / alpha),
    ]


class Study:
    """The rows by setting; the trainings of the search apart from those of the tables."""

    def __init__(self, rows: list[Row]) -> None:
        self.searched: dict[Setting, dict[float, float]] = {}
        self.trained: dict[Setting, dict[int, Row]] = {}
        again: dict[Setting, dict[float, float]] = {}
        for row in rows:
            setting = Setting.from_row(row)
            if row["seed"] in SEARCH_SEEDS:
                found = self.searched if row["seed"] == SEARCH_SEEDS[0] else again
                found.setdefault(setting, {})[row["learning_rate"]] = row["select_top1"]
            else:
                self.trained.setdefault(setting, {})[row["seed"]] = row
        self.chosen = {
            setting: max(seconds, key=lambda rate: self.searched[setting][rate] + seconds[rate])
            for setting, seconds in again.items()
        }
        for setting, trained in self.trained.items():
            for row in trained.values():
                if row["learning_rate"] != self.rate(setting):
                    raise ValueError(f"the search chose learning rate {self.rate(setting)} for {setting}, got {row}")

    def rate(self, setting: Setting) -> float:
        """The learning rate that the setting's search chose, or that of the setting that it follows."""
        if setting in self.chosen:
            return self.chosen[setting]
        if setting.label_smoothing:
            return self.chosen[replace(setting, label_smoothing=0.0)]
        pgt = Setting(setting.data, setting.network, setting.alpha)
        return self.chosen[pgt] * dict(equivalents(pgt))[setting]

    def values(self, setting: Setting, key: str | Callable[[Row], float]) -> list[float]:
        """One for each seed, in their order; empty where there is none, as of a run that diverged."""
        rows = [row for _, row in sorted(self.trained.get(setting, {}).items())]
        values = [key(row) if callable(key) else row.get(key) for row in rows]
        return [] if any(value is None for value in values) else values

    def versus(self, setting: Setting, baseline: Setting) -> Comparison | None:
        """The difference in test top-1 over the seeds that both have."""
        seeds = sorted(set(self.trained.get(setting, {})) & set(self.trained.get(baseline, {})))
        if len(seeds) < 2:
            return None
        return compare(*([self.trained[which][seed]["test_top1"] for seed in seeds] for which in (setting, baseline)))


def gap(row: Row) -> float:
    return row["train_top1"] - row["test_top1"]


# --- tables


def rate(study: Study, setting: Setting) -> str:
    return f"{study.rate(setting):.4g}"


def time_scale(study: Study, setting: Setting) -> str:
    """Learning rate times weight decay times steps: through it the weights feel their decay."""
    return f"{study.rate(setting) * setting.weight_decay * STEPS[setting.data]:.2g}"


def row(study: Study, label: str, setting: Setting, baseline: Setting) -> str:
    against = "" if setting == baseline else difference(study.versus(setting, baseline))
    top1 = study.values(setting, "test_top1")
    return line(label, rate(study, setting), time_scale(study, setting), str(len(top1)), accuracy(top1), against)


def alphas(study: Study) -> list[str]:
    lines = header("data", "network", "alpha", *COLUMNS, "minus alpha = 1")
    for data, network in PAIRS:
        for alpha in ALPHAS:
            label = f"{data} | {network} | {alpha:g}"
            lines.append(row(study, label, Setting(data, network, alpha), Setting(data, network)))
    return lines


def trends(study: Study) -> list[str]:
    lines = header(
        "data", "network", "alpha", "train top-1 (%)", "gap (points)", "train loss", "test NLL", "folded NLL",
        "fitted NLL", "ECE", "folded ECE", "logit norm", "feature norm",
    )  # fmt: skip
    for data, network in PAIRS:
        for alpha in ALPHAS:
            setting = Setting(data, network, alpha)
            cells = [mean(study.values(setting, "train_top1"), 100), mean(study.values(setting, gap), 100)]
            keys = ["train_loss", "raw_nll", "folded_nll", "fitted_nll", "raw_ece", "folded_ece"]
            if alpha == 1:  # nothing to fold
                keys = [key.replace("folded", "raw") for key in keys]
            cells += [mean(study.values(setting, key)) for key in (*keys, "logit_norm", "feature_norm")]
            lines.append(line(data, network, f"{alpha:g}", *cells))
    return lines


def smoothing(study: Study) -> list[str]:
    lines = header("data", "network", "alpha", "top-1 (%)", "smoothed", "smoothed minus not", "gap", "gap, smoothed")
    for data, network in PAIRS:
        for alpha in ALPHAS:
            plain = Setting(data, network, alpha)
            smooth = replace(plain, label_smoothing=0.1)
            cells = [accuracy(study.values(which, "test_top1")) for which in (plain, smooth)]
            cells.append(difference(study.versus(smooth, plain)))
            cells += [mean(study.values(which, gap), 100) for which in (plain, smooth)]
            lines.append(line(data, network, f"{alpha:g}", *cells))
    return lines


def methods(network: str) -> list[tuple[str, Setting]]:
    pgt = Setting("tiny-imagenet", network, PGT)
    (parts, _), (translated, _) = equivalents(pgt)
    rows = [
        ("cross-entropy", Setting("tiny-imagenet", network)),
        (f"PGT, alpha {PGT:g}", pgt),
        ("the same by all four parts", parts),
        ("the same by a translated temperature", translated),
        (f"temperature {1 / PGT:g}, lr searched", replace(pgt, method="temperature")),
    ]
    if network == "norm-free":
        return rows
    low = Setting("tiny-imagenet", network, 0.05)
    rows += [("PGT, alpha 0.05", low), ("temperature 20, lr searched", replace(low, method="temperature"))]
    return rows + [(f"only: {text}", replace(pgt, method="parts", parts=(part,))) for part, text in PARTS.items()]


def same_by_other_means(study: Study) -> list[str]:
    lines = header("network", "method", *COLUMNS, "minus cross-entropy", "logit norm")
    for network in ("bn", "norm-free"):
        for label, setting in methods(network):
            cells = row(study, f"{network} | {label}", setting, Setting("tiny-imagenet", network))
            lines.append(f"{cells} {mean(study.values(setting, 'logit_norm'))} |")
    return lines


def clipped() -> list[tuple[str, Setting]]:
    plain = Setting("tiny-imagenet", "norm-free")
    losses = {"cross-entropy": 1.0, f"PGT, alpha {PGT:g}": PGT}
    return [
        (loss + name, replace(plain, alpha=alpha, clip=clip))
        for clip, name in ((None, ""), ("agc", " + AGC 0.01"), ("norm", " + GC 1.0"))
        for loss, alpha in losses.items()
    ]


def clipping(study: Study) -> list[str]:
    lines = header("method", *COLUMNS, "minus cross-entropy", "smallest filter norm")
    for label, setting in clipped():
        cells = row(study, label, setting, Setting("tiny-imagenet", "norm-free"))
        lines.append(f"{cells} {mean(study.values(setting, 'smallest_filter'))} |")
    return lines


def filters(study: Study) -> list[str]:
    lines = header("data", "network", "alpha", "filters", "at zero", "below 0.1", "smallest norm")
    for data, network in PAIRS:
        for alpha in ALPHAS:
            setting = Setting(data, network, alpha)
            cells = [
                mean(study.values(setting, key)) for key in ("zeroed_filters", "small_filters", "smallest_filter")
            ]
            lines.append(line(data, network, f"{alpha:g}", *map(str, study.values(setting, "filters")[:1]), *cells))
    return lines


TABLES: dict[str, Callable[[Study], list[str]]] = {
    "alphas": alphas,
    "trends": trends,
    "smoothing": smoothing,
    "methods": same_by_other_means,
    "clipping": clipping,
    "filters": filters,
}


# --- figures


def colour(alpha: float) -> str:
    return f"C{ALPHAS.index(alpha)}"


def search_figure(study: Study) -> Figure:
    figure, grid = new_figure(2, 2, (9, 6.5))
    for axes, (data, network) in zip(grid.flat, PAIRS, strict=True):
        for alpha in ALPHAS:
            tried = sorted(study.searched.get(Setting(data, network, alpha), {}).items())
            if tried:
                axes.plot(
                    [rate for rate, _ in tried], [100 * top1 for _, top1 in tried], "o-", color=colour(alpha),
                    label=f"alpha = {alpha:g}",
                )  # fmt: skip
        axes.set(xscale="log", xlabel="learning rate", ylabel="top-1 (%)", title=f"{data}, {network}")
        rates = sorted({rate for line in axes.lines for rate in line.get_xdata()})
        axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
        axes.minorticks_off()
        if axes.lines:
            axes.legend(fontsize=8)
    figure.suptitle("The search: its first seed, on images that the tables do not use")
    return figure


def difference_figure(study: Study) -> Figure:
    figure, grid = new_figure(1, 4, (11, 3.2))
    for axes, (data, network) in zip(grid.flat, PAIRS, strict=True):
        found = {
            alpha: comparison
            for alpha in ALPHAS[1:]
            if (comparison := study.versus(Setting(data, network, alpha), Setting(data, network)))
        }
        axes.errorbar(
            list(found), [100 * c.difference for c in found.values()], [100 * c.half_width for c in found.values()],
            fmt="o", capsize=3,
        )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="alpha", title=f"{data}, {network}")
        axes.set_xticks(list(found), [f"{alpha:g}" for alpha in found])
        axes.minorticks_off()
    grid[0, 0].set_ylabel("top-1 minus cross-entropy's (points)")
    return figure


def trend_figure(study: Study) -> Figure:
    shown = {
        "logit norm": "logit_norm",
        "test NLL": "raw_nll",
        "test NLL, fitted temperature": "fitted_nll",
        "train minus test top-1": lambda row: 100 * gap(row),
    }
    figure, grid = new_figure(len(PAIRS), len(shown), (12, 10), sharex=True)
    for line_of, (data, network) in zip(grid, PAIRS, strict=True):
        for axes, (label, key) in zip(line_of, shown.items(), strict=True):
            points = {alpha: study.values(Setting(data, network, alpha), key) for alpha in ALPHAS}
            for alpha, values in points.items():
                axes.plot([alpha] * len(values), values, "o", color="C0", alpha=0.5)
            centres = {alpha: statistics.fmean(values) for alpha, values in points.items() if values}
            axes.plot(list(centres), list(centres.values()), "-", color="C0")
            axes.set(xscale="log", title=label, xlabel="alpha")
            axes.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
            axes.minorticks_off()
        line_of[0].set_ylabel(f"{data}, {network}")
    return figure


def filter_figure(study: Study) -> Figure:
    """The norm of every filter over that which it began with; norm-free networks, one seed."""
    shown = (1.0, PGT, 0.05)
    figure, grid = new_figure(2, len(shown), (10, 5), sharex=True, sharey=True)
    for line_of, data in zip(grid, ("tiny-imagenet", "fashion-mnist"), strict=True):
        for axes, alpha in zip(line_of, shown, strict=True):
            path = HERE / "diagnostics" / f"{data}_norm-free_{alpha:g}.npz"
            for name, norms in History.read(path).items() if path.is_file() else ():
                if name.startswith("filter/") and not name.endswith(".fc"):
                    axes.plot(norms / norms[0], color="C0", linewidth=0.4, alpha=0.3)
            axes.set(title=f"{data}, alpha = {alpha:g}", ylim=(0, 2.5))
        line_of[0].set_ylabel("filter norm / its first")
    for axes in grid[1]:
        axes.set_xlabel("snapshots, every 20 steps")
    return figure


def method_figure(study: Study) -> Figure:
    rows = [("norm-free", clipped()), ("norm-free", methods("norm-free")[2:]), ("bn", methods("bn"))]
    entries = [
        (f"{label}  [{network}]", found)
        for network, settings in rows
        for label, setting in settings
        if (found := study.versus(setting, Setting("tiny-imagenet", network))) and found.half_width
    ]
    figure, grid = new_figure(1, 1, (9, 1 + 0.32 * len(entries)))
    axes = grid[0, 0]
    axes.errorbar(
        [100 * found.difference for _, found in entries], range(len(entries)),
        xerr=[100 * found.half_width for _, found in entries], fmt="o", capsize=3,
    )  # fmt: skip
    axes.set_yticks(range(len(entries)), [label for label, _ in entries], fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(title="Tiny-ImageNet", xlabel="top-1 minus cross-entropy's (points)")
    return figure


FIGURES: dict[str, Callable[[Study], Figure]] = {
    "search": search_figure,
    "differences": difference_figure,
    "trends": trend_figure,
    "filters": filter_figure,
    "methods": method_figure,
}


if __name__ == "__main__":
    main()
