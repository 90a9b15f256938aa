"""One experiment per file; `EXPERIMENT` is what the registry loads."""
