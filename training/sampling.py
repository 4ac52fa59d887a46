"""Sampling from a causal language model with noise that belongs to the sample, not to the batch.

Every step draws one uniform number per sample and takes the token at that place of the cumulative distribution. The numbers
come from (seed, row, sample) alone, so batch size, order and device do not change which noise a sample gets, and two
policies answer the same prompt with the same noise: their difference is less noisy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from training.cache import keeps_every_token, read_prompts_once
from training.config import GenerateConfig
from training.decoding import Written, decode, take_likeliest
from training.render import apply_template, render_prompt, special_ids

# B samples of a batch, T prompt tokens, S new tokens, V vocabulary


def draw_noise(row_id: str, sample: int, *, config: GenerateConfig) -> np.ndarray:
    """Return the uniform numbers in [0, 1) of one sample, float64 [S]."""
    generator = np.random.Generator(np.random.PCG64([config.seed, int(row_id, 16), sample]))
    return generator.random(config.max_new_tokens)


class InverseCdf:
    """Picks the token at a number's place in the cumulative distribution, after temperature, top-k and top-p."""

    def __init__(self, noise_BS: Tensor, *, config: GenerateConfig) -> None:
        self._noise_BS = noise_BS
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(float(config.temperature))])
        if config.top_k:
            self._warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self._warpers.append(TopPLogitsWarper(config.top_p))

    def __call__(self, scores_BV: Tensor, rows: list[int], step: int) -> Tensor:
        """Return token_B of some rows of the noise, by its column `step`."""
        cdf_BV = self._warpers(None, scores_BV).double().softmax(-1).cumsum(-1)
        total_B1 = cdf_BV[:, -1:]
        place_B1 = self._noise_BS[rows, step, None] * total_B1
        # u * total may round up to total, behind the last token that has any probability
        place_B1 = torch.minimum(place_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
        return torch.searchsorted(cdf_BV, place_B1, right=True)[:, 0]


class Heed(LogitsProcessor):
    """Asks at every token whether to go on: a batch of long answers outlasts the patience of whoever wants to stop it."""

    def __init__(self, check_stop: Callable[[], None]) -> None:
        self._check_stop = check_stop

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged, or raise what the check raises."""
        self._check_stop()
        return scores


def find_stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the tokenizer's and the model's own, and the one the chat template writes."""
    probe = [{"role": "user", "content": "a"}]
    prompt_ids = render_prompt(tokenizer, probe)
    turns = [*probe, {"role": "assistant", "content": "b"}]
    ids = apply_template(tokenizer, turns)
    markers = special_ids(tokenizer)
    written = [token for token in ids[len(prompt_ids) :] if token in markers][:1]
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    stop_ids = sorted({token for token in (*own, tokenizer.eos_token_id, *written) if token is not None})
    if not stop_ids:
        raise ValueError(
            f"model {model.name_or_path}: no token ends an answer; expected eos_token in tokenizer_config.json"
        )
    return stop_ids


def generate_batch(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    noise_BS: np.ndarray,
    stop_ids: list[int],
    config: GenerateConfig,
    check_stop: Callable[[], None],
    to_the_end: bool = False,
) -> list[list[int]]:
    """Return the new tokens after each prompt, up to `max_new_tokens`, the stop token last where the model wrote one.

    A prompt that several rows have is read once, where the model's layers keep every token. `check_stop` is called before every token;
    what it raises ends the batch. With `to_the_end` the model goes on to the last token even where all have stopped. Nothing of the model's own generation settings is used: they often carry top_k = 50 or a repetition
    penalty, and a sample of that is no sample of the policy. The model is as before afterwards.
    """
    T = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), T), stop_ids[0], dtype=torch.int64)
    mask_BT = torch.zeros((len(prompts), T), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, T - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, T - len(prompt) :] = 1
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=None if to_the_end else stop_ids,
        pad_token_id=stop_ids[0],
    )
    own, model.generation_config = (
        model.generation_config,
        settings,
    )  # generate() fills what is unset from the model's own
    noise = torch.from_numpy(noise_BS).to(model.device)
    pick = InverseCdf(noise, config=config) if config.temperature > 0 else take_likeliest
    try:
        with torch.no_grad():  # weights gathered under inference mode could not be trained afterwards
            shares = keeps_every_token(model.config)
            held = {"past_key_values": read_prompts_once(model, ids_BT, mask_BT)} if shares else {}
            written: list[Written] = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=settings,
                logits_processor=LogitsProcessorList([Heed(check_stop)]),
                custom_generate=decode,
                pick=pick,
                **held,
            )
    finally:
        model.generation_config = own
    return [cut_at_stop(row.ids, stop_ids) for row in written]


def cut_at_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    """Return the tokens up to and including the first stop token."""
    ends = [n for n, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens
