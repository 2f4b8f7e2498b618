"""Tiny stock models with random weights, of every family that can be converted."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

VOCABULARY = 37
AUTO_CLASSES = {
    "base": AutoModel,
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "multiple-choice": AutoModelForMultipleChoice,
}
BERT_SIZES: dict[str, Any] = {
    "hidden_size": 15,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 23,
}
LLAMA_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 23,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART_SIZES: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 23,
    "decoder_ffn_dim": 19,
    "scale_embedding": True,
}
SLIDING: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
SIZES = {
    "bart": BART_SIZES,
    "bert": BERT_SIZES,
    "camembert": BERT_SIZES,
    "distilbert": {"dim": 15, "n_layers": 3, "n_heads": 3, "hidden_dim": 23},
    "electra": {**BERT_SIZES, "embedding_size": 9},
    "eurobert": {**LLAMA_SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    "gemma3_text": {
        **LLAMA_SIZES,
        "head_dim": 6,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {"n_embd": 15, "n_layer": 3, "n_head": 3, "n_inner": 23, "pad_token_id": 0, "eos_token_id": 2},
    "llama": {**LLAMA_SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    "marian": {**BART_SIZES, "pad_token_id": 1, "decoder_start_token_id": 1},
    "mistral": {**LLAMA_SIZES, "sliding_window": 4},
    "modernbert": {**BERT_SIZES, "hidden_size": 18, "local_attention": 4, "pad_token_id": 0},
    "qwen2": {**LLAMA_SIZES, **SLIDING},
    "qwen3": {**LLAMA_SIZES, **SLIDING, "head_dim": 6, "tie_word_embeddings": True},
    "roberta": BERT_SIZES,
    "xlm-roberta": BERT_SIZES,
}


def random_stock(model_type: str, task: str, **settings) -> PreTrainedModel:
    """A stock model in eval mode in which every parameter matters, including biases and norms."""
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": 41, **SIZES[model_type], **settings}
    model = AUTO_CLASSES[task].from_config(AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # some tables of positions are parameters, but fixed
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.normal_()
    return model
