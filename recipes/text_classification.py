"""Train a text classifier with the PowerGrad Transform: any encoder, on any text with one class each.

    accelerate launch recipes/text_classification.py                                  # fancyzhx/ag_news, DistilBERT
    accelerate launch recipes/text_classification.py --dataset-name reviews.csv --text-column body --label-column stars
    accelerate launch recipes/text_classification.py --model-name path/to/encoder --learning-rate 5e-5 --alpha 0.5
    accelerate launch recipes/text_classification.py --smoke                          # a minute, no download

``--help`` lists the options, ``--help-all`` also the rest of ``transformers.TrainingArguments``. docs/text.md says
what to expect.
"""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
)

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments
from pgt_hf.analysis import ClassificationMetrics
from pgt_hf.limits import Count, DataSet, ModelName, Whole
from pgt_hf.programs import TRAINING_DEFAULTS, RunArguments, begin, errors_in_one_line, next_commands, parse, tell
from pgt_hf.runs import RunFolder, command, describe_data
from pgt_hf.text import DOCSTRINGS, load_labelled_text, train_tokenizer
from pgt_hf.trainer import AtomicCheckpoints, DivergenceCallback, StopOnSigterm

SCRATCH = "scratch"
DEFAULTS: dict[str, Any] = TRAINING_DEFAULTS | {
    "output_dir": "runs/text",
    "alpha": 0.25,
    "optim": "powergrad_adamw",
    "learning_rate": 5e-5,
    "weight_decay": 0.01,
    "warmup_steps": 0.06,  # a share of all steps
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
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


SHOWN = ("top1", "nll", "ece", "nll_folded", "ece_folded", "seconds")


class TextTrainer(AtomicCheckpoints, PowerGradTrainer):
    """Its checkpoints are there as a whole or not at all."""


@dataclass
class TextArguments:
    model_name: Annotated[str, ModelName(("scratch",))] = field(
        default="distilbert/distilbert-base-uncased",
        metadata={"help": "An encoder: Hub id or folder; 'scratch' is a small BERT with a tokenizer of its own."},
    )
    dataset_name: Annotated[str, DataSet((DOCSTRINGS,))] = field(
        default="fancyzhx/ag_news",
        metadata={"help": "Hub id, CSV, JSON or Parquet file, a folder of such, or 'docstrings', which is embedded."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The Hub data set's configuration, if any."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, if it is not detected."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes, if it is not detected."})
    max_length: Annotated[int, Whole("[3, 1000000]")] = field(
        default=128, metadata={"help": "Tokens of each text that are read."}
    )
    max_train_samples: Count | None = field(default=None, metadata={"help": "Train on so many texts only."})
    max_eval_samples: Count | None = field(default=None, metadata={"help": "Evaluate on so many texts only."})


def main() -> None:
    # parse
    stop = StopOnSigterm().listen()
    text_args, run_args, args, config = parse(
        TextArguments, RunArguments, PowerGradTrainingArguments, description=__doc__, defaults=DEFAULTS, smoke=SMOKE
    )
    resume = begin(args, run_args.resume)

    # build
    with errors_in_one_line():
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
        if len(names) < 2:
            raise ValueError(f"dataset_name must have at least 2 classes, got {names} in {text_args.dataset_name!r}")
        model, tokenizer = build(text_args.model_name, names, dataset["train"]["text"])
        # These models take **kwargs and average over their own batch all the same; told otherwise, Trainer would
        # multiply the loss and its gradient by the number of processes, and by the accumulation steps.
        model.accepts_loss_kwargs = False
        longest = getattr(model.config, "max_position_embeddings", text_args.max_length)
        if text_args.max_length > longest:
            raise ValueError(f"max_length must be at most {longest}, what the model reads, got {text_args.max_length}")

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        return tokenizer(batch["text"], truncation=True, max_length=text_args.max_length) | {"labels": batch["label"]}

    with errors_in_one_line(), args.main_process_first(desc="tokenizing"):
        tokens = dataset.map(tokenize, batched=True, remove_columns=["text", "label"])
    metrics = ClassificationMetrics(alpha=args.alpha, top_k=min(5, len(names)))
    description = {"arguments": config, "data": describe_data(text_args.dataset_name, dataset), "seed": args.seed}
    record = RunFolder(args.output_dir, description, f"{text_args.dataset_name}, alpha = {args.alpha}")
    with errors_in_one_line():
        record.check_resume(resume, run_args.allow_changed_data)
        guard = DivergenceCallback()
        trainer = TextTrainer(
            model,
            args,
            train_dataset=tokens["train"],
            eval_dataset=tokens["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.preprocess,
            callbacks=[record, stop, guard],
        )

    # train
    trainer.train(resume_from_checkpoint=resume)
    stop.leave(trainer)
    guard.leave(trainer)
    trainer.save_model()
    results = trainer.evaluate()

    # report
    if trainer.is_world_process_zero():
        texts = {
            f"{key}_texts": dataset[split].num_rows for key, split in (("train", "train"), ("eval", "validation"))
        }
        say(record.finish(trainer, results, model=text_args.model_name, **texts), args)
    trainer.end()


def build(model_name: str, names: list[str], texts: Any) -> tuple[Any, Any]:
    """The classifier and its tokenizer; the names of the classes go into the config, for pipelines."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    if model_name != SCRATCH:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_name)
            model = AutoModelForSequenceClassification.from_pretrained(
                model_name, num_labels=len(names), ignore_mismatched_sizes=True, **labels
            )
        except Exception as error:  # a damaged file raises anything
            raise OSError(f"model_name must be an encoder that can be read, got {model_name!r}: {error}") from error
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
        eos_token_id=tokenizer.eos_token_id,
        **labels,
    )
    return BertForSequenceClassification(config), tokenizer


def say(summary: dict[str, Any], args: PowerGradTrainingArguments) -> None:
    heading = f"{summary['model']} on {summary['dataset']}, {summary['eval_texts']:,} evaluation texts"
    classify = f'transformers.pipeline("text-classification", {json.dumps(args.output_dir)})("some text")'
    then = {"use": command("python", "-c", f"import transformers; print({classify})")} | next_commands(args)
    tell(heading, {key: summary.get(key) for key in SHOWN}, args.output_dir, then)


if __name__ == "__main__":
    main()
