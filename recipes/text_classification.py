"""Train a text classifier with the PowerGrad Transform: any encoder, on any text with one class each.

    accelerate launch recipes/text_classification.py                                  # fancyzhx/ag_news, DistilBERT
    accelerate launch recipes/text_classification.py --dataset-name reviews.csv --text-column body --label-column stars
    accelerate launch recipes/text_classification.py --model-name path/to/encoder --learning-rate 5e-5 --alpha 0.5
    accelerate launch recipes/text_classification.py --smoke                          # a minute, no download

``--help`` lists every option; those of ``transformers.TrainingArguments`` are among them. docs/text.md says what to
expect.
"""

import shlex
import sys
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments
from pgt_hf.analysis import ClassificationMetrics
from pgt_hf.runs import RunFolder, command_line, describe_data
from pgt_hf.text import DOCSTRINGS, load_labelled_text, train_tokenizer

SCRATCH = "scratch"
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/text",
    "alpha": 0.25,
    "optim": "powergrad_adamw",
    "learning_rate": 5e-5,
    "weight_decay": 0.01,
    "warmup_steps": 0.06,  # a share of all steps
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 20,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}
SMOKE: dict[str, Any] = {
    "dataset_name": DOCSTRINGS,
    "model_name": SCRATCH,
    "max_train_samples": 1600,
    "max_eval_samples": 101,
    "max_length": 32,
    "num_train_epochs": 4,
    "learning_rate": 3e-3,
    "logging_steps": 10,
}


@dataclass
class TextArguments:
    model_name: str = field(
        default="distilbert/distilbert-base-uncased",
        metadata={"help": "An encoder: Hub id or folder; 'scratch' is a small BERT with a tokenizer of its own."},
    )
    dataset_name: str = field(
        default="fancyzhx/ag_news",
        metadata={"help": "Hub id, CSV, JSON or Parquet file, a folder of such, or 'docstrings', which is embedded."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The Hub data set's configuration, if any."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, if not found by itself."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes, if not found by itself."})
    max_length: int = field(default=128, metadata={"help": "Tokens of each text that are read."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many texts only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many texts only."})
    smoke: bool = field(default=False, metadata={"help": "A few steps on docstrings, to see that everything works."})


def main() -> None:
    text_args, args = parse()
    set_seed(args.seed)
    try:
        with args.main_process_first(desc="loading the text"):
            dataset = load_labelled_text(
                text_args.dataset_name,
                text_args.dataset_config,
                text_column=text_args.text_column,
                label_column=text_args.label_column,
                max_train_samples=text_args.max_train_samples,
                max_eval_samples=text_args.max_eval_samples,
                seed=args.seed,
            )
        names = dataset["train"].features["label"].names
        model, tokenizer = build(text_args.model_name, names, dataset["train"]["text"])
        # These models take **kwargs and average over their own batch all the same; told otherwise, Trainer would
        # multiply the loss and its gradient by the number of processes, and by the accumulation steps.
        model.accepts_loss_kwargs = False
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        return tokenizer(batch["text"], truncation=True, max_length=text_args.max_length) | {"labels": batch["label"]}

    with args.main_process_first(desc="tokenizing"):
        tokens = dataset.map(tokenize, batched=True, remove_columns=["text", "label"])
    metrics = ClassificationMetrics(alpha=args.alpha, top_k=min(5, len(names)))
    description = {
        "arguments": asdict(text_args) | {key: getattr(args, key) for key in DEFAULTS},
        "data": describe_data(text_args.dataset_name, dataset),
        "seed": args.seed,
    }
    record = RunFolder(args.output_dir, description, f"{text_args.dataset_name}, alpha = {args.alpha}")
    trainer = PowerGradTrainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess,
        callbacks=[record],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    results = trainer.evaluate()
    if trainer.is_world_process_zero():
        report = {
            "model": text_args.model_name,
            "dataset": text_args.dataset_name,
            "train_texts": dataset["train"].num_rows,
            "eval_texts": dataset["validation"].num_rows,
            **{key.removeprefix("eval_"): value for key, value in results.items()},
            "alpha": args.alpha,
            "learning_rate": args.learning_rate,
            "seed": args.seed,
            "steps": trainer.state.global_step,
            "world_size": args.world_size,
        }
        record.finish(report)
        tell(report, args.output_dir)
    trainer.end()


def parse() -> tuple[TextArguments, PowerGradTrainingArguments]:
    parser = HfArgumentParser((TextArguments, PowerGradTrainingArguments), description=__doc__)
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--smoke", action="store_true")
    parser.set_defaults(**DEFAULTS | (SMOKE if first.parse_known_args()[0].smoke else {}))
    try:
        text_args, args = parser.parse_args_into_dataclasses()
    except (TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    return text_args, args


def build(model_name: str, names: list[str], texts: Any) -> tuple[Any, Any]:
    """The classifier and its tokenizer; the names of the classes go into the config, for pipelines."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    if model_name != SCRATCH:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        model = AutoModelForSequenceClassification.from_pretrained(
            model_name, num_labels=len(names), ignore_mismatched_sizes=True, **labels
        )
        return model, tokenizer
    tokenizer = train_tokenizer(texts, vocab_size=4096)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        **labels,
    )
    return BertForSequenceClassification(config), tokenizer


def tell(report: dict[str, Any], output_dir: str) -> None:
    print(f"\n{report['model']} on {report['dataset']}, {report['eval_texts']:,} evaluation texts")
    for key in ("top1", "nll", "ece", "nll_folded", "ece_folded"):
        if key in report:
            print(f"  {key:12}{format(report[key], '.2%' if key == 'top1' else '.4f'):>9}")
    same, where = command_line(), shlex.quote(output_dir)
    print(f"""
Written to {output_dir}
  metrics.json         these numbers, and what they were made with
  run.json             arguments, code, data, seed, environment
  training_curve.png   loss and accuracy, where it was evaluated while it trained
  model.safetensors    the model, with its tokenizer: pipeline("text-classification", model={output_dir!r}) reads it

What next
  compare    accelerate launch {same} --alpha 1 --output-dir {shlex.quote(output_dir + "-plain")}
  folded     nll_folded and ece_folded are those after pgt_hf.fold_powergrad(model, {report["alpha"]})
  publish    hf upload <you>/<name of the model> {where} . --exclude "checkpoint-*"
""")


if __name__ == "__main__":
    main()
