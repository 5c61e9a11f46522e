"""The contrastive loop: cut, replayed, shared among processes or resumed, it is the loop over whole batches."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from embedlib import training
from embedlib.collectives import world_size
from embedlib.contrastive import (
    ContrastiveConfig,
    batch_plan,
    batches_after,
    contrast,
    load_encoder,
    retrieval_mrr,
    scores_by_dataset,
    start_contrast,
    validation_metric,
    validation_score,
)
from embedlib.dataset import ContrastiveSet
from embedlib.errors import ConfigError
from embedlib.objective import ObjectiveConfig
from embedlib.training import TrainState

CPU = torch.device("cpu")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "info_nce": {
            "directions": ["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
        },
        "guide": {"margin": 0.05},
        "distil": {"weight": 0.5, "two_views": True},
        "anchor": 0.3,
        "triplet": {"weight": 0.2},
        "scores": {"margin_mse": 0.1, "divergence": 0.1},
        "cosent": {"weight": 0.1},
        "dimensions": [16, 8],
    },
}


def dataset(num_samples: int = 22, teacher_dim: int = 20) -> ContrastiveSet:
    random = np.random.default_rng(0)
    lengths = random.integers(3, 20, 60)
    tokens = [random.integers(4, 60, length).astype(np.int32) for length in lengths]
    samples = np.concatenate(
        [
            np.arange(num_samples)[:, None],
            22 + np.arange(num_samples)[:, None],
            random.integers(44, 60, (num_samples, 2)),
        ],
        axis=1,
    )
    samples[::3, 3] = -1
    scores = random.uniform(0, 1, (num_samples, 3)).astype(np.float32)
    scores[::3, 2] = -np.inf
    return ContrastiveSet(
        np.concatenate(tokens),
        np.cumsum([0, *lengths]),
        samples,
        np.zeros(num_samples, np.int64),
        np.ones(1),
        scores,
        random.uniform(0, 1, num_samples).astype(np.float32),
        {
            name: random.normal(size=(60, dim)).astype(np.float16)
            for name, dim in {"guide": 12, "teacher": teacher_dim, "base": 32}.items()
        },
    )


def config_for(objective: str, **values: Any) -> ContrastiveConfig:
    settings = {
        "objective": OBJECTIVES[objective],
        "batch_size": 11,
        "epochs": 2,
        "dtype": "float32",
        "micro_batch_tokens": 64,
        "optimizer": {"learning_rate": 1e-3, "max_grad_norm": 1e9},
    }
    return ContrastiveConfig.model_validate(settings | values)


CONFIGS = {name: config_for(name) for name in OBJECTIVES} | {
    "frozen": config_for("plain", optimizer={"learning_rate": 1e-3, "frozen_blocks": 2, "max_grad_norm": 1e9}),
    "mixed": config_for("plain"),
    "dropout": config_for("everything", dropout=True),
}
# Bitext with a teacher and an anchor, and graded pairs.
MIXED = [
    ObjectiveConfig.model_validate({"distil": {"weight": 0.5, "two_views": True}, "anchor": 0.3, "dimensions": [16]}),
    ObjectiveConfig.model_validate({"info_nce": {"weight": 0}, "cosent": {"weight": 1}}),
]


def changed(whole: ContrastiveSet, /, **values: Any) -> ContrastiveSet:
    return ContrastiveSet(**whole._asdict() | values)


def mixed_dataset() -> ContrastiveSet:
    """Two datasets: one knows nothing of labels and scores, the other has labels alone."""
    samples = dataset()
    assert samples.labels is not None
    return changed(
        samples,
        groups=np.repeat([0, 1], 11),
        shares=np.ones(2),
        datasets=np.array([0, 1]),
        scores=None,
        labels=np.where(np.arange(22) < 11, np.nan, samples.labels).astype(np.float32),
    )


def run(
    encoder: Path,
    config: ContrastiveConfig,
    samples: ContrastiveSet | None = None,
    objectives: Sequence[ObjectiveConfig] = (),
) -> dict[str, Any]:
    """Train; each step's loss and gradients, and the weights in the end."""
    torch.manual_seed(0)
    plain = load_encoder(encoder, CPU, config)
    model = DistributedDataParallel(plain) if world_size() > 1 else plain
    samples = samples or dataset()
    torch.manual_seed(1)  # of the projections, which all processes must begin with alike
    state = start_contrast(model, samples, config, objectives)
    gradients: list[dict[str, torch.Tensor]] = []

    def note(*_: Any) -> None:
        named = [*plain.named_parameters(), *state.head.named_parameters()]
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    state.optimizer.register_step_pre_hook(note)
    steps = list(contrast(state, samples, config))
    return {
        "losses": [step.result.loss for step in steps],
        "ids": [step.ids for step in steps],
        "gradients": gradients,
        "weights": {name: weights.clone() for name, weights in plain.state_dict().items()},
        "score": validation_score(model, samples, torch.float32),
    }


MORE: dict[str, tuple[ContrastiveSet, list[ObjectiveConfig]]] = {"mixed": (mixed_dataset(), MIXED)}


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To 1e-5 in the first step. Adam makes much of the last bits of small gradients: later steps are less alike."""
    steps = zip(found["losses"], expected["losses"], found["gradients"], expected["gradients"], strict=True)
    for step, (loss, expected_loss, here, there) in enumerate(steps):
        tolerance = 1e-3 if step else 1e-5
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert here.keys() == there.keys()
        largest = max(float(gradient.abs().max()) for gradient in there.values())
        for name, gradient in there.items():
            assert float((here[name] - gradient).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dropout", [False, True])
def test_a_batch_embedded_twice_has_the_gradient_of_the_whole(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, objective: str, dropout: bool
) -> None:
    config = config_for(objective, dropout=dropout)
    whole = run(tiny_encoder, config)
    with monkeypatch.context() as patch:
        patch.setattr(training, "WHOLE_GRAPH_TOKENS", 0)
        patch.setattr("embedlib.contrastive.LOSS_SCORES", 100)
        assert_alike(run(tiny_encoder, config), whole)
    assert len(whole["losses"]) == 4


def test_datasets_that_ask_the_same_ask_it_with_one_voice(tiny_encoder: Path) -> None:
    config = config_for("everything")
    samples = changed(dataset(), groups=np.repeat([0, 1], 11), shares=np.ones(2), datasets=np.array([0, 1]))
    single, each = (run(tiny_encoder, config, samples, own) for own in ((), [config.objective] * 2))
    assert each["losses"] == single["losses"]
    for here, there in zip(each["gradients"], single["gradients"], strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in there)


def test_a_batch_is_asked_what_its_dataset_asks(tiny_encoder: Path) -> None:
    seen = set()
    # Steps of rate 0: so a batch's loss does not depend on those before.
    config = config_for("plain", optimizer={"learning_rate": 1e-12, "max_grad_norm": 1e9, "weight_decay": 0})
    mixed = run(tiny_encoder, config, mixed_dataset(), MIXED)
    for number, objective in enumerate(MIXED):
        samples = mixed_dataset()
        same = run(tiny_encoder, config, changed(samples, labels=dataset().labels), [objective, objective])
        for step, ids in enumerate(mixed["ids"]):
            if samples.datasets_of(np.array(ids))[0] == number:
                assert mixed["losses"][step] == pytest.approx(same["losses"][step], rel=1e-5)
                assert number or "projections.16.weight" in mixed["gradients"][step]
                seen.add(number)
            else:
                assert mixed["losses"][step] != pytest.approx(same["losses"][step], rel=1e-3)
    assert seen == {0, 1}
    assert all(gradient.isfinite().all() for step in mixed["gradients"] for gradient in step.values())


def test_dropout_drops(tiny_encoder: Path) -> None:
    on, off = (run(tiny_encoder, config_for("plain", dropout=dropout)) for dropout in (True, False))
    assert abs(on["losses"][0] - off["losses"][0]) > 1e-4


def work(number: int, folder: Path, encoder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    found = {}
    for name, config in CONFIGS.items():
        for tokens in (10**6, 0):
            training.WHOLE_GRAPH_TOKENS = tokens
            found[name, tokens] = run(encoder, config, *MORE.get(name, ()))
    torch.save(found, folder / f"{number}.pt")
    distributed.destroy_process_group()


def test_two_processes_are_one_on_the_joined_batch(tiny_encoder: Path, tmp_path: Path) -> None:
    multiprocessing.spawn(work, (tmp_path, tiny_encoder), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=False) for number in range(2))
    for name, tokens in first:
        here, there = first[name, tokens], second[name, tokens]
        if CONFIGS[name].dropout:
            # Chance is each process' own: what the kept graph gives, made twice must give, too.
            alone = joined(first[name, 10**6], second[name, 10**6])
        else:
            alone = run(tiny_encoder, CONFIGS[name], *MORE.get(name, ()))
        together = joined(here, there)
        assert_alike(together, alone)
        assert together["ids"] == [sorted(ids) for ids in alone["ids"]]
        for name, weights in here["weights"].items():
            assert torch.equal(weights, there["weights"][name])
        assert here["score"] == there["score"] == pytest.approx(alone["score"], abs=1e-2)


def joined(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """What two processes found, as one: their losses add up, and gradients are those of both."""
    losses = [a + b for a, b in zip(here["losses"], there["losses"], strict=True)]
    return here | {"losses": losses, "ids": [sorted(a + b) for a, b in zip(here["ids"], there["ids"], strict=True)]}


@pytest.mark.parametrize("name", ["everything", "mixed"])
@pytest.mark.parametrize("cut", [1, 3])
def test_a_run_cut_off_goes_on_bitwise(tiny_encoder: Path, cut: int, name: str) -> None:
    values = {"dropout": True, "optimizer": {"learning_rate": 1e-3, "average": 0.9}}
    config = config_for("plain" if name in MORE else name, **values)
    samples, objectives = MORE.get(name, (dataset(), []))

    def begin() -> TrainState:
        torch.manual_seed(0)
        model = load_encoder(tiny_encoder, CPU, config)
        return start_contrast(model, samples, config, objectives)

    def go(state: TrainState, most: int) -> list[float]:
        losses = []
        for step in contrast(state, samples, config):
            losses.append(step.result.loss)
            if len(losses) == most:
                break
        return losses

    whole = begin()
    losses = go(whole, 4)
    first = begin()
    head = go(first, cut)
    file = io.BytesIO()
    torch.save({"weights": first.model.state_dict(), "state": first.state_dict()}, file)
    second = begin()
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second.model.load_state_dict(saved["weights"])
    second.load_state_dict(saved["state"])
    assert head + go(second, 4 - cut) == losses
    for name, weights in whole.averaged.items():
        assert torch.equal(weights, second.averaged[name])
        assert not name.endswith("word_embeddings.weight") or not torch.equal(weights, whole.model.state_dict()[name])


def test_training_finds_the_positives(tiny_encoder: Path) -> None:
    config = config_for("plain", epochs=40)
    model = load_encoder(tiny_encoder, CPU, config)
    unlabelled = changed(dataset(), labels=None)
    before = validation_score(model, unlabelled, torch.float32)
    list(contrast(start_contrast(model, dataset(), config), dataset(), config))
    assert validation_score(model, unlabelled, torch.float32) > max(0.9, before)


def test_freezing_everything_is_refused(tiny_encoder: Path) -> None:
    config = config_for("plain", optimizer={"frozen_blocks": 5})
    with pytest.raises(ConfigError, match="frozen_blocks: 5 of the model's 5; expected 4 at most"):
        load_encoder(tiny_encoder, CPU, config)


def test_the_average_forgets_its_first_steps_quickly(tiny_encoder: Path) -> None:
    config = config_for("plain", epochs=10, optimizer={"learning_rate": 1e-3, "average": 0.999})
    state = start_contrast(load_encoder(tiny_encoder, CPU, config), dataset(), config)
    first = {}
    for step in contrast(state, dataset(), config):
        if step.step == 1:
            first = {name: weights.clone() for name, weights in state.model.state_dict().items()}
    last, averaged = state.model.state_dict(), state.averaged
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    nearer = [(averaged[name] - last[name]).norm() < (averaged[name] - first[name]).norm() for name in moved]
    assert moved
    assert all(nearer)


def test_frozen_blocks_stay_and_lower_layers_learn_more_slowly(tiny_encoder: Path) -> None:
    config = config_for("plain", optimizer={"learning_rate": 1e-3, "frozen_blocks": 2, "layer_decay": 0.5})
    model = load_encoder(tiny_encoder, CPU, config)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    state = start_contrast(model, dataset(), config)
    rates = {group["rate"] for group in state.optimizer.param_groups if group["params"]}
    assert rates == {1.0, 0.5, 0.25}
    list(contrast(state, dataset(), config))
    for name, weights in model.state_dict().items():
        frozen = "embeddings" in name or ".layer.0." in name
        assert torch.equal(weights, before[name]) == frozen, name


def test_batches_after_some_steps_are_those_left() -> None:
    plan = batch_plan(dataset(), config_for("plain"))
    whole = [batch.tolist() for batch in batches_after(plan, 0, 3)]
    assert len(whole) == 6
    for step in range(7):
        assert [batch.tolist() for batch in batches_after(plan, step, 3)] == whole[step:]


def test_mrr_by_hand(tiny_encoder: Path) -> None:
    model = load_encoder(tiny_encoder, CPU, config_for("plain"))
    samples = changed(dataset(), labels=None)
    vectors = torch.cat([model(**model.collate([tokens])) for tokens in samples.token_ids(np.arange(60))]).detach()
    unit = torch.nn.functional.normalize(vectors, dim=-1).numpy()
    documents = sorted({int(text) for text in samples.samples[:, 1:].ravel() if text >= 0})

    def mrr(margin: float) -> float:
        """With every document before the answer that comes so near to it, as products of other shapes may have it."""
        total = 0.0
        for query, positive, *_ in samples.samples.tolist():
            scores = unit[[document for document in documents if document != positive]] @ unit[query]
            rank = 1 + int((scores > unit[positive] @ unit[query] - margin).sum())
            total += 1 / rank if rank <= 10 else 0
        return total / len(samples)

    found = validation_score(model, samples, torch.float32)
    assert mrr(1e-6) - 1e-6 <= found <= mrr(-1e-6) + 1e-6
    assert mrr(-1e-6) - mrr(1e-6) < 0.1 * mrr(0)


def test_a_text_that_is_asked_as_well_does_not_find_itself(tiny_encoder: Path) -> None:
    """What answers one text and is itself asked stands before no answer."""
    vectors = torch.eye(4)
    chain = np.array([[0, 1], [1, 2], [2, 3]])
    vectors[0, 1], vectors[1, 2], vectors[2, 3] = 0.3, 0.5, 0.7
    assert retrieval_mrr(vectors, chain) == 1


def test_labels_are_scored_by_their_order(tiny_encoder: Path) -> None:
    model = load_encoder(tiny_encoder, CPU, config_for("plain"))
    samples = mixed_dataset()
    vectors = torch.cat([model(**model.collate([tokens])) for tokens in samples.token_ids(np.arange(60))]).detach()
    unit = torch.nn.functional.normalize(vectors, dim=-1).numpy()
    cosines = np.array([unit[query] @ unit[positive] for query, positive, *_ in samples.samples[11:].tolist()])
    assert samples.labels is not None
    labels = samples.labels[11:]
    scores = scores_by_dataset(model, samples, torch.float32)
    assert scores[1] == pytest.approx(spearmanr(cosines, labels).statistic, abs=1e-6)
    assert validation_score(model, samples, torch.float32) == pytest.approx((scores[0] + scores[1]) / 2)
    # Each dataset is scored among its own documents.
    first = changed(samples, samples=samples.samples[:11], groups=samples.groups[:11], labels=None)
    assert scores[0] == pytest.approx(validation_score(model, first, torch.float32))
    ordered = np.append(samples.labels[:11], cosines).astype(np.float32)
    assert scores_by_dataset(model, changed(samples, labels=ordered), torch.float32)[1] == pytest.approx(1)


def test_a_validation_is_called_what_it_is() -> None:
    assert validation_metric(changed(dataset(), labels=None)) == "validation_mrr@10"
    assert validation_metric(dataset()) == "validation_spearman"
    assert validation_metric(mixed_dataset()) == "validation_mean_of_mrr@10_and_spearman"
