"""The import path of open-mythos 0.5.0, with the same names as the package. Nothing is defined here."""

from open_mythos import __all__ as __all__
from open_mythos import __getattr__ as __getattr__
