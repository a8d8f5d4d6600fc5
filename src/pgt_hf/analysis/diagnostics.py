"""What PGT does to logits, gradients and filters: the quantities of the paper's figures, in plain torch.

Everything about the logits is computed from them and their gradient, so any loss and any training loop will do.
``DiagnosticsCallback`` collects it in a Trainer run, ``pgt-hf plot RUN`` draws it.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..atomic import replacing
from ..functional import check_alpha
from ..limits import NonNegative, Share, Whole, checked

CURVE_ALPHAS = (0.0, 0.05, 0.1, 0.25, 0.5)  # of the curves of p' against p
ZERO_NORM = 1e-3  # a freshly drawn filter's norm is about 1
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_SURE = 10  # classes that a gradient's scale is read from: far from underflow, and most of them not the target


@checked
def logit_statistics(logits: Tensor) -> dict[str, Tensor]:
    """The paper's four statistics of logits (N, C), each a mean over the images.

    Example:
        >>> logit_statistics(torch.tensor([[3.0, -4.0]]))["logit_norm"]
        tensor(5.)
    """
    logits = logits.float()
    return {
        "logit_norm": logits.norm(dim=-1).mean(),
        "logit_abs_mean": logits.mean(dim=-1).abs().mean(),
        "logit_abs_max": logits.amax(dim=-1).abs().mean(),
        "logit_variance": logits.var(dim=-1, correction=0).mean(),
    }


@checked
@torch.no_grad()
def filter_norms(model: nn.Module) -> dict[str, Tensor]:
    """The L2 norm of each filter (the weights of one output) of each convolution and linear layer, by its dotted name.

    Example:
        >>> filter_norms(nn.Sequential(nn.Conv2d(3, 8, 3)))["0"].shape
        torch.Size([8])
    """
    return {name: layer.weight.flatten(1).float().norm(dim=1) for name, layer in _layers(model)}


@checked
def zeroed_filters(norms: Iterable[Tensor], threshold: NonNegative = ZERO_NORM) -> Tensor:
    """How many filters have zeroed out: their norm is at most ``threshold``.

    Example:
        >>> zeroed_filters([torch.tensor([0.0, 1.2, 1e-5])])
        tensor(2)
    """
    return torch.stack([(layer <= threshold).sum() for layer in norms]).sum()


@checked
@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The L2 norm of the gradient of each convolution's and linear layer's weight, if it has one.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> gradient_norms(model)["0"]
        tensor(6.9282)
    """
    gradients = {name: layer.weight.grad for name, layer in _layers(model) if layer.weight.grad is not None}
    norms = torch._foreach_norm(list(gradients.values())) if gradients else []
    return dict(zip(gradients, norms, strict=True))


@checked
def normalized_layers(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The layers whose output a batch or group norm normalises, with their norms, by the layer's dotted name.

    A norm belongs to the convolution or linear layer defined right before it, if that has as many outputs as it has
    channels. The scale of such a layer's weight does not change the network's output.

    Example:
        >>> list(normalized_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))))
        ['0']
    """
    found: dict[str, tuple[Any, Any]] = {}
    last: tuple[str, Any] | None = None
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            last = name, module
        elif isinstance(module, _NORMS):
            channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
            if last is not None and len(last[1].weight) == channels:
                found[last[0]] = last[1], module
            last = None
    return found


@checked
@torch.no_grad()
def normalization_statistics(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What decides how fast each normalised layer learns, as ``KIND/LAYER``, for the layers that are trained.

    The kinds are ``weight_norm`` (L2, of the whole weight), ``effective_lr`` (the learning rate over its square), and
    ``norm_scale`` and ``norm_bias`` (means of the norm's absolute scales and of its biases, if it has them).

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        >>> nn.init.constant_(model[0].weight, 2.0)
        >>> normalization_statistics(model, torch.optim.SGD(model.parameters(), lr=0.1))["effective_lr/0"]
        tensor(0.0250)
    """
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, Tensor] = {}
    for name, (layer, norm) in normalized_layers(model).items():
        if id(layer.weight) not in rates:
            continue
        found[f"weight_norm/{name}"] = length = layer.weight.float().norm()
        found[f"effective_lr/{name}"] = rates[id(layer.weight)] / length.square()
        if norm.weight is not None:
            found |= {f"norm_scale/{name}": norm.weight.abs().mean(), f"norm_bias/{name}": norm.bias.mean()}
    return found


@checked
def turned_angle(before: Tensor, after: Tensor) -> Tensor:
    """The angle between two weights, in radians, exact for small ones too; 0 between two zeros.

    Example:
        >>> turned_angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]))
        tensor(1.5708)
    """
    first, second = (nn.functional.normalize(weight.detach().float().flatten(), dim=0) for weight in (before, after))
    return 2 * torch.atan2((first - second).norm(), (first + second).norm())


@checked
def recover_target(
    logits: Tensor, grad: Tensor, alpha: NonNegative, label_smoothing: Share = 0.0
) -> tuple[Tensor, Tensor]:
    """The target distribution q behind a gradient at the logits, ``s (softmax(alpha z) - q)`` with any scale s.

    Most classes of an image are not its target: they have ``q_i = label_smoothing / C``, so there
    ``grad_i / (p'_i - q_i)`` is s. Exact for labels, and for mixtures of two where there are more than four classes.

    Returns:
        q of shape (M, C), and which of the N rows have one (N, bool): those with a gradient of 0 have no target.

    Example:
        >>> z = torch.randn(4, 10, requires_grad=True)
        >>> torch.nn.functional.cross_entropy(z, torch.arange(4)).backward()
        >>> recover_target(z.detach(), z.grad, alpha=1)[0].argmax(dim=1)
        tensor([0, 1, 2, 3])
    """
    classes, grad = logits.size(-1), grad.float()
    powered = (check_alpha(alpha) * logits.float()).softmax(dim=-1)
    others = powered - label_smoothing / classes
    sure = others.abs().topk(min(_SURE, classes), dim=-1).indices
    ratios = grad.gather(-1, sure) / others.gather(-1, sure)
    scale = (ratios.median(dim=-1).values if classes > 2 else ratios.amax(dim=-1))[:, None]
    found = ((scale > 0) & scale.isfinite())[:, 0]
    return (powered[found] - grad[found] / scale[found]).clamp(min=0), found


@checked
def gradient_cosine(logits: Tensor, target: Tensor, alpha: NonNegative) -> Tensor:
    """The cosine, image by image (N), between PGT's gradient at the logits and that of plain cross-entropy.

    ``logits`` and ``target``, distributions, have shape (N, C). At ``alpha=1`` it is 1.

    Example:
        >>> gradient_cosine(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]), alpha=0.25)
        tensor([0.9388])
    """
    logits = logits.float()
    ours, plain = (logits * alpha).softmax(dim=-1) - target, logits.softmax(dim=-1) - target
    return torch.nn.functional.cosine_similarity(ours, plain, dim=-1)


@checked
def log_power_sum(logits: Tensor, alpha: NonNegative) -> Tensor:
    """``log sum_j p_j^alpha`` of each image (N), from logits (N, C): ``p'_i = p_i^alpha / exp`` of it.

    Example:
        >>> log_power_sum(torch.zeros(1, 4), alpha=0).exp()
        tensor([4.])
    """
    return (alpha * logits.float().log_softmax(dim=-1)).logsumexp(dim=-1)


@checked
def lemma_threshold(power_sum: Any, alpha: NonNegative) -> Any:
    """Lemma 1's threshold ``t = (sum_j p_j^alpha)^(1 / (alpha - 1))``: PGT raises p below t and lowers it above.

    ``power_sum``, ``exp(log_power_sum(...))``, is a number, an array or a tensor.

    Example:
        >>> lemma_threshold(4.0, alpha=0)
        0.25
    """
    if alpha == 1:
        raise ValueError("alpha must not be 1 for Lemma 1's threshold: there p' = p")
    return power_sum ** (1 / (alpha - 1))


@checked
def probability_histograms(logits: Tensor, target: Tensor, alpha: NonNegative) -> dict[str, Tensor]:
    """Counts of predicted probabilities: p in the first row, p' = softmax(alpha z) in the second.

    ``logits`` and ``target``, distributions, have shape (N, C). ``target_histogram`` (2, 20) has the targets'
    probabilities, over [0, 1]; ``class_histogram`` (2, 40) all, over the decades from 1e-10 to 1.

    Example:
        >>> probability_histograms(torch.zeros(3, 4), torch.eye(4)[:3], alpha=0.5)["target_histogram"][:, 5]
        tensor([3., 3.])
    """
    both = [(scale * logits.float()).softmax(dim=-1) for scale in (1.0, alpha)]
    of_target = [(probs * target).sum(dim=-1) for probs in both]
    decades = [probs.log10().clamp(min=-10) for probs in both]
    return {
        "target_histogram": torch.stack([_count(values, 20, 0.0, 1.0) for values in of_target]),
        "class_histogram": torch.stack([_count(values, 40, -10.0, 0.0) for values in decades]),
    }


class History:
    """Snapshots of named arrays over the steps of a run, in one npz file that stays small however long the run.

    When ``capacity`` snapshots are held every second one is dropped, and from then on every second one that comes:
    the run stays covered from its first step to its last.

    Example:
        >>> history = History()
        >>> history.add(0, {"logit_norm": np.float32(3.5)})
        >>> history.save("diagnostics.npz")
        >>> History.read("diagnostics.npz")["logit_norm"]
        array([3.5], dtype=float32)
    """

    @checked
    def __init__(self, capacity: Annotated[int, Whole("[2, inf)")] = 256) -> None:
        self.capacity = capacity
        self.stride = 1  # one of so many snapshots is kept
        self.snapshots: list[dict[str, NDArray[Any]]] = []
        self._offered = 0

    @checked
    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Offers a snapshot; steps grow, and a name has one shape. Names that not all snapshots have are not saved."""
        if self._offered % self.stride == 0:
            self.snapshots.append({key: np.asarray(value) for key, value in {"step": step, **values}.items()})
        self._offered += 1
        if len(self.snapshots) == self.capacity:
            self.snapshots, self.stride = self.snapshots[::2], 2 * self.stride

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Replaces the file atomically."""
        if not self.snapshots:
            return
        names = [key for key in self.snapshots[0] if all(key in snapshot for snapshot in self.snapshots)]
        columns: dict[str, Any] = {key: np.stack([snapshot[key] for snapshot in self.snapshots]) for key in names}
        with replacing(path) as draft, draft.open("wb") as file:
            np.savez_compressed(file, stride=self.stride, offered=self._offered, **columns)

    @checked
    def resume(self, path: str | os.PathLike[str], step: int) -> None:
        """Continues from a file, without its snapshots from ``step`` on."""
        columns = self.read(path)
        self.stride, self._offered = int(columns.pop("stride")), int(columns.pop("offered"))
        kept = int((columns["step"] < step).sum())
        self._offered = min(self._offered, kept * self.stride)
        self.snapshots = [{key: column[index] for key, column in columns.items()} for index in range(kept)]

    @staticmethod
    @checked
    def read(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
        """The file's arrays by name, the first dimension being the snapshots; ``step`` has their steps."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (ValueError, EOFError, BadZipFile, AttributeError) as error:
            raise ValueError(f"path must be a file of History.save, got {os.fspath(path)!r}: {error}") from error


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _LAYERS))


def _count(values: Tensor, bins: int, low: float, high: float) -> Tensor:
    return torch.histc(values.flatten().clamp(low, high), bins, low, high)
