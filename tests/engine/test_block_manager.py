"""Pages: who has what, what may be used again, and what is evicted first."""

import random

import pytest

from open_mythos.engine.block_manager import BlockManager
from open_mythos.engine.sequence import Block, Sequence
from open_mythos.generation.sampling_params import SamplingParams


def sequence(tokens: list[int], depth_key: str | int = "deep", per_block: int = 1) -> Sequence:
    """A sequence whose prompt has these tokens, and a last one that is never looked for."""
    return Sequence(0, [*tokens, 99], SamplingParams(), 1, depth_key, True, per_block)


def filled(blocks: BlockManager, tokens: list[int], depth_key: str | int = "deep", per_block: int = 1) -> Sequence:
    """A sequence that has computed these tokens (2 in a block), after what it found."""
    seq = sequence(tokens, depth_key, per_block)
    blocks.match_prefix(seq)
    first = len(seq.blocks)
    blocks.allocate(seq, len(tokens) // 2 - first)
    blocks.cache_blocks(seq, first, len(seq.blocks))
    return seq


def found(blocks: BlockManager, tokens: list[int], depth_key: str = "deep") -> list[Block]:
    """The blocks that a prompt finds, which it then uses."""
    seq = sequence(tokens, depth_key)
    assert blocks.match_prefix(seq) == 2 * len(seq.blocks)
    return seq.blocks


def counts(blocks: BlockManager) -> tuple[int, int, int]:
    return blocks.n_free, blocks.n_used, blocks.n_reusable


def test_equal_beginnings_share() -> None:
    blocks = BlockManager(20, 2)
    a = filled(blocks, [1, 2, 3, 4, 5, 6])
    b = filled(blocks, [1, 2, 3, 4, 9, 9])
    of_a = list(a.blocks)
    assert a.blocks[:2] == b.blocks[:2] and a.blocks[2] is not b.blocks[2]
    assert [block.ref_count for block in a.blocks] == [2, 2, 1]
    assert counts(blocks) == (16, 4, 0)
    blocks.free(a)
    assert counts(blocks) == (16, 3, 1) and not a.blocks
    blocks.free(b)
    assert counts(blocks) == (16, 0, 4)
    assert found(blocks, [1, 2, 3, 4, 5, 6]) == of_a
    assert counts(blocks) == (16, 3, 1)


def test_tokens_in_another_place_are_others() -> None:
    """The key of the second block has its tokens and the first ones; and other depths have other values."""
    blocks = BlockManager(20, 2)
    filled(blocks, [1, 2, 3, 4])
    assert not found(blocks, [3, 4])
    assert not found(blocks, [9, 9, 3, 4])
    assert not found(blocks, [1, 2], "shallow")
    assert len(found(blocks, [1, 2, 9, 9])) == 1


def test_only_full_blocks_match() -> None:
    blocks = BlockManager(20, 2)
    filled(blocks, [1, 2, 3, 4])
    assert [len(found(blocks, [1, 2, 3, 4][:n])) for n in range(5)] == [0, 0, 1, 1, 2]


def test_the_last_token_of_a_prompt_is_never_found() -> None:
    """The token that follows a prompt is drawn from the logits of its last token, which are not cached."""
    blocks = BlockManager(20, 2)
    filled(blocks, [1, 2, 3, 4])
    whole = Sequence(0, [1, 2, 3, 4], SamplingParams(), 1, "deep", True, 1)
    assert blocks.match_prefix(whole) == 2


def test_an_equal_block_stays_private() -> None:
    """Computed twice at once: the first is cached; the second and what follows it are its sequence's own."""
    blocks = BlockManager(20, 2)
    a, b = sequence([1, 2, 3, 4]), sequence([1, 2, 7, 8])
    blocks.allocate(a, 2)
    blocks.allocate(b, 2)
    blocks.cache_blocks(a, 0, 2)
    blocks.cache_blocks(b, 0, 1)
    blocks.cache_blocks(b, 1, 2)
    assert all(block.key for block in a.blocks) and not any(block.key for block in b.blocks)
    blocks.free(b)
    assert counts(blocks) == (18, 2, 0)
    assert found(blocks, [1, 2, 7, 8]) == a.blocks[:1]


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    blocks = BlockManager(6, 2)
    a, b = filled(blocks, [1, 1, 2, 2, 3, 3]), filled(blocks, [7, 7, 8, 8, 9, 9])
    of_a, of_b = list(a.blocks), list(b.blocks)
    blocks.free(a)
    blocks.free(b)
    again = sequence([1, 1])
    blocks.match_prefix(again)
    blocks.free(again)  # its beginning was used once more
    order = []
    for _ in range(6):
        cached = [block for block in (*of_a, *of_b) if block.key]
        blocks.allocate(sequence([0, 0]), 1)
        order += [block for block in cached if not block.key]
    assert order == [of_a[2], of_a[1], of_b[2], of_b[1], of_b[0], of_a[0]]
    assert counts(blocks) == (0, 6, 0)


def test_blocks_of_different_size() -> None:
    """Depths differ in pages per block; what is left over when blocks are evicted stays free."""
    blocks = BlockManager(10, 2)
    blocks.free(filled(blocks, [1, 2, 3, 4], "deep", per_block=5))
    other = sequence([0] * 6, per_block=2)
    blocks.allocate(other, 3)
    assert counts(blocks) == (4, 6, 0)
    assert len({page for block in other.blocks for page in block.pages}) == 6


@pytest.mark.parametrize("seed", range(4))
def test_random(seed: int) -> None:
    """Against a plain record of what each page has: the tokens from the start and the depth."""
    rng = random.Random(seed)
    blocks = BlockManager(60, 2)
    live: list[Sequence] = []
    memory: dict[int, object] = {}
    hits = 0
    for _ in range(3000):
        if live and (rng.random() < 0.5 or blocks.n_available < 15):
            blocks.free(live.pop(rng.randrange(len(live))))
        else:
            tokens = [rng.randrange(2) for _ in range(2 * rng.randrange(1, 6))]
            depth = rng.choice([1, 3])
            seq = sequence(tokens, depth, depth)
            n_found = blocks.match_prefix(seq) // 2
            hits += n_found
            for i, block in enumerate(seq.blocks):
                assert all(memory[page] == (depth, tokens[: 2 * i + 2]) for page in block.pages)
            blocks.allocate(seq, len(tokens) // 2 - n_found)
            for i, block in list(enumerate(seq.blocks))[n_found:]:
                assert block.key is None and block.ref_count == 1
                memory |= dict.fromkeys(block.pages, (depth, tokens[: 2 * i + 2]))
            blocks.cache_blocks(seq, n_found, len(seq.blocks))
            live.append(seq)
        used = {page for seq in live for block in seq.blocks for page in block.pages}
        assert counts(blocks) == (blocks.n_free, len(used), 60 - blocks.n_free - len(used))
    assert hits > 1000
    for seq in live:
        blocks.free(seq)
    last = sequence([0] * 120)
    assert blocks.n_used == 0
    blocks.allocate(last, 60)
    assert len(last.blocks) == 60
