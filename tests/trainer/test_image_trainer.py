"""ImageTrainer: PGT exact under every augmentation, the averaged model, the schedules, runs that were cut short."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import ALPHA, CLASSES, Images, Validation, build, weights
from transformers import TrainerCallback

from pgt_hf import ImageTrainer, attach_powergrad
from pgt_hf.images import load_classifier

pytestmark = pytest.mark.slow


def batch(images: Images, indices=range(8)) -> dict[str, torch.Tensor]:
    examples = [images[index] for index in indices]
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def gradient_at_the_logits(trainer: ImageTrainer, inputs: dict, items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a training step, and what the backward pass brings to them."""
    kept = []
    head = trainer.model.timm_model.fc
    hook = head.register_forward_hook(lambda module, args, output: (output.retain_grad(), kept.append(output))[0])
    with attach_powergrad(trainer.model, ALPHA):
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(items))
        loss.backward()
    hook.remove()
    return kept[0].detach(), kept[0].grad


MIXING = {
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "both, smoothed": {"mixup": 0.4, "cutmix": 1.0, "label_smoothing_factor": 0.1},
    "smoothed": {"label_smoothing_factor": 0.1},
    "erased, channels last": {"random_erasing": 0.9, "channels_last": True},
}


@pytest.mark.parametrize("bad", [(), (2, 5)], ids=["all readable", "two unreadable"])
@pytest.mark.parametrize("settings", MIXING.values(), ids=MIXING)
def test_gradient_is_exact_with_mixed_smoothed_and_missing_targets(tmp_path, settings, bad):
    trainer = build(tmp_path, **settings)
    trainer.model.train()
    inputs = trainer._prepare_inputs(batch(Images(bad=bad)))
    labels, items = inputs["labels"].clone(), 8 - len(bad)
    q = labels if labels.is_floating_point() else F.one_hot(labels.clamp(min=0), CLASSES) * (labels >= 0)[:, None]
    mass = q.sum(1, keepdim=True).float()
    smoothing = settings.get("label_smoothing_factor", 0.0)
    q = q * (1 - smoothing) + smoothing / CLASSES * mass
    logits, gradient = gradient_at_the_logits(trainer, inputs, items)
    expected = (torch.softmax(ALPHA * logits, 1) * mass - q) / items
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_images_are_normalised_on_the_device_as_the_saved_processor_does(tmp_path):
    trainer = build(tmp_path)
    trainer.model.eval()
    raw = batch(Images())
    pixels = trainer._prepare_inputs(raw)["pixel_values"]
    config = trainer.model.config.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(pixels, (raw["pixel_values"] / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_evaluation_is_neither_mixed_nor_erased_nor_smoothed(tmp_path):
    trainer = build(tmp_path, mixup=0.4, random_erasing=1.0, label_smoothing_factor=0.1)
    loss = trainer.evaluate()["eval_loss"]
    trainer.model.eval()
    inputs = trainer._prepare_inputs(batch(Validation(20), range(20)))
    with torch.no_grad():
        expected = F.cross_entropy(trainer.model(inputs["pixel_values"]).logits, inputs["labels"])
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_accumulated_steps_are_those_of_the_whole_batch_though_some_images_are_missing(tmp_path):
    data = {"data": Images(16, bad=(0, 1, 2, 9))}
    whole = build(tmp_path / "a", per_device_train_batch_size=16, max_steps=3, **data)
    parts = build(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=3, **data)
    for trainer in (whole, parts):
        trainer.train()
    for key, value in weights(whole).items():
        torch.testing.assert_close(parts.model.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_batch_without_a_readable_image_changes_nothing_that_is_learnt(tmp_path):
    trainer = build(tmp_path, data=Images(16, bad=tuple(range(16))), max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert all(torch.equal(before[key], value) for key, value in weights(trainer).items())
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]


def test_average_is_timms_and_is_evaluated_and_saved(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.timm_model.fc.weight.detach().clone())

    trainer = build(tmp_path, ema_decay=0.5, max_steps=4, eval_strategy="epoch", callbacks=[Watch()])
    trainer.train()
    trainer.save_model()
    average = seen[0]  # timm's average starts as a copy of the first step's weights
    for weight in seen[1:]:
        average = torch.lerp(average, weight, 0.5)
    saved = load_classifier(tmp_path / "ema").eval()
    torch.testing.assert_close(saved.timm_model.fc.weight, average)
    metrics = trainer.evaluate()
    inputs = trainer._prepare_inputs(batch(Validation(20), range(20)))
    with torch.no_grad():
        expected = F.cross_entropy(saved(inputs["pixel_values"]).logits, inputs["labels"]).item()
    assert metrics["eval_ema_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] != pytest.approx(expected, rel=1e-5)
    assert not any(hooks for module in saved.modules() for hooks in (module._forward_hooks,))


def rates(trainer: ImageTrainer) -> list[float]:
    trainer.train()
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_cosine_warms_up_per_step_and_ends_at_its_minimum(tmp_path):
    found = rates(build(tmp_path, schedule="cosine", warmup_epochs=1, warmup_lr=0.1, min_lr=1e-4, num_train_epochs=4))
    expected = [0.001 + 0.009 * step / 5 for step in range(5)]
    expected += [1e-4 + (0.01 - 1e-4) * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(5, 20)]
    assert found == pytest.approx(expected)


def test_step_schedule_decays_at_its_epochs(tmp_path):
    found = rates(build(tmp_path, schedule="step", decay_epochs=[1, 3], decay_rate=0.1, num_train_epochs=4))
    # timm counts a milestone as reached with the step that ends it
    assert found == pytest.approx([0.01] * 4 + [0.001] * 10 + [0.0001] * 6)


STRONG = {
    "mixup": 0.2,
    "cutmix": 1.0,
    "random_erasing": 0.25,
    "label_smoothing_factor": 0.1,
    "ema_decay": 0.9,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "model": {"drop_path_rate": 0.2},
}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("optim", "stop"),
    [
        ("powergrad_sgd", 4),
        pytest.param("powergrad_sgd", 7, marks=pytest.mark.long),
        ("powergrad_sgd", 10),
        pytest.param("powergrad_lamb", 7, marks=pytest.mark.long),
        pytest.param("adamw_torch", 4, marks=pytest.mark.long),
    ],
)
def test_resumed_run_ends_with_the_very_bits_of_the_uninterrupted_one(tmp_path, optim, stop):
    settings = STRONG | {"optim": optim, "optim_args": None, "save_strategy": "steps", "save_steps": 3}
    settings |= {"eval_strategy": "epoch", "gradient_accumulation_steps": 1 if stop == 4 else 2, "num_train_epochs": 5}
    if stop == 10:  # the fifth epoch's; its checkpoint stands at an epoch's end
        settings["save_steps"] = 10
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", callbacks=[StopAt(stop + 1)], **settings).train()
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == stop // settings["save_steps"] * settings["save_steps"] > 0
    for ours, theirs in ((whole.model, resumed.model), (whole.ema.module, resumed.ema.module)):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key


def test_workers_change_nothing(tmp_path):
    ends = []
    for workers in (0, 2):
        trainer = build(tmp_path, dataloader_num_workers=workers, max_steps=6, **STRONG)
        trainer.train()
        ends.append(weights(trainer))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_epochs_are_shuffled_anew_and_see_every_image_once(tmp_path):
    trainer = build(tmp_path)
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0):
        trainer.train_dataset.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(40))


STRENGTHS = {
    "bf16": {"bf16": True},
    "lamb": {"optim": "powergrad_lamb", "optim_args": None},
    "adamw": {"optim": "powergrad_adamw", "optim_args": None},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("settings", STRENGTHS.values(), ids=STRENGTHS)
def test_everything_at_once_trains(tmp_path, settings, device):
    where = {"use_cpu": device.type == "cpu", "channels_last": True}
    trainer = build(tmp_path, max_steps=3, **STRONG | where | settings)
    trainer.train()
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert trainer._handle.calls == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "schedule must be one of cosine, step, got 'cosin'"),
        ({"mixup": -1.0}, r"mixup must be a number in \[0, 100\], got -1.0"),
        ({"random_erasing": 1.5}, r"random_erasing must be a number in \[0, 1\], got 1.5"),
        ({"ema_decay": 1.0}, r"ema_decay must be a number in \[0, 1\), got 1.0"),
        ({"mixup": 0.2, "per_device_train_batch_size": 7}, "per_device_train_batch_size must be even, got 7"),
        ({"cutmix": 1.0, "dataloader_drop_last": False}, "dataloader_drop_last=True"),
    ],
)
def test_setting_that_is_not_allowed_is_an_error_that_names_it(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **settings)
