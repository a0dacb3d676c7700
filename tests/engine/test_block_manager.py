"""Pages: who holds what, what may be used again, and what is given up first."""

import random

import pytest

from open_mythos.engine.block_manager import Pages
from open_mythos.engine.sequence import Block


def filled(pages: Pages, tokens: list[int], depth_key: str = "deep", per_block: int = 1) -> list[Block]:
    """A sequence that has computed these tokens (2 in a block), after what it found."""
    blocks = pages.match(depth_key, tokens)
    first = len(blocks)
    blocks += pages.take(len(tokens) // 2 - first, per_block)
    pages.know(blocks, depth_key, tokens, first, len(blocks))
    return blocks


def counts(pages: Pages) -> tuple[int, int, int]:
    return pages.n_free, pages.n_used, pages.n_reusable


def test_equal_beginnings_share() -> None:
    pages = Pages(20, 2)
    a = filled(pages, [1, 2, 3, 4, 5, 6])
    b = filled(pages, [1, 2, 3, 4, 9, 9])
    assert a[:2] == b[:2] and a[2] is not b[2]
    assert [block.holders for block in a] == [2, 2, 1]
    assert counts(pages) == (16, 4, 0)
    pages.release(a)
    assert counts(pages) == (16, 3, 1)
    pages.release(b)
    assert counts(pages) == (16, 0, 4)
    assert pages.match("deep", [1, 2, 3, 4, 5, 6]) == a
    assert counts(pages) == (16, 3, 1)


def test_tokens_in_another_place_are_others() -> None:
    """The second block holds what its tokens are after the first ones; and other depths hold other values."""
    pages = Pages(20, 2)
    filled(pages, [1, 2, 3, 4])
    assert not pages.match("deep", [3, 4])
    assert not pages.match("deep", [9, 9, 3, 4])
    assert not pages.match("shallow", [1, 2])
    assert len(pages.match("deep", [1, 2, 9, 9])) == 1


def test_only_full_blocks_match() -> None:
    pages = Pages(20, 2)
    filled(pages, [1, 2, 3, 4])
    assert [len(pages.match("deep", [1, 2, 3, 4][:n])) for n in range(5)] == [0, 0, 1, 1, 2]


def test_an_equal_block_stays_private() -> None:
    """Computed twice at once: the first is known; the second and what follows it are its sequence's own."""
    pages = Pages(20, 2)
    a, b = pages.take(2, 1), pages.take(2, 1)
    pages.know(a, "deep", [1, 2, 3, 4], 0, 2)
    pages.know(b, "deep", [1, 2, 7, 8], 0, 1)
    pages.know(b, "deep", [1, 2, 7, 8], 1, 2)
    assert all(block.key for block in a) and not any(block.key for block in b)
    pages.release(b)
    assert counts(pages) == (18, 2, 0)
    assert pages.match("deep", [1, 2, 7, 8]) == a[:1]


def test_the_least_recently_held_goes_first_and_ends_before_beginnings() -> None:
    pages = Pages(6, 2)
    a, b = filled(pages, [1, 1, 2, 2, 3, 3]), filled(pages, [7, 7, 8, 8, 9, 9])
    pages.release(a)
    pages.release(b)
    pages.release(pages.match("deep", [1, 1]))  # its beginning is used once more
    order = []
    for _ in range(6):
        held = [block for block in (*a, *b) if block.key]
        pages.take(1, 1)
        order += [block for block in held if not block.key]
    assert order == [a[2], a[1], b[2], b[1], b[0], a[0]]
    assert counts(pages) == (0, 6, 0)


def test_blocks_of_different_size() -> None:
    """Depths differ in pages per block; what is left over when blocks are given up stays free."""
    pages = Pages(10, 2)
    pages.release(filled(pages, [1, 2, 3, 4], "deep", per_block=5))
    blocks = pages.take(3, 2)
    assert counts(pages) == (4, 6, 0)
    assert len({page for block in blocks for page in block.pages}) == 6


@pytest.mark.parametrize("seed", range(4))
def test_random(seed: int) -> None:
    """Against a plain record of what each page holds: the tokens from the start and the depth."""
    rng = random.Random(seed)
    pages = Pages(60, 2)
    held: list[list[Block]] = []
    memory: dict[int, object] = {}
    hits = 0
    for _ in range(3000):
        if held and (rng.random() < 0.5 or pages.n_available < 15):
            pages.release(held.pop(rng.randrange(len(held))))
        else:
            tokens = [rng.randrange(2) for _ in range(2 * rng.randrange(1, 6))]
            depth = rng.choice([1, 3])
            known = pages.match(depth, tokens)
            hits += len(known)
            for i, block in enumerate(known):
                assert all(memory[page] == (depth, tokens[: 2 * i + 2]) for page in block.pages)
            blocks = known + pages.take(len(tokens) // 2 - len(known), depth)
            for i, block in list(enumerate(blocks))[len(known) :]:
                assert block.key is None and block.holders == 1
                memory |= dict.fromkeys(block.pages, (depth, tokens[: 2 * i + 2]))
            pages.know(blocks, depth, tokens, len(known), len(blocks))
            held.append(blocks)
        used = {page for blocks in held for block in blocks for page in block.pages}
        assert counts(pages) == (pages.n_free, len(used), 60 - pages.n_free - len(used))
    assert hits > 1000
    for blocks in held:
        pages.release(blocks)
    assert pages.n_used == 0 and len(pages.take(60, 1)) == 60
