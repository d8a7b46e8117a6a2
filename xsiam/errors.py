"""Every error and warning class that xsiam raises, in one place.

All user errors derive from ``ValueError`` so that code written against Lightning, Captum or
sentence-transformers conventions catches them without importing anything from here. Each message
states the constraint, the value that broke it, and the fix.
"""


class InputError(ValueError):
    """A text, label, column, argument or configuration value does not meet its constraint."""


class ModelError(ValueError):
    """A model cannot do what was asked of it (architecture, pooling, reference, tokenizer)."""


class CheckpointError(ModelError):
    """A checkpoint, exported folder or archive is missing, damaged, unsafe or of a newer format."""


class ProcessError(ValueError):
    """A process of a run lost the others: one of them died, or did not answer in time."""


class HubError(ValueError):
    """A model hub cannot be reached, or does not do what was asked of it."""


class ConvergenceWarning(RuntimeWarning):
    """A quadrature stopped at its budget before the tolerance was met; the best result is kept."""


class TruncationWarning(UserWarning):
    """A text is longer than the model's window; what lies beyond was cut."""
