"""Never plain by accident: every program gives PGT's gradient, or an error that says what to do."""

import contextlib
import copy
import dataclasses
import gc
import pickle
import subprocess
import sys
import types
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from programs import CLASSES, EXACT, PROGRAMS, REFUSED, Net, eager
from torch import nn

from pgt_hf import attach_powergrad, bind_powergrad, create_optimizer, powergrad_cross_entropy
from pgt_hf.logits import PowerGradLogits, StampedGradient

ALPHA = 0.25
REFUSAL = "training without PGT"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def data(dtype=torch.float32, rows=8):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 5, generator=generator).to(dtype).requires_grad_()
    return inputs, torch.randint(CLASSES, (rows,), generator=generator)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def formula(logits, target, alpha=ALPHA):
    return (torch.softmax(alpha * logits, -1) - F.one_hot(target, logits.size(-1))) / len(target)


def by_formula(model, inputs, target, alpha=ALPHA):
    """Every gradient of the model, from the formula's at its logits."""
    model.zero_grad()
    logits = model(inputs)
    logits.backward(formula(logits.detach(), target, alpha))
    return gradients(model)


def assert_same(ours, expected, rtol=2e-6):
    scale = max(g.abs().max().item() for g in expected)
    for a, b in zip(ours, expected, strict=True):
        assert type(a) is torch.Tensor
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * scale)


# --- a generated family: every loss in every kind of program

IMPOSSIBLE = {
    # torch itself cannot: recomputation stops early by an exception, which TorchScript swallows
    ("checkpoint", "scripted"),
    ("loss in a checkpoint", "scripted"),
    # no gradient inside a reentrant checkpoint
    ("checkpoint, reentrant", "the gradient of a detached copy"),
    ("loss in a checkpoint, reentrant", "the gradient of a detached copy"),
}  # fmt: skip


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=[pytest.mark.slow] if "compiled" in name else []) for name in PROGRAMS]
)
@pytest.mark.parametrize("loss", [*EXACT, *REFUSED])
def test_a_backward_pass_is_pgt_or_an_error(program, loss):
    if (program, loss) in IMPOSSIBLE:
        pytest.skip("fails without PGT as well")
    model, (inputs, target) = network(), data()
    function = (EXACT | REFUSED)[loss]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    if loss in EXACT:
        true_loss = (PROGRAMS["autocast"] if program == "autocast" else eager)(model, function, inputs, target)
        with Oracle(ALPHA):
            true_loss.backward()
        expected = gradients(model)
    optimizer.zero_grad()
    handle = attach_powergrad(model, ALPHA)

    def step():
        value = PROGRAMS[program](model, function, inputs, target)
        value.backward()
        optimizer.step()
        return value

    detaches = program == "loss in a checkpoint, reentrant"
    if loss in REFUSED or detaches:
        with pytest.raises(Exception, match=f"{REFUSAL}|PGT: "):
            step()
        return
    value = step()
    assert torch.equal(value.detach(), true_loss.detach()) and handle.calls == 1
    # The oracle has the rounded log-probabilities, PGT the logits.
    assert_same(gradients(model), expected, 0.06 if program == "autocast" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", EXACT)
def test_every_dtype_is_exact(loss, dtype):
    model, (inputs, target) = network(dtype), data(dtype)
    true_loss = EXACT[loss](model(inputs), target)
    with Oracle(ALPHA):
        true_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    attach_powergrad(model, ALPHA)
    value = EXACT[loss](model(inputs), target)
    value.backward()
    assert torch.equal(value.detach(), true_loss.detach())
    assert_same(gradients(model), expected, {8: 1e-12, 4: 2e-6, 2: 0.06}[dtype.itemsize])


def test_a_refusal_is_raised_at_any_step():
    model, (inputs, target) = network(), data()
    attach_powergrad(model, ALPHA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=REFUSAL):
        REFUSED["binary cross-entropy"](model(inputs), target).backward()


# --- outputs of every shape

Pair = namedtuple("Pair", "logits extra")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    name: str = "output"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    logits: torch.Tensor


class Attributes:
    def __init__(self, logits):
        self.logits = logits
        self.me = self  # a cycle


OUTPUTS = {
    "tuple": (lambda z: (z, None), lambda out: out[0]),
    "list": (lambda z: [z], lambda out: out[0]),
    "dict": (lambda z: {"logits": z, "name": "x"}, lambda out: out["logits"]),
    "nested": (lambda z: {"all": [(z,)]}, lambda out: out["all"][0][0]),
    "namedtuple": (lambda z: Pair(z, 1), lambda out: out.logits),
    "dataclass": (Output, lambda out: out.logits),
    "frozen dataclass with slots": (Frozen, lambda out: out.logits),
    "namespace": (lambda z: types.SimpleNamespace(logits=z), lambda out: out.logits),
    "object": (Attributes, lambda out: out.logits),
    "dataclass in a dict": (lambda z: {"out": Output(z)}, lambda out: out["out"].logits),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_are_found_in_any_output(kind):
    wrap, unwrap = OUTPUTS[kind]

    class Wrapped(Net):
        def forward(self, x):
            return wrap(super().forward(x))

    torch.manual_seed(0)
    model, (inputs, target) = Wrapped(), data()
    expected = by_formula(network(), inputs, target)
    with attach_powergrad(model, ALPHA) as handle:
        F.cross_entropy(unwrap(model(inputs)), target).backward()
    assert handle.calls == 1
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("name", ["max", "topk", "sort", "cummax", "unbind", "split", "aminmax"])
def test_functions_that_return_several_tensors_keep_the_transform(name):
    if name == "aminmax" and torch.__version__.startswith("2.9."):
        pytest.skip("this torch cannot differentiate aminmax")

    def loss(z, y):
        if name == "aminmax":
            return F.cross_entropy(torch.stack(z.aminmax(dim=1), 1), y % 2)
        if name == "max":
            return F.cross_entropy(torch.stack([z[:, :3].max(1).values, z[:, 3:].max(1).values], 1), y % 2)
        if name == "topk":
            return F.cross_entropy(z.topk(3).values, y % 3)
        if name in ("unbind", "split"):
            return F.cross_entropy(torch.cat(getattr(z, name)(*([4] if name == "split" else []))).view(8, -1), y)
        return F.cross_entropy(getattr(z, name)(dim=1)[0], y)

    model, (inputs, target) = network(), data()
    with Oracle(ALPHA):
        loss(model(inputs), target).backward()
    expected = gradients(model)
    model.zero_grad()
    attach_powergrad(model, ALPHA)
    loss(model(inputs), target).backward()
    assert_same(gradients(model), expected)


# --- who reads logits keeps working


def test_whoever_reads_logits_gets_what_torch_gives():
    model, (inputs, target) = network(), data()
    plain = model(inputs).detach()
    attach_powergrad(model, ALPHA)
    logits = model(inputs)
    assert isinstance(logits, PowerGradLogits)
    assert type(logits.detach()) is torch.Tensor and type(logits.data) is torch.Tensor
    for read in (
        logits.detach().cpu().numpy(),
        np.asarray(logits.detach()),
        logits.tolist(),
        logits.detach().tolist(),
    ):
        np.testing.assert_array_equal(np.asarray(read, dtype=np.float32), plain.numpy())
    assert torch.equal(logits.topk(2).indices, plain.topk(2).indices)
    assert torch.equal(logits.argmax(-1), plain.argmax(-1)) and torch.equal(
        logits.gather(1, target[:, None]).detach(), plain.gather(1, target[:, None])
    )
    assert type(pickle.loads(pickle.dumps(logits.detach()))) is torch.Tensor
    assert torch.equal(copy.deepcopy(logits.detach()), plain)
    assert "tensor" in repr(logits) and str(plain[0, 0].item())[:4] in str(logits)
    assert f"{logits.mean().item():.3f}" == f"{plain.mean().item():.3f}"
    with torch.no_grad():  # metrics
        buffer = torch.zeros(8, CLASSES)
        buffer[:] = logits
        buffer.copy_(logits)
    assert torch.equal(buffer, plain)
    for step in (torch.sigmoid, torch.softmax):
        assert torch.equal(
            step(logits, *([-1] if step is torch.softmax else [])).detach(),
            step(plain, *([-1] if step is torch.softmax else [])),
        )


def test_hooks_and_retained_gradients_see_pgts_gradient():
    model, (inputs, target) = network(), data()
    seen, leaving = [], []
    attach_powergrad(model, ALPHA)
    model.head.register_full_backward_hook(lambda module, grad_in, grad_out: leaving.append(grad_out[0]))
    logits = model(inputs)
    logits.register_hook(seen.append)
    logits.retain_grad()
    F.cross_entropy(logits, target).backward()
    expected = formula(logits.detach(), target)
    for grad in (*seen, *leaving, logits.grad):
        torch.testing.assert_close(torch.as_tensor(grad.tolist()), expected, rtol=0, atol=1e-7)
        assert grad.norm().item() == pytest.approx(expected.norm().item())
        assert np.asarray(grad.numpy()).shape == expected.shape


def test_a_plain_tensor_that_meets_the_logits_gets_a_plain_gradient():
    model, (inputs, target) = network(), data()
    scale, norm = nn.Parameter(torch.tensor(1.5)), nn.LayerNorm(CLASSES)
    with Oracle(ALPHA):
        F.cross_entropy(norm(model(inputs) * scale), target).backward()
    expected = [*gradients(model), scale.grad, *gradients(norm)]
    for module in (model, norm):
        module.zero_grad()
    scale.grad = None
    attach_powergrad(model, ALPHA)
    F.cross_entropy(norm(model(inputs) * scale), target).backward()
    assert_same([*gradients(model), scale.grad, *gradients(norm)], expected)


def test_an_in_place_change_of_what_the_head_has_saved_raises_as_in_torch():
    model = nn.Sequential(nn.Linear(5, CLASSES), nn.Tanh())
    inputs, target = data()
    attach_powergrad(model, ALPHA)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.cross_entropy(model(inputs).mul_(2), target).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss", [F.cross_entropy, lambda z, y: F.nll_loss(F.log_softmax(z, -1), y)], ids=["ce", "log"]
)
def test_a_change_through_detached_logits_never_changes_the_gradient(loss, dtype):
    model, (inputs, target) = network().to(dtype), data()

    def gradient(edited):
        model.zero_grad()
        logits = model(inputs.to(dtype))
        value = loss(logits, target)
        if edited:
            logits.detach()[:, 0] = -torch.inf
        value.backward()
        return gradients(model)

    attach_powergrad(model, ALPHA)
    expected = gradient(edited=False)
    if loss is F.cross_entropy and dtype.itemsize > 2:  # which keeps the log-probabilities
        assert_same(gradient(edited=True), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(edited=True)


def test_the_address_of_logits_is_refused():
    model, (inputs, _) = network(), data()
    attach_powergrad(model, ALPHA)
    with pytest.raises(RuntimeError, match=r"logits\.detach"):
        model(inputs).data_ptr()


def test_two_heads_with_other_alphas_must_not_be_added():
    (inputs, target), one, other = data(), network(), network()
    attach_powergrad(one, 0.25)
    attach_powergrad(other, 0.5)
    with pytest.raises(RuntimeError, match=r"alpha=0\.25 and alpha=0\.5"):
        F.cross_entropy(one(inputs) + other(inputs), target)


# --- what never reaches the gate


def train(model, optimizer, inputs, target, loss=F.cross_entropy):
    value = loss(model(inputs), target)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def train_three_steps(model, owned, inputs, target):
    """With PGT from ``create_optimizer``, or attached by hand beside a plain optimizer, which is returned."""
    if owned:
        optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9, head="head")
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach_powergrad(model, ALPHA, head="head")
    for _ in range(3):
        train(model, optimizer, inputs, target)
    return optimizer


class Fused(Net):
    def forward(self, x, y=None):
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) if y is None else F.cross_entropy(hidden @ self.head.weight.T + self.head.bias, y)


@pytest.mark.parametrize("owned", [False, True])
def test_a_loss_that_passes_the_head_by_is_refused_in_any_backward_pass(owned):
    model, (inputs, target) = Fused(), data()
    _optimizer = train_three_steps(model, owned, inputs, target)  # held: PGT lives as long as it
    F.cross_entropy(model(inputs), target).backward()  # one micro-batch through the head
    with pytest.raises(RuntimeError, match=REFUSAL):  # and one past it
        model(inputs, target).backward()


def change_head(model):
    model.head = nn.Linear(8, CLASSES)


def wrap_head(model):
    model.head = nn.Sequential(copy.deepcopy(model.head))


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("change", [lambda model: model.eval(), change_head, lambda model: model.head.eval()])
def test_a_step_that_pgt_did_not_act_in_is_refused_at_any_time(change, owned):
    model, (inputs, target) = network(), data()
    optimizer = train_three_steps(model, owned, inputs, target)
    change(model)
    with pytest.raises(RuntimeError, match=REFUSAL):
        train(model, optimizer, inputs, target)


def test_a_wrapped_copy_of_a_hand_attached_head_goes_by_the_handle():
    model, (inputs, target) = network(), data()
    handle = attach_powergrad(model, ALPHA, head="head")
    wrap_head(model)
    handle.alpha = 0.5
    F.cross_entropy(model(inputs), target).backward()
    assert_same(gradients(model), by_formula_of(model, handle, inputs, target, 0.5))


def by_formula_of(model, handle, inputs, target, alpha):
    ours = gradients(model)
    handle.remove()
    expected = by_formula(model, inputs, target, alpha)
    model.zero_grad()
    for parameter, grad in zip(model.parameters(), ours, strict=True):
        parameter.grad = grad
    return expected


def test_two_optimizers_may_step_after_one_backward_pass():
    model, (inputs, target) = network(), data()
    attach_powergrad(model, ALPHA)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.body, model.head)]
    for _ in range(3):
        F.cross_entropy(model(inputs), target).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_a_step_that_changes_nothing_needs_no_backward_pass():
    model = network()
    attach_powergrad(model, ALPHA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()  # no gradients
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # as torch.distributed.checkpoint makes an optimizer's state
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match=REFUSAL):
        optimizer.step()


# --- copies, pickles, several optimizers


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_pair_of_model_and_optimizer_refuses_to_step_until_it_is_bound(copier):
    model, (inputs, target) = network(), data()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)
    train(model, optimizer, inputs, target)
    twin, twin_optimizer = copier((model, optimizer))
    with pytest.raises(RuntimeError, match="copy.*bind_powergrad"):
        train(twin, twin_optimizer, inputs, target)
    twin_optimizer.zero_grad()
    bind_powergrad(twin_optimizer, twin, alpha=0.5)
    F.cross_entropy(twin(inputs), target).backward()
    ours = gradients(twin)
    twin_optimizer.powergrad.remove()
    assert_same(ours, by_formula(twin, inputs, target, 0.5))
    train(model, optimizer, inputs, target)  # the original is untouched
    assert optimizer.powergrad.calls == 2


def test_an_optimizer_whose_transform_was_replaced_refuses_to_step():
    model, (inputs, target) = network(), data()
    first = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)
    second = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=0.5, momentum=0.9)
    train(model, second, inputs, target)
    with pytest.raises(RuntimeError, match="replaced"):
        train(model, first, inputs, target)
    del second
    gc.collect()
    with pytest.raises(RuntimeError, match="replaced"):
        train(model, first, inputs, target)


def test_a_plain_optimizer_that_loads_the_state_of_one_with_pgt_stays_plain():
    model, (inputs, target) = network(), data()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)
    train(model, optimizer, inputs, target)
    state = optimizer.state_dict()
    assert state["powergrad_alpha"] == ALPHA
    plain = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD([{"params": [p]} for p in network().parameters()], lr=0.1)
    for each in (plain, other):
        if len(each.param_groups) == len(state["param_groups"]):
            each.load_state_dict(state)
            assert all("powergrad_alpha" not in group for group in each.param_groups)


@pytest.mark.slow
def test_a_foreign_optimizers_step_is_not_watched_while_nothing_is_attached():
    code = """
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks
from pgt_hf import attach_powergrad
optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
model = torch.nn.Linear(3, 2)
assert not hooks
handle = attach_powergrad(model, 0.25)
assert len(hooks) == 1
handle.remove()
del handle, model
optimizer.step()
assert not hooks
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- alpha acts in the very next forward pass


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
@pytest.mark.parametrize("write", ["handle", "item", "update", "all groups"])
def test_alpha_that_is_moved_acts_in_the_next_forward_pass(how, write):
    model, (inputs, target) = network(), data()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=1e-20, alpha=ALPHA, momentum=0.9)
    graphs = torch._dynamo.utils.counters["stats"]
    step = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend=how) if how != "eager" else None
    unique = []
    for alpha in (0.25, 0.5, 0.1, 0.9):
        if write == "handle":
            optimizer.powergrad.alpha = alpha
        elif write == "item":
            optimizer.param_groups[-1]["powergrad_alpha"] = alpha
        elif write == "update":
            optimizer.param_groups[0].update(powergrad_alpha=alpha, lr=1e-20)
        else:
            for group in optimizer.param_groups:
                group["powergrad_alpha"] = alpha
        optimizer.zero_grad()
        (F.cross_entropy(model(inputs), target) if step is None else step(inputs, target)).backward()
        ours = gradients(model)
        unique.append(graphs["unique_graphs"])
        plain = network()
        assert_same(ours, by_formula(plain, inputs, target, alpha))
        optimizer.step()
        assert {group["powergrad_alpha"] for group in optimizer.param_groups} == {alpha}
    assert len(set(unique)) == 1


@pytest.mark.slow
def test_alpha_one_is_plain_training_bit_for_bit_compiled_too_and_still_guarded():
    model, (inputs, target) = network(), data()
    step = lambda: torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend="aot_eager")(inputs, target)  # noqa: E731
    step().backward()
    plain = gradients(model)
    model.zero_grad()
    handle = attach_powergrad(model, 1.0)
    step().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), plain, strict=True))
    model.zero_grad()
    F.cross_entropy(model(inputs), target).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), plain, strict=True))
    with pytest.raises(RuntimeError, match=REFUSAL):
        REFUSED["binary cross-entropy"](model(inputs), target).backward()
    model.zero_grad()
    handle.alpha = 0.5
    step().backward()
    ours = gradients(model)
    handle.remove()
    assert_same(ours, by_formula(model, inputs, target, 0.5))


def test_a_class_that_was_compiled_before_is_compiled_anew():
    model, (inputs, target) = network(), data()
    compiled = torch.compile(model, backend="aot_eager")
    F.cross_entropy(compiled(inputs), target).backward()
    model.zero_grad()
    with attach_powergrad(model, ALPHA):
        F.cross_entropy(compiled(inputs), target).backward()
        ours = gradients(model)
    expected = by_formula(model, inputs, target)
    assert_same(ours, expected)
    model.zero_grad()
    F.cross_entropy(compiled(inputs), target).backward()
    assert_same(gradients(model), by_formula(model, inputs, target, 1.0))


# --- double backward and torch.func


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["cross_entropy", "soft targets", "log_softmax", "explicit"])
def test_a_gradient_penalty_differentiates_pgts_gradient(loss, smoothing, dtype):
    model, (inputs, target) = network(torch.float64), data(torch.float64)
    q = F.one_hot(target, CLASSES).double() * (1 - smoothing) + smoothing / CLASSES

    def penalty(grads):
        return sum((grad**2).sum() for grad in grads)

    def by_formula(weight):
        """The squared norm of the head's gradient, ``(p' - q)^T h / N``, written out in plain torch."""
        hidden = torch.tanh(model.body(inputs))
        logits = hidden @ weight.T + model.head.bias
        error = (torch.softmax(ALPHA * logits, -1) - q) / len(q)
        return penalty([error.T @ hidden, error.sum(0)])

    (expected,) = torch.autograd.grad(by_formula(model.head.weight), model.head.weight)

    model, inputs, q = model.to(dtype), inputs.detach().to(dtype), q.to(dtype)
    functions = {
        "cross_entropy": lambda z: F.cross_entropy(z, target, label_smoothing=smoothing),
        "soft targets": lambda z: F.cross_entropy(z, q),
        "log_softmax": lambda z: -(q * F.log_softmax(z, -1)).sum(-1).mean(),
        "explicit": lambda z: powergrad_cross_entropy(z, target, label_smoothing=smoothing, alpha=ALPHA),
    }
    if loss != "explicit":
        attach_powergrad(model, ALPHA)
    grads = torch.autograd.grad(functions[loss](model(inputs)), list(model.head.parameters()), create_graph=True)
    penalty(grads).backward()
    tolerance = 1e-12 if dtype is torch.float64 else 0.05
    torch.testing.assert_close(
        model.head.weight.grad.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item()
    )


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "functional_call"])
def test_torch_func_over_the_head_is_refused_with_the_function_that_works_there(transform):
    model, (inputs, target) = network(), data()
    inputs = inputs.detach()
    parameters = dict(model.named_parameters())
    attach_powergrad(model, ALPHA)

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    if transform == "functional_call":  # no transform: works
        loss(parameters, inputs, target).backward()
        return
    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    run = {
        "grad": lambda: torch.func.grad(loss)(detached, inputs, target),
        "vmap": lambda: torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
            detached, inputs[:, None], target[:, None]
        ),
        "jacrev": lambda: torch.func.jacrev(loss)(detached, inputs, target),
    }[transform]
    with pytest.raises(RuntimeError, match="powergrad_cross_entropy"):
        run()


# --- tracing and export leave the head alone


def test_a_traced_or_exported_model_is_plain_and_its_training_step_refused():
    model, (inputs, target) = network(), data()
    inputs = inputs.detach()
    attach_powergrad(model, ALPHA)
    with contextlib.suppress(DeprecationWarning):
        traced = torch.jit.trace(model, (inputs,))
    assert type(traced(inputs)) is torch.Tensor
    exported = torch.export.export(model, (inputs,)).module()
    assert type(exported(inputs)) is torch.Tensor
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=REFUSAL):
        train(traced, optimizer, inputs, target)
    assert not isinstance(model(inputs), StampedGradient)
