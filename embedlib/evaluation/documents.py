"""An evaluation set out of a user's own documents, without labels: parts of a document as queries for the rest of it.

    title           the title finds the body
    first_sentence  the first sentence finds what follows it
    span            a sentence from the middle, cut out, finds the passage it came from (inverse cloze, Lee et al. 2019)
    translation     a document finds its translation

Documents are cut into passages, and all passages are in every corpus, so that those of the same document are the hard
distractors. What is measured is whether vectors tell one's own documents apart, not whether they answer questions.
"""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedlib.artifact import whole_directory
from embedlib.errors import DataError
from embedlib.evaluation.tasks import TaskConfig
from embedlib.sentences import sentences

PASSAGE_CHARACTERS = 800
LEAST_CHARACTERS = 120
LEAST_QUERIES = 20
MAX_QUERIES = 1000
UNKNOWN = "und"
TEXT_FILES = (".txt", ".md")


class Document(NamedTuple):
    """One document of the user's."""

    title: str
    text: str
    lang: str
    translation: str


class Passage(NamedTuple):
    """A piece of a document."""

    document: int
    sentences: list[str]

    @property
    def text(self) -> str:
        """Its sentences."""
        return " ".join(self.sentences)


class Query(NamedTuple):
    """A part of a document, and what it was taken from."""

    text: str
    lang: str
    passages: list[int]
    """Numbers of the passages that answer it."""
    instead: str | None = None
    """What stands in the corpus for the passage it was cut out of."""


def read_documents(path: Path) -> list[Document]:
    """Documents of a folder of text or Markdown, or of Parquet, JSON Lines or a folder of these with a column `text`.

    Columns `title`, `lang` and `translation` are used where they are. DataError where nothing can be read.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    # A document that is there twice would be a wrong answer to its own parts.
    documents = list({document.text: document for file in files for document in _read_file(file)}.values())
    if not documents:
        raise DataError(f"docs: {path} has no documents; expected .txt, .md, or .parquet and .jsonl with `text`")
    return documents


def _read_file(file: Path) -> Iterator[Document]:
    try:
        if file.suffix in TEXT_FILES:
            first, _, rest = file.read_text(encoding="utf-8").strip().partition("\n")
            titled = bool(rest.strip()) and len(first) < 120
            yield Document(first.strip("# ") if titled else "", rest.strip() if titled else first, UNKNOWN, "")
        elif file.suffix == ".parquet":
            yield from _documents_of(file, pq.read_table(file).to_pylist())
        elif file.suffix == ".jsonl":
            # Not splitlines, which also cuts at separators that JSON leaves as they are.
            lines = filter(str.strip, file.read_text(encoding="utf-8").split("\n"))
            yield from _documents_of(file, map(json.loads, lines))
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"docs: {file} cannot be read: {error}") from error


def _documents_of(file: Path, rows: Any) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if "text" not in row:
            raise DataError(f"docs: {file}: row {number} has no `text`; found {', '.join(row)}")
        if not isinstance(row["text"], str | None):
            raise DataError(f"docs: {file}: `text` of row {number} is {row['text']!r}; expected a text")
        if row["text"] and row["text"].strip():
            title, translation = (str(row.get(name) or "") for name in ("title", "translation"))
            yield Document(title, row["text"], row.get("lang") or UNKNOWN, translation)


def make_document_tasks(documents: Sequence[Document], directory: Path, seed: int) -> dict[str, TaskConfig]:
    """Write the sets below `directory` and give their tasks; those with too few queries are left out.

    DataError where no set has enough queries.
    """
    rng = np.random.default_rng(seed)
    passages, of_document = cut_all(documents)
    makers: dict[str, Callable[[], list[Query]]] = {
        "title": lambda: titles(documents, of_document),
        "first_sentence": lambda: first_sentences(documents, passages, of_document),
        "span": lambda: spans(documents, passages, rng),
    }
    tasks = {}
    for name, make in makers.items():
        queries = drawn(make(), rng)
        if len(queries) >= LEAST_QUERIES:
            write_retrieval(directory / name, passages, queries)
            tasks[f"docs_{name}"] = TaskConfig(type="retrieval", path=name)
    translated = drawn([document for document in documents if document.translation.strip()], rng)
    if len(translated) >= LEAST_QUERIES:
        write_translations(directory / "translation", translated)
        tasks["docs_translation"] = TaskConfig(type="bitext", path="translation")
    if not tasks:
        raise DataError(f"docs: {len(documents)} documents give fewer than {LEAST_QUERIES} queries of any kind")
    return tasks


def cut_all(documents: Sequence[Document]) -> tuple[list[Passage], dict[int, list[int]]]:
    """All passages, each once, and the numbers of those of each document.

    What many documents repeat, a notice or a footer, would be a wrong answer for all but one of them.
    """
    passages: dict[str, Passage] = {}
    of_document: dict[int, list[int]] = {}
    places: dict[str, int] = {}
    for number, document in enumerate(documents):
        for passage in (Passage(number, piece) for piece in cut(document.text)):
            passages.setdefault(passage.text, passage)
            place = places.setdefault(passage.text, len(places))
            of_document.setdefault(number, []).append(place)
    return list(passages.values()), of_document


def cut(text: str) -> list[list[str]]:
    """The sentences of a text in passages of about PASSAGE_CHARACTERS; those that no mark ends, in parts."""
    passages: list[list[str]] = [[]]
    parts = (textwrap.wrap(whole, PASSAGE_CHARACTERS // 3) for whole in sentences(" ".join(text.split())))
    for sentence in (part for some in parts for part in some):
        if passages[-1] and sum(map(len, passages[-1])) + len(sentence) > PASSAGE_CHARACTERS:
            passages.append([])
        passages[-1].append(sentence)
    return [passage for passage in passages if passage]


def titles(documents: Sequence[Document], of_document: dict[int, list[int]]) -> list[Query]:
    """Titles that only one document has; every passage of it is an answer."""
    count: dict[str, int] = {}
    for document in documents:
        count[document.title] = count.get(document.title, 0) + 1
    return [
        Query(document.title, document.lang, of_document[number])
        for number, document in enumerate(documents)
        if document.title.strip() and count[document.title] == 1 and number in of_document
    ]


def first_sentences(
    documents: Sequence[Document], passages: Sequence[Passage], of_document: dict[int, list[int]]
) -> list[Query]:
    """First sentences of documents, cut off; what is left of the first passage is the answer."""
    found = []
    for number, own in of_document.items():
        first = passages[own[0]]
        rest = " ".join(first.sentences[1:])
        if len(rest) >= LEAST_CHARACTERS:
            found.append(Query(first.sentences[0], documents[number].lang, [own[0]], rest))
    return found


def spans(documents: Sequence[Document], passages: Sequence[Passage], rng: np.random.Generator) -> list[Query]:
    """A sentence from the middle of a passage, cut out; what is left of the passage is the answer."""
    found = []
    for number, passage in enumerate(passages):
        if len(passage.sentences) < 3:
            continue
        place = int(rng.integers(1, len(passage.sentences)))
        rest = " ".join(sentence for at, sentence in enumerate(passage.sentences) if at != place)
        if len(rest) >= LEAST_CHARACTERS:
            found.append(Query(passage.sentences[place], documents[passage.document].lang, [number], rest))
    return found


def drawn(queries: list[Any], rng: np.random.Generator) -> list[Any]:
    """At most MAX_QUERIES of them."""
    order = sorted(rng.permutation(len(queries))[:MAX_QUERIES].tolist())
    return [queries[number] for number in order]


def write_retrieval(directory: Path, passages: Sequence[Passage], queries: Sequence[Query]) -> None:
    """Corpus, queries and qrels in one directory, put in place when whole."""
    texts = [passage.text for passage in passages]
    for query in queries:
        if query.instead is not None:
            texts[query.passages[0]] = query.instead
    pairs = [(f"q{number}", f"p{passage}") for number, query in enumerate(queries) for passage in query.passages]
    tables = {
        "corpus": {"_id": [f"p{number}" for number in range(len(texts))], "text": texts},
        "queries": {"_id": [f"q{number}" for number in range(len(queries))], "text": [query.text for query in queries]},
        "qrels": {"query-id": [query for query, _ in pairs], "corpus-id": [passage for _, passage in pairs]},
    }
    if {query.lang for query in queries} != {UNKNOWN}:
        tables["queries"]["lang"] = [query.lang for query in queries]  # of queries alone: passages are for all of them
    _write(directory, tables)


def write_translations(directory: Path, documents: Sequence[Document]) -> None:
    """Documents and their translations as a bitext set."""
    first = [" ".join(cut(document.text)[0]) for document in documents]
    second = [" ".join(cut(document.translation)[0]) for document in documents]
    _write(directory, {"test": {"sentence1": first, "sentence2": second}})


def _write(directory: Path, tables: dict[str, dict[str, list[str]]]) -> None:
    if directory.exists():
        return
    with whole_directory(directory) as scratch:
        for name, columns in tables.items():
            pq.write_table(pa.table(columns), scratch / f"{name}.parquet")
