"""The numbers against formulas written out, the callbacks in real Trainer runs."""

import json
import logging
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from launch import TWO, run
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments, attach_powergrad
from pgt_hf.analysis import (
    CURVE_ALPHAS,
    History,
    filter_norms,
    gradient_cosine,
    gradient_norms,
    lemma_threshold,
    log_power_sum,
    logit_statistics,
    normalization_statistics,
    normalized_layers,
    probability_histograms,
    recover_target,
    turned_angle,
    zeroed_filters,
)
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback

SMALL = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=6)


def images(count: int = 64) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 6} for i in range(count)]


def arguments(folder, **options):
    defaults = {"alpha": 0.25, "optim": "powergrad_sgd", "learning_rate": 0.05, "max_steps": 6, "logging_steps": 2}
    defaults |= {"per_device_train_batch_size": 16, "report_to": "none", "save_strategy": "no", "max_grad_norm": 0}
    return PowerGradTrainingArguments(folder, **defaults | {"disable_tqdm": True} | options)


def test_logit_statistics_are_the_papers_four():
    z = torch.tensor([[1.0, -2.0, 4.0], [0.0, -3.0, -1.0]])
    found = {name: value.item() for name, value in logit_statistics(z).items()}
    assert found == pytest.approx(
        {
            "logit_norm": (21**0.5 + 10**0.5) / 2,
            "logit_abs_mean": (1 + 4 / 3) / 2,
            "logit_abs_max": (4 + 0) / 2,
            "logit_variance": (6 + 14 / 9) / 2,
        }
    )


def test_filter_and_gradient_norms_name_every_layer_and_zeroed_filters_are_counted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] = 1e-6
        model[2].weight[:] = 2
    norms = filter_norms(model)
    assert {name: tuple(value.shape) for name, value in norms.items()} == {"0": (4,), "2": (2,)}
    assert norms["2"].tolist() == [8, 8]
    assert zeroed_filters(norms.values()) == 2
    assert gradient_norms(model) == {}
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    assert gradient_norms(model)["0"] == model[0].weight.grad.norm()


def test_normalised_layers_are_those_whose_scale_the_output_does_not_feel():
    model = timm.create_model("test_resnet", num_classes=4)
    pairs = normalized_layers(model)
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(pairs) == convolutions and len({id(norm) for _, norm in pairs.values()}) == len(pairs)
    x = torch.randn(8, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        for factor, (layer, _) in enumerate(pairs.values(), start=2):
            layer.weight.mul_(factor)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)], ["0"]),
        ([nn.Linear(3, 8), nn.ReLU(), nn.GroupNorm(2, 8)], ["0"]),
        ([nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)], []),
        ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4)], []),
        ([nn.Linear(3, 8), nn.LayerNorm(8)], []),
    ],
)
def test_a_norm_belongs_to_the_layer_before_it_with_as_many_outputs(layers, found):
    assert list(normalized_layers(nn.Sequential(*layers))) == found


def test_normalisation_statistics_are_those_of_each_layer_and_its_own_learning_rate():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([3.0, 4.0]).view(2, 1, 1, 1)
        model[1].weight[:] = torch.tensor([-1.0, 2.0])
        model[1].bias[:] = torch.tensor([-1.0, 2.0])
        model[2].weight[:] = 1
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.4}]
    found = normalization_statistics(model, torch.optim.SGD(groups, lr=0.5))
    expected = {"weight_norm/0": 5, "effective_lr/0": 0.02, "norm_scale/0": 1.5, "norm_bias/0": 0.5}
    expected |= {"weight_norm/2": 2, "effective_lr/2": 0.1}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    assert list(normalization_statistics(model, torch.optim.SGD(model[2].parameters(), lr=0.5))) == [
        "weight_norm/2",
        "effective_lr/2",
    ]


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 1.0, 3.0, math.pi])
def test_angle_between_weights_is_exact_however_small(angle):
    first = torch.tensor([[5.0, 0.0]])
    second = torch.tensor([[math.cos(angle), math.sin(angle)]])
    assert turned_angle(first, second).item() == pytest.approx(angle, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.25, 1.0])
@pytest.mark.parametrize("target", ["labels", "mixture", "smoothed"])
def test_target_and_cosine_come_back_out_of_a_gradient_of_any_scale(alpha, target):
    generator = torch.Generator().manual_seed(0)
    z = 5 * torch.randn(32, 100, generator=generator)
    q = torch.eye(100)[torch.arange(32)]
    if target == "mixture":
        q = 0.7 * q + 0.3 * q.roll(5, 0)
    if target == "smoothed":
        q = 0.9 * q + 0.1 / 100
    z.requires_grad_()
    with attach_powergrad(model := nn.Identity(), alpha=alpha):
        F.cross_entropy(model(z * 1), q).mul(1024).backward()
    found, rows = recover_target(z.detach(), z.grad, alpha, 0.1 if target == "smoothed" else 0.0)
    assert rows.all()
    torch.testing.assert_close(found, q, rtol=0, atol=1e-5)
    ours, plain = (s * z.detach().double() for s in (alpha, 1))
    expected = F.cosine_similarity(ours.softmax(-1) - q, plain.softmax(-1) - q).float()
    torch.testing.assert_close(gradient_cosine(z.detach(), found, alpha), expected, rtol=0, atol=1e-3)


def test_rows_without_a_gradient_have_no_target():
    z = torch.randn(4, 5, requires_grad=True)
    F.cross_entropy(z, torch.tensor([1, -100, 3, -100])).backward()
    target, rows = recover_target(z.detach(), z.grad, 1.0)
    assert rows.tolist() == [True, False, True, False]
    assert target.argmax(dim=1).tolist() == [1, 3]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9])
def test_lemma_1_pgt_raises_probabilities_below_the_threshold_and_lowers_those_above(alpha):
    z = 3 * torch.randn(1, 50, dtype=torch.float64)
    p, powered = z.softmax(-1), (alpha * z).softmax(-1)
    t = lemma_threshold(log_power_sum(z, alpha).exp(), alpha).double()
    assert torch.equal(powered >= p, p <= t)
    if alpha == 0:
        assert t.item() == pytest.approx(1 / 50)


def test_histograms_count_every_probability_once():
    z, q = 4 * torch.randn(30, 8), torch.eye(8)[torch.arange(30) % 8]
    found = probability_histograms(z, q, 0.25)
    assert found["target_histogram"].sum(dim=1).tolist() == [30, 30]
    assert found["class_histogram"].sum(dim=1).tolist() == [240, 240]
    p = (z.softmax(-1) * q).sum(-1).numpy()
    assert found["target_histogram"][0].tolist() == np.histogram(p, 20, (0, 1))[0].tolist()


def test_history_stays_small_and_covers_the_whole_run(tmp_path):
    history = History(capacity=16)
    for step in range(0, 10_000, 10):
        history.add(step, {"value": step / 10})
    history.save(tmp_path / "h.npz")
    steps = History.read(tmp_path / "h.npz")["step"]
    assert 8 <= len(steps) < 16
    assert steps[0] == 0 and steps[-1] > 8700
    assert len(set(np.diff(steps))) == 1


def test_history_resumed_at_a_step_goes_on_as_if_it_had_never_stopped(tmp_path):
    straight, first, second = (History(capacity=8) for _ in range(3))
    for step in range(40):
        straight.add(step, {"value": step})
        first.add(step, {"value": step}) if step < 25 else None
    first.save(tmp_path / "h.npz")
    second.resume(tmp_path / "h.npz", 20)
    for step in range(20, 40):
        second.add(step, {"value": step})
    assert [int(s["step"]) for s in second.snapshots] == [int(s["step"]) for s in straight.snapshots]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run with the callback: its folder, its log, the model's first logits and gradients recomputed by hand."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = ResNetForImageClassification(SMALL)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    callback = DiagnosticsCallback(interval=2)
    trainer = PowerGradTrainer(model, arguments(folder), train_dataset=images(), callbacks=[callback])
    trainer.train()
    return folder, trainer.state.log_history, start, model


def test_run_leaves_a_file_with_every_quantity_at_every_interval(recorded):
    found = History.read(recorded[0] / "diagnostics.npz")
    assert found["step"].tolist() == [0, 2, 4]
    scalars = {"logit_norm", "logit_abs_mean", "logit_abs_max", "logit_variance", "feature_norm", "zeroed_filters"}
    assert scalars | {"gradient_cosine", "logit_gradient_norm", "alpha"} <= set(found)
    assert all(np.isfinite(column).all() for column in found.values())
    assert found["filter/classifier.1"].shape == (3, 6)
    assert found["gradient/classifier.1"].shape == (3,)
    assert found["curve_power_sums"].shape == (3, len(CURVE_ALPHAS) + 1)
    assert found["target_histogram"].shape == (3, 2, 20)
    assert found["target_histogram"].sum(axis=2).tolist() == [[16, 16]] * 3
    assert found["alpha"].tolist() == [0.25] * 3


def test_recorded_filters_are_those_of_the_model_at_that_step(recorded):
    folder, _, start, _ = recorded
    found = History.read(folder / "diagnostics.npz")
    weight = start["classifier.1.weight"]
    np.testing.assert_allclose(found["filter/classifier.1"][0], weight.norm(dim=1), rtol=1e-3)


def test_recorded_cosine_and_gradient_are_those_of_the_step_done_by_hand(tmp_path):
    torch.manual_seed(0)
    model = ResNetForImageClassification(SMALL)
    copy = ResNetForImageClassification(SMALL)
    copy.load_state_dict(model.state_dict())
    callback, data = DiagnosticsCallback(interval=1), images(16)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=16)
    PowerGradTrainer(model, args, train_dataset=data, callbacks=[callback]).train()
    found = History.read(tmp_path / "diagnostics.npz")

    labels = torch.tensor([image["labels"] for image in data])
    logits = copy.train()(torch.stack([image["pixel_values"] for image in data])).logits
    q = F.one_hot(labels, 6).float()
    ours, plain = ((s * logits).softmax(-1) - q for s in (0.25, 1))
    logits.backward(ours.detach() / 16)
    assert found["gradient_cosine"][0] == pytest.approx(F.cosine_similarity(ours, plain).mean().item(), abs=1e-4)
    assert found["logit_gradient_norm"][0] == pytest.approx(ours.norm().item() / 16, rel=1e-4)
    expected = copy.resnet.embedder.embedder.convolution.weight.grad.norm().item()
    assert found["gradient/resnet.embedder.embedder.convolution"][0] == pytest.approx(expected, rel=1e-3)


def test_recorded_step_is_the_one_that_the_optimizer_took(tmp_path):
    torch.manual_seed(0)
    model = ResNetForImageClassification(SMALL)
    start = {name: layer.weight.detach().clone() for name, (layer, _) in normalized_layers(model).items()}
    args = arguments(tmp_path, max_steps=1, lr_scheduler_type="constant")
    PowerGradTrainer(model, args, train_dataset=images(), callbacks=[DiagnosticsCallback(interval=1)]).train()
    found = History.read(tmp_path / "diagnostics.npz")
    assert len(start) == 8  # every convolution
    for name, (layer, norm) in normalized_layers(model).items():
        cosine = F.cosine_similarity(start[name].double().flatten(), layer.weight.double().flatten(), dim=0)
        assert 0 < found[f"angle/{name}"][0] == pytest.approx(cosine.acos().item(), rel=1e-3)
        assert found[f"weight_norm/{name}"][0] == pytest.approx(start[name].norm().item(), rel=1e-5)
        assert found[f"effective_lr/{name}"][0] == pytest.approx(0.05 / start[name].norm().item() ** 2, rel=1e-5)
        assert (found[f"norm_scale/{name}"][0], found[f"norm_bias/{name}"][0]) == (1, 0)
        assert not torch.equal(norm.weight, torch.ones_like(norm.weight))  # recorded before the step


def test_powergrad_trainer_sends_the_scalars_to_its_log(recorded):
    entry = next(entry for entry in recorded[1] if "loss" in entry)
    assert {"gradient_cosine", "feature_norm", "zeroed_filters", "logit_variance"} <= set(entry)
    assert 0 < entry["gradient_cosine"] <= 1


def test_model_carries_no_hooks_after_training(recorded):
    model = recorded[3]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_plain_training_has_a_cosine_of_one_and_works_with_a_plain_trainer(tmp_path):
    args = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=16,
        report_to="none",
        save_strategy="no",
        label_smoothing_factor=0.1,
    )
    model = ResNetForImageClassification(SMALL)
    Trainer(model, args, train_dataset=images(), callbacks=[DiagnosticsCallback(interval=1)]).train()
    found = History.read(tmp_path / "diagnostics.npz")
    assert found["alpha"].tolist() == [1, 1]
    np.testing.assert_allclose(found["gradient_cosine"], 1, atol=1e-5)


@pytest.mark.slow
def test_training_with_the_callbacks_gives_the_very_same_weights(tmp_path):
    finals = []
    for callbacks in ([], [DiagnosticsCallback(interval=1), DivergenceCallback(interval=1)]):
        torch.manual_seed(0)
        model = ResNetForImageClassification(SMALL)
        PowerGradTrainer(model, arguments(tmp_path), train_dataset=images(), callbacks=callbacks).train()
        finals.append(model.state_dict())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.slow
def test_resumed_run_goes_on_with_the_same_file(tmp_path):
    for resume, steps in ((False, 4), (True, 8)):
        torch.manual_seed(0)
        model = ResNetForImageClassification(SMALL)
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=4)
        trainer = PowerGradTrainer(model, args, train_dataset=images(), callbacks=[DiagnosticsCallback(interval=2)])
        trainer.train(resume_from_checkpoint=resume)
    assert History.read(tmp_path / "diagnostics.npz")["step"].tolist() == [0, 2, 4, 6]


def test_sound_run_is_left_alone(tmp_path):
    guard = DivergenceCallback(interval=1)
    trainer = PowerGradTrainer(
        ResNetForImageClassification(SMALL),
        arguments(tmp_path, max_steps=12),
        train_dataset=images(),
        callbacks=[guard],
    )
    trainer.train()
    assert trainer.state.global_step == 12
    assert (guard.verdict, guard.skipped) == (None, 0)


@pytest.mark.parametrize("learning_rate", [100.0, 1e6])
def test_diverging_run_stops_within_steps_with_advice(learning_rate, tmp_path, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model

        def forward(self, pixel_values, labels=None):
            logits = self.network(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    guard = DivergenceCallback(interval=2, head="network")
    args = arguments(
        tmp_path, max_steps=300, learning_rate=learning_rate, logging_steps=100, powergrad_head="network", alpha=0.1
    )
    trainer = PowerGradTrainer(Wrapped(), args, train_dataset=images(), callbacks=[guard])
    with caplog.at_level(logging.ERROR, logger="pgt_hf"):
        trainer.train()
    assert guard.verdict == "divergence"
    assert trainer.state.global_step <= 12
    for advice in ("lower learning rate", "clip_mode='agc'", "larger alpha (it is 0.1)"):
        assert advice in guard.message
    assert guard.message in caplog.text
    assert [entry["verdict"] for entry in trainer.state.log_history if "verdict" in entry] == ["divergence"]


def fp16_steps(scale: float, gradients: list[float], guard: DivergenceCallback, args):
    """Steps under a real gradient scaler, whose callbacks are called as Trainer calls them."""
    Accelerator(cpu=True)
    model = nn.Linear(4, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), scaler=scaler)
    state, control, logs = TrainerState(), TrainerControl(), {"model": model, "optimizer": optimizer}
    guard.on_train_begin(args, state, control, **logs)
    for gradient in gradients:
        guard.on_step_begin(args, state, control, **logs)
        scaler.scale(F.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 1]))).backward()
        if not math.isfinite(gradient):
            model.weight.grad[0, 0] = gradient
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        guard.on_step_end(args, state, control, **logs)
        if control.should_training_stop:
            break
    return state


def test_fp16_overflow_that_the_scaler_answers_is_no_divergence(tmp_path):
    guard = DivergenceCallback(interval=1, max_skipped=5)
    state = fp16_steps(65536.0, [math.inf] * 3 + [1.0] * 4 + [math.inf] * 4 + [1.0], guard, arguments(tmp_path))
    assert (guard.verdict, guard.skipped, state.global_step) == (None, 7, 12)


def test_fp16_overflow_without_end_stops_the_run_with_advice_of_its_own(tmp_path):
    guard = DivergenceCallback(interval=1, max_skipped=5)
    state = fp16_steps(65536.0, [math.inf] * 20, guard, arguments(tmp_path))
    assert (guard.verdict, state.global_step) == ("overflow", 5)
    assert "bf16=True" in guard.message and "larger alpha" not in guard.message


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ([{"loss": math.nan}], "loss is nan"),
        ([{"logit_norm": math.inf}], "logit_norm is inf"),
        ([{"grad_norm": 1.0}] * 5 + [{"grad_norm": 5000.0}], "the gradient norm is 5e+03, 5e+03 times its median"),
    ],
)
def test_what_is_logged_can_tell_a_divergence_too(logs, message, tmp_path):
    guard, state, control = DivergenceCallback(), TrainerState(), TrainerControl()
    guard.on_train_begin(arguments(tmp_path), state, control, model=nn.Linear(4, 3))
    for entry in logs:
        assert not control.should_training_stop
        guard.on_log(arguments(tmp_path), state, control, logs=entry)
    assert control.should_training_stop
    assert message in guard.message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiagnosticsCallback(interval=0), "interval must be a whole number of at least 1, got 0"),
        (lambda: History(capacity=1), "capacity must be a whole number of at least 2, got 1"),
        (lambda: DivergenceCallback(factor=1), "factor must be a number above 1, got 1"),
        (lambda: DivergenceCallback(max_skipped=0), "max_skipped must be a whole number of at least 1, got 0"),
        (lambda: lemma_threshold(2.0, 1), "alpha must not be 1"),
    ],
)
def test_setting_that_is_not_allowed_is_an_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TWO_PROCESSES = """
import json, sys
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback

args = PowerGradTrainingArguments(
    "out", optim="powergrad_sgd", learning_rate=0.01, max_steps=20, per_device_train_batch_size=4, report_to="none",
    save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
)
images = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 6} for i in range(40)]
images[21]["pixel_values"][0, 0, 0] = float("inf")  # the third step of the process with number 1
model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=6))
guard = DivergenceCallback(interval=1)
trainer = PowerGradTrainer(model, args, train_dataset=images, callbacks=[guard, DiagnosticsCallback(interval=1)])
trainer.train()
with open(f"rank{args.process_index}.json", "w") as file:
    json.dump({"step": trainer.state.global_step, "message": guard.message}, file)
trainer.end()
"""


@pytest.mark.slow
def test_all_processes_stop_at_the_step_at_which_one_of_them_is_lost(tmp_path):
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    run(*TWO, "program.py", cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["step"] == second["step"] == 3
    assert "another process is in trouble" in first["message"]
    assert "the logits are not finite" in second["message"]
    assert History.read(tmp_path / "out" / "diagnostics.npz")["step"].tolist() == [0, 1, 2]
