"""A student made apart is the one that jobs/distill.py makes, and one that cannot learn from a teacher is refused."""

import json
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from embedlib.artifact import hash_files, manifest_of, mark_of, model_fingerprint, new_artifact
from embedlib.dataset import DistillationSet
from embedlib.encoder import Encoder
from embedlib.errors import ArtifactError, ConfigError
from embedlib.evaluation.comparison import HeldOut
from embedlib.metrics import row_cosines
from embedlib.model_directory import PROMPTS_NAME
from embedlib.schemas import vector_column
from jobs.compress import CompressJob, make_corpus, make_student, table_of, teacher_of
from jobs.distill import DistillConfig, make_dataset, make_texts, take_student
from tests.conftest import PROMPTS, body_values, write_encoder
from tests.jobs.test_distill import values_for


def made(config: CompressJob) -> Path:
    return make_student(config, teacher_of(config), make_corpus(config))


@pytest.fixture(scope="module")
def compressed(tiny_encoder: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compressed")
    return made(CompressJob.model_validate(values_for(output, tiny_encoder, tiny_corpus)))


@pytest.fixture
def wide_encoder(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    body = BertModel(BertConfig(**body_values(tiny_tokenizer) | {"hidden_size": 48}), add_pooling_layer=False)
    (tmp_path / "wide").mkdir()
    return write_encoder(tmp_path / "wide", body, tiny_tokenizer, "mean_tokens")


def distilling(output: Path, teacher: Path, student: Path, **values: Any) -> DistillConfig:
    return DistillConfig.model_validate({"output": output, "teacher": str(teacher), "student": str(student)} | values)


def with_prompts(student: Path, directory: Path, prompts: dict[str, str]) -> Path:
    copy = Path(shutil.copytree(student, directory))
    values = json.loads((copy / PROMPTS_NAME).read_text()) | {"prompts": prompts}
    (copy / PROMPTS_NAME).write_text(json.dumps(values))
    return copy


def test_the_student_is_the_one_that_distillation_makes(
    compressed: Path, tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    same = made(DistillConfig.model_validate(values_for(tmp_path, tiny_encoder, tiny_corpus)))
    assert mark_of(same) == mark_of(compressed)
    assert hash_files(same) == hash_files(compressed)
    model = SentenceTransformer(str(compressed), device="cpu")
    assert model.encode("the cat", prompt_name="query").shape == (32,)


def test_weights_are_not_rounded_where_a_faster_arithmetic_would(
    tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedlib.encoder.fast_dtype", lambda device: torch.bfloat16)
    student = made(CompressJob.model_validate(values_for(tmp_path, tiny_encoder, tiny_corpus)))
    kept = manifest_of(student).measurements["layers"]
    weights, teachers = (load_file(directory / "model.safetensors") for directory in (student, tiny_encoder))
    name = "encoder.layer.{}.output.dense.weight"
    for number, layer in enumerate(kept):
        assert torch.equal(weights[name.format(number)], teachers[name.format(layer)])
    pieces, old_pieces = (
        Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab() for directory in (student, tiny_encoder)
    )
    rows, old_rows = (each["embeddings.word_embeddings.weight"] for each in (weights, teachers))
    whole_words = [piece for piece in pieces if piece.startswith("▁") and piece in old_pieces]
    assert whole_words
    assert all(torch.equal(rows[pieces[piece]], old_rows[old_pieces[piece]]) for piece in whole_words)


def test_the_longest_text_counts_where_candidates_are_distilled(
    tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    for distilled in (0, 2):
        values = values_for(tmp_path / str(distilled), tiny_encoder, tiny_corpus)
        values["compression"]["layers"] |= {"distil_candidates": distilled, "distil_steps": 1}
        made(CompressJob.model_validate(values))
        shorter = CompressJob.model_validate(values | {"max_text_characters": 20})
        if distilled:
            with pytest.raises(ArtifactError, match="student_initial"):
                made(shorter)
        else:
            made(shorter)


def test_the_table_says_what_is_left_of_the_teacher(
    compressed: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Console(width=100).print(table_of(tiny_encoder, compressed))
    told = capsys.readouterr().out
    measured = manifest_of(compressed).measurements
    assert f"{measured['params']:,}" in told
    assert f"{measured['vocabulary_size']:,}" in told
    assert "2: " + ", ".join(map(str, measured["layers"])) in told


def test_a_student_that_is_given_is_taken_as_it_is(compressed: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    config = distilling(tmp_path, tiny_encoder, compressed)
    taken = take_student(config, tiny_encoder)
    assert hash_files(taken) == hash_files(compressed)
    manifest = manifest_of(taken)
    assert manifest.parents == {
        "teacher": model_fingerprint(tiny_encoder),
        "model": model_fingerprint(compressed),
    }
    assert manifest.measurements == manifest_of(compressed).measurements
    before = (taken / "manifest.json").stat().st_mtime_ns
    assert take_student(config, tiny_encoder) == taken
    assert (taken / "manifest.json").stat().st_mtime_ns == before


def test_a_student_that_is_given_is_not_compressed(tmp_path: Path) -> None:
    assert distilling(tmp_path, tmp_path, tmp_path, compression={"prompts": ["query"]}).student == str(tmp_path)
    with pytest.raises(ValidationError, match=r"compression: \['layers'\] given, but so is student"):
        distilling(tmp_path, tmp_path, tmp_path, compression={"layers": {"num_layers": 2}})


def test_a_student_of_another_width_is_refused(compressed: Path, wide_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its vectors have 32 dimensions, the teacher's 48; expected as many"):
        take_student(distilling(tmp_path / "out", wide_encoder, compressed), wide_encoder)


def test_a_student_that_is_nowhere_is_named(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model '.*/nowhere': no such directory"):
        take_student(distilling(tmp_path / "out", tiny_encoder, tmp_path / "nowhere"), tiny_encoder)


@pytest.mark.parametrize(
    ("prompts", "told", "refused"),
    [
        (PROMPTS, {}, False),
        ({"query": "query: ", "passage": "text: "}, {}, True),
        ({}, {}, True),
        # What the teacher's prompts are is told: the student may have others under the same names.
        ({"query": "Q ", "passage": "P "}, PROMPTS, False),
        ({"query": "Q "}, PROMPTS, True),
    ],
)
def test_prompts_are_the_teachers_or_told(
    compressed: Path, tiny_encoder: Path, tmp_path: Path, prompts: dict[str, str], told: dict[str, str], refused: bool
) -> None:
    student = with_prompts(compressed, tmp_path / "student", prompts)
    config = distilling(tmp_path / "out", tiny_encoder, student, teacher_prompts=told)
    if not refused:
        assert take_student(config, tiny_encoder).is_dir()
        return
    with pytest.raises(ConfigError, match="expected the same, or teacher_prompts"):
        take_student(config, tiny_encoder)


def test_teacher_and_student_learn_under_prompts_of_their_own(
    compressed: Path, tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    told = {"query": "ask: ", "passage": "tell: "}
    given = {"compression": {}, "student": str(compressed), "teacher_prompts": told}
    config = DistillConfig.model_validate(values_for(tmp_path / "out", tiny_encoder, tiny_corpus) | given)
    teacher, corpus = teacher_of(config), make_corpus(config)
    student = take_student(config, teacher)
    texts = make_texts(config, corpus, 8)
    with new_artifact(config.directory / "vectors", "vectors", "0" * 64) as (vectors, _):
        column = vector_column(np.zeros((8, 32), np.float16))
        pq.write_table(pa.table({"id": np.arange(8), "vector": column}), vectors / "part-0.parquet")
    dataset = make_dataset(config, teacher, student, corpus, texts, config.directory / "vectors")
    validation = DistillationSet.open(dataset / "validation")
    held = HeldOut.read(corpus / "validation.parquet").texts
    named = list(zip(cycle(["query", "passage"]), held, strict=False))
    learner, source = Encoder.load(compressed), Encoder.load(tiny_encoder)
    for row, (name, text) in enumerate(named):
        (tokens,), _ = validation.samples(np.array([row]))
        np.testing.assert_array_equal(tokens, learner.tokenise([text], name)[0])
    expected = source.encode([told[name] + text for name, text in named])
    assert row_cosines(np.asarray(validation.vectors, np.float32), expected).min() > 0.999
