"""Language identification: libraries that bring their models along, by accuracy and speed, on sentences of FLORES.

    python -m benchmarks.langid --flores flores_parallel.parquet [--quick] [--json OUT]

The file has one column a language, named as FLORES names them (deu_Latn), with translations of one sentence a row.
Whole sentences, and their first 25 characters; every library is asked with all of its languages open to it, but
Lingua, which is told the languages. Its speed is that of one thread.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pycld2
from lingua import IsoCode639_1, LanguageDetectorBuilder
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from rich.console import Console
from rich.table import Table
from sklearn.metrics import f1_score

from benchmarks.command import benchmark_parser, write_result
from benchmarks.machine import describe_machine, in_fresh_process
from embedlib.languages import canonical, fasttext_model, identify

COLUMNS = {
    "ar": "arb_Arab",
    "bn": "ben_Beng",
    "de": "deu_Latn",
    "en": "eng_Latn",
    "es": "spa_Latn",
    "fr": "fra_Latn",
    "hi": "hin_Deva",
    "id": "ind_Latn",
    "it": "ita_Latn",
    "ja": "jpn_Jpan",
    "ko": "kor_Hang",
    "pl": "pol_Latn",
    "pt": "por_Latn",
    "ru": "rus_Cyrl",
    "th": "tha_Thai",
    "vi": "vie_Latn",
    "zh": "zho_Hans",
}
SHORT = 25
QUICK_SENTENCES = 50


class Score(NamedTuple):
    """One library."""

    name: str
    macro_f1: float
    short_macro_f1: float
    """On the first 25 characters."""
    texts_per_s: float
    worst: str
    """The language with the lowest F1, and that."""


def main() -> None:
    """Ask every library in turn, print and write."""
    options = parse_arguments(sys.argv[1:])
    texts, langs = read_flores(options.flores, QUICK_SENTENCES if options.quick else None)
    num_runs = options.runs or (1 if options.quick else 3)
    scores = [score(name, ask, texts, langs, num_runs) for name, ask in contestants().items()]
    Console(width=110).print(table_of(scores))
    best = {each.name: each for each in scores}["embedlib"]
    result = {
        "machine": in_fresh_process(describe_machine),
        "runs": [each._asdict() for each in scores],
        "ratios": {each.name: best.texts_per_s / each.texts_per_s for each in scores},
        "macro_f1": best.macro_f1,
    }
    write_result(options.json, result)


def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """The command line."""
    parser = benchmark_parser("Language identification.", "few sentences and one run")
    parser.add_argument("--flores", type=Path, required=True, metavar="FILE", help="Parquet with a column a language")
    return parser.parse_args(arguments)


def read_flores(path: Path, num_sentences: int | None) -> tuple[list[str], list[str]]:
    """Sentences and their languages."""
    table = pq.read_table(path, columns=list(COLUMNS.values())).slice(0, num_sentences)
    texts, langs = [], []
    for lang, column in COLUMNS.items():
        texts += [text.replace("\n", " ") for text in table[column].to_pylist()]
        langs += [lang] * len(table)
    return texts, langs


def contestants() -> dict[str, Callable[[Sequence[str]], list[str]]]:
    """The libraries, ready to be asked."""
    langid = LanguageIdentifier.from_model_file(MODEL_FILE)
    lingua = LanguageDetectorBuilder.from_iso_codes_639_1(*[getattr(IsoCode639_1, lang.upper()) for lang in COLUMNS])
    return {
        "embedlib": partial(identify, expected=list(COLUMNS)),
        "fastText lid.176.ftz": partial(each, ask_fasttext),
        "CLD2": partial(each, ask_cld2),
        "py3langid": partial(each, lambda text: str(langid.classify(text)[0])),
        "Lingua": partial(each, partial(ask_lingua, lingua.build())),
        "Lingua, low accuracy": partial(each, partial(ask_lingua, lingua.with_low_accuracy_mode().build())),
    }


def each(ask: Callable[[str], str], texts: Sequence[str]) -> list[str]:
    """The answers for all texts."""
    return [canonical(ask(text)) for text in texts]


def ask_fasttext(text: str) -> str:
    """fastText's small model alone."""
    return str(fasttext_model().predict(text)[0][0]).removeprefix("__label__")


def ask_cld2(text: str) -> str:
    """CLD2 alone, sure or not."""
    return str(pycld2.detect(text)[2][0][1])


def ask_lingua(detector: Any, text: str) -> str:
    """Lingua, which knows the languages that there are."""
    found = detector.detect_language_of(text)
    return found.iso_code_639_1.name.lower() if found else "und"


def score(
    name: str, ask: Callable[[Sequence[str]], list[str]], texts: list[str], langs: list[str], num_runs: int
) -> Score:
    """How often a library is right, and how fast."""
    ask(texts[:: len(texts) // 50])  # models loaded
    seconds = []
    for _ in range(num_runs):
        start = time.perf_counter()
        found = ask(texts)
        seconds.append(time.perf_counter() - start)
    by_language = f1_score(langs, found, labels=list(COLUMNS), average=None, zero_division=0.0)
    short = f1_score(
        langs, ask([text[:SHORT] for text in texts]), labels=list(COLUMNS), average="macro", zero_division=0.0
    )
    lowest = int(np.argmin(by_language))
    worst = f"{list(COLUMNS)[lowest]} {by_language[lowest]:.3f}"
    return Score(name, float(by_language.mean()), float(short), len(texts) / float(np.median(seconds)), worst)


def table_of(scores: Sequence[Score]) -> Table:
    """What to print."""
    table = Table("library", title=f"{len(COLUMNS)} languages")
    for column in ("macro-F1", f"macro-F1, {SHORT} characters", "texts/s", "worst"):
        table.add_column(column, justify="right")
    for each_score in scores:
        cells = [f"{each_score.macro_f1:.4f}", f"{each_score.short_macro_f1:.4f}", f"{each_score.texts_per_s:,.0f}"]
        table.add_row(each_score.name, *cells, each_score.worst)
    return table


if __name__ == "__main__":
    main()
