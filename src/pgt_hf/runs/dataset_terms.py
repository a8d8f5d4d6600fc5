"""The licences and terms of known data sets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Terms:
    """A data set's name and licence, and whether its images may be shown in public."""

    name: str
    licence: str
    redistributable: bool = False


_IMAGENET = (
    "ImageNet's terms of access: non-commercial research and education only; the images must not be passed on. "
    "Users of a model that was trained on it must judge what this means for their purpose."
)


DATASETS = {
    "ILSVRC/imagenet-1k": Terms("ImageNet-1K (ILSVRC 2012)", _IMAGENET),
    "zh-plus/tiny-imagenet": Terms("Tiny-ImageNet", f"A subset of ImageNet. {_IMAGENET}"),
    "digits": Terms(
        "Optical Recognition of Handwritten Digits (UCI, the part in scikit-learn)",
        "CC BY 4.0 (Alpaydin and Kaynak, UCI Machine Learning Repository).",
        redistributable=True,
    ),
}


def dataset_terms(name: str | None) -> Terms:
    """The licence and terms of a data set, or where to find them."""
    if name is None:
        return Terms("an unrecorded data set", "The run does not say which data it was trained on.")
    if name in DATASETS:
        return DATASETS[name]
    if "/" in name:
        return Terms(name, f"See the data set's own page, https://huggingface.co/datasets/{name}.")
    return Terms(f"{name} (a local data set)", "A local data set: its owner's terms apply.")
