import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from embedlib.artifact import EVALUATION_NAME
from embedlib.compression import CompressionConfig, compress, write_student
from embedlib.corpus import texts_by_language
from embedlib.dataset import DistillationSet
from embedlib.distillation import (
    DistillationConfig,
    Plan,
    Rates,
    best_after_distilling,
    distil,
    load_student,
    measure_rates,
    new_state,
    plan_within,
    resolve_dtype,
    total_steps,
    validation_cosine,
    write_trained,
)
from embedlib.encoder import Encoder
from embedlib.losses import LossConfig
from embedlib.torch_model import SentenceVectors
from embedlib.training import OptimizerConfig, TrainState
from tests.conftest import body_values, write_encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CPU = torch.device("cpu")
CONFIG = DistillationConfig(
    epochs=3, batch_size=50, dtype="float32", micro_batch_tokens=200, optimizer=OptimizerConfig(learning_rate=3e-3)
)


@pytest.fixture(scope="module")
def teacher(tiny_encoder: Path) -> Encoder:
    return Encoder.load(tiny_encoder, CPU, torch.float32)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, teacher: Encoder, tiny_encoder: Path, tiny_corpus: Path) -> Path:
    """Two of the tiny teacher's four layers and most of its pieces."""
    directory = tmp_path_factory.mktemp("student")
    config = CompressionConfig.model_validate({"layers": {"num_layers": 2}, "vocabulary": {"size": 600}})
    compressed = compress(teacher, texts_by_language(tiny_corpus, 100, 0), config)
    write_student(directory, compressed.body, compressed.tokenizer, tiny_encoder, teacher.max_seq_length)
    return directory


@pytest.fixture(scope="module")
def dataset(teacher: Encoder, student: Path, tiny_texts: list[str]) -> DistillationSet:
    texts = ["query: " + text for text in tiny_texts]
    vectors = teacher.encode_tokens(teacher.tokenise(texts), normalise=False).astype(np.float16)
    return DistillationSet.of(Encoder.load(student, CPU, torch.float32).tokenise(texts), vectors)


def start(student: Path, dataset: DistillationSet, config: DistillationConfig = CONFIG) -> TrainState:
    return new_state(load_student(student, CPU), len(dataset), config)


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


@pytest.mark.parametrize(
    "loss",
    [LossConfig(), LossConfig(mse=0, cosine=0, gram=1), LossConfig(mse=0, cosine=1), LossConfig(mse=1, cosine=0)],
)
def test_the_loop_brings_the_student_nearer(student: Path, dataset: DistillationSet, loss: LossConfig) -> None:
    config = CONFIG.model_copy(update={"loss": loss})
    state = start(student, dataset, config)
    before = validation_cosine(state.model, dataset, torch.float32)
    steps = list(distil(state, dataset, config))
    losses = [step.result.loss for step in steps]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    if loss.mse or loss.cosine:
        assert validation_cosine(state.model, dataset, torch.float32) > before + 0.01


def test_every_step_is_told(student: Path, dataset: DistillationSet) -> None:
    state = start(student, dataset)
    steps = list(distil(state, dataset, CONFIG))
    assert [step.step for step in steps] == list(range(1, total_steps(len(dataset), CONFIG) + 1))
    assert state.step == state.total_steps == len(steps)
    per_epoch = len(steps) // CONFIG.epochs
    for epoch in range(CONFIG.epochs):
        ids = [number for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for number in step.ids]
        assert sorted(ids) == list(range(len(dataset)))
    assert sum(step.result.num_tokens for step in steps) == CONFIG.epochs * len(dataset.tokens)
    assert not list(distil(state, dataset, CONFIG))


@pytest.mark.parametrize("cut", [1, 7, 12])
def test_a_run_cut_off_at_any_step_goes_on_bitwise(student: Path, dataset: DistillationSet, cut: int) -> None:
    whole = start(student, dataset)
    expected = list(distil(whole, dataset, CONFIG))

    first = start(student, dataset)
    steps = distil(first, dataset, CONFIG)
    head = [next(steps) for _ in range(cut)]
    file = io.BytesIO()
    torch.save({"weights": weights(first), "state": first.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second = start(student, dataset)
    second.model.load_state_dict(saved["weights"])
    second.load_state_dict(saved["state"])
    assert head + list(distil(second, dataset, CONFIG)) == expected
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name])


def test_validation_cosine_is_the_mean_over_all_samples(student: Path, dataset: DistillationSet) -> None:
    model = load_student(student, CPU)
    encoder = Encoder.of(model.model)
    tokens, targets = dataset.samples(np.arange(len(dataset)))
    vectors = torch.from_numpy(encoder.encode_tokens(tokens, normalise=False))
    expected = float(functional.cosine_similarity(vectors, targets, dim=-1).mean())
    assert validation_cosine(model, dataset, torch.float32) == pytest.approx(expected, abs=1e-5)
    assert validation_cosine(model, dataset, torch.bfloat16) == pytest.approx(expected, abs=1e-2)


def test_the_teacher_agrees_with_itself(tiny_encoder: Path, teacher: Encoder, tiny_texts: list[str]) -> None:
    tokens = teacher.tokenise(tiny_texts)
    dataset = DistillationSet.of(tokens, teacher.encode_tokens(tokens, normalise=False).astype(np.float16))
    model = load_student(tiny_encoder, CPU)
    assert validation_cosine(model, dataset, torch.float32) == pytest.approx(1, abs=1e-5)


def test_a_student_is_loaded_for_training(student: Path, tiny_texts: list[str]) -> None:
    model = load_student(student, CPU)
    assert isinstance(model, SentenceVectors)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    expected = Encoder.load(student, CPU, torch.float32).encode(tiny_texts[::20])
    np.testing.assert_allclose(Encoder.of(model.model).encode(tiny_texts[::20]), expected, atol=1e-6)


def test_what_the_initial_model_was_measured_to_do_is_not_said_of_the_trained(student: Path, tmp_path: Path) -> None:
    initial = shutil.copytree(student, tmp_path / "initial")
    (initial / EVALUATION_NAME).write_text('{"retention": {}}')
    (initial / "notes.txt").write_text("kept")
    write_trained(tmp_path / "trained", initial, load_student(initial, CPU).state_dict())
    assert not (tmp_path / "trained" / EVALUATION_NAME).exists()
    assert (tmp_path / "trained" / "notes.txt").exists()


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_arithmetic_is_as_configured(name: Literal["float32", "bfloat16"], dtype: torch.dtype) -> None:
    assert resolve_dtype(name, CPU) == dtype
    assert resolve_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_a_pooler_that_no_vector_comes_of_is_not_trained(tiny_tokenizer: "Tokenizer", tmp_path: Path) -> None:
    # As hub models have it; processes that exchange gradients would wait for its own.
    body = BertModel(BertConfig(**body_values(tiny_tokenizer)))
    directory = write_encoder(tmp_path, body, tiny_tokenizer, "mean_tokens")
    student = load_student(directory, torch.device("cpu"))
    asked = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    student(**student.collate([np.array([0, 5, 6, 2], np.int32)])).sum().backward()  # type: ignore[no-untyped-call]
    assert asked == {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert any("pooler" in name for name, _ in student.named_parameters())


def test_the_same_seed_gives_the_same_student(student: Path, dataset: DistillationSet) -> None:
    found = []
    for seed in (0, 0, 1):
        config = CONFIG.model_copy(update={"epochs": 1, "seed": seed})
        state = start(student, dataset, config)
        for _ in distil(state, dataset, config):
            pass
        found.append(torch.cat([value.flatten() for value in weights(state).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


RATES = Rates(teacher_texts_per_s=100, student_samples_per_s=50)


@pytest.mark.parametrize(
    ("minutes", "available", "epochs", "plan"),
    [
        # Two epochs cost 1/100 + 2/50 = 0.05 s a text: 1,200 texts a minute.
        (1, 10_000, 2, Plan(1200, 2)),
        (2, 10_000, 2, Plan(2400, 2)),
        (1, 1200, 2, Plan(1200, 2)),
        # All 500 texts: 5 s of vectors leave 55 s, which is 2,750 samples, five epochs and a half.
        (1, 500, 2, Plan(500, 5)),
        (1, 1, 2, Plan(1, 2999)),
        # However short the time, something is learned.
        (0.0001, 10_000, 2, Plan(1, 2)),
    ],
)
def test_a_plan_fits_the_minutes(minutes: float, available: int, epochs: int, plan: Plan) -> None:
    assert plan_within(minutes, RATES, available, epochs) == plan


def test_rates_are_measured(teacher: Encoder, student: Path, tiny_texts: list[str]) -> None:
    rates = measure_rates(teacher, student, tiny_texts[:60], CONFIG)
    assert rates.teacher_texts_per_s > 0
    assert rates.student_samples_per_s > 0


def test_rates_of_one_text_can_be_planned_with(teacher: Encoder, student: Path, tiny_texts: list[str]) -> None:
    plan_within(1, measure_rates(teacher, student, tiny_texts[:1], CONFIG), 10, 2)


def test_the_best_after_distilling_is_the_one_that_started_nearest(
    tmp_path: Path, teacher: Encoder, student: Path, tiny_encoder: Path, tiny_corpus: Path, tiny_texts: list[str]
) -> None:
    # All four layers against two: the first is the teacher but for its vocabulary.
    config = CompressionConfig.model_validate({"layers": {"num_layers": 4}, "vocabulary": {"size": 600}})
    compressed = compress(teacher, texts_by_language(tiny_corpus, 100, 0), config)
    write_student(tmp_path, compressed.body, compressed.tokenizer, tiny_encoder, teacher.max_seq_length)
    gentle = CONFIG.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-4)})
    assert best_after_distilling([student, tmp_path], teacher, tiny_texts, gentle, num_steps=3) == 1
    assert best_after_distilling([tmp_path, student], teacher, tiny_texts, gentle, num_steps=3) == 0
