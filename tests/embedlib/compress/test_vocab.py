from typing import get_args

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from embedlib.compress.tokenizer import prune_tokenizer, read_pieces
from embedlib.compress.vocab import ByteMethod, VocabularyConfig, byte_rows, choose_pieces, remap_rows
from embedlib.errors import ArtifactError, ConfigError, DataError

ENGLISH = ["organization of organizations", "the organ", "modernization", "realization"] * 5 + ["zap"]
KOREAN = ["안녕 세계", "안녕하세요"]
ROOM = 285
"""A size between the least and the most for every test's texts."""
TEXTS = {"en": ENGLISH, "ko": KOREAN}


def unigram() -> Tokenizer:
    whole = ["▁organization", "▁modernization", "▁realization", "▁organ", "ization", "▁modern", "▁real", "▁the", "▁of"]
    whole += ["▁안녕", "하세요", "▁세계", "unused"]
    characters = sorted(set("".join(ENGLISH + KOREAN).replace(" ", "▁")) | {"q", "u"})
    scored = [(piece, -4.0 - 0.1 * index) for index, piece in enumerate(whole)]
    scored += [(piece, -9.0 - 0.01 * index) for index, piece in enumerate(characters)]
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [*((special, 0.0) for special in specials), *scored, ("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*specials, "<mask>"])
    return tokenizer


def config(**values: object) -> VocabularyConfig:
    return VocabularyConfig.model_validate({"character_coverage": 1.0, "prior": 0.0} | values)


def minimum(texts: dict[str, list[str]]) -> int:
    return choose_pieces(unigram(), texts, config(size=ROOM)).num_mandatory


def test_shared_parts_outlive_the_words_made_of_them() -> None:
    tokenizer = unigram()
    kept = choose_pieces(tokenizer, {"en": ENGLISH}, config(size=minimum({"en": ENGLISH}) + 4))
    pieces = read_pieces(tokenizer)
    longer = {pieces.texts[index] for index in kept.ids[4:] if len(pieces.texts[index]) > 1}
    assert longer >= {"▁organ", "ization"}
    assert len(kept.ids) + 256 == kept.size == minimum({"en": ENGLISH}) + 4


def test_specials_first_then_ascending_and_no_mask() -> None:
    kept = choose_pieces(unigram(), TEXTS, config(size=ROOM))
    assert kept.ids[:4] == (0, 1, 2, 3)
    assert list(kept.ids[4:]) == sorted(kept.ids[4:])
    assert read_pieces(unigram()).texts.index("<mask>") not in kept.ids
    assert kept.coverage == {"en": 1.0, "ko": 1.0}
    assert kept.unknown == {"en": 0.0, "ko": 0.0}


def test_growth_is_what_the_pruned_tokenizer_shows() -> None:
    teacher = unigram()
    kept = choose_pieces(teacher, TEXTS, config(size=minimum(TEXTS) + 3))
    pruned = prune_tokenizer(teacher, kept.ids)
    for language, texts in TEXTS.items():
        old, new = (
            sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
            for tokenizer in (teacher, pruned)
        )
        assert kept.growth[language] == pytest.approx(new / old - 1)
    assert kept.mean_growth == pytest.approx(sum(kept.growth.values()) / 2)


def test_everything_kept_grows_nothing() -> None:
    teacher = unigram()
    kept = choose_pieces(teacher, TEXTS, config(size=teacher.get_vocab_size() - 1 + 256))
    assert set(kept.growth.values()) == {0.0}


def test_subset_of_languages_drops_the_others() -> None:
    kept = choose_pieces(unigram(), {"en": ENGLISH}, config(size=minimum({"en": ENGLISH})))
    assert not {read_pieces(unigram()).texts[index] for index in kept.ids} & set("안녕하세요계")


def test_prior_brings_the_teachers_pieces_that_the_corpus_lacks() -> None:
    texts = {"en": ["n u s e d q", *ENGLISH]}
    size = minimum(texts) + 9
    with_prior, without = (choose_pieces(unigram(), texts, config(size=size, prior=prior)).ids for prior in (0.9, 0.0))
    unused = read_pieces(unigram()).texts.index("unused")
    assert unused in with_prior
    assert unused not in without


def test_refuses_sizes_out_of_range_and_missing_texts() -> None:
    least = minimum(TEXTS)
    with pytest.raises(ConfigError, match=rf"vocabulary.size: {least - 1}; expected {least} to"):
        choose_pieces(unigram(), TEXTS, config(size=least - 1))
    with pytest.raises(ConfigError, match=r"vocabulary.size: 99999; expected"):
        choose_pieces(unigram(), TEXTS, config(size=99_999))
    with pytest.raises(DataError, match="none for language 'ko'"):
        choose_pieces(unigram(), {"en": ENGLISH, "ko": [" "]}, config(size=ROOM))
    with pytest.raises(ArtifactError, match="model BPE"):
        choose_pieces(Tokenizer(models.BPE()), TEXTS, config())


def test_wordpiece_keeps_specials_characters_and_frequent_pieces() -> None:
    characters = sorted(set("".join(ENGLISH)) - {" "})
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [*specials, *characters, *(f"##{character}" for character in characters)]
    texts += ["organ", "##ization", "organization", "modern", "real", "the", "of", "never"]
    teacher = Tokenizer(models.WordPiece({text: index for index, text in enumerate(texts)}, unk_token="[UNK]"))  # noqa: S106
    teacher.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    teacher.add_special_tokens(specials)
    size = 5 + 2 * len(characters) + 3
    kept = choose_pieces(teacher, {"en": ENGLISH}, config(size=size))
    assert kept.ids[:5] == (0, 1, 2, 3, 4)
    assert (kept.num_bytes, kept.size) == (0, size)
    assert kept.unknown == {"en": 0.0}
    assert {"organ", "##ization"} <= {texts[index] for index in kept.ids}
    uncovered = choose_pieces(teacher, {"en": ENGLISH}, config(size=len(texts) - 30, character_coverage=0.5))
    words = [word for text in ENGLISH for word in text.split()]
    tokens = [prune_tokenizer(teacher, uncovered.ids).encode(word).tokens for word in words]
    assert uncovered.unknown["en"] == pytest.approx(tokens.count(["[UNK]"]) / len(words))
    assert ["[UNK]"] in tokens


def test_kept_rows_are_the_teachers() -> None:
    embedding = torch.randn(100, 3)
    assert torch.equal(remap_rows(embedding, (4, 2, 99)), embedding[[4, 2, 99]])
    with pytest.raises(ArtifactError, match="100 rows; expected more than 100"):
        remap_rows(embedding, (4, 100))


@pytest.mark.parametrize("method", get_args(ByteMethod))
def test_byte_rows_are_finite_and_repeatable(method: ByteMethod) -> None:
    teacher = unigram()
    kept = choose_pieces(teacher, {"en": ENGLISH}, config(size=ROOM)).ids
    embedding = torch.randn(teacher.get_vocab_size() + 7, 5, generator=torch.Generator().manual_seed(1))
    rows = byte_rows(method, embedding, teacher, kept)
    assert rows.shape == (256, 5)
    assert rows.isfinite().all()
    assert torch.equal(rows, byte_rows(method, embedding, teacher, kept))


def test_fit_spells_a_dropped_character_with_its_bytes() -> None:
    teacher = unigram()
    pieces = read_pieces(teacher)
    kept = [index for index, text in enumerate(pieces.texts) if text not in ("안", "<mask>")]
    embedding = torch.randn(len(pieces.texts), 5, generator=torch.Generator().manual_seed(1))
    rows = byte_rows("fit", embedding, teacher, kept)
    spelt = rows[list("안".encode())].mean(0)
    assert torch.allclose(spelt, embedding[pieces.texts.index("안")], atol=0.02)


def test_bytes_the_teacher_has_keep_their_rows() -> None:
    vocabulary = [("<unk>", 0.0), ("a", -1.0), ("<0x41>", -5.0), ("b", -2.0), ("é", -3.0)]
    teacher = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    teacher.add_special_tokens(["<unk>"])
    kept = choose_pieces(teacher, {"xx": ["ab"]}, config(size=256 + 3))
    assert kept.ids == (0, 1, 3)
    embedding = torch.randn(5, 4)
    assert torch.equal(byte_rows("mean", embedding, teacher, kept.ids)[0x41], embedding[2])
    assert prune_tokenizer(teacher, kept.ids).encode("aé").tokens == ["a", "<0xC3>", "<0xA9>"]
