"""Counts of characters against a slow reading of the same texts."""

import re
import unicodedata

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from embedlib.characters import DIGIT, KIND_OF_SCRIPT, OTHER_LETTER, SIGN, Characters

TEXTS = st.lists(st.text(alphabet=st.sampled_from("aab  é1!ñбг猫かカ하ก\U00020000😀্")), max_size=20)
SCRIPTS = {"Latin": "aabéñ", "Cyrillic": "бг", "Han": "猫\U00020000", "Hiragana": "か", "Hangul": "하", "Thai": "ก"}


@given(TEXTS)
def test_kinds_are_counted_text_by_text(texts: list[str]) -> None:
    characters = Characters.of(pa.array(texts, pa.large_string()))
    assert characters.lengths.tolist() == [len(text) for text in texts]
    for script, letters in SCRIPTS.items():
        expected = [sum(letter in letters for letter in text) for text in texts]
        assert characters.how_many(KIND_OF_SCRIPT[script]).tolist() == expected
    signs = [sum(unicodedata.category(letter)[0] in "NPS" for letter in text) for text in texts]
    assert characters.how_many(DIGIT, SIGN).tolist() == signs
    assert characters.how_many(OTHER_LETTER).sum() == 0


@given(TEXTS, st.integers(2, 6))
def test_repeats_are_those_of_one_text(texts: list[str], length: int) -> None:
    found = Characters.of(pa.array(texts, pa.large_string())).repeats(length)
    pattern = re.compile(rf"(.)\1{{{length - 1}}}", re.DOTALL)
    assert found.tolist() == [bool(pattern.search(text)) for text in texts]


def test_a_repeat_ends_with_its_text() -> None:
    texts = pa.array(["baaa", "aaab", "", "aaaa"], pa.large_string())
    assert Characters.of(texts).repeats(4).tolist() == [False, False, False, True]
    assert Characters.of(pa.array([], pa.large_string())).repeats(3).tolist() == []
    assert np.array_equal(Characters.of(texts).how_many(KIND_OF_SCRIPT["Latin"]), [4, 4, 0, 4])
