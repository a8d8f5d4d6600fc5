"""The mathematics, against the formula in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import powergrad_gradient, target_distribution
from torch.profiler import ProfilerActivity, profile

from pgt_hf import (
    PowerGradCrossEntropyLoss,
    powergrad_cross_entropy,
    powergrad_linear_cross_entropy,
    powergrad_log_softmax,
)

ALPHAS = [0.0, 0.05, 0.3, 0.92]
alphas = st.floats(0, 1, exclude_max=True)


def gradient_of(function, logits):
    logits = logits.detach().clone().requires_grad_()
    value = function(logits)
    value.sum().backward()
    return logits.grad, value.detach()


@settings(deadline=None, max_examples=100)
@given(
    alpha=alphas,
    batch=st.integers(1, 9),
    classes=st.integers(2, 12),
    spread=st.floats(0.01, 100),
    smoothing=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_gradient_is_the_formula_for_class_indices(alpha, batch, classes, spread, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(batch, classes, dtype=torch.float64, generator=generator)
    target = torch.randint(classes, (batch,), generator=generator)
    grad, value = gradient_of(
        lambda z: powergrad_cross_entropy(z, target, label_smoothing=smoothing, alpha=alpha), logits
    )
    torch.testing.assert_close(grad, powergrad_gradient(logits, target, alpha, smoothing), rtol=0, atol=1e-12)
    assert torch.equal(value, F.cross_entropy(logits, target, label_smoothing=smoothing)) or alpha == 1
    torch.testing.assert_close(grad.sum(-1), torch.zeros(batch, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(alpha=alphas, classes=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_gradient_is_the_formula_for_class_probabilities(alpha, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, classes, dtype=torch.float64, generator=generator)
    target = torch.rand(5, classes, dtype=torch.float64, generator=generator).softmax(-1)
    expected = powergrad_gradient(logits, target, alpha)
    grad, _ = gradient_of(lambda z: powergrad_cross_entropy(z, target, alpha=alpha), logits)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    grad, _ = gradient_of(lambda z: -(target * powergrad_log_softmax(z, alpha=alpha)).sum(-1).mean(), logits)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (4, 7, 3), (2, 7, 3, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
def test_every_argument_agrees_with_cross_entropy_of_scaled_logits(shape, reduction, weighted, smoothing, kind):
    """(1/alpha) CE(alpha z) has PGT's gradient, whatever the arguments: torch itself is the reference."""
    dim = 0 if len(shape) == 1 else 1
    logits = torch.randn(shape, dtype=torch.float64)
    index_shape = shape[:dim] + shape[dim + 1 :]
    target = torch.randint(7, index_shape)
    if kind == "ignored" and target.dim():
        target.view(-1)[0] = -100
    if kind == "probabilities":
        target = torch.rand(shape, dtype=torch.float64).softmax(dim)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    options["weight"] = torch.rand(7, dtype=torch.float64) if weighted else None
    upstream = torch.rand(index_shape, dtype=torch.float64) if reduction == "none" else 3.0
    for alpha in (0.3, torch.tensor(0.05)):
        grad, value = gradient_of(
            lambda z: upstream * powergrad_cross_entropy(z, target, alpha=alpha, **options), logits
        )
        expected, _ = gradient_of(lambda z: upstream * F.cross_entropy(alpha * z, target, **options) / alpha, logits)
        torch.testing.assert_close(grad, expected, rtol=1e-6 if torch.is_tensor(alpha) else 0, atol=1e-12)
        assert torch.equal(value, upstream * F.cross_entropy(logits, target, **options))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("indices", {"label_smoothing": 0.1}),
        ("indices", {"reduction": "none", "weight": torch.rand(7, dtype=torch.float64)}),
        ("any numbers", {"label_smoothing": 0.1}),
        ("any numbers", {"reduction": "sum"}),
    ],
)
def test_a_compiled_loss_and_targets_that_sum_to_anything_agree_with_torch_too(compiled, kind, options):
    logits = torch.randn(4, 7, 3, dtype=torch.float64)
    target = torch.rand(4, 7, 3, dtype=torch.float64)
    if kind == "indices":
        target = torch.randint(7, (4, 3)).index_fill(0, torch.tensor([1]), -100)
    upstream = torch.rand((4, 3) if options.get("reduction") == "none" else (), dtype=torch.float64)

    def loss(z):
        return powergrad_cross_entropy(z, target, alpha=0.3, **options)

    function = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    grad, value = gradient_of(lambda z: upstream * function(z), logits)
    expected, _ = gradient_of(lambda z: upstream * F.cross_entropy(0.3 * z, target, **options) / 0.3, logits)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    assert torch.equal(value, upstream * F.cross_entropy(logits, target, **options))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_alpha_one_is_torch_bit_for_bit(kind, dtype):
    logits = torch.randn(6, 9).to(dtype)
    target = torch.randint(9, (6,)) if kind == "indices" else torch.rand(6, 9).softmax(-1).to(dtype)
    ours = gradient_of(lambda z: powergrad_cross_entropy(z, target, label_smoothing=0.1, alpha=1.0), logits)
    theirs = gradient_of(lambda z: F.cross_entropy(z, target, label_smoothing=0.1), logits)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    ours = gradient_of(lambda z: powergrad_log_softmax(z, alpha=torch.tensor(1.0))[:, 0], logits)
    theirs = gradient_of(lambda z: F.log_softmax(z, -1)[:, 0], logits)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("exponent", range(-12, 13, 4))
@pytest.mark.parametrize("batch", [8, 64, 256])
def test_gradient_scales_with_any_loss_scale(exponent, batch):
    """The published hook is right only at a loss scale of N^2."""
    logits, target = torch.randn(batch, 100, dtype=torch.float64), torch.randint(100, (batch,))
    scale = 10.0**exponent
    grad, _ = gradient_of(lambda z: scale * powergrad_cross_entropy(z, target, alpha=0.25), logits)
    torch.testing.assert_close(grad / scale, powergrad_gradient(logits, target, 0.25), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1, 30])
def test_half_precision_gradient_is_the_formula_rounded_once(dtype, spread):
    logits, target = (spread * torch.randn(16, 50)).to(dtype), torch.randint(50, (16,))
    grad, value = gradient_of(lambda z: powergrad_cross_entropy(z, target, alpha=0.3, reduction="sum"), logits)
    expected = powergrad_gradient(logits, target, 0.3) * 16
    assert grad.dtype == dtype and torch.equal(value, F.cross_entropy(logits, target, reduction="sum"))
    torch.testing.assert_close(grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_probabilities_that_underflow_still_have_a_gradient():
    logits = torch.tensor([[0.0, -200.0, -400.0]])  # p = (1, 0, 0) in float32; p ** alpha would lose the last two
    grad, _ = gradient_of(lambda z: powergrad_cross_entropy(z, torch.tensor([0]), alpha=0.05), logits)
    assert grad[0, 1] > 0 and grad[0, 2] > 0
    torch.testing.assert_close(
        grad.double(), powergrad_gradient(logits, torch.tensor([0]), 0.05), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_targets_ignored_gives_torchs_value_and_a_zero_gradient(smoothing):
    logits, target = torch.randn(4, 5), torch.full((4,), -100)
    grad, value = gradient_of(
        lambda z: powergrad_cross_entropy(z, target, alpha=0.5, label_smoothing=smoothing), logits
    )
    assert value.isnan() and F.cross_entropy(logits, target).isnan() and torch.equal(grad, torch.zeros(4, 5))


def test_bytes_name_classes_up_to_255():
    logits, target = torch.randn(3, 200), torch.tensor([156, 3, 199])  # 156 is -100 in uint8
    expected, _ = gradient_of(lambda z: powergrad_cross_entropy(z, target, alpha=0.3), logits)
    grad, _ = gradient_of(lambda z: powergrad_cross_entropy(z, target.to(torch.uint8), alpha=0.3), logits)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("alpha", [1e-46, 1e-30])
def test_masked_classes_have_no_gradient_at_an_alpha_that_rounds_to_zero(alpha):
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    grad, _ = gradient_of(lambda z: powergrad_cross_entropy(z, torch.tensor([0]), alpha=alpha), logits)
    torch.testing.assert_close(grad, torch.tensor([[-0.5, 0.5, 0.0]]))


def test_what_a_hook_keeps_of_the_graph_stays_as_it_was():
    kept = []

    def keep(tensor):
        kept.append((tensor, tensor.clone()))
        return tensor

    logits = torch.randn(4, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = powergrad_cross_entropy(logits, torch.arange(4), alpha=0.3)
    loss.backward()
    assert kept and all(torch.equal(tensor, before) for tensor, before in kept)


def test_empty_and_non_contiguous_inputs_work():
    empty = torch.randn(0, 5)
    grad, value = gradient_of(
        lambda z: powergrad_cross_entropy(z, torch.empty(0, dtype=torch.long), alpha=0.5, reduction="sum"), empty
    )
    assert value == 0 and grad.shape == (0, 5)
    base = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (4,))
    powergrad_cross_entropy(base.t()[::2], target, alpha=0.5).backward()
    torch.testing.assert_close(base.grad.t()[::2], powergrad_gradient(base.t()[::2], target, 0.5), rtol=0, atol=1e-12)


def test_backward_twice_over_a_retained_graph_gives_the_same_gradient():
    logits, target = torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,))
    loss = powergrad_cross_entropy(logits, target, alpha=0.5)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], first, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_double_backward_differentiates_the_gradient_that_was_given(smoothing):
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (4,))
    grad = torch.autograd.grad(
        powergrad_cross_entropy(logits, target, alpha=0.3, label_smoothing=smoothing), logits, create_graph=True
    )[0]
    ours = torch.autograd.grad(grad.square().sum(), logits)[0]
    formula = (torch.softmax(0.3 * logits, -1) - target_distribution(target, 5, smoothing)) / 4
    torch.testing.assert_close(ours, torch.autograd.grad(formula.square().sum(), logits)[0], rtol=0, atol=1e-12)


def test_gradient_reaches_soft_targets_as_torchs_does():
    logits = torch.randn(3, 4, dtype=torch.float64)
    weight = torch.rand(4, dtype=torch.float64)
    target = torch.rand(3, 4, dtype=torch.float64).softmax(-1)
    options = {"weight": weight, "label_smoothing": 0.1}
    ours, _ = gradient_of(lambda q: powergrad_cross_entropy(logits, q, alpha=0.3, **options), target)
    theirs, _ = gradient_of(lambda q: F.cross_entropy(logits, q, **options), target)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_vmap_of_grad_gives_each_sample_its_gradient():
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    each = torch.vmap(torch.func.grad(lambda z, y: powergrad_cross_entropy(z, y, alpha=0.3)))(logits, target)
    torch.testing.assert_close(each, 6 * powergrad_gradient(logits, target, 0.3), rtol=0, atol=1e-12)


def test_one_compilation_serves_every_alpha():
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda z, y, alpha: powergrad_cross_entropy(z, y, alpha=alpha), fullgraph=True, backend=backend
    )
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    for alpha in (0.1, 0.5, 0.9):
        grad, _ = gradient_of(lambda z: compiled(z, target, torch.tensor(alpha, dtype=torch.float64)), logits)
        torch.testing.assert_close(grad, powergrad_gradient(logits, target, alpha), rtol=0, atol=1e-12)
    assert len(compilations) == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_alpha_that_is_a_number_may_change_in_a_compiled_function(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda z, y, alpha: powergrad_cross_entropy(z, y, alpha=alpha),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    for alpha in (0.1, 0.2, 0.3, 1.5):
        grad, _ = gradient_of(lambda z: compiled(z, target, alpha), logits)
        torch.testing.assert_close(grad, powergrad_gradient(logits, target, alpha), rtol=0, atol=1e-12)
    with pytest.raises(Exception, match=r"alpha must lie in \[0, 1\], got -0.5"):
        compiled(logits, target, -0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32_as_for_cross_entropy(dtype):
    logits, target = torch.randn(6, 5).to(dtype), torch.randint(5, (6,))
    with torch.autocast("cpu", dtype=dtype):
        grad, value = gradient_of(lambda z: powergrad_cross_entropy(z, target, alpha=0.3), logits)
        assert torch.equal(value, F.cross_entropy(logits, target)) and value.dtype == torch.float32
    torch.testing.assert_close(
        grad.double(), powergrad_gradient(logits, target, 0.3), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


@settings(deadline=None, max_examples=50)
@given(alpha=st.floats(0.01, 0.98), classes=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_probabilities_above_the_threshold_fall_and_those_below_rise(alpha, classes, seed):
    """Lemma 1, and that the map keeps the order of p."""
    logits = torch.randn(1, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = torch.full_like(logits, 1 / classes)
    grad, _ = gradient_of(lambda z: powergrad_cross_entropy(z, q, alpha=alpha), logits)
    powered, p = grad + q, logits.softmax(-1)
    threshold = p.pow(alpha).sum() ** (1 / (alpha - 1))
    above = p > threshold
    assert bool((powered[above] <= p[above] + 1e-12).all() and (powered[~above] >= p[~above] - 1e-12).all())
    assert torch.equal(powered.argsort(), p.argsort())


needs_linear_cross_entropy = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)


@needs_linear_cross_entropy
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_gives_the_same_gradients_and_the_value_of_scaled_logits(bias, smoothing, reduction):
    h = torch.randn(300, 4, dtype=torch.float64, requires_grad=True)  # more rows than are made at a time
    w = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(9, dtype=torch.float64, requires_grad=True) if bias else None
    target = torch.randint(9, (300,)).masked_fill(torch.rand(300) < 0.1, -100)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    leaves = [h, w, *([b] if bias else [])]
    loss = powergrad_linear_cross_entropy(h, w, target, linear_bias=b, alpha=0.3, **options)
    torch.testing.assert_close(loss, F.cross_entropy(0.3 * F.linear(h, w, b), target, **options))
    ours = torch.autograd.grad(loss.sum(), leaves)
    theirs = powergrad_cross_entropy(F.linear(h, w, b), target, alpha=0.3, **options)
    for a, e in zip(ours, torch.autograd.grad(theirs.sum(), leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@needs_linear_cross_entropy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.3, 0.01, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropys_value_is_torchs_bit_for_bit(dtype, alpha, reduction):
    features, weight = torch.randn(30, 8, dtype=dtype), torch.randn(20, 8, dtype=dtype)
    target = torch.randint(20, (30,))
    options = {"reduction": reduction, "options": None}
    value = powergrad_linear_cross_entropy(features, weight, target, alpha=alpha, **options)
    assert torch.equal(value, F.linear_cross_entropy(features * alpha, weight, target, **options))


@needs_linear_cross_entropy
def test_linear_cross_entropy_refuses_an_alpha_of_zero():
    with pytest.raises(ValueError, match="alpha must be above 0"):
        powergrad_linear_cross_entropy(torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,)), alpha=0)


@needs_linear_cross_entropy
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_linear_cross_entropy_never_holds_the_logits(alpha):
    rows, classes = 1024, 5000
    h, w = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    target = torch.randint(classes, (rows,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        powergrad_linear_cross_entropy(h, w, target, alpha=alpha).backward()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    assert peak < rows * classes * 4 / 3


@needs_linear_cross_entropy
def test_options_none_allows_double_backward():
    h, w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(9, 4, dtype=torch.float64)
    target = torch.randint(9, (6,))
    (grad,) = torch.autograd.grad(
        powergrad_linear_cross_entropy(h, w, target, alpha=0.3, options=None), h, create_graph=True
    )
    logits = F.linear(h, w)
    (expected,) = torch.autograd.grad(F.cross_entropy(0.3 * logits, target) / 0.3, h, create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(grad.square().sum(), h), torch.autograd.grad(expected.square().sum(), h)
    )


def test_the_module_is_the_function():
    logits, target, weight = torch.randn(6, 5), torch.randint(5, (6,)), torch.rand(5)
    loss = PowerGradCrossEntropyLoss(0.3, weight=weight, label_smoothing=0.1, reduction="sum")
    ours = gradient_of(lambda z: loss(z, target), logits)
    theirs = gradient_of(
        lambda z: powergrad_cross_entropy(z, target, weight, label_smoothing=0.1, reduction="sum", alpha=0.3), logits
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and "alpha=0.3" in repr(loss)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -0.1, True, "0.3", None, torch.rand(2)])
def test_a_bad_alpha_is_named(alpha):
    functions = [
        lambda: powergrad_log_softmax(torch.randn(2, 3), alpha=alpha),
        lambda: powergrad_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), alpha=alpha),
        lambda: PowerGradCrossEntropyLoss(alpha),
    ]
    for function in functions:
        with pytest.raises((TypeError, ValueError), match="alpha"):
            function()


def test_an_alpha_above_one_warns():
    with pytest.warns(UserWarning, match="above 1"):
        powergrad_log_softmax(torch.randn(2, 3), alpha=1.5)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("reduction", {"reduction": "avg"}),
        ("label_smoothing", {"label_smoothing": 1.5}),
        ("weight", {"weight": torch.rand(4)}),
        ("target", {"target": torch.tensor([0])}),
        ("target", {"target": torch.rand(2, 4)}),
        ("target", {"target": torch.tensor([0, 1], dtype=torch.int32)}),
        ("input", {"input": torch.tensor([[1, 2, 3], [1, 2, 3]])}),
        ("input", {"input": torch.tensor(1.0)}),
    ],
)
def test_a_bad_argument_is_named(message, changes):
    arguments = {"input": torch.randn(2, 3), "target": torch.tensor([0, 1])} | changes
    for alpha, _ in itertools.product((0.3, 1.0), (None,)):
        with pytest.raises((TypeError, ValueError), match=message):
            powergrad_cross_entropy(**arguments, alpha=alpha)


FUNCTIONS = {  # of logits, class indices, the distribution that they stand for, and its smoothing
    "cross_entropy": lambda z, y, q, s: powergrad_cross_entropy(z, y, label_smoothing=s, alpha=0.3),
    "soft targets": lambda z, y, q, s: powergrad_cross_entropy(z, q, alpha=0.3),
    "log_softmax": lambda z, y, q, s: -(q * powergrad_log_softmax(z, alpha=0.3)).sum(-1).mean(),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_transform_of_torch_func_gives_the_formulas_derivatives(name, smoothing):
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    powered = torch.softmax(0.3 * logits, -1)
    q = target_distribution(target, 5, smoothing)
    gradient = (powered - q) / 6
    # The derivative of that gradient: alpha (diag(p') - p' p'^T) / N in each row.
    curvature = torch.zeros(6, 5, 6, 5, dtype=torch.float64)
    for i, p in enumerate(powered):
        curvature[i, :, i] = 0.3 * (torch.diag(p) - torch.outer(p, p)) / 6

    def loss(z):
        return FUNCTIONS[name](z, target, q, smoothing)

    close = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(torch.func.grad(loss)(logits), gradient, **close)
    torch.testing.assert_close(torch.func.jacrev(loss)(logits), gradient, **close)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(logits), curvature, **close)
    torch.testing.assert_close(torch.func.hessian(loss)(logits), curvature, **close)
    each = torch.func.vmap(torch.func.grad(lambda z, y, q: FUNCTIONS[name](z[None], y[None], q[None], smoothing)))
    torch.testing.assert_close(each(logits, target, q) / 6, gradient, **close)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_batched_gradients_are_those_of_each_one(weighted, smoothing):
    logits, target = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (6,))
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    options = {"reduction": "none", "label_smoothing": smoothing, "alpha": 0.3}
    losses = powergrad_cross_entropy(logits, target, weight, **options)
    vectors = torch.randn(3, 6, dtype=torch.float64)
    (batched,) = torch.autograd.grad(losses, logits, vectors, is_grads_batched=True, retain_graph=True)
    for vector, ours in zip(vectors, batched, strict=True):
        (expected,) = torch.autograd.grad(losses, logits, vector, retain_graph=True)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.rand(7)}])
def test_a_retained_graph_gives_the_same_bits_again(dtype, options):
    logits, target = torch.randn(4, 7, dtype=dtype, requires_grad=True), torch.randint(7, (4,))
    options = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    loss = powergrad_cross_entropy(logits, target, alpha=0.3, **options)
    first, second, last = (torch.autograd.grad(loss, logits, retain_graph=retain)[0] for retain in (True, True, False))
    assert torch.equal(first, second) and torch.equal(first, last)
