"""Free pages, pages in use, and cached pages whose prefix another sequence may reuse. No torch."""

from open_mythos.engine.sequence import Block, Sequence


class BlockManager:
    """Gives blocks of pages to sequences, takes them back, and finds blocks whose tokens a new prompt begins with.

    A page is free, or in a block that sequences use, or in a cached block that no sequence uses.

    A full block is cached under the block before it (the first one under the depth key) and its tokens, so equal keys
    mean equal tokens from the start. Nobody writes to a cached block again. Unused cached blocks stay until their pages
    are needed, and are evicted in the order in which they were freed. A sequence that uses a block uses all blocks
    before it, and frees its last block first: so no block is evicted before those that follow it.
    """

    def __init__(self, n_pages: int, page_tokens: int) -> None:
        self.n_pages, self.page_tokens = n_pages, page_tokens
        self.n_reusable = 0
        """Pages of cached blocks that no sequence uses."""
        self._free = list(range(n_pages))[::-1]
        self._cached: dict[tuple[object, ...], Block] = {}
        self._unused: dict[tuple[object, ...], Block] = {}  # a part of `_cached`, in the order of eviction

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_used(self) -> int:
        """Pages of blocks that sequences use."""
        return self.n_pages - self.n_free - self.n_reusable

    @property
    def n_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + self.n_reusable

    def allocate(self, seq: Sequence, n_blocks: int) -> None:
        """Append new blocks to a sequence; there must be enough pages available."""
        while len(self._free) < n_blocks * seq.pages_per_block:
            # Evict the cached block that has been unused for longest. All its pages become free, even if the new block
            # needs fewer: blocks of another depth have another number of pages.
            key = next(iter(self._unused))
            block = self._unused.pop(key)
            del self._cached[key]
            block.key = None
            self.n_reusable -= len(block.pages)
            self._free += block.pages
        for _ in range(n_blocks):
            seq.blocks.append(Block(tuple(self._free.pop() for _ in range(seq.pages_per_block))))

    def match_prefix(self, seq: Sequence) -> int:
        """Append to a new sequence the longest chain of cached blocks that its prompt begins with; return its tokens.

        The last prompt token is never matched: it has to be computed, because the next token is drawn from its logits.
        """
        tokens, before = seq.prompt_ids[:-1], seq.depth_key
        for start in range(0, len(tokens) - self.page_tokens + 1, self.page_tokens):
            key = (before, tuple(tokens[start : start + self.page_tokens]))
            block = self._cached.get(key)
            if block is None:
                break
            # A block that nobody used is no longer up for eviction.
            if not block.ref_count:
                del self._unused[key]
                self.n_reusable -= len(block.pages)
            block.ref_count += 1
            seq.blocks.append(block)
            before = block
        return len(seq.blocks) * self.page_tokens

    def cache_blocks(self, seq: Sequence, first: int, end: int) -> None:
        """Let other sequences find the blocks `first` to `end`, which are full now.

        Where an equal block is cached already, this one and all that follow stay private: their keys would have to name
        a block that nobody finds.
        """
        for i in range(first, end):
            before = seq.blocks[i - 1] if i else None
            key = (before or seq.depth_key, tuple(seq.ids(i * self.page_tokens, (i + 1) * self.page_tokens)))
            if (before and before.key is None) or key in self._cached:
                break
            self._cached[key] = seq.blocks[i]
            seq.blocks[i].key = key

    def free(self, seq: Sequence) -> None:
        """Take all blocks from a sequence, the last first."""
        for block in reversed(seq.blocks):
            block.ref_count -= 1
            if block.ref_count:
                continue
            # A private block is of no use to anyone else; a cached one stays until its pages are needed.
            if block.key is None:
                self._free += block.pages
            else:
                self._unused[block.key] = block
                self.n_reusable += len(block.pages)
        seq.blocks = []
