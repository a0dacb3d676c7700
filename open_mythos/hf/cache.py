"""A cache of transformers over a `KVCache`, which is made at the first call and grows with the text."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from open_mythos.model import OpenMythos
from open_mythos.nn.cache import KVCache

FIRST_SLOTS = 256
"""Slots of a cache whose user named no length, once the first call needs no more."""


class MythosCache(Cache):
    """Keys and values of every loop, for `generate` and for calls of the model one after another.

    Args:
        max_cache_len: slots to begin with; more are made when they are needed, unless `static`.
        static: keep the memory and its shapes for all calls, as compilers and CUDA graphs need it.
    """

    is_croppable, is_sliding, is_linear = True, (False,), (False,)

    def __init__(self, max_cache_len: int | None = None, static: bool = False) -> None:
        # Without the base class's constructor, whose layers each hold keys and values of one layer at one loop.
        self.layers = []
        self.store: KVCache | None = None
        """The keys and values; None before the first call."""
        self._max_len, self._static = max_cache_len, static

    def open(self, net: OpenMythos, batch_size: int, n_new: int, n_loops: int | None) -> KVCache:
        """Return the store with room for `n_new` more tokens per row."""
        if self.store is None:
            n_slots = max(n_new, self._max_len or min(FIRST_SLOTS, net.cfg.max_seq_len))
            self.store = net.make_cache(batch_size, n_slots, n_loops, self._static)
        elif self.store.length + n_new > self.store.max_len and not self._static:
            n_slots = min(max(self.store.length + n_new, 2 * self.store.max_len), net.cfg.max_seq_len)
            self._copy(torch.arange(self.store.batch_size, device=self.store.device), n_slots)
        return self.store

    def _copy(self, rows: Tensor, n_slots: int) -> None:
        """Move the given rows into a new store of `n_slots`."""
        old = self.store
        if old is None:
            return
        layers = [(len(stored[0]), [tuple(x.shape[3:]) for x in stored]) for stored in old.layers]
        new = type(old)(layers, len(rows), n_slots, old.n_loops, old.dtype, old.device)
        used = slice(min(old.length, n_slots))
        pairs = zip(sum(new.layers, ()), sum(old.layers, ()), strict=True)
        for to, source in pairs:
            to[:, :, used] = source[:, :, used].index_select(1, rows)
        new.valid[:, used] = old.valid[rows, used]
        new.row_seed = None if old.row_seed is None else old.row_seed[rows]
        new.padded, new.constants = old.padded, old.constants
        new.rewind(old.length)
        self.store = new

    # What `generate` calls.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.store is None else self.store.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the slots of a static cache; -1 for one that grows."""
        return (self._max_len or -1) if self._static else -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; transformers gives their number as a negative one."""
        if tokens_to_remove and self.store is not None:
            self.store.rewind(self.store.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.store = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.store is not None:
            self.store.keep_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            rows = torch.arange(self.store.batch_size, device=self.store.device)
            self._copy(rows.repeat_interleave(repeats), self.store.max_len)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self._copy(torch.arange(self.store.batch_size, device=self.store.device)[indices], self.store.max_len)

    def activate_past_recording(self) -> None:
        """Do nothing: every earlier token stays until `crop`."""

    @property
    def batch_size(self) -> int:
        return -1 if self.store is None else self.store.batch_size

    @property
    def is_compileable(self) -> bool:
        return self._static

    def __len__(self) -> int:
        return 0 if self.store is None else len(self.store.layers)
