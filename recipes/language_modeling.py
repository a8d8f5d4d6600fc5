"""Train a small causal language model from scratch with the PowerGrad Transform.

    accelerate launch recipes/language_modeling.py                            # Salesforce/wikitext from the Hub
    accelerate launch recipes/language_modeling.py --dataset-name stdlib      # Python's own source, no download
    accelerate launch recipes/language_modeling.py --dataset-name book.txt --vocab-size 50257
    accelerate launch recipes/language_modeling.py --smoke                    # a minute, no download

With a large vocabulary the loss comes from ``powergrad_linear_cross_entropy``, which keeps no logits. Its value, the
``loss`` of the logs, is that of the folded model, ``CE(alpha z)``; the evaluation reports the perplexity of the model
as it is and of the folded one. ``--help`` lists the options; docs/text.md says what to expect.
"""

import math
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments, fold_powergrad, powergrad_linear_cross_entropy
from pgt_hf.limits import Count, DataSet, ModelName, Whole
from pgt_hf.programs import TRAINING_DEFAULTS, RunArguments, begin, errors_in_one_line, next_commands, parse, tell
from pgt_hf.runs import RunFolder, describe_data
from pgt_hf.text import STDLIB, load_plain_text, train_tokenizer
from pgt_hf.trainer import AtomicCheckpoints, DivergenceCallback, StopOnSigterm

LARGE_VOCABULARY = 32768
DEFAULTS: dict[str, Any] = TRAINING_DEFAULTS | {
    "output_dir": "runs/language",
    "eval_strategy": "no",
    "alpha": 0.5,
    "optim": "adamw_torch",
    "learning_rate": 6e-4,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "warmup_steps": 0.02,  # a share of all steps
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
}
SMOKE: dict[str, Any] = {
    "dataset_name": STDLIB,
    "max_train_documents": 30,
    "max_eval_documents": 2,
    "vocab_size": 1024,
    "block_size": 64,
    "hidden_size": 64,
    "layers": 2,
    "max_steps": 40,
    "learning_rate": 3e-3,
    "logging_steps": 10,
}


@dataclass
class LanguageArguments:
    dataset_name: Annotated[str, DataSet((STDLIB,))] = field(
        default="Salesforce/wikitext",
        metadata={"help": "Hub id, file (txt, json, csv, parquet), folder of such, or 'stdlib': Python's own source."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The Hub data set's configuration."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, if it is not detected."})
    tokenizer_name: Annotated[str | None, ModelName()] = field(
        default=None, metadata={"help": "Hub id or folder of a tokenizer; by default one is trained on the text."}
    )
    vocab_size: Annotated[int, Whole("[259, 10000000]")] = field(
        default=8192, metadata={"help": "Tokens of the tokenizer that is trained."}
    )
    block_size: Annotated[int, Whole("[2, 1000000]")] = field(
        default=256, metadata={"help": "Tokens that the model sees at a time."}
    )
    hidden_size: Annotated[int, Whole("[2, 100000]")] = field(default=256, metadata={"help": "Width of the model."})
    layers: Annotated[int, Whole("[1, 1000]")] = field(
        default=4, metadata={"help": "Depth of the model; a head for each 32 of its width."}
    )
    fused_loss: bool | None = field(
        default=None, metadata={"help": "Keep no logits; by default for vocabularies of 32,768 and more."}
    )
    max_train_documents: Count | None = field(default=None, metadata={"help": "Train on so many documents only."})
    max_eval_documents: Count | None = field(default=None, metadata={"help": "Evaluate on so many documents only."})


class LanguageTrainer(AtomicCheckpoints, PowerGradTrainer):
    """Its checkpoints are there as a whole or not at all."""


class PlainTrainer(AtomicCheckpoints, Trainer):
    """The same, for a loss that brings PGT with it."""


class FusedLossLlama(LlamaForCausalLM):
    """Llama whose training loss is PGT's, without the logits; its evaluation is as before."""

    alpha = 1.0
    accepts_loss_kwargs = False  # the mean over a batch, whose blocks are all of one length: Trainer does the rest

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        if not self.training or labels is None:
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        return CausalLMOutputWithPast(
            loss=powergrad_linear_cross_entropy(hidden, self.lm_head.weight, targets, alpha=self.alpha)
        )


def main() -> None:
    # parse
    stop = StopOnSigterm().listen()
    language_args, run_args, args, config = parse(
        LanguageArguments, RunArguments, PowerGradTrainingArguments,
        description=__doc__, defaults=DEFAULTS, smoke=SMOKE, adjust=check,
    )  # fmt: skip
    resume = begin(args, run_args.resume)

    # build
    with errors_in_one_line():
        with args.main_process_first(desc="loading the text"):
            dataset = load_plain_text(
                language_args.dataset_name,
                language_args.dataset_config,
                text_column=language_args.text_column,
                seed=args.seed,
            )
            limits = {"train": language_args.max_train_documents, "validation": language_args.max_eval_documents}
            for split, limit in limits.items():
                dataset[split] = dataset[split].select(range(min(limit or sys.maxsize, dataset[split].num_rows)))
            if language_args.tokenizer_name:
                name = language_args.tokenizer_name
                try:
                    tokenizer = AutoTokenizer.from_pretrained(name)
                except Exception as error:  # a damaged file raises anything
                    raise OSError(f"tokenizer_name must be one that can be read, got {name!r}: {error}") from error
            else:
                tokenizer = train_tokenizer(dataset["train"]["text"], language_args.vocab_size)
            blocks = cut(dataset, tokenizer, language_args.block_size)
        fused = len(tokenizer) >= LARGE_VOCABULARY if language_args.fused_loss is None else language_args.fused_loss
        if fused and args.optim.startswith("powergrad_"):
            raise ValueError(
                f"the fused loss brings PGT with it; --optim must be a plain optimizer, got {args.optim!r}"
            )
    model = build(FusedLossLlama if fused else LlamaForCausalLM, language_args, len(tokenizer), args.alpha)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    description = {"arguments": config, "data": describe_data(language_args.dataset_name, dataset), "seed": args.seed}
    record = RunFolder(args.output_dir, description, f"{language_args.dataset_name}, alpha = {args.alpha}")
    with errors_in_one_line():
        record.check_resume(resume, run_args.allow_changed_data)
        guard = DivergenceCallback()
        trainer = (PlainTrainer if fused else LanguageTrainer)(
            model,
            args,
            train_dataset=blocks["train"],
            eval_dataset=blocks["validation"],
            processing_class=tokenizer,
            data_collator=stack,
            callbacks=[record, stop, guard],
        )

    # train
    trainer.train(resume_from_checkpoint=resume)
    stop.leave(trainer)
    guard.leave(trainer)
    model.__class__ = LlamaForCausalLM  # trained: from here on, and on disk, a Llama as any other
    trainer.save_model()

    loss = trainer.evaluate()["eval_loss"]
    folded = loss
    if args.alpha > 0:
        fold_powergrad(trainer.accelerator.unwrap_model(trainer.model), args.alpha)
        folded = trainer.evaluate(metric_key_prefix="folded")["folded_loss"]

    # report
    if trainer.is_world_process_zero():
        tokens = {
            f"{key}_tokens": blocks[split].num_rows * language_args.block_size
            for key, split in (("train", "train"), ("eval", "validation"))
        }
        more = {"vocabulary": len(tokenizer), "parameters": sum(parameter.numel() for parameter in model.parameters())}
        more |= {"fused_loss": fused, "perplexity": perplexity(loss), "perplexity_folded": perplexity(folded)}
        say(record.finish(trainer, {}, **tokens, **more), args)
    trainer.end()


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def check(settings: Namespace, given: set[str]) -> None:
    if settings.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ValueError(f"metric_for_best_model must be loss, got {settings.metric_for_best_model!r}")
    heads = max(1, settings.hidden_size // 32)
    if settings.hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size must be a multiple of {2 * heads}, for its {heads} heads, got {settings.hidden_size}"
        )
    if "vocab_size" in given and settings.tokenizer_name:
        raise ValueError(f"vocab_size must be left out with tokenizer_name, got {settings.vocab_size}")
    if settings.dataset_name == LanguageArguments.dataset_name and settings.dataset_config is None:
        settings.dataset_config = "wikitext-103-raw-v1"


def cut(dataset: Any, tokenizer: Any, size: int) -> Any:
    """The documents in a row, cut into blocks of ``size`` tokens; what fills no block is left out."""

    def blocks(batch: dict[str, Any]) -> dict[str, Any]:
        numbers = tokenizer(batch["text"], return_attention_mask=False)["input_ids"]
        tokens = list(chain.from_iterable(numbers))
        return {"input_ids": [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]}

    cut = dataset.map(blocks, batched=True, remove_columns=["text"])
    for split in cut:
        if not cut[split].num_rows:
            raise ValueError(f"the text of {split!r} fills no block of {size} tokens")
    return cut


def stack(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": tokens, "labels": tokens}


def build(kind: type[Any], language_args: LanguageArguments, vocabulary: int, alpha: float) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=language_args.hidden_size,
        intermediate_size=4 * language_args.hidden_size,
        num_hidden_layers=language_args.layers,
        num_attention_heads=max(1, language_args.hidden_size // 32),
        max_position_embeddings=language_args.block_size,
        tie_word_embeddings=False,  # so that the head can be folded
        use_cache=False,
    )
    model = kind(config)
    model.alpha = alpha
    return model


def say(summary: dict[str, Any], args: PowerGradTrainingArguments) -> None:
    heading = f"{summary['parameters']:,} parameters, {summary['vocabulary']:,} words, on {summary['dataset']}"
    results = {key: summary[key] for key in ("perplexity", "perplexity_folded", "seconds")}
    tell(heading, results, args.output_dir, next_commands(args))


if __name__ == "__main__":
    main()
