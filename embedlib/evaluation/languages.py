"""Which languages a subset of an evaluation set is of, as mteb writes them: `deu-Latn`."""

import re
from functools import cache

from langcodes import Language
from langcodes.tag_parser import LanguageTagError

PARTS = re.compile(r"[a-z]{2,3}(?:[_-][A-Z][a-z]{3})?")


def language_codes(subset: str) -> list[str]:
    """The languages of `de`, `deu_Latn`, `kor-eng` or `arb_Arab-eng_Latn`; `und-Zyyy` where the name says nothing."""
    codes = [code for part in _parts(subset) if (code := _code(part))]
    return codes or ["und-Zyyy"]


def language_of(subset: str) -> str:
    """The language, ISO 639-1 where it has such a code, that a row of results stands for: the one besides English."""
    tags = [Language.get(code).prefer_macrolanguage().language or "und" for code in language_codes(subset)]
    others = [tag for tag in tags if tag != "en"]
    return (others or tags)[0]


def _parts(subset: str) -> list[str]:
    parts = re.split(r"-(?=[a-z])", subset)
    return parts if all(PARTS.fullmatch(part) for part in parts) else []


@cache
def _code(tag: str) -> str | None:
    try:
        language = Language.get(tag.replace("_", "-"))
        if not language.is_valid():
            return None
        return f"{language.to_alpha3()}-{language.maximize().script or 'Zyyy'}"
    except (LanguageTagError, LookupError):
        return None
