"""Experiments about published claims, one claim per file; `normscope.report` draws what they record."""
