"""The numbers of lm-eval's Transformers backend for less work: nothing is computed that no score depends on.

Logits are computed where a continuation is predicted, and not over the whole prompt. A prompt prefix that all requests of a task
share, such as worked examples, is read once, and its keys and values stand before every batch of that task. A generated row
leaves its batch at its own stop, where stock waits until all rows have met the same stop string.

A batch of generation with a shared prefix is laid out as [prefix | padding | rest of the prompt], the padding masked. What a
model makes of that is compared with its own plain forward pass when it is loaded; where they differ (windows of attention,
positions by place), prompts are read whole.

Legend: B rows of a batch, T tokens, P tokens of a shared prefix, K last positions of a row, V vocabulary.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from evaluation.harness.calls import Answer, Call, Engine, Row, Score, Writing
from training.cache import keeps_every_token, make_roomy_cache
from training.config import Precision
from training.decoding import Written, decode
from training.memory import run_in_halves
from training.model import DTYPES, load_causal_model

LOOK_BACK = 2  # tokens beyond a stop string's own in which it is looked for, as stock does
MAX_GAP = {
    torch.float32: 1e-3,
    torch.bfloat16: 1e-1,
}  # of probe logits, relative to the largest; a wrong position is far off


class StopStrings(StoppingCriteria):
    """Tells for each row whether its newest tokens hold a stop string. It keeps nothing, so rows may leave.

    A stop string counts in the text of an answer, where special tokens do not show, or as the special token that it is. So a
    row ends where its text is cut. Stock looks at the names of special tokens too, but goes on until all rows have ended.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], *, prompt_tokens: int) -> None:
        self._tokenizer, self._stops, self._begin = tokenizer, stops, prompt_tokens
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops]
        self._window = max(lengths, default=0) + LOOK_BACK
        special = tokenizer.get_added_vocab()
        self._stop_ids = [special[stop] for stop in stops if stop in special]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return done_B."""
        newest = input_ids[:, max(self._begin, input_ids.shape[1] - self._window) :].tolist()
        texts = self._tokenizer.batch_decode(newest, skip_special_tokens=True)
        done = [
            ids[-1] in self._stop_ids or any(stop in text for stop in self._stops if stop)
            for ids, text in zip(newest, texts, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)


class TransformersEngine(Engine):
    """A causal language model of Transformers in this process. What it shares is found out when it is made."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._held: tuple[list[int], Cache | None] = ([], None)  # the prefix that was read last
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        self.shares_reading = bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        self.shares_writing = keeps_every_token(model.config)
        self._roomy = self.shares_writing
        if self.shares_reading:
            read_gap, written_gap = probe_sharing(self)
            bound = MAX_GAP.get(model.dtype, MAX_GAP[torch.float32])
            self.shares_reading = read_gap <= bound
            self.shares_writing = self.shares_writing and written_gap <= bound

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield (number, answers) of every call, one after the other."""
        for number, call in enumerate(calls):
            yield number, self.answer(call)

    def answer(self, call: Call) -> list[Any]:
        """Return the scores, or the answer, of each row of a call."""
        if call.prefix != self._held[0]:
            self._held = ([], None)  # before the next one takes its memory
            self._held = (call.prefix, self.read_prefix(call.prefix))
        behind: dict[str, Any] = {"prefix": self._held[1], "shared": len(call.prefix)}
        if call.writing is None:
            return self._run(partial(self.score_batch, **behind), call.rows)
        return self._run(partial(self.write_batch, writing=call.writing, **behind), call.rows)

    def _run(self, work: Callable[[Sequence[Row]], list[Any]], rows: Sequence[Row]) -> list[Any]:
        """Return what `work` makes of a batch: in halves where there is no room, but in half precision its size is part of the score."""
        if self.model.dtype == torch.float32:
            return run_in_halves(work, rows)
        try:
            return work(rows)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"batch_size: a batch of {self.batch_size} prompts in {self.model.dtype} has no room on the device, and its size is part "
                "of what a score means there; set batch_size of the benchmark lower, for all models that are to be compared"
            ) from error

    def read_prefix(self, ids: list[int]) -> Cache | None:
        """Return the keys and values of a prefix, one row; None for an empty one."""
        if not ids:
            return None
        cache = DynamicCache(config=self.model.config)
        ids_BT = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            self.model(ids_BT, past_key_values=cache, use_cache=True, **self.keep(1))
        return cache

    def keep(self, positions: int) -> dict[str, int]:
        """Return the argument for logits of the last positions alone, where the model takes it."""
        return {"logits_to_keep": positions} if self._keeps else {}

    def read_batch(self, rows: Sequence[Row], *, prefix: Cache | None, shared: int) -> list[Tensor]:
        """Return logits_KV of each row, padded on the right, behind `shared` ids that the prefix holds."""
        lengths = [len(row.ids) - shared for row in rows]
        ids_BT = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        for at, row in enumerate(rows):
            ids_BT[at, : lengths[at]] = torch.tensor(row.ids[shared:])
        K = max(max(lengths) - length + row.tail for length, row in zip(lengths, rows, strict=True))
        past = {} if prefix is None else {"past_key_values": repeat_prefix(prefix, len(rows)), "use_cache": True}
        with torch.no_grad():
            logits_BKV = self.model(ids_BT.to(self.model.device), **past, **self.keep(K)).logits
        ends = [logits_BKV.shape[1] - max(lengths) + length for length in lengths]
        return [logits_BKV[at, end - row.tail : end] for at, (row, end) in enumerate(zip(rows, ends, strict=True))]

    def score_batch(self, rows: Sequence[Row], *, prefix: Cache | None, shared: int) -> list[list[Score]]:
        """Return the scores of each row's endings."""
        scores = []
        for row, logits_KV in zip(rows, self.read_batch(rows, prefix=prefix, shared=shared), strict=True):
            logp_KV = torch.log_softmax(logits_KV, dim=-1)
            scores.append([score_ending(logp_KV, ending) for ending in row.endings])
        return scores

    def write_batch(self, rows: Sequence[Row], *, prefix: Cache | None, shared: int, writing: Writing) -> list[Answer]:
        """Return the answer of each row of one batch."""
        ids_BT, mask_BT = lay_out_prompts(rows, shared=shared, pad_id=self.tokenizer.pad_token_id)
        T = ids_BT.shape[1]
        begins = () if prefix is None else view_layers(prefix, len(rows))
        cache = make_roomy_cache(self.model.config, begins) if self._roomy else None
        written: list[Written] = self.model.generate(
            input_ids=ids_BT.to(self.model.device),
            attention_mask=mask_BT.to(self.model.device),
            max_length=T + writing.limit,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([StopStrings(self.tokenizer, writing.stops, prompt_tokens=T)]),
            custom_generate=decode,
            **({} if cache is None else {"past_key_values": cache}),
        )
        return [Answer(self.tokenizer.decode(each.ids, skip_special_tokens=True), each.stopped) for each in written]


def load_model(folder: Path, *, precision: Precision, device: torch.device) -> Any:
    """Return the model of a folder on a device, in evaluation mode; ValueError for weights that are not there."""
    return load_causal_model(folder, dtype=DTYPES[precision], device_map={"": device}).eval()


def score_ending(logp_KV: Tensor, ending: Sequence[int]) -> Score:
    """Return the score of an ending's ids under the last rows of logp_KV."""
    target_K = torch.tensor(ending, device=logp_KV.device)
    last_KV = logp_KV[-len(ending) :]
    logp = float(last_KV.gather(1, target_K[:, None]).squeeze(1).sum())
    return logp, bool((last_KV.argmax(dim=-1) == target_K).all())


def repeat_prefix(prefix: Cache, rows: int) -> Cache:
    """Return a cache in which every row begins with the prefix; its tensors are views, which layers join and never write to."""
    repeated = copy.copy(prefix)
    repeated.layers = [copy.copy(layer) for layer in prefix.layers]
    for layer, (keys, values) in zip(repeated.layers, view_layers(prefix, rows), strict=True):
        layer.keys, layer.values = keys, values
    return repeated


def view_layers(prefix: Cache, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each layer's keys and values of a prefix as those of so many rows, without copying them."""
    for layer in prefix.layers:
        yield layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)


def lay_out_prompts(rows: Sequence[Row], *, shared: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return (ids_BT, mask_BT): the shared ids, padding, the rest of the prompt; the mask is 0 on padding."""
    T = max(len(row.ids) for row in rows)
    ids_BT = torch.full((len(rows), T), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), T), dtype=torch.long)
    mask_BT[:, :shared] = 1
    for at, row in enumerate(rows):
        ids_BT[at, :shared] = torch.tensor(row.ids[:shared], dtype=torch.long)
        rest = row.ids[shared:]
        ids_BT[at, T - len(rest) :] = torch.tensor(rest)
        mask_BT[at, T - len(rest) :] = 1
    return ids_BT, mask_BT


def probe_sharing(engine: TransformersEngine) -> tuple[float, float]:
    """Return how far logits behind a shared prefix are from those of whole rows, relative to the largest: read, and written."""
    size = engine.model.get_input_embeddings().num_embeddings
    long, short = ([(7 * place + 3) % size for place in range(length)] for length in (12, 9))
    rows = [Row([*long[:5], *tail]) for tail in (long[5:], short[6:])]
    shared = 5
    with torch.no_grad():
        whole_RV = torch.stack(
            [engine.model(torch.tensor([row.ids], device=engine.model.device)).logits[0, -1] for row in rows]
        )
        prefix = engine.read_prefix(rows[0].ids[:shared])
        assert prefix is not None
        read_RV = torch.stack([part[-1] for part in engine.read_batch(rows, prefix=prefix, shared=shared)])
        written_RV = probe_padding(engine.model, rows, prefix=prefix, shared=shared)
    scale = float(whole_RV.abs().max()) or 1.0
    return float((read_RV - whole_RV).abs().max()) / scale, float((written_RV - whole_RV).abs().max()) / scale


def probe_padding(model: Any, rows: Sequence[Row], *, prefix: Cache, shared: int) -> Tensor:
    """Return the next-token logits_BV of rows laid out with masked padding behind a shared prefix."""
    ids_BT, mask_BT = (part.to(model.device) for part in lay_out_prompts(rows, shared=shared, pad_id=0))
    position_BT = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    logits_BTV = model(
        ids_BT[:, shared:],
        attention_mask=mask_BT,
        past_key_values=repeat_prefix(prefix, len(rows)),
        use_cache=True,
        **({"position_ids": position_BT[:, shared:]} if takes_positions else {}),
    ).logits
    last_BV: Tensor = logits_BTV[:, -1]
    return last_BV
