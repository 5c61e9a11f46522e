import doctest
import json
import struct
import zipfile
from pathlib import Path
from random import Random

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from embedlib import demo_corpus
from embedlib.cleaning import near_duplicate_key, rejection
from embedlib.demo_corpus import (
    LANGUAGES,
    Message,
    build_demo_corpus,
    build_from_messages,
    choose_held_out,
    collect_sentences,
    language_of,
    read_gettext,
    read_json,
    read_messages,
)
from embedlib.errors import DataError
from embedlib.schemas import CORPUS
from embedlib.wheels import cache_directory

SPLITS = ("train", "validation", "held_out")


def gettext_catalogue(texts: dict[str, str], order: str = "<") -> bytes:
    """A compiled catalogue as msgfmt writes it."""
    pairs = [(key.encode(), text.encode()) for key, text in sorted({"": "Content-Type: text/plain", **texts}.items())]
    position = 28 + 16 * len(pairs)
    tables: list[list[int]] = [[], []]
    body = b""
    for column in (0, 1):
        for pair in pairs:
            tables[column] += [len(pair[column]), position + len(body)]
            body += pair[column] + b"\0"
    header = struct.pack(order + "7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + struct.pack(f"{order}{4 * len(pairs)}I", *tables[0], *tables[1]) + body


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def many_messages(count: int) -> list[tuple[str, Message]]:
    """`count` groups in four languages, no two alike; every fifth is in English, German and French only."""
    found = []
    for number in range(count):
        name = LETTERS[number // 26 % 26] + LETTERS[number % 26]
        english = f"Delete the selected file named {name}?"
        texts = {"en": english, "de": f"Ausgewählte Datei {name} löschen?", "fr": f"Supprimer le fichier {name} choisi"}
        if number % 5:
            texts["ru"] = f"Удалить выбранный файл {name} сейчас?"
        found += [("package==1", Message(f"catalogue:{number}", english, lang, text)) for lang, text in texts.items()]
    return found


@pytest.mark.parametrize("order", ["<", ">"])
def test_gettext_is_read_in_both_byte_orders(order: str) -> None:
    texts = {"File": "Datei", "menu\x04%d file\0%d files": "%d Datei\0%d Dateien"}
    assert read_gettext(gettext_catalogue(texts, order), "de.mo") == {
        "File": "Datei",
        "menu\x04%d file\0%d files": "%d Dateien",
    }


CATALOGUE = gettext_catalogue({"a": "b"})


@pytest.mark.parametrize(
    "content", [b"", b"no catalogue", CATALOGUE[:20], CATALOGUE[:40], CATALOGUE.replace(b"b", b"\xff")]
)
def test_a_damaged_gettext_catalogue_is_refused_by_name(content: bytes) -> None:
    with pytest.raises(DataError, match=r"locale/de\.mo"):
        read_gettext(content, "locale/de.mo")


def test_json_is_read_through_its_nesting() -> None:
    content = json.dumps({"title": "Home", "step": {"user": {"title": "Connect"}, "count": 3}}).encode()
    assert read_json(content, "en.json") == {"title": "Home", "step.user.title": "Connect"}


def test_damaged_json_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"en\.json"):
        read_json(b"{", "en.json")


@pytest.mark.parametrize(
    ("locale", "expected"),
    [
        ("de", ("de", 0)),
        ("ko_KR", ("ko", 1)),
        ("zh-Hans", ("zh", 0)),
        ("zh_CN", ("zh", 1)),
        ("zh_Hant", None),
        ("zh_TW", None),
        ("pt-BR", ("pt", 0)),
        ("en_GB", None),
        ("nl", None),
    ],
)
def test_language_of(locale: str, expected: tuple[str, int] | None) -> None:
    assert language_of(locale) == expected


def test_gettext_messages_of_a_wheel(tmp_path: Path) -> None:
    path = wheel(
        tmp_path / "p.whl",
        {
            "p/locale/de/LC_MESSAGES/p.mo": gettext_catalogue({"File": "Datei", "menu\x04Open": "Öffnen"}),
            "p/locale/pt/LC_MESSAGES/p.mo": gettext_catalogue({"File": "Ficheiro", "menu\x04Open": "Abrir"}),
            "p/locale/pt_BR/LC_MESSAGES/p.mo": gettext_catalogue({"File": "Arquivo"}),
            "p/locale/nl/LC_MESSAGES/p.mo": gettext_catalogue({"File": "Bestand"}),
        },
    )
    found = {(message.lang, message.english, message.text) for message in read_messages(path)}
    assert found == {
        ("en", "File", "File"),
        ("en", "Open", "Open"),
        ("de", "File", "Datei"),
        ("de", "Open", "Öffnen"),
        ("pt", "File", "Arquivo"),  # the Brazilian catalogue is the best one
        ("pt", "Open", "Abrir"),
    }


def test_json_messages_of_a_wheel(tmp_path: Path) -> None:
    path = wheel(
        tmp_path / "p.whl",
        {
            "p/translations/en.json": b'{"title": "Home"}',
            "p/translations/fr.json": '{"title": "Accueil", "more": "Détails"}'.encode(),
        },
    )
    messages = list(read_messages(path, r"(?P<domain>p)/translations/(?P<locale>\w+)\.json"))
    assert {(message.id, message.english, message.lang, message.text) for message in messages} == {
        ("p:title", "Home", "en", "Home"),
        ("p:title", "Home", "fr", "Accueil"),
        ("p:more", "", "fr", "Détails"),
    }


def test_the_same_english_in_two_packages_is_one_group() -> None:
    sentences = collect_sentences(
        [
            ("a==1", Message("a:1", "Reset your password", "en", "Reset your password")),
            ("a==1", Message("a:1", "Reset your password", "de", "Passwort zurücksetzen")),
            ("b==1", Message("b:9", "Reset your password.", "fr", "Réinitialiser le mot de passe")),
            ("b==1", Message("b:9", "Reset your password.", "es", "RESET your password")),
        ]
    )
    assert [group.langs for group in sentences.groups] == [{"en", "de", "fr"}]
    assert sentences.dropped == {"left in English": 1}


def test_groups_that_share_a_sentence_are_tied() -> None:
    sentences = collect_sentences(
        [
            ("a==1", Message("a:1", "Cancel the task", "de", "Aufgabe abbrechen")),
            ("a==1", Message("a:2", "Abort the task", "de", "Aufgabe abbrechen!")),
            ("a==1", Message("a:2", "Abort the task", "fr", "Arrêter la tâche")),
            ("a==1", Message("a:3", "Start the task", "fr", "Démarrer la tâche")),
        ]
    )
    assert len(sentences.groups) == 3
    assert sorted(map(len, sentences.ties)) == [1, 2]
    assert sentences.dropped == {"seen before": 1}


def test_held_out_serves_the_rarest_language_first() -> None:
    sentences = collect_sentences(many_messages(100))
    chosen = choose_held_out(sentences, 10, Random(0))
    assert len(chosen) == 10
    assert all(sentences.groups[position].langs == {"en", "de", "fr", "ru"} for position in chosen)


def test_tables_keep_the_schema_and_share_nothing(tmp_path: Path) -> None:
    counts = build_from_messages(many_messages(200), tmp_path, held_out_per_language=20, validation_groups=10)
    keys: dict[str, set[tuple[str, str]]] = {}
    for split in SPLITS:
        table = pq.read_table(tmp_path / f"{split}.parquet")
        assert table.schema.equals(CORPUS)
        assert table["id"].to_pylist() == list(range(len(table)))
        assert counts[split]["sentences"] == len(table)
        rows = list(zip(table["lang"].to_pylist(), table["text"].to_pylist(), strict=True))
        assert all(rejection(text, lang) is None for lang, text in rows)
        keys[split] = {(lang, near_duplicate_key(text)) for lang, text in rows}
        assert len(keys[split]) == len(rows)
    assert keys["train"].isdisjoint(keys["held_out"] | keys["validation"])
    assert keys["validation"].isdisjoint(keys["held_out"])
    assert counts["held_out"]["pairs_with_english"]["ru"] == 20
    assert counts["validation"]["groups"] == 10
    assert sum(counts[split]["sentences"] for split in SPLITS) == 200 * 4 - 40


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        build_from_messages(many_messages(60), tmp_path / name, held_out_per_language=5, validation_groups=5, seed=seed)
    for split in SPLITS:
        first = (tmp_path / "first" / f"{split}.parquet").read_bytes()
        assert first == (tmp_path / "again" / f"{split}.parquet").read_bytes()
        assert first != (tmp_path / "other" / f"{split}.parquet").read_bytes()


def test_no_messages_make_empty_tables(tmp_path: Path) -> None:
    counts = build_from_messages([], tmp_path)
    assert counts["train"]["sentences"] == 0
    assert pq.read_table(tmp_path / "train.parquet").schema.equals(CORPUS)


def test_docstrings_tell_the_truth() -> None:
    assert not doctest.testmod(demo_corpus).failed


@pytest.mark.slow
def test_the_real_wheels_give_a_corpus_in_every_language(tmp_path: Path) -> None:
    counts = build_demo_corpus(tmp_path, cache_directory())
    assert counts["train"]["sentences"] > 200_000
    assert min(counts["train"]["sentences_by_language"].values()) > 1_000
    assert min(counts["held_out"]["pairs_with_english"].values()) >= 200
    held_out = pq.read_table(tmp_path / "held_out.parquet")
    for lang in LANGUAGES:
        texts = held_out.filter(pc.equal(held_out["lang"], lang))["text"]
        assert len(texts.unique()) == len(texts)
