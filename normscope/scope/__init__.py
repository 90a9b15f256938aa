"""The idea: every normalizer is y = γ · (x − μ_S)/√(σ²_S + ε) + β, and a pattern says what S is.

`notation` reads the pattern, `plan` finds the sets in memory, `table` names the published ones. No tensors here.
"""

from normscope.scope.notation import Part, Pattern, Scope, parse
from normscope.scope.plan import Plan, make_plan
from normscope.scope.table import SCOPES, NamedScope

__all__ = ["SCOPES", "NamedScope", "Part", "Pattern", "Plan", "Scope", "make_plan", "parse"]
