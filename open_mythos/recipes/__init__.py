"""Recipes: functions that return the TrainConfig of a run. A new one is a function and a line of RECIPES."""

import difflib
from collections.abc import Callable
from functools import partial

from open_mythos.recipes.pretrain import ablation_118m, mythos_3b_fineweb_edu, parcae_style_140m, pretrain
from open_mythos.recipes.synthetic import addition_dgx, tiny_addition, tiny_khop
from open_mythos.recipes.text import SMALL_TEXT_DATA, adaptive_text, chat, small_text, tiny_text
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
    **{f"mythos-{size}": partial(pretrain, size) for size in ("1b", "10b", "50b", "100b", "500b", "1t")},
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
"""Commands that prepare the data of a recipe, for recipes whose data has to be prepared."""


def load_recipe(name: str) -> TrainConfig:
    """Return the configuration of a recipe by name.

    Raises:
        ValueError: no such recipe; the message names the nearest one.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        remedy = f"did you mean {near[0]}?" if near else "use one of them"
        raise ValueError(f"recipe={name!r} must be one of {', '.join(RECIPES)}; {remedy}")
    return RECIPES[name]()
