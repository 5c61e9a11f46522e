"""Make one sentence of one user-interface message, or say why it cannot be one.

Messages come from translation catalogues: they carry markup, accelerators and placeholders, and some were never
translated. `clean` rewrites a message until nothing more can be taken out, `rejection` names the reason to drop it,
and `near_duplicate_key` is equal for texts that differ only in case, punctuation, digits or placeholders.
"""

import html
import re
import unicodedata

PLACEHOLDER = "X"
"""The word that stands for what a program fills in: `Delete %s?` becomes `Delete X?`."""

MAX_PLACEHOLDERS = 2
MAX_CHARACTERS = 400
MIN_CHARACTERS = {"ko": 5, "ja": 5, "zh": 4, "th": 8}
"""Least length of a text by language; the scripts that say more in a character have a smaller one."""
DEFAULT_MIN_CHARACTERS = 10
MAX_SIGNS = 0.4
"""Largest share of a text's characters that may be digits or ASCII punctuation."""

LATIN = "A-Za-zªºÀ-ÖØ-öø-ɏḀ-ỿ"
KANA = "ぁ-ゟ゠-ヿㇰ-ㇿ"
HAN = "々〇㐀-䶿一-鿿豈-﫿"
SCRIPTS = {
    "ko": "ᄀ-ᇿㄱ-ㆎ가-힣",
    "ja": HAN + KANA,
    "zh": HAN,
    "ru": "А-Яа-яЁё",
    "ar": "ء-ۿݐ-ݿ",
    "hi": "ऀ-ॿ",
    "th": "ก-๛",
    "bn": "ঀ-৾",
}
"""The letters of every language that is not written in Latin ones, as ranges of a regular expression."""

_LETTER = re.compile(r"[^\W\d_]")
_NOT_LATIN = re.compile(rf"[^\W\d_{LATIN}]")
_NATIVE = {lang: re.compile(f"[{letters}]") for lang, letters in SCRIPTS.items()}
_FOREIGN = {lang: re.compile(rf"[^\W\d_{LATIN}{letters}]") for lang, letters in SCRIPTS.items()}
_LETTER_WEIGHT = {"ko": 2, "ja": 3, "zh": 3}  # Latin letters that one native letter outweighs

_BREAK = re.compile(r"(?i)<\s*/?\s*(?:br|p|li|ul|ol|div|h[1-6]|tr|td)\b[^<>]*>")
_TAG = re.compile(r"</?[A-Za-z0-9][^<>]*>|<!--.*?-->")
_LINK = re.compile(r"\[([^\[\]]+)\]\([^()\s]*\)")
_MARKUP = re.compile(r"\*\*|``?|\\[\"']")
_ESCAPE = re.compile(r"\\[nrt](?![A-Za-z])|\\n")
_PLACEHOLDERS = re.compile(
    r"""\{\{[^{}]*\}\}          # {{ name }}
    | [$%\#]\{[^{}]*\}          # ${name} %{name} #{name}
    | %\([^()]*\)[#0\- +]*[\d.]*[a-zA-Z]?   # %(name)s
    | %(?:\d+\$)?[#0\-+]*[\d.*]*(?:hh?|ll?)?[sdifguxXcr](?![A-Za-z])  # %s %1$s %.2f
    | %[1-9n](?!\d|[A-Za-z])    # %1 %n
    | \{[^{},'\s]*\}            # {name} {0:.2f}
    | \$t\([^()]*\)             # $t(common.save)
    | \$[A-Za-z_]\w*\$?         # $name$ $name
    """,
    re.VERBOSE,
)
_CJK_ACCELERATOR = re.compile(r"\s*\([&_][A-Za-z0-9]\)")
_ACCELERATOR = re.compile(r"(?<![\w&])[&_](?=[^\W_])|(?<=[^\W\d_])&(?=[a-z])|\b(?<=[A-Z])_(?=[a-z])")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile("[\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\uf8ff]")
_ELLIPSIS = re.compile(r"\s*(?:\.{3,}|…+)")
_EMPTY_PAIR = re.compile(r"\(\s*\)|\[\s*\]|“\s*”|«\s*»|\"\"|''")
_LEFT_EDGE = " -–—•*#:;,.…!?=/|>"
_RIGHT_EDGE = " -–—•*#:：;,…=/|<"

_PLACEHOLDER_WORD = re.compile(r"(?<![A-Za-z])X(?![A-Za-z])")
_CODE = re.compile(
    r"""://|www\.|\S@\S+\.|\\               # addresses, escapes
    | (?:^|\s)[~.]?(?:/[\w.\-]+){2,}        # /a/path
    | \w\.\w+\.\w*[A-Za-z]                  # a.dotted.name
    | [^\W\d_]_[^\W\d_]|__                  # snake_case
    | \w\(\)|\w\([^\s()]*,?[^\s()]*\)=      # call()
    | (?:^|\s)--?[a-z][a-z\-]+(?:\s|=|$)    # --option
    | [=!]=|\|\||&&|;$|::                   # operators
    """,
    re.VERBOSE,
)
_IDENTIFIER = re.compile(r"[A-Za-z0-9]*[._/:\d][A-Za-z0-9._/:\-]*|[a-z]+(?:[A-Z][a-z]+)+")
_MARKUP_LEFT = re.compile(r"[{}<>^`~|\[\]]|%[A-Za-z(]")
_CREDITS = re.compile(r"(?i)©|\(c\) ?\d|copyright|translator-credits|lorem ipsum")
_SIGN = re.compile(r"[\d!-/:-@\[-`{-~]")
_KANA_LETTER = re.compile(f"[{KANA}]")
_KEY_NOISE = re.compile(r"[^\w\u0900-\u0963\u0971-\u0983\u09bc-\u09e3\u0e30-\u0e4e]+|[\d_]+")  # keeps vowel signs


def clean(message: str) -> str:
    """The message as one line of plain text; "" where nothing is left. Cleaning twice changes nothing more.

    >>> clean("<b>&Delete</b> %(name)s ...")
    'Delete X'
    """
    for _ in range(100):
        cleaned = _clean_once(message)
        if cleaned == message:
            return cleaned
        message = cleaned
    return ""


def _clean_once(message: str) -> str:
    """One pass of `clean`; what it takes out can uncover more (`&amp;lt;b>`), so that `clean` repeats it."""
    text = unicodedata.normalize("NFC", message)
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub("", _BREAK.sub(" ", text))
    if "[" in text:
        text = _LINK.sub(r"\1", text)
    if "\\" in text:
        text = _ESCAPE.sub(" ", text)
    text = _MARKUP.sub("", text)
    if "%" in text or "{" in text or "$" in text:
        text = _PLACEHOLDERS.sub(PLACEHOLDER, text).replace("%%", "%")
    if "&" in text or "_" in text:
        text = _ACCELERATOR.sub("", _CJK_ACCELERATOR.sub("", text))
    if not text.isprintable():
        text = _INVISIBLE.sub("", _CONTROL.sub(" ", text))
    text = _EMPTY_PAIR.sub("", _ELLIPSIS.sub("…", text))
    text = " ".join(text.split()).lstrip(_LEFT_EDGE).rstrip(_RIGHT_EDGE)
    return unicodedata.normalize("NFC", text)


def rejection(text: str, lang: str) -> str | None:
    """Why a cleaned text is no sentence of `lang`, in one word or two; None where it is one.

    >>> rejection("Delete the selected file?", "en") is None
    True
    >>> rejection("/usr/share/locale/de", "en")
    'code'
    >>> rejection("Delete the selected file?", "ru")
    'wrong script'
    """
    if len(text) < MIN_CHARACTERS.get(lang, DEFAULT_MIN_CHARACTERS):
        return "too short"
    if len(text) > MAX_CHARACTERS:
        return "too long"
    if len(_PLACEHOLDER_WORD.findall(text)) > MAX_PLACEHOLDERS:
        return "placeholders"
    if _MARKUP_LEFT.search(text):
        return "markup"
    if _CODE.search(text) or _IDENTIFIER.fullmatch(text):
        return "code"
    if len(_SIGN.findall(text)) > MAX_SIGNS * len(text) or not _LETTER.search(_PLACEHOLDER_WORD.sub("", text)):
        return "no words"
    if _CREDITS.search(text):
        return "credits"
    if not script_matches(text, lang):
        return "wrong script"
    return None


def script_matches(text: str, lang: str) -> bool:
    """Whether the letters of the script(s) of `lang` dominate, with no letter of a third script.

    Names in Latin letters are at home in every language, as long as they are the smaller part; a language written in
    Latin letters allows no others. Japanese of more than a few words has kana, Vietnamese has diacritics.

    >>> script_matches("GitHub 계정을 연결하세요", "ko"), script_matches("Привет", "de")
    (True, False)
    """
    if PLACEHOLDER in text:
        text = _PLACEHOLDER_WORD.sub("", text)
    if lang not in SCRIPTS:
        return not _NOT_LATIN.search(text) and not (lang == "vi" and len(text) > 20 and text.isascii())
    if _FOREIGN[lang].search(text) or (lang == "ja" and len(text) > 10 and not _KANA_LETTER.search(text)):
        return False
    native = len(_NATIVE[lang].findall(text))
    latin = len(_LETTER.findall(text)) - native
    return native > 0 and latin <= native * _LETTER_WEIGHT.get(lang, 1)


def near_duplicate_key(text: str) -> str:
    """Equal for texts that differ only in case, punctuation, spaces, digits or placeholders.

    A translation with the key of its English source was never translated.

    >>> near_duplicate_key("Delete X files?") == near_duplicate_key("delete 3 files")
    True
    """
    if PLACEHOLDER in text:
        text = _PLACEHOLDER_WORD.sub("", text)
    return _KEY_NOISE.sub("", text.casefold())
