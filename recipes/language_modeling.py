"""Train a small causal language model from scratch with the PowerGrad Transform.

    accelerate launch recipes/language_modeling.py                            # Salesforce/wikitext from the Hub
    accelerate launch recipes/language_modeling.py --dataset-name stdlib      # Python's own source, no download
    accelerate launch recipes/language_modeling.py --dataset-name book.txt --vocab-size 50257
    accelerate launch recipes/language_modeling.py --smoke                    # a minute, no download

With a large vocabulary the loss comes from ``powergrad_linear_cross_entropy``, which keeps no logits. Its value, the
``loss`` of the logs, is that of the folded model, ``CE(alpha z)``; the evaluation reports the perplexity of the model
as it is and of the folded one. ``--help`` lists every option; docs/text.md says what to expect.
"""

import math
import shlex
import sys
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from transformers import AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, set_seed
from transformers.modeling_outputs import CausalLMOutputWithPast

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments, fold_powergrad, powergrad_linear_cross_entropy
from pgt_hf.runs import RunFolder, command_line, describe_data
from pgt_hf.text import STDLIB, load_plain_text, train_tokenizer

LARGE_VOCABULARY = 32768
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/language",
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
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 20,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
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
    dataset_name: str = field(
        default="Salesforce/wikitext",
        metadata={"help": "Hub id, file (txt, json, csv, parquet), folder of such, or 'stdlib': Python's own source."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The Hub data set's configuration."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, if not found by itself."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a tokenizer; by default one is trained on the text."}
    )
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the tokenizer that is trained."})
    block_size: int = field(default=256, metadata={"help": "Tokens that the model sees at a time."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    layers: int = field(default=4, metadata={"help": "Depth of the model; a head for each 32 of its width."})
    fused_loss: bool | None = field(
        default=None, metadata={"help": "Keep no logits; by default for vocabularies of 32,768 and more."}
    )
    max_train_documents: int | None = field(default=None, metadata={"help": "Train on so many documents only."})
    max_eval_documents: int | None = field(default=None, metadata={"help": "Evaluate on so many documents only."})
    smoke: bool = field(default=False, metadata={"help": "A few steps on stdlib, to see that everything works."})


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
    language_args, args = parse()
    set_seed(args.seed)
    try:
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
                tokenizer = AutoTokenizer.from_pretrained(language_args.tokenizer_name)
            else:
                tokenizer = train_tokenizer(dataset["train"]["text"], language_args.vocab_size)
            blocks = cut(dataset, tokenizer, language_args.block_size)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    fused = len(tokenizer) >= LARGE_VOCABULARY if language_args.fused_loss is None else language_args.fused_loss
    if fused and args.optim.startswith("powergrad_"):
        sys.exit(f"error: the fused loss brings PGT with it; --optim must be a plain optimizer, got {args.optim!r}")
    model = build(FusedLossLlama if fused else LlamaForCausalLM, language_args, len(tokenizer), args.alpha)
    description = {
        "arguments": asdict(language_args) | {key: getattr(args, key) for key in DEFAULTS},
        "data": describe_data(language_args.dataset_name, dataset),
        "seed": args.seed,
    }
    record = RunFolder(args.output_dir, description, f"{language_args.dataset_name}, alpha = {args.alpha}")
    trainer = (Trainer if fused else PowerGradTrainer)(
        model,
        args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=stack,
        callbacks=[record],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    model.__class__ = LlamaForCausalLM  # trained: from here on, and on disk, a Llama as any other
    trainer.save_model()

    loss = trainer.evaluate()["eval_loss"]
    folded = loss
    if args.alpha > 0:
        fold_powergrad(trainer.accelerator.unwrap_model(trainer.model), args.alpha)
        folded = trainer.evaluate(metric_key_prefix="folded")["folded_loss"]
    if trainer.is_world_process_zero():
        report = {
            "dataset": language_args.dataset_name,
            "train_tokens": blocks["train"].num_rows * language_args.block_size,
            "eval_tokens": blocks["validation"].num_rows * language_args.block_size,
            "vocabulary": len(tokenizer),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "fused_loss": fused,
            "perplexity": math.exp(loss),
            "perplexity_folded": math.exp(folded),
            "alpha": args.alpha,
            "learning_rate": args.learning_rate,
            "seed": args.seed,
            "steps": trainer.state.global_step,
            "world_size": args.world_size,
        }
        record.finish(report)
        tell(report, args.output_dir)
    trainer.end()


def parse() -> tuple[LanguageArguments, PowerGradTrainingArguments]:
    parser = HfArgumentParser((LanguageArguments, PowerGradTrainingArguments), description=__doc__)
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--smoke", action="store_true")
    parser.set_defaults(**DEFAULTS | (SMOKE if first.parse_known_args()[0].smoke else {}))
    try:
        language_args, args = parser.parse_args_into_dataclasses()
    except (TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    if language_args.dataset_name == LanguageArguments.dataset_name and language_args.dataset_config is None:
        language_args.dataset_config = "wikitext-103-raw-v1"
    return language_args, args


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


def tell(report: dict[str, Any], output_dir: str) -> None:
    print(f"\n{report['parameters']:,} parameters, {report['vocabulary']:,} words, on {report['dataset']}")
    for key in ("perplexity", "perplexity_folded"):
        print(f"  {key:20}{report[key]:>12,.2f}")
    same, where = command_line(), shlex.quote(output_dir)
    print(f"""
Written to {output_dir}
  metrics.json         these numbers, and what they were made with
  run.json             arguments, code, data, seed, environment
  model.safetensors    the model as it was trained, with its tokenizer: AutoModelForCausalLM reads it

What next
  use        pgt_hf.fold_powergrad(model, {report["alpha"]}) gives the model of perplexity_folded
  compare    accelerate launch {same} --alpha 1 --output-dir {shlex.quote(output_dir + "-plain")}
  publish    hf upload <you>/<name of the model> {where} . --exclude "checkpoint-*"
""")


if __name__ == "__main__":
    main()
