"""Random models of two layers, one for each family that the engine is held to."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 61
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
HEADS = {"head_dim": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, **HEADS),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "gemma2": Gemma2Config(**SMALL, **HEADS, sliding_window=6, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SMALL, **HEADS, sliding_window=6),
}


def make_model(name: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """Return a family's model, always the same one, in evaluation mode; its config is its own."""
    torch.manual_seed(0)
    # eager is the one stock attention that caps scores
    stock = {"attn_implementation": "eager"} if name == "gemma2" else {}
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), **stock).to(dtype).eval()
