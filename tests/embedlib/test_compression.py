import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedModel, XLMRobertaConfig, XLMRobertaModel

from embedlib.compress.layers import only_layers
from embedlib.compress.tokenizer import fallback_texts, read_pieces
from embedlib.compress.vocab import ByteMethod, VocabularyConfig, byte_rows, choose_pieces
from embedlib.compression import (
    Compressed,
    CompressionConfig,
    byte_probe,
    compress,
    known_prompts,
    new_rows,
    write_student,
)
from embedlib.corpus import texts_by_language
from embedlib.encoder import Encoder
from embedlib.errors import ConfigError
from embedlib.model_directory import write_body, write_head, write_tokenizer

Texts = Mapping[str, Sequence[str]]
CPU = torch.device("cpu")
COVERAGE = 0.9
"""Low, so that a few characters of the tiny corpus lose their piece."""


@pytest.fixture(scope="module")
def texts(tiny_corpus: Path) -> dict[str, list[str]]:
    return texts_by_language(tiny_corpus, 100, 0)


@pytest.fixture(scope="module", params=["tiny_encoder", "tiny_xlmr"])
def directory(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def load(directory: Path) -> Encoder:
    return Encoder.load(directory, CPU, torch.float32)


def smallest(teacher: Encoder, texts: Texts) -> int:
    """The mandatory pieces, which is the least vocabulary size."""
    prompted = {
        lang: [prompt + text for text in found for prompt in ("query: ", "passage: ")] for lang, found in texts.items()
    }
    size = len(teacher.tokenizer.get_vocab()) - 1  # without <mask>; characters below coverage may go, bytes come
    with pytest.raises(ConfigError) as caught:
        choose_pieces(teacher.tokenizer, prompted, VocabularyConfig(size=10 * size, character_coverage=COVERAGE))
    return int(str(caught.value).split("expected ")[1].split(" to ")[0])


def configuration(size: int, num_layers: int, **layers: Any) -> CompressionConfig:
    return CompressionConfig.model_validate(
        {
            "layers": {"num_layers": num_layers, "probe_texts": 64, **layers},
            "vocabulary": {"size": size, "character_coverage": COVERAGE},
        }
    )


def make(
    teacher: Encoder, texts: Texts, source: Path, folder: Path, num_layers: int, room: int
) -> tuple[Compressed, Encoder]:
    compressed = compress(teacher, texts, configuration(smallest(teacher, texts) + room, num_layers))
    write_student(folder, compressed.body, compressed.tokenizer, source, teacher.max_seq_length)
    return compressed, load(folder)


def wholly_kept(teacher: Encoder, compressed: Compressed, texts: Sequence[str]) -> list[str]:
    """The texts that the teacher spells with kept pieces alone; the unknown one is no spelling."""
    kept = set(compressed.vocabulary.ids) - {read_pieces(teacher.tokenizer).unknown}
    return [text for text, ids in zip(texts, teacher.tokenise(texts), strict=True) if kept.issuperset(ids.tolist())]


def assert_kept_texts_embed_as_before(
    teacher: Encoder, student: Encoder, compressed: Compressed, texts: list[str]
) -> None:
    prompted = [prompt + text for text in texts for prompt in ("", "query: ", "passage: ")]
    kept = wholly_kept(teacher, compressed, prompted)
    assert 10 < len(kept) < len(prompted)
    np.testing.assert_allclose(student.encode(kept), teacher.encode(kept), atol=1e-6)
    changed = [text for text in prompted if text not in set(kept)]
    assert np.abs(student.encode(changed) - teacher.encode(changed)).max() > 1e-3


@pytest.mark.parametrize("room", [1, 60])
def test_texts_of_kept_pieces_embed_as_before(
    directory: Path, tmp_path: Path, texts: dict[str, list[str]], tiny_texts: list[str], room: int
) -> None:
    teacher = load(directory)
    compressed, student = make(teacher, texts, directory, tmp_path, num_layers=4, room=room)
    assert compressed.layers.best == (0, 1, 2, 3)
    spelt = [f"{first} {second}" for first in "bcdghklmnpr" for second in "stvz"]  # of characters, which are mandatory
    assert_kept_texts_embed_as_before(teacher, student, compressed, [*tiny_texts, *spelt])


def test_a_student_of_two_layers_is_the_teacher_with_only_those(
    directory: Path, tmp_path: Path, texts: dict[str, list[str]], tiny_texts: list[str]
) -> None:
    teacher = load(directory)
    compressed, student = make(teacher, texts, directory, tmp_path, num_layers=2, room=60)
    with only_layers(teacher.body, compressed.layers.best):
        assert_kept_texts_embed_as_before(teacher, student, compressed, tiny_texts)


@pytest.fixture(scope="module")
def student(
    tmp_path_factory: pytest.TempPathFactory, directory: Path, texts: dict[str, list[str]]
) -> tuple[Compressed, Path]:
    folder = tmp_path_factory.mktemp("student")
    teacher = load(directory)
    return make(teacher, texts, directory, folder, num_layers=2, room=30)[0], folder


def test_the_student_is_a_plain_sentence_transformer(student: tuple[Compressed, Path], directory: Path) -> None:
    compressed, folder = student
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    teacher = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    assert model.prompts == teacher.prompts
    assert model.max_seq_length == teacher.max_seq_length
    assert [type(module) for module in model.children()] == [type(module) for module in teacher.children()]
    assert sum(p.numel() for p in model.parameters()) == compressed.measurements["params"]
    assert not list(folder.rglob("*.py"))
    texts = ["the cat is small", "猫は小さい", "☃ unknown </s> <0x41>"]
    np.testing.assert_allclose(model.encode(texts), load(folder).encode(texts), atol=1e-5)


def test_the_student_never_meets_an_unknown(student: tuple[Compressed, Path], tiny_texts: list[str]) -> None:
    encoder = load(student[1])
    unknown = encoder.tokenizer.token_to_id("<unk>")
    for ids in encoder.tokenise([*tiny_texts, "☃ ξ 𝄞 <unk> <0x41> </s>"]):
        assert unknown not in ids
        assert (ids < student[0].vocabulary.size).all()


def test_the_student_keeps_the_teachers_special_ids(student: tuple[Compressed, Path], directory: Path) -> None:
    found, expected = load(student[1]), load(directory)
    for token in ("<s>", "<pad>", "</s>", "<unk>"):
        assert found.tokenizer.token_to_id(token) == expected.tokenizer.token_to_id(token)
    assert found.model.tokenizer.pad_token_id == expected.model.tokenizer.pad_token_id == found.body.config.pad_token_id
    assert found.body.get_input_embeddings().padding_idx == expected.body.get_input_embeddings().padding_idx


def test_what_was_measured(student: tuple[Compressed, Path], directory: Path) -> None:
    compressed, folder = student
    found = compressed.measurements
    assert found["layers"] == list(compressed.layers.best)
    assert (
        found["vocabulary_size"] == len(load(folder).body.get_input_embeddings().weight) == compressed.vocabulary.size
    )
    assert found["vocabulary_mandatory"] == found["vocabulary_size"] - 30
    assert set(found["layer_scores"]) == {str(list(layers)) for layers in compressed.layers.scores}
    best = max(found["layer_scores"].values(), key=lambda score: score["spearman"])
    assert found["layer_scores"][str(found["layers"])] == best
    assert set(found["byte_rows"]) == {"mean", "characters", "fit", "similar"}
    assert all(growth >= 0 for growth in found["vocabulary_growth"].values())
    assert len(found["vocabulary_coverage"]) == 14


def test_the_teacher_is_left_as_it_was(directory: Path, texts: dict[str, list[str]], tiny_texts: list[str]) -> None:
    teacher = load(directory)
    weights = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    compressed = compress(teacher, texts, configuration(smallest(teacher, texts) + 5, 2))
    with torch.no_grad():
        for parameter in compressed.body.parameters():
            parameter.zero_()
    assert teacher.model.state_dict().keys() == weights.keys()
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, weights[name])
    np.testing.assert_array_equal(teacher.encode(tiny_texts[:20]), load(directory).encode(tiny_texts[:20]))


def test_the_byte_rows_are_the_best_measured(directory: Path, texts: dict[str, list[str]]) -> None:
    teacher = load(directory)
    compressed = compress(teacher, texts, configuration(smallest(teacher, texts), 4))
    scores = compressed.byte_scores
    assert len(set(scores.values())) > 1
    probe = byte_probe(teacher.tokenizer, compressed.tokenizer, [text for found in texts.values() for text in found])
    assert fallback_texts(teacher.tokenizer, compressed.tokenizer, probe) == list(range(len(probe)))
    rows = compressed.body.get_input_embeddings().weight.detach()
    vocabulary = compressed.vocabulary
    old = teacher.body.get_input_embeddings().weight.detach()
    best = max(get_args(ByteMethod), key=scores.__getitem__)
    assert torch.equal(rows[: len(vocabulary.ids)], old[list(vocabulary.ids)])
    assert torch.equal(rows[len(vocabulary.ids) :], byte_rows(best, old, teacher.tokenizer, vocabulary.ids))


def test_choices_repeat(directory: Path, texts: dict[str, list[str]]) -> None:
    teacher = load(directory)
    config = configuration(smallest(teacher, texts) + 9, 2)
    first, second = compress(teacher, texts, config), compress(teacher, texts, config)
    assert first.measurements == second.measurements
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    for name, value in first.body.state_dict().items():
        assert torch.equal(value, second.body.state_dict()[name])


def test_a_short_distillation_may_decide(tiny_encoder: Path, texts: dict[str, list[str]]) -> None:
    teacher = load(tiny_encoder)
    seen: list[list[PreTrainedModel]] = []

    def second(students: list[PreTrainedModel], tokenizer: Tokenizer) -> int:
        assert tokenizer.token_to_id("<0x00>") is not None
        seen.append(students)
        return 1

    size = smallest(teacher, texts) + 9
    by_score = compress(teacher, texts, configuration(size, 2), second)
    assert not seen
    decided = compress(teacher, texts, configuration(size, 2, distil_candidates=2), second)
    assert [len(students) for students in seen] == [2]
    assert decided.body is seen[0][1]
    assert decided.layers.best == list(by_score.layers.scores)[1]
    assert decided.layers.scores == by_score.layers.scores


@pytest.mark.parametrize(
    ("size", "num_layers", "reason"),
    [(260, 2, r"vocabulary\.size: 260; expected \d+ to \d+"), (600, 5, r"layers\.num_layers: 5; the teacher has 4")],
)
def test_impossible_sizes_are_refused(
    tiny_encoder: Path, texts: dict[str, list[str]], size: int, num_layers: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        compress(load(tiny_encoder), texts, configuration(size, num_layers))


def test_prompts_that_the_teacher_lacks_are_left_out(tiny_encoder: Path) -> None:
    teacher = load(tiny_encoder)
    assert known_prompts(teacher, ["passage", "title", "query"]) == ["passage: ", "query: "]
    assert known_prompts(teacher, ["title"]) == [""]


@pytest.mark.parametrize("max_length", [16, 40, 64, 65, 120])
def test_a_student_reads_max_length_whatever_the_teacher_was_cut_at(
    directory: Path, tmp_path: Path, texts: dict[str, list[str]], max_length: int
) -> None:
    """The teacher's texts are cut at 40 tokens, while its table goes further."""
    shorter = tmp_path / "teacher"
    shutil.copytree(directory, shorter)
    write_tokenizer(shorter, Tokenizer.from_file(str(directory / "tokenizer.json")), 40)
    teacher = load(shorter)
    assert teacher.max_seq_length == 40
    config = configuration(smallest(teacher, texts) + 5, 2).model_copy(update={"max_length": max_length})
    compressed = compress(teacher, texts, config)
    (tmp_path / "student").mkdir()
    write_student(tmp_path / "student", compressed.body, compressed.tokenizer, shorter, max_length)
    student = load(tmp_path / "student")
    assert student.max_seq_length == max_length
    (tokens,) = student.tokenise(["☃ " * max_length])
    assert len(tokens) == max_length
    assert np.isfinite(student.encode_tokens([tokens])).all()
    short = student.tokenise(["the cat is small"])
    with only_layers(teacher.body, compressed.layers.best):
        known = teacher.encode_tokens([np.array(compressed.vocabulary.ids, np.int32)[short[0]]])
    np.testing.assert_allclose(student.encode_tokens(short), known, atol=1e-6)


STEMS = ("kitabu", "nyumba", "rafiki", "chakula", "safari", "haraka")
SWAHILI = [f"{first} na {second}ni" for first in STEMS for second in STEMS]


def test_a_student_with_new_pieces(
    directory: Path, tmp_path: Path, texts: dict[str, list[str]], tiny_texts: list[str]
) -> None:
    teacher = load(directory)
    with_swahili = {**texts, "sw": SWAHILI}
    config = configuration(smallest(teacher, with_swahili) + 60, 4)
    without = compress(teacher, with_swahili, config).measurements
    grown = config.vocabulary.model_copy(update={"new_pieces": {"sw": 60}})
    compressed = compress(teacher, with_swahili, config.model_copy(update={"vocabulary": grown}))
    write_student(tmp_path, compressed.body, compressed.tokenizer, directory, teacher.max_seq_length)
    student, vocabulary = load(tmp_path), compressed.vocabulary

    found = compressed.measurements
    assert found["vocabulary_size"] == without["vocabulary_size"]
    assert found["vocabulary_new"] == vocabulary.num_new > 0 == without["vocabulary_new"]
    assert found["vocabulary_growth"]["sw"] < 0 <= without["vocabulary_growth"]["sw"]
    assert set(found["new_rows"]) == {"mean", "similar"}
    assert without["new_rows"] == {}

    rows, old = (encoder.body.get_input_embeddings().weight.detach() for encoder in (student, teacher))
    num_old = len(vocabulary.old_ids)
    assert torch.equal(rows[:num_old], old[list(vocabulary.old_ids)])
    made = new_rows(teacher, compressed.tokenizer, vocabulary, "query: ")
    best = max(found["new_rows"], key=found["new_rows"].__getitem__)
    torch.testing.assert_close(rows[num_old : num_old + vocabulary.num_new], made[best])
    new_texts = [student.tokenizer.id_to_token(num_old + row) for row in range(vocabulary.num_new)]
    assert not set(new_texts) & set(teacher.tokenizer.get_vocab())

    unknown = student.tokenizer.token_to_id("<unk>")
    assert all(unknown not in ids for ids in student.tokenise([*tiny_texts, *SWAHILI, "☃ ξ 𝄞 <unk> <0x41> </s>"]))
    assert_kept_texts_embed_as_before(teacher, student, compressed, tiny_texts)
    model = SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    np.testing.assert_allclose(model.encode(SWAHILI[:4]), student.encode(SWAHILI[:4]), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.tokenize("kitabu") == student.tokenizer.encode("kitabu", add_special_tokens=False).tokens


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """A BERT teacher in the usual form: WordPiece, [PAD] 0, [UNK] 100 among unused pieces."""
    words = sorted({word for text in ("query: passage:", *tiny_texts) for word in text.replace(":", " : ").split()})
    characters = sorted({character for word in words for character in word})
    listing = ["[PAD]", *(f"[unused{n}]" for n in range(9)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    listing += [form for character in characters for form in (character, f"##{character}")]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys(listing))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    body = BertModel(BertConfig(vocab_size=len(vocabulary), **sizes, initializer_range=0.2))
    directory = tmp_path_factory.mktemp("wordpiece")
    specials = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    write_body(directory, body)
    write_tokenizer(directory, tokenizer, 64, specials | {"mask_token": "[MASK]"})
    write_head(directory, 32, "cls_token", {"query": "query: ", "document": "passage: ", "passage": "passage: "})
    return directory


def test_a_wordpiece_student_embeds_kept_texts_as_before(
    wordpiece: Path, tmp_path: Path, texts: dict[str, list[str]], tiny_texts: list[str]
) -> None:
    teacher = load(wordpiece)
    config = CompressionConfig.model_validate(
        {"layers": {"num_layers": 3}, "vocabulary": {"size": 500, "dropped_specials": ["[MASK]"]}}
    )
    compressed = compress(teacher, texts, config)
    write_student(tmp_path, compressed.body, compressed.tokenizer, wordpiece, teacher.max_seq_length)
    student = load(tmp_path)
    assert student.model.tokenizer.pad_token_id == student.tokenizer.token_to_id("[PAD]")
    assert_kept_texts_embed_as_before(teacher, student, compressed, tiny_texts)


@pytest.mark.parametrize(
    ("teacher", "values", "reason"),
    [
        ("tiny_encoder", {"vocabulary": {"new_pieces": {"xx": 60}}}, r"vocabulary\.new_pieces: 'xx' has no texts"),
        ("wordpiece", {"vocabulary": {"new_pieces": {"en": 60}}}, "tokenizer is WordPiece; expected Unigram"),
        ("without_positions", {"max_length": 200}, "max_length: 200; BertModel has no table of positions"),
    ],
)
def test_what_cannot_be_is_refused_before_layers_are_searched(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    texts: dict[str, list[str]],
    teacher: str,
    values: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr("embedlib.compression.choose_layers", lambda *_: pytest.fail("layers were searched"))
    encoder = load(request.getfixturevalue("tiny_encoder" if teacher == "without_positions" else teacher))
    if teacher == "without_positions":
        del encoder.body.get_submodule("embeddings").position_embeddings
    with pytest.raises(ConfigError, match=reason):
        compress(encoder, texts, CompressionConfig.model_validate(values))


@pytest.mark.slow
def test_the_embedded_teachers_kept_texts_embed_as_before(
    embedded_teacher: Path, tmp_path: Path, sentences: list[str], tiny_corpus: Path
) -> None:
    teacher = load(embedded_teacher)
    config = CompressionConfig.model_validate({"layers": {"num_layers": 12, "greedy": False, "probe_texts": 16}})
    # Half of the sentences choose the vocabulary, so that the other half loses pieces.
    compressed = compress(teacher, {**texts_by_language(tiny_corpus, 100, 0), "und": sentences[::2]}, config)
    write_student(tmp_path, compressed.body, compressed.tokenizer, embedded_teacher, teacher.max_seq_length)
    assert compressed.vocabulary.size == 15_424
    student = load(tmp_path)
    assert student.num_parameters == 117_505_920 - (250_037 - 15_424) * 384
    assert_kept_texts_embed_as_before(teacher, student, compressed, sentences)


@pytest.mark.slow
def test_a_large_xlmr_from_24_to_8_layers(
    tmp_path: Path, tiny_tokenizer: Tokenizer, texts: dict[str, list[str]], tiny_texts: list[str]
) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 512}
    config = XLMRobertaConfig(vocab_size=tiny_tokenizer.get_vocab_size(), **sizes, pad_token_id=1, bos_token_id=0)
    (tmp_path / "teacher").mkdir()
    write_body(tmp_path / "teacher", XLMRobertaModel(config, add_pooling_layer=False))
    write_tokenizer(tmp_path / "teacher", tiny_tokenizer, 64)
    write_head(tmp_path / "teacher", 1024, "cls_token", {"query": "query: ", "passage": "passage: "})
    teacher = load(tmp_path / "teacher")
    compression = configuration(smallest(teacher, texts) + 60, 8, greedy=False)
    compressed = compress(teacher, texts, compression)
    (tmp_path / "student").mkdir()
    write_student(tmp_path / "student", compressed.body, compressed.tokenizer, tmp_path / "teacher", 64)
    student = load(tmp_path / "student")
    assert student.body.config.num_hidden_layers == 8
    assert student.embedding_dim == 1024
    with only_layers(teacher.body, compressed.layers.best):
        assert_kept_texts_embed_as_before(teacher, student, compressed, tiny_texts[::4])
