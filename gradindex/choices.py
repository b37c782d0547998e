"""The words to choose from, each list written once: literals for type checkers, tuples for checks and the command line.

Nothing heavy is imported here: ``gradindex --help`` reads it.
"""

from __future__ import annotations

from typing import Literal, get_args

ProjectionKind = Literal["tensorsketch", "fitted", "kronecker", "gaussian", "rademacher", "none"]
PROJECTION_KINDS: tuple[ProjectionKind, ...] = get_args(ProjectionKind)
# Those that a size and a seed do not change: whole gradients.
UNSIZED_PROJECTIONS: tuple[ProjectionKind, ...] = ("none",)

IndexKind = Literal["flat", "ivf", "pq", "spill"]
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)

# Of gradients, while they are computed.
Precision = Literal["float32", "bfloat16", "float16", "float64"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Of rows, in the store.
RowType = Literal["float32", "float16", "bfloat16", "int8", "int4"]
ROW_TYPES: tuple[RowType, ...] = get_args(RowType)

# Of exact factors, in the store.
FactorType = Literal["float32", "float16"]
FACTOR_TYPES: tuple[FactorType, ...] = get_args(FactorType)

# What self-influence is: the gradient's squared norm, or the row's.
Norms = Literal["exact", "projected"]
NORMS: tuple[Norms, ...] = get_args(Norms)

# Which recorded number is eta.
Weighting = Literal["learning_rate", "integrated", "effective", "uniform"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)

Preconditioner = Literal["adam"]
PRECONDITIONERS: tuple[Preconditioner, ...] = get_args(Preconditioner)

# By which inner product queries are compared with stored rows.
QueryGeometry = Literal["tracin", "whitened", "whitened-exact"]
QUERY_GEOMETRIES: tuple[QueryGeometry, ...] = get_args(QueryGeometry)

# The highest scores, the lowest, or the largest sizes.
AnswerKind = Literal["proponents", "opponents", "absolute"]
ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)

# The last stage of a search.
Rerank = Literal["exact", "wide", "rows", "none"]
RERANKS: tuple[Rerank, ...] = get_args(Rerank)

# Whose positions a question names.
Source = Literal["query", "train"]
SOURCES: tuple[Source, ...] = get_args(Source)

# How several queries become one question.
Aggregate = Literal["sum", "mean"]
AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)
