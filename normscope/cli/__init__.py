"""The command line: arguments in, exit code out.

Exit codes: 0 fine, 1 findings, 2 usage or loading error, 3 internal error or state not restored. Results go to stdout,
progress and errors to stderr.
"""

import normscope.cli.bench
import normscope.cli.convert
import normscope.cli.demo
import normscope.cli.doctor
import normscope.cli.lab
import normscope.cli.selftest
import normscope.cli.surgery  # noqa: F401 - they register their commands
from normscope.cli.group import main

__all__ = ["main"]
