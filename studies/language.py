"""Python's standard library as tokens in memory; ``Text`` is a small language model trained and measured on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pgt_hf.text import STDLIB, load_plain_text, train_tokenizer

from .settings import Setting, TextScale
from .train import in_bfloat16

__all__ = ["Text", "read"]

HEAD_SIZE = 32
PROBE = 256  # sequences of a split, or some more, that a measurement takes: evenly over its documents


def read(scale: TextScale, device: str = "cpu") -> dict[str, Tensor]:
    """Token numbers, (sequences, context): splits "train", "select" (for the search) and "test" (for the tables)."""
    splits = load_plain_text(STDLIB)
    texts = {"train": splits["train"]["text"]}
    texts["select"], texts["test"] = splits["validation"]["text"][::2], splits["validation"]["text"][1::2]
    tokenizer = train_tokenizer(texts["train"], scale.vocabulary)
    found = {}
    for name, documents in texts.items():
        tokens = torch.tensor([token for ids in tokenizer(list(documents))["input_ids"] for token in ids])
        found[name] = tokens[: len(tokens) // scale.context * scale.context].view(-1, scale.context).to(device)
    return found


@dataclass(frozen=True)
class Text:
    """The task of a scale of text.

    Args:
        scale: The scale.
        splits: As ``read`` gives them.
    """

    scale: TextScale
    splits: dict[str, Tensor]

    @property
    def device(self) -> str:
        return self.splits["train"].device.type

    def create(self, setting: Setting) -> nn.Module:
        """A new Llama with the scale's width and depth."""
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.scale.vocabulary,
                hidden_size=self.scale.width,
                intermediate_size=4 * self.scale.width,
                num_hidden_layers=self.scale.layers,
                num_attention_heads=self.scale.width // HEAD_SIZE,
                max_position_embeddings=self.scale.context,
            )
        )

    def epoch_steps(self, setting: Setting) -> int:
        """As the scale has them."""
        return self.scale.epoch_steps

    def losses(self, model: nn.Module, setting: Setting, seed: int, epoch: int) -> Iterator[Tensor]:
        """Cross-entropy of the next token, on sequences drawn at random."""
        draws = np.random.default_rng((seed, epoch))
        sequences = self.splits["train"]
        for _ in range(self.scale.epoch_steps):
            index = torch.from_numpy(draws.integers(0, len(sequences), setting.batch)).to(sequences.device)
            yield self._loss(model, sequences[index])

    def _loss(self, model: nn.Module, tokens: Tensor, factor: float = 1.0) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=in_bfloat16(self.device)):
            logits = model(input_ids=tokens[:, :-1]).logits
        return nn.functional.cross_entropy(factor * logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, split: str, factor: float) -> float:
        sequences = self.splits[split]
        parts = sequences[:: len(sequences) // PROBE or 1].split(64)
        return sum(self._loss(model, part, factor).item() * len(part) for part in parts) / sum(map(len, parts))

    def score(self, model: nn.Module, setting: Setting) -> float:
        """One over the perplexity of the folded model, on the text of the search."""
        return float(np.exp(-self._evaluate(model, "select", setting.alpha)))

    def measure(self, model: nn.Module, head: nn.Module, setting: Setting) -> dict[str, Any]:
        """Losses of the folded model and of the raw one."""
        found = {f"{name}_loss": self._evaluate(model, name, setting.alpha) for name in self.splits}
        return found | {"raw_test_loss": self._evaluate(model, "test", 1.0), "head_norm": head.weight.norm().item()}
