"""Loads a trained classifier from a folder, the Hub or timm, with its preprocessing, and matches its class names."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from timm.models import load_state_dict
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.utils import CONFIG_NAME

from ..limits import checked, near
from . import models  # noqa: F401  makes pgt_resnet known to timm
from .decoding import BadImageError, read_upright
from .rules import Side
from .transforms import ImageTransform

logger = logging.getLogger(__name__)


@checked
def load_classifier(name: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> PreTrainedModel:
    """Loads an image classifier for evaluation.

    Args:
        name: A folder that ``save_pretrained`` or Trainer wrote (a ``checkpoint-100`` too), a timm model, such as
            "resnet50.a1_in1k", with timm's weights, or a Hub id.
        weights: A file of weights to use in place of the model's own, see ``load_weights``.

    Returns:
        A transformers model in evaluation mode; ``config.id2label`` names its classes.

    Example:
        >>> model = load_classifier("runs/digits")
    """
    place = os.fspath(name)
    if Path(place).is_dir() and not Path(place, CONFIG_NAME).is_file():
        raise OSError(f"{place!r} holds no {CONFIG_NAME}; a folder written by Trainer or a checkpoint does")
    if not Path(place).is_dir() and timm.is_model(place):
        model = _load_timm(place, pretrained=weights is None)
    else:
        try:
            model = AutoModelForImageClassification.from_pretrained(place)
        except (KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            reason = " ".join(str(error).split())
            if Path(place).is_dir():
                kind = re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", reason)
                reason = f"it holds a {kind[1]}" if kind else reason
                raise ValueError(f"{place!r} must be the folder of an image classifier: {reason}") from error
            raise OSError(
                f"{place!r} is not a folder, a timm model or a model on the Hub{near(place, timm.list_models())}: "
                f"{reason}"
            ) from error
    if weights is not None:
        load_weights(getattr(model, "timm_model", model), weights)
    return model.eval()


@checked
def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a local file of weights into ``model``: by name, or in order if the names differ.

    A file from another library often holds the same network under other names; its tensors are then taken in order,
    if their number and shapes agree. Nothing in the file is executed.

    Args:
        model: The network.
        path: ``*.safetensors``, by name only, since that format keeps no order; or what ``torch.save`` wrote: a state
            dict, or a dict that holds one, as timm's and other programs save it.

    Example:
        >>> load_weights(timm.create_model("tf_efficientnet_lite0"), "efficientnet-lite0-57934424.pth")
    """
    wanted, file = model.state_dict(), os.fspath(path)
    state = _read_state(file)
    if set(state) != set(wanted):
        extra, missing = sorted(set(state) - set(wanted)), sorted(set(wanted) - set(state))
        difference = f"the file alone has {extra[:3]}, the model alone {missing[:3]}"
        if Path(path).suffix == ".safetensors":
            raise ValueError(f"weights {file!r} do not fit by name: {difference}")
        if len(state) != len(wanted):
            raise ValueError(
                f"weights must hold the {len(wanted)} tensors of the model, got {len(state)} in {file!r}; {difference}"
            )
        logger.warning("the names in %s are not the model's; its tensors are taken in their order", path)
        pairs = list(zip(wanted, state, strict=True))
    else:
        pairs = [(name, name) for name in wanted]
    for ours, theirs in pairs:
        if state[theirs].shape != wanted[ours].shape:
            raise ValueError(
                f"weights {file!r}: {theirs!r} has shape {tuple(state[theirs].shape)}, the model wants "
                f"{tuple(wanted[ours].shape)} for {ours!r}"
            )
    model.load_state_dict({ours: state[theirs] for ours, theirs in pairs})


@checked
def preprocessing(
    model: PreTrainedModel, name: str | os.PathLike[str], image_size: Side | None = None
) -> Callable[[Any], Tensor]:
    """The model's own function from an image, or the bytes of its file, to a tensor of shape (3, H, W).

    ``name`` is where the model was loaded from; a model that is not timm's has its image processor there. A timm model
    takes another ``image_size`` than its own.

    Example:
        >>> preprocessing(load_classifier("runs/digits"), "runs/digits")(Image.new("L", (8, 8))).shape
        torch.Size([3, 32, 32])
    """
    config = getattr(model.config, "pretrained_cfg", None)
    if config is not None:
        size = {} if image_size is None else {"input_size": [3, image_size, image_size]}
        return ImageTransform(dict(config) | size, training=False)
    if image_size is not None:
        raise ValueError(f"image_size is for timm models, got {image_size} for a {type(model).__name__}")
    return _Processor(AutoImageProcessor.from_pretrained(name))


@checked
def match_labels(dataset_names: Sequence[str], model_names: Sequence[str]) -> list[int]:
    """The model's class number for each class number of the data set.

    Classes are matched by name, whatever their order; the data set may have fewer than the model. ImageNet's 1,000 in
    their standard order match whatever small differences in spelling there are, and may be given as WordNet ids. A
    model that names no classes (LABEL_0, ...) is matched by number, which is logged as a warning.

    Both lists are in the order of the classes' numbers.

    Example:
        >>> match_labels(["cat", "dog"], ["Dog", "bird", "Cat"])
        [2, 0]
    """
    if not len(dataset_names) or not len(model_names):
        raise ValueError(f"names must not be empty, got {list(dataset_names)[:5]} and {list(model_names)[:5]}")
    wanted, known = ([str(name).strip().casefold() for name in names] for names in (dataset_names, model_names))
    in_order = list(range(len(wanted)))
    if wanted == known:
        return in_order
    if known == [f"label_{number}" for number in range(len(known))] and len(wanted) == len(known):
        logger.warning("the model names no classes: its %d are taken to be the data set's, in order", len(known))
        return in_order
    if len(known) == 1000:
        imagenet = ImageNetInfo("imagenet-1k")
        if _same_first_words(known, imagenet.label_descriptions()):
            if _same_first_words(wanted, known):
                return in_order
            numbers = {synset: number for number, synset in enumerate(imagenet.label_names())}
            if all(name in numbers for name in wanted):
                return [numbers[name] for name in wanted]
    missing = [name for name, key in zip(dataset_names, wanted, strict=True) if key not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of the data set's {len(wanted)} classes are not among the model's {len(known)}: "
            f"{missing[:5]}; the model's begin with {list(model_names)[:5]}"
        )
    twice = [name for name, key in zip(dataset_names, wanted, strict=True) if known.count(key) + wanted.count(key) > 2]
    if twice:
        raise ValueError(f"classes cannot be matched by name, since these stand for more than one: {twice[:5]}")
    return [known.index(name) for name in wanted]


class _Processor:
    """An image processor of transformers, called as ``ImageTransform`` is; a class, for workers to pickle."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: bytes | Image.Image) -> Tensor:
        pixels = read_upright(image)
        try:
            return self.processor(pixels, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:  # images of a few pixels, whose channels it takes for something else
            raise BadImageError(f"the model's image processor refuses it: {error}") from error


def _load_timm(name: str, pretrained: bool) -> TimmWrapperForImageClassification:
    try:
        network = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise OSError(f"timm's weights of {name!r} are not available; give a local file: {error}") from error
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": name,
            "num_classes": network.num_classes,
            # JSON's types, as a saved config has them.
            "pretrained_cfg": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in network.pretrained_cfg.items()
            },
        }
    )
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(network.state_dict())
    return model


def _read_state(file: str) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise OSError(f"weights must name a local file, got {file!r}")
    try:
        state = load_state_dict(file, use_ema=False, weights_only=True)
    except Exception as error:  # torch and safetensors have no one class for "this is no such file"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"weights {file!r} could not be read as tensors alone: {reason}") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {file!r} hold no state dict")
    return dict(state)


def _same_first_words(names: Sequence[str], others: Sequence[str]) -> bool:
    """Two lists of 1,000 in the same order: each name's first synonym, but for a few spellings."""
    pairs = [(a.split(",")[0], b.split(",")[0].casefold()) for a, b in zip(names, others, strict=False)]
    return len(names) == len(others) and sum(a == b for a, b in pairs) >= 0.98 * len(pairs)
