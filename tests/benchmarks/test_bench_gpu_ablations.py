"""What the ablations of a GPU are made of: rows dealt once, negatives of the language, scores of one answer."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import gpu_ablations as ablations
from embedlib.dataset import ContrastiveSet
from embedlib.negatives import NegativeRule
from embedlib.topk import NO_ROW

NUM_ROWS = 20


class Numbers:
    """An encoder whose vectors are points of a circle, at the angle that the first token says in degrees."""

    def encode_tokens(self, tokens: list[npt.NDArray[np.int32]], normalise: bool) -> npt.NDArray[np.float32]:
        angles = np.radians([ids[0] for ids in tokens])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def tokens(*angles: int) -> list[npt.NDArray[np.int32]]:
    return [np.array([angle], np.int32) for angle in angles]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ablations.Texts:
    for name, value in {"SCORED": 3, "PROBE": 2, "OTHERS": 4, "TRAINED": 6}.items():
        monkeypatch.setattr(ablations, name, value)
    rows = [
        {"query": f"{lang} question {number}", "passage": f"{lang} answer {number}", "lang": lang, "source": "help"}
        for lang in (*ablations.LANGS, "xx")
        for number in range(NUM_ROWS)
    ]
    long = rows[0] | {"query": "en question of its own", "passage": "long " * 100}
    word = rows[0] | {"query": "word", "passage": "what it means", "source": "dict:wordnet"}
    pq.write_table(pa.Table.from_pylist([*rows, long, word, rows[0]]), tmp_path / "questions.parquet")
    return ablations.read_texts(tmp_path / "questions.parquet", 1.0)


def questions_of(texts: ablations.Texts, angles: list[int]) -> ContrastiveSet:
    """The trained rows as samples; `angles` of all queries, then of all passages."""
    return ablations.samples_of(tokens(*angles), texts.langs, texts.trained)


def test_a_row_is_for_one_thing(texts: ablations.Texts) -> None:
    assert sorted(np.concatenate([texts.scored, texts.probe, texts.others, texts.pool]).tolist()) == list(
        range(NUM_ROWS * len(ablations.LANGS))
    )
    assert set(texts.trained) < set(texts.pool)
    assert len(texts.trained) == 6 * len(ablations.LANGS)
    assert set(texts.langs) == set(ablations.LANGS)


def test_random_negatives_are_others_of_the_language(texts: ablations.Texts) -> None:
    drawn = ablations.by_chance(texts.pool, texts.trained, texts.langs, 0)
    assert drawn.shape == (len(texts.trained), ablations.NEGATIVES)
    assert set(drawn.flat) <= set(texts.pool)
    assert (texts.langs[drawn] == texts.langs[texts.trained][:, None]).all()
    assert (drawn != texts.trained[:, None]).all()


def test_mined_negatives_are_the_nearest_of_pool_and_language_that_the_margin_leaves(texts: ablations.Texts) -> None:
    num_rows = len(texts.queries)
    angles = np.full(2 * num_rows, 90)
    angles[:num_rows] = 0
    passages = angles[num_rows:]
    # What may not be found is nearest of all.
    passages[np.concatenate([texts.scored, texts.probe, texts.others])] = 1
    nearest, kept = [], []
    for row in texts.trained[::6]:
        others = [other for other in texts.pool if texts.langs[other] == texts.langs[row] and other != row]
        # Of the answer at 60 degrees, cosine 0.5, 95 % are 61.6 degrees.
        passages[[row, *others[:6]]] = 60, 10, 61, 62, 63, 64, 65
        nearest.append(others[:4])
        kept.append(others[2:6])
    encoder: Any = Numbers()
    vectors = ablations.unit(encoder, tokens(*angles))
    rules = [NegativeRule(max_negatives=ablations.NEGATIVES, relative_margin=margin) for margin in (None, 0.05)]
    hits = ablations.candidates(vectors, texts, max(rule.depth(1) for rule in rules))
    found, strict = (ablations.mined(hits, vectors, texts, rule) for rule in rules)
    assert found[::6].tolist() == nearest
    assert strict[::6].tolist() == kept
    few = NegativeRule(max_negatives=ablations.NEGATIVES, min_score=0.44)
    assert ablations.mined(hits, vectors, texts, few)[::6].tolist() == [[*some[:2], NO_ROW, NO_ROW] for some in kept]


def test_what_a_rule_leaves_open_is_filled_by_chance_and_gains_name_what_is_trained(
    texts: ablations.Texts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    questions = questions_of(texts, [0] * (2 * len(texts.queries)))
    some = np.full((len(texts.trained), ablations.NEGATIVES), NO_ROW)
    some[:, 0] = texts.pool[0]
    negatives = dict.fromkeys(ablations.MINERS, some)
    setting = ablations.Setting(tmp_path, texts, questions, questions, questions, negatives, {})
    trained: list[ContrastiveSet] = []
    monkeypatch.setattr(ablations, "learned", lambda _, dataset, *__: trained.append(dataset) or {})
    for name in ("equal_weights", "self_positioned"):
        monkeypatch.setattr(ablations, name, lambda *_: {})
    made: ablations.Models = {}
    for name, make in ablations.variants(setting, 0):
        made[name] = make(made)
    assert {name for names in ablations.GAINS.values() for name in names} <= made.keys()
    random, mined = trained[1].samples, trained[2].samples
    assert (mined[:, 2] == len(texts.queries) + texts.pool[0]).all()
    assert (mined[:, 3:] == random[:, 3:]).all()


def test_translations_that_are_trained_on_are_not_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "TRANSLATIONS", 4)
    monkeypatch.setattr(ablations, "PROBE", 2)
    rows = [
        {"en": f"house {number}", "xx": f"{lang} {number}", "lang": lang}
        for lang in ("de", "es", "xx")
        for number in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    numbers: dict[str, int] = {}

    class Words:
        def tokenise(self, texts: list[str], prompt: str) -> list[npt.NDArray[np.int32]]:
            return [np.array([numbers.setdefault(text, len(numbers))], np.int32) for text in texts]

    encoder: Any = Words()
    trained, probe = ablations.read_translations(tmp_path / "pairs.parquet", encoder, 1.0)
    assert [len(trained), len(probe)] == [8, 4]
    left, right = ({int(dataset.tokens[text]) for text in dataset.samples[:, 0]} for dataset in (trained, probe))
    assert not left & right
    names = {number: text for text, number in numbers.items()}
    for dataset in (trained, probe):
        pairs = [[names[int(ids[0])].split()[1] for ids in dataset.token_ids(row)] for row in dataset.samples]
        assert all(english == other for english, other in pairs)


def test_wrong_pairs_are_of_the_language_and_as_many_as_is_said(texts: ablations.Texts) -> None:
    num_rows = len(texts.queries)
    questions = questions_of(texts, [0] * (2 * num_rows))
    noisy = ablations.with_noise(questions, 0)
    wrong = noisy.samples[:, 1] != questions.samples[:, 1]
    assert wrong.sum() == len(ablations.LANGS) * round(ablations.WRONG * 6)
    assert (texts.langs[noisy.samples[:, 1] - num_rows] == texts.langs[noisy.samples[:, 0]]).all()


def test_the_score_is_what_one_answer_at_its_rank_is_worth() -> None:
    encoder: Any = Numbers()
    search = ablations.Search(tokens(0, 90), tokens(1, 10, 88, 95), np.array([1, 2]))
    assert ablations.ndcg(encoder, search) == pytest.approx(100 * (1 / np.log2(3) + 1) / 2)
    far = ablations.Search(tokens(0), tokens(*range(12)), np.array([11]))
    assert ablations.ndcg(encoder, far) == 0


def test_sets_that_are_joined_keep_their_texts_and_groups() -> None:
    first = ContrastiveSet(np.arange(4, dtype=np.int32), np.arange(5), np.array([[0, 1]]), np.array([0]), np.ones(1))
    second = ContrastiveSet(np.arange(6, dtype=np.int32), np.arange(7), np.array([[2, 5]]), np.array([1]), np.ones(2))
    both = ablations.joined(first, second)
    assert [[ids.tolist() for ids in both.token_ids(row)] for row in both.samples] == [[[0], [1]], [[2], [5]]]
    assert both.groups.tolist() == [0, 2]
    assert len(both.shares) == 3


def test_gains_are_of_the_seeds_that_both_have() -> None:
    scores = {"Self Positioning": [3.0], "equal weights": [1.0, 9.0], "random": [1.0]}
    runs = {name: [{"Questions": value} for value in values] for name, values in scores.items()}
    assert ablations.gains(runs) == {"self_positioning_vs_equal": 2.0}
