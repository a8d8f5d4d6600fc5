"""The optimizer factory: timm's optimizers, clipping, alpha in the groups, and how long the transform lives."""

import copy
import gc
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from reference import powergrad_gradient
from timm.optim import create_optimizer_v2
from torch import nn

from pgt_hf import PowerGradLogits, attach_powergrad, bind_powergrad, create_optimizer, list_optimizers

ALPHA = 0.25


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def batch():
    return torch.randn(8, 3, 8, 8), torch.randint(5, (8,))


def step(model, optimizer, inputs, target):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), target).backward()
    optimizer.step()


def step_by_hand(model, optimizer, inputs, target, alpha=ALPHA):
    optimizer.zero_grad()
    logits = model(inputs)
    logits.backward(powergrad_gradient(logits, target, alpha).to(logits.dtype))
    optimizer.step()


def assert_same(model, twin, **tolerance):
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 0, "atol": 1e-7}))


@pytest.mark.parametrize("name", [name for name in list_optimizers() if "bnb" not in name and "fused" not in name])
@torch.compiler.set_stance("force_eager")  # kron would compile its step, for a minute
def test_every_timm_optimizer_takes_the_steps_it_takes_on_the_formulas_gradient(name):
    torch.compiler.set_stance("force_eager")  # kron would compile its step, for a minute
    model, twin, (inputs, target) = network(), network(), batch()
    lr = 0.01
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = create_optimizer_v2(twin, name.removeprefix("powergrad_"), lr=lr, weight_decay=1e-4)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot build it here: {error}")
    optimizer = create_optimizer(model, name, lr=lr, alpha=ALPHA, weight_decay=1e-4)
    second_order = "hessian" in name  # needs create_graph
    for _ in range(2):
        for net, opt, fed in ((model, optimizer, None), (twin, plain, ALPHA)):
            opt.zero_grad()
            logits = net(inputs)
            if fed is None:
                F.cross_entropy(logits, target).backward(create_graph=second_order)
            else:
                gradient = (torch.softmax(fed * logits, -1) - F.one_hot(target, 5)) / 8
                logits.backward(gradient if second_order else gradient.detach(), create_graph=second_order)
            torch.manual_seed(1)  # adahessian and kron draw random numbers in their step
            opt.step()
    assert_same(model, twin, rtol=1e-3, atol=1e-5)


def test_lookahead_is_taken_too():
    model, twin, (inputs, target) = network(), network(), batch()
    optimizer = create_optimizer(model, "powergrad_lookahead_sgd", lr=0.1, alpha=ALPHA)
    plain = create_optimizer_v2(twin, "lookahead_sgd", lr=0.1)
    for _ in range(7):
        step(model, optimizer, inputs, target)
        step_by_hand(twin, plain, inputs, target)
    assert_same(model, twin)


def test_options_are_passed_on_to_timm():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    options = {"lr": 0.1, "weight_decay": 0.05, "layer_decay": 0.7}
    ours = create_optimizer(model, "powergrad_adamw", alpha=ALPHA, betas=(0.8, 0.9), **options)
    theirs = create_optimizer_v2(model, "adamw", betas=(0.8, 0.9), **options)
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert a.pop("powergrad_alpha") == ALPHA
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    groups = create_optimizer(network(), "powergrad_sgd", lr=0.1, weight_decay=1e-4, nesterov=False).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 1e-4] and not groups[0]["nesterov"]


@pytest.mark.parametrize(("mode", "value"), [("norm", 0.01), ("value", 0.001), ("agc", 0.01)])
def test_gradients_are_clipped_before_the_step_and_agc_leaves_the_head_alone(mode, value):
    model, twin, (inputs, target) = network(), network(), batch()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, clip_mode=mode, clip_value=value)
    plain = create_optimizer_v2(twin, "sgd", lr=0.1)
    logits = twin(inputs)
    logits.backward(powergrad_gradient(logits, target, ALPHA).float())
    before = [p.grad.clone() for p in twin.parameters()]
    clipped = list(twin[0].parameters()) if mode == "agc" else list(twin.parameters())
    timm.utils.dispatch_clip_grad(clipped, value, mode=mode)
    assert not torch.equal(before[0], twin[0].weight.grad)
    assert torch.equal(before[-2], twin[-1].weight.grad) == (mode == "agc")
    plain.step()
    step(model, optimizer, inputs, target)
    assert_same(model, twin)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**20])
def test_a_loss_scale_is_undone_before_clipping(fused, scale):
    """A fused optimizer unscales inside its step; the clipping hook must not see scaled gradients."""
    model, twin, (inputs, target) = network(), network(), batch()
    options = {"lr": 0.1, "alpha": ALPHA, "clip_mode": "norm", "clip_value": 0.01, "fused": fused}
    optimizer, plain = create_optimizer(model, **options), create_optimizer(twin, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(F.cross_entropy(model(inputs), target)).backward()
    scaler.step(optimizer)
    scaler.update()
    step(twin, plain, inputs, target)
    assert_same(model, twin)


def test_alpha_stands_in_the_groups_and_follows_them():
    model, (inputs, target) = network(), batch()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.0, alpha=ALPHA)
    for alpha in (0.5, 0.75):
        for group in optimizer.param_groups:
            group["powergrad_alpha"] = alpha
        step(model, optimizer, inputs, target)
        assert optimizer.powergrad.alpha == alpha
        expected = powergrad_gradient(model(inputs), target, alpha).sum(0).float()
        torch.testing.assert_close(model[-1].bias.grad, expected)
    optimizer.powergrad.alpha = 0.1
    step(model, optimizer, inputs, target)
    assert [group["powergrad_alpha"] for group in optimizer.param_groups] == [0.1] * len(optimizer.param_groups)


def test_the_state_dict_brings_alpha_back():
    model, (inputs, target) = network(), batch()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA)
    step(model, optimizer, inputs, target)
    state = copy.deepcopy(optimizer.state_dict())
    again = create_optimizer(network(), "powergrad_sgd", lr=0.1, alpha=0.9)
    again.load_state_dict(state)
    assert again.powergrad.alpha == ALPHA and again.param_groups[0]["powergrad_alpha"] == ALPHA


def test_it_round_trips_through_accelerate_save_state(tmp_path):
    inputs, target = batch()

    def build(alpha):
        accelerator = Accelerator(cpu=True)
        model = network()
        optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=alpha, momentum=0.9)
        return accelerator, *accelerator.prepare(model, optimizer)

    accelerator, model, optimizer = build(ALPHA)
    step(model, optimizer, inputs, target)
    accelerator.save_state(tmp_path)
    step(model, optimizer, inputs, target)
    accelerator, twin, resumed = build(0.9)
    accelerator.load_state(tmp_path)
    assert resumed.optimizer.powergrad.alpha == ALPHA
    step(twin, resumed, inputs, target)
    assert_same(model, twin, rtol=0, atol=0)


def test_the_transform_lives_as_long_as_its_optimizer():
    model, (inputs, _) = network(), batch()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA)
    assert isinstance(model(inputs), PowerGradLogits)
    del optimizer
    gc.collect()
    assert type(model(inputs)) is torch.Tensor


def test_a_second_optimizer_replaces_the_first_ones_transform():
    model, (inputs, _) = network(), batch()
    first = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA)
    second = create_optimizer(model, "powergrad_adamw", lr=0.1, alpha=0.5)
    assert model(inputs).alpha == 0.5 and first.powergrad.attached is False and second.powergrad.attached
    del first
    gc.collect()
    assert isinstance(model(inputs), PowerGradLogits)


def test_a_plain_optimizer_beside_a_living_one_is_refused():
    model, (inputs, target) = network(), batch()
    first = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA)
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="plain SGD steps on a model.*PGT"):
        step(model, second, inputs, target)
    first.powergrad.remove()
    step(model, second, inputs, target)


def test_a_copy_of_a_model_under_an_optimizer_is_plain():
    model, (inputs, _) = network(), batch()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA)
    assert type(copy.deepcopy(model)(inputs)) is torch.Tensor
    assert isinstance(model(inputs), PowerGradLogits) and optimizer.powergrad.attached


def test_any_optimizer_can_be_bound():
    model, twin, (inputs, target) = network(), network(), batch()
    optimizer = bind_powergrad(torch.optim.Adagrad(model.parameters(), lr=0.1), model, alpha=ALPHA)
    step(model, optimizer, inputs, target)
    step_by_hand(twin, torch.optim.Adagrad(twin.parameters(), lr=0.1), inputs, target)
    assert_same(model, twin)


def test_a_step_without_the_transform_is_refused():
    model = network()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="training without PGT"):
        optimizer.step()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("opt must be 'powergrad_'.*got 'sgd'", {"opt": "sgd"}),
        ("near: .*powergrad_adamw", {"opt": "powergrad_adamww"}),
        ("alpha", {"alpha": -1}),
        ("clip_mode must be one of norm, value, agc, got 'agcc'", {"clip_mode": "agcc", "clip_value": 1.0}),
        ("clip_value must be a number above 0", {"clip_mode": "agc"}),
        ("clip_value", {"clip_mode": "norm", "clip_value": -1.0}),
        ("clip_mode", {"clip_value": 1.0}),
        ("names no module", {"head": "nowhere"}),
    ],
)
def test_a_bad_option_is_named_and_leaves_the_model_plain(message, options):
    model = network()
    with pytest.raises(ValueError, match=message):
        create_optimizer(model, **{"opt": "powergrad_sgd", "lr": 0.1, **options})
    attach_powergrad(model, alpha=ALPHA).remove()


def test_a_hand_attached_model_is_refused():
    model = network()
    attach_powergrad(model, alpha=ALPHA)
    with pytest.raises(RuntimeError, match="already"):
        create_optimizer(model, "powergrad_sgd", lr=0.1)


def test_binding_an_optimizer_again_replaces_its_hooks():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        bind_powergrad(optimizer, model, alpha=0.5, clip_mode="norm", clip_value=1.0)
    assert len(optimizer._optimizer_step_pre_hooks) == 2  # one that looks after the groups, and the clipping
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("name", ["powergrad_sgd", "powergrad_momentum", "powergrad_rmsprop"])
def test_no_momentum_means_no_momentum(name):
    optimizer = create_optimizer(nn.Linear(4, 3), name, lr=0.1, momentum=0)
    assert all(group["momentum"] == 0 and not group.get("nesterov") for group in optimizer.param_groups)


@pytest.mark.parametrize("given", [lambda model: model.parameters(), lambda model: [{"params": [model.weight]}]])
def test_parameters_alone_are_refused_with_the_reason(given):
    with pytest.raises(TypeError, match="model's logits, so parameters are not enough.*bind_powergrad"):
        create_optimizer(given(nn.Linear(4, 3)), "powergrad_sgd", lr=0.1)


def test_wrappers_of_an_optimizer_can_be_bound_and_other_things_not():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = nn.Linear(4, 3)
    wrapper = bind_powergrad(Wrapper(torch.optim.SGD(model.parameters(), lr=0.1)), model, alpha=0.5)
    assert wrapper.powergrad.alpha == wrapper.optimizer.param_groups[0]["powergrad_alpha"] == 0.5
    with pytest.raises(TypeError, match="optimizer must be an Optimizer, got "):
        bind_powergrad(object(), nn.Linear(4, 3))


@pytest.mark.parametrize("alpha", [np.float64(0.5), np.float32(0.5), np.int64(1), torch.tensor(0.5)])
def test_numpy_scalars_and_tensors_of_one_number_are_numbers(alpha):
    assert attach_powergrad(nn.Linear(4, 3), alpha).alpha == float(alpha)
    assert (
        create_optimizer(nn.Linear(4, 3), "powergrad_sgd", lr=0.1, momentum=0.9, alpha=alpha).powergrad.alpha == alpha
    )


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.tensor(-1.0), torch.tensor(True), np.bool_(True)])
def test_a_bad_tensor_or_numpy_scalar_is_no_alpha(alpha):
    with pytest.raises((TypeError, ValueError), match="alpha must"):
        attach_powergrad(nn.Linear(4, 3), alpha)


@pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
def test_a_closure_computes_what_the_step_clips_and_uses(kind):
    model, (inputs, target) = nn.Linear(4, 3), (torch.randn(8, 4), torch.randint(3, (8,)))
    start = [parameter.detach().clone() for parameter in model.parameters()]
    if kind == "sgd":
        optimizer = create_optimizer(
            model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0, clip_mode="norm", clip_value=0.01
        )
    else:
        optimizer = bind_powergrad(torch.optim.LBFGS(model.parameters(), max_iter=4), model, alpha=ALPHA)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), target)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(model.parameters(), start, strict=True)])
    if kind == "sgd":
        assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    else:
        assert optimizer.powergrad.calls == 4 and moved.norm() > 0


def test_a_closure_without_pgt_is_refused():
    model = nn.Linear(4, 3).eval()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)

    def closure():
        loss = F.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,)))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="training without PGT"):
        optimizer.step(closure)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["step", "everything"])
def test_a_compiled_step_or_training_step_takes_the_eager_ones_steps(part):
    torch.manual_seed(0)
    eager = nn.Linear(4, 3)
    compiled = copy.deepcopy(eager)
    inputs, target = torch.randn(8, 4), torch.randint(3, (8,))
    for model in (eager, compiled):
        optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), target).backward()
            optimizer.step()

        if model is compiled and part == "everything":
            step = torch.compile(step, backend="aot_eager")
        elif model is compiled:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
        for alpha in (0.25, 0.5, 0.75):
            optimizer.param_groups[0]["powergrad_alpha"] = alpha
            step()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
