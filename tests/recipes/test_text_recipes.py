"""The text recipes, as users start them: two processes on the CPU, nothing downloaded."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT, TWO, as_program, run
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from pgt_hf import fold_powergrad
from pgt_hf.hub import prepare_release
from pgt_hf.text import DOCSTRINGS, STDLIB, load_labelled_text, load_plain_text

sys.path.insert(0, str(ROOT / "recipes"))
import language_modeling  # noqa: E402
import text_classification  # noqa: E402

pytestmark = pytest.mark.slow

CLASSIFY, MODEL = (str(ROOT / "recipes" / name) for name in ("text_classification.py", "language_modeling.py"))


def call(recipe, *arguments):
    """In this process, which has everything imported."""
    with as_program(recipe.__file__, *arguments):
        recipe.main()


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification")
    return folder / "runs" / "text", run(*TWO, CLASSIFY, "--smoke", cwd=folder).stdout


def test_classification_learns_and_reports_once(classified):
    folder, printed = classified
    metrics = metrics_of(folder)
    assert metrics["world_size"] == 2
    assert metrics["eval_texts"] == 101
    assert metrics["top1"] > 1.4 / 8  # eight libraries
    assert printed.count("What next") == 1
    assert {"run.json", "history.jsonl", "training_curve.png", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }


def test_what_the_publish_line_uploads_is_no_pickle(classified, tmp_path):
    folder, printed = classified
    assert "pgt-hf push runs/text" in printed and (folder / "training_args.bin").is_file()
    names = {path.name for path in prepare_release(folder, tmp_path / "release", "you/texts").rglob("*")}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_the_loss_is_not_multiplied_by_the_number_of_processes(classified):
    history = [json.loads(line) for line in (classified[0] / "history.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(8), abs=0.1)


def test_the_pipeline_says_what_the_trainer_counted(classified):
    folder, _ = classified
    texts = load_labelled_text(DOCSTRINGS, max_train_samples=1, max_eval_samples=101, seed=42)["validation"]
    names = texts.features["label"].names
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    answers = classify(texts["text"][:], truncation=True, max_length=32)
    hits = sum(answer["label"] == names[label] for answer, label in zip(answers, texts["label"], strict=True))
    assert hits / 101 == pytest.approx(metrics_of(folder)["top1"], abs=1e-6)


def test_classification_takes_a_file_and_names_a_column_that_is_missing(tmp_path, monkeypatch):
    rows = [f"{word} {i},{word}" for i in range(30) for word in ("cold", "warm")]
    (tmp_path / "rows.csv").write_text("\n".join(["body,class", *rows]))
    same = ["--smoke", "--dataset-name", "rows.csv", "--use_cpu"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"no text column among .*; name it with --text-column"):
        call(text_classification, *same)
    call(text_classification, *same, "--text-column", "body", "--max-steps", "20", "--warmup-steps", "0")
    metrics = metrics_of(tmp_path / "runs" / "text")
    assert metrics["eval_texts"] == 6
    assert metrics["top1"] == 1.0


@pytest.fixture(scope="module")
def modelled(tmp_path_factory):
    """The fused loss in two processes, and the logits in this one, with the same batch in all."""
    folder = tmp_path_factory.mktemp("language")
    same = ["--smoke", "--max-steps", "20"]
    run(*TWO, MODEL, *same, "--fused-loss", "true", "--output-dir", "fused", cwd=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        larger = ["--per-device-train-batch-size", "32", "--use_cpu"]
        call(language_modeling, *same, *larger, "--fused-loss", "false", "--output-dir", "logits")
    return folder


@pytest.mark.parametrize("kind", ["fused", "logits"])
def test_perplexities_are_those_of_the_saved_model_as_it_is_and_folded(modelled, kind):
    tokenizer = AutoTokenizer.from_pretrained(modelled / kind)
    documents = load_plain_text(STDLIB, seed=42)["validation"].select(range(2))
    tokens = [token for text in documents["text"] for token in tokenizer(text)["input_ids"]]
    blocks = torch.tensor(tokens[: len(tokens) // 64 * 64]).view(-1, 64)
    model = AutoModelForCausalLM.from_pretrained(modelled / kind).eval()
    assert type(model).__name__ == model.config.architectures[0] == "LlamaForCausalLM"
    measured = []
    for folded in (False, True):
        if folded:
            fold_powergrad(model, alpha=0.5)
        with torch.no_grad():
            losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in blocks.split(16)]
        measured.append(math.exp(sum(losses) / len(blocks)))
    metrics = metrics_of(modelled / kind)
    # Two processes count a last batch's filler too.
    assert [metrics["perplexity"], metrics["perplexity_folded"]] == pytest.approx(measured, rel=0.02)
    assert metrics["perplexity"] < 0.7 * metrics["vocabulary"]


def test_the_fused_loss_in_two_processes_trains_the_model_of_the_logits_in_one(modelled):
    fused, logits = metrics_of(modelled / "fused"), metrics_of(modelled / "logits")
    assert fused["fused_loss"] and not logits["fused_loss"]
    assert fused["world_size"] == 2 > logits["world_size"]
    assert fused["perplexity_folded"] == pytest.approx(logits["perplexity_folded"], rel=0.02)


def test_the_fused_loss_refuses_an_optimizer_that_brings_pgt_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: the fused loss brings PGT with it"):
        call(language_modeling, "--smoke", "--fused-loss", "true", "--optim", "powergrad_adamw")


@pytest.mark.parametrize("recipe", [text_classification, language_modeling])
def test_help_keeps_its_examples_and_explains_the_options(recipe, capsys):
    with pytest.raises(SystemExit):
        call(recipe, "--help")
    text = capsys.readouterr().out
    assert f"accelerate launch recipes/{Path(recipe.__file__).name} --smoke" in text
    for option in ("--dataset-name", "--alpha", "--learning-rate", "--smoke"):
        assert option in text
