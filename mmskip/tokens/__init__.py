"""Token groups, selection and routers, shared by every method that routes tokens."""

from mmskip.tokens.controls import norm_scores, random_scores, uniform_scores
from mmskip.tokens.groups import Budget, TokenGroups, token_groups
from mmskip.tokens.queries import Queries, ranking_queries
from mmskip.tokens.router import TokenRouter, gate_of, token_scores
from mmskip.tokens.selection import Selection, compact, select

__all__ = [
    "Budget",
    "Queries",
    "Selection",
    "TokenGroups",
    "TokenRouter",
    "compact",
    "gate_of",
    "norm_scores",
    "random_scores",
    "ranking_queries",
    "select",
    "token_groups",
    "token_scores",
    "uniform_scores",
]
