"""The me5s student on one GPU and no cluster: teacher vectors, distillation, then contrast on pairs, each timed.

    python -m benchmarks.gpu_student --teacher DIR --student DIR --texts FILE --pairs FILE --questions FILE --output DIR
        [--minutes N] [--quick] [--json OUT]

The steps are the jobs' own, without Ray around them. texts: Parquet with `text`; pairs: `en`, `xx`, `lang`; questions:
`query`, `passage`. Distillation takes as many steps as the minutes allow; contrast is one pass. The directories
`distilled` and `contrasted` below the output are models, which jobs/evaluate.py scores.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.command import benchmark_parser, write_result
from benchmarks.machine import describe_machine
from embedlib.batching import TokenIds
from embedlib.compression import known_prompts
from embedlib.contrastive import ContrastiveConfig, contrast, load_encoder, start_contrast
from embedlib.dataset import ContrastiveSet, DistillationSet, write_tokens, write_vectors
from embedlib.distillation import (
    DistillationConfig,
    distil,
    load_student,
    new_state,
    resolve_dtype,
    validation_cosine,
    write_trained,
)
from embedlib.encoder import Encoder, default_device, with_prompts
from embedlib.losses import LossConfig
from embedlib.objective import InfoNCEConfig, ObjectiveConfig
from embedlib.sampling import temperature_shares
from embedlib.training import OptimizerConfig, TrainState
from embedlib.training_texts import TrainingData, read_training_texts

WINDOW = 65536
WARM_UP_STEPS, PROBE_STEPS = 20, 50
PROMPTS = ["query", "passage"]
VALIDATION_TEXTS = 1000
DISTILLATION = DistillationConfig(
    batch_size=1024,
    loss=LossConfig(mse=1.0, cosine=0.0, gram=400.0),
    optimizer=OptimizerConfig(learning_rate=1e-3),
)
CONTRAST = ContrastiveConfig(
    batch_size=1024,
    objective=ObjectiveConfig(
        info_nce=InfoNCEConfig(weight=0.1, directions=["query_to_document", "document_to_query"]), anchor=1.0
    ),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    sampling_temperature=0.5,
)


def main() -> None:
    """Run what was asked for, print and write what was measured."""
    parser = benchmark_parser(__doc__ or "", "fewer texts and a few steps")
    parser.add_argument("--teacher", type=Path, help="directory of the teacher; with --texts")
    parser.add_argument("--student", type=Path, required=True, help="directory of the student to begin with")
    parser.add_argument("--texts", type=Path, help="what it is distilled on; none: no distillation")
    parser.add_argument("--pairs", type=Path, help="translations it is then contrasted on")
    parser.add_argument("--questions", type=Path, help="questions and passages it is then contrasted on")
    parser.add_argument("--minutes", type=float, default=4.0, help="of distillation, teacher vectors not counted")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    student, runs = options.student, []
    if options.texts:
        trained = options.output / "distilled"
        runs += distilled(options.teacher, student, trained, options.texts, options.minutes, options.quick)
        student = trained
    datasets = []
    if options.pairs:
        datasets.append(TrainingData(path=str(options.pairs), query="en", positive="xx", document_prompt="query"))
    if options.questions:
        datasets.append(TrainingData(path=str(options.questions), positive="passage"))
    if datasets:
        runs += contrasted(student, options.output / "contrasted", datasets, options.quick)
    for run in runs:
        print(
            " ".join(f"{name}={value:,.4g}" if isinstance(value, float) else f"{value}" for name, value in run.items())
        )
    write_result(options.json, {"machine": describe_machine(), "runs": runs, "ratios": {}})


def distilled(
    teacher_directory: Path, student: Path, output: Path, texts_file: Path, minutes: float, quick: bool
) -> list[dict[str, Any]]:
    """Distil for so many minutes; what was measured."""
    device = default_device()
    teacher, initial = Encoder.load(teacher_directory), Encoder.load(student)
    texts = pq.read_table(texts_file, columns=["text"])["text"].to_pylist()
    Random(0).shuffle(texts)
    texts = with_prompts(texts[: 3000 if quick else None], known_prompts(teacher, PROMPTS))
    arrays = output.parent / "dataset"
    arrays.mkdir(exist_ok=True)
    start = time.perf_counter()
    write_vectors(arrays, len(texts), teacher.embedding_dim, teacher_vectors(teacher, texts))
    teacher_s = time.perf_counter() - start
    start = time.perf_counter()
    write_tokens(arrays, len(texts), tokenised(initial, texts))
    tokens_s = time.perf_counter() - start
    whole = DistillationSet.open(arrays)
    validation = DistillationSet.of(
        [whole.tokens[whole.offsets[row] : whole.offsets[row + 1]] for row in range(VALIDATION_TEXTS)],
        whole.vectors[:VALIDATION_TEXTS],
    )
    training = DistillationSet(whole.tokens, whole.offsets[VALIDATION_TEXTS:], whole.vectors[VALIDATION_TEXTS:])
    model = load_student(student, device)
    dtype = resolve_dtype("auto", device)
    before = validation_cosine(model, validation, dtype)
    config = DISTILLATION
    rate = steps_per_s(new_state(load_student(student, device), len(training), config), training, config)
    state = new_state(model, len(training), config)
    state.total_steps = 10 if quick else int(60 * minutes * rate)
    start = time.perf_counter()
    samples, losses = 0, []
    for step in distil(state, training, config):
        samples += len(step.ids)
        losses.append(step.result.loss)
        if step.step % 1000 == 0:
            print(f"{step.step}/{state.total_steps} loss {np.mean(losses[-1000:]):.4f}", flush=True)
    seconds = time.perf_counter() - start
    write_trained(output, student, model.cpu().state_dict())
    measured = {
        "stage": "distil",
        "texts": len(texts),
        "teacher_texts_per_s": len(texts) / teacher_s,
        "student_tokenised_per_s": len(texts) / tokens_s,
        "steps": state.total_steps,
        "samples": samples,
        "samples_per_s": samples / seconds,
        "cosine_before": before,
        "cosine_after": validation_cosine(model.to(device), validation, dtype),
    }
    return [measured]


def steps_per_s(state: TrainState, dataset: DistillationSet, config: DistillationConfig) -> float:
    """How many steps this machine takes in a second, the first not counted."""
    state.total_steps = WARM_UP_STEPS + PROBE_STEPS
    for step in distil(state, dataset, config):
        if step.step == WARM_UP_STEPS:
            start = time.perf_counter()
    return PROBE_STEPS / (time.perf_counter() - start)


def teacher_vectors(teacher: Encoder, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers and vectors, before normalisation, of all texts; the next are tokenised meanwhile."""
    start = 0
    for tokens in tokenised(teacher, texts):
        vectors = teacher.encode_tokens(tokens, normalise=False).astype(np.float16)
        yield np.arange(start, start + len(tokens)), vectors
        start += len(tokens)


def tokenised(encoder: Encoder, texts: list[str]) -> Iterator[list[TokenIds]]:
    """Token ids of all texts in windows, one of them ahead."""
    with ThreadPoolExecutor(1) as ahead:
        windows = [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)]
        coming = ahead.submit(encoder.tokenise, windows[0])
        for window in [*windows[1:], []]:
            tokens, coming = coming.result(), ahead.submit(encoder.tokenise, window)
            yield tokens


def contrasted(student: Path, output: Path, datasets: list[TrainingData], quick: bool) -> list[dict[str, Any]]:
    """One pass over the pairs, held near to the student as it was; what was measured."""
    device = default_device()
    found = read_training_texts(datasets, max_characters=2000)
    if quick:
        found = found.taken(np.arange(len(found.samples)) < 5000).without_idle_texts()
    encoder = Encoder.load(student)
    tokens = [ids for prompt, part in found.texts.items() for ids in encoder.tokenise(part.to_pylist(), prompt)]
    sizes = np.bincount(found.groups, minlength=len(found.weights))
    dataset = ContrastiveSet(
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0, *map(len, tokens)]),
        samples=found.samples,
        groups=found.groups,
        shares=temperature_shares(sizes, found.weights, CONTRAST.sampling_temperature),
        vectors={"base": encoder.encode_tokens(tokens).astype(np.float16)},
    )
    model = load_encoder(student, device, CONTRAST)
    state = start_contrast(model, dataset, CONTRAST)
    start = time.perf_counter()
    losses = [step.result.loss for step in contrast(state, dataset, CONTRAST)]
    seconds = time.perf_counter() - start
    write_trained(output, student, model.cpu().state_dict())
    measured = {
        "stage": "contrast",
        "samples": len(dataset),
        "steps": state.total_steps,
        "samples_per_s": len(dataset) / seconds,
        "loss_before": float(np.mean(losses[:20])),
        "loss_after": float(np.mean(losses[-20:])),
    }
    return [measured]


if __name__ == "__main__":
    main()
