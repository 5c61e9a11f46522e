import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from embedlib.compress.growth import grow_tokenizer, spelling_rows
from embedlib.compress.tokenizer import BYTE_PIECES, prune_tokenizer, read_pieces
from embedlib.compress.vocab import VocabularyConfig, choose_pieces
from embedlib.errors import ConfigError

STEMS = ("kitabu", "nyumba", "rafiki", "chakula", "safari", "haraka")
SWAHILI = [f"{first} na {second}ni" for first in STEMS for second in STEMS] * 5
ENGLISH = ["the organ is here", "here is the organ"] * 5
TEXTS = {"en": ENGLISH, "sw": [*SWAHILI, "<0x41> ☃a ☃as"]}


def teacher() -> Tokenizer:
    """Whole words for English, characters alone for the rest."""
    words = ["▁the", "▁organ", "▁is", "▁here", "▁na"]
    characters = sorted({"▁", *"".join([*STEMS, "the organ is here <0x41>".replace(" ", "")])})
    scored = [(word, -4.0 - 0.1 * number) for number, word in enumerate(words)]
    scored += [(character, -9.0 - 0.01 * number) for number, character in enumerate(characters)]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *scored], unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


@pytest.fixture(scope="module")
def grown() -> Tokenizer:
    return grow_tokenizer(teacher(), TEXTS, {"sw": 60})


def tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    return sum(len(tokenizer.encode(text).ids) for text in texts)


def test_new_pieces_follow_the_teachers_and_shorten_the_language(grown: Tokenizer) -> None:
    old, new = read_pieces(teacher()), read_pieces(grown)
    assert new.texts[: len(old.texts)] == old.texts
    assert new.scores[: len(old.scores)] == old.scores
    added = new.texts[len(old.texts) :]
    assert set(added) >= {"▁" + stem for stem in STEMS}
    assert len(set(new.texts)) == len(new.texts)
    assert tokens(grown, SWAHILI) < 0.5 * tokens(teacher(), SWAHILI)
    assert [grown.encode(text).tokens for text in ENGLISH] == [teacher().encode(text).tokens for text in ENGLISH]


def test_neither_bytes_nor_characters_unknown_to_the_teacher_are_proposed(grown: Tokenizer) -> None:
    added = read_pieces(grown).texts[len(read_pieces(teacher()).texts) :]
    assert not set(added) & {*BYTE_PIECES, "<unk>"}
    assert not [text for text in added if "☃" in text]


def test_scores_are_on_the_teachers_scale(grown: Tokenizer) -> None:
    """A teacher less sure of everything gives new pieces that are less likely by as much."""
    state = read_pieces(teacher())
    lowered = Tokenizer(
        models.Unigram(
            [(text, score - 5) for text, score in zip(state.texts, state.scores, strict=True)],
            unk_id=0,
            byte_fallback=False,
        )
    )
    lowered.normalizer, lowered.pre_tokenizer = teacher().normalizer, teacher().pre_tokenizer
    lowered.add_special_tokens(["<unk>"])
    first, second = read_pieces(grown), read_pieces(grow_tokenizer(lowered, TEXTS, {"sw": 60}))
    assert first.texts == second.texts
    np.testing.assert_allclose(
        np.array(second.scores[len(state.texts) :]) + 5, first.scores[len(state.texts) :], atol=0.002
    )


def test_new_pieces_compete_for_the_same_room(grown: Tokenizer) -> None:
    config = VocabularyConfig(size=256 + len(read_pieces(teacher()).texts), character_coverage=1, prior=0)
    texts = {"sw": TEXTS["sw"]}
    without = choose_pieces(teacher(), texts, config)
    kept = choose_pieces(teacher(), texts, config, grown)
    assert kept.size == without.size == config.size
    assert without.num_new == 0
    assert kept.num_new > 0
    assert kept.ids == (*kept.old_ids, *kept.ids[-kept.num_new :])
    assert max(kept.old_ids) < len(read_pieces(teacher()).texts) <= kept.ids[-kept.num_new]
    assert without.growth["sw"] >= 0 > kept.growth["sw"]
    student = prune_tokenizer(grown, kept.ids)
    assert kept.growth["sw"] == pytest.approx(tokens(student, TEXTS["sw"]) / tokens(teacher(), TEXTS["sw"]) - 1)
    new_texts = read_pieces(grown).texts
    assert [student.id_to_token(row) for row in range(len(kept.ids))] == [new_texts[index] for index in kept.ids]
    assert student.encode("kitabu ☃ <0x41> ξ").tokens.count("<unk>") == 0


def test_rows_of_what_spells_a_piece() -> None:
    embedding = torch.randn(len(read_pieces(teacher()).texts), 4, generator=torch.Generator().manual_seed(0))
    ids = [teacher().token_to_id(text) for text in ("▁na", "s", "a")]
    found = spelling_rows(embedding, teacher(), ["▁nasa", "na"])
    torch.testing.assert_close(found[0], embedding[ids].mean(0))
    torch.testing.assert_close(found[1], embedding[[teacher().token_to_id(text) for text in "na"]].mean(0))


def test_refuses_languages_without_texts_and_other_tokenizers() -> None:
    with pytest.raises(ConfigError, match=r"new_pieces: 'xx' has no texts; expected some of en, sw"):
        grow_tokenizer(teacher(), TEXTS, {"xx": 60})
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))  # noqa: S106
    with pytest.raises(ConfigError, match="new_pieces: the teacher's tokenizer is WordPiece; expected Unigram"):
        grow_tokenizer(wordpiece, TEXTS, {"sw": 60})
