import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from pgt_hf import attach_powergrad
from pgt_hf.images import ImageTransform, create_model, load_classifier, load_image_dataset

NAMES = ["zero", "one", "two", "three", "four", "five"]
VARIANTS = [{}, {"norm_free": True}, {"small_images": True}, {"norm_free": True, "small_images": True}]


@pytest.mark.parametrize("name", ["resnet10t", "resnet18", "seresnet18"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "+".join(variant) or "plain")
def test_saved_model_loads_with_the_same_logits_and_labels(name, variant, tmp_path):
    model = create_model(name, NAMES, image_size=32, **variant).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    for again in (load_classifier(tmp_path), AutoModelForImageClassification.from_pretrained(tmp_path).eval()):
        assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
        # transformers computes on the file's own pages, and kernels round as a weight is aligned or not
        torch.testing.assert_close(model(images).logits, again(images).logits, rtol=1e-5, atol=1e-6)
        assert again.config.id2label == dict(enumerate(NAMES))


@pytest.mark.slow
def test_stock_networks_load_where_this_package_was_never_imported(tmp_path):
    create_model("resnet10t", NAMES, image_size=32).save_pretrained(tmp_path)
    program = (
        "import sys; from transformers import AutoModelForImageClassification as Auto; "
        f"print(Auto.from_pretrained({str(tmp_path)!r}).config.id2label[5], 'pgt_hf' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["five", "False"]


def test_initial_weights_are_those_that_timm_draws():
    torch.manual_seed(0)
    ours = create_model("resnet18", NAMES).timm_model.state_dict()
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=len(NAMES)).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not ours["layer1.0.bn2.weight"].any()  # timm's zero-initialised last norm of each block


@pytest.mark.slow
def test_norm_free_network_has_no_norm_layer_and_learns():
    torch.manual_seed(0)
    model = create_model("resnet18", NAMES, image_size=32, norm_free=True).train()
    assert not [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    losses = []
    with attach_powergrad(model, alpha=0.25):
        for _ in range(25):
            optimizer.zero_grad()
            loss = model(pixel_values=images, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] < 2.5
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "resnet18d"])
def test_small_image_stem_keeps_the_size(name):
    network = create_model(name, NAMES, image_size=32, small_images=True).timm_model
    stem = network.maxpool(network.act1(network.bn1(network.conv1(torch.randn(1, 3, 32, 32)))))
    assert stem.shape[-2:] == (32, 32)


def test_image_processor_of_the_saved_model_does_what_evaluation_did(tmp_path):
    model = create_model("resnet10t", NAMES, image_size=96)
    model.save_pretrained(tmp_path)
    image = load_image_dataset("digits")["train"][0]["image"].resize((150, 120)).convert("RGB")
    ours = ImageTransform(model.config.pretrained_cfg, training=False)(image)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(image)["pixel_values"][0]
    grey_level = 1 / 255 / min(model.config.pretrained_cfg["std"])  # two resizing kernels may round differently
    assert (ours - theirs).abs().max() < 3 * grey_level
    assert (ours - theirs).abs().mean() < 0.3 * grey_level
    best = pipeline("image-classification", str(tmp_path))(image)[0]
    assert best["label"] in NAMES


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet_18", {}, "resnet18"),
        ("mobilenetv3_small_050", {"norm_free": True}, "for timm's ResNets, got 'mobilenetv3_small_050'"),
        ("vit_tiny_patch16_224", {"small_images": True}, "for timm's ResNets, got 'vit_tiny_patch16_224'"),
    ],
)
def test_network_that_cannot_be_built_is_an_error_that_names_it(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, NAMES, **options)


def test_one_class_is_an_error():
    with pytest.raises(ValueError, match="at least 2 classes"):
        create_model("resnet18", ["only"])
