"""Draws the study's figures and writes the tables of README.md anew, from ``results.jsonl`` and ``diagnostics/``.

python -m studies.report
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pgt_hf.analysis import History, new_figure, save

from .results import Study
from .run import HERE, finalists, read_rows, trials
from .settings import (
    AGAIN,
    ALPHAS,
    HIGH_DECAY,
    LADDERS,
    LONG,
    NORMS,
    OTHER_CLASSES,
    PILOT_ALPHAS,
    PILOTS,
    RATES,
    SCALE,
    SCALES,
    WIDE,
    Key,
    Row,
    Search,
    Setting,
    TextScale,
    plan,
)
from .tables import accuracy, difference, header, line, loss, mean, place

__all__ = ["main"]

NETWORKS = ("norm-free", "bn")
SGD_SEARCHES = ("sgd/norm-free", "sgd/bn")
SEARCHES = (*SGD_SEARCHES, "adamw/bn")
ELSEWHERE = {"medium": "100 classes", "fashion": "Fashion-MNIST"}


def main() -> None:
    """Everything that is drawn or tabulated, in place."""
    study = Study(read_rows())
    (HERE / "figures").mkdir(exist_ok=True)
    place(HERE / "README.md", {name: TABLES[name](study) for name in TABLES if name != "evidence"})
    place(HERE.parent / "docs" / "evidence.md", {"evidence": evidence(study)})
    for name, draw in FIGURES.items():
        figure = draw(study)
        for axes in figure.axes:
            axes.set_visible(axes.has_data())  # there may be no rows yet
        save(figure, HERE / "figures" / f"{name}.png", None)


def rung(network: str, alpha: float, decay: float) -> Setting:
    """A setting of the ladder."""
    return Setting("tiny-imagenet", network, alpha, weight_decay=decay, scale=SCALE)


def ladder(network: str) -> Callable[[Study], list[str]]:
    """Accuracy, and filters that are dying, by weight decay and alpha."""

    def table(study: Study) -> list[str]:
        group = f"ladder/{network}"
        lines = header("wd", "lr wd T", "alpha", *OUTCOME, "minus alpha = 1", *DYING)
        for decay, alpha in product(LADDERS[network], ALPHAS):
            key, plain = (group, rung(network, alpha, decay)), (group, rung(network, 1.0, decay))
            if cells := outcome(study, key, plain):
                time = mean(study.values(*key, "decay_time"))
                lines.append(line(f"{decay:g}", time, f"{alpha:g}", *cells, *dying(study, key)))
        return lines

    return table


OUTCOME = ("seeds", "train top-1 (%)", "test top-1 (%)")
DYING = ("filters below 0.1", "at 0")


def outcome(study: Study, key: Key, baseline: Key, measured: str = "test_top1") -> list[str]:
    """The cells below ``OUTCOME`` and the difference to the baseline; none where nothing was trained."""
    values = study.values(*key, measured)
    if not values:
        return []
    of_loss = measured.endswith("loss")
    found = "" if key == baseline else difference(study.versus(key, baseline, measured), 1 if of_loss else 100)
    train = mean(study.values(*key, "train_top1"), 100)
    return [str(len(values)), train, (loss if of_loss else accuracy)(values), found]


def dying(study: Study, key: Key) -> list[str]:
    """The cells below ``DYING``."""
    return [mean(study.values(*key, name)) for name in ("small_filters", "zeroed_filters")]


def rescue(study: Study) -> list[str]:
    """The ladder's high weight decay again: what PGT does there, and what a plain run needs to do it."""
    lines = header("network", "method", "batch", "epochs", "lr", "wd", *OUTCOME, "minus cross-entropy", *DYING)
    for key, rate, baseline in _others(study):
        if cells := outcome(study, key, baseline):
            setting = key[1]
            lines.append(
                line(
                    f"{setting.network}, {setting.optimizer}",
                    describe(setting),
                    str(setting.batch),
                    str(SCALES[setting.scale].epochs),
                    f"{rate:g}",
                    f"{setting.weight_decay:g}",
                    *cells,
                    *dying(study, key),
                )
            )
    return lines


def _others(study: Study) -> Iterable[tuple[Key, float, Key]]:
    """Rows at fixed settings beside the ladder, each after cross-entropy and PGT at the same settings."""
    shown: set[Key] = set()
    for item in study.items:
        if not isinstance(item, Row) or item.setting.scale not in (SCALE, LONG) or item.group.startswith("ladder"):
            continue
        own = item.group.startswith(("batch", "rate", "adamw", "long"))  # groups with a baseline of their own
        plain = replace(item.setting, alpha=1.0, method="pgt", parts=(), clip=None)
        baseline = (item.group if own else f"ladder/{item.setting.network}", plain)
        if not own and baseline not in shown:
            shown.add(baseline)
            for alpha in ALPHAS:
                yield (baseline[0], replace(plain, alpha=alpha)), item.learning_rate, baseline
        yield item.key, item.learning_rate, baseline


def describe(setting: Setting) -> str:
    """The method in words."""
    if setting.method == "parts":
        names = ["the head's three changes"] if "init" in setting.parts else []
        names += ["1/alpha times the gradient into the features"] if "features" in setting.parts else []
        names += ["norms learn 1/alpha times faster"] if set(NORMS) & set(setting.parts) else []
        text = f"plain, {' and '.join(names)} (alpha {setting.alpha:g})"
    else:
        text = "cross-entropy" if setting.alpha == 1 else f"PGT, alpha {setting.alpha:g}"
    return text + (" + AGC 0.01" if setting.clip == "agc" else "")


def searches(study: Study) -> list[str]:
    """Where each search is, and what it found."""
    lines = header("network", "alpha", "trials", "pruned", "lr", "wd", "lr wd T",
                   "top-1 on the search's images, seed 0 (%)", "second best")  # fmt: skip
    for name, alpha in product(SEARCHES, ALPHAS):
        search = study.searches[f"{SCALE}/search/{name}/{alpha:g}"]
        done = trials(search, study.lines)
        chosen = study.chosen[search.name]
        best = sorted(finalists(done), key=lambda row: (Setting.from_row(row), row["learning_rate"]) != chosen)
        if not best:
            continue
        top = best[0]
        lines.append(
            line(
                _network(name),
                f"{alpha:g}",
                f"{len(done)} of {search.trials}",
                str(sum(row["verdict"] == "pruned" for row in done)),
                f"{top['learning_rate']:.3g}",
                f"{top['weight_decay']:.2g}",
                f"{top['decay_time']:.2g}",
                f"{100 * top['select_top1']:.2f}",
                f"{100 * best[1]['select_top1']:.2f}" if len(best) > 1 else "-",
            )
        )
    return lines


def _network(name: str) -> str:
    optimizer, network = name.split("/")
    return f"{network}, {optimizer}"


def tuned(study: Study) -> list[str]:
    """Each alpha at the learning rate and weight decay of its own search."""
    lines = header(*SEARCHED, "epochs to alpha 1's last")
    for name, alpha in product(SEARCHES, ALPHAS):
        search, plain = study.with_plain(f"{SCALE}/search/{name}", alpha)
        if cells := searched(study, search, plain):
            lines.append(line(*cells, epochs_to(study, search.key, plain.key)))
    return lines


SEARCHED = ("network", "alpha", "lr", "wd", "lr wd T", *OUTCOME, "minus alpha = 1", DYING[0])


def searched(study: Study, search: Search, plain: Search) -> list[str]:
    """The cells below ``SEARCHED``; none where nothing was trained."""
    cells = outcome(study, search.key, plain.key)
    if not cells:
        return []
    setting, time = search.setting, mean(study.values(*search.key, "decay_time"))
    network = f"{setting.network}, {setting.optimizer}"
    return [network, f"{setting.alpha:g}", *found_by(study, search), time, *cells, dying(study, search.key)[0]]


def found_by(study: Study, search: Search) -> list[str]:
    """The learning rate and the weight decay that a search has chosen."""
    chosen = study.chosen[search.name]
    assert chosen is not None  # or no seed of the tables would have been trained
    return [f"{chosen[1]:.3g}", f"{chosen[0].weight_decay:.2g}"]


def epochs_to(study: Study, key: Key, baseline: Key) -> str:
    """The first epoch at which the mean curve is at the last point of the baseline's, over the seeds of both."""
    ours, theirs = (study.trained.get(which, {}) for which in (key, baseline))
    seeds = set(ours) & set(theirs)
    if not seeds:
        return "-"
    goal = statistics.fmean(theirs[seed]["curve"][-1] for seed in seeds)
    curve = np.mean([ours[seed]["curve"] for seed in seeds], axis=0)
    reached = np.flatnonzero(curve >= goal)
    return str(int(reached[0]) + 1) if len(reached) else "not"


def elsewhere(study: Study) -> list[str]:
    """The same on more classes, and on another data set."""
    lines = header("images", *SEARCHED)
    for (scale, images), name, alpha in product(ELSEWHERE.items(), SGD_SEARCHES, ALPHAS):
        if cells := searched(study, *study.with_plain(f"{scale}/search/{name}", alpha)):
            lines.append(line(images, *cells))
    return lines


def pilots(study: Study) -> list[str]:
    """Where else it could pay: each alpha at the learning rate and weight decay of its own search."""
    lines = header("pilot", "alpha", "trials", "lr", "wd", *OUTCOME[:2], "test top-1 (%) or loss", "minus alpha = 1")
    for scale, alpha in product(PILOTS, PILOT_ALPHAS):
        search, plain = study.with_plain(f"{scale}/pilot", alpha)
        measured = "test_loss" if isinstance(PILOTS[scale], TextScale) else "test_top1"
        if cells := outcome(study, search.key, plain.key, measured):
            lines.append(line(scale, f"{alpha:g}", str(search.trials), *found_by(study, search), *cells))
    return lines


def again(study: Study) -> list[str]:
    """The pilot that looked like a gain, on other seeds too, and cross-entropy at what PGT's searches found."""
    found = [study.searches[f"{AGAIN}/pilot/{alpha:g}"] for alpha in PILOT_ALPHAS]
    searched = [(search.key, *(study.chosen[search.name] or (search.setting, 0.0))) for search in found]
    return against_the_best(study.all_seeds, [*searched, *_rows(AGAIN)])


def carried_over(scale: str) -> Callable[[Study], list[str]]:
    """Other classes at the settings that were found before."""
    return lambda study: against_the_best(study.all_seeds, _rows(scale))


def _rows(scale: str) -> list[tuple[Key, Setting, float]]:
    return [(item.key, item.setting, item.learning_rate) for item in plan(scale) if isinstance(item, Row)]


def against_the_best(study: Study, rows: list[tuple[Key, Setting, float]]) -> list[str]:
    """Several settings of each alpha; of the baseline's, the one counts that is best on the search's images."""
    lines = header("alpha", "lr", "wd", *OUTCOME, "minus the best of alpha = 1")
    tops = {key: statistics.fmean(study.values(*key, "select_top1") or [0.0]) for key, _, _ in rows}
    best = max((key for key in tops if key[1].alpha == 1), key=lambda key: tops[key])
    for key, setting, rate in rows:
        if cells := outcome(study, key, best):
            settings = setting.alpha, rate, setting.weight_decay
            lines.append(line(*(f"{value:.3g}" for value in settings), *cells))
    return lines


def evidence(study: Study) -> list[str]:
    """The table of docs/evidence.md: one line for each weight decay, and one for what was searched."""
    lines = header("network", "weight decay", "lr wd T", "seeds", *(f"alpha {alpha:g}" for alpha in ALPHAS))
    for network in NETWORKS:
        group = f"search/sgd/{network}"
        rows = [(f"ladder/{network}", rung(network, 1.0, decay), f"{decay:g}") for decay in LADDERS[network]]
        rows.append((group, study.searches[f"{SCALE}/{group}/1"].setting, "searched with lr"))
        for name, plain, label in rows:
            settings = [replace(plain, alpha=alpha) for alpha in ALPHAS]
            counts = [len(study.values(name, setting, "test_top1")) for setting in settings]
            if not any(counts):
                continue
            scale = mean(study.values(name, plain, "decay_time")) if name != group else ""
            cells = [_cell(study, name, setting, plain) for setting in settings]
            lines.append(line(network, label, scale, "/".join(map(str, counts)), *cells))
    return lines


def _cell(study: Study, group: str, setting: Setting, plain: Setting) -> str:
    """Top-1 and dying filters; in bold where the paired interval of the difference to alpha 1 leaves out 0."""
    top1 = study.values(group, setting, "test_top1")
    if not top1:
        return "-"
    text = (
        f"{100 * statistics.fmean(top1):.1f} ({statistics.fmean(study.values(group, setting, 'small_filters')):.0f})"
    )
    found = study.versus((group, setting), (group, plain)) if setting != plain else None
    return f"**{text}**" if found is not None and found.found else text


TABLES: dict[str, Callable[[Study], list[str]]] = {
    "ladder norm-free": ladder("norm-free"),
    "ladder bn": ladder("bn"),
    "ladder bn again": lambda study: ladder("bn")(study.again),
    "rescue": rescue,
    "searches": searches,
    "tuned": tuned,
    "elsewhere": elsewhere,
    "pilots": pilots,
    "again": again,
    "carried over": carried_over(OTHER_CLASSES),
    "200 classes": carried_over(WIDE),
    "evidence": evidence,
}


# --- figures


def colour(alpha: float) -> str:
    return f"C{ALPHAS.index(alpha)}"


def ladder_figure(study: Study) -> Figure:
    """Accuracy and dying filters by weight decay, where there are several: the mean, and each seed as a dot."""
    networks = [
        network
        for network in NETWORKS
        if sum(
            bool(study.values(f"ladder/{network}", rung(network, 1.0, decay), "seed")) for decay in LADDERS[network]
        )
        > 1
    ]
    figure, grid = new_figure(max(len(networks), 1), 2, (9, 3.25 * max(len(networks), 1)))
    shown = {"test_top1": "test top-1 (%)", "small_filters": "filters below a tenth of their norm"}
    for axes_of, network in zip(grid, networks, strict=False):
        for axes, (key, label) in zip(axes_of, shown.items(), strict=True):
            scale = 100 if key == "test_top1" else 1
            for alpha in ALPHAS:
                found = {
                    decay: [
                        scale * value for value in study.values(f"ladder/{network}", rung(network, alpha, decay), key)
                    ]
                    for decay in LADDERS[network]
                }
                centres = {decay: statistics.fmean(values) for decay, values in found.items() if values}
                axes.plot(list(centres), list(centres.values()), "-", color=colour(alpha), label=f"alpha = {alpha:g}")
                for decay, values in found.items():
                    axes.plot([decay] * len(values), values, "o", markersize=4, alpha=0.6, color=colour(alpha))
            axes.set(xscale="log", xlim=(0.5 * LADDERS[network][0], 2 * LADDERS[network][-1]), xlabel="weight decay")
            axes.set_ylim(bottom=0)
            axes.set_title(f"{network}, learning rate {RATES[network]:g}: {label}", fontsize=9)
            axes.grid(alpha=0.3)
        axes_of[0].legend(fontsize=8)
    return figure


def search_figure(study: Study) -> Figure:
    """All trials: learning rate, weight decay, accuracy as colour; pruned ones small."""
    begun = [name for name in SEARCHES if trials(study.searches[f"{SCALE}/search/{name}/1"], study.lines)]
    figure, grid = new_figure(max(1, len(begun)), len(ALPHAS), (12, 3 * max(1, len(begun))))
    for axes_of, name in zip(grid, begun, strict=False):
        done = {a: trials(study.searches[f"{SCALE}/search/{name}/{a:g}"], study.lines) for a in ALPHAS}
        best = max((row["select_top1"] for rows in done.values() for row in rows), default=1.0)
        for axes, alpha in zip(axes_of, ALPHAS, strict=True):
            if not (rows := done[alpha]):
                continue
            points = axes.scatter(
                [row["learning_rate"] for row in rows],
                [row["weight_decay"] for row in rows],
                [15 if row["verdict"] == "pruned" else 60 for row in rows],
                [100 * row["curve"][-1] for row in rows],
                vmin=0,
                vmax=100 * best,
            )
            axes.set(xscale="log", yscale="log", title=f"{_network(name)}, alpha = {alpha:g}", xlabel="learning rate")
            search = study.searches[f"{SCALE}/search/{name}/{alpha:g}"]
            axes.set(xlim=search.rates, ylim=search.decays)
            axes.xaxis.set_minor_formatter("")
            axes.title.set_size(9)
        axes_of[0].set_ylabel("weight decay")
        figure.colorbar(points, ax=axes_of, label="top-1 (%)")
    return figure


def _recorded(group: str, alpha: float) -> dict[str, Any]:
    path = HERE / "diagnostics" / f"{SCALE}_{group.replace('/', '_')}_{alpha:g}.npz"
    return History.read(path) if path.is_file() else {}


def filter_figure(study: Study) -> Figure:
    """The norm of every filter over that which it began with, at the ladder's high weight decay; one seed."""
    figure, grid = new_figure(2, len(ALPHAS), (12, 6), sharey=True)
    for axes_of, network in zip(grid, NETWORKS, strict=True):
        for axes, alpha in zip(axes_of, ALPHAS, strict=True):
            data = _recorded(f"ladder/{network}", alpha)
            for name, norms in data.items():
                if name.startswith("filter/") and not name.endswith(".fc"):
                    axes.plot(data["step"], norms / norms[0], color="C0", linewidth=0.4, alpha=0.3)
            axes.set(title=f"{network}, alpha = {alpha:g}", ylim=(0, 2), xlabel="step")
            axes.title.set_size(9)
        axes_of[0].set_ylabel("filter norm / its first")
    return figure


DYNAMICS = {
    "weight_norm": "norm of the weight",
    "effective_lr": "lr / norm of the weight squared",
    "angle": "angle turned by a step (rad)",
    "norm_scale": "mean |scale| of the norm",
    "norm_bias": "mean bias of the norm",
}


def dynamics_figure(study: Study) -> Figure:
    """What PGT does to layers under batch norm: the mean over the layers, one seed; at the high and searched wd."""
    figure, grid = new_figure(2, len(DYNAMICS), (15, 5.5), sharex=True)
    for axes_of, group in zip(grid, ("ladder/bn", "search/sgd/bn"), strict=True):
        for alpha in ALPHAS:
            data = _recorded(group, alpha)
            for axes, key in zip(axes_of, DYNAMICS, strict=True):
                layers = [values for name, values in data.items() if name.startswith(f"{key}/")]
                if layers:
                    log = key in ("effective_lr", "angle")
                    centre = np.exp(np.log(np.maximum(layers, 1e-9)).mean(0)) if log else np.mean(layers, axis=0)
                    axes.plot(data["step"][1:], centre[1:], color=colour(alpha), label=f"alpha = {alpha:g}")
        for axes, (key, label) in zip(axes_of, DYNAMICS.items(), strict=True):
            if key in ("effective_lr", "angle") and axes.lines:
                axes.set_yscale("log")
            axes.set_title(label, fontsize=9)
            axes.grid(alpha=0.3)
        high = f"wd {HIGH_DECAY['bn']:g}, lr {RATES['bn']:g}"
        axes_of[0].set_ylabel(high if group.startswith("ladder") else "lr and wd searched")
        if axes_of[0].lines:
            axes_of[0].legend(fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure


FIGURES: dict[str, Callable[[Study], Figure]] = {
    "ladder": ladder_figure,
    "search": search_figure,
    "filters": filter_figure,
    "dynamics": dynamics_figure,
}


if __name__ == "__main__":
    main()
