"""Every family of networks that the presets name: PGT exact at its logits, and a few steps that move all of it."""

import runpy

import pytest
import timm
import torch
import torch.nn.functional as F
from launch import ROOT
from transformers import AutoModelForImageClassification

from pgt_hf import create_optimizer
from pgt_hf.heads import last_linear
from pgt_hf.images import PRESETS, create_model, preset_table

NAMES, SIDE, ALPHA, STEPS = [str(i) for i in range(10)], 32, 0.25, 3
SHALLOW, NARROW = {"layers": [1, 1, 1, 1]}, {"channels": [16, 32, 64, 128]}
VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}

# The preset's own architecture where there is one, at a fraction of its width and depth.
TINY = {
    "vgg": ("vgg11", {"mlp_ratio": 1 / 64}),
    "vgg with batch norm": ("vgg11_bn", {"mlp_ratio": 1 / 64}),
    "resnet": ("resnet101", SHALLOW | NARROW),
    "se-resnet of basic blocks": ("seresnet18", NARROW),
    "se-resnet of bottlenecks": ("seresnet50", SHALLOW | NARROW),
    "norm-free resnet": ("resnet18", NARROW | {"norm_free": True}),
    "norm-free se-resnet": ("seresnet18", NARROW | {"norm_free": True}),
    # Its layer scales begin at 1e-6, which would hide the first steps of the blocks behind float32's resolution.
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "ls_init_value": 0.1}),
    "vit": ("vit_small_patch16_224", VIT),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_a_few_steps_move_every_parameter_with_pgts_gradient_at_the_logits(family, tmp_path):
    name, options = TINY[family]
    model = create_model(name, NAMES, image_size=SIDE, **options).train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.01, alpha=ALPHA, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.randn(8, 3, SIDE, SIDE), torch.arange(8)
    for _ in range(STEPS):
        logits = model(images).logits
        logits.retain_grad()
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        plain = logits.detach()
        torch.testing.assert_close(loss.detach(), F.cross_entropy(plain, labels))
        wanted = ((ALPHA * plain).softmax(-1) - F.one_hot(labels, 10)) / 8
        torch.testing.assert_close(logits.grad, wanted)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.powergrad.calls == STEPS
    assert torch.isfinite(loss)
    unmoved = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    assert unmoved == []

    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images).logits, model(images).logits)


@pytest.mark.parametrize("name", sorted({preset.settings["model_name"] for preset in PRESETS.values()}))
def test_network_of_each_preset_builds_and_its_head_is_found(name):
    with torch.device("meta"):  # shapes alone
        network = timm.create_model(name, num_classes=1000)
    assert [layer.out_features for layer in last_linear(network)] == [1000]


def test_vision_transformer_is_built_for_the_size_of_its_images():
    model = create_model("vit_small_patch16_224", NAMES, image_size=96, depth=1).eval()
    assert model(torch.zeros(1, 3, 96, 96)).logits.shape == (1, 10)
    assert model.config.model_args["img_size"] == 96


def test_every_setting_of_a_preset_is_an_argument_of_the_recipe():
    recipe = runpy.run_path(str(ROOT / "recipes" / "imagenet.py"), run_name="recipe")
    groups = ("ModelArguments", "DataArguments", "RecipeArguments", "ImageTrainingArguments")
    known = {name for group in groups for name in recipe[group].__dataclass_fields__}
    for name, preset in PRESETS.items():
        assert set(preset.settings) <= known, name


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "convnext_tiny", "vit_small"])
def test_presets_that_nobody_published_say_so(name):
    row = next(line for line in preset_table().splitlines() if line.startswith(f"| {name} |"))
    assert PRESETS[name].top1 is None and row.endswith("| - | - |")
