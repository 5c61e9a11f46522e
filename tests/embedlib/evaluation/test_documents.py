"""Evaluation sets out of one's own documents."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedlib.errors import DataError
from embedlib.evaluation.documents import Document, cut, make_document_tasks, read_documents
from embedlib.evaluation.tasks import load_task

SUBJECTS = [
    f"{colour} {animal}"
    for colour in ("red", "green", "blue", "grey", "black")
    for animal in ("cat", "dog", "owl", "fox", "eel")
]


def text_of(subject: str) -> str:
    return " ".join(f"Sentence {number} tells of the {subject} and of nothing else at all." for number in range(6))


def documents() -> list[Document]:
    return [Document(f"All about the {subject}", text_of(subject), "en", "") for subject in SUBJECTS]


def test_every_kind_of_query_finds_its_own_passage(tmp_path: Path) -> None:
    tasks = make_document_tasks(documents(), tmp_path, seed=0)
    assert sorted(tasks) == ["docs_first_sentence", "docs_span", "docs_title"]
    for name, config in tasks.items():
        task = load_task(name, config, tmp_path)
        assert task.dataset is not None
        data = task.dataset["en"]["test"]
        corpus = dict(zip(data["corpus"]["id"], data["corpus"]["text"], strict=True))
        for query, text in zip(data["queries"]["id"], data["queries"]["text"], strict=True):
            (answer,) = data["relevant_docs"][query]
            subject = next(subject for subject in SUBJECTS if subject in text)
            assert subject in corpus[answer]
            assert name == "docs_title" or text not in corpus[answer]  # it was cut out


def test_the_seed_decides(tmp_path: Path) -> None:
    for name in ("one", "same", "other"):
        make_document_tasks(documents(), tmp_path / name, seed=int(name == "other"))
    one, same, other = (
        pq.read_table(tmp_path / name / "span" / "queries.parquet") for name in ("one", "same", "other")
    )
    assert one.equals(same)
    assert not one.equals(other)


def test_translations_make_a_bitext(tmp_path: Path) -> None:
    translated = [document._replace(translation=f"Von {document.title}") for document in documents()]
    assert make_document_tasks(translated, tmp_path, seed=0)["docs_translation"].type == "bitext"


def test_folders_and_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Cats\n\nThey sleep.")
    (tmp_path / "docs" / "b.jsonl").write_text(json.dumps({"text": "Dogs bark.", "lang": "en"}) + "\n")
    pq.write_table(pa.table({"title": ["Owls"], "text": ["They fly."]}), tmp_path / "docs" / "c.parquet")
    (tmp_path / "docs" / "picture.png").write_bytes(b"\x89PNG")
    read = read_documents(tmp_path / "docs")
    assert [(each.title, each.text) for each in read] == [
        ("Cats", "They sleep."),
        ("", "Dogs bark."),
        ("Owls", "They fly."),
    ]


def test_long_documents_are_cut_between_sentences() -> None:
    passages = cut(" ".join(["Ein Satz von ungefähr fünfzig Zeichen steht hier."] * 40))
    assert len(passages) == 3
    assert all(sentence.endswith(".") for passage in passages for sentence in passage)


def test_text_without_marks_is_cut_at_spaces() -> None:
    passages = cut(" ".join(["สถานีปิดวันนี้"] * 120))
    assert len(passages) > 1
    assert all(len(part) <= 300 for passage in passages for part in passage)
    assert max(map(len, passages)) >= 3


def test_a_document_counts_once_and_json_is_read_by_lines(tmp_path: Path) -> None:
    rows = [{"text": "One\u2028line."}, {"text": "One\u2028line."}, {"text": "Another.", "title": 7}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert [(each.title, each.text) for each in read_documents(tmp_path)] == [("", "One\u2028line."), ("7", "Another.")]


def test_a_few_translations_make_no_task(tmp_path: Path) -> None:
    some = [each._replace(translation="Ja." if number < 3 else "") for number, each in enumerate(documents())]
    assert "docs_translation" not in make_document_tasks(some, tmp_path, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x"}', "row 0 has no `text`; found body"),
        ("a.jsonl", b'{"text": 3}', "`text` of row 0 is 3; expected a text"),
        ("a.jsonl", b"{", "cannot be read"),
        ("a.txt", b"\xff\xfe\xfa", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.docx", b"", "has no documents"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path)


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than 20 queries"):
        make_document_tasks(documents()[:3], tmp_path, seed=0)


def test_what_documents_repeat_is_one_passage_of_all_of_them(tmp_path: Path) -> None:
    notice = " ".join(
        f"Clause {number} says that nothing may be copied without a word of thanks." for number in range(12)
    )
    told = [Document(f"All about the {subject}", f"{text_of(subject) * 2} {notice}", "en", "") for subject in SUBJECTS]
    tasks = make_document_tasks(told, tmp_path, seed=0)
    home = tmp_path / tasks["docs_title"].path
    corpus = pq.read_table(home / "corpus.parquet")["text"].to_pylist()
    assert len(corpus) == len(set(corpus))
    answers = pq.read_table(home / "qrels.parquet").group_by("corpus-id").aggregate([("query-id", "count")])
    assert max(answers["query-id_count"].to_pylist()) == len(SUBJECTS)  # the notice answers every title
    assert set(pq.read_table(home / "queries.parquet")["lang"].to_pylist()) == {"en"}
