"""References: the neutral input where an attribution path starts (Captum says *baseline*).

============  ==========================================================  ===========  =============
name          hidden states                                               length-free  made from
============  ==========================================================  ===========  =============
``pad``       the text with PAD for every token of its own (published)    no           nothing
``mask``      the same with the tokenizer's mask token                    no           nothing
``unk``       the same with its unknown token                             no           nothing
``text``      the same with the tokens of a text of the user's            no           a text
``uniform``   one vector at every position: the embedding of PAD          yes          nothing
``mean``      one vector: the average over the tokens of a corpus         yes          texts
``fitted``    one vector c with e(c) as small as can be                   yes          the model
``neutral``   vectors in turns with e(r) = 0, for each layer              (no shift)   the model
============  ==========================================================  ===========  =============
"""

from xsiam.references.base import (
    REFERENCES,
    AbstractReference,
    ReferenceRows,
    get_reference,
    pad_id,
    register_reference,
    row_keys,
)
from xsiam.references.choice import recommended_reference
from xsiam.references.fitted import FitReport, FittedReference, fit_reference
from xsiam.references.neutral import NeutralReference
from xsiam.references.solutions import SolutionReport
from xsiam.references.tokens import MaskReference, PadReference, TextReference, UnkReference
from xsiam.references.uniform import MeanReference, UniformReference, VectorReference

__all__ = [
    "REFERENCES",
    "AbstractReference",
    "FitReport",
    "FittedReference",
    "MaskReference",
    "MeanReference",
    "NeutralReference",
    "PadReference",
    "ReferenceRows",
    "SolutionReport",
    "TextReference",
    "UniformReference",
    "UnkReference",
    "VectorReference",
    "fit_reference",
    "get_reference",
    "pad_id",
    "recommended_reference",
    "register_reference",
    "row_keys",
]
