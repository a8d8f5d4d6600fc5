"""Fine-tuning a pretrained classifier for other classes: a new head, frozen layers, learning rates, LoRA.

Works on timm networks (in transformers' wrapper) and on transformers' own. timm knows the layers and their order,
PEFT does LoRA; this module joins them.
"""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..extras import require
from ..heads import last_linear
from ..limits import Count, NonNegative, Number, Positive, Rate, checked
from .models import check_names, fit_image_size
from .rules import Side

# Transformers' models have numbered blocks under these names; what comes after them (a last norm) goes with the head.
_BLOCK = r"\.(?:layers?|blocks?|stages?)\.(\d+)"
_LAYERS = {"stem": r"\w+\.embed", "blocks": [(f".*?{_BLOCK}.*?{_BLOCK}", None), (f".*?{_BLOCK}", None)]}


@checked
def replace_head(model: PreTrainedModel, label_names: Sequence[str]) -> PreTrainedModel:
    """Gives a classifier a new, untrained last layer for other classes, and their names; all else stays.

    ``model``, a transformers image classifier or timm's in its wrapper, is changed in place and returned;
    ``label_names`` are in the order of the classes' numbers.

    Example:
        >>> model = replace_head(load_classifier("runs/digits"), ["cat", "dog"])
        >>> model.config.id2label
        {0: 'cat', 1: 'dog'}
    """
    check_names(label_names)
    network = getattr(model, "timm_model", None)
    if network is not None:
        network.reset_classifier(len(label_names))
    else:
        heads = last_linear(model)
        if len(heads) != 1 or not isinstance(heads[0], nn.Linear):
            raise ValueError(f"model must end in one linear layer, got {type(model).__name__} with {heads}")
        old = heads[0]
        new = nn.Linear(old.in_features, len(label_names), bias=old.bias is not None)
        model._init_weights(new)
        model.set_submodule(next(name for name, module in model.named_modules() if module is old), new)
    names = dict(enumerate(label_names))
    model.config.id2label, model.config.label2id = names, {label: number for number, label in names.items()}
    model.num_labels = len(names)
    return model


@checked
def set_image_size(model: PreTrainedModel, side: Side) -> PreTrainedModel:
    """Sets the side of the images, in pixels, that a timm network is trained on, evaluated on and saved with.

    Example:
        >>> set_image_size(load_classifier("tf_efficientnet_lite0"), 96).config.pretrained_cfg["input_size"]
        [3, 96, 96]
    """
    network = getattr(model, "timm_model", None)
    if network is None:
        raise ValueError(f"the image size can be set for timm models, got {side} for a {type(model).__name__}")
    if list(model.config.pretrained_cfg["input_size"]) == [3, side, side]:
        return model
    model.config.model_args = dict(model.config.model_args or {}) | fit_image_size(network, side)
    model.config.pretrained_cfg = dict(model.config.pretrained_cfg) | {"input_size": [3, side, side]}
    return model


@checked
def freeze_backbone(model: nn.Module) -> nn.Module:
    """Leaves only the last layer trainable: a linear probe.

    Frozen layers run as in evaluation, also while the model trains: batch norm keeps its statistics and drops nothing.

    Example:
        >>> model = freeze_backbone(create_model("resnet18", ["cat", "dog"]))
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        1026
    """
    heads = last_linear(model)
    if not heads:
        raise ValueError(f"model must have a linear layer at its end, got a {type(model).__name__} with none")
    model.requires_grad_(False)
    for layer in heads:
        layer.requires_grad_(True)
    return _evaluate_frozen_layers(model)


@checked
def parameter_groups(
    model: nn.Module,
    lr: Rate,
    *,
    weight_decay: NonNegative = 0.0,
    layer_decay: Annotated[float | None, Number("(0, 1]")] = None,
    head_lr_scale: Positive = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups with learning rates of their own, for any optimizer and schedule.

    Biases and norms get no weight decay, as timm does it. With ``layer_decay`` the layer n places below the head
    trains at ``lr * layer_decay ** n`` (BEiT, arXiv 2106.08254); timm's networks say themselves what a layer is.

    Args:
        model: The model; also one with LoRA.
        lr: Learning rate of the last layers but the head.
        weight_decay: Of all weight matrices.
        layer_decay: In (0, 1]; None is one rate for all layers.
        head_lr_scale: The new head's learning rate, as a multiple of ``lr``.

    Example:
        >>> model = create_model("resnet18", ["cat", "dog"])
        >>> groups = parameter_groups(model, 0.1, layer_decay=0.5, head_lr_scale=10)
        >>> max(group["lr"] for group in groups), min(group["lr"] for group in groups)
        (1.0, 0.0001953125)
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    network = getattr(base, "timm_model", base)
    options: dict[str, Any] = {
        "weight_decay": weight_decay,
        "no_weight_decay_list": getattr(network, "no_weight_decay", set)(),
    }
    if layer_decay is None:
        groups = param_groups_weight_decay(network, **options)
    else:
        layered = network
        if not hasattr(network, "group_matcher"):  # how timm asks a network for its layers
            layered = SimpleNamespace(named_parameters=network.named_parameters, group_matcher=lambda coarse: _LAYERS)
        groups = param_groups_layer_decay(layered, layer_decay=layer_decay, **options)
        if len({group["lr_scale"] for group in groups}) == 1 and layer_decay != 1:
            raise ValueError(f"layer_decay needs a network whose layers are known, got a {type(network).__name__}")
    if not groups:
        raise ValueError(f"model must have trainable parameters, got a {type(base).__name__} with none")

    head = {id(parameter) for layer in last_linear(model) for parameter in layer.parameters()}
    split = []
    for group in groups:
        rate = lr * group.pop("lr_scale", 1.0)  # the rate itself: a scale is for timm's schedulers alone
        for in_head, scale in ((False, 1.0), (True, head_lr_scale)):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in head) == in_head]
            if parameters:
                split.append(group | {"params": parameters, "lr": rate * scale})
    return split


@checked
def add_lora(
    model: PreTrainedModel,
    rank: Count = 8,
    *,
    scale: Positive = 2.0,
    dropout: Annotated[float, Number("[0, 1)")] = 0.0,
) -> Any:
    """Freezes the network and puts a trainable low-rank update beside its linear and convolutional layers (PEFT).

    The head is trained whole. Grouped convolutions (depthwise ones) stay as they are. Frozen layers run as in
    evaluation. ``merge_and_unload()`` of the result, a ``peft.PeftModel``, gives a plain model that computes the same.

    Args:
        model: A transformers image classifier, or timm's in its wrapper.
        rank: Of the updates.
        scale: What an update is multiplied by, ``lora_alpha / rank`` in PEFT's words; no relation to PGT's alpha.
        dropout: On an update's input.

    Example:
        >>> model = add_lora(create_model("vit_tiny_patch16_224", ["cat", "dog"]), rank=4)
    """
    require("peft", "LoRA")
    from peft import LoraConfig, get_peft_model

    heads = set(last_linear(model))
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]  # any number will do
        lora_dropout=dropout,
        target_modules=[name for name, module in layers.items() if module not in heads],
        modules_to_save=[name for name, module in layers.items() if module in heads],
    )
    return _evaluate_frozen_layers(get_peft_model(model, config))


@checked
def class_weights(labels: ArrayLike, classes: Count) -> Tensor:
    """Weights that let every class count the same, ``N / (C n_c)``, whose mean over the images is 1.

    ``labels`` are the class numbers of the training images, (N). A class without an image gets 0, and C counts the
    others.

    Example:
        >>> class_weights([0, 0, 0, 1], 2)
        tensor([0.6667, 2.0000])
    """
    numbers = np.asarray(labels)
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.ndim != 1):
        raise TypeError(f"labels must hold class numbers, of shape (N,), got {numbers.dtype} of shape {numbers.shape}")
    if not numbers.size or numbers.min() < 0 or numbers.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}) and not be empty, got {numbers.size} of them")
    count = torch.from_numpy(np.bincount(numbers, minlength=classes))
    present = int((count > 0).sum())
    return torch.where(count > 0, numbers.size / (present * count.clamp(min=1)), 0.0)


def _evaluate_frozen_layers(model: nn.Module) -> Any:
    """A hook, since Trainer puts the whole model into training mode before each step."""
    frozen: list[nn.Module] = []
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen.extend(module.modules())
    model.register_forward_pre_hook(partial(_end_training, frozen))  # can be pickled with the model
    return model


def _end_training(layers: list[nn.Module], module: nn.Module, args: Any) -> None:
    for layer in layers:
        layer.training = False
