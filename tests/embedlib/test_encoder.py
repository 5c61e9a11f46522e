import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedlib import encoder as encoder_module
from embedlib.encoder import Encoder, cpu_features, fast_arithmetic, fast_dtype, with_prompts
from embedlib.errors import ArtifactError, ConfigError
from embedlib.torch_model import SentenceVectors

MODELS = ["tiny_encoder", "tiny_xlmr"]


@pytest.fixture(params=MODELS)
def directory(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def encoder(directory: Path) -> Encoder:
    return Encoder.load(directory, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def mixed(tiny_texts: list[str]) -> list[str]:
    """Texts from nothing to four times the models' length, shuffled."""
    random = Random(0)
    long = [" ".join(random.sample(tiny_texts, count)) for count in (3, 5, 8, 13, 21, 34)]
    texts = [*tiny_texts[::5], *long, "", " ", "unknown: ξ ☃", "</s>", "a <pad> b", "  spaces   around \n"]
    random.shuffle(texts)
    return texts


@pytest.mark.parametrize("prompt_name", [None, "query", "document", "passage"])
def test_vectors_are_sentence_transformers(
    directory: Path, encoder: Encoder, mixed: list[str], prompt_name: str | None
) -> None:
    reference = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    assert max(len(tokens) for tokens in encoder.tokenise(mixed)) == encoder.max_seq_length == 64
    expected = reference.encode(mixed, prompt_name=prompt_name, batch_size=7)
    vectors = encoder.encode(mixed, prompt_name)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(mixed), encoder.embedding_dim) == (len(mixed), 32)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_prompts_matter_and_the_whole_batch_does_not(encoder: Encoder, mixed: list[str]) -> None:
    together = encoder.encode(mixed, "query")
    alone = np.concatenate([encoder.encode([text], "query") for text in mixed])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together - encoder.encode(mixed, "passage")).max() > 0.01


def test_the_models_own_calls_leave_the_tokenizer_that_it_shares_as_it_is_wanted(
    encoder: Encoder, mixed: list[str]
) -> None:
    assert encoder.tokenizer is encoder.model.tokenizer.backend_tokenizer
    before = encoder.tokenise(mixed)
    encoder.model.max_seq_length = 8
    encoder.model.encode(mixed)  # pads and cuts
    lengths = {len(encoding.ids) for encoding in encoder.whole_texts.encode_batch_fast(mixed)}
    assert len(lengths) > 8
    assert max(lengths) > encoder.max_seq_length
    encoder.model.encode(mixed)
    for tokens, again in zip(before, encoder.tokenise(mixed), strict=True):
        np.testing.assert_array_equal(again, tokens)


@pytest.mark.parametrize(("window", "batch_tokens"), [(1, 1), (5, 64), (8192, 10**6)])
def test_windows_and_budgets_keep_order(
    encoder: Encoder, mixed: list[str], monkeypatch: pytest.MonkeyPatch, window: int, batch_tokens: int
) -> None:
    expected = encoder.encode(mixed)
    monkeypatch.setattr(encoder_module, "WINDOW", window)
    encoder.batch_tokens = batch_tokens
    np.testing.assert_allclose(encoder.encode(mixed), expected, atol=1e-5)


def test_nothing_gives_no_rows(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.encode([], "query").dtype == np.float32


def test_an_empty_text_is_embedded(encoder: Encoder) -> None:
    assert encoder.tokenise([""])[0].tolist() == [0, 2]
    assert np.linalg.norm(encoder.encode([""])[0]) == pytest.approx(1)


def test_an_unknown_prompt_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match=r"prompt 'title': this model has \['document', 'passage', 'query'\]"):
        encoder.encode(["a"], "title")


def test_pooled_vectors_normalise_to_the_unit_ones(encoder: Encoder, mixed: list[str]) -> None:
    tokens = encoder.tokenise(mixed, "query")
    pooled = encoder.encode_tokens(tokens, normalise=False)
    lengths = np.linalg.norm(pooled, axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 0.1
    np.testing.assert_allclose(pooled / lengths, encoder.encode(mixed, "query"), atol=1e-5)


def test_for_training_there_is_a_gradient_and_no_normalisation(encoder: Encoder) -> None:
    tokens = torch.from_numpy(encoder.tokenise(["a"])[0][None].astype(np.int64))
    vectors = SentenceVectors(encoder.model)(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    vectors.sum().backward()
    assert any(parameter.grad is not None for parameter in encoder.model.parameters())
    assert not torch.allclose(vectors.norm(dim=1), torch.ones(1), atol=0.1)


def test_bfloat16_is_near(encoder: Encoder, directory: Path, mixed: list[str]) -> None:
    half = Encoder.load(directory, torch.device("cpu"), torch.bfloat16)
    assert (half.encode(mixed) * encoder.encode(mixed)).sum(axis=1).min() > 0.99


def test_parameters_are_counted(encoder: Encoder) -> None:
    assert encoder.num_parameters == encoder.body.num_parameters()


def test_a_directory_that_is_no_model_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no modules\.json"):
        Encoder.load(tmp_path)
    model = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="weights are pickled"):
        Encoder.load(model)


def test_prompts_are_dealt_in_turn() -> None:
    assert with_prompts(["a", "b", "c"], ["q: ", "p: "]) == ["q: a", "p: b", "q: c"]
    assert with_prompts(["a", "b", "c"], ["q: ", "p: "], first=3) == ["p: a", "q: b", "p: c"]
    assert with_prompts(["a"], []) == ["a"]


@pytest.mark.parametrize(
    ("flags", "arithmetic"),
    [("avx2 avx512_bf16", "bfloat16"), ("amx_tile amx_bf16", "bfloat16"), ("avx2 avx512f avx512_bf16x", "float32")],
)
def test_the_fast_arithmetic_is_that_of_the_cpus_instructions(
    flags: str, arithmetic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = tmp_path / "cpuinfo"
    described.write_text(f"model name\t: bf16 maker\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(encoder_module, "CPU_DESCRIPTION", described)
    assert fast_arithmetic("cpu") == arithmetic
    assert fast_dtype("cpu") == getattr(torch, arithmetic)


def test_linux_and_pytorch_name_the_same_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"avx2", "fma4", "avx512_bf16", "amx_bf16"}
    told = cpu_features() & names
    monkeypatch.setattr(encoder_module, "CPU_DESCRIPTION", Path("/nowhere"))
    assert cpu_features() & names == told
