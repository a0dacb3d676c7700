"""Weights of other implementations in this package's layout. `FAMILIES`: published models, by their `model_type`."""

from types import ModuleType

from open_mythos.convert import huginn, ouro

FAMILIES: dict[str, ModuleType] = {"ouro": ouro, "huginn_raven": huginn}
