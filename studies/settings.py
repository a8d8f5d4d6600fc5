"""What the study trains: ``Setting``, ``Scale``, and the plan of each scale: rows at fixed settings, and searches."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

__all__ = [
    "AGAIN",
    "AGAIN_SEEDS",
    "ALPHAS",
    "CARRIED_OVER",
    "OTHER_CLASSES",
    "PARTS",
    "PILOTS",
    "PILOT_ALPHAS",
    "SCALE",
    "SCALES",
    "SEARCH_SEEDS",
    "SEEDS",
    "WIDE",
    "Key",
    "Row",
    "Scale",
    "Search",
    "Setting",
    "TextScale",
    "plan",
]

SCALE = "small"  # that of most tables and of the figures
ALPHAS = (1.0, 0.5, 0.3, 0.1)
PILOT_ALPHAS = (1.0, 0.5, 0.3)
SEARCH_SEEDS = (0, 9)
SEEDS = (1, 2, 3, 4, 5)  # of the trainings that the tables show; the searches have not seen them
AGAIN_SEEDS = (11, 12, 13, 14, 15)  # of what looked like a gain

# What turns plain cross-entropy into PGT under SGD, for a linear head (docs/method.md).
PARTS = {
    "init": "the head starts alpha times smaller",
    "rate": "the head's learning rate times alpha",
    "decay": "the head's weight decay over alpha",
    "features": "the gradient that enters the features over alpha",
}
# With batch norm, convolutions do not feel the scale of their gradient; the scales and biases of the norms do.
NORMS = {"norms": "the learning rate of the norms' scales and biases over alpha"}


@dataclass(frozen=True)
class Scale:
    """Data, network and length of a training.

    Args:
        classes: The first so many classes of the data set.
        images: Training images of a class; the images after them are for the search, the evaluation split's for the
            tables.
        side: Pixels of the stored images.
        crop: Pixels of the random crops.
        network: A ResNet of timm's.
        epochs: Passes over the training images.
        data: A key of ``images.HUB``.
        select: Images of a class for the search.
        first: The number of the first class.
        noise: The share of the training images whose label is that of another class, drawn once.
        imbalance: How many times as many training images the first class has as the last, falling geometrically.
        start: The scale whose trained network, but for its head, the trainings start from.
        teacher: The scale whose trained network gives half of each target.
    """

    classes: int
    images: int
    side: int
    crop: int
    network: str
    epochs: int
    data: str = "tiny-imagenet"
    select: int = 40
    first: int = 0
    noise: float = 0.0
    imbalance: float = 1.0
    start: str | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class TextScale:
    """A small language model on the source of Python's standard library.

    Args:
        vocabulary: Tokens of the tokenizer, trained on the text.
        context: Tokens that the network sees at a time.
        width: Of the network.
        layers: Of the network.
        epoch_steps: Steps between two evaluations.
        epochs: Evaluations.
    """

    vocabulary: int
    context: int
    width: int
    layers: int
    epoch_steps: int
    epochs: int


TEST_RESNET = "test_resnet"  # timm's smallest ResNet: 4 stages of one block, 32 to 96 channels, 0.4 million weights
SMALL = Scale(classes=40, images=160, side=28, crop=24, network=TEST_RESNET, epochs=30)
SOURCE = "source"  # what fine-tuning starts from: classes that the other small scales do not have
FINE_TUNING = replace(SMALL, epochs=15, start=SOURCE)
LONG = "long"  # the rows that decide, trained for twice as many epochs
PILOTS: dict[str, Scale | TextScale] = {
    "noise-20": replace(FINE_TUNING, noise=0.2),
    "noise-40": replace(FINE_TUNING, noise=0.4),
    "few": replace(FINE_TUNING, images=20, epochs=60),
    "long-tail": replace(FINE_TUNING, imbalance=50.0),
    "distilled": replace(SMALL, teacher=SCALE),
    "language": TextScale(vocabulary=2048, context=64, width=128, layers=2, epoch_steps=50, epochs=12),
}
AGAIN = "noise-40"
OTHER_CLASSES = "noise-40-other"  # and once more, on other classes, at the settings that were found
WIDE = "wide"  # all classes, at the settings that were found on 100 of them
FOUND = {0.5: (0.015, 5e-4), 0.3: (0.0213, 1.9e-3)}  # learning rate and weight decay, by the searches of ``AGAIN``
PLAIN_AT_FOUND = tuple((1.0, *found) for found in FOUND.values())
CARRIED_OVER = {  # (alpha, learning rate, weight decay)
    AGAIN: PLAIN_AT_FOUND,
    OTHER_CLASSES: ((1.0, 0.05, 5e-4), *PLAIN_AT_FOUND, *((alpha, *found) for alpha, found in FOUND.items())),
    WIDE: ((1.0, 0.06, 4e-3), (0.3, 0.06, 4e-3)),
}
MEDIUM = replace(SMALL, classes=100, side=36, crop=32)
SCALES: dict[str, Scale | TextScale] = {
    SCALE: SMALL,
    LONG: replace(SMALL, epochs=60),
    "medium": MEDIUM,
    WIDE: replace(MEDIUM, classes=200, images=80),
    "fashion": replace(SMALL, data="fashion-mnist", classes=10, images=640, select=200),
    "large": Scale(classes=200, images=450, side=64, crop=56, network="resnet18", epochs=60),  # for a GPU
    SOURCE: replace(SMALL, first=100, classes=100, epochs=20),
    **PILOTS,
    OTHER_CLASSES: replace(FINE_TUNING, noise=0.4, first=40),
}


@dataclass(frozen=True)
class Setting:
    """One way to train, up to its learning rate and seed. Rows of the first study lack the last three fields.

    Args:
        data: "tiny-imagenet", "fashion-mnist" or "text".
        network: "bn" or "norm-free"; "llama" of text.
        alpha: PGT's exponent, the inverse temperature, or the alpha of the parts.
        method: "pgt" (which is cross-entropy at alpha 1), "temperature" (trained and tested on alpha * z), or "parts".
        parts: Keys of ``PARTS`` and ``NORMS``.
        label_smoothing: In training.
        clip: None, "norm" or "agc".
        weight_decay: On weight matrices.
        scale: A key of ``SCALES``; "first" is the first study.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        batch: Images of a step.
    """

    data: str
    network: str
    alpha: float = 1.0
    method: str = "pgt"
    parts: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    clip: str | None = None
    weight_decay: float = 5e-4
    scale: str = "first"
    optimizer: str = "sgd"
    batch: int = 128

    def as_row(self) -> dict[str, Any]:
        """The fields as JSON has them; ``from_row`` is the way back."""
        return asdict(self) | {"parts": list(self.parts)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Setting":
        fields = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        return cls(**fields | {"parts": tuple(row["parts"])})


Key = tuple[str, Setting]  # group and setting


@dataclass(frozen=True)
class Row:
    """A training at settings that the plan fixes, on ``SEEDS``."""

    group: str
    setting: Setting
    learning_rate: float

    @property
    def key(self) -> Key:
        """What its lines are found by."""
        return self.group, self.setting


@dataclass(frozen=True)
class Search:
    """Learning rate and weight decay, searched for one setting, then trained on ``SEEDS``.

    Args:
        group: What it is part of.
        setting: Its weight decay does not count.
        rates: The lowest and the highest learning rate.
        decays: The same of the weight decay.
        anchors: (learning rate, weight decay) of the first trials, the same for every alpha.
        trials: The anchors included.
    """

    group: str
    setting: Setting
    rates: tuple[float, float]
    decays: tuple[float, float]
    anchors: tuple[tuple[float, float], ...] = field(repr=False)
    trials: int = 16

    @property
    def key(self) -> Key:
        """What the lines of its tables are found by."""
        return self.group, self.setting

    @property
    def name(self) -> str:
        """Unique in the plans of all scales."""
        return f"{self.setting.scale}/{self.group}/{self.setting.alpha:g}"


# Weight decays at one learning rate, from one that does nothing to one that kills.
RATES = {"norm-free": 0.05, "bn": 0.2}
LADDERS = {"norm-free": (5e-4, 5e-3, 1e-2, 2e-2), "bn": (5e-4, 5e-3, 2e-2, 5e-2)}
HIGH_DECAY = {"norm-free": 1e-2, "bn": 2e-2}
PARTS_DECAY = {"norm-free": 5e-3, "bn": 2e-2}
PLAIN_BATCH = 128
# What is searched: bounds of the learning rate and of the weight decay, and the first trials.
Space = tuple[tuple[float, float], tuple[float, float], tuple[tuple[float, float], ...]]
SGD_NORM_FREE: Space = ((0.0125, 0.8), (1e-4, 3e-2), ((0.1, 5e-4), (0.3, 5e-4), (0.1, 4e-3), (0.03, 4e-3)))
SGD_BN: Space = ((0.05, 1.6), (1e-4, 3e-2), ((0.2, 5e-4), (0.6, 5e-4), (0.2, 4e-3), (0.06, 4e-3)))
SGD_FINE_TUNING: Space = ((5e-3, 0.8), (1e-4, 3e-2), ((0.05, 5e-4), (0.15, 5e-4), (0.15, 4e-3), (0.015, 5e-4)))
ADAMW: Space = ((5e-4, 3e-2), (1e-2, 2.0), ((3e-3, 0.05), (1e-2, 0.05), (3e-3, 0.5), (1e-3, 0.5)))


def plan(scale: str) -> Iterator[Row | Search]:
    """All of a scale, what decides most first."""
    if scale in PILOTS:
        yield from _pilot(scale)
    elif scale == LONG:  # where the searches of the small scale ended, for three of four alphas
        setting = Setting("tiny-imagenet", "bn", scale=scale, weight_decay=4e-3)
        yield from (Row("long/bn", replace(setting, alpha=alpha), 0.2) for alpha in (1.0, 0.3, 0.5))
    elif scale == "fashion":
        plain = Setting("fashion-mnist", "bn", scale=scale)
        yield from _searches(plain, *SGD_BN)
        yield from _searches(replace(plain, network="norm-free"), *SGD_NORM_FREE)
    elif scale not in (SOURCE, *CARRIED_OVER):
        yield from _study(scale)
    for alpha, rate, decay in CARRIED_OVER.get(scale, ()):
        setting = Setting("tiny-imagenet", "bn", alpha, weight_decay=decay, scale=scale)
        yield Row(f"carried over/{rate:g}", setting, rate)


def _study(scale: str) -> Iterator[Row | Search]:
    plain = Setting("tiny-imagenet", "norm-free", scale=scale, batch=PLAIN_BATCH)
    yield from _ladder(plain)
    yield from _searches(plain, *SGD_NORM_FREE)
    bn = replace(plain, network="bn")
    yield from _ladder(bn)
    # What a plain run has to be given to do as PGT does.
    head, norms = ("init", "rate", "decay"), ("norms",)
    for network, parts in (
        ("norm-free", ("features",)),
        ("norm-free", head),
        ("bn", head),
        ("bn", norms),
        ("bn", head + norms),
    ):
        setting = replace(plain, network=network, alpha=0.3, method="parts", parts=parts)
        yield Row(f"parts/{network}", replace(setting, weight_decay=PARTS_DECAY[network]), RATES[network])
    for alpha in (1.0, 0.3):  # clipping
        clipped = replace(plain, alpha=alpha, clip="agc", weight_decay=HIGH_DECAY["norm-free"])
        yield Row("agc/norm-free", clipped, RATES["norm-free"])
    for batch, alpha in product((64, 256, 1024), (1.0, 0.3)):  # the learning rate grows with it
        setting = replace(plain, alpha=alpha, batch=batch, weight_decay=HIGH_DECAY["norm-free"])
        yield Row("batch/norm-free", setting, RATES["norm-free"] * batch / PLAIN_BATCH)
    yield from _searches(bn, *SGD_BN)
    for rate, alpha in product((0.1, 0.4), (1.0, 0.5)):  # where alpha 0.5 gained: does the learning rate as well?
        yield Row(f"rate/bn/{rate:g}", replace(bn, alpha=alpha), rate)
    adamw = replace(bn, optimizer="adamw", weight_decay=0.1)
    for alpha in ALPHAS:
        yield Row("adamw/bn", replace(adamw, alpha=alpha), 3e-3)
    head = replace(adamw, alpha=0.3, method="parts", parts=("init", "rate", "decay"))
    yield from (Row("adamw/bn", setting, 3e-3) for setting in (head, replace(head, alpha=0.1)))
    yield from _searches(adamw, *ADAMW)


def _pilot(scale: str) -> Iterator[Search]:
    """Each alpha with a search of its own, and all with the same budget."""
    if isinstance(SCALES[scale], TextScale):
        setting, bounds = Setting("text", "llama", scale=scale, optimizer="adamw", batch=16), ADAMW
    else:
        setting = Setting("tiny-imagenet", "bn", scale=scale)
        bounds = SGD_BN if PILOTS[scale].teacher else SGD_FINE_TUNING
    yield from _searches(setting, *bounds, alphas=PILOT_ALPHAS, group="pilot", trials=12)
    if scale == AGAIN:  # it looked like a gain: the baseline is searched once more, for twice as long
        yield from _searches(setting, *bounds, alphas=(1.0,), group="again", trials=24)


def _ladder(plain: Setting) -> Iterator[Row]:
    for decay, alpha in product(LADDERS[plain.network], ALPHAS):
        setting = replace(plain, alpha=alpha, weight_decay=decay)
        yield Row(f"ladder/{plain.network}", setting, RATES[plain.network])


def _searches(
    plain: Setting,
    rates: tuple[float, float],
    decays: tuple[float, float],
    anchors: tuple[tuple[float, float], ...],
    alphas: tuple[float, ...] = ALPHAS,
    group: str = "",
    trials: int = Search.trials,
) -> Iterator[Search]:
    group = group or f"search/{plain.optimizer}/{plain.network}"
    for alpha in alphas:
        yield Search(group, replace(plain, alpha=alpha), rates, decays, anchors, trials)
