"""Plain Trainer by its ``optim`` string, and PowerGradTrainer: exact, resumable, and plain again afterwards."""

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from reference import powergrad_gradient
from tiny import ALPHA, LR, Data, arguments, weights, wrapper
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import pgt_hf
from pgt_hf import (
    AlphaScheduleCallback,
    PowerGradLogits,
    PowerGradTrainer,
    create_optimizer,
    fold_powergrad,
)


def assert_same(ours, theirs, atol=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_the_string_alone_makes_a_plain_trainer_train_with_the_formulas_gradient(tmp_path):
    model = wrapper()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Data(8))
    start = [p.detach().clone() for p in model.parameters()]
    batch = {"pixel_values": Data(8).images, "labels": Data(8).labels}
    logits = model.train()(pixel_values=batch["pixel_values"]).logits
    logits.backward(powergrad_gradient(logits, batch["labels"], ALPHA).float())
    expected = [s - LR * 1.9 * p.grad for s, p in zip(start, model.parameters(), strict=True)]  # first Nesterov step
    true_loss = F.cross_entropy(logits, batch["labels"]).item()
    model.zero_grad()
    trainer.args.max_steps = 1
    trainer.train()
    assert_same(weights(model), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(true_loss, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["powergrad_sgd", "powergrad_adamw"])
def test_both_trainers_and_a_bound_optimizer_take_the_same_trajectory(tmp_path, name):
    options = {"momentum": 0.9} if name == "powergrad_sgd" else {}
    given = ",".join(f"{key}={value}" for key, value in options.items())
    results = []
    for kind in ("plain", "ours", "own optimizer", "class"):
        model = wrapper()
        extra = {}
        if kind == "plain":
            args = arguments(tmp_path, optim=name, optim_args=f"alpha={ALPHA},{given}".rstrip(","))
        elif kind == "ours":
            args = arguments(tmp_path, ours=True, optim=name, optim_args=given or None)
        else:
            base = pgt_hf.create_optimizer(wrapper(), name, lr=LR, **options)
            accepted = inspect.signature(type(base)).parameters
            defaults = {k: v for k, v in base.defaults.items() if k in accepted}
            args = arguments(tmp_path, ours=True, optim="adamw_torch")
            if kind == "class":
                extra["optimizer_cls_and_kwargs"] = (type(base), defaults)
            else:
                extra["optimizers"] = (type(base)(model.parameters(), **defaults), None)
        trainer = (Trainer if kind == "plain" else PowerGradTrainer)(model, args, train_dataset=Data(), **extra)
        trainer.train()
        results.append(weights(model))
    for result in results[1:]:
        assert_same(results[0], result, atol=1e-5)  # Adam divides by what may differ in rounding


def test_our_trainer_logs_alpha_the_true_loss_and_the_logit_norm(tmp_path):
    model = wrapper()
    images, labels = Data(8).images, Data(8).labels
    logits = model.train()(pixel_values=images).logits.detach()
    trainer = PowerGradTrainer(model, arguments(tmp_path, ours=True, optim="sgd", max_steps=1), train_dataset=Data(8))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["powergrad_alpha"] == ALPHA
    assert log["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-4)
    assert log["logit_norm"] == pytest.approx(logits.norm(dim=1).mean().item(), abs=1e-3)
    assert type(model.train()(pixel_values=images).logits) is torch.Tensor


class Norms(PowerGradTrainer):
    """Keeps what was found of the gradient's norm at each step, and what it was."""

    def _get_grad_norm(self, model, grad_norm=None):
        found = super()._get_grad_norm(model, grad_norm)
        true = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        self.seen = [*getattr(self, "seen", []), (found, true)]
        return found


def test_gradient_norm_is_computed_where_it_is_logged_and_flops_are_those_of_trainer(tmp_path):
    args = arguments(tmp_path, ours=True, optim="sgd", max_steps=5, logging_steps=3, logging_first_step=True)
    trainer = Norms(wrapper(), args, train_dataset=Data())
    trainer.train()
    assert [found is not None for found, _ in trainer.seen] == [True, False, True, False, False]
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx([true.item() for found, true in trainer.seen if found is not None], rel=1e-5)
    for size in (8, 3):
        batch = {"pixel_values": Data(size).images}
        assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch) > 0


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_small_batches_equal_the_large_batch(tmp_path, ours, smoothing):
    """TimmWrapper takes **kwargs but does not normalise by num_items_in_batch; Trainer must divide."""
    results = []
    for batch_size, accumulation in ((16, 1), (8, 2)):
        model = wrapper()
        args = arguments(
            tmp_path, ours, optim="powergrad_sgd", optim_args=None if ours else f"alpha={ALPHA}", max_steps=1,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        (PowerGradTrainer if ours else Trainer)(model, args, train_dataset=Data(16)).train()
        results.append(weights(model))
    assert_same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, ours):
    kind = PowerGradTrainer if ours else Trainer

    def trainer(model, path, **options):
        args = arguments(path, ours, save_strategy="steps", save_steps=3, **options)
        return kind(model, args, train_dataset=Data())

    whole = wrapper()
    trainer(whole, tmp_path / "whole").train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                control.should_training_stop = control.should_save = True

    stopped = trainer(wrapper(), tmp_path / "stopped")
    stopped.add_callback(Stop())
    stopped.train()
    resumed = wrapper()
    again = trainer(resumed, tmp_path / "stopped")
    again.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)
    assert getattr(again.optimizer, "optimizer", again.optimizer).param_groups[0]["powergrad_alpha"] == ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
def test_a_resumed_run_uses_another_alpha_that_it_is_asked_for_and_says_so(tmp_path, ours):
    kind = PowerGradTrainer if ours else Trainer
    kind(
        wrapper(), arguments(tmp_path, ours, max_steps=2, save_strategy="steps", save_steps=2), train_dataset=Data()
    ).train()
    other = {"alpha": 0.9} if ours else {"optim_args": "alpha=0.9,momentum=0.9,nesterov=true"}
    seen = []

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen.append(getattr(optimizer, "optimizer", optimizer).powergrad.alpha)

    model = wrapper()
    resumed = kind(model, arguments(tmp_path, ours, max_steps=4, **other), train_dataset=Data(), callbacks=[See()])
    with pytest.warns(UserWarning, match=r"saved with alpha=0\.25.*continues with alpha=0\.9"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen == [0.9, 0.9]
    if ours:
        resumed.save_model(str(tmp_path / "saved"))
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["powergrad_alpha"] == 0.9


def test_the_last_alpha_and_its_schedule_are_what_config_json_says(tmp_path):
    schedule = AlphaScheduleCallback("linear", end_alpha=1.0)
    args = arguments(tmp_path, ours=True, max_steps=4)
    trainer = PowerGradTrainer(wrapper(), args, train_dataset=Data(), callbacks=[schedule])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["powergrad_alpha"] == ALPHA + (1 - ALPHA) * 3 / 4  # the fourth step's
    expected = {"shape": "linear", "first_alpha": ALPHA, "end_alpha": 1.0, "warmup_steps": 0}
    assert config["powergrad_schedule"] == expected


@pytest.mark.slow
def test_a_model_handed_to_a_plain_optimizer_is_plain_again(tmp_path):
    model = wrapper()
    first = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=Data())
    first.train()
    assert isinstance(model.train()(pixel_values=torch.randn(2, 3, 32, 32)).logits, PowerGradLogits)
    second = Trainer(model, arguments(tmp_path, optim="sgd", optim_args=None, max_steps=1), train_dataset=Data())
    second.train()
    assert type(model.train()(pixel_values=torch.randn(2, 3, 32, 32)).logits) is torch.Tensor
    third = Trainer(model, arguments(tmp_path, optim_args="alpha=0.5", max_steps=1), train_dataset=Data())
    third.train()
    assert model.train()(pixel_values=torch.randn(2, 3, 32, 32)).logits.alpha == 0.5


@pytest.mark.slow
def test_our_trainer_can_train_twice(tmp_path):
    trainer = PowerGradTrainer(
        wrapper(), arguments(tmp_path, ours=True, optim="sgd", max_steps=1), train_dataset=Data()
    )
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.state.log_history[-2]["powergrad_alpha"] == ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "torch_compile"])
def test_it_trains_under_bf16_and_compilation(tmp_path, precision):
    options = {precision: True} | ({"torch_compile_backend": "aot_eager"} if precision == "torch_compile" else {})
    reference, model = wrapper(), wrapper()
    Trainer(reference, arguments(tmp_path, max_steps=2), train_dataset=Data()).train()
    Trainer(model, arguments(tmp_path, max_steps=2, **options), train_dataset=Data()).train()
    assert_same(weights(model), weights(reference), atol=2e-2 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("name", ["powergrad_sgd", "powergrad_adamw", "powergrad_lion", "sgd"])
def test_the_command_line_knows_the_names(tmp_path, name):
    args = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", name]
    )
    assert args[0].optim == name
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--optim", "powergrad_nothing"])


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("alpha=0.25,momentun=0.9", "no option 'momentun'"),
        ("alpha=0.25,momentum", "'momentum'"),
        ("alpha=0.25,momentum=", "'momentum='"),
        ("alpha=abc", r"alpha must be a number in \[0, 1\], got 'abc'"),
        ("alpha=-1", r"alpha must be a number in \[0, 1\], got -1"),
        ("nesterov=0.5", "nesterov must be true or false, got 0.5"),
        ("alpha=0.1,alpha=0.2", "'alpha' twice"),
        ("clip_mode=agc", "clip_value"),
    ],
)
def test_bad_optim_args_name_their_key(tmp_path, optim_args, message):
    with pytest.raises(ValueError, match=message):
        Trainer(wrapper(), arguments(tmp_path, optim_args=optim_args), train_dataset=Data()).train()


def test_trainers_own_flags_reach_the_optimizer(tmp_path):
    args = arguments(
        tmp_path,
        optim="powergrad_adamw",
        adam_beta2=0.98,
        weight_decay=0.1,
        optim_args="clip_mode=agc,clip_value=0.01",
    )
    optimizer = Trainer(wrapper(), args, train_dataset=Data()).create_optimizer()
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert optimizer.param_groups[0]["powergrad_alpha"] == pgt_hf.optim.DEFAULT_ALPHA


@pytest.mark.parametrize("options", [{"alpha": -1}, {"alpha": float("nan")}, {"clip_mode": "agc"}])
def test_bad_arguments_are_refused_before_anything_is_built(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        arguments(tmp_path / "out", ours=True, **options)
    assert not (tmp_path / "out").exists()


def test_an_alpha_given_twice_and_foreign_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="optim_args must leave out alpha"):
        arguments(tmp_path, ours=True, optim="powergrad_sgd", optim_args="alpha=0.5", alpha=0.3)
    with pytest.raises(TypeError, match="PowerGradTrainingArguments"):
        PowerGradTrainer(wrapper(), TrainingArguments(str(tmp_path)), train_dataset=Data())


def test_the_constructor_takes_what_trainers_takes():
    ours, theirs = (inspect.signature(kind).parameters for kind in (PowerGradTrainer, Trainer))
    assert list(ours) == list(theirs)
    assert {name: each.kind for name, each in ours.items()} == {name: each.kind for name, each in theirs.items()}


def test_the_factory_is_what_the_string_names(tmp_path):
    optimizer = create_optimizer(wrapper(), "powergrad_sgd", lr=LR, alpha=ALPHA)
    theirs = Trainer(
        wrapper(), arguments(tmp_path, optim_args=f"alpha={ALPHA}"), train_dataset=Data()
    ).create_optimizer()
    assert optimizer.defaults == theirs.defaults


def test_saved_config_says_which_alpha_trained_the_model_and_whether_it_is_folded(tmp_path):
    trainer = PowerGradTrainer(wrapper(), arguments(tmp_path, ours=True, alpha=0.5, max_steps=1), train_dataset=Data())
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["powergrad_alpha"], config["powergrad_folded"]) == (0.5, False)
    assert fold_powergrad(trainer.model, 0.5).config.powergrad_folded


@pytest.mark.slow
@pytest.mark.parametrize("ours", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_compiled_trainer_takes_the_eager_ones_steps_while_alpha_moves(tmp_path, ours):
    class Move(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["powergrad_alpha"] = 0.25 + 0.2 * state.global_step

    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        args = arguments(tmp_path, ours, optim="powergrad_sgd", max_steps=4, **options)
        model = wrapper()
        kind = PowerGradTrainer if ours else Trainer
        trainer = kind(model, args, train_dataset=Data(), callbacks=[Move()])
        trainer.train()
        assert getattr(trainer.optimizer, "optimizer", trainer.optimizer).powergrad.calls == 4
        results.append(weights(model))
    assert_same(*results)


def test_a_tuple_among_optim_args_is_one_value(tmp_path):
    args = arguments(tmp_path, optim="powergrad_adamw", optim_args="alpha=0.5,betas=(0.8,0.95)", max_steps=1)
    trainer = Trainer(wrapper(), args, train_dataset=Data())
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    assert tuple(group["betas"]) == (0.8, 0.95) and group["powergrad_alpha"] == 0.5


def test_a_model_without_a_config_is_trained(tmp_path):
    class Plain(torch.nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3 * 32 * 32, 4)

        def forward(self, pixel_values, labels=None):
            logits = self.head(pixel_values.flatten(1))
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    args = arguments(tmp_path, ours=True, max_steps=1, powergrad_head="head")
    trainer = PowerGradTrainer(Plain(), args, train_dataset=Data())
    trainer.train()
    assert trainer._handle.calls == 1


def test_alpha_that_was_given_is_not_taken_for_the_default(tmp_path):
    default = pgt_hf.PowerGradTrainingArguments(str(tmp_path), report_to="none")
    assert default.alpha == 0.25 and not default.alpha_given
    assert arguments(tmp_path, ours=True, alpha=0.25).alpha_given
