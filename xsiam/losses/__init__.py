"""Training objectives, and what each of them needs of the data.

================  =====================================================  ========  ===========
name              what is small                                          labels    negatives
================  =====================================================  ========  ===========
``mse_cosine``    squared error of the cosine (published)                required  not allowed
``mse_dot``       squared error of the dot product                       required  not allowed
``cosent``        scores in another order than the labels                required  not allowed
``contrastive``   probability of texts other than the anchor's positive  none      optional
``triplet``       negatives nearer than the positive and a margin        none      required
``distillation``  difference to the scores of a teacher                  unread    not allowed
================  =====================================================  ========  ===========

"Negatives" are columns of hard negatives; ``contrastive`` takes the other pairs of a batch as
negatives besides. `Matryoshka` has any of them for several lengths of an embedding at once.
"""

from xsiam.losses.base import (
    OBJECTIVES,
    AbstractObjective,
    EmbeddedBatch,
    get_objective,
    register_objective,
)
from xsiam.losses.contrastive import Contrastive
from xsiam.losses.distillation import Distillation
from xsiam.losses.labelled import CoSENT, MSECosine, MSEDot
from xsiam.losses.matryoshka import Matryoshka, matryoshka_of
from xsiam.losses.triplet import Triplet

__all__ = [
    "OBJECTIVES",
    "AbstractObjective",
    "CoSENT",
    "Contrastive",
    "Distillation",
    "EmbeddedBatch",
    "MSECosine",
    "MSEDot",
    "Matryoshka",
    "Triplet",
    "get_objective",
    "matryoshka_of",
    "register_objective",
]
