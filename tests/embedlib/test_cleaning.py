import doctest
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedlib import cleaning
from embedlib.cleaning import clean, near_duplicate_key, rejection, script_matches

# Text thick with what messages are made of, so that the rules meet each other.
fragments = [
    *("<b>", "</b>", "<br/>", "<", ">", "&amp;", "&lt;", "&", "_", "(", ")", "[a](b)", "**", "`"),
    *("%s", "%(name)s", "%", "%%", "{x}", "{{y}}", "{", "}", "${z}", "$n$", "...", "…", "\\n", "\n"),
    *(" ", "x", "A", "é", "e\u0301"),
]
messages = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(fragments)), max_size=12).map("".join)


@settings(max_examples=300)
@given(messages)
def test_cleaning_is_idempotent_and_leaves_plain_text(message: str) -> None:
    text = clean(message)
    assert clean(text) == text
    assert unicodedata.is_normalized("NFC", text)
    assert not any(unicodedata.category(character) == "Cc" for character in text)
    assert not re.search(r"\s\s", text)
    assert text == text.strip()


@given(messages, st.sampled_from(["en", "ja", "ar", "vi"]))
def test_every_message_is_judged(message: str, lang: str) -> None:
    reason = rejection(clean(message), lang)
    assert reason is None or reason


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("<b>Delete</b> the file?", "Delete the file?"),
        ("First line<br/>second line\nthird", "First line second line third"),
        ("Hi &lt;b&gt;there", "Hi there"),
        ("Save %(name)s to {{ path }}", "Save X to X"),
        ("%d of %2$s, ${total}, %1 and $name$", "X of X, X, X and X"),
        ("50% discount, 100%% sure", "50% discount, 100% sure"),
        ("Read [the docs](https://example.org) first", "Read the docs first"),
        ("&File", "File"),
        ("E&xit", "Exit"),
        ("R&D and Q&A", "R&D and Q&A"),
        ("_Open file…", "Open file"),
        ("ファイル(&F)...", "ファイル"),
        ("Name:", "Name"),
        ("Cafe\u0301\u200b au lait\x07", "Café au lait"),
        ("হ্যাঁ ক্\u200cষ", "হ্যাঁ ক্\u200cষ"),  # the joiners decide how Bengali is written
        ("{count, plural, one {# item} other {# items}}", "{count, plural, one {# item} other {# items}}"),
    ],
)
def test_clean(message: str, expected: str) -> None:
    assert clean(message) == expected


@pytest.mark.parametrize(
    ("text", "lang", "reason"),
    [
        ("Delete the selected file?", "en", None),
        ("선택한 파일을 삭제할까요?", "ko", None),
        ("OK", "en", "too short"),
        ("word " * 100, "en", "too long"),
        ("Copied X of X to X", "en", "placeholders"),
        ("{count, plural, one {# item} other {# items}}", "en", "markup"),
        ("See https://example.org for more", "en", "code"),
        ("/usr/share/locale/de", "en", "code"),
        ("some_setting_name", "en", "code"),
        ("accessTokenLifetime", "en", "code"),
        ("2024-01-01 10:00:00 UTC", "en", "no words"),
        ("Copyright the authors", "en", "credits"),
        ("Delete the selected file?", "ru", "wrong script"),
        ("Удалить выбранный файл?", "de", "wrong script"),
    ],
)
def test_rejection(text: str, lang: str, reason: str | None) -> None:
    assert rejection(text, lang) == reason


@pytest.mark.parametrize(
    ("text", "lang", "matches"),
    [
        ("GitHub 계정을 연결하세요", "ko", True),
        ("ファイルを削除しますか", "ja", True),
        ("设定", "ja", True),  # short Japanese can be all Han
        ("您确定要删除所选的文件和文件夹吗", "ja", False),
        ("ファイルを削除しますか", "zh", False),
        ("फ़ाइल हटाएं", "hi", True),
        ("फ़ाइल हटाएं", "bn", False),
        ("ফাইল মুছুন", "bn", True),
        ("ลบไฟล์ X", "th", True),
        ("احذف الملف", "ar", True),
        ("Xóa các tập tin đã chọn", "vi", True),
        ("Delete the selected files", "vi", False),
        ("Größe ändern", "de", True),
    ],
)
def test_script_matches(text: str, lang: str, matches: bool) -> None:
    assert script_matches(text, lang) is matches


def test_near_duplicates_share_a_key_and_others_do_not() -> None:
    assert near_duplicate_key("Delete X files?") == near_duplicate_key("delete 3 FILES")
    assert near_duplicate_key("की") != near_duplicate_key("कु")  # vowel signs are no punctuation
    assert near_duplicate_key("Reset password!") == near_duplicate_key("reset Password")
    assert near_duplicate_key("Open") != near_duplicate_key("Close")


def test_docstrings_tell_the_truth() -> None:
    results = doctest.testmod(cleaning)
    assert results.attempted
    assert not results.failed
