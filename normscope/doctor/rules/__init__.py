"""The rules: small pure functions over measurements, found by importing every file of this folder."""

from __future__ import annotations

import importlib
import pkgutil

from normscope.doctor.rules.base import RULES, Judgement, Rule

__all__ = ["RULES", "Judgement", "Rule"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
