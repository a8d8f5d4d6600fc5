"""Wrong command lines: for each program and argument the wrong values of its kind, and what people really type.

The kinds come from the fields' bare types and from lists here, not from the rules that the programs check by: an
argument without a rule shows up as accepted in silence.
"""

import json
import re
import runpy
from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from judge import RECIPES, Command
from transformers import TrainingArguments

# A short run of each program on embedded data, which is right but for the wrong words added to it.
SMALL: dict[str, tuple[str, ...]] = {
    "imagenet.py": ("--smoke", "--max-steps", "1", "--max-train-samples", "64", "--max-eval-samples", "20"),
    "finetune.py": ("--smoke", "--max-steps", "1", "--max-train-samples", "64", "--max-eval-samples", "20"),
    "evaluate_images.py": ("resnet10t", "--dataset-name", "digits", "--max-eval-samples", "20", "--num-workers", "0"),
    "calibration.py": ("--smoke", "--epochs", "0.1", "--max-train-samples", "64", "--max-eval-samples", "20"),
    "alpha_search.py": ("--smoke", "--epochs", "0.5", "--max-train-samples", "64", "--max-eval-samples", "20"),
    "domain_adaptation.py": ("--smoke", "--max-train-samples", "64", "--max-eval-samples", "20"),
    "text_classification.py": ("--smoke", "--max-steps", "1", "--max-train-samples", "64"),
    "language_modeling.py": ("--smoke", "--max-steps", "1"),
    "prepare.py": ("--smoke",),
}
NOT_NEGATIVE_IS_FINE = {"max_steps": "-7", "local_rank": ""}
# 0 is right for these; for other numbers it means nothing, or something that is said in another way.
ZERO_IS_FINE = {
    "alpha", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps",
    "max_grad_norm",
    "label_smoothing_factor", "eval_delay", "seed", "data_seed", "dataloader_num_workers",
    "neftune_noise_alpha", "seeds",
    "local_rank", "warmup_epochs", "warmup_lr", "min_lr", "decay_rate", "mixup", "cutmix", "random_erasing",
    "ema_decay",
    "hflip", "color_jitter", "drop_path", "lora_dropout", "num_workers", "threshold", "alphas",
}  # fmt: skip
TOO_LARGE = {
    "alpha": "1.5", "label_smoothing_factor": "1.01", "adam_beta1": "1", "adam_beta2": "1.5", "random_erasing": "2",
    "ema_decay": "1", "decay_rate": "2", "min_crop": "1.5", "hflip": "1.1", "crop_pct": "5", "drop_path": "1",
    "layer_decay": "2", "lora_dropout": "1", "threshold": "1.5", "alphas": "2", "image_size": "100000",
    "eval_image_size": "100000", "quality": "96", "size": "99999", "lora_rank": "100000", "warmup_lr": "5",
    "seed": "4294967296", "seeds": "4294967296", "dataloader_num_workers": "1000000", "num_workers": "1000000",
}  # fmt: skip
# How the small run of a program must be changed for an argument to count at all.
CONTEXT = {
    "clip_value": ("--clip-mode", "norm"), "decay_epochs": ("--schedule", "step"),
    "decay_rate": ("--schedule", "step"),
    "ema_warmup": ("--ema-decay", "0.9"), "train_images": ("--streaming",), "layer_decay": ("--mode", "layer-decay"),
    "lora_rank": ("--mode", "lora"), "lora_scale": ("--mode", "lora"), "lora_dropout": ("--mode", "lora"),
    "trials": ("--sampler", "tpe"), "hub_fold": ("--push-to-hub",),
}  # fmt: skip
NAMES = {
    "optim": "powergrad_sdg", "clip_mode": "nrom", "schedule": "cosin", "preset": "resnet50_cosin", "mode": "lroa",
    "on_bad_image": "skp", "auto_augment": "rand-m9-msdt0.5", "class_weights": "ballanced", "sampler": "gird",
    "pruner": "medain", "methods": "tnet", "targets": "contrats:3", "model_name": "resnet1O", "model": "resnet1O",
    "metric_for_best_model": "topp1", "storage": "banana://x", "tokenizer_name": "no such",
    "dataset_name": "no/such/place",
    "log_level": "lowd", "ddp_backend": "ncl", "lr_scheduler_type": "cosin", "optim_args": "momentm=0.9",
    "resume": "no-such", "config": "no-such.json", "weights": "no-such.pth", "resume_from_checkpoint": "x",
}  # fmt: skip
PATHS = {
    "output_dir": ("/dev/null/x", "/proc/x"),
    "output": ("/dev/null/x.json", "/proc/x.json"),
    "storage": ("journal:",),
}
# Trainer reads these in ways of its own, or they cannot be wrong.
LEFT_OUT = {
    "local_rank", "smoke", "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "debug", "parallelism_config",
    "jit_mode_eval", "mp_parameters", "ray_scope", "tpu_num_cores", "past_index", "hub_token", "push_to_hub_token",
}  # fmt: skip


def commands(folder: Path) -> list[Command]:
    """All wrong command lines; ``folder`` is where the bad files that some of them name are made."""
    found = [command for program in SMALL for command in _of_fields(program)]
    return [*found, *_typed(_bad_files(folder))]


def _of_fields(program: str) -> Iterator[Command]:
    small = SMALL[program]
    for kind in _dataclasses(program):
        hints = get_type_hints(kind)
        trainers = {item.name for item in fields(TrainingArguments)} if issubclass(kind, TrainingArguments) else set()
        for item in fields(kind):
            seldom = item.name in trainers and program != "imagenet.py" and item.name not in NAMES
            if item.name in LEFT_OUT or not item.init or seldom:
                continue
            flag = f"--{item.name.replace('_', '-')}"
            context = CONTEXT.get(item.name, ())
            for value in _wrong_values(item.name, hints[item.name], item.default):
                if program == "alpha_search.py" and flag == "--seeds" and value == TOO_LARGE["seeds"]:
                    continue  # their number, there
                words = (flag, value)
                if item.name == "model":
                    words, begin = (value,), small[1:]
                    yield Command(program, (*words, *begin), (flag, "model"), value)
                else:
                    yield Command(program, (*small, *context, *words), (rf"{flag}\b",), value)


def _wrong_values(name: str, hint: Any, default: Any) -> Iterator[str]:
    kinds = [each for each in (get_args(hint) or (hint,)) if each is not NoneType]
    if get_origin(hint) is list:
        kinds = list(get_args(hint))
    if name in NAMES:
        yield NAMES[name]
        yield ""
    elif kinds == [bool] or (kinds and kinds[0] is bool):
        yield from ("maybe", "2")
    elif kinds == [int] or kinds == [float]:
        yield from ("abc", "nan", "")
        yield "1.5" if kinds == [int] else "inf"
        if name != "local_rank":
            yield NOT_NEGATIVE_IS_FINE.get(name, "-7")
        if name not in ZERO_IS_FINE:
            yield "0"
        if name in TOO_LARGE:
            yield TOO_LARGE[name]
    elif any(isinstance(each, type) and issubclass(each, Enum) for each in kinds):
        yield from ("nonesuch", "")
    elif str in kinds and name not in PATHS and default is not MISSING:
        yield ""
    yield from PATHS.get(name, ())


def _dataclasses(program: str) -> list[type]:
    """Those that the program gives to ``parse``."""
    names = runpy.run_path(str(RECIPES / program), run_name="recipe")
    called = re.search(
        r"parse\(\s*(.*?)(description|\w+=)", (RECIPES / program).read_text(encoding="utf-8"), re.DOTALL
    )
    assert called is not None
    return [names[name] for name in re.findall(r"\w+", called[1])]


def _typed(bad: Path) -> Iterator[Command]:
    """What people type: whole lines, with what the message must name."""
    rows: list[tuple[str, str, str]] = [
        # program, words after the small run, what is named
        ("imagenet.py", "--preset list-all", "--preset"),
        ("imagenet.py", "--optim-args momentum", "--optim-args"),
        ("imagenet.py", "--optim-args momentum=abc", "--optim-args.*momentum"),
        ("imagenet.py", "--optim-args =0.9", "--optim-args"),
        ("imagenet.py", "--optim-args momentum=", "--optim-args"),
        ("imagenet.py", "--optim-args momentum=0.9;nesterov=true", "--optim-args"),
        ("imagenet.py", '--optim-args {"momentum":0.9}', "--optim-args"),
        ("imagenet.py", "--optim-args momentum=-1", "--optim-args.*momentum"),
        ("imagenet.py", "--optim-args momentum=5", "--optim-args.*momentum"),
        ("imagenet.py", "--optim-args momentum=nan", "--optim-args.*momentum"),
        ("imagenet.py", "--optim-args lr=5", "--optim-args.*lr"),
        ("imagenet.py", "--optim-args weight_decay=1", "--optim-args.*weight_decay"),
        ("imagenet.py", "--optim-args alpha=0.5", "--optim-args.*alpha"),
        ("imagenet.py", "--optim-args nesterov=2", "--optim-args.*nesterov"),
        ("imagenet.py", "--optim-args momentum=0.9,momentum=0.8", "--optim-args.*momentum"),
        ("imagenet.py", "--optim powergrad_adamw --optim-args betas=3", "--optim-args.*betas"),
        ("imagenet.py", "--optim powergrad_adamw --optim-args betas=(0.9,2)", "--optim-args.*betas"),
        ("imagenet.py", "--optim powergrad_adamw --optim-args eps=-1", "--optim-args.*eps"),
        ("imagenet.py", "--optim adamw", "--optim"),
        ("imagenet.py", "--base-lr 0.1 --learning-rate 0.1", "--base-lr"),
        ("imagenet.py", "--global-batch 64 --gradient-accumulation-steps 3", "--gradient-accumulation-steps"),
        ("imagenet.py", "--clip-mode norm", "--clip-value"),
        ("imagenet.py", "--clip-value 1", "--clip-value"),
        ("imagenet.py", "--clip-mode norm --clip-value 1 --max-grad-norm 5", "--max-grad-norm"),
        ("imagenet.py", "--clip-mode norm --clip-value 1 --max-grad-norm 1", "--max-grad-norm"),
        ("imagenet.py", "--fp16 true --use-cpu true", "--fp16"),
        ("imagenet.py", "--fp16 true --bf16 true", "--fp16"),
        ("imagenet.py", "--schedule cosine --decay-epochs 3", "--decay-epochs"),
        ("imagenet.py", "--schedule step --min-lr 0.1", "--min-lr"),
        ("imagenet.py", "--train-images 10", "--train-images"),
        ("imagenet.py", "--ema-warmup", "--ema-warmup"),
        ("imagenet.py", "--hub-fold", "--hub-fold"),
        ("imagenet.py", "--hub-fold --push-to-hub --alpha 0", "--hub-fold"),
        ("imagenet.py", "--min-lr 50", "--min-lr"),
        ("imagenet.py", "--powergrad-head nothead", "head"),
        ("imagenet.py", "--model-name resnet50d.fake_tag", "--model-name"),
        ("imagenet.py", "--model-name resnet10t --pretrained", "pretrained"),
        ("imagenet.py", "--norm-free --model-name vit_tiny_patch16_224", "norm.free"),
        ("imagenet.py", "--mixup 0.2 --global-batch 7", "batch"),
        ("imagenet.py", "--pres resnet50_cosine", "--pres"),
        ("imagenet.py", "--conf x", "--conf"),
        ("imagenet.py", "--smok", "--smok"),
        ("imagenet.py", "--alhpa 0.5", "--alhpa.*--alpha"),
        ("imagenet.py", "stray", "stray"),
        ("imagenet.py", "--alpha", "--alpha"),
        ("imagenet.py", "--alpha -inf", "--alpha"),
        ("imagenet.py", "--alpha 0,25", "--alpha"),
        ("imagenet.py", "--alpha 25%", "--alpha"),
        ("imagenet.py", "--seed 1180591620717411303424", "--seed"),
        ("imagenet.py", "--num-train-epochs 0 --max-steps -1", "--num-train-epochs"),
        ("imagenet.py", "--config {bad}/badjson.json", "badjson.json"),
        ("imagenet.py", "--config {bad}/noargs.json", "noargs.json"),
        ("imagenet.py", "--config {bad}/argslist.json", "argslist.json"),
        ("imagenet.py", "--config {bad}/wrongtypes.json", "--num-train-epochs.*wrongtypes.json"),
        ("imagenet.py", "--config {bad}/badpreset.json", "--preset.*badpreset.json"),
        ("imagenet.py", "--config {bad}/unknown.json", "nonesuch"),
        ("imagenet.py", "--config {bad}", "--config"),
        ("imagenet.py", "--dataset-name {bad}/header.csv", "header.csv"),
        ("imagenet.py", "--dataset-name {bad}/empty.csv", "empty.csv"),
        ("imagenet.py", "--dataset-name {bad}/textonly", "textonly|image"),
        ("imagenet.py", "--dataset-name {bad}/oneclass", "oneclass|class|label"),
        ("imagenet.py", "--dataset-name {bad}/empty", "empty"),
        ("imagenet.py", "--dataset-name {bad}/notes.docx", "notes.docx"),
        ("imagenet.py", "--dataset-name digits --label-column nope", "--label-column"),
        ("imagenet.py", "--dataset-name digits --image-column nope", "--image-column"),
        ("imagenet.py", "--resume {bad}/empty", "--resume|checkpoint"),
        ("imagenet.py", "--resume-from-checkpoint x", "--resume"),
        ("imagenet.py", "--output-dir {bad}/afile", "--output-dir"),
        ("imagenet.py", "--output-dir {bad}/afile/x", "--output-dir"),
        ("imagenet.py", "--output-dir " + "x" * 300, "--output-dir"),
        ("imagenet.py", "--metric-for-best-model nope --load-best-model-at-end", "--metric-for-best-model"),
        ("imagenet.py", "--load-best-model-at-end --eval-strategy no", "eval|save"),
        ("imagenet.py", "--dataloader-prefetch-factor 2", "prefetch"),
        ("finetune.py", "--mode full --layer-decay 0.9", "--layer-decay"),
        ("finetune.py", "--mode linear --lora-rank 4", "--lora-rank"),
        ("finetune.py", "--mode full --lora-scale 4", "--lora-scale"),
        ("finetune.py", "--mode full --lora-dropout 0.1", "--lora-dropout"),
        ("finetune.py", "--weights {bad}/badweights.pth", "--weights"),
        ("finetune.py", "--pretrained true --weights {bad}/badweights.pth", "badweights.pth"),
        ("finetune.py", "--pretrained true --weights {bad}/badweights.safetensors", "badweights.safetensors"),
        ("finetune.py", "--pretrained true --weights {bad}/empty", "--weights"),
        ("finetune.py", "--optim adamw_torch", "--optim"),
        ("finetune.py", "--mode lora --ema-decay 0.9", "--ema-decay"),
        ("finetune.py", "--fold --alpha 0", "--fold"),
        ("finetune.py", "--optim-args momentum", "--optim-args"),
        ("finetune.py", "--optim-args lr=abc", "--optim-args.*lr"),
        ("finetune.py", "--optim-args lr=0.5", "--optim-args.*lr"),
        ("finetune.py", "--optim-args betas=3", "--optim-args.*betas"),
        ("finetune.py", "--optim-args layer_decay=0.5", "--optim-args.*layer_decay"),
        ("finetune.py", "--dataset-name {bad}/oneclass", "oneclass|class|label"),
        ("finetune.py", "--dataset-name {bad}/broken", "image"),
        ("finetune.py", "--metric-for-best-model nope", "--metric-for-best-model"),
        ("finetune.py", "--per-device-train-batch-size 1000", "--per-device-train-batch-size"),
        ("finetune.py", "--model-name {bad}/empty", "--model-name"),
        ("finetune.py", "--model-name {bad}/brokenmodel --pretrained", "brokenmodel"),
        ("finetune.py", "--model-name nobody/nothing", "--model-name"),
        ("finetune.py", "--output-dir {bad}/afile", "--output-dir"),
        ("finetune.py", "--class-weights", "--class-weights"),
        ("evaluate_images.py", "--weights {bad}/badweights.pth", "badweights.pth"),
        ("evaluate_images.py", "--weights {bad}/badweights.safetensors", "badweights.safetensors"),
        ("evaluate_images.py", "--output {bad}", "--output"),
        ("evaluate_images.py", "--output {bad}/afile/x.json", "--output"),
        ("evaluate_images.py", "--model {bad}/empty", "--model"),
        ("evaluate_images.py", "--model {bad}/brokenmodel", "brokenmodel"),
        ("calibration.py", "--output-dir {bad}/afile", "--output-dir"),
        ("calibration.py", "--max-eval-samples 1", "--max-eval-samples"),
        ("calibration.py", "--alphas", "--alphas"),
        ("calibration.py", "--seeds one two", "--seeds"),
        ("alpha_search.py", "--lr-low 1 --lr-high 0.1", "--lr-high"),
        ("alpha_search.py", "--alphas 0.5 0.5", "--alphas"),
        ("alpha_search.py", "--alphas 1", "--alphas"),
        ("alpha_search.py", "--trials 5", "--trials"),
        ("alpha_search.py", "--sampler tpe", "--trials"),
        ("alpha_search.py", "--sampler tpe --trials 5 --lr-points 3", "--lr-points"),
        ("alpha_search.py", "--batch-size 100000", "--batch-size"),
        ("alpha_search.py", "--storage journal:/nope/x.log", "--storage"),
        ("alpha_search.py", "--storage sqlite:///{bad}/afile", "--storage"),
        ("alpha_search.py", "--storage sqlite:////nope/x.db", "--storage"),
        ("alpha_search.py", "--storage file.db", "--storage"),
        ("alpha_search.py", "--output-dir {bad}/afile", "--output-dir"),
        ("domain_adaptation.py", "--targets contrast:9", "--targets.*contrast:9"),
        ("domain_adaptation.py", "--targets contrast:0", "--targets.*contrast:0"),
        ("domain_adaptation.py", "--targets contrast", "--targets"),
        ("domain_adaptation.py", "--targets contrast:x", "--targets"),
        ("domain_adaptation.py", "--targets", "--targets"),
        ("domain_adaptation.py", "--methods bn --threshold 0.5", "--threshold"),
        ("domain_adaptation.py", "--methods bn --adversary 1", "--adversary"),
        ("domain_adaptation.py", "--methods bn --adapt-lr 0.1", "--adapt-lr"),
        ("domain_adaptation.py", "--batch 1000", "--batch"),
        ("domain_adaptation.py", "--output-dir {bad}/afile", "--output-dir"),
        ("domain_adaptation.py", "--pretrained", "pretrained|resnet10t"),
        ("text_classification.py", "--dataset-name {bad}/text_one.csv", "text_one|class"),
        ("text_classification.py", "--model-name nope/nope", "nope/nope"),
        ("text_classification.py", "--model-name scrtach", "--model-name"),
        ("text_classification.py", "--model-name {bad}/empty", "--model-name"),
        ("text_classification.py", "--optim-args x", "--optim-args"),
        ("text_classification.py", "--max-length 100000", "--max-length"),
        ("text_classification.py", "--powergrad-head x", "head"),
        ("text_classification.py", "--resume {bad}/empty", "--resume|checkpoint"),
        ("text_classification.py", "--output-dir {bad}/afile", "--output-dir"),
        ("text_classification.py", "--text-column nope", "--text-column"),
        ("text_classification.py", "--label-column nope", "--label-column"),
        ("language_modeling.py", "--dataset-name {bad}/tiny.txt", "tiny.txt|block"),
        ("language_modeling.py", "--hidden-size 33", "--hidden-size"),
        ("language_modeling.py", "--tokenizer-name nope", "nope"),
        ("language_modeling.py", "--fused-loss true --optim powergrad_sgd", "--optim"),
        ("language_modeling.py", "--metric-for-best-model top1", "--metric-for-best-model"),
        ("language_modeling.py", "--output-dir {bad}/afile", "--output-dir"),
        ("language_modeling.py", "--block-size 1", "--block-size"),
        ("prepare.py", "--output-dir {bad}/afile/x", "--output-dir"),
        ("prepare.py", "--output-dir {bad}/empty", "--output-dir|already|empty"),
        ("prepare.py", "--verify --output-dir nowhere", "nowhere"),
        ("prepare.py", "--dataset-name {bad}/empty", "empty"),
        ("minimal.py", "--epochs 3", "--epochs"),
        # given twice, in vain, or against each other
        ("imagenet.py", "--alpha 0.5 --alpha 0.25", "--alpha must be given once"),
        ("imagenet.py", "--report --no-report", "--report must be given once"),
        ("imagenet.py", "--eval-steps 10", "--eval-steps"),
        ("imagenet.py", "--save-steps 10", "--save-steps"),
        ("imagenet.py", "--hub-model-id a/b", "--hub-model-id"),
        ("imagenet.py", "--hub-private-repo true", "--hub-private-repo"),
        ("imagenet.py", "--push-to-hub --hub-model-id a/b/c", "--hub-model-id.*a/b/c"),
        ("imagenet.py", "--adam-beta1 0.5", "--adam-beta1"),
        ("imagenet.py", "--schedule cosine --lr-scheduler-type linear", "--lr-scheduler-type"),
        ("imagenet.py", "--warmup-steps 5", "--warmup-steps"),
        ("imagenet.py", "--dataloader-persistent-workers true", "--dataloader-persistent-workers"),
        ("imagenet.py", "--do-train", "--do-train"),
        ("imagenet.py", "--report-to wandbb", "--report-to"),
        ("imagenet.py", "--report-to codecarbon", "--report-to"),
        ("imagenet.py", "--optim lomo", "lomo"),
        ("imagenet.py", "--optim-args momentum=0,nesterov=true", "--optim-args.*nesterov"),
        ("imagenet.py", "--torch-compile-mode nope", "--torch-compile-mode"),
        ("imagenet.py", "--torch-compile true --torch-compile-backend nope", "--torch-compile-backend"),
        ("imagenet.py", '--lr-scheduler-type cosine --lr-scheduler-kwargs {"x":1}', "--lr-scheduler-kwargs"),
        ("imagenet.py", "--neftune-noise-alpha 5", "--neftune-noise-alpha"),
        ("imagenet.py", "--label-names foo", "--label-names"),
        ("imagenet.py", "--include-for-metrics nope", "--include-for-metrics"),
        ("imagenet.py", "--resume {bad}/checkpoint-5", "--resume"),
        ("imagenet.py", "--norm-free --model-name efficientnet_b0", "--norm-free"),
        ("imagenet.py", "--drop-path 0.5 --model-name vgg11", "drop.path"),
        ("imagenet.py", "--crop-pct 1e-9", "--crop-pct"),
        ("imagenet.py", "--streaming --train-images 1", "--train-images"),
        ("imagenet.py", "--model-name {bad}/textrun", "textrun.*image classifier"),
        ("imagenet.py", "--dataset-name {bad}/outside.csv", "outside.csv.*/etc/hostname.*--allow-outside-files"),
        ("finetune.py", "--num-train-epochs 2 --warmup-epochs 3 --max-steps -1", "--warmup-epochs|--max-steps"),
        ("prepare.py", "--format raw --quality 50", "--quality"),
        ("prepare.py", "--verify --quality 50", "--quality"),
        ("evaluate_images.py", "--num-workers 0 --num-workers 0", "--num-workers must be given once"),
        ("calibration.py", "--alphas 0.5 0.5", "--alphas"),
        ("calibration.py", "--seeds 1 1", "--seeds"),
        ("domain_adaptation.py", "--targets contrast:3 contrast:3", "--targets"),
        ("domain_adaptation.py", "--methods bn bn", "--methods"),
        ("domain_adaptation.py", "--alphas 0.5 0.5", "--alphas"),
        # right one by one, wrong together or for this data
        ("calibration.py", "--model-name vit_tiny_patch16_224 --image-size 33", "--image-size"),
        ("calibration.py", "--model-name vgg11 --image-size 8", "--image-size"),
        ("calibration.py", "--batch-size 65", "--batch-size"),
        ("calibration.py", "--bins 1000000000", "--bins"),
        ("calibration.py", "--num-workers 100000000000000000000", "--num-workers"),
        ("calibration.py", "--output-dir {bad}/run", "--output-dir.*another program's run"),
        ("calibration.py", "--output-dir {bad}/nowhere-link", "--output-dir.*link"),
        ("calibration.py", "--dataset-name " + "n" * 300, "--dataset-name"),
        ("alpha_search.py", "--seeds 0 1 2", "--seeds"),
        ("alpha_search.py", "--lr-points 100000000", "--lr-points"),
        ("alpha_search.py", "--storage sqlite://", "--storage"),
        ("alpha_search.py", "--storage journal:{bad}/afile", "--storage.*no journal"),
        ("domain_adaptation.py", "--targets digits", "--targets"),
        ("domain_adaptation.py", "--model-name vit_tiny_patch16_224", "--image-size"),
        ("domain_adaptation.py", "--model-name vgg11 --image-size 32", "--methods.*bn"),
        ("domain_adaptation.py", "--output-dir {bad}/run", "--output-dir.*another program's run"),
        ("prepare.py", "--verify --label-column x", "--label-column"),
        ("prepare.py", "--dataset-name {bad}/oneclass --output-dir {bad}/oneclass/out", "--output-dir"),
        ("text_classification.py", "--dataset-config x", "--dataset-config"),
        ("language_modeling.py", "--dataset-config x", "--dataset-config"),
        ("language_modeling.py", "--optim adafactor --optim-args x=1", "--optim-args"),
        ("imagenet.py", "--optim powergrad_adamw --optim-args momentum=0.9", "--optim-args.*momentum"),
        ("imagenet.py", "--schedule step --decay-epochs 60 30", "--decay-epochs"),
        ("evaluate_images.py", "--output {bad}/notes.docx", "--output.*json"),
        # near what is meant
        ("imagenet.py", "--dataset-name Digits", "--dataset-name.*near: digits"),
        ("text_classification.py", "--dataset-name docstring", "--dataset-name.*near: docstrings"),
        ("language_modeling.py", "--dataset-name stdlibs", "--dataset-name.*near: stdlib"),
    ]
    for program, text, named in rows:
        words, small = text.replace("{bad}", str(bad)).split(), SMALL.get(program, ())
        small = small[1:] if words[0] == "--model" else small  # given before the flags as a rule
        yield Command(program, (*small, *words), (named,), "", "broken" in words[-1])
    diverges = {  # which training alone can show
        "calibration.py": "--smoke --max-train-samples 128 --learning-rate 1e6 --epochs 3",
        "finetune.py": "--smoke --learning-rate 1e6 --optim powergrad_sgd",
        "text_classification.py": "--smoke --learning-rate 1e6 --optim powergrad_sgd --max-grad-norm 0 --max-steps 30",
        "language_modeling.py": "--smoke --learning-rate 1e6 --optim sgd --max-grad-norm 0",
    }
    for program, text in diverges.items():
        yield Command(program, tuple(text.split()), ("learning.rate",), "", late=True)
    tool = [
        ("push {bad}/empty", "empty"), ("push {bad}/run --repo-id -x/y", "repo-id"),
        ("export {bad}/brokenmodel t", "brokenmodel|config"),
        ("export {bad}/run t --license not-a-licence", "license"),
        ("export {bad}/run t --repo-id a/b/c", "repo"), ("export {bad}/run {bad}/run", "target|run"),
        ("export {bad}/run {bad}/oneclass", "target"),
        ("export {bad}/nowhere t", "nowhere"), ("export {bad}/run {bad}/afile", "afile"), ("export", "RUN"),
        ("report {bad}/nowhere", "nowhere"), ("report {bad}/run --mistakes -1", "mistakes"),
        ("report {bad}/run --mistakes x", "mistakes"), ("report {bad}/run --max-images 0", "max"),
        ("plot {bad}/badstate", "badstate"), ("plot {bad}/badnpz", "badnpz"), ("plot {bad}/nowhere", "nowhere"),
        ("plot", "RUN"), ("predict {bad}/run {bad}/afile", "afile"), ("predict {bad}/run nowhere.png", "nowhere.png"),
        ("predict {bad}/run {bad}/afile --top 0", "top"), ("predict {bad}/run {bad}/empty", "image|empty"),
        ("predict {bad}/nowhere {bad}/afile", "nowhere"), ("nonesuch", "nonesuch"), ("push --flod x", "flod"),
        ("pull", "REPO"), ("pull a/b/c out", "a/b/c"), ("pull nobody/nothing out --checkpoint ../x", "checkpoint"),
        ("predict {bad}/run {bad}/afile --picture /dev/null/x.png", "picture|afile"), ("info x", "x"),
        ("presets --x", "--x"), ("presets resnet50", "resnet50"), ("predict {bad}/run x --top 1 --top 2", "top"),
        ("predict {bad}/run x --top 1.5", "top"), ("predict {bad}/run {bad}/afile --picture x.xyz", "picture"),
        ("predict {bad}/run {bad}/afile --picture x", "picture"), ("push {bad}/run --repo-id=", "repo-id"),
        ("export {bad}/run t --base-model a/b/c", "base.model"), ("export {bad}/run t --fold", "fold|alpha"),
        ("export {bad}/run t --no-ema --ema", "ema"), ("report {bad}/run --dataset-name nope/nope", "nope/nope"),
        ("report {bad}/run --dataset-name {bad}/oneclass", "oneclass|class"), ("plot {bad}/run", "run"),
        ("predict {bad}/run {bad}/badweights.pth", "badweights"), ("push {bad}/run --message=", "message"),
    ]  # fmt: skip
    for text, named in tool:
        yield Command("pgt-hf", tuple(text.replace("{bad}", str(bad)).split()), (named,), "")


def _bad_files(folder: Path) -> Path:
    """Files and folders that are wrong in one way each, as their names say."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "empty",
        "textonly",
        "oneclass/only",
        "broken/a",
        "broken/b",
        "brokenmodel",
        "badstate",
        "badnpz",
        "run",
        "checkpoint-5",
        "textrun",
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, text in {
        "afile": "not a folder", "notes.docx": "not a table", "badjson.json": "{'arguments': 1", "noargs.json": "{}",
        "argslist.json": '{"arguments": [1, 2]}', "wrongtypes.json": '{"arguments": {"num_train_epochs": "many"}}',
        "badpreset.json": '{"arguments": {"preset": "resnet51"}}', "header.csv": "image,label\n", "empty.csv": "",
        "unknown.json": '{"arguments": {"nonesuch": 1}}', "textonly/train.csv": "text\nhello\n",
        "tiny.txt": "a\n", "text_one.csv": "text,label\n" + "good,1\n" * 20, "badweights.pth": "garbage",
        "badweights.safetensors": "garbage", "brokenmodel/config.json": "{'a'", "badstate/trainer_state.json": "{'a'",
        "badnpz/diagnostics.npz": "garbage", "outside.csv": "image,label\n" + "/etc/hostname,a\n/etc/hosts,b\n" * 9,
        "checkpoint-5/trainer_state.json": "{}", "textrun/config.json": '{"model_type": "bert"}',
    }.items():  # fmt: skip
        (folder / name).write_text(text, encoding="utf-8")
    for i in range(12):
        Image.new("L", (8, 8), 10 * i).save(folder / "oneclass" / "only" / f"{i}.png")
        for kind in ("a", "b"):
            (folder / "broken" / kind / f"{i}.png").write_bytes(b"no image")
    if not (folder / "nowhere-link").is_symlink():
        (folder / "nowhere-link").symlink_to("nowhere")
    (folder / "run" / "run.json").write_text(json.dumps({"arguments": {"dataset_name": "digits"}}), encoding="utf-8")
    if not (folder / "run" / "model.safetensors").exists():
        from pgt_hf.images import create_model

        create_model("resnet10t", [str(i) for i in range(10)], image_size=32).save_pretrained(folder / "run")
    return folder
