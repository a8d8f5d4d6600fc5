"""What the study trains: one ``Setting`` for each row of its tables, and ``PLAN``, all of them in order."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["ALPHAS", "PARTS", "PLAN", "SEARCH_SEEDS", "SEEDS", "Job", "Setting", "equivalents"]

ALPHAS = (1.0, 0.5, 0.25, 0.1, 0.05)
SEARCH_SEEDS = (0, 9)
SEEDS = (1, 2, 3, 4, 5)  # of the trainings that the tables show; the search has not seen them
RATIO = 2.0  # between neighbouring learning rates of the search

# What turns plain cross-entropy into PGT under SGD, for a linear head (docs/method.md).
PARTS = {
    "init": "the head starts alpha times smaller",
    "rate": "the head's learning rate times alpha",
    "decay": "the head's weight decay over alpha",
    "features": "the gradient that enters the features over alpha",
}


@dataclass(frozen=True)
class Setting:
    """One way to train, up to its learning rate and seed.

    Args:
        data: "tiny-imagenet" or "fashion-mnist".
        network: "bn" or "norm-free".
        alpha: PGT's exponent, the inverse temperature, or the alpha of the parts.
        method: "pgt" (which is cross-entropy at alpha 1), "temperature" (trained and tested on alpha * z), or "parts".
        parts: Keys of ``PARTS``.
        label_smoothing: In training.
        clip: None, "norm" or "agc".
        weight_decay: On weight matrices.
    """

    data: str
    network: str
    alpha: float = 1.0
    method: str = "pgt"
    parts: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    clip: str | None = None
    weight_decay: float = 5e-4

    def as_row(self) -> dict[str, Any]:
        """The fields as JSON has them; ``from_row`` is the way back."""
        return asdict(self) | {"parts": list(self.parts)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Setting":
        fields = {field: row[field] for field in cls.__dataclass_fields__}
        return cls(**fields | {"parts": tuple(row["parts"])})


@dataclass(frozen=True)
class Job:
    """A setting whose learning rate is searched, and those that take it over, each times a factor."""

    setting: Setting
    start: float  # the search begins here and at both neighbours
    followers: tuple[tuple[Setting, float], ...] = ()


def _plan() -> Iterator[Job]:
    tiny, fashion = "tiny-imagenet", "fashion-mnist"
    for data, network, start in (
        (tiny, "bn", 0.4),
        (tiny, "norm-free", 0.1),
        (fashion, "bn", 0.2),
        (fashion, "norm-free", 0.05),
    ):
        for alpha in ALPHAS:
            setting = Setting(data, network, alpha)
            followers = [(replace(setting, label_smoothing=0.1), 1.0)]
            if data == tiny and alpha == 0.25:
                followers += equivalents(setting)
            yield Job(setting, start, tuple(followers))
    for network, start in (("bn", 0.4), ("norm-free", 0.1)):
        for alpha in (0.25, 0.05) if network == "bn" else (0.25,):
            # Cross-entropy of alpha z has alpha times PGT's gradient.
            yield Job(Setting(tiny, network, alpha, "temperature"), start / alpha)
    for part in PARTS:
        yield Job(Setting(tiny, "bn", 0.25, "parts", (part,)), 0.4)
    for clip in ("agc", "norm"):
        for alpha in (1.0, 0.25):
            yield Job(Setting(tiny, "norm-free", alpha, clip=clip), 0.1)


def equivalents(setting: Setting) -> list[tuple[Setting, float]]:
    """Two other ways to write a run of PGT, exact under SGD, with the factors on its learning rate."""
    alpha, decay = setting.alpha, setting.weight_decay
    return [
        (replace(setting, method="parts", parts=tuple(PARTS)), 1.0),
        (replace(setting, method="temperature", weight_decay=alpha * decay), 1 / alpha),
    ]


PLAN = tuple(_plan())
