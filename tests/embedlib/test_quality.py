"""Texts made clean, and reasons to leave some out."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from embedlib.quality import REASONS, QualityConfig, mask_personal, normalise, reasons


def reason(text: str, lang: str = "en", **values: object) -> str:
    config = QualityConfig.model_validate(values)
    return REASONS[reasons(pa.array([text], pa.large_string()), pa.array([lang]), config)[0]]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  two \t words\r\n", "two words"),
        ("cafe\u0301", "café"),
        ("zero\u200bwidth \u202eturned", "zerowidth turned"),
        ("schÃ¶n und gut", "schön und gut"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
        ("a\u3000b\xa0c", "a b c"),
        ("नमस्\u200dते", "नमस्\u200dते"),
        ("À la carte Ã", "À la carte Ã"),
        ("", ""),
    ],
)
def test_normalise(text: str, clean: str) -> None:
    assert normalise(pa.array([text, "plain"], pa.large_string())).to_pylist() == [clean, "plain"]


def test_misread_text_stays_where_no_repair_is_asked_for() -> None:
    assert normalise(pa.array(["schÃ¶n"], pa.large_string()), repair=False).to_pylist() == ["schÃ¶n"]


@given(st.lists(st.text(), max_size=5))
def test_normalising_twice_changes_nothing_more(texts: list[str]) -> None:
    once = normalise(pa.array(texts, pa.large_string()), repair=False)
    assert normalise(once, repair=False).to_pylist() == once.to_pylist()


@pytest.mark.parametrize(
    ("text", "lang", "expected"),
    [
        ("", "en", "empty"),
        ("Save it", "en", "too short"),
        ("今天会下雨", "zh", ""),
        ("今天下", "zh", "too short"),
        ("word " * 500, "en", "too long"),
        ("1234 5678 90 12", "en", "no letters"),
        ("a = (b + c) * [d]; // 42", "en", "signs"),
        ("Noooooooooooo, not again", "en", "repetition"),
        ("buy now buy now buy now buy now buy now buy now", "en", "repetition"),
        ("Copy %s from %(here)s to {there} now", "en", "placeholders"),
        ("Copyright 2020 by the authors of it", "en", "boilerplate"),
        ("Это предложение по-русски", "de", "wrong script"),
        ("Das ist Deutsch und sonst nichts", "ru", "wrong script"),
        ("ଏହା ଏକ ଭଲ ବାକ୍ୟ ଅଟେ", "or", ""),
        ("Бу татар телендә җөмлә", "tt", ""),
        ("Das ist Deutsch und sonst nichts", "und", ""),
        ("GitHub 계정을 연결하세요", "ko", ""),
        ("The symbol α means an angle", "en", ""),
        ("A good sentence of some words.", "en", ""),
    ],
)
def test_reasons(text: str, lang: str, expected: str) -> None:
    assert reason(text, lang) == expected


def test_every_rule_can_be_turned_off() -> None:
    lax = {
        "min_characters": 0,
        "max_signs": 1.0,
        "max_repeats": 1000,
        "min_distinct_words": 0.0,
        "max_placeholders": 99,
        "check_script": False,
        "boilerplate": "",
    }
    texts = ["Copyright %s %s %s !!!!!!!!!!!!! Да", "x", "buy now " * 20]
    assert [reason(text, "en", **lax) for text in texts] == ["", "", ""]
    with pytest.raises(ValidationError, match="no expression that RE2 understands"):
        QualityConfig(boilerplate="(")


@given(st.lists(st.tuples(st.text(max_size=30), st.sampled_from(["en", "zh", "ru", "und"])), max_size=8))
def test_a_text_is_judged_by_itself(rows: list[tuple[str, str]]) -> None:
    texts, langs = [text for text, _ in rows], [lang for _, lang in rows]
    together = reasons(pa.array(texts, pa.large_string()), pa.array(langs, pa.string()), QualityConfig())
    assert [REASONS[code] for code in together] == [reason(text, lang) for text, lang in rows]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail me: a.b-c@mail.example.org!", "mail me: <email>!"),
        ("see https://example.org/a?b=c now", "see <url> now"),
        ("from 192.168.0.1 on", "from <ip> on"),
        ("pay DE89 3704 0044 0532 0130 00 today", "pay <iban> today"),
        ("card 4111 1111 1111 1111 is", "card <card> is"),
        ("call (030) 123 45 67 or +1 555-123-4567", "call <phone> or <phone>"),
        ("in 2024 we sold 1,000 of 25.5 kg", "in 2024 we sold 1,000 of 25.5 kg"),
    ],
)
def test_mask_personal(text: str, masked: str) -> None:
    assert mask_personal(pa.array([text], pa.large_string())).to_pylist() == [masked]
