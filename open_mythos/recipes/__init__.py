"""Recipes: a run is a function that returns its TrainConfig. A new one is one function and one line in this table."""

import difflib
from collections.abc import Callable
from functools import partial

from open_mythos.recipes.adaptive import adaptive_text
from open_mythos.recipes.addition import addition_dgx, tiny_addition
from open_mythos.recipes.chat import chat
from open_mythos.recipes.khop import tiny_khop
from open_mythos.recipes.pretrain import ablation_118m, mythos_3b_fineweb_edu, parcae_style_140m, pretrain
from open_mythos.recipes.text import SMALL_TEXT_DATA, small_text, tiny_text
from open_mythos.train.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "tiny-khop": tiny_khop,
    "tiny-addition": tiny_addition,
    "addition-dgx": addition_dgx,
    "tiny-text": tiny_text,
    "adaptive-text": adaptive_text,
    "small-text": small_text,
    "chat": chat,
    "ablation-118m": ablation_118m,
    "parcae-style-140m": parcae_style_140m,
    "mythos-3b-fineweb-edu": mythos_3b_fineweb_edu,
    "mythos-1b": partial(pretrain, "1b"),
    "mythos-10b": partial(pretrain, "10b"),
    "mythos-50b": partial(pretrain, "50b"),
    "mythos-100b": partial(pretrain, "100b"),
    "mythos-500b": partial(pretrain, "500b"),
    "mythos-1t": partial(pretrain, "1t"),
}
CPU_SECONDS = {
    "tiny-khop": 61,  # docs/results/khop/report.json
    "tiny-addition": 155,  # docs/results/addition/report.json
    "addition-dgx": 24_000,  # a step takes 5.1 times as long as one of tiny-addition, measured side by side
    "tiny-text": 80,
    "small-text": 220,  # docs/results/small_text/report.json
    "adaptive-text": 1_320,
}
"""CPU seconds of a whole run on one core of a server CPU with AVX-512, as measured."""
DATA = {"small-text": SMALL_TEXT_DATA}
"""The commands that make the data of recipes whose data has to be prepared."""


def load_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe by name.

    Raises:
        ValueError: no such recipe; the message names the nearest one.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        remedy = f"did you mean {near[0]}?" if near else "use one of them"
        raise ValueError(f"recipe={name!r} must be one of {', '.join(RECIPES)}; {remedy}")
    return RECIPES[name]()
