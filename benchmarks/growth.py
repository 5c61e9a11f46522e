"""Pieces for a language that the teacher splits badly: tokens a word, and what its rows are made of, before training.

    python -m benchmarks.growth --corpus sentences.parquet --flores flores_parallel.parquet [--quick] [--json OUT]

Vocabularies of one size for Bengali and English, from `text` and `lang` of the corpus, without new pieces and with.
FLORES' Bengali sentences are held out: the cosines are of the teacher's vectors of them to those that its own layers
give on the student's pieces.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks.command import benchmark_parser, write_result
from benchmarks.machine import describe_machine, in_fresh_process
from embedlib.compress.growth import grow_tokenizer
from embedlib.compress.tokenizer import prune_tokenizer
from embedlib.compress.vocab import KeptVocabulary, VocabularyConfig, choose_pieces
from embedlib.compression import agreement, new_rows, whole_embedding
from embedlib.encoder import Encoder, with_prompts
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory

LANG, COLUMN, OTHER = "bn", "ben_Beng", "en"
SIZE, NEW_PIECES, NUM_TEXTS, NUM_HELD = 8000, 4000, 10_000, 200
QUICK_TEXTS, QUICK_HELD = 2000, 10
PROMPTS = ("query: ", "passage: ")


class Grown(NamedTuple):
    """A vocabulary, and how the teacher's layers do with rows of one making."""

    name: str
    new_pieces: int
    tokens_per_word: float
    """On held-out sentences of the language."""
    own_tokens: float
    """Relative to the teacher's, minus one, on the texts it was chosen for."""
    other_tokens: float
    """The same for the other language."""
    cosine: float
    """To the teacher's vectors of held-out sentences."""


def main() -> None:
    """Choose both vocabularies, try the rows, print and write."""
    options = parse_arguments(sys.argv[1:])
    teacher = Encoder.load(pretrained_directory(EMBEDDED_TEACHER))
    num_texts, num_held = (QUICK_TEXTS, QUICK_HELD) if options.quick else (NUM_TEXTS, NUM_HELD)
    texts = {lang: read_language(options.corpus, lang, num_texts) for lang in (LANG, OTHER)}
    held = Random(0).sample(pq.read_table(options.flores, columns=[COLUMN])[COLUMN].to_pylist(), num_held)
    config = VocabularyConfig(size=SIZE, new_pieces={LANG: NEW_PIECES})
    grown = grow_tokenizer(teacher.tokenizer, texts, config.new_pieces)
    found = []
    for name, tokenizer in (("none", teacher.tokenizer), ("new", grown)):
        vocabulary = choose_pieces(teacher.tokenizer, texts, config, tokenizer)
        found += tried(name, teacher, prune_tokenizer(tokenizer, vocabulary.ids), vocabulary, held)
    Console(width=110).print(table_of(found, tokens_per_word(teacher.tokenizer, held)))
    result = {
        "machine": in_fresh_process(describe_machine),
        "runs": [each._asdict() for each in found],
        "ratios": {"tokens_grown_vs_not": found[-1].tokens_per_word / found[0].tokens_per_word},
    }
    write_result(options.json, result)


def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = benchmark_parser("Pieces for a language that the teacher splits badly.", "few texts")
    parser.add_argument("--flores", type=Path, required=True, metavar="FILE", help="Parquet with a column a language")
    return parser.parse_args(arguments)


def read_language(corpus: Path, lang: str, num_texts: int) -> list[str]:
    """At most `num_texts` texts in `lang`, by chance."""
    texts = pq.read_table(corpus, columns=["text"], filters=[("lang", "=", lang)])["text"].to_pylist()
    return Random(0).sample(texts, min(len(texts), num_texts))


def tokens_per_word(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Pieces a word."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings) / sum(len(text.split()) for text in texts)


def tried(
    name: str, teacher: Encoder, tokenizer: Tokenizer, vocabulary: KeptVocabulary, held: Sequence[str]
) -> list[Grown]:
    """One vocabulary with its new rows, if any, made in every way."""
    candidates = new_rows(teacher, tokenizer, vocabulary, PROMPTS[0]) if vocabulary.num_new else {"": torch.empty(0)}
    tables = {how: whole_embedding(teacher, vocabulary, rows, "similar") for how, rows in candidates.items()}
    cosines = agreement(teacher, tokenizer, tables, with_prompts(held, PROMPTS))
    growth = vocabulary.growth
    rate = tokens_per_word(tokenizer, held)
    return [
        Grown(f"{name} {how}".strip(), vocabulary.num_new, rate, growth[LANG], growth[OTHER], cosine)
        for how, cosine in cosines.items()
    ]


def table_of(found: Sequence[Grown], teacher_rate: float) -> Table:
    """What to print."""
    table = Table("", title=f"{SIZE:,} pieces for {LANG} and {OTHER}; the teacher has {teacher_rate:.3f} tokens a word")
    for column in ("new pieces", "tokens a word, held out", f"growth {LANG}", f"growth {OTHER}", "cosine"):
        table.add_column(column, justify="right")
    for each in found:
        cells = [f"{each.tokens_per_word:.3f}", f"{each.own_tokens:+.1%}", f"{each.other_tokens:+.1%}"]
        table.add_row(each.name, f"{each.new_pieces:,}", *cells, f"{each.cosine:.4f}")
    return table


if __name__ == "__main__":
    main()
