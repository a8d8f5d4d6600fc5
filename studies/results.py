"""``Study``: the lines of ``results.jsonl`` by what the plan says of them; those that do not agree are refused."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from pgt_hf.analysis import Comparison, compare

from .run import trials, winner
from .settings import AGAIN_SEEDS, SCALES, SEARCH_SEEDS, SEEDS, Key, Row, Search, Setting, plan

__all__ = ["Line", "Study"]

Line = dict[str, Any]
SHOWN = (*SEEDS, *AGAIN_SEEDS)


class Study:
    """The lines by what the plan says of them; tables show those of some seeds.

    Raises:
        ValueError: A line is not what the plan asks for, or the search that is to have chosen it; a search has other
            trials than its plan; or a line is there twice, or differs from its like in steps, precision or device.
    """

    def __init__(self, lines: list[Line], seeds: tuple[int, ...] = SEEDS) -> None:
        self.lines = lines
        self.items = [item for name in SCALES for item in plan(name)]
        self.searches = {item.name: item for item in self.items if isinstance(item, Search)}
        self.chosen = {name: winner(search, lines) for name, search in self.searches.items()}
        self.trained: dict[Key, dict[int, Line]] = {}
        self._rows = {(item.group, item.setting, item.learning_rate) for item in self.items if isinstance(item, Row)}
        self._likes: dict[Any, Any] = {}  # what the first line of each kind has
        for each in lines:
            for complaint in self._complaints(each):
                raise ValueError(f"{complaint}: {Setting.from_row(each)}, seed {each['seed']}")
            if each["seed"] in seeds:
                self.trained.setdefault(self._key(each), {})[each["seed"]] = each
        for search in self.searches.values():
            self._check_trials(search)

    @cached_property
    def again(self) -> "Study":
        """The same, of the seeds that try to break a result."""
        return Study(self.lines, AGAIN_SEEDS)

    @cached_property
    def all_seeds(self) -> "Study":
        """The same, of the tables' seeds and of those."""
        return Study(self.lines, SHOWN)

    def with_plain(self, group: str, alpha: float) -> tuple[Search, Search]:
        """The search of a scale's group for one alpha, and that for alpha 1."""
        return self.searches[f"{group}/{alpha:g}"], self.searches[f"{group}/1"]

    def values(self, group: str, setting: Setting, key: str | Callable[[Line], float]) -> list[float]:
        """One for each seed, in their order, without those of runs that have none."""
        lines = [each for _, each in sorted(self.trained.get((group, setting), {}).items())]
        found = (key(each) if callable(key) else each.get(key) for each in lines)
        return [value for value in found if value is not None]

    def versus(self, ours: Key, theirs: Key, key: str = "test_top1") -> Comparison | None:
        """The paired difference of a value over the seeds that both have, in the same precision."""
        left, right = self.trained.get(ours, {}), self.trained.get(theirs, {})
        both = sorted(left.keys() & right.keys())
        seeds = [seed for seed in both if _made(left[seed]) == _made(right[seed])]
        return compare(*([of[seed][key] for seed in seeds] for of in (left, right))) if len(seeds) > 1 else None

    def _check_trials(self, search: Search) -> None:
        done = [(row["learning_rate"], row["weight_decay"]) for row in trials(search, self.lines)]
        first = done[: len(search.anchors)]
        if first != list(search.anchors[: len(first)]):
            raise ValueError(f"{search.name} must begin with {search.anchors}, began with {first}")
        if len(done) > search.trials:
            raise ValueError(f"{search.name} has {search.trials} trials, got {len(done)}")

    def _complaints(self, each: Line) -> Iterator[str]:
        by, setting, rate, seed = each.get("chosen_by"), Setting.from_row(each), each["learning_rate"], each["seed"]
        if by == "plan":
            allowed, agrees = SHOWN, (each["group"], setting, rate) in self._rows
        else:
            search = self.searches.get(str(by))
            allowed, agrees = (*SEARCH_SEEDS, *SHOWN), search is not None and self._agrees(search, each)
        if not agrees:
            yield f"{by} did not choose learning rate {rate}"
            return
        if seed not in allowed:
            yield f"seed must be one of {allowed}"
        if self._likes.setdefault((by, setting, rate, seed), each) is not each:
            yield "there are two lines of one training"
        if not math.isclose(each["decay_time"], rate * setting.weight_decay * each["steps"]):
            yield f"decay_time must be learning rate * weight decay * steps, got {each['decay_time']}"
        if not self._is_like((setting.scale, setting.batch), each["steps"]):
            yield f"steps must be as many as the others', got {each['steps']}"
        if seed in SHOWN and each["verdict"] == "pruned":
            yield "only a search's trials may be pruned"
        if seed in SHOWN and not self._is_like((each["group"], setting), _made(each)):
            yield f"precision and device must be those of the other seeds, got {_made(each)}"

    def _is_like(self, kind: Any, value: Any) -> bool:
        """Whether the lines of a kind so far have this value."""
        return bool(self._likes.setdefault(kind, value) == value)

    def _agrees(self, search: Search, each: Line) -> bool:
        setting, rate, seed = Setting.from_row(each), each["learning_rate"], each["seed"]
        same = replace(setting, weight_decay=search.setting.weight_decay) == search.setting
        if not same or each["group"] != search.group:
            return False
        if seed == SEARCH_SEEDS[0]:
            low, high = zip(search.rates, search.decays, strict=True)
            return low[0] <= rate <= high[0] and low[1] <= setting.weight_decay <= high[1]
        if seed == SEARCH_SEEDS[1]:
            tried = trials(search, self.lines)
            return any((rate, setting.weight_decay) == (row["learning_rate"], row["weight_decay"]) for row in tried)
        return (setting, rate) == self.chosen[search.name]

    def _key(self, each: Line) -> Key:
        by = each["chosen_by"]
        return each["group"], Setting.from_row(each) if by == "plan" else self.searches[by].setting


def _made(line: Line) -> tuple[str, str]:
    """Precision and device of a training; the first lines do not say the precision."""
    return line.get("precision", "bfloat16"), line["device"]
