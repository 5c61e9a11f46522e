"""Texts longer than the positions a body has learned: which rows serve as further ones, by retrieval of long documents.

    python -m benchmarks.long_input --set xquad_retrieval [--quick] [--json OUT]

Paragraphs of the set (`corpus.parquet`, `queries.parquet` and `qrels.parquet`) are joined, in an order of chance, to
documents three times as long as the body's positions. A question is to find the document with its paragraph among
those of its language. nDCG@10 by where in the document the paragraph begins. Whatever the further rows are, texts that
fitted before keep their vectors.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, write_result
from benchmarks.machine import describe_machine, in_fresh_process
from embedlib.chunking import pool_chunks, split_long
from embedlib.compress.positions import extend_positions
from embedlib.encoder import Encoder, Vectors, default_device, fast_dtype
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from embedlib.torch_model import body_of, load_model

LANGUAGES = ("en",)
PARTS = ("first third", "second", "last")
LENGTH = 2048
QUICK_PARAGRAPHS = 40

Further = Callable[[torch.Tensor, int], torch.Tensor]
"""Learned rows (old, dim) and how many to add: the rows to add (added, dim)."""


def stretched(first: float, last: float) -> Further:
    """From one place in the table to another, as shares of it, in equal steps."""

    def rows(old: torch.Tensor, added: int) -> torch.Tensor:
        at = torch.linspace(first, last, added) * (len(old) - 1)
        low = at.floor().long().clamp(max=len(old) - 2)
        return torch.lerp(old[low], old[low + 1], (at - low)[:, None])

    return rows


def repeated(first: float, mirrored: bool = False) -> Further:
    """The table from one place on again and again, every other time backwards if `mirrored`."""

    def rows(old: torch.Tensor, added: int) -> torch.Tensor:
        part = old[round(first * len(old)) :]
        period = torch.cat([part.flip(0), part]) if mirrored else part
        return period.repeat(-(-added // len(period)), 1)[:added]

    return rows


METHODS: dict[str, Further] = {
    "stretched": stretched(0, 1),
    "repeated": repeated(0),
    "stretched, second half": stretched(0.5, 1),
    "repeated, second half": repeated(0.5),
    "stretched, backwards": stretched(1, 0),
    "mirrored": repeated(0, mirrored=True),
    "the last row": lambda old, added: old[-1:].repeat(added, 1),
}


class Haystack(NamedTuple):
    """Documents of one language, and questions each of which one of them answers."""

    documents: list[str]
    questions: list[str]
    answers: npt.NDArray[np.int64]
    """(questions,): the document of each."""
    parts: npt.NDArray[np.int64]
    """(questions,): in which of the document's `PARTS` the paragraph begins."""


class Score(NamedTuple):
    """One way of reading the documents."""

    name: str
    ndcg: float
    """nDCG@10, mean over languages and parts."""
    by_part: list[float]
    """nDCG@10 of questions whose paragraph begins there, mean over languages."""
    seconds: float


def main() -> None:
    """Read the documents in every way, print and write."""
    options = parse_arguments(sys.argv[1:])
    directory = pretrained_directory(EMBEDDED_TEACHER)
    teacher = Encoder.load(directory)
    num_paragraphs = QUICK_PARAGRAPHS if options.quick else None
    haystacks = [read_haystack(options.set, lang, teacher, num_paragraphs) for lang in LANGUAGES]
    questions = [teacher.encode(haystack.questions, "query") for haystack in haystacks]
    scores = []
    for name, read in ways(teacher, directory).items():
        start = time.perf_counter()
        documents = [read(haystack.documents) for haystack in haystacks]
        scores.append(score(name, haystacks, questions, documents, time.perf_counter() - start))
        print(scores[-1], flush=True)
    Console(width=110).print(table_of(scores, sum(len(haystack.questions) for haystack in haystacks)))
    cut = scores[0]
    result = {
        "machine": in_fresh_process(describe_machine),
        "runs": [each._asdict() for each in scores],
        "ratios": {f"{each.name}_vs_{cut.name}": each.ndcg / cut.ndcg for each in scores[1:]},
    }
    write_result(options.json, result)


def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = benchmark_parser("Texts longer than the teacher's positions.", "few paragraphs")
    parser.add_argument("--set", type=Path, required=True, metavar="DIR", help="corpus, queries and qrels in Parquet")
    return parser.parse_args(arguments)


def read_haystack(directory: Path, lang: str, encoder: Encoder, num_paragraphs: int | None) -> Haystack:
    """Join the set's paragraphs in `lang` to documents of `len(PARTS)` times what `encoder` reads."""
    corpus, queries, qrels = (
        [row for row in pq.read_table(directory / f"{name}.parquet").to_pylist() if row["lang"] == lang]
        for name in ("corpus", "queries", "qrels")
    )
    limit = encoder.max_seq_length
    lengths = [len(encoding.ids) for encoding in encoder.whole_texts.encode_batch([row["text"] for row in corpus])]
    documents: list[list[str]] = [[]]
    places, tokens = {}, 0
    for at in np.random.default_rng(0).permutation(len(corpus))[:num_paragraphs].tolist():
        if tokens + lengths[at] > len(PARTS) * limit:
            documents.append([])
            tokens = 0
        places[corpus[at]["_id"]] = len(documents) - 1, tokens // limit
        documents[-1].append(corpus[at]["text"])
        tokens += lengths[at]
    answers = {row["query-id"]: row["corpus-id"] for row in qrels}
    asked = [(row["text"], *places[answers[row["_id"]]]) for row in queries if answers[row["_id"]] in places]
    texts, found, parts = zip(*asked, strict=True)
    return Haystack([" ".join(joined) for joined in documents], list(texts), np.array(found), np.array(parts))


def ways(teacher: Encoder, directory: Path) -> dict[str, Callable[[Sequence[str]], Vectors]]:
    """How to read long documents: cut, by chunks, and with more positions."""
    prompt = teacher.prompt("passage")

    def in_chunks(texts: Sequence[str]) -> Vectors:
        size = teacher.max_seq_length - len(teacher.tokenise([prompt])[0])
        chunks = [split_long(teacher.whole_texts, text, size, 0) for text in texts]
        vectors = teacher.encode([chunk for parts in chunks for chunk in parts], "passage")
        return np.asarray(pool_chunks(vectors, np.array([len(parts) for parts in chunks]), "mean"))

    def extended(further: Further) -> Callable[[Sequence[str]], Vectors]:
        return lambda texts: longer_encoder(directory, further, LENGTH).encode(texts, "passage")

    return {
        "cut": lambda texts: teacher.encode(texts, "passage"),
        "chunks": in_chunks,
        **{name: extended(further) for name, further in METHODS.items()},
    }


def longer_encoder(directory: Path, further: Further, length: int) -> Encoder:
    """The model of `directory` reading `length` tokens."""
    model = load_model(directory, default_device())
    table = body_of(model).get_submodule("embeddings.position_embeddings")
    old = table.weight.detach().clone()
    extend_positions(body_of(model), length)
    table = body_of(model).get_submodule("embeddings.position_embeddings")
    with torch.no_grad():
        table.weight[len(old) :] = further(old, length - len(old))
    model.max_seq_length = length
    return Encoder.of(model, fast_dtype(model.device))


def score(
    name: str, haystacks: Sequence[Haystack], questions: Sequence[Vectors], documents: Sequence[Vectors], seconds: float
) -> Score:
    """How well the questions find their documents."""
    gains = np.empty((len(haystacks), len(PARTS)))
    for row, (haystack, asked, held) in enumerate(zip(haystacks, questions, documents, strict=True)):
        similarities = asked @ (held / np.linalg.norm(held, axis=1, keepdims=True)).T
        own = np.take_along_axis(similarities, haystack.answers[:, None], 1)
        ranks = (similarities > own).sum(axis=1)
        gain = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)
        gains[row] = [gain[haystack.parts == part].mean() for part in range(len(PARTS))]
    return Score(name, float(gains.mean()), gains.mean(axis=0).tolist(), seconds)


def table_of(scores: Sequence[Score], num_questions: int) -> Table:
    """What to print."""
    table = Table(
        "", title=f"{num_questions:,} questions in {len(LANGUAGES)} languages; nDCG@10 by where the paragraph begins"
    )
    for column in (*PARTS, "mean", "seconds"):
        table.add_column(column, justify="right")
    for each in scores:
        cells = [f"{value:.3f}" for value in (*each.by_part, each.ndcg)]
        table.add_row(each.name, *cells, f"{each.seconds:.0f}")
    return table


if __name__ == "__main__":
    main()
