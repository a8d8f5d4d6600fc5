"""Which modules make the logits: all the softmax heads of a model, those named, and never one in silence."""

import pytest
import torch
import transformers
from oracle import Oracle
from torch import nn

from pgt_hf import attach_powergrad
from pgt_hf.heads import find_heads, fold_powergrad
from pgt_hf.images import create_model

ALPHA = 0.25
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "summary_first_dropout": 0.0}  # fmt: skip


def ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


TWO_HEADS = {
    "BertForPreTraining": lambda: (
        transformers.BertForPreTraining(transformers.BertConfig(**TEXT)),
        {"input_ids": ids(4, 7), "labels": ids(4, 7), "next_sentence_label": torch.arange(4) % 2},
    ),
    "AlbertForPreTraining": lambda: (
        transformers.AlbertForPreTraining(
            transformers.AlbertConfig(**TEXT, embedding_size=8, classifier_dropout_prob=0.0)
        ),
        {"input_ids": ids(4, 7), "labels": ids(4, 7), "sentence_order_label": torch.arange(4) % 2},
    ),
    "GPT2DoubleHeadsModel": lambda: (
        transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**GPT2)),
        {
            "input_ids": ids(4, 2, 7), "labels": ids(4, 2, 7), "mc_labels": torch.arange(4) % 2,
            "mc_token_ids": torch.full((4, 2), 6),
        },
    ),
}  # fmt: skip


def prepare(name):
    torch.manual_seed(0)
    model, inputs = TWO_HEADS[name]()
    return model.train(), inputs


def total(output):
    return output.loss + (output.mc_loss if getattr(output, "mc_loss", None) is not None else 0)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", TWO_HEADS)
def test_both_softmax_heads_of_a_model_are_found(name):
    model, inputs = prepare(name)
    with Oracle(ALPHA) as oracle:
        total(model(**inputs)).backward()
    assert oracle.calls == 2
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    handle = attach_powergrad(model, ALPHA)
    assert len(handle.heads) == 2
    total(model(**inputs)).backward()
    for ours, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


def test_a_head_that_was_not_detected_is_named_in_the_error_and_several_can_be_given():
    class Two(transformers.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.other = nn.Linear(config.hidden_size, 5)

        def forward(self, input_ids, labels=None):
            pooled = self.bert(input_ids).pooler_output
            output = transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(pooled))
            output["other_logits"] = self.other(pooled)
            return output

    model = Two(transformers.BertConfig(**TEXT)).train()
    handle = attach_powergrad(model, ALPHA)
    with pytest.raises(RuntimeError, match=r"on logits of Two, but not on other_logits.*head=\[.*'other'"):
        model(ids(4, 7))
    handle.remove()
    with attach_powergrad(model, ALPHA, head=["classifier", model.other]) as handle:
        output = model(ids(4, 7))
        loss = nn.functional.cross_entropy(output.logits, torch.arange(4) % 2)
        (loss + nn.functional.cross_entropy(output["other_logits"], torch.arange(4))).backward()
    assert handle.calls == 1 and [type(head) for head in handle.heads] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: transformers.BartForSequenceClassification(transformers.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)), "classification_head"),
        (lambda: transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
            num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], num_attention_heads=[1], mlp_ratios=[2],
            patch_sizes=[3], strides=[2], decoder_hidden_size=8)), "decode_head"),
    ],
)  # fmt: skip
def test_heads_with_other_names_are_found(make, name):
    model = make()
    assert find_heads(model) == [getattr(model, name)]


@pytest.mark.parametrize("head", [3, [], [3]])
def test_a_head_that_is_neither_module_nor_name_is_refused(head):
    with pytest.raises(TypeError, match="head must be a module, a dotted name, a list"):
        find_heads(nn.Linear(2, 2), head)


def test_a_vision_model_of_transformers_can_be_folded():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    model = transformers.ResNetForImageClassification(config).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = model(images).logits
        torch.testing.assert_close(fold_powergrad(model, ALPHA)(images).logits, ALPHA * logits)


def test_model_is_folded_once_with_its_own_alpha_and_not_trained_further():
    layer = fold_powergrad(nn.Linear(4, 3), 0.5)
    with pytest.raises(ValueError, match="must not be folded twice"):
        fold_powergrad(layer, 0.5)
    model = create_model("resnet10t", ["a", "b"], image_size=32)
    model.config.powergrad_alpha = 0.25
    with pytest.raises(ValueError, match=r"alpha must be the one that the model was trained with, 0.25, got 0.5"):
        fold_powergrad(model, 0.5)
    fold_powergrad(model, 0.25)
    with pytest.raises(ValueError, match="must not be folded twice"):
        fold_powergrad(model, 0.25)
    trained = nn.Linear(4, 3)
    with attach_powergrad(trained, 0.5):
        fold_powergrad(trained, 0.5)
        with pytest.raises(RuntimeError, match="was folded into the head during training"):
            trained(torch.randn(2, 4))
