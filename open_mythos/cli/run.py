"""Reading the run that a command is about: a recipe by name or a config.yaml, and any field given as a flag."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import tyro

if TYPE_CHECKING:
    from open_mythos.train.config import TrainConfig

RECIPES = (
    "tiny-khop",
    "tiny-addition",
    "addition-dgx",
    "tiny-text",
    "adaptive-text",
    "ablation-118m",
    "parcae-style-140m",
    "mythos-3b-fineweb-edu",
    "mythos-1b",
    "mythos-10b",
    "mythos-50b",
    "mythos-100b",
    "mythos-500b",
    "mythos-1t",
)
"""The names of `open_mythos.recipes.RECIPES`, which imports torch."""


class RunArgs(Protocol):
    """Options of a command, of which one names a file."""

    config: Path | None


Args = TypeVar("Args", bound=RunArgs)


def read_run(rest: list[str], options: type[Args], command: str, ending: str = "") -> tuple[Args, str, "TrainConfig"]:
    """The command's options, the recipe's name ("" for a file) and the run's configuration.

    Args:
        rest: what stands behind the command.
        ending: what the usage line has to show behind the recipe.
    """
    kept = [arg for arg in rest if arg not in ("-h", "--help")]
    wants_help = len(kept) < len(rest)
    args, overrides = tyro.cli(options, prog=f"{command} RECIPE", args=kept, return_unknown_args=True)
    # A recipe may stand anywhere; a misspelt one is known as such where no flag precedes it.
    place = next((i for i, arg in enumerate(overrides) if arg in RECIPES), 0)
    recipe = overrides.pop(place) if overrides and not overrides[place].startswith("-") else ""
    if wants_help and not recipe:
        tyro.cli(options, prog=f"{command} RECIPE", args=["--help"])
    if bool(recipe) == (args.config is not None):
        raise ValueError(f"give either a recipe ({', '.join(RECIPES)}) or --config FILE, as in {command} tiny-text")

    from open_mythos.recipes import load_recipe
    from open_mythos.train.config import TrainConfig

    cfg = tyro.cli(
        TrainConfig,
        prog=f"{command} {recipe or '--config FILE'}{ending}",
        args=[*overrides, "--help"] if wants_help else overrides,
        default=load_recipe(recipe) if args.config is None else TrainConfig.load(args.config),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return args, recipe, cfg
