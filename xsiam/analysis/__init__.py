"""Analyses of what a model attends to, each a small module with the same interface.

An analysis says what it needs (`Needs`), asks for token vectors (`requests`), answers (`run`) and
is drawn (`plot`). They share a `Context`: pairs, models and attributions, each text integrated
once.
"""

from xsiam.analysis.accuracy import Accuracy
from xsiam.analysis.adjectives import Adjectives
from xsiam.analysis.agreement import Agreement
from xsiam.analysis.alignment import AlignmentAnalysis
from xsiam.analysis.base import (
    ANALYSES,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    NotApplicableError,
    ResultTable,
    VectorRequest,
    get_analysis,
    register_analysis,
)
from xsiam.analysis.concentration import Concentration
from xsiam.analysis.context import Context
from xsiam.analysis.faithfulness import Faithfulness
from xsiam.analysis.lexical_bias import LexicalBias
from xsiam.analysis.mitigation import Mitigation
from xsiam.analysis.negation import Negation
from xsiam.analysis.performance import Performance
from xsiam.analysis.randomisation import Randomisation
from xsiam.analysis.reference_terms import ReferenceTerms
from xsiam.analysis.retrieval_margins import RetrievalMargins
from xsiam.analysis.runner import Plan
from xsiam.analysis.statistics import Finding, Interval, interval, judge
from xsiam.analysis.summary import summary_of
from xsiam.analysis.syntax import Syntax

__all__ = [
    "ANALYSES",
    "AbstractAnalysis",
    "Accuracy",
    "Adjectives",
    "Agreement",
    "AlignmentAnalysis",
    "AnalysisResult",
    "Concentration",
    "Context",
    "Faithfulness",
    "Finding",
    "Interval",
    "LexicalBias",
    "Mitigation",
    "Needs",
    "Negation",
    "NotApplicableError",
    "Performance",
    "Plan",
    "Randomisation",
    "ReferenceTerms",
    "ResultTable",
    "RetrievalMargins",
    "Syntax",
    "VectorRequest",
    "get_analysis",
    "interval",
    "judge",
    "register_analysis",
    "summary_of",
]
