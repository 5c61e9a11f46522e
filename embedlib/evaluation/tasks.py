"""Evaluation sets in Parquet as tasks of mteb: its classes score them, so a local score is what mteb would publish.

A set is a `TaskConfig`; `load_task` reads it, refuses what cannot be scored, and gives an mteb task with its data.
Column names are mteb's own unless `columns` says what the set calls them:

    type                 columns                                     files
    sts                  sentence1, sentence2, score, lang           {split}.parquet, or one file
    pair_classification  sentence1, sentence2, label, lang           the same
    bitext               sentence1, sentence2, lang                  the same; or a column a language and `pivot`
    classification       text, label, lang                           {split} and train.parquet, or one with `split`
    clustering           text, label, lang                           {split}.parquet, or one file
    retrieval            _id, text, title, lang · _id, text, lang ·  corpus.parquet, queries.parquet, qrels.parquet
                         query-id, corpus-id, score, lang
    reranking            query, positive, negative, lang             {split}.parquet, or one file
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from pydantic import Field

from embedlib.artifact import fingerprint, hash_file
from embedlib.config import Config
from embedlib.errors import DataError
from embedlib.evaluation.languages import language_codes

LocalType = Literal["sts", "pair_classification", "bitext", "classification", "clustering", "retrieval", "reranking"]
ID_COLUMNS = ("_id", "query-id", "corpus-id")
# mteb clusters samples of the texts ten times; more texts a sample change the score little and cost minutes.
CLUSTERED_TEXTS = 2048


class TaskConfig(Config):
    """One evaluation set on disk."""

    type: LocalType
    """What is scored, and so which columns the set has."""
    path: str
    """Parquet file or directory; relative to `root` of the job."""
    split: str = "test"
    """Which rows are scored: those of `{split}.parquet`, or those that say so in a column `split`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What the set calls a column, by mteb's name: `{"label": "category"}`."""
    language: str | None = None
    """What the texts are in, where the set has no column `lang`."""
    languages: list[str] | None = None
    """Only these values of `lang`, or only these columns of a bitext set that has one a language; none: all."""
    pivot: str | None = None
    """Bitext with a column a language: the one that all others are matched with. Retrieval with `join`: the language of
    the documents."""
    join: str | None = None
    """Retrieval across languages: queries of every language among documents of `pivot`; a document answers a query
    where both have the same value in this column, the query by its row of qrels."""
    samples_per_label: int = Field(default=8, ge=1)
    """Classification: texts of each label that a classifier is trained on, ten times anew."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many first rows, or queries, of each language."""


class Kind(NamedTuple):
    """What mteb calls a type of task, and how it is read."""

    name: str
    main_score: str
    base: type[AbsTask]
    read: Callable[[str, TaskConfig, Path], dict[str, Any]]


def load_task(name: str, config: TaskConfig, root: Path) -> AbsTask:
    """The task with its data; DataError where a file, column or value is missing or the set cannot be scored."""
    kind = KINDS[config.type]
    path = root / config.path
    data = kind.read(name, config, path)
    if not data:
        raise DataError(f"task {name}: {path} has no rows of {config.languages or 'any language'}")
    langs = {subset: language_codes(config.language or subset) for subset in data}
    metadata = TaskMetadata(
        name=name,
        description=f"{config.type} on {path.name}",
        type=kind.name,
        category="t2c" if config.type in ("classification", "clustering") else "t2t",
        eval_splits=[config.split],
        eval_langs=next(iter(langs.values())) if list(data) == ["default"] else langs,
        main_score=kind.main_score,
        dataset={"path": path.name, "revision": task_mark(config, root)},
    )
    attributes: dict[str, Any] = {"metadata": metadata, "load_data": _already_loaded}
    if config.type == "classification":
        attributes["samples_per_label"] = config.samples_per_label
    if config.type == "clustering":
        attributes |= {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": CLUSTERED_TEXTS}
    task: AbsTask = type("LocalTask", (kind.base,), attributes)()
    task.dataset, task.data_loaded = data, True
    return task


def task_mark(config: TaskConfig, root: Path) -> str:
    """Fingerprint of everything that decides a score besides the model: the settings and the files' content."""
    path = root / config.path
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"task at {path}: no Parquet file; expected one, or a directory of them")
    return fingerprint(config=config.model_dump(exclude={"path"}), files=[hash_file(file) for file in files])


def _already_loaded(self: AbsTask, num_proc: int | None = None, **_: Any) -> None:
    """What mteb calls to load a task's data."""


def _read_pairs(name: str, config: TaskConfig, path: Path) -> dict[str, Any]:
    third = {"sts": "score", "pair_classification": "label"}.get(config.type)
    columns = ["sentence1", "sentence2", *([third] if third else [])]
    rows = _split_rows(name, config, path, config.split, columns)
    return _by_language(config, rows, lambda table, lang: {config.split: _pair_rows(name, config, table, lang)})


def _pair_rows(name: str, config: TaskConfig, table: pa.Table, lang: str) -> Dataset:
    rows = table.select(["sentence1", "sentence2"]).to_pydict()
    if config.type == "sts":
        rows["score"] = _varied(name, lang, "score", table["score"].cast(pa.float64()).to_pylist())
    if config.type == "pair_classification":
        labels = _varied(name, lang, "label", table["label"].to_pylist())
        if strange := [label for label in labels if label not in (0, 1)]:
            raise DataError(f"task {name}: label of {lang!r} is {strange[0]!r}; expected 0 or 1, 1 for a true pair")
        rows["labels"] = [int(label) for label in labels]
    return Dataset.from_dict(rows)


def _read_bitext(name: str, config: TaskConfig, path: Path) -> dict[str, Any]:
    if config.pivot is None:
        return _read_pairs(name, config, path)
    table = _split_rows(name, config, path, config.split, [config.pivot])
    texts = [
        field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    others = config.languages or [column for column in texts if column not in (config.pivot, "lang", "split")]
    _require_columns(name, path, table, others)
    table = table.slice(0, config.limit)
    return {
        f"{other}-{config.pivot}": {
            config.split: Dataset.from_dict(
                {"sentence1": _texts(name, table, other), "sentence2": _texts(name, table, config.pivot)}
            )
        }
        for other in others
        if other != config.pivot
    }


def _read_labelled(name: str, config: TaskConfig, path: Path) -> dict[str, Any]:
    splits = [config.split, "train"] if config.type == "classification" else [config.split]
    column = "text" if config.type == "classification" else "sentences"
    tables = {split: _split_rows(name, config, path, split, ["text", "label"]) for split in splits}
    if len(splits) == 2 and (config.split == "train" or tables["train"].equals(tables[config.split])):
        raise DataError(f"task {name}: {path} trains on what it scores; expected a column `split` or train.parquet")
    numbers = _numbers([label for table in tables.values() for label in table["label"].to_pylist()])

    def dataset(table: pa.Table, lang: str) -> Dataset:
        labels = _varied(name, lang, "label", table["label"].to_pylist())
        key = "label" if config.type == "classification" else "labels"
        return Dataset.from_dict({column: table["text"].to_pylist(), key: [numbers[label] for label in labels]})

    whole = config.model_copy(update={"limit": None})
    parts = {
        split: _by_language(config if split == config.split else whole, table, dataset)
        for split, table in tables.items()
    }
    if missing := sorted(set(parts[config.split]) - set(parts[splits[-1]])):
        raise DataError(f"task {name}: {path} has no training rows of {missing[0]!r}")
    return {subset: DatasetDict({split: parts[split][subset] for split in splits}) for subset in parts[config.split]}


def _read_retrieval(name: str, config: TaskConfig, path: Path) -> dict[str, Any]:
    extra = [config.join] if config.join else []
    corpus, queries, qrels = (
        _table(name, config, path / f"{file}.parquet", columns)
        for file, columns in (
            ("corpus", ["_id", "text", *extra]),
            ("queries", ["_id", "text"]),
            ("qrels", ["query-id", "corpus-id", *extra]),
        )
    )
    if not len(queries):
        raise DataError(f"task {name}: {path / 'queries.parquet'} has no queries")
    langs = _languages(config, queries)
    if config.join and config.pivot is None:
        raise DataError(f"task {name}: join: {config.join!r} needs `pivot`, the language of the documents")
    subsets = {f"{lang}-{config.pivot}" if config.join else lang: lang for lang in langs}
    return {
        subset: {config.split: _retrieval_subset(name, config, lang, corpus, queries, qrels)}
        for subset, lang in subsets.items()
        if not (config.join and lang == config.pivot)
    }


def _retrieval_subset(
    name: str, config: TaskConfig, lang: str, corpus: pa.Table, queries: pa.Table, qrels: pa.Table
) -> dict[str, Any]:
    documents = _of_language(corpus, config.pivot if config.join else lang)
    asked = _of_language(queries, lang)
    asked = asked.slice(0, config.limit)
    relevant: dict[str, dict[str, int]] = {query: {} for query in asked["_id"].to_pylist()}
    scores = _relevances(name, qrels)
    known = set(documents["_id"].to_pylist())
    if config.join:
        answers = _documents_by(documents, config.join)
        for query, value, score in zip(
            qrels["query-id"].to_pylist(), qrels[config.join].to_pylist(), scores, strict=True
        ):
            if query in relevant:
                relevant[query] |= dict.fromkeys(answers.get(value, ()), score)
    else:
        for query, document, score in zip(
            qrels["query-id"].to_pylist(), qrels["corpus-id"].to_pylist(), scores, strict=True
        ):
            if query in relevant and document in known:
                relevant[query][document] = score
    if not any(relevant.values()):
        raise DataError(f"task {name}: no query of {lang!r} has a relevant document in the corpus")
    titles = documents["title"].to_pylist() if "title" in documents.column_names else [""] * len(documents)
    return {
        "corpus": Dataset.from_dict(
            {
                "id": documents["_id"].to_pylist(),
                "text": _texts(name, documents, "text"),
                "title": [title or "" for title in titles],
            }
        ),
        "queries": Dataset.from_dict({"id": asked["_id"].to_pylist(), "text": _texts(name, asked, "text")}),
        "relevant_docs": relevant,
        "top_ranked": None,
    }


def _relevances(name: str, qrels: pa.Table) -> list[int]:
    """How well each document answers its query; DataError for shares of one, which mteb would take for nothing."""
    scores = qrels["score"].to_pylist() if "score" in qrels.column_names else [1] * len(qrels)
    if strange := [score for score in scores if score is None or score != int(score)]:
        raise DataError(f"task {name}: score of qrels is {strange[0]!r}; expected whole numbers, 0 for no answer")
    return [int(score) for score in scores]


def _documents_by(documents: pa.Table, column: str) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for document, value in zip(documents["_id"].to_pylist(), documents[column].to_pylist(), strict=True):
        found.setdefault(value, []).append(document)
    return found


def _read_reranking(name: str, config: TaskConfig, path: Path) -> dict[str, Any]:
    rows = _split_rows(name, config, path, config.split, ["query", "positive", "negative"])

    def dataset(table: pa.Table, lang: str) -> dict[str, Any]:
        numbers: dict[str, str] = {}
        relevant, ranked = {}, {}
        for row, query in enumerate(table.to_pylist()):
            if not (isinstance(query["positive"], list) and isinstance(query["negative"], list)):
                raise DataError(
                    f"task {name}: positive and negative of row {row} are no lists; expected lists of texts"
                )
            if not query["positive"] or not query["negative"]:
                raise DataError(f"task {name}: row {row} of {lang!r} has no positive or no negative; expected both")
            good, bad = (
                [numbers.setdefault(text, f"d{len(numbers)}") for text in query[side]]
                for side in ("positive", "negative")
            )
            relevant[f"q{row}"] = dict.fromkeys(bad, 0) | dict.fromkeys(good, 1)
            ranked[f"q{row}"] = list(dict.fromkeys([*good, *bad]))
        queries = {"id": list(relevant), "text": _texts(name, table, "query")}
        corpus = {"id": list(numbers.values()), "text": list(numbers), "title": [""] * len(numbers)}
        return {
            config.split: {
                "corpus": Dataset.from_dict(corpus),
                "queries": Dataset.from_dict(queries),
                "relevant_docs": relevant,
                "top_ranked": ranked,
            }
        }

    return _by_language(config, rows, dataset)


KINDS: Mapping[str, Kind] = {
    "sts": Kind("STS", "cosine_spearman", AbsTaskSTS, _read_pairs),
    "pair_classification": Kind("PairClassification", "max_ap", AbsTaskPairClassification, _read_pairs),
    "bitext": Kind("BitextMining", "f1", AbsTaskBitextMining, _read_bitext),
    "classification": Kind("Classification", "accuracy", AbsTaskClassification, _read_labelled),
    "clustering": Kind("Clustering", "v_measure", AbsTaskClustering, _read_labelled),
    "retrieval": Kind("Retrieval", "ndcg_at_10", AbsTaskRetrieval, _read_retrieval),
    "reranking": Kind("Reranking", "map_at_1000", AbsTaskRetrieval, _read_reranking),
}


def _split_rows(name: str, config: TaskConfig, path: Path, split: str, columns: list[str]) -> pa.Table:
    """The rows of a split, under mteb's column names, checked."""
    file = path / f"{split}.parquet" if path.is_dir() else path
    table = _table(name, config, file, columns)
    if not path.is_dir() and "split" in table.column_names:
        table = table.filter(pc.equal(table["split"], split))
    if not len(table):
        raise DataError(f"task {name}: {file} has no rows of split {split!r}")
    for column in {"sentence1", "sentence2", "text"} & set(table.column_names):
        _texts(name, table, column)
    return table


def _table(name: str, config: TaskConfig, file: Path, columns: list[str]) -> pa.Table:
    try:
        table = pq.read_table(file)
    except FileNotFoundError as error:
        raise DataError(f"task {name}: {file} is not there") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"task {name}: {file} is no readable Parquet file: {error}") from error
    ours = {theirs: mteb for mteb, theirs in config.columns.items()}
    # A set may have a column of mteb's name beside the one that stands for it.
    table = table.drop(
        [mteb for mteb, theirs in config.columns.items() if mteb in table.column_names and theirs in table.column_names]
    )
    table = table.rename_columns([ours.get(column, column) for column in table.column_names])
    _require_columns(name, file, table, columns)
    for column in columns:
        if table[column].null_count:
            raise DataError(f"task {name}: {file}: column {column!r} has {table[column].null_count} empty values")
    # mteb knows ids as strings alone.
    for place, column in enumerate(table.column_names):
        if column in ID_COLUMNS and pa.types.is_integer(table[column].type):
            table = table.set_column(place, column, table[column].cast(pa.string()))
    return table


def _require_columns(name: str, file: Path, table: pa.Table, columns: list[str]) -> None:
    for column in columns:
        if column not in table.column_names:
            raise DataError(f"task {name}: {file}: no column {column!r}; found {', '.join(table.column_names)}")


def _texts(name: str, table: pa.Table, column: str) -> list[str]:
    texts: list[str] = table[column].to_pylist()
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"task {name}: row {row} of column {column!r} is {text!r}; expected a text")
    return texts


def _languages(config: TaskConfig, table: pa.Table) -> list[str]:
    if "lang" not in table.column_names:
        return ["default"]
    found = sorted(table["lang"].unique().to_pylist())
    if missing := sorted(set(config.languages or []) - set(found)):
        raise DataError(f"languages: no row is in {missing[0]!r}; expected of {found}")
    return [lang for lang in found if config.languages is None or lang in config.languages]


def _of_language(table: pa.Table, lang: str | None) -> pa.Table:
    return (
        table if "lang" not in table.column_names or lang == "default" else table.filter(pc.equal(table["lang"], lang))
    )


def _by_language(config: TaskConfig, table: pa.Table, dataset: Callable[[pa.Table, str], Any]) -> dict[str, Any]:
    return {lang: dataset(_of_language(table, lang).slice(0, config.limit), lang) for lang in _languages(config, table)}


def _varied(name: str, lang: str, column: str, values: list[Any]) -> list[Any]:
    """The values, unless all are the same or one is no number: then nothing can be scored."""
    if len(set(values)) < 2:
        raise DataError(f"task {name}: {column} of {lang!r} is {values[:1]} in every row; expected at least two values")
    if isinstance(values[0], float) and not np.isfinite(values).all():
        raise DataError(f"task {name}: {column} of {lang!r}: row {int(np.argmin(np.isfinite(values)))} is not finite")
    return values


def _numbers(labels: list[Any]) -> dict[Any, int]:
    return {label: number for number, label in enumerate(sorted(set(labels)))}
