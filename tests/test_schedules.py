"""alpha on a schedule: the plain scheduler, and the callback in both Trainers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from reference import powergrad_gradient
from tiny import Data, arguments, weights, wrapper
from torch import nn
from transformers import Trainer, TrainerCallback

from pgt_hf import AlphaScheduleCallback, AlphaScheduler, PowerGradTrainer, create_optimizer
from pgt_hf.schedules import steps

ALPHA = 0.2


def build(alpha=ALPHA):
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    return model, create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=alpha, momentum=0.9)


def train(model, optimizer, scheduler, n):
    alphas = []
    for _ in range(n):
        alphas.append(optimizer.powergrad.alpha)
        generator = torch.Generator().manual_seed(scheduler.last_epoch)
        inputs, target = torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        scheduler.step()
    return alphas


@pytest.mark.parametrize(
    ("shape", "formula"),
    [
        ("constant", lambda t: ALPHA),
        ("linear", lambda t: ALPHA + (0.9 - ALPHA) * t),
        ("cosine", lambda t: ALPHA + (0.9 - ALPHA) * (1 - math.cos(math.pi * t)) / 2),
        ("step", lambda t: ALPHA + (0.9 - ALPHA) * sum(t >= m for m in (0.3, 0.6, 0.9)) / 3),
        (steps(0.5), lambda t: ALPHA if t < 0.5 else 0.9),
        (lambda progress: progress**2, lambda t: ALPHA + (0.9 - ALPHA) * t**2),
    ],
)
def test_alpha_follows_its_formula_and_rests_after_the_end(shape, formula):
    model, optimizer = build()
    scheduler = AlphaScheduler(optimizer, total_steps=20, shape=shape, end_alpha=0.9)
    expected = [formula(min(step / 20, 1.0)) for step in range(24)]
    assert train(model, optimizer, scheduler, 24) == pytest.approx(expected, abs=1e-12)


def test_warm_up_goes_from_plain_training_to_alpha_and_the_shape_takes_the_rest():
    model, optimizer = build()
    scheduler = AlphaScheduler(optimizer, total_steps=8, shape="linear", end_alpha=0.6, warmup_steps=4)
    expected = [1.0, 0.8, 0.6, 0.4, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert train(model, optimizer, scheduler, 9) == pytest.approx(expected)


def test_the_gradient_is_that_of_the_scheduled_alpha():
    model, optimizer = build()
    scheduler = AlphaScheduler(optimizer, total_steps=2, shape="linear", end_alpha=0.8)
    scheduler.step()
    inputs, target = torch.randn(8, 6), torch.randint(4, (8,))
    logits = model(inputs)
    F.cross_entropy(logits, target).backward()
    expected = powergrad_gradient(logits, target, alpha=0.5).float().T @ inputs
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.slow
def test_a_compiled_forward_pass_sees_the_alpha_of_its_own_step():
    model, optimizer = build()
    compiled = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend="aot_eager", fullgraph=True)
    scheduler = AlphaScheduler(optimizer, total_steps=4, shape="linear")
    inputs, target = torch.randn(8, 6), torch.randint(4, (8,))
    for _ in range(4):
        optimizer.zero_grad()
        compiled(inputs, target).backward()
        with torch.no_grad():
            logits = model(inputs)
        expected = powergrad_gradient(logits, target, alpha=scheduler.get_last_alpha()).float().T @ inputs
        torch.testing.assert_close(model.weight.grad, expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("shape", ["cosine", steps(0.4, 0.8)])
def test_a_run_that_goes_on_from_its_state_dicts_is_the_run_that_never_stopped(shape):
    def schedule(optimizer):
        return AlphaScheduler(optimizer, total_steps=10, shape=shape, warmup_steps=3)

    model, optimizer = build()
    whole = train(model, optimizer, schedule(optimizer), 10)

    first, first_optimizer = build()
    scheduler = schedule(first_optimizer)
    begun = train(first, first_optimizer, scheduler, 6)
    saved = copy.deepcopy((first.state_dict(), first_optimizer.state_dict(), scheduler.state_dict()))

    again, again_optimizer = build(alpha=0.7)  # what was saved wins
    scheduler = schedule(again_optimizer)
    for part, state in zip((again, again_optimizer, scheduler), saved, strict=True):
        part.load_state_dict(state)
    assert begun + train(again, again_optimizer, scheduler, 4) == whole
    assert torch.equal(again.weight, model.weight)


def test_last_epoch_goes_on_from_an_optimizers_state_alone():
    model, optimizer = build()
    scheduler = AlphaScheduler(optimizer, total_steps=10)
    train(model, optimizer, scheduler, 4)
    again_model, again = build(alpha=0.7)
    again.load_state_dict(optimizer.state_dict())
    assert AlphaScheduler(again, total_steps=10, last_epoch=3).get_last_alpha() == scheduler.get_last_alpha()


def test_it_works_on_what_accelerate_wraps_and_in_its_checkpoints(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*build())
    scheduler = AlphaScheduler(optimizer, total_steps=10, shape="linear")
    accelerator.register_for_checkpointing(scheduler)
    for _ in range(5):
        scheduler.step()
    accelerator.save_state(str(tmp_path))
    scheduler.step()
    accelerator.load_state(str(tmp_path))
    assert scheduler.get_last_alpha() == optimizer.optimizer.powergrad.alpha == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "linaer"}, "shape must be one of constant, linear, cosine, step or a function, got 'linaer'"),
        ({"total_steps": 0}, "total_steps must be a whole number of at least 1, got 0"),
        ({"end_alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, got -1"),
        ({"warmup_steps": 11}, "warmup_steps must not be above total_steps=10, got 11"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaScheduler(build()[1], **{"total_steps": 10} | options)


@pytest.mark.parametrize("milestones", [(), (0.5, 0.5), (0.6, 0.3), (0.0,), (0.5, 1.0)])
def test_milestones_must_rise_between_0_and_1(milestones):
    with pytest.raises(ValueError, match="milestones must "):
        steps(*milestones)


def test_an_optimizer_without_alpha_is_refused_by_name():
    with pytest.raises(ValueError, match=r"optimizer must be one that trains with PGT, got a SGD.*bind_powergrad"):
        AlphaScheduler(torch.optim.SGD(nn.Linear(2, 2).parameters()), total_steps=10)


def make_trainer(path, ours, **options):
    args = arguments(path, ours, save_strategy="steps", save_steps=5, **options)
    schedule = AlphaScheduleCallback("cosine", end_alpha=0.9, warmup_steps=0.25)
    return (PowerGradTrainer if ours else Trainer)(wrapper(), args, train_dataset=Data(), callbacks=[schedule])


def logged(trainer, key="powergrad_alpha"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            control.should_training_stop = control.should_save = True


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
def test_in_a_trainer_a_resumed_run_has_the_very_same_alphas_and_weights(tmp_path, ours):
    whole = make_trainer(tmp_path / "whole", ours)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", ours)
    stopped.add_callback(Stop())
    stopped.train()
    resumed = make_trainer(tmp_path / "stopped", ours)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-5"))
    for a, b in zip(weights(whole.model), weights(resumed.model), strict=True):
        assert torch.equal(a, b)
    if ours:  # 8 steps: 2 of warm-up from 1 to 0.25, then 6 of cosine to 0.9, each alpha beside its own step's loss
        cosine = [0.25 + 0.65 * (1 - math.cos(math.pi * step / 6)) / 2 for step in range(6)]
        assert logged(whole) == pytest.approx([1.0, 0.625, *cosine])
        assert logged(resumed) == logged(whole)


@pytest.mark.slow
def test_a_second_training_begins_with_the_first_alpha_again(tmp_path):
    args = arguments(tmp_path, ours=True, max_steps=4)
    callback = AlphaScheduleCallback("linear")
    trainer = PowerGradTrainer(wrapper(), args, train_dataset=Data(), callbacks=[callback])
    trainer.train()
    first = logged(trainer)
    trainer.train()
    assert logged(trainer) == first == pytest.approx([0.25, 0.4375, 0.625, 0.8125])


def test_accumulated_batches_share_one_alpha(tmp_path):
    args = arguments(tmp_path, ours=True, gradient_accumulation_steps=2, num_train_epochs=1)
    trainer = PowerGradTrainer(wrapper(), args, train_dataset=Data(), callbacks=[AlphaScheduleCallback("linear")])
    trainer.train()
    assert logged(trainer) == pytest.approx([0.25, 0.625])


@pytest.mark.parametrize("options", [{"shape": "up"}, {"end_alpha": float("nan")}, {"warmup_steps": 2.5}])
def test_the_callback_refuses_bad_arguments_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options)).removeprefix("end_")):
        AlphaScheduleCallback(**options)
