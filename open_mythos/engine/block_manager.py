"""Which pages are free, and which hold what another sequence may use again. No torch."""

from collections.abc import Hashable, Sequence

from open_mythos.engine.sequence import Block


class Pages:
    """Blocks out of `n_pages` pages. A page is free, or in a block that sequences hold, or in one that may be reused.

    A full block is known by the block before it (the first one by the depth key) and its tokens, so equal keys mean
    equal tokens from the start. Nobody writes a known block again. Known blocks that nobody holds stay until their
    pages are needed, the least recently held first. Who holds a block holds all before it, and lets go of the last
    first: so a block is never given up before those that follow it.
    """

    def __init__(self, n_pages: int, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._free = list(range(n_pages))[::-1]
        self._known: dict[tuple[object, ...], Block] = {}
        self._reusable: dict[tuple[object, ...], Block] = {}  # in the order they are given up
        self.n_pages = n_pages
        self.n_reusable = 0

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_used(self) -> int:
        """Pages in blocks that sequences hold."""
        return self.n_pages - self.n_free - self.n_reusable

    @property
    def n_available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + self.n_reusable

    def take(self, n_blocks: int, pages_per_block: int) -> list[Block]:
        """New blocks with one holder; there must be enough available."""
        while len(self._free) < n_blocks * pages_per_block:
            key = next(iter(self._reusable))
            block = self._reusable.pop(key)
            del self._known[key]
            block.key = None
            self.n_reusable -= len(block.pages)
            self._free += block.pages
        return [Block(tuple(self._free.pop() for _ in range(pages_per_block))) for _ in range(n_blocks)]

    def match(self, depth_key: Hashable, tokens: Sequence[int]) -> list[Block]:
        """The longest chain of known blocks that `tokens` begin with, now held once more."""
        blocks: list[Block] = []
        before: object = depth_key
        for start in range(0, len(tokens) - self._page_tokens + 1, self._page_tokens):
            key = (before, tuple(tokens[start : start + self._page_tokens]))
            block = self._known.get(key)
            if block is None:
                break
            if not block.holders:
                del self._reusable[key]
                self.n_reusable -= len(block.pages)
            block.holders += 1
            blocks.append(block)
            before = block
        return blocks

    def know(self, blocks: list[Block], depth_key: Hashable, tokens: Sequence[int], first: int, end: int) -> None:
        """Blocks `first` to `end` of a sequence are full now: others may use them, unless an equal one is known."""
        for i in range(first, end):
            before: object = blocks[i - 1] if i else depth_key
            key = (before, tuple(tokens[i * self._page_tokens : (i + 1) * self._page_tokens]))
            if (i and blocks[i - 1].key is None) or key in self._known:
                break
            self._known[key] = blocks[i]
            blocks[i].key = key

    def release(self, blocks: list[Block]) -> None:
        """A sequence lets go of all its blocks, given from its first on."""
        for block in reversed(blocks):
            block.holders -= 1
            if block.holders:
                continue
            if block.key is None:
                self._free += block.pages
            else:
                self._reusable[block.key] = block
                self.n_reusable += len(block.pages)
