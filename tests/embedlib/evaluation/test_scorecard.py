"""Scores put together, compared, and asked for what was required of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedlib.errors import ConfigError
from embedlib.evaluation.bootstrap import Items, average_precision, interval, ndcg, p_value, replicates, spearman
from embedlib.evaluation.official import official_rows, published_means
from embedlib.evaluation.scorecard import check_gates, check_requirements, make_scorecard, verdict
from embedlib.evaluation.scoring import Score


def score(
    model: str, task: str, value: float, kind: str = "STS", subset: str = "default", language: str = "en"
) -> Score:
    rounds = replicates(Items("mean", np.linspace(0, 1, 100)), f"{task}/{subset}") * 2 * value
    return Score(
        model=model, task=task, type=kind, subset=subset, language=language, split="test", metric="main", value=value,
        replicates=rounds.tolist(),
    )  # fmt: skip


SCORES = [
    *(score("teacher", f"STS{number}", value) for number, value in ((1, 80.0), (2, 60.0))),
    *(score("student", f"STS{number}", value) for number, value in ((1, 78.0), (2, 60.0))),
    *(score("teacher", "Bitext", value, "BitextMining", lang, lang) for lang, value in (("de", 90.0), ("bn", 70.0))),
    *(score("student", "Bitext", value, "BitextMining", lang, lang) for lang, value in (("de", 80.0), ("bn", 20.0))),
]


def test_means_go_over_tasks_and_then_over_groups() -> None:
    card = make_scorecard(SCORES, ["teacher", "student"], "teacher")
    assert [row.name for row in card.groups] == ["sts", "bitext", "mean"]
    teacher = [row.cells["teacher"].value for row in card.groups]
    assert teacher == pytest.approx([70, 80, 75])
    student = card.groups[-1].cells["student"]
    assert student.value == pytest.approx((69 + 50) / 2)
    assert student.retention == pytest.approx(59.5 / 75)
    assert {row.name: row.cells["student"].value for row in card.languages} == pytest.approx(
        {"bn": 20, "de": 80, "en": 69}
    )


def test_the_means_interval_is_that_of_the_means_rounds() -> None:
    card = make_scorecard(SCORES, ["teacher", "student"], "teacher")
    rounds = np.mean([score.replicates for score in SCORES[:2]], axis=0)
    assert (card.groups[0].cells["teacher"].low, card.groups[0].cells["teacher"].high) == pytest.approx(
        interval(rounds)
    )


def test_a_model_that_lacks_a_task_has_no_mean_over_it() -> None:
    card = make_scorecard(
        [one for one in SCORES if (one.model, one.task) != ("student", "STS2")], ["teacher", "student"], "teacher"
    )
    assert "student" not in card.groups[0].cells
    assert "student" in card.groups[1].cells
    assert "student" not in card.groups[-1].cells
    assert "no verdict" in verdict(card, "student", None, None)


@pytest.mark.parametrize(
    ("require", "wanted", "passed"),
    [
        ("sts>=0.95*teacher", 66.5, True),
        ("bitext >= 0.9*teacher", 72, False),
        ("lang:de>79", 79, True),
        ("STS2>60", 60, False),
        ("sts>=1*teacher - 5", 65, True),
        ("sts>=1*teacher -0.5", 69.5, False),
        ("sts>0.9*teacher + 2", 65, True),
    ],
)
def test_gates(require: str, wanted: float, passed: bool) -> None:
    card = make_scorecard(SCORES, ["teacher", "student"], "teacher")
    (result,) = check_gates([require], card, ["student"])
    assert result.wanted == pytest.approx(wanted)
    assert result.passed is passed
    assert ("NOT MET" in result.sentence) is not passed


@pytest.mark.parametrize(
    ("require", "message"),
    [
        ("sts=1", "expected ROW>=NUMBER"),
        ("sts>=1*tutor", "no model 'tutor'"),
        ("sts>=1 - 5", "expected ROW>=NUMBER"),
        ("sts>=1*teacher-5", "no model 'teacher-5'"),
        ("sts>=1*teacher - 5.0.0", "is no number"),
    ],
)
def test_gates_that_mean_nothing(require: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_gates([require], make_scorecard(SCORES, ["teacher", "student"], "teacher"), ["student"])


@pytest.mark.parametrize("require", ["retrieval>=1", "lang:xx>=0.5*teacher"])
def test_a_row_without_a_score_is_a_gate_not_met(require: str) -> None:
    card = make_scorecard(SCORES, ["teacher", "student"], "teacher")
    (result,) = check_gates([require], card, ["student"])
    assert not result.passed
    assert "NOT MET by student: no score" in result.sentence


@pytest.mark.parametrize(
    ("require", "who", "passed"),
    [
        ("sts>=1", "student", False),
        ("mean>=1", "student", False),
        ("sts>=0.1*teacher", "teacher", False),
        ("sts>=1", "other", True),
        ("bitext>=1", "student", True),
    ],
)
def test_a_group_that_lost_a_task_meets_nothing(require: str, who: str, passed: bool) -> None:
    card = make_scorecard(SCORES, ["teacher", "student"], "teacher")
    (result,) = check_gates([require], card, ["student"], [(who, "STS99", "sts")])
    assert result.passed is passed
    assert ("no score on STS99" in result.sentence) is not passed


def test_what_is_not_resampled_counts_in_a_mean_as_it_is() -> None:
    fixed = score("teacher", "Topics", 30.0, "Clustering").model_copy(update={"replicates": []})
    card = make_scorecard([score("teacher", "STS1", 80.0), fixed], ["teacher"], "teacher")
    sts, clustering, mean = (row.cells["teacher"] for row in card.groups)
    assert sts.low is not None
    assert sts.high is not None
    assert clustering.low is None
    assert mean.low == pytest.approx((sts.low + 30) / 2)
    assert mean.high == pytest.approx((sts.high + 30) / 2)


def test_items_that_are_drawn_together_make_wider_intervals() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.random(50), 8)  # eight questions on each of 50 paragraphs, all found or none
    alone = replicates(Items("mean", values), "questions")
    together = replicates(Items("mean", values, clusters=np.repeat(np.arange(50), 8)), "questions")
    assert 2 < np.std(together) / np.std(alone) < 4  # the square root of 8
    assert together.mean() == pytest.approx(values.mean(), abs=0.02)


def test_a_gate_that_asks_nobody_is_refused() -> None:
    card = make_scorecard(SCORES, ["teacher", "student"], "teacher")
    with pytest.raises(ConfigError, match=r"no model to ask it of"):
        check_gates(["sts>=99"], card, [])
    with pytest.raises(ConfigError, match=r"'1\.2\.3' is no number"):
        check_gates(["sts>=1.2.3"], card, ["student"])


def test_the_verdict_names_what_is_safe_and_what_is_not() -> None:
    text = verdict(make_scorecard(SCORES, ["teacher", "student"], "teacher"), "student", 2.5, 9.0)
    assert "keeps 79.3 % of teacher's mean score and is 2.5 times as fast and 9.0 times smaller" in text
    assert "Safe to ship where the work is sts" in text
    assert "Not safe for bitext (62 %)" in text
    assert "Weak languages: bn (29 %) and de (89 %)" in text


def test_what_chance_may_have_kept_is_not_called_safe() -> None:
    scores = [each.model_copy(update={"replicates": None}) for each in SCORES]
    text = verdict(make_scorecard(scores, ["teacher", "student"], "teacher"), "student", None, None)
    assert "Safe to ship" not in text
    assert "It keeps as much in sts, but so few items, or none, show it" in text


@pytest.mark.parametrize(
    ("require", "message"),
    [("sets>=1", r"no row 'sets'; expected of \['mean', 'sts', 'sts1'\]"), ("sts>=1*tutor", "no model 'tutor'")],
)
def test_a_requirement_of_nothing_is_refused_before_anything_is_scored(require: str, message: str) -> None:
    check_requirements(["sts>=0.9*teacher", "lang:de>1", "mean>1"], ["STS1", "sts"], ["teacher", "student"])
    with pytest.raises(ConfigError, match=message):
        check_requirements([require], ["STS1", "sts"], ["teacher", "student"])


def test_draws_are_paired_by_name_and_a_difference_beyond_chance_is_seen() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(300)
    items = [Items("mean", base), Items("mean", base + 0.05 + 0.01 * rng.random(300))]
    one, other = (replicates(each, "task") for each in items)
    assert p_value(other - one) <= 0.01
    assert p_value(one - one) == 1.0
    assert np.array_equal(one, replicates(items[0], "task"))
    assert not np.array_equal(one, replicates(items[0], "another"))


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=30, unique=True), st.randoms())
def test_spearman_is_scipys(values: list[float], random: object) -> None:
    from scipy.stats import spearmanr

    other = list(values)
    random.shuffle(other)  # type: ignore[attr-defined]
    assert spearman(np.array(values), np.array(other)) == pytest.approx(spearmanr(values, other).statistic)


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=2, max_size=40, unique_by=lambda each: each[0])
)
def test_average_precision_is_scikit_learns(pairs: list[tuple[int, bool]]) -> None:
    from sklearn.metrics import average_precision_score

    scores, gold = np.array([float(score) for score, _ in pairs]), np.array([float(hit) for _, hit in pairs])
    expected = average_precision_score(gold, scores) if gold.any() else 0.0
    assert average_precision(scores, gold) == pytest.approx(expected)


def test_ndcg_of_a_perfect_and_of_a_late_answer() -> None:
    assert ndcg({"a": 2.0, "b": 1.0}, {"a": 1}) == 1
    assert ndcg({"a": 1.0, "b": 2.0}, {"a": 1}) == pytest.approx(1 / np.log2(3))
    assert ndcg({}, {"a": 1}) == 0


def test_published_scores_are_compared_over_the_same_subsets() -> None:
    published = {("Bitext", "test", "de"): {"big": 95.0, "new": 90.0}, ("Bitext", "test", "bn"): {"big": 75.0}}
    rows = {tuple(row.official): row for row in official_rows(SCORES, published)}
    assert rows[("big",)].official == {"big": 85.0}
    assert rows[("big",)].ours == {"student": 50.0, "teacher": 80.0}
    assert published_means(list(rows.values())) == ({"student": 50.0, "teacher": 80.0}, {"big": 85.0})
    assert rows[("new",)].subsets == ["de"]
    assert rows[("new",)].ours == {"student": 80.0, "teacher": 90.0}
