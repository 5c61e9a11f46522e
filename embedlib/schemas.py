"""The Parquet schemas of embedlib: column names, types and units.

Every row of a corpus has an `id`, unique within its file and dense from 0 unless stated otherwise. Texts are stored
without prompts: the prefix belongs to the model and is named in the manifest of what was made with it.
"""

from typing import Any

import numpy.typing as npt
import pyarrow as pa

UNKNOWN_LANGUAGE = "und"

CORPUS = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),  # NFC, without prompt
        pa.field("lang", pa.string(), nullable=False),  # ISO 639-1, "und" where unknown
        pa.field(
            "group", pa.int64(), nullable=False
        ),  # rows that translate each other share it; -1: no translation known
    ]
)

QUARANTINE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # the file the row came from
        pa.field("row", pa.int64(), nullable=False),  # its position in that file, from 0
        pa.field("reason", pa.string(), nullable=False),
        pa.field("excerpt", pa.string(), nullable=False),  # at most 200 characters
    ]
)


_NUM_TOKENS = pa.field("num_tokens", pa.int32())  # null where no tokenizer was given

# What jobs/corpus.py writes. CORPUS_SHARD has the columns of CORPUS, so that every reader of one reads the other.
CORPUS_SHARD = pa.schema([*CORPUS, pa.field("source", pa.string(), nullable=False), _NUM_TOKENS])

PAIRS = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("left", pa.string(), nullable=False),
        pa.field("right", pa.string(), nullable=False),  # a translation of `left`
        pa.field("left_lang", pa.string(), nullable=False),
        pa.field("right_lang", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        _NUM_TOKENS,  # of both sides together
    ]
)

QUERY_PASSAGE = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("passage", pa.string(), nullable=False),  # answers the query
        pa.field("lang", pa.string(), nullable=False),  # of the passage
        pa.field("source", pa.string(), nullable=False),
        _NUM_TOKENS,  # of both together
    ]
)


def negatives_schema(id_type: pa.DataType) -> pa.Schema:
    """NEGATIVES: a query a row, with its positives and its hard negatives; `id_type` is that of the corpus' ids."""
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),  # of the query, from 0 in the order of first pairs
            pa.field("query", pa.large_string(), nullable=False),
            pa.field("positives", pa.list_(pa.large_string()), nullable=False),
            pa.field("positive_scores", pa.list_(pa.float32()), nullable=False),  # inner products
            pa.field("negatives", pa.list_(pa.large_string()), nullable=False),  # best first
            pa.field("negative_scores", pa.list_(pa.float32()), nullable=False),
            pa.field("negative_ids", pa.list_(id_type), nullable=False),  # null: a positive of another query
            pa.field("is_random", pa.list_(pa.bool_()), nullable=False),  # drawn, to fill a query left short
        ]
    )


def embeddings_schema(embedding_dim: int, element: pa.DataType | None = None) -> pa.Schema:
    """EMBEDDINGS: `id` and one vector of `embedding_dim` elements a row, float16 unless stated otherwise."""
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("vector", pa.list_(element or pa.float16(), embedding_dim), nullable=False),
        ]
    )


def vector_column(vectors: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """The `vector` column of EMBEDDINGS that holds `vectors` (rows, dim)."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def vectors_of(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """The vectors (rows, dim) of a `vector` column."""
    flat: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(len(column), column.type.list_size)
