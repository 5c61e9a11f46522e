"""What kinds of characters texts are made of, counted for all texts of a batch at once."""

import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

SCRIPT_NAMES = (
    *("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Gujarati", "Gurmukhi", "Tamil"),
    *("Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Khmer", "Myanmar", "Ethiopic", "Georgian"),
    *("Armenian", "Hangul", "Hiragana", "Katakana", "Han"),
)
"""Unicode's names of the scripts that are told apart."""

OTHER, DIGIT, SIGN, SPACE, OTHER_LETTER = range(5)
FIRST_SCRIPT = 5
KIND_OF_SCRIPT = {name: FIRST_SCRIPT + number for number, name in enumerate(SCRIPT_NAMES)}
NUM_KINDS = FIRST_SCRIPT + len(SCRIPT_NAMES)
BASIC_PLANE = 0x10000
# Beyond the basic plane lie rare Han characters, and signs: emoji, mathematical letters, musical notes.
FIRST_RARE_HAN, LAST_RARE_HAN = 0x20000, 0x3FFFF


class Characters(NamedTuple):
    """The characters of a batch of texts, end to end."""

    codes: npt.NDArray[np.uint32]
    """Code points, (characters,)."""
    kinds: npt.NDArray[np.uint8]
    """What kind each is, (characters,)."""
    lengths: npt.NDArray[np.int64]
    """Characters of each text, (texts,)."""

    @classmethod
    def of(cls, texts: pa.Array) -> "Characters":
        """Those of texts, none of which is null."""
        lengths = np.asarray(pc.utf8_length(texts)).astype(np.int64)
        codes = np.frombuffer("".join(texts.to_pylist()).encode("utf-32-le"), np.uint32)
        kinds = kinds_of_characters()[np.minimum(codes, BASIC_PLANE)]
        kinds[(codes >= FIRST_RARE_HAN) & (codes <= LAST_RARE_HAN)] = KIND_OF_SCRIPT["Han"]
        return cls(codes, kinds, lengths)

    def how_many(self, *kinds: int) -> npt.NDArray[np.int64]:
        """How many characters of these kinds each text has, (texts,)."""
        wanted = np.zeros(NUM_KINDS, np.bool_)
        wanted[list(kinds)] = True
        return self.sums(wanted[self.kinds])

    def sums(self, marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """How many of each text's characters are marked, (texts,)."""
        counts = np.zeros(len(self.lengths), np.int64)
        filled = self.lengths > 0
        if filled.any():
            starts = (np.cumsum(self.lengths) - self.lengths)[filled]
            counts[filled] = np.add.reduceat(marked, starts, dtype=np.int32)
        return counts

    def repeats(self, length: int) -> npt.NDArray[np.bool_]:
        """Which texts have a character at least `length` (2 or more) times in a row, (texts,)."""
        found = np.zeros(len(self.lengths), np.bool_)
        ends = np.cumsum(self.lengths)
        same = self.codes[1:] == self.codes[:-1]
        between = ends[:-1]
        same[between[(between > 0) & (between < len(self.codes))] - 1] = False
        window = 1
        while window < length - 1:
            step = min(window, length - 1 - window)
            same = same[:-step] & same[step:]
            window += step
        found[np.searchsorted(ends, np.flatnonzero(same), side="right")] = True
        return found


@cache
def kinds_of_characters() -> npt.NDArray[np.uint8]:
    """The kind of every character of the basic plane by its code point; the last stands for all beyond."""
    kinds = [_kind_of(chr(code)) for code in range(BASIC_PLANE)]
    return np.array([*kinds, SIGN], np.uint8)


def _kind_of(character: str) -> int:
    category = unicodedata.category(character)
    if category[0] in "LM":  # with the marks that are vowels of a script
        script = unicodedata.name(character, "").partition(" ")[0]
        return KIND_OF_SCRIPT.get("Han" if script in ("CJK", "IDEOGRAPHIC") else script.capitalize(), OTHER_LETTER)
    return {"N": DIGIT, "P": SIGN, "S": SIGN, "Z": SPACE}.get(category[0], SPACE if character.isspace() else OTHER)
