"""What arguments about images and their networks may be; see ``limits.py``."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

from ..limits import HUB_ID, DataSet, Number, OneOf, Whole, check_type, near

Side = Annotated[int, Whole("[1, 8192]")]
Crop = Annotated[float, Number("(0, 1]")]
CropPct = Annotated[float, Number("[0.05, 1]")]
OnBadImage = Annotated[str, OneOf(("error", "skip"))]

_POLICY = re.compile(r"(rand|augmix|v0r?|originalr?|3a)((-(m|n|w|d|b|p|mstd|mmax|inc|a)[\d.]+)|-t[a-z0-9]*)*")


@dataclass(frozen=True)
class TimmName:
    """A network's name: one that timm knows, and where that is allowed a trained model's folder or a Hub id."""

    folder: bool = False
    hub: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless it is one of these."""
        check_type(name, value, str, os.PathLike)
        place = os.fspath(value)
        architecture, _, tag = place.partition(".")
        if timm.is_model(architecture) and (not tag or place in timm.list_pretrained(f"{architecture}.*")):
            return
        if self.folder and os.path.isdir(place):
            if Path(place, "config.json").is_file():
                return
            raise ValueError(f"{name}: the folder {place!r} holds no config.json; one of a model or checkpoint does")
        if self.hub and "/" in place and HUB_ID.fullmatch(place):
            return
        words = ["a timm model"] + ["the folder of a trained one"] * self.folder + ["a Hub id owner/name"] * self.hub
        known = (
            timm.list_pretrained(f"{architecture}.*") if tag and timm.is_model(architecture) else timm.list_models()
        )
        close = near(place, known) or (f"; its tags: {', '.join(known[:9])}" if tag and len(known) < 999 else "")
        raise ValueError(f"{name} must be {' or '.join(words)}, got {place!r}{close}")


class AutoAugment:
    """The name of a policy that timm knows, with its settings."""

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless timm takes it, and reads every part of it."""
        check_type(name, value, str)
        message = f"{name} must be a policy of timm's, such as rand-m9-mstd0.5-inc1, augmix-m3 or v0, got {value!r}"
        policy = _POLICY.fullmatch(value)
        magnitude = re.search(r"-m(\d+)", value)
        if not policy or (magnitude and int(magnitude[1]) > 10 and "-mmax" not in value):
            raise ValueError(message + ("; m goes from 0 to 10" if policy else ""))
        make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(
            policy[1], auto_augment_transform
        )
        try:
            make(value, {"translate_const": 10, "img_mean": (128, 128, 128)})
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{message}: {error}") from error


DataSetName = Annotated[str, DataSet(("digits",))]
TimmModel = Annotated[str, TimmName()]
