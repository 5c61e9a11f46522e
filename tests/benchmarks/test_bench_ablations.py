"""What the ablations are made of: questions kept apart, negatives, wrong pairs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import ablations

PER_LANGUAGE = 8


@pytest.fixture
def questions(tmp_path: Path) -> ablations.Questions:
    rows = [
        {"query": f"{lang} question {number}", "passage": f"{lang} answer {number}", "lang": lang}
        for lang in (*ablations.LANGS, "xx")
        for number in range(80)
    ]
    long = {"query": "en question of its own", "passage": "long " * 100, "lang": "en"}
    pq.write_table(pa.Table.from_pylist([*rows, long, rows[0]]), tmp_path / "questions.parquet")
    return ablations.read_questions(tmp_path / "questions.parquet", PER_LANGUAGE)


def test_no_question_is_trained_and_scored(questions: ablations.Questions) -> None:
    assert [len(part) // len(ablations.LANGS) for part in questions] == [8, 2, 2, 8, 8 * ablations.POOL]
    texts = [text for part in questions for text in part["query"].to_pylist()]
    assert len(texts) == len(set(texts))
    for part in questions:
        langs, counts = np.unique(part["lang"].to_pylist(), return_counts=True)
        assert sorted(langs) == sorted(ablations.LANGS)
        assert len(set(counts)) == 1


def test_random_negatives_are_passages_of_the_language_that_answer_nothing(questions: ablations.Questions) -> None:
    rows = ablations.with_random(questions.trained, questions.pool, 0).to_pylist()
    langs = dict(zip(questions.pool["passage"].to_pylist(), questions.pool["lang"].to_pylist(), strict=True))
    assert all(len(set(row["negatives"])) == ablations.NEGATIVES for row in rows)
    assert all({langs[text] for text in row["negatives"]} == {row["lang"]} for row in rows)


def test_as_many_pairs_are_wrong_as_is_said(questions: ablations.Questions) -> None:
    before, after = questions.trained["passage"].to_pylist(), ablations.with_noise(questions.trained, 0)["passage"]
    wrong = sum(left != right for left, right in zip(before, after.to_pylist(), strict=True))
    assert wrong == round(ablations.WRONG * len(before))
    assert sorted(before) == sorted(after.to_pylist())


def test_the_set_asks_what_was_kept_apart(questions: ablations.Questions, tmp_path: Path) -> None:
    task = ablations.write_set(tmp_path / "set", questions)
    corpus, queries, qrels = (
        pq.read_table(f"{task['path']}/{name}.parquet").to_pylist() for name in ("corpus", "queries", "qrels")
    )
    texts = {row["_id"]: row["text"] for row in (*corpus, *({**row, "_id": f"q{row['_id']}"} for row in queries))}
    pairs = {(texts[f"q{row['query-id']}"], texts[row["corpus-id"]]) for row in qrels}
    assert pairs == set(zip(*(questions.scored[name].to_pylist() for name in ("query", "passage")), strict=True))
    assert len(corpus) == len(questions.scored) + len(questions.passages)


def test_a_gain_compares_rows_that_its_table_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ablations, "trained", lambda setting, name, *_, **__: str(tmp_path / name))
    monkeypatch.setattr(ablations, "merge", lambda config: config.output)
    table = pa.table({"query": ["a", "b"], "passage": ["c", "d"], "lang": ["en", "en"]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    setting = ablations.Setting(
        tmp_path, "model", "guide", ablations.Questions(*[table] * 5), {"model": table, "guide": table}
    )
    names = {title: ablations.TABLES[title](setting, 0) for title in ablations.TABLES}
    for title, better, worse in ablations.GAINS.values():
        assert {better, worse} <= names[title].keys()
    runs = [
        {"good": {"Questions": 60.0}, "bad": {"Questions": 58.0}},
        {"good": {"Questions": 61.0}, "bad": {"Questions": 60.0}},
    ]
    assert ablations.gain(runs, "good", "bad") == 1.5
