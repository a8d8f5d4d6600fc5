"""Heads that PEFT copies, wraps or adds to after PGT was attached: the handle moves what is trained, or a step refuses."""

import pytest
import torch
import transformers
from oracle import Oracle

from pgt_hf import attach_powergrad, create_optimizer

peft = pytest.importorskip("peft")

ALPHA = 0.25


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, (6, 7), generator=generator)
    return {"input_ids": ids, "labels": torch.arange(6) % 3}


def lora(**options):
    return peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], lora_dropout=0.0, **options)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_the_handle_moves_what_is_trained_where_peft_copies_the_head(how, when):
    model = bert()
    handle = attach_powergrad(model, 0.9) if when == "before" else None
    if how == "get_peft_model":
        model = peft.get_peft_model(model, lora())  # saves a copy of the classifier as a module to train
    else:
        try:
            model.add_adapter(lora(modules_to_save=["classifier"]))
        except ValueError as error:  # transformers wants a newer PEFT
            pytest.skip(str(error))
    handle = handle or attach_powergrad(model, 0.9)
    handle.alpha = ALPHA
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-20)
    model(**batch()).loss.backward()
    optimizer.step()
    ours = gradients(model)
    handle.remove()
    model.zero_grad(set_to_none=True)
    loss = model(**batch()).loss
    with Oracle(ALPHA):
        loss.backward()
    expected = gradients(model)
    assert ours.keys() == expected.keys() and any("classifier" in name for name in ours)
    for name, wanted in expected.items():
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=1e-6)


def test_a_head_for_a_new_task_is_refused_until_it_is_attached():
    model = bert()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)
    model(**batch()).loss.backward()
    optimizer.step()
    model.classifier = torch.nn.Linear(16, 3)
    model(**batch()).loss.backward()
    with pytest.raises(RuntimeError, match="replaced, resized or copied"):
        optimizer.step()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)
    model(**batch()).loss.backward()
    optimizer.step()


def test_a_resized_vocabulary_is_refused_until_it_is_attached():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False
        )
    ).train()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=ALPHA, momentum=0.9)
    model.resize_token_embeddings(48)
    ids = batch()["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match="replaced, resized or copied"):
        optimizer.step()
