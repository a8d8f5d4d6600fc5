"""timm networks as transformers models, with two variants that timm lacks: norm-free and small-image ResNets.

The result is transformers' own ``TimmWrapperForImageClassification``: its folder holds safetensors and a
``config.json`` that also describes the preprocessing, so ``AutoModelForImageClassification``, ``AutoImageProcessor``
and ``pipeline`` read it. The two variants are registered with timm, as ``pgt_resnet``, when this module is imported:
import it before you load a checkpoint of one; ``load_classifier`` does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import ResNet, load_pretrained, register_model
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from ..limits import checked
from .rules import Side, TimmModel


@checked
def create_model(
    name: TimmModel,
    label_names: Sequence[str],
    *,
    image_size: Side = 224,
    pretrained: bool = False,
    norm_free: bool = False,
    small_images: bool = False,
    **timm_kwargs: Any,
) -> TimmWrapperForImageClassification:
    """Builds a timm network as a transformers model, initialised as timm does it.

    Args:
        name: Any timm model, such as "resnet50" or "resnet50.a1_in1k" (the tag picks the weights when ``pretrained``).
        label_names: The classes in the order of their numbers; there are as many outputs as names.
        image_size: Side of the square that the network is trained and evaluated on. Images up to 64 pixels are
            evaluated whole, larger ones cropped to their central 87.5%.
        pretrained: Start from timm's weights (downloaded from the Hub, with their own preprocessing).
        norm_free: Replace every normalisation layer of a ResNet by the identity; see ``pgt_resnet``.
        small_images: Replace the stem of a ResNet, which shrinks by 4, by a 3x3 convolution that keeps the size.
        **timm_kwargs: Passed to timm, hence JSON values only: ``drop_path_rate=0.1``, ``stem_type="deep"``.

    Example:
        >>> model = create_model("resnet18", ["cat", "dog"], image_size=64, small_images=True)
        >>> model(torch.zeros(1, 3, 64, 64)).logits.shape
        torch.Size([1, 2])
    """
    check_names(label_names)
    architecture, model_args = name, dict(timm_kwargs)
    if norm_free or small_images:
        architecture = pgt_resnet.__name__
        model_args |= {"base": name, "norm_free": norm_free, "small_images": small_images}

    try:
        network = _with_weights(name, architecture, pretrained, num_classes=len(label_names), **model_args)
    except TypeError as error:
        wanted = ", ".join(timm_kwargs)
        raise ValueError(f"name must be a timm model that takes {wanted}, got {name!r}: {error}") from error
    model_args |= fit_image_size(network, image_size)
    names = dict(enumerate(label_names))
    config = TimmWrapperConfig(
        architecture=architecture,
        model_args=model_args,
        pretrained_cfg=_preprocessing(network.pretrained_cfg if pretrained else {}, image_size),
        id2label=names,
        label2id={label: number for number, label in names.items()},
    )
    model = TimmWrapperForImageClassification(config)
    try:
        model.timm_model.load_state_dict(network.state_dict())  # the wrapper draws its head anew
    except RuntimeError as error:  # of windows that shrink with the image
        raise ValueError(f"image_size must be one that {name} can be adapted to, got {image_size}: {error}") from error
    return model


def timm_network(name: str, classes: int, side: int, *, pretrained: bool = False) -> nn.Module:
    """A timm network as it is, without the wrapper, for images of this side."""
    network: nn.Module = _with_weights(name, name, pretrained, num_classes=classes)
    fit_image_size(network, side)
    return network


def _with_weights(name: str, architecture: str, pretrained: bool, **options: Any) -> Any:
    try:
        return timm.create_model(architecture, pretrained=pretrained, **options)
    except OSError as error:
        raise OSError(f"pretrained: timm's weights of {name!r} are not available: {error}") from error


def check_names(label_names: Sequence[str]) -> None:
    """Raises ValueError unless there are at least two names, all different."""
    if len(label_names) < 2 or len(set(label_names)) < len(label_names):
        raise ValueError(f"label_names must name at least 2 classes, each once, got {list(label_names)[:20]}")


def fit_image_size(network: nn.Module, side: int) -> dict[str, int]:
    """Adapts a timm network whose parameters depend on the image size, such as a ViT, in place.

    Returns:
        The options with which ``timm.create_model`` builds it at that size; most networks take any size and need none.
    """
    set_input_size = getattr(network, "set_input_size", None)
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))
    if set_input_size is not None:
        if side % max(patch):
            raise ValueError(f"image_size must be a multiple of {max(patch)}, the side of a patch, got {side}")
        set_input_size(img_size=side)
    _try_image_size(network, side)
    return {} if set_input_size is None else {"img_size": side}


def _try_image_size(network: nn.Module, side: int) -> None:
    """Raises ValueError if an image is too small for the network's layers, or not of the one size that it takes."""
    if side == getattr(network, "pretrained_cfg", {}).get("input_size", (3, 0, 0))[-1]:
        return
    training, parameter = network.training, next(network.parameters())
    try:
        with torch.no_grad():
            network.eval()(parameter.new_zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"image_size must be one that a {type(network).__name__} can process, got {side}: {error}"
        ) from error
    finally:
        network.train(training)


@register_model
def pgt_resnet(
    pretrained: bool = False,
    base: str = "resnet18",
    norm_free: bool = False,
    small_images: bool = False,
    **kwargs: Any,
) -> ResNet:
    """A network of timm's ResNet family without normalisation, with a stem for small images, or both.

    Without normalisation, each residual block doubles the variance at initialisation: harmless in ResNet-18, a first
    loss near 30 in ResNet-50, which wants clipping and a smaller learning rate.

    Example:
        >>> network = timm.create_model("pgt_resnet", base="resnet50", norm_free=True, num_classes=10)
    """
    if norm_free:
        kwargs["norm_layer"] = nn.Identity
    published = pretrained and kwargs.get("pretrained_cfg")  # weights of this very variant, from the Hub or a folder
    try:
        network = timm.create_model(base, pretrained=pretrained and not published, **kwargs)
    except (AssertionError, TypeError):  # families that take no such norm layer
        network = None
    if not isinstance(network, ResNet):
        raise ValueError(f"norm_free and small_images are for timm's ResNets, got {base!r}")
    if small_images:
        _keep_size_in_stem(network)
    if published:
        load_pretrained(network, published, num_classes=network.num_classes)
    return network


def _keep_size_in_stem(network: ResNet) -> None:
    network.maxpool = nn.Identity()
    if isinstance(network.conv1, nn.Sequential):  # a "deep" stem of three 3x3 convolutions
        first = network.conv1[0]
        assert isinstance(first, nn.Conv2d)
        first.stride = (1, 1)
        return
    wide = network.conv1
    network.conv1 = nn.Conv2d(wide.in_channels, wide.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")


def _preprocessing(pretrained_cfg: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """What timm's and transformers' image processors read; the weights' own values win over the defaults."""
    defaults = {
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "interpolation": "bicubic",
        "crop_pct": 1.0 if image_size <= 64 else 0.875,
    }
    own = {key: pretrained_cfg[key] for key in defaults if pretrained_cfg.get(key) is not None}
    return defaults | own | {"input_size": [3, image_size, image_size]}
