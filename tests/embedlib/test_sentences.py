"""Texts cut into sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedlib.sentences import sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("One only", ["One only"]),
        ('He said "Go." She went! Why?', ['He said "Go."', "She went!", "Why?"]),
        ("Version 2.5 is out. It is good.", ["Version 2.5 is out.", "It is good."]),
        ("Mr. Smith and J. Doe met. They talked.", ["Mr. Smith and J. Doe met.", "They talked."]),
        ("यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
        ("これは文です。「はい。」と言った。", ["これは文です。", "「はい。」", "と言った。"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet="ab .!?。A\n", max_size=60))
def test_sentences_lose_nothing_but_spaces(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
