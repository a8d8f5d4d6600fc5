"""``pgt-hf`` on a run with a network that gives known answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pgt_hf.__main__ import main
from pgt_hf.images import create_model
from pgt_hf.runs import predict_images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network that tells bright images from dark ones."""
    folder = tmp_path_factory.mktemp("runs") / "light"
    model = create_model("resnet10t", ["dark", "bright"], image_size=32)
    head = model.timm_model.get_classifier()
    with torch.no_grad():
        model.eval()
        dark, bright = (features(model, value) for value in (0.0, 1.0))
        direction = (bright - dark) / (bright - dark).square().sum()
        middle = direction @ (dark + bright) / 2
        head.weight.copy_(torch.stack([-8 * direction, 8 * direction]))
        head.bias.copy_(torch.stack([8 * middle, -8 * middle]))
    model.config.powergrad_alpha, model.config.powergrad_folded = 0.25, False
    model.save_pretrained(folder)
    return folder


def features(model, value):
    pixels = torch.full((1, 3, 32, 32), value)
    mean, std = (torch.tensor(model.config.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    network = model.timm_model
    return network.forward_head(network.forward_features((pixels - mean) / std), pre_logits=True)[0]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (60, 40), "white").save(folder / "noon.png")
    Image.new("L", (40, 60), 0).save(folder / "night.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predict_names_the_classes_of_ones_own_images_and_draws_them(run, images, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main(["predict", str(run), str(images), "--top", "1", "--picture", str(tmp_path / "sheet.png")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(",")[0] for line in lines[:2]] == [
        f"{images / 'night.jpg'}: dark",
        f"{images / 'noon.png'}: bright",
    ]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert (sheet == 0).sum() > 1000  # the night


def test_probabilities_are_those_that_the_run_found_calibrated_best(run, images):
    def share(**metrics: float) -> float:
        (run / "metrics.json").write_text(json.dumps(metrics))
        return predict_images(run, [images / "noon.png"])[images / "noon.png"][0][1]

    raw = share()
    assert share(nll=0.1, nll_folded=0.3, nll_fitted=0.2, temperature=2.0) == raw
    folded = share(nll=0.3, nll_folded=0.1)
    fitted = share(nll=0.3, nll_folded=0.2, nll_fitted=0.1, temperature=2.0)
    (run / "metrics.json").unlink()
    odds = raw / (1 - raw)
    assert folded == pytest.approx(odds**0.25 / (1 + odds**0.25), rel=1e-4)
    assert fitted == pytest.approx(odds**0.5 / (1 + odds**0.5), rel=1e-4)


def test_what_cannot_be_predicted_is_one_line(run, images, tmp_path):
    (images / "broken.png").write_bytes(b"\x89PNG\r\n")
    for arguments, message in (
        ([str(run), str(images)], r"error: .*broken\.png: the image cannot be decoded"),
        ([str(run), str(tmp_path / "none.png")], "No such file"),
        ([str(tmp_path), str(images)], "there is no model in"),
        ([str(run), str(images), "--top", "0"], "top must be a whole number of at least 1, got 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["predict", *arguments])


def test_info_and_presets_tell_what_is_here(capsys):
    main(["info"])
    printed = capsys.readouterr().out
    assert f"torch           {torch.__version__.partition('+')[0]}" in printed and "powergrad_adamw" in printed
    main(["presets"])
    assert "| resnet50_cosine_pgt | resnet50 |" in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    for name in ("push", "export", "pull", "report", "plot", "predict", "presets", "info", "--install-completion"):
        assert name in printed
