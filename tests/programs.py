"""The family of training programs on which PGT is tried: a loss, what stands around it, and what the outcome must be.

``EXACT`` losses take a log-softmax of the logits: their gradient is PGT's. ``REFUSED`` ones take none: an error.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.checkpoint import checkpoint

CLASSES = 6
Loss = Callable[[Tensor, Tensor], Tensor]


def soft(target: Tensor) -> Tensor:
    return 0.7 * F.one_hot(target, CLASSES) + 0.3 / CLASSES


def scripted() -> Loss:
    @torch.jit.script
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, target)

    return loss


def focal(logits: Tensor, target: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)
    return -((1 - log_probs.exp()) ** 2 * log_probs).mean()


def in_a_loop(logits: Tensor, target: Tensor) -> Tensor:
    return sum(F.cross_entropy(row[None], index[None]) for row, index in zip(logits, target, strict=True)) / len(
        target
    )


def logged_perplexity(loss: Loss) -> Loss:
    def with_metrics(logits: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            F.cross_entropy(logits, target).exp()
            F.log_softmax(logits, -1)
        return loss(logits, target)

    return with_metrics


EXACT: dict[str, Loss] = {
    "F.cross_entropy": F.cross_entropy,
    "nn.CrossEntropyLoss": lambda z, y: nn.CrossEntropyLoss()(z, y),
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "class weights": lambda z, y: F.cross_entropy(z, y, torch.arange(1, CLASSES + 1).to(z.dtype)),
    "weights and smoothing": lambda z, y: F.cross_entropy(z, y, torch.arange(1, CLASSES + 1).to(z.dtype), label_smoothing=0.1),
    "ignore_index": lambda z, y: F.cross_entropy(z, torch.where(y == 0, -100, y)),
    "reduction sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "sample weights": lambda z, y: (F.cross_entropy(z, y, reduction="none") * torch.linspace(0, 1, len(y)).to(z.dtype)).sum(),
    "soft targets": lambda z, y: F.cross_entropy(z, soft(y).to(z.dtype)),
    "soft targets and smoothing": lambda z, y: F.cross_entropy(z, soft(y).to(z.dtype), label_smoothing=0.1),
    "nll_loss of log_softmax": lambda z, y: F.nll_loss(F.log_softmax(z, -1), y),
    "torch.log_softmax, gathered": lambda z, y: -torch.log_softmax(z, 1).gather(1, y[:, None]).mean(),
    "z.log_softmax and a product": lambda z, y: -(soft(y).to(z.dtype) * z.log_softmax(-1)).sum(-1).mean(),
    "KL divergence": lambda z, y: F.kl_div(F.log_softmax(z / 2, -1), soft(y).to(z.dtype), reduction="batchmean"),
    "timm label smoothing": LabelSmoothingCrossEntropy(0.1),
    "timm soft targets": lambda z, y: SoftTargetCrossEntropy()(z, soft(y).to(z.dtype)),
    "timm JSD": lambda z, y: JsdCrossEntropy(num_splits=2, smoothing=0)(z, y),
    "focal on log_softmax": focal,
    "a regulariser beside it": lambda z, y: F.cross_entropy(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean(),
    "scaled, shifted, cast": lambda z, y: F.cross_entropy((2 * z + 1).to(torch.promote_types(z.dtype, torch.float32)).contiguous(), y),
    "sliced and joined": lambda z, y: F.cross_entropy(torch.cat([z[:2], z[2:]]).view(-1, CLASSES), y),
    "masked with -inf": lambda z, y: F.cross_entropy(z.masked_fill((torch.arange(CLASSES) == CLASSES - 1), -torch.inf), y % (CLASSES - 1)),
    "a loop over the rows": in_a_loop,
    "metrics under no_grad": logged_perplexity(F.cross_entropy),
    "scripted": scripted(),
}  # fmt: skip


def detached_inside(logits: Tensor, target: Tensor) -> Tensor:
    copy = logits.detach().requires_grad_()
    F.cross_entropy(copy, target).backward()
    return (logits * copy.grad).sum()


def into_a_buffer(logits: Tensor, target: Tensor) -> Tensor:
    buffer = torch.zeros(logits.shape, dtype=logits.dtype)
    buffer[:] = logits
    return F.cross_entropy(buffer, target)


REFUSED: dict[str, Loss] = {
    "binary cross-entropy": lambda z, y: F.binary_cross_entropy_with_logits(z, soft(y).to(z.dtype)),
    "BCE beside logged perplexity": logged_perplexity(lambda z, y: F.binary_cross_entropy_with_logits(z, soft(y).to(z.dtype))),
    "softmax().log()": lambda z, y: F.nll_loss(z.softmax(-1).log(), y),
    "softmax-focal": lambda z, y: (lambda p: -((1 - p) ** 2 * p.log()).mean())(z.softmax(-1).gather(1, y[:, None])),
    "softmax-focal beside logged perplexity": logged_perplexity(lambda z, y: (lambda p: -((1 - p) ** 2 * p.log()).mean())(z.softmax(-1).gather(1, y[:, None]))),
    "logsumexp by hand": lambda z, y: (z.logsumexp(-1) - z.gather(1, y[:, None]).squeeze(1)).mean(),
    "Categorical": lambda z, y: -Categorical(logits=z).log_prob(y).mean(),
    "multi-margin": lambda z, y: F.multi_margin_loss(z, y),
    "mean squared error": lambda z, y: F.mse_loss(z, soft(y).to(z.dtype)),
    "the gradient of a detached copy": detached_inside,
    "a copy in a plain buffer": into_a_buffer,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


Program = Callable[[nn.Module, Loss, Tensor, Tensor], Tensor]


def eager(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    return loss(model(x), y)


def checkpointed(use_reentrant: bool) -> Program:
    return lambda model, loss, x, y: checkpoint(lambda x: loss(model(x), y), x, use_reentrant=use_reentrant)


def loss_checkpointed(use_reentrant: bool) -> Program:
    return lambda model, loss, x, y: checkpoint(lambda z: loss(z, y), model(x), use_reentrant=use_reentrant)


def within(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Program:
    def program(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
        with context():
            return loss(model(x), y)

    return program


def compiled(part: str, backend: str = "aot_eager") -> Program:
    def program(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
        if part == "model":
            return loss(torch.compile(model, backend=backend)(x), y)
        if part == "loss":
            return torch.compile(loss, backend=backend)(model(x), y)
        if part == "both":
            return torch.compile(loss, backend=backend)(torch.compile(model, backend=backend)(x), y)

        def step(x: Tensor, y: Tensor) -> Tensor:
            logits = model(x)
            if part == "all, with a graph break":
                torch._dynamo.graph_break()
            return loss(logits, y)

        return torch.compile(step, backend=backend)(x, y)

    return program


PROGRAMS: dict[str, Program] = {
    "eager": eager,
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "saved tensors on the CPU": within(torch.autograd.graph.save_on_cpu),
    "anomaly mode": within(lambda: torch.autograd.set_detect_anomaly(True)),
    "checkpoint": checkpointed(False),
    "checkpoint, reentrant": checkpointed(True),
    "loss in a checkpoint": loss_checkpointed(False),
    "loss in a checkpoint, reentrant": loss_checkpointed(True),
    "model compiled": compiled("model"),
    "loss compiled": compiled("loss"),
    "both compiled apart": compiled("both"),
    "all compiled": compiled("all"),
    "all compiled, with a graph break": compiled("all, with a graph break"),
}
