"""The HTML page of a run: its numbers are those of the predictions, and it needs nothing but itself."""

import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pgt_hf import ImageTrainer, ImageTrainingArguments
from pgt_hf.__main__ import main
from pgt_hf.analysis import IGNORED, ClassificationMetrics, Evaluation, best_calibrated, examine
from pgt_hf.images import ImageDataset, ImageTransform, collate, create_model, load_image_dataset
from pgt_hf.runs import Run, read_evaluation, write_evaluation, write_report
from pgt_hf.runs.record import shown_settings

NAMES = ["<b>ant</b>", "bee & wasp", "cat"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Fixed(nn.Module):
    """A classifier whose logits are the images themselves."""

    def __init__(self, names):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=pixel_values)


def examples(logits, labels):
    return [{"pixel_values": torch.tensor(z), "labels": y} for z, y in zip(logits, labels, strict=True)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a network that was hardly trained."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    torch.manual_seed(0)
    model = create_model("resnet10t", [str(digit) for digit in range(10)], image_size=32)
    model.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"arguments": {"alpha": 0.25, "dataset_name": "digits", "seed": 3}}))
    (folder / "metrics.json").write_text(json.dumps({"top1": 0.125, "nll": 2.5}))
    history = [{"epoch": epoch, "loss": 3.0 - epoch, "learning_rate": 0.1} for epoch in (0.5, 1.0)]
    (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    return folder


@pytest.fixture(scope="module")
def examined(run, tmp_path_factory):
    """The same run, once a command has looked at its predictions."""
    folder = tmp_path_factory.mktemp("examined") / "digits"
    shutil.copytree(run, folder)
    main(["report", str(folder), "--max-images", "80", "--mistakes", "5"])
    return folder


def test_counts_are_those_of_the_predictions_and_unlabelled_images_are_left_out():
    logits = [[4.0, 0, 0], [0, 3, 0], [0, 0, 1], [0, 2, 0], [9, 0, 0]]
    found = examine(Fixed(NAMES), examples(logits, [0, 0, 2, IGNORED, 2]), alpha=0.5, batch_size=2)
    assert found.confusion.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert [(wrong.index, wrong.label, wrong.predicted) for wrong in found.mistakes] == [(4, 2, 0), (1, 0, 1)]
    temperature = found.calibration[best_calibrated(found.calibration)].temperature
    sure = torch.softmax(torch.tensor(logits[4]) / temperature, -1).max().item()
    assert temperature != 1 and found.mistakes[0].confidence == pytest.approx(sure)
    assert list(found.calibration)[:2] == ["raw", "folded"]
    assert found.calibration["raw"].reliability.count.sum() == 4


def test_evaluation_is_read_as_it_was_saved(tmp_path):
    saved = examine(Fixed(NAMES), examples([[1.0, 0, 0], [0, 1, 0]], [1, 1]))
    write_evaluation(tmp_path, saved)
    read = read_evaluation(tmp_path)
    assert (read.names, read.mistakes) == (saved.names, saved.mistakes)
    np.testing.assert_array_equal(read.confusion, saved.confusion)
    raw, again = saved.calibration["raw"], read.calibration["raw"]
    assert (again.temperatures, again.nll, again.ece) == (raw.temperatures, raw.nll, raw.ece)
    np.testing.assert_array_equal(again.reliability.count, raw.reliability.count)


def test_page_of_a_run_that_was_never_examined_shows_what_there_is(run, tmp_path):
    page = write_report(run, tmp_path / "page.html").read_text()
    for text in ("12.50%", "alpha = 0.25", "Handwritten Digits", "<h2>Training</h2>", "<td>seed</td><td>3</td>"):
        assert text in page
    assert "<h2>Confusion</h2>" not in page


def test_command_line_examines_a_run_and_shows_its_worst_mistakes(examined):
    page, found = (examined / "report.html").read_text(), read_evaluation(examined)
    assert found.confusion.sum() == 80
    split = load_image_dataset("digits")["validation"]
    assert all(split[wrong.index]["label"] == wrong.label != wrong.predicted for wrong in found.mistakes)
    assert page.count("<figure>") == 5 and page.count("data:image/jpeg") == 5
    worst, names = found.mistakes[0], found.names
    assert f"true: <b>{names[worst.label]}</b><br>predicted: <b>{names[worst.predicted]}</b>" in page
    assert page.count(found.probabilities) == 2  # the ones to use, and those of the mistakes
    for title in ("Training", "Calibration", "Confusion", "Worst mistakes", "Settings"):
        assert f"<h2>{title}</h2>" in page


def test_page_holds_everything_it_needs_and_runs_no_code(examined, tmp_path):
    page = write_report(examined, tmp_path / "page.html").read_text()
    assert not re.findall(r"<script|<link|<iframe|javascript:|\bon\w+=|@import|url\(", page)
    sources = re.findall(r"(?:src|href)=[\"']?([^\"'\s>]{0,40})", page)
    assert sources and all(source.startswith("data:image/") for source in sources)


def test_images_that_may_not_be_passed_on_are_left_out(examined, tmp_path):
    page = write_report(examined, tmp_path / "page.html", pictures=False).read_text()
    assert "data:image/jpeg" not in page and "licence may not allow it" in page
    assert page.count("<figcaption>true: ") == 5


def test_names_of_classes_are_text_and_not_markup(run, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path / name)
    write_evaluation(tmp_path, examine(Fixed(NAMES), examples([[1.0, 0, 0], [0, 1, 0]], [1, 1])))
    page = write_report(tmp_path).read_text()
    assert "<b>ant</b>" not in page and html.escape(NAMES[0]) in page


def test_many_classes_give_a_picture_and_few_a_table(run, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path / name)
    for classes, table in ((25, True), (26, False), (1000, False)):
        counts = np.eye(classes, dtype=np.int64)
        counts[0, 1] = 3
        write_evaluation(tmp_path, Evaluation([f"class {i}" for i in range(classes)], counts, calibration(), []))
        page = write_report(tmp_path).read_text()
        assert ("<table class=matrix>" in page) is table
        assert ("right predictions blue" in page) is not table
        assert "<td>class 0</td><td>class 1</td><td>3</td>" in page  # most confused
        assert "<td>class 0</td><td>25.0%</td><td>4</td>" in page and "<td>100.0%</td>" not in page  # hardest
        assert len(page) < 400_000


def calibration():
    return examine(Fixed(NAMES), examples([[1.0, 0, 0]], [0])).calibration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "there is no model in nowhere"), (["."], r"there is no model in \.:")],
)
def test_folder_without_a_model_is_an_error_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(["report", *arguments])
    assert not list(tmp_path.iterdir())


def test_data_set_without_labels_is_an_error():
    with pytest.raises(ValueError, match="no labelled image"):
        examine(Fixed(NAMES), examples([[1.0, 0, 0]], [IGNORED]))


def test_uint8_images_are_normalised_as_the_model_was_trained(run):
    model = create_model("resnet10t", [str(digit) for digit in range(10)], image_size=32)
    split = load_image_dataset("digits", max_eval_samples=20)["validation"]
    sets = [
        ImageDataset(split, ImageTransform(model.config.pretrained_cfg, training=False, normalize=normalize))
        for normalize in (True, False)
    ]
    floats, bytes_ = (examine(model, dataset, alpha=1) for dataset in sets)
    np.testing.assert_array_equal(floats.confusion, bytes_.confusion)


def test_settings_are_those_that_were_used(run):
    asked = {"lr_scheduler_type": "linear", "per_device_train_batch_size": 256, "global_batch": 1024}
    used = {"schedule": "cosine", "batch": 32, "alpha": 0.25}
    shown = dict(shown_settings(Run({}, asked | used, {})))
    assert shown == {"schedule": "cosine", "batch": "32", "alpha": "0.25"}
    assert dict(shown_settings(Run({}, asked, {})))["lr_scheduler_type"] == "linear"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_page_fits_a_narrow_screen(examined, tmp_path):
    """Nothing but the tables, which scroll on their own, is wider than the screen."""
    page = write_report(examined, tmp_path / "page.html")
    probe = "<script>onload=()=>{document.title=document.documentElement.scrollWidth+'/'+innerWidth}</script>"
    page.write_text(page.read_text() + probe)
    frame = tmp_path / "frame.html"  # a window of the browser is not made as narrow as that
    frame.write_text(
        f"<iframe src='{page.name}' width=400 height=900></iframe>"
        "<script>onload=()=>{document.title=frames[0].document.title}</script>"
    )
    shown = browse(frame, tmp_path, "--allow-file-access-from-files", "--dump-dom").stdout.decode()
    width, inner = re.search(r"<title>(\d+)/(\d+)</title>", shown).groups()
    assert int(width) <= int(inner) <= 400


def browse(page, folder, *flags):
    common = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    common += " --disable-component-update --disable-sync"
    command = [CHROMIUM, *common.split(), f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_browser_shows_the_page(examined, tmp_path):
    page, picture = write_report(examined, tmp_path / "page.html"), tmp_path / "page.png"
    browse(page, tmp_path, "--window-size=1000,3000", f"--screenshot={picture}")
    from PIL import Image

    shown = np.asarray(Image.open(picture).convert("RGB"))
    assert shown.shape == (3000, 1000, 3)
    blue = (np.abs(shown.astype(int) - (37, 99, 235)).sum(-1) < 200).sum()
    assert blue > 500  # the diagonal of the confusion matrix, and the curves


class PartlyLabelled(ImageDataset):
    def __getitems__(self, indices):
        samples = super().__getitems__(indices)
        return [
            sample | ({"labels": IGNORED} if index % 7 == 3 else {})
            for index, sample in zip(indices, samples, strict=True)
        ]


@pytest.mark.slow
def test_the_report_of_an_evaluation_that_was_made_is_that_of_a_second_look(tmp_path):
    """Taken from Trainer's own evaluation: in the data set's order, unlabelled images left out."""
    split = load_image_dataset("digits", max_eval_samples=70)["validation"]
    validation = PartlyLabelled(split, ImageTransform({"input_size": (3, 32, 32)}, training=False, normalize=False))
    names = [str(digit) for digit in range(10)]
    model = create_model("test_resnet", names, image_size=32)
    metrics = ClassificationMetrics(alpha=0.25, keep_logits=True)
    trainer = ImageTrainer(
        model,
        ImageTrainingArguments(str(tmp_path), per_device_eval_batch_size=16, report_to="none", use_cpu=True),
        eval_dataset=validation,
        data_collator=collate,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess,
    )
    assert trainer.evaluate()["eval_skipped"] == 10
    assert len(metrics.kept[0]) == len(metrics.kept[1]) == 70
    found = Evaluation.from_logits(*metrics.kept, names, validation, alpha=0.25).to_json()
    expected = examine(model, validation, alpha=0.25).to_json()
    assert found["confusion"] == expected["confusion"]
    assert [wrong["index"] for wrong in found["mistakes"]] == [wrong["index"] for wrong in expected["mistakes"]]
    assert found["mistakes"][0]["picture"] == expected["mistakes"][0]["picture"]
