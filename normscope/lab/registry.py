"""Which experiments there are, which of them can be run, and which claims each is about."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from normscope.errors import ArgumentError
from normscope.lab import experiments
from normscope.lab.catalogue import CATALOGUE
from normscope.lab.experiment import Experiment

__all__ = ["load", "runnable"]


@cache
def _modules() -> dict[str, str]:
    """Name of the experiment → module: a file is called a16_sigmoid.py."""
    found = pkgutil.iter_modules(experiments.__path__, experiments.__name__ + ".")
    names = {module.name.rpartition(".")[2].partition("_")[0].upper(): module.name for module in found}
    return {name: names[name] for name in CATALOGUE if name in names}


def runnable() -> tuple[str, ...]:
    """The experiments that can be run, in the order of the catalogue."""
    return tuple(_modules())


@cache
def load(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        ArgumentError: there is none, or it is not written yet.
    """
    if name not in CATALOGUE:
        close = difflib.get_close_matches(name.upper(), CATALOGUE)
        hint = f"did you mean {' or '.join(close)}?" if close else 'see "normscope lab list"'
        raise ArgumentError(f"there is no experiment {name!r}", cure=hint)
    if name not in _modules():
        raise ArgumentError(f"experiment {name} ({CATALOGUE[name]}) is open: it is not written yet")
    experiment: Experiment = importlib.import_module(_modules()[name]).EXPERIMENT
    return experiment
