"""Texts made clean, and those that are no good sentences found, a batch of texts at a time.

`normalise` never drops a text, `reasons` never changes one.
"""

from collections.abc import Callable
from unicodedata import is_normalized, normalize

import ftfy
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from embedlib.characters import (
    DIGIT,
    FIRST_SCRIPT,
    KIND_OF_SCRIPT,
    NUM_KINDS,
    OTHER_LETTER,
    SCRIPT_NAMES,
    SIGN,
    Characters,
)
from embedlib.config import Config

Marks = npt.NDArray[np.bool_]

# RE2's own notation. Marks of direction, joints of words, soft hyphens; not the joiners that Indic scripts need.
_INVISIBLE = r"\x{AD}\x{200B}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2060}-\x{2064}\x{FEFF}"
_UNTIDY = rf"[\x00-\x1F\x7F-\x9F{_INVISIBLE}]|[\s\pZ]{{2}}|^[\s\pZ]|[\s\pZ]$|[\x{{A0}}\x{{2028}}\x{{2029}}\x{{3000}}]"
# UTF-8 read as windows-1252 or 1251: the letters of a first byte before those of a following one.
_MISREAD = (
    "[\u00c2-\u00f4][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
    "|[РС][ЂЃ‚ѓ„…†‡€‰Љ‹ЊЌЋЏђ‘’“”•–—™љ›њќћџ\u00a0ЎўЈ¤Ґ¦§Ё©Є«¬\u00ad®Ї°±Ііґµ¶·ё№є»јЅѕї]"
)
_PLACEHOLDER = r"%\([^()]*\)[a-z]|%(\d+\$)?[sd]|%\d|\{\{[^{}]*\}\}|\$?\{[\w.:]*\}|\$\w+\$"
_MASKS = {
    "<url>": r"(?i)\b(?:https?://|www\.)[^\s<>\"]+",
    "<email>": r"(?i)\b[a-z0-9._%+\-]+@[a-z0-9\-]+(?:\.[a-z0-9\-]+)+\b",
    "<iban>": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b",
    "<card>": r"\b(?:\d{4}[ \-]?){3}\d{4}\b",
    "<ip>": r"\b(?:\d{1,3}\.){3}\d{1,3}\b",
    "<phone>": r"(?:\+\d{1,3}[ \-./]?|\b0|\(0?)\d{1,4}\)?(?:[ \-./]?\d{2,4}){2,4}\b",
}
"""What stands for an address or number that is somebody's, and the expression that finds it, in this order."""
# What an expression above cannot do without; most texts have none of it, and are looked at once.
_MASKABLE = r"@|://|(?i:www\.)|\d[\d .\-/()]{5}|[A-Z]{2}\d{2}"

BOILERPLATE = (
    r"copyright|©|\(c\) \d|all rights reserved|lorem ipsum|translator-credits|cookie policy|privacy policy"
    r"|enable javascript|click here|http error \d|page not found|terms of (?:use|service)"
)
"""What pages and programs say to everybody."""

REASONS = (
    *("", "empty", "too short", "too long", "no letters", "signs", "repetition", "placeholders", "boilerplate"),
    "wrong script",
)
"""Why a text is not to stay; the first is none."""

_LATIN_CODES = (
    "af br bs ca ceb co cs cy da de en eo es et eu fi fil fo fr fy ga gd gl gn ha haw hr ht hu id ig is it jv la lb lt"
    " lv mg mi ms mt nl no oc pl pt qu rm ro rw sk sl sm sn so sq st su sv sw tl tn tr vi wo xh yo zu"
)
LATIN = frozenset(_LATIN_CODES.split(" "))
"""Languages of Latin letters; of those that are neither here nor below, letters of any script are taken."""
SCRIPTS = {
    **dict.fromkeys(("ru", "uk", "bg", "mk", "be", "kk", "ky", "mn", "tg"), ("Cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ckb", "ug"), ("Arabic",)),
    **dict.fromkeys(("hi", "mr", "ne", "sa"), ("Devanagari",)),
    **dict.fromkeys(("bn", "as"), ("Bengali",)),
    **dict.fromkeys(("he", "yi"), ("Hebrew",)),
    "ko": ("Hangul", "Han"),
    "ja": ("Hiragana", "Katakana", "Han"),
    "zh": ("Han",),
    "sr": ("Cyrillic", "Latin"),
    "el": ("Greek",),
    "th": ("Thai",),
    "gu": ("Gujarati",),
    "pa": ("Gurmukhi",),
    "ta": ("Tamil",),
    "te": ("Telugu",),
    "kn": ("Kannada",),
    "ml": ("Malayalam",),
    "si": ("Sinhala",),
    "lo": ("Lao",),
    "km": ("Khmer",),
    "my": ("Myanmar",),
    "am": ("Ethiopic",),
    "ka": ("Georgian",),
    "hy": ("Armenian",),
}
"""Scripts of the languages that are not written in Latin letters."""
# Latin letters that one of these outweighs: names stay Latin, and a syllable says more than a letter.
WEIGHTS = {"ko": 2, "ja": 3, "zh": 3}
# A share of these lengths is enough for languages that write a word in a character or two.
DENSE = frozenset({"ko", "ja", "zh", "th"})


class QualityConfig(Config):
    """What a text must be like to stay."""

    min_characters: int = Field(default=10, ge=0)
    """Shorter texts go; half of it is enough in Chinese, Japanese, Korean and Thai."""
    max_characters: int = Field(default=2000, ge=1)
    """Longer texts go."""
    max_signs: float = Field(default=0.4, ge=0, le=1)
    """Largest share of digits, punctuation and symbols."""
    max_repeats: int = Field(default=8, ge=2)
    """A text with a character more often than this in a row goes."""
    min_distinct_words: float = Field(default=0.3, ge=0, le=1)
    """Least share of distinct words, in texts of ten words and more."""
    max_placeholders: int = Field(default=2, ge=0)
    """A text with more of what a program fills in (%s, {name}) goes."""
    check_script: bool = True
    """Letters of the language's own script must outweigh the others."""
    boilerplate: str = BOILERPLATE
    """A text in which this expression (RE2, without regard to case) is found goes; empty: none does."""

    @field_validator("boilerplate")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            pc.match_substring_regex(pa.array([""]), _boilerplate(value))
        except pa.ArrowInvalid as error:
            raise ValueError(f"no expression that RE2 understands: {error}") from error
        return value


def normalise(texts: pa.Array, repair: bool = True) -> pa.Array:
    """`texts` in NFC and on one line each, without control characters; misread encodings undone where `repair`.

    >>> normalise(pa.array(["  cafe\\u0301\\tau  lait ", "schÃ¶n und gut"])).to_pylist()
    ['café au lait', 'schön und gut']
    """
    if repair:
        texts = _changed(texts, np.asarray(pc.match_substring_regex(texts, _MISREAD)), _repaired)
    texts = _changed(texts, ~np.asarray(pc.string_is_ascii(texts)), _composed)
    untidy = np.asarray(pc.match_substring_regex(texts, _UNTIDY))
    return _changed(texts, untidy, _tidy)


def _changed(texts: pa.Array, chosen: Marks, change: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """`texts` with the chosen ones changed."""
    if not chosen.any():
        return texts
    changed = change(texts.filter(pa.array(chosen)))
    return pc.replace_with_mask(texts, pa.array(chosen), changed)


def _repaired(texts: pa.Array) -> pa.Array:
    return pa.array([ftfy.fix_encoding(text) for text in texts.to_pylist()], texts.type)


def _composed(texts: pa.Array) -> pa.Array:
    composed = [text if is_normalized("NFC", text) else normalize("NFC", text) for text in texts.to_pylist()]
    return pa.array(composed, texts.type)


def _tidy(texts: pa.Array) -> pa.Array:
    visible = pc.replace_substring_regex(texts, f"[{_INVISIBLE}]", "")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(visible, r"[\x00-\x1F\x7F-\x9F\s\pZ]+", " "))


def mask_personal(texts: pa.Array) -> pa.Array:
    """`texts` with what may be somebody's address or number masked.

    >>> mask_personal(pa.array(["Write to jo.doe@example.org or call +49 30 1234567."])).to_pylist()
    ['Write to <email> or call <phone>.']
    """
    return _changed(texts, np.asarray(pc.match_substring_regex(texts, _MASKABLE)), _masked)


def _masked(texts: pa.Array) -> pa.Array:
    for mask, pattern in _MASKS.items():
        texts = pc.replace_substring_regex(texts, pattern, mask)
    return texts


def reasons(texts: pa.Array, langs: pa.Array, config: QualityConfig) -> npt.NDArray[np.int8]:
    """Why each of `texts` is not to stay, by its place in REASONS, (texts,). The first that holds is the one told."""
    characters = Characters.of(texts)
    lengths = characters.lengths
    letters = characters.how_many(OTHER_LETTER, *range(FIRST_SCRIPT, FIRST_SCRIPT + len(SCRIPT_NAMES)))
    dense = np.asarray(pc.is_in(langs, pa.array(sorted(DENSE))))
    found = np.zeros(len(texts), np.int8)

    def mark(reason: str, holds: Marks) -> None:
        found[holds & (found == 0)] = REASONS.index(reason)

    mark("empty", lengths == 0)
    mark("too short", lengths < np.where(dense, config.min_characters / 2, config.min_characters))
    mark("too long", lengths > config.max_characters)
    mark("no letters", letters == 0)
    mark("signs", characters.how_many(DIGIT, SIGN) > config.max_signs * lengths)
    mark("repetition", characters.repeats(config.max_repeats + 1) | _repeats_words(texts, config.min_distinct_words))
    placeholders = np.asarray(pc.count_substring_regex(texts, _PLACEHOLDER))
    mark("placeholders", placeholders > config.max_placeholders)
    if config.boilerplate:
        mark("boilerplate", np.asarray(pc.match_substring_regex(texts, _boilerplate(config.boilerplate))))
    if config.check_script:
        mark("wrong script", ~_scripts_match(characters, letters, langs))
    return found


def _boilerplate(pattern: str) -> str:
    return f"(?i:{pattern})"


def _repeats_words(texts: pa.Array, min_distinct: float) -> Marks:
    """Which texts of ten words and more say the same few again and again."""
    long = np.flatnonzero(np.asarray(pc.count_substring(texts, " ")) >= 9)
    found = np.zeros(len(texts), np.bool_)
    words = [text.split() for text in texts.take(pa.array(long)).to_pylist()]
    found[long] = [len({*some}) < min_distinct * len(some) for some in words]
    return found


def _scripts_match(characters: Characters, letters: npt.NDArray[np.int64], langs: pa.Array) -> Marks:
    """Whether letters of each text's language are the larger part, by weight; always for an unknown language."""
    coded = langs.dictionary_encode()
    names = coded.dictionary.to_pylist()
    numbers = np.asarray(coded.indices).astype(np.uint8 if len(names) < 256 else np.uint32)
    is_native = np.zeros((len(names), NUM_KINDS), np.bool_)
    for number, lang in enumerate(names):
        is_native[number, [KIND_OF_SCRIPT[script] for script in SCRIPTS.get(lang, ("Latin",))]] = True
    weights = np.array([WEIGHTS.get(lang, 1) for lang in names])[numbers]
    native = characters.sums(is_native[np.repeat(numbers, characters.lengths), characters.kinds])
    unknown = np.array([lang not in SCRIPTS and lang not in LATIN for lang in names], np.bool_)[numbers]
    matches: Marks = unknown | ((native > 0) & (native * weights >= letters - native))
    return matches
