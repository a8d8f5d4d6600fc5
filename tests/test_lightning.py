"""PGT in Lightning, whose automatic optimization computes the gradient in a closure inside ``optimizer.step``."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from programs import CLASSES, Net
from torch.utils.data import DataLoader, TensorDataset

from pgt_hf import attach_powergrad, create_optimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")

ALPHA = 0.25
LR = 0.1
STEPS = 3


class Module(lightning.LightningModule):
    def __init__(self, net, make_optimizer, loss=F.cross_entropy):
        super().__init__()
        self.net = net
        self.make_optimizer = make_optimizer
        self.loss = loss

    def training_step(self, batch, index):
        inputs, target = batch
        return self.loss(self.net(inputs), target)

    def configure_optimizers(self):
        return self.make_optimizer(self.net)


def batches():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(8 * STEPS, 5, generator=generator), torch.randint(CLASSES, (8 * STEPS,), generator=generator)
    )


def fit(module, tmp_path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, **options,
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches(), batch_size=8))


def by_formula(net, clip=None):
    """SGD on the formula's gradient."""
    for inputs, target in DataLoader(batches(), batch_size=8):
        net.zero_grad()
        logits = net(inputs)
        logits.backward((torch.softmax(ALPHA * logits.detach(), -1) - F.one_hot(target, CLASSES)) / len(target))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= LR * parameter.grad
    return list(net.parameters())


def ours(net, **options):
    return create_optimizer(net, "powergrad_sgd", lr=LR, alpha=ALPHA, momentum=0, **options)


def attached(net):
    attach_powergrad(net, ALPHA)
    return torch.optim.SGD(net.parameters(), lr=LR)


@pytest.mark.parametrize("kind", ["create_optimizer", "attach_powergrad", "clipped by us", "clipped by Lightning"])
def test_a_fit_takes_the_steps_of_the_formula(kind, tmp_path):
    torch.manual_seed(0)
    net = Net()
    clip = 0.05 if "clipped" in kind else None
    expected = by_formula(copy.deepcopy(net), clip)
    make = attached if kind == "attach_powergrad" else ours
    if kind == "clipped by us":
        make = lambda net: ours(net, clip_mode="norm", clip_value=clip)  # noqa: E731
    fit(Module(net, make), tmp_path, **({"gradient_clip_val": clip} if kind == "clipped by Lightning" else {}))
    for parameter, wanted in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [ours, attached])
def test_a_loss_without_a_softmax_is_refused(make, tmp_path):
    loss = lambda logits, target: F.binary_cross_entropy_with_logits(logits, F.one_hot(target, CLASSES).float())  # noqa: E731
    with pytest.raises(RuntimeError, match="training without PGT"):
        fit(Module(Net(), make, loss), tmp_path)
