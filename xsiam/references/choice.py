"""Which reference to take where the user names none."""

from __future__ import annotations

import warnings

from xsiam.errors import ModelError
from xsiam.references.base import AbstractReference, get_reference
from xsiam.split import Features, SplitModel


def recommended_reference(split: SplitModel, features: Features) -> AbstractReference:
    """Return the reference that is recommended for a model: `fitted`.

    Without a shift its main effects are the smallest that need no search at every layer
    (``docs/results/references-minilm.md``). With one, scores are almost the model's own from the
    start, training takes less time than with `pad` and ends as well, and the export is a plain
    sentence-transformers model (``docs/results/recipes-minilm.md``).

    Args:
        split: The model.
        features: Features of one short text of ours.

    Warns:
        UserWarning: Where a model does not allow `fitted`, and `pad` is returned instead.
    """
    fitted = get_reference("fitted")
    try:
        fitted.check(split, features)
    except ModelError as error:
        warnings.warn(
            f"Reference 'pad' is taken instead of 'fitted': {error} Name a reference to choose "
            "yourself.",
            UserWarning,
            stacklevel=3,
        )
        return get_reference("pad")
    return fitted
