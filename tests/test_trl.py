"""TRL's SFTTrainer with ``optim="powergrad_adamw"``: it makes no logits, and says so; given them, PGT is exact."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from reference import powergrad_gradient
from transformers import Trainer

from pgt_hf import attach_powergrad
from pgt_hf.text import train_tokenizer

trl = pytest.importorskip("trl")

ALPHA = 0.3
LR = 0.1
TEXTS = [f"def plus_{i}(x): return x + {i}" for i in range(8)]


class LogitsSFTTrainer(trl.SFTTrainer):
    """As in docs/text.md."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def trainer(kind, path, optim="powergrad_adamw", **options):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    args = trl.SFTConfig(
        str(path), optim=optim, optim_args=f"alpha={ALPHA}", learning_rate=LR, weight_decay=0.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", logging_steps=1, report_to="none", use_cpu=True, bf16=False, max_length=32,
        gradient_checkpointing=False, disable_tqdm=True, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return kind(model, args=args, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer)


def handle_of(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer).powergrad


def test_its_fused_loss_is_refused_rather_than_trained_without_pgt(tmp_path):
    sft = trainer(trl.SFTTrainer, tmp_path, max_steps=1)
    with pytest.raises(RuntimeError, match="training without PGT"):
        sft.train()
    assert handle_of(sft).calls == 0


def test_with_logits_it_trains_and_uses_the_transform(tmp_path):
    sft = trainer(LogitsSFTTrainer, tmp_path, max_steps=3)
    before = sft.model.lm_head.weight.detach().clone()
    sft.train()
    assert handle_of(sft).calls == 3
    assert handle_of(sft).alpha == ALPHA
    assert not torch.equal(before, sft.model.lm_head.weight)


def test_with_logits_its_first_step_is_the_formulas(tmp_path):
    sft = trainer(LogitsSFTTrainer, tmp_path, "powergrad_sgd", max_steps=1)
    model = sft.model.train()
    batch = sft.data_collator([sft.train_dataset[i] for i in range(len(TEXTS))])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1]
    target = batch["labels"][:, 1:]
    gradient = powergrad_gradient(logits, target, ALPHA).float()
    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    directions = torch.autograd.grad(logits, parameters, gradient)
    true_loss = F.cross_entropy(logits.flatten(0, 1), target.flatten()).item()
    sft.train()
    for parameter, first, direction in zip(parameters, start, directions, strict=True):  # the first Nesterov step
        moved = parameter.detach() - first
        torch.testing.assert_close(moved, -LR * 1.9 * direction, rtol=1e-4, atol=1e-6)
    assert sft.state.log_history[0]["loss"] == pytest.approx(true_loss, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_log_probabilities_are_pgts_or_refused_but_never_plain(dtype):
    """In half precision it takes a log_softmax, which is PGT's; in float32 a logsumexp, which is refused."""
    from trl.trainer.utils import selective_log_softmax

    head = torch.nn.Linear(4, 6).to(dtype)
    inputs, labels = torch.randn(2, 3, 4, dtype=dtype), torch.randint(6, (2, 3))
    attach_powergrad(head, ALPHA)
    logits = head(inputs)
    loss = -selective_log_softmax(logits, labels).mean()
    if dtype is torch.float32:
        with pytest.raises(RuntimeError, match=r"logsumexp.*training without PGT.*powergrad_log_softmax"):
            loss.backward()
    else:
        loss.backward()
        expected = powergrad_gradient(logits.detach(), labels, ALPHA).flatten(0, 1).sum(0)
        torch.testing.assert_close(head.bias.grad.double(), expected, rtol=0, atol=1e-2)


def test_its_reward_trainer_takes_no_softmax_and_is_refused(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    args = trl.RewardConfig(
        str(tmp_path), optim="powergrad_adamw", max_steps=1, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"chosen": TEXTS, "rejected": TEXTS[::-1]})
    reward = trl.RewardTrainer(
        transformers.LlamaForSequenceClassification(config), args=args, train_dataset=data, processing_class=tokenizer
    )
    with pytest.raises(RuntimeError, match="training without PGT"):
        reward.train()


def test_its_dpo_trainer_makes_no_logits_and_is_refused(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    args = trl.DPOConfig(
        str(tmp_path), optim="powergrad_adamw", max_steps=1, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["def"] * 8, "chosen": TEXTS, "rejected": TEXTS[::-1]})
    policy, reference = (transformers.LlamaForCausalLM(config) for _ in range(2))
    dpo = trl.DPOTrainer(policy, reference, args=args, train_dataset=data, processing_class=tokenizer)
    with pytest.raises(RuntimeError, match="training without PGT"):
        dpo.train()
