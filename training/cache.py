"""What generation keeps of the tokens read so far: keys and values, with room for those to come.

Legend: B rows of a batch, U different prompts among them, T tokens.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 128  # tokens for which a cache makes room at a time


class RoomyLayer(DynamicLayer):
    """Keys and values with room for tokens to come. The stock layer copies all that it holds for every new token."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the new states and return all of them, views of a larger tensor."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        if self._room is None or self._room[0].shape[2] < new or len(self._room[0]) != len(key_states):
            wide = [
                states.new_empty((*states.shape[:2], new + ROOM, states.shape[3]))
                for states in (key_states, value_states)
            ]
            if old:
                wide[0][:, :, :old], wide[1][:, :, :old] = self.keys, self.values
            self._room = (wide[0], wide[1])
        keys, values = self._room
        keys[:, :, old:new], values[:, :, old:new] = key_states, value_states
        self.keys, self.values = keys[:, :, :new], values[:, :, :new]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, and their room."""
        if self._room is not None:
            held = self.get_seq_length()
            keys, values = self._room = (self._room[0][indices], self._room[1][indices])
            self.keys, self.values = keys[:, :, :held], values[:, :, :held]


def keeps_every_token(config: Any) -> bool:
    """Return whether all layers of a model keep keys and values of every token: no windows, no recurrent states."""
    return {type(layer) for layer in DynamicCache(config=config).layers} == {DynamicLayer}


def make_roomy_cache(config: Any, begins: Iterable[tuple[Tensor, Tensor]] = ()) -> Cache:
    """Return a cache for a model whose layers keep every token; `begins` are keys and values to begin with, layer by layer."""
    layers = [RoomyLayer() for _ in DynamicCache(config=config).layers]
    for layer, (keys, values) in zip(layers, begins, strict=False):
        layer.update(keys, values)
    return Cache(layers=layers)


def read_prompts_once(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Cache:
    """Return a cache of every row's tokens but the last, for which each different prompt was read once.

    Rows are padded on the left. An empty cache where no two prompts are the same: the rows may as well be read where they stand.
    """
    different_UT, place_B = torch.unique(ids_BT.masked_fill(mask_BT == 0, -1), dim=0, return_inverse=True)
    if len(different_UT) == len(ids_BT) or ids_BT.shape[1] == 1:
        return make_roomy_cache(model.config)
    seen_UT = (different_UT >= 0).long()
    once = make_roomy_cache(model.config)
    model.base_model(
        input_ids=different_UT[:, :-1].clamp(min=0),
        attention_mask=seen_UT[:, :-1],
        position_ids=(seen_UT.cumsum(dim=-1) - 1).clamp(min=0)[:, :-1],
        past_key_values=once,
        use_cache=True,
    )
    return make_roomy_cache(model.config, ((layer.keys[place_B], layer.values[place_B]) for layer in once.layers))
