"""Models of transformers that compute their loss inside ``forward``, each with a batch: what the tests of models share."""

import torch
import transformers as T

TEXT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32,
}  # fmt: skip
DECODER = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "summary_first_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}

_random = torch.Generator().manual_seed(1)


def _draw(high, *shape, low=0):
    return torch.randint(low, high, shape, generator=_random)


IDS = {"input_ids": _draw(50, 4, 7, low=1)}
CLASS, TOKEN_CLASSES, TOKENS = _draw(3, 4), _draw(3, 4, 7), _draw(50, 4, 7, low=1)
IMAGES = torch.randn(4, 3, 16, 16, generator=_random)

MODELS = {
    "BertForSequenceClassification": lambda: (
        T.BertForSequenceClassification(T.BertConfig(**TEXT)), IDS | {"labels": CLASS}),
    "BertForTokenClassification": lambda: (
        T.BertForTokenClassification(T.BertConfig(**TEXT)), IDS | {"labels": TOKEN_CLASSES}),
    "BertForMaskedLM": lambda: (T.BertForMaskedLM(T.BertConfig(**TEXT)), IDS | {"labels": TOKENS}),
    "BertForQuestionAnswering": lambda: (
        T.BertForQuestionAnswering(T.BertConfig(**TEXT | {"num_labels": 2})),
        IDS | {"start_positions": CLASS, "end_positions": CLASS + 1}),
    "BertForMultipleChoice": lambda: (
        T.BertForMultipleChoice(T.BertConfig(**TEXT)), {"input_ids": IDS["input_ids"][:, None].expand(4, 3, 7) - torch.arange(3)[:, None].clamp(max=1), "labels": CLASS}),
    "BertForNextSentencePrediction": lambda: (
        T.BertForNextSentencePrediction(T.BertConfig(**TEXT)), IDS | {"labels": CLASS % 2}),
    "BertForPreTraining": lambda: (
        T.BertForPreTraining(T.BertConfig(**TEXT)), IDS | {"labels": TOKENS, "next_sentence_label": CLASS % 2}),
    "AlbertForPreTraining": lambda: (
        T.AlbertForPreTraining(T.AlbertConfig(**TEXT | {"num_labels": 2}, embedding_size=8, classifier_dropout_prob=0.0)),
        IDS | {"labels": TOKENS, "sentence_order_label": CLASS % 2}),
    "RobertaForSequenceClassification": lambda: (
        T.RobertaForSequenceClassification(T.RobertaConfig(**TEXT, **SPECIAL)), IDS | {"labels": CLASS}),
    "DebertaV2ForSequenceClassification": lambda: (
        T.DebertaV2ForSequenceClassification(T.DebertaV2Config(**TEXT, pooler_hidden_size=16, pooler_dropout=0.0)),
        IDS | {"labels": CLASS}),
    "ModernBertForSequenceClassification": lambda: (
        T.ModernBertForSequenceClassification(T.ModernBertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            num_labels=3, max_position_embeddings=32, **SPECIAL)),
        IDS | {"labels": CLASS}),
    "LlamaForCausalLM": lambda: (T.LlamaForCausalLM(T.LlamaConfig(**DECODER)), IDS | {"labels": TOKENS}),
    "LlamaForSequenceClassification": lambda: (
        T.LlamaForSequenceClassification(T.LlamaConfig(**DECODER, num_labels=3)), IDS | {"labels": CLASS}),
    "Gemma2ForCausalLM": lambda: (T.Gemma2ForCausalLM(T.Gemma2Config(**DECODER)), IDS | {"labels": TOKENS}),
    "GPT2LMHeadModel": lambda: (T.GPT2LMHeadModel(T.GPT2Config(**GPT2)), IDS | {"labels": TOKENS}),
    "T5ForConditionalGeneration": lambda: (
        T.T5ForConditionalGeneration(T.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0)),
        IDS | {"labels": TOKENS}),
    "BartForConditionalGeneration": lambda: (
        T.BartForConditionalGeneration(T.BartConfig(**SEQ2SEQ)), IDS | {"labels": TOKENS}),
    "BartForSequenceClassification": lambda: (
        T.BartForSequenceClassification(T.BartConfig(**SEQ2SEQ, num_labels=3, eos_token_id=2)),
        {"input_ids": torch.cat([IDS["input_ids"].clamp(min=3), torch.full((4, 1), 2)], 1), "labels": CLASS}),
    "WhisperForConditionalGeneration": lambda: (
        T.WhisperForConditionalGeneration(T.WhisperConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, max_source_positions=20,
            max_target_positions=32, num_mel_bins=8, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None)),
        {"input_features": torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(1)), "labels": TOKENS}),
    "ViTForImageClassification": lambda: (
        T.ViTForImageClassification(T.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
        {"pixel_values": IMAGES, "labels": CLASS}),
    "ResNetForImageClassification": lambda: (
        T.ResNetForImageClassification(T.ResNetConfig(
            embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)),
        {"pixel_values": IMAGES, "labels": CLASS}),
    "SegformerForSemanticSegmentation": lambda: (
        T.SegformerForSemanticSegmentation(T.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
            mlp_ratios=[2, 2], patch_sizes=[3, 3], strides=[2, 2], decoder_hidden_size=8, num_labels=3,
            classifier_dropout_prob=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            drop_path_rate=0.0)),
        {"pixel_values": IMAGES, "labels": torch.randint(3, (4, 16, 16), generator=torch.Generator().manual_seed(1))}),
}  # fmt: skip

COMPILED = (  # those that make their nn.CrossEntropyLoss inside forward, and one of each other kind
    "BertForSequenceClassification", "BertForQuestionAnswering", "RobertaForSequenceClassification",
    "DebertaV2ForSequenceClassification", "ModernBertForSequenceClassification", "T5ForConditionalGeneration",
    "BartForConditionalGeneration", "WhisperForConditionalGeneration", "LlamaForCausalLM", "ViTForImageClassification",
)  # fmt: skip
