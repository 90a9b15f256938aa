"""The doctor: measures a model's normalization, judges by rules, prices in the user's metric, repairs and verifies."""

from normscope.doctor.checkpoint import load
from normscope.doctor.configuration import Configuration, configure
from normscope.doctor.examination import StateNotRestoredError, assert_healthy, check, rule_pages
from normscope.doctor.fix import FixReport
from normscope.doctor.judge import known_intents
from normscope.doctor.report import Report, UnhealthyError
from normscope.doctor.rules import RULES
from normscope.doctor.thresholds import Thresholds

__all__ = [
    "RULES",
    "Configuration",
    "FixReport",
    "Report",
    "StateNotRestoredError",
    "Thresholds",
    "UnhealthyError",
    "assert_healthy",
    "check",
    "configure",
    "known_intents",
    "load",
    "rule_pages",
]
