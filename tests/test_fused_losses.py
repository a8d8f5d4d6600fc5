"""Losses that keep no logits, by the documented rule: ``loss(alpha * input, weight, target) / alpha``."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from reference import powergrad_gradient
from torch.utils.checkpoint import checkpoint

ALPHA = 0.3


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((12, 8), (20, 8), (20,))
    )
    target = torch.randint(20, (12,), generator=generator)
    target[3] = -100
    return hidden, weight, bias, target


def expected(hidden, weight, bias, target):
    logits = F.linear(hidden, weight, bias)
    return torch.autograd.grad(logits, (hidden, weight, bias), powergrad_gradient(logits, target, ALPHA))


def in_chunks(hidden, weight, bias, target):
    """A fused loss as anyone would write it: each chunk's logits are made again in the backward pass."""

    def chunk(h, t):
        return F.cross_entropy(F.linear(h, weight, bias), t, reduction="sum")

    parts = zip(hidden.split(5), target.split(5), strict=True)
    return sum(checkpoint(chunk, h, t, use_reentrant=False) for h, t in parts) / (target != -100).sum()


def test_a_chunked_loss_of_scaled_inputs_has_the_formulas_gradients():
    hidden, weight, bias, target = problem()
    loss = in_chunks(ALPHA * hidden, weight, ALPHA * bias, target) / ALPHA
    ours = torch.autograd.grad(loss, (hidden, weight, bias))
    for a, e in zip(ours, expected(hidden, weight, bias, target), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


LIGER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_fused_losses import ALPHA, expected, problem
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

hidden, weight, bias, target = (t.detach() if t.dtype == torch.int64 else t.detach().float() for t in problem())
leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
loss = LigerFusedLinearCrossEntropyLoss()(weight, ALPHA * hidden, target, ALPHA * bias) / ALPHA
true = torch.nn.functional.cross_entropy(ALPHA * torch.nn.functional.linear(hidden, weight, bias), target) / ALPHA
torch.testing.assert_close(loss, true)
for ours, formula in zip(torch.autograd.grad(loss, leaves), expected(*problem()), strict=True):
    torch.testing.assert_close(ours, formula.float(), rtol=1e-5, atol=1e-6)
print("exact")
"""


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_ligers_own_kernels_have_the_formulas_gradients_in_tritons_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # the kernels' arithmetic, on the CPU
    folder = os.path.dirname(__file__)
    run = subprocess.run(
        [sys.executable, "-c", LIGER, folder], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.stdout == "exact\n", run.stderr[-2000:]
