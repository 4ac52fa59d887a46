"""Generation token by token in which a row that has ended leaves its batch: what is left is read and computed, no more.

Legend: B rows of a batch, those that are left, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache

# Rows leave when they are this share of a batch: what the others hold is copied then, which costs about what reading it for a token does.
LEAVING = 1 / 8


@dataclass(frozen=True)
class Written:
    """The new ids of a row, its stop included, and whether it met one before the limit."""

    ids: list[int]
    stopped: bool


def take_likeliest(scores_BV: Tensor, rows: list[int], step: int) -> Tensor:
    """Return token_B of greedy search."""
    return scores_BV.argmax(dim=-1)


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    pick: Callable[[Tensor, list[int], int], Tensor] = take_likeliest,
    **model_kwargs: Any,
) -> list[Written]:
    """Write an answer to every row, for `generate(custom_generate=decode, pick=...)`.

    `pick` is given scores_BV, each row's place in the whole batch, and the number of tokens written before, and returns token_B.
    """
    prompt_tokens, limit = input_ids.shape[1], stopping_criteria.max_length
    answers: list[Written | None] = [None] * len(input_ids)
    ends = [criterion for criterion in stopping_criteria if not hasattr(criterion, "max_length")]
    rows = list(range(len(input_ids)))  # that are still in the batch, by their place in the answers
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores_BV = logits_processor(input_ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32))
        token_B = pick(scores_BV, rows, input_ids.shape[1] - prompt_tokens)
        input_ids = torch.cat([input_ids, token_B[:, None]], dim=-1)
        stopped_B = meets_any(ends, input_ids)
        full = input_ids.shape[1] >= limit
        for at, row in enumerate(rows):
            if answers[row] is None and (stopped_B[at] or full):
                answers[row] = Written(input_ids[at, prompt_tokens:].tolist(), stopped_B[at])
        if None not in answers:
            return [answer for answer in answers if answer is not None]
        keep = [at for at, row in enumerate(rows) if answers[row] is None]
        if len(rows) - len(keep) >= max(1, LEAVING * len(rows)) and can_drop(model_kwargs["past_key_values"]):
            rows, keep_B = [rows[at] for at in keep], torch.tensor(keep, device=input_ids.device)
            input_ids = input_ids[keep_B]
            model_kwargs["past_key_values"].batch_select_indices(keep_B)
            for name in ("attention_mask", "position_ids"):
                if model_kwargs.get(name) is not None:
                    model_kwargs[name] = model_kwargs[name][keep_B]
        step = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        outputs = model(**step, return_dict=True)


def meets_any(ends: list[Any], input_ids: Tensor) -> list[bool]:
    """Return for each row whether one of the criteria ends it."""
    if not ends:
        return [False] * len(input_ids)
    met: list[bool] = torch.stack([criterion(input_ids, None) for criterion in ends]).any(dim=0).tolist()
    return met


def can_drop(cache: Cache) -> bool:
    """Return whether rows can leave the cache; recurrent states, which do not offer it, keep theirs to the end."""
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
