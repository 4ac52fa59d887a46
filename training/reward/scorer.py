"""A sequence-classification model as a scorer: prompt and response in, one number out, whatever shared its batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from training.config import Precision, RewardRender
from training.data.batch import pack_by_tokens
from training.data.scored import describe_dropped
from training.logprobs import as_policy
from training.memory import run_in_halves
from training.model import (
    DTYPES,
    LOCAL,
    check_context,
    check_model_folder,
    check_vocabulary,
    digest_rendering,
    digest_tokenizer,
    reading,
    refuse_unused,
)
from training.render import UnusableRow
from training.reward.render import RewardInput, RewardRenderer
from training.tree import send
from training.weights import digest_weights

# B responses of a batch, T tokens

TOLERANCE = {Precision.float32: 1e-4, Precision.bfloat16: 5e-2}  # of a score, absolute below 1 and relative above
PROBES = (
    ("Hi", "Hello."),
    ("What is the capital of France?", "Paris. " * 24),
    ("Please explain in some detail why the sky is blue by day and red in the evening.", "No."),
)


class RewardScorer:
    """Scores pairs of prompt and response under one loaded model."""

    def __init__(self, model: Any, renderer: RewardRenderer, *, precision: Precision) -> None:
        self.model = model
        self.renderer = renderer
        self.precision = precision

    def score(
        self, prompts: Sequence[list[dict[str, str]]], responses: Sequence[str], *, budget: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the float64 reward of responses[n] to prompts[n], and whether the pair was cut to fit.

        A forward pass takes at most `budget` tokens, padding included. It never decides what is computed.
        """
        inputs = self.renderer(prompts, responses)
        rewards = np.empty(len(inputs), dtype=np.float64)
        for members in pack_by_tokens([len(item.ids) for item in inputs], budget=budget):
            rewards[members] = score_batch(self.model, [inputs[n] for n in members]).numpy()
        return rewards, np.array([item.cut for item in inputs])

    def split(self, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """Return the rows that the model can read, and row id, reason and detail of the others."""
        usable, unusable = [], []
        for row in rows:
            try:
                self.renderer([row["prompt"]] * len(row["responses"]), row["responses"])
                usable.append(row)
            except UnusableRow as refusal:
                unusable.append(describe_dropped(row["row_id"], refusal))
        return usable, unusable

    def digests(self, folder: Path) -> dict[str, str]:
        """Return the digests of the model, which was read from a folder, of its tokenizer, and of its chat template where it has one; and which
        inputs it reads."""
        tokenizer = self.renderer.tokenizer
        own = (
            digest_rendering(tokenizer)
            if tokenizer.chat_template
            else {"tokenizer_sha256": digest_tokenizer(tokenizer)}
        )
        return {"weights_sha256": digest_weights(folder), "inputs": ", ".join(tokenizer.model_input_names), **own}

    def check(self) -> None:
        """Raise ValueError unless scores are finite and do not depend on what else is in the batch.

        Three pairs of unlike lengths are scored alone and together, where the shorter ones are padded. A model whose padding
        leaks, or that reads its score at the wrong token, gives itself away here.
        """
        prompts = [[{"role": "user", "content": question}] for question, _ in PROBES]
        inputs = self.renderer(prompts, [answer for _, answer in PROBES])
        alone, together, error = compare_batches(self.model, inputs)
        if not error.max() <= TOLERANCE[self.precision]:  # also when a score is NaN
            raise ValueError(
                f"reward model {self.model.name_or_path}: scores depend on the batch; alone {alone.tolist()}, together "
                f"{together.tolist()}, expected a difference of at most {TOLERANCE[self.precision]:g}; "
                "check its padding token, or take another model"
            )


def compare_batches(model: Any, inputs: Sequence[RewardInput]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (alone_B, together_B, gap_B): rewards of inputs one by one and in one batch, and how far they differ, relatively above 1."""
    alone_B = np.concatenate([score_batch(model, [item]).numpy() for item in inputs])
    together_B = score_batch(model, inputs).numpy()
    return alone_B, together_B, np.abs(alone_B - together_B) / np.maximum(1.0, np.abs(alone_B))


def score_batch(model: Any, inputs: Sequence[RewardInput]) -> Tensor:
    """Return the rewards of one forward pass of a model or its Policy, float64 [B] on the CPU; a batch too large for the device is halved,
    unless the model is sharded: a rank that scored in halves would gather layers more often than the others."""
    policy = as_policy(model)

    def score(batch: Sequence[RewardInput]) -> list[float]:
        with torch.no_grad():  # sharded weights cannot be gathered under inference mode
            values: list[float] = policy(compute_rewards, collate_inputs(policy.model, batch)).double().tolist()
            return values

    rewards = score(inputs) if isinstance(policy, FSDPModule) else run_in_halves(score, inputs)
    return torch.tensor(rewards, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """Inputs padded on the right, on a device or on their way to it."""

    ids_BT: Tensor
    mask_BT: Tensor  # 0 at padding
    segments_BT: Tensor | None  # None where the model has no such input
    lengths: Sequence[int]  # of the rows, without padding


def collate_inputs(model: Any, inputs: Sequence[RewardInput]) -> RewardBatch:
    """Return inputs as one batch for a model, on its device."""
    lengths = [len(item.ids) for item in inputs]
    ids_BT = np.full((len(inputs), max(lengths)), model.config.pad_token_id)
    mask_BT, segments_BT = np.zeros((2, *ids_BT.shape), dtype=np.int64)
    for row, (item, length) in enumerate(zip(inputs, lengths, strict=True)):
        ids_BT[row, :length] = item.ids
        mask_BT[row, :length] = 1
        segments_BT[row, :length] = item.segments or 0
    put = partial(send, device=model.device)
    segments = None if inputs[0].segments is None else put(segments_BT)
    return RewardBatch(put(ids_BT), put(mask_BT), segments, lengths)


def compute_rewards(model: Any, batch: RewardBatch) -> Tensor:
    """Return the rewards [B] of a batch, with gradient where gradients are on."""
    more = {} if batch.segments_BT is None else {"token_type_ids": batch.segments_BT}
    logits: Tensor = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, **more).logits
    return logits[:, 0].clone()  # a view would be warned of where weights are sharded


def load_scorer(
    folder: Path, *, render: RewardRender, max_tokens: int, precision: Precision, device: torch.device
) -> RewardScorer:
    """Load a reward model from a local folder, or raise ValueError that says what makes it none."""
    check_model_folder(folder)
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, **LOCAL, use_safetensors=True, dtype=DTYPES[precision], output_loading_info=True
        )
    refuse_unused(loaded["unexpected_keys"], model, folder)
    if model.config.num_labels != 1:
        raise ValueError(
            f"reward model {folder}: got a head of {model.config.num_labels} labels, expected 1; "
            "take a model trained for rewards, or train one with reward_model"
        )
    if loaded["missing_keys"]:
        raise ValueError(
            f"reward model {folder}: no weights for {sorted(loaded['missing_keys'])}, expected all of them; "
            "a model without a trained head gives noise: train one with reward_model"
        )
    check_vocabulary(model, tokenizer, folder)
    set_pad_token(model, tokenizer, folder)
    check_context(model, max_tokens)
    renderer = RewardRenderer(tokenizer, render=render, max_tokens=max_tokens)
    return RewardScorer(model.to(device).eval(), renderer, precision=precision)


def set_pad_token(model: Any, tokenizer: Any, folder: Path) -> None:
    """Make the model's pad id the tokenizer's; decoders find the token to read by it. ValueError where there is none."""
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"reward model {folder}: the tokenizer has no pad token, so rows of unlike length cannot share a batch; "
            "expected pad_token in tokenizer_config.json"
        )
    if model.config.pad_token_id not in (None, tokenizer.pad_token_id):
        raise ValueError(
            f"reward model {folder}: the model pads with id {model.config.pad_token_id}, its tokenizer with "
            f"{tokenizer.pad_token_id}; expected one id; mend config.json or tokenizer_config.json"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
