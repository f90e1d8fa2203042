"""What each op does to its dimensions: one declarative line an op, and the strategies that follow from it."""

from deepseed.rules.blocks import Candidates, candidates, op_strategies
from deepseed.rules.lanes import on_lane
from deepseed.rules.local import localize_op, localize_timed
from deepseed.rules.signature import Call, Rule, RuleError, Signature
from deepseed.rules.strategy import Strategy, cuts, factor_outers, is_instance, show, signature, strategies
from deepseed.rules.table import RULES, rule_of

__all__ = [
    "RULES",
    "Call",
    "Candidates",
    "Rule",
    "RuleError",
    "Signature",
    "Strategy",
    "candidates",
    "cuts",
    "factor_outers",
    "is_instance",
    "localize_op",
    "localize_timed",
    "on_lane",
    "op_strategies",
    "rule_of",
    "show",
    "signature",
    "strategies",
]
