"""Questions whose difficulty is known: hops to the answer, carries on the way, or nesting before a break.

Shapes: B rows, T tokens.
"""

import dataclasses

import torch
from torch import Tensor

from open_mythos.tasks import Addition, Brackets, KHop
from open_mythos.tasks.addition import PLUS
from open_mythos.tasks.brackets import END, first_break, nesting
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import Batch

Task = KHop | Addition | Brackets
HARD = {
    "khop": "hops to the answer",
    "addition": "length of the chain of carries into the digit",
    "brackets": "nesting before the break",
}
WITHIN = {
    "khop": "",
    "addition": ", among digits of one place",
    "brackets": ", among digits of one place in strings that break at the same",
}
DISTANCES = range(1, 9)


def questions(task: Task, rows: int, seed: int) -> tuple[Batch, Tensor, Tensor]:
    """Draw fresh questions, and return with them each token's difficulty and its group, (B, T) int64 both.

    The difficulty is -1 where it is unknown. Tokens of a group differ in nothing that a rule might go by without
    solving; in brackets they also have one answer.
    """
    rng = stream(seed, 0, Purpose.VALIDATION)
    if isinstance(task, Brackets):
        strings, lengths = dataclasses.replace(task, min_length=task.max_length).draw(rng, rows)
        batch, broken = task.encode(strings, lengths), torch.from_numpy(first_break(strings, lengths))[:, None]
        deep = torch.from_numpy(nesting(strings, lengths))[:, None]
        # Balanced strings have an answer that needs no reading; the replaced bracket gives a few another nesting.
        no_level = (broken < 0) | (deep > task.max_nesting) | (deep < 1) | (batch.labels == END)
        return batch, deep.where(~no_level, -1), 100 * broken + torch.arange(task.seq_len)
    if isinstance(task, Addition):
        batch = task.validation_batch(rng, rows)
        digits = (batch.input_ids == PLUS).int().argmax(1)
        return batch, carries(batch.input_ids), 100 * digits[:, None] + torch.arange(task.seq_len)
    n = rows // len(DISTANCES)
    tasks = [dataclasses.replace(task, target="root", min_distance=d, max_distance=d) for d in DISTANCES]
    parts = [one.batch(rng, n) for one in tasks]
    ids, labels = torch.cat([part.input_ids for part in parts]), torch.cat([part.labels for part in parts])
    distance = torch.tensor(DISTANCES).repeat_interleave(n)[:, None].expand_as(ids)
    return Batch(ids, labels), distance.contiguous(), torch.zeros_like(ids)


def carries(ids: Tensor) -> Tensor:
    """Count, in "A+B=R" with R reversed, the carries in a row that end at each token that predicts a digit of R.

    The others have -1: the end is known by its position, and is no easy digit.
    """
    found = torch.full_like(ids, -1)
    for row, text in zip(found, ids.tolist(), strict=True):
        d = text.index(PLUS)
        a, b = text[:d][::-1], text[d + 1 : 2 * d + 1][::-1]
        chain, carry = 0, 0
        for place in range(d):
            row[2 * d + 1 + place] = chain
            carry = int(a[place] + b[place] + carry > 9)
            chain = chain + 1 if carry else 0
        if carry:
            row[3 * d + 1] = chain
    return found
