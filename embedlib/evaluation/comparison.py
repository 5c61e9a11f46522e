"""Measure a student against its teacher: fidelity, bitext accuracy, unknown tokens, speed and size."""

import os
import platform
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from embedlib.encoder import Encoder, default_device, fast_dtype
from embedlib.evaluation.report import Bitext, Fidelity, Model, Report, Size, Speed, Student, Training
from embedlib.evaluation.sts import load_sts, score_sts
from embedlib.metrics import bitext_accuracy, mean_cosine, similarity_spearman

MIN_PAIRS = 20
SPEED_RUNS = 3
SPEED_TEXTS = 750
MAX_HELD_OUT = 20_000
PLOTTED_SENTENCES = 40

Vectors = npt.NDArray[np.float32]


class Paths(NamedTuple):
    """Where the three models and the held-out texts lie."""

    teacher: Path
    initial: Path
    student: Path
    held_out: Path


class HeldOut(NamedTuple):
    """Held-out texts and the pairs of rows among them that translate each other."""

    texts: list[str]
    langs: list[str]
    groups: list[int]

    @classmethod
    def read(cls, path: Path, max_texts: int | None = None) -> "HeldOut":
        """The first `max_texts` rows of a CORPUS file."""
        table = pq.read_table(path).slice(0, max_texts)
        return cls(table["text"].to_pylist(), table["lang"].to_pylist(), table["group"].to_pylist())

    def pairs(self, pivot: str = "en") -> dict[str, tuple[list[int], list[int]]]:
        """By language, rows of its sentences and of their `pivot` translations; languages with few pairs left out."""
        pivots = {
            group: row for row, (group, lang) in enumerate(zip(self.groups, self.langs, strict=True)) if lang == pivot
        }
        pairs: dict[str, tuple[list[int], list[int]]] = {}
        for row, (group, lang) in enumerate(zip(self.groups, self.langs, strict=True)):
            if group >= 0 and lang != pivot and group in pivots:
                sources, targets = pairs.setdefault(lang, ([], []))
                sources.append(row)
                targets.append(pivots[group])
        return {lang: pair for lang, pair in sorted(pairs.items()) if len(pair[0]) >= MIN_PAIRS}


def fidelity(student: Vectors, teacher: Vectors) -> Fidelity:
    """How closely the student's vectors (texts, dim) follow the teacher's (texts, teacher_dim)."""
    cosine = mean_cosine(student, teacher) if student.shape == teacher.shape else float("nan")
    return Fidelity(cosine=cosine, spearman=similarity_spearman(student, teacher))


def bitext_by_language(vectors: Vectors, held_out: HeldOut) -> dict[str, float]:
    """Share of sentences whose nearest neighbour in the other language is their translation, by language."""
    return {
        lang: bitext_accuracy(vectors[sources], vectors[targets])
        for lang, (sources, targets) in held_out.pairs().items()
    }


def symmetric_prompt(prompts: Mapping[str, str]) -> str | None:
    """The prompt for both sides of a symmetric task: `query`, as e5 asks, where documents have a prompt as well.

    Where queries alone have one, it is an instruction to retrieve, which no other task wants.
    """
    documents = any(prompts.get(name) for name in ("document", "passage"))
    return "query" if documents and "query" in prompts else None


def unknown_rate(encoder: Encoder, texts: Sequence[str]) -> float:
    """Share of tokens that are unknown, over `texts` and every assigned code point of Unicode on its own."""
    unknown = encoder.unknown_token_id
    assigned = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    tokens = np.concatenate([ids for part in (list(texts), assigned) for ids in encoder.tokenise(part)])
    return float(np.mean(tokens == unknown))


def measure_speed(teacher: Encoder, student: Encoder, texts: Sequence[str]) -> Speed:
    """Both models on the same texts in turn, tokenisation included; the median of several runs each."""
    seconds: dict[str, list[float]] = {"teacher": [], "student": []}
    for _ in range(SPEED_RUNS):
        for name, encoder in (("teacher", teacher), ("student", student)):
            start = time.perf_counter()
            encoder.encode(texts, symmetric_prompt(encoder.prompts))
            seconds[name].append(time.perf_counter() - start)
    growth = _num_tokens(student, texts) / _num_tokens(teacher, texts)
    layers = num_layers(teacher) / num_layers(student)
    return Speed(
        teacher_sentences_per_s=len(texts) / median(seconds["teacher"]),
        student_sentences_per_s=len(texts) / median(seconds["student"]),
        token_growth=growth,
        bound=layers / growth,
    )


def describe_model(encoder: Encoder, name: str) -> Model:
    """What a model is, for the report."""
    config = encoder.body.config
    return Model(
        name=name,
        params=encoder.num_parameters,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        embedding_dim=encoder.embedding_dim,
    )


def measure_size(paths: Paths, teacher_params: int, student_params: int) -> Size:
    """Parameters and megabytes (10⁶ bytes) of the weights of both directories."""
    return Size(
        teacher_params=teacher_params,
        student_params=student_params,
        teacher_mb=weight_megabytes(paths.teacher),
        student_mb=weight_megabytes(paths.student),
    )


def num_layers(encoder: Encoder) -> int:
    """Transformer layers of the body."""
    return int(encoder.body.config.num_hidden_layers)


def _num_tokens(encoder: Encoder, texts: Sequence[str]) -> int:
    return sum(len(ids) for ids in encoder.tokenise(texts, symmetric_prompt(encoder.prompts)))


def weight_megabytes(directory: Path) -> float:
    """Size of a model's weights on disk, in 10⁶ bytes."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors")) / 1e6


class Comparison(NamedTuple):
    """What was measured of teacher, untrained and trained student."""

    teacher: Model
    student: Student
    vectors: dict[str, Vectors]
    """Vectors of the held-out texts by model."""
    held_out: HeldOut
    bitext: Bitext | None
    speed: Speed
    size: Size
    sts: dict[str, dict[str, float]] | None

    def report(
        self, fingerprint: str, training: Training, compression: dict[str, Any], timings: dict[str, float]
    ) -> Report:
        """The report of these measurements and of how the student was made."""
        return Report(
            fingerprint=fingerprint,
            teacher=self.teacher,
            student=self.student,
            fidelity=fidelity(self.vectors["student"], self.vectors["teacher"]),
            fidelity_initial=fidelity(self.vectors["student_initial"], self.vectors["teacher"]),
            bitext=self.bitext,
            speed=self.speed,
            size=self.size,
            sts=self.sts,
            training=training,
            compression=compression,
            timings=timings,
            machine=describe_machine(),
        )


def compare(teacher_name: str, paths: Paths, sts: Sequence[Path] = ()) -> Comparison:
    """Measure the three models on the held-out texts, on speed and size, and on the STS sets given."""
    encoders = {
        "teacher": Encoder.load(paths.teacher),
        "student_initial": Encoder.load(paths.initial),
        "student": Encoder.load(paths.student),
    }
    teacher, student = encoders["teacher"], encoders["student"]
    prompts = {name: symmetric_prompt(encoder.prompts) for name, encoder in encoders.items()}
    held_out = HeldOut.read(paths.held_out, MAX_HELD_OUT)
    vectors = {name: encoder.encode(held_out.texts, prompts[name]) for name, encoder in encoders.items()}
    bitext = {name: bitext_by_language(rows, held_out) for name, rows in vectors.items()}
    sets = [each for path in sts for each in load_sts(path)]
    scores = {
        name: score_sts(partial(encoder.encode, prompt_name=prompts[name]), sets) for name, encoder in encoders.items()
    }
    described = describe_model(student, "student").model_dump()
    return Comparison(
        teacher=describe_model(teacher, teacher_name),
        student=Student(**described, unk_rate=unknown_rate(student, held_out.texts)),
        vectors=vectors,
        held_out=held_out,
        bitext=Bitext(**bitext) if bitext["teacher"] else None,
        speed=measure_speed(teacher, student, held_out.texts[:SPEED_TEXTS]),
        size=measure_size(paths, teacher.num_parameters, student.num_parameters),
        sts=scores if sets else None,
    )


def draw(comparison: Comparison, training: Training) -> dict[str, str]:
    """The report's plots as SVG by caption; needs the `demo` extra."""
    from embedlib.evaluation.plots import bitext_bars, project, scatter, training_curves

    held_out = comparison.held_out
    plots = {"How the student learned.": training_curves(training)}
    if comparison.bitext:
        plots["Translations found in each language, by model."] = bitext_bars(comparison.bitext)
    rows = translated_rows(held_out)
    langs, groups = [held_out.langs[row] for row in rows], [held_out.groups[row] for row in rows]
    for name in ("teacher", "student") if rows else ():
        points = project(comparison.vectors[name][rows])
        plots[f"Sentences by language, {name}."] = scatter(points, langs, f"{name}, coloured by language", legend=True)
        plots[f"Translations of a sentence share colour and marker, {name}."] = scatter(
            points, groups, f"{name}, coloured by sentence", legend=False
        )
    return plots


def translated_rows(held_out: HeldOut) -> list[int]:
    """Rows of the sentences with the most translations, PLOTTED_SENTENCES of them."""
    by_group: dict[int, list[int]] = {}
    for row, group in enumerate(held_out.groups):
        if group >= 0:
            by_group.setdefault(group, []).append(row)
    widest = sorted(by_group.values(), key=len, reverse=True)[:PLOTTED_SENTENCES]
    return [row for rows in widest for row in rows if len(rows) > 1]


def describe_machine() -> dict[str, Any]:
    """What the speeds were measured on."""
    device = default_device()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(fast_dtype(device)).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
