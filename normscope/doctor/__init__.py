"""The doctor: measures a model's normalization, judges by rules, prices in the user's metric, repairs and verifies."""

from normscope.doctor.assertion import UnhealthyError, assert_healthy
from normscope.doctor.checkpoint import load
from normscope.doctor.configuration import Configuration, configure
from normscope.doctor.examination import StateNotRestoredError, check, rule_pages
from normscope.doctor.fix import FixReport
from normscope.doctor.judge import known_intents
from normscope.doctor.report import Report
from normscope.doctor.rules import RULES
from normscope.doctor.sensitivity import SelfTestReport, selftest
from normscope.doctor.thresholds import Thresholds
from normscope.doctor.watcher import Watcher, watch

__all__ = [
    "RULES",
    "Configuration",
    "FixReport",
    "Report",
    "SelfTestReport",
    "StateNotRestoredError",
    "Thresholds",
    "UnhealthyError",
    "Watcher",
    "assert_healthy",
    "check",
    "configure",
    "known_intents",
    "load",
    "rule_pages",
    "selftest",
    "watch",
]
