"""A key-value cache that grows by blocks: transformers' own copies all of itself at every token."""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with room ahead: new columns are written into it, rows leave it at a copy.

    `keys` and `values`, as everybody reads them, are the part of the room that is in use.
    """

    block = 64  # columns of room that are added at once

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, type and device from the first states."""
        super().lazy_initialization(key_states, value_states)
        self._rooms = [states.new_empty(0) for states in (key_states, value_states)]

    def update(
        self,
        key_states: Float[Tensor, "row head new dim"],
        value_states: Float[Tensor, "row head new dim"],
        *_: object,
        **__: object,
    ) -> tuple[Float[Tensor, "row head seq dim"], Float[Tensor, "row head seq dim"]]:
        """Append columns; return all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        have = self.get_seq_length()
        used = have + key_states.shape[-2]
        for i, states in enumerate((key_states, value_states)):
            room = self._rooms[i]
            if room.numel() == 0 or room.shape[-2] < used:
                rows, heads, new, dim = states.shape
                grown = states.new_empty(rows, heads, have + max(new, self.block), dim)
                if have:
                    grown[:, :, :have] = room[:, :, :have]
                self._rooms[i] = room = grown
            room[:, :, have:used] = states
        return self._use(used)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Give each row `repeats` copies, one after the other."""
        used = self.get_seq_length()
        if used:
            self._rooms = [room[:, :, :used].repeat_interleave(repeats, 0) for room in self._rooms]
            self._use(used)

    def batch_select_indices(self, indices: Int[Tensor, " kept"]) -> None:
        """Keep these rows only."""
        used = self.get_seq_length()
        if used:
            self._rooms = [room[indices] for room in self._rooms]
            self._use(used)

    def reorder_cache(self, beam_idx: Int[Tensor, " row"]) -> None:
        """Put the rows into another order, as beam search does."""
        self.batch_select_indices(beam_idx)

    def _use(self, columns: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[:, :, :columns] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return a cache for a model of this configuration; windowed and other layers stay as is."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def worth_dropping(going: Bool[Tensor, " row"]) -> bool:
    """Tell whether so many rows have ended that taking them out of the cache pays.

    Taking rows out copies the cache; with one in eight ended, what all those copies move is a
    constant times the cache, and what ended rows still cost is at most an eighth.
    """
    return 8 * int((~going).sum()) >= len(going)
