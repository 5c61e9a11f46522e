"""Identification of a sentence's language."""

import pytest

from embedlib.languages import canonical, identify

SENTENCES = {
    "ar": "القطار إلى الساحل يغادر في السابعة صباحا.",
    "bn": "আজ বাজারে মাছের দাম অনেক বেশি।",
    "de": "Die Mannschaft verlor das Spiel in der letzten Minute.",
    "en": "The train to the coast leaves at seven in the morning.",
    "es": "El médico me recomendó caminar media hora cada día.",
    "fr": "Le musée est fermé le mardi et les jours fériés.",
    "hi": "आज शाम को बारिश होने की संभावना है।",
    "id": "Berapa harga tiket kereta ke Bandung pada hari Minggu?",
    "it": "La ricetta di mia nonna richiede tre uova e dello zucchero.",
    "ja": "明日の朝は七時に駅で会いましょう。",
    "ko": "내일은 도서관이 일찍 문을 닫습니다.",
    "pl": "Zeszłej jesieni zbieraliśmy grzyby w lesie.",
    "pt": "O café da manhã é servido até as dez horas.",
    "ru": "Мой брат учится играть на скрипке.",
    "th": "พรุ่งนี้ร้านหนังสือจะปิดเร็วกว่าปกติ",
    "vi": "Cửa hàng sách đóng cửa lúc chín giờ tối.",
    "zh": "科学家发现了一种新的深海鱼。",
}


def test_one_sentence_of_each_language() -> None:
    assert identify(SENTENCES.values(), list(SENTENCES)) == list(SENTENCES)


@pytest.mark.parametrize("text", ["", "12345 + 67", "!!!", " ", "\ufffe\uffff"])
def test_what_has_no_letters_has_no_language(text: str) -> None:
    assert identify([text]) == ["und"]


def test_lines_and_odd_characters_do_no_harm() -> None:
    assert identify(["Die Mannschaft verlor\ndas Spiel\x00 in der\x85letzten Minute."]) == ["de"]


def test_codes_have_no_region() -> None:
    assert [canonical(code) for code in ("zh_Hans", "pt-BR", "iw", "EN", "nb")] == ["zh", "pt", "he", "en", "no"]
