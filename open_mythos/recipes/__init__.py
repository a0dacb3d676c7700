"""Recipes: a run is a function that returns its TrainConfig. A new one is one function and one line in this table."""

from collections.abc import Callable

from open_mythos.recipes.addition import addition_dgx, tiny_addition
from open_mythos.recipes.text import tiny_text
from open_mythos.train.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "tiny-addition": tiny_addition,
    "addition-dgx": addition_dgx,
    "tiny-text": tiny_text,
}
