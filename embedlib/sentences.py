"""Texts cut into sentences, by the marks that end one in many scripts."""

import re
from collections.abc import Sequence

_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+(?=[^\W\d_a-zà-ÿ]|[\"'“‘«(¿¡])|(?<=[。！？।॥؟])[」』”’）]*\s*")
# One capital, or a title: no sentence ends there.
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[^\W\d_]|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|z\.B|d\.h|bzw|Nr|No|Sr|Sra)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; a rule that knows the marks that end one in many scripts.

    >>> sentences("Dr. Who came. He left! 今天下雨。明天呢？")
    ['Dr. Who came.', 'He left!', '今天下雨。', '明天呢？']
    """
    found, begin = [], 0
    for match in _END.finditer(text):
        end = match.start() + len(match[0].rstrip())
        sentence = text[begin:end].strip()
        if sentence and not _ABBREVIATION.search(sentence):
            found.append(sentence)
            begin = match.end()
    rest = text[begin:].strip()
    return [*found, rest] if rest else found


def split_sentences(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The sentences of all texts, and the number of the text that each is from."""
    found, numbers = [], []
    for number, text in enumerate(texts):
        some = sentences(text) or [text]
        found += some
        numbers += [number] * len(some)
    return found, numbers
