"""Floating-point operations of a training step, counted from what the mathematics needs, a multiply and an add as two.

A matrix product of the forward pass has two of its size behind it in the backward pass: one for the gradient of its input, one for
that of its matrix. So a step costs three forward passes; beside an adapter the frozen matrices lack the second, and
those that read nothing but the frozen embeddings the first too. Useful operations alone count: no padding, no masked pair of attention, and the output head once, although
DPO's backward pass computes its logits again (training/head.py). So a share of a machine's rate says how much
of it became training. Norms, activations, rotations and the softmax are left out: they are no matrix products.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

# Of the first layer: the products that read the embeddings, and of their adapters the first matrix.
READS_EMBEDDINGS = re.compile(
    r"(^|\.)(layers|h)\.0\..*\b(q_proj|k_proj|v_proj|c_attn|qkv_proj|query_key_value)\b(?!.*lora_B)"
)


ENCODERS = {"bert", "camembert", "electra", "roberta", "xlm-roberta"}  # whose tokens see all of their row


@dataclass(frozen=True)
class Flops:
    """What forward and backward pass of a dense transformer cost, by what it grows with."""

    per_token: int  # all matrices between embedding and output head
    per_position: int  # the output head, at each position that predicts a trained token; of a reward model at the one that is read
    layers: tuple[tuple[int, int | None], ...]  # of each layer: operations a (query, key) pair of both, and its window
    sees_all: bool = False  # an encoder's tokens see those behind them too

    def step(self, *, tokens: int, positions: int, segments: Sequence[tuple[int, int]]) -> int:
        """Return the operations of forward and backward pass; `segments` are (position of the first token, tokens)."""
        windows = {window for _, window in self.layers}
        pairs = {window: sum(count_pairs(*segment, window=window) for segment in segments) for window in windows}
        if self.sees_all:
            pairs = {None: sum(length**2 for _, length in segments)}
        attention = sum(per_pair * pairs[window] for per_pair, window in self.layers)
        return self.per_token * tokens + self.per_position * positions + attention


def count_pairs(start: int, length: int, *, window: int | None) -> int:
    """Return how many keys `length` tokens see from position `start` on, themselves included; a window bounds each one's."""
    end = start + length
    if window is None:
        return triangle(end) - triangle(start)
    # positions below window - 1 see all before them, later ones a window's worth
    growing = max(0, min(end, window) - start)
    return triangle(start + growing) - triangle(start) + (length - growing) * window


def triangle(n: int) -> int:
    """Return 1 + 2 + ... + n."""
    return n * (n + 1) // 2


def count_flops(model: Any) -> Flops | None:
    """Return what a decoder costs with the parameters trained that are now, or None where its matrices cannot be told from its modules
    (experts, latent attention).

    Exact for dense decoders: Llama, Qwen, Mistral, Gemma, GPT-2 and what is built like them. Works on the meta device.
    """
    trunk, head = model.base_model, model.get_output_embeddings()
    matrices = find_matrices(trunk)
    if matrices is None or not isinstance(head, nn.Linear):
        return None
    begins = any(m.weight.requires_grad for m in trunk.modules() if isinstance(m, nn.Embedding))
    return Flops(
        per_token=sum(
            count_matrix(weight, reads_trained=begins or not READS_EMBEDDINGS.search(name))
            for name, weight in matrices.items()
        ),
        per_position=count_matrix(head.weight, reads_trained=True),
        layers=tuple((count_pair(model.config), window) for window in read_windows(model.config)),
    )


def count_reward_flops(model: Any) -> Flops | None:
    """Return what a reward model costs with all of it trained, or None where it cannot be told, as `count_flops`, or by whether its tokens see
    those behind them.

    What stands behind the trunk counts once a row, and so does an encoder's pooler, which reads one position.
    """
    kind, trunk = model.config.model_type, model.base_model
    matrices = find_matrices(trunk)
    if matrices is None or (kind not in ENCODERS and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return None
    pooled = [weight for name, weight in matrices.items() if name.startswith("pooler.")]
    inner = {id(module) for module in trunk.modules()}
    heads = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inner]
    every = sum(count_matrix(weight, reads_trained=True) for weight in matrices.values())
    once = sum(count_matrix(weight, reads_trained=True) for weight in pooled)
    return Flops(
        per_token=every - once,
        per_position=once + sum(count_matrix(weight, reads_trained=True) for weight in heads),
        layers=tuple((count_pair(model.config), window) for window in read_windows(model.config)),
        sees_all=kind in ENCODERS,
    )


def find_matrices(trunk: Any) -> dict[str, Any] | None:
    """Return the matrices of a trunk by their names, or None where they cannot be told from its modules."""
    matrices = {name: m.weight for name, m in trunk.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    embeddings = [m.weight for m in trunk.modules() if isinstance(m, nn.Embedding)]
    known = {id(weight) for weight in (*matrices.values(), *embeddings)}
    unknown = any(parameter.dim() >= 2 and id(parameter) not in known for parameter in trunk.parameters())
    return None if unknown or hasattr(trunk.config, "kv_lora_rank") else matrices


def count_pair(config: Any) -> int:
    """Return the operations of a layer's attention for a (query, key) pair in forward and backward pass."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 3 * 2 * 2 * heads * width  # query times key, then weight times value


def count_matrix(weight: Any, *, reads_trained: bool) -> int:
    """Return what a matrix costs for each vector in forward and backward pass; `reads_trained`: its input depends on what is trained."""
    return 2 * int(weight.numel()) * (1 + reads_trained + weight.requires_grad)


def read_windows(config: Any) -> list[int | None]:
    """Return each layer's window of attention, None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
