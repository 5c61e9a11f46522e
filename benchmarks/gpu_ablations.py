"""What ingredients of contrastive training are worth over hundreds of steps, on one GPU and no cluster.

    python -m benchmarks.gpu_ablations --student DIR --teacher DIR --questions FILE --pairs FILE --root SETS
        [--minutes N] [--quick] [--json OUT]

What benchmarks/ablations.py asks in 32 steps of two cores, with the jobs' own steps and rules and without Ray around
them. questions: Parquet with `query`, `passage`, `lang`, `source`; pairs: `en`, `xx`, `lang`; sets below the root:
XQuAD and FLORES. Scores are nDCG@10 x 100, means over languages: of questions kept apart among their language's
passages, of XQuAD, and of FLORES's sentences, whose answer is the English one.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from rich.console import Console

from benchmarks.command import benchmark_parser, short_rows, table_of, write_result
from benchmarks.machine import describe_machine
from embedlib.batching import TokenIds
from embedlib.contrastive import ContrastiveConfig, contrast, load_encoder, start_contrast
from embedlib.dataset import ContrastiveSet
from embedlib.encoder import Encoder, default_device
from embedlib.gpu_search import search_on_gpu
from embedlib.merging import SelfPositioning, Weights, task_arithmetic
from embedlib.negatives import NegativeRule, Queries, select
from embedlib.objective import GuideConfig, ObjectiveConfig
from embedlib.topk import NO_ROW, Hits, best
from embedlib.training import OptimizerConfig

LANGS = ("en", "de", "es", "fr", "it", "pt", "ru", "pl", "ja", "ko", "id")
XQUAD_LANGS = ("en", "de", "es", "ru")
FLORES_LANGS = ("deu_Latn", "spa_Latn", "fra_Latn", "ita_Latn", "por_Latn", "rus_Cyrl", "pol_Latn", "jpn_Jpan")
MAX_CHARACTERS = 300
DICTIONARIES = "dict:"
HIT_TYPES = (np.float32, np.int64, np.uint64, np.uint64, np.uint64)
SCORED, PROBE, OTHERS = 200, 300, 1000
"""Questions a language that are scored, and that merges are weighed by; passages searched besides."""
TRAINED, TRANSLATIONS = 5000, 4000
"""Most questions, and translations, a language."""
QUICK_SHARE = 0.02
NEGATIVES = 4
WRONG = 0.4
DEPTH = 10
TRAINING = ContrastiveConfig(batch_size=256, optimizer=OptimizerConfig(learning_rate=1e-4))
POSITIONING = ContrastiveConfig(batch_size=64, optimizer=OptimizerConfig(learning_rate=0.02, max_grad_norm=1e9))
UNFILTERED = "mined by the teacher, any score"
# Of e5's scores a margin leaves little among the nearest forty, which is where a rule looks if it is told nothing.
AWARE: dict[str, Any] = {"max_negatives": NEGATIVES, "range_max": 400}
MINERS: dict[str, tuple[str, NegativeRule]] = {
    "mined by the student, 95 %": ("student", NegativeRule(**AWARE)),
    UNFILTERED: ("teacher", NegativeRule(max_negatives=NEGATIVES, relative_margin=None)),
    "mined by the teacher, 95 %": ("teacher", NegativeRule(**AWARE)),
    "mined by the teacher, 98 %": ("teacher", NegativeRule(**AWARE, relative_margin=0.02)),
}
# What is told besides the table: how much better than the second the first is on the questions kept apart.
GAINS = {
    "mined_vs_random": ("mined by the student, 95 %", "random"),
    "guide_mined_vs_random": ("mined by the teacher, 95 %", "random"),
    "margin_vs_none": ("mined by the teacher, 95 %", UNFILTERED),
    "guided_vs_plain_of_mined": (f"{UNFILTERED}, guided", UNFILTERED),
    "guided_vs_plain": ("wrong pairs, guided", "wrong pairs"),
    "guided_vs_plain_of_right": ("guided", "batch alone"),
    "self_positioning_vs_equal": ("Self Positioning", "equal weights"),
}

Rows = npt.NDArray[np.int64]


class Texts(NamedTuple):
    """Questions and their passages by row; no text comes twice on a side."""

    queries: list[str]
    passages: list[str]
    langs: npt.NDArray[np.object_]
    scored: Rows
    probe: Rows
    others: Rows
    """Whose passages are searched as well."""
    trained: Rows
    pool: Rows
    """Whose passages may be negatives: those trained on and what is left."""


class Search(NamedTuple):
    """Queries of one language, and documents among which each has one answer."""

    queries: list[TokenIds]
    documents: list[TokenIds]
    answers: Rows


class Setting(NamedTuple):
    """What all that is trained has in common."""

    student: Path
    texts: Texts
    questions: ContrastiveSet
    """Text n is the query of row n, text n + number of rows its passage; samples are those trained on. With the guide's
    vectors."""
    probe: ContrastiveSet
    translations: ContrastiveSet
    negatives: dict[str, Rows]
    """By miner, (samples, NEGATIVES) rows of passages, `NO_ROW` where the rule left too few."""
    searches: dict[str, list[Search]]


Models = dict[str, Weights]


def parse() -> Namespace:
    """The command line."""
    parser: ArgumentParser = benchmark_parser(__doc__ or "", "a fiftieth of the samples, one seed")
    parser.add_argument("--student", type=Path, required=True, help="directory of what every training begins with")
    parser.add_argument("--teacher", type=Path, required=True, help="directory of the guide, which mines as well")
    parser.add_argument("--questions", type=Path, required=True, help="Parquet with query, passage, lang, source")
    parser.add_argument("--pairs", type=Path, required=True, help="Parquet with en, xx, lang")
    parser.add_argument("--root", type=Path, required=True, help="evaluation sets: xquad_retrieval, sib200_flores")
    parser.add_argument("--seeds", type=int, help="none: 3, or 1 with --quick")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="nothing is begun after so many, preparing included"
    )
    return parser.parse_args()


def read_texts(path: Path, share: float) -> Texts:
    """Short questions in an order of chance, dealt to what they are for; words and their definitions are none."""
    table = pq.read_table(path, columns=["query", "passage", "lang", "source"])
    table = table.filter(pc.invert(pc.starts_with(table["source"], DICTIONARIES)))
    frame = short_rows(table, "passage", MAX_CHARACTERS, LANGS).drop_duplicates("query").drop_duplicates("passage")
    frame = frame[: round(share * len(frame))]
    langs = frame["lang"].to_numpy(object)
    *parts, rest = dealt(langs, LANGS, [round(share * number) for number in (SCORED, PROBE, OTHERS, TRAINED)])
    return Texts(frame["query"].tolist(), frame["passage"].tolist(), langs, *parts, np.concatenate([parts[-1], rest]))


def read_translations(path: Path, encoder: Encoder, share: float) -> tuple[ContrastiveSet, ContrastiveSet]:
    """English and its translations, as many of each language, no text twice: to train on, and as a probe."""
    table = pq.read_table(path, columns=["en", "xx", "lang"])
    frame = short_rows(table, "en", MAX_CHARACTERS, LANGS[1:]).drop_duplicates("en").drop_duplicates("xx")
    counts = [round(share * number) for number in (TRANSLATIONS, PROBE)]
    frame = frame.groupby("lang").head(sum(counts))  # the others need no tokens
    langs = frame["lang"].to_numpy(object)
    trained, probe, _ = dealt(langs, LANGS[1:], counts)
    texts = tokens_of(encoder, [("query", frame["en"].tolist()), ("query", frame["xx"].tolist())])
    return samples_of(texts, langs, trained), samples_of(texts, langs, probe)


def dealt(langs: npt.NDArray[np.object_], names: Sequence[str], counts: Sequence[int]) -> list[Rows]:
    """Of each of the named languages the first `counts[0]` rows, then the next `counts[1]`, …, and what is left."""
    edges = np.cumsum(counts)
    of_lang = [np.split(np.flatnonzero(langs == name), edges) for name in names]
    return [np.concatenate(rows) for rows in zip(*of_lang, strict=True)]


def tokens_of(encoder: Encoder, sides: Sequence[tuple[str, list[str]]]) -> list[TokenIds]:
    """Token ids of texts under their prompts, side after side."""
    return [ids for prompt, texts in sides for ids in encoder.tokenise(texts, prompt)]


def samples_of(tokens: Sequence[TokenIds], langs: npt.NDArray[np.object_], rows: Rows) -> ContrastiveSet:
    """Samples of the left text and the right one of `rows`, a group for each language; the left ones come first."""
    names, groups = np.unique(langs[rows].astype(str), return_inverse=True)
    samples = np.stack([rows, len(langs) + rows], axis=1)
    offsets = np.cumsum([0, *map(len, tokens)])
    return ContrastiveSet(np.concatenate(tokens), offsets, samples, groups, np.ones(len(names)))


def changed(dataset: ContrastiveSet, **values: Any) -> ContrastiveSet:
    """The set with other values of some fields: its length is not a tuple's, so `_replace` cannot."""
    return ContrastiveSet(**(dataset._asdict() | values))


def joined(first: ContrastiveSet, second: ContrastiveSet) -> ContrastiveSet:
    """The samples of both, in groups of their own."""
    return ContrastiveSet(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
        np.concatenate([first.samples, len(first.offsets) - 1 + second.samples]),
        np.concatenate([first.groups, len(first.shares) + second.groups]),
        np.concatenate([first.shares, second.shares]),
    )


def searches_of(texts: Texts, encoder: Encoder, root: Path, share: float) -> dict[str, list[Search]]:
    """What models are scored by, a search for each language."""

    def search(queries: Sequence[str], documents: Sequence[str], answers: Rows, prompt: str = "document") -> Search:
        return Search(encoder.tokenise(queries, "query"), encoder.tokenise(documents, prompt), answers)

    asked = []
    for lang in LANGS:
        scored, others = (rows[texts.langs[rows] == lang] for rows in (texts.scored, texts.others))
        documents = [texts.passages[row] for row in (*scored, *others)]
        asked.append(search([texts.queries[row] for row in scored], documents, np.arange(len(scored))))
    files = {
        name: pq.read_table(root / "xquad_retrieval" / f"{name}.parquet") for name in ("corpus", "queries", "qrels")
    }
    frames = {name: table.to_pandas() for name, table in files.items()}
    quad = []
    for lang in XQUAD_LANGS:
        corpus, queries, qrels = (frame[frame["lang"] == lang] for frame in frames.values())
        place = {name: number for number, name in enumerate(corpus["_id"])}
        answer = {query: place[name] for query, name in zip(qrels["query-id"], qrels["corpus-id"], strict=True)}
        queries = queries[: round(share * len(queries))]
        answers = np.array([answer[name] for name in queries["_id"]])
        quad.append(search(queries["text"].tolist(), corpus["text"].tolist(), answers))
    flores = pq.read_table(root / "sib200_flores" / "flores_parallel.parquet")
    flores = flores.slice(0, round(share * len(flores)))
    english = flores["eng_Latn"].to_pylist()
    bitext = [search(flores[lang].to_pylist(), english, np.arange(len(english)), "query") for lang in FLORES_LANGS]
    return {"Questions": asked, "XQuAD": quad, "FLORES": bitext}


def unit(encoder: Encoder, tokens: Sequence[TokenIds]) -> torch.Tensor:
    """Unit vectors (texts, dim) on the default device."""
    return torch.from_numpy(encoder.encode_tokens(tokens, normalise=True)).to(default_device())


def ndcg(encoder: Encoder, search: Search) -> float:
    """Mean over the queries of what one answer at its rank is worth, to depth 10, x 100."""
    scores = unit(encoder, search.queries) @ unit(encoder, search.documents).T
    answer = scores.gather(1, torch.from_numpy(search.answers).to(scores.device)[:, None])
    ranks = (scores >= answer).sum(dim=1)
    return 100 * float((1 / torch.log2(1 + ranks)).where(ranks <= DEPTH, 0.0).mean())


def candidates(vectors: torch.Tensor, texts: Texts, depth: int) -> Hits:
    """The passages of the pool that are nearest to each trained query, of its language, by rows of `texts`.

    `vectors` (2 * rows, dim) are unit vectors of all queries, then of all passages.
    """
    num_rows = len(texts.queries)
    found = Hits._make(np.zeros((len(texts.trained), depth), kind) for kind in HIT_TYPES)
    found.rows[:], found.scores[:] = NO_ROW, -np.inf
    for lang in LANGS:
        asked = np.flatnonzero(texts.langs[texts.trained] == lang)
        pool = texts.pool[texts.langs[texts.pool] == lang]
        queries, passages = vectors[texts.trained[asked]], vectors[num_rows + pool]
        places = search_on_gpu(queries.cpu().numpy(), passages, min(depth, len(pool)))
        scores = torch.einsum("qd,qkd->qk", queries, passages[torch.from_numpy(places).to(passages.device)])
        width = places.shape[1]
        found.rows[asked, :width], found.scores[asked, :width] = pool[places], scores.cpu().numpy()
        found.keys[asked, :width] = pool[places] + 1
    return best(found, depth)


def mined(hits: Hits, vectors: torch.Tensor, texts: Texts, rule: NegativeRule) -> Rows:
    """(trained, NEGATIVES) rows of the candidates that the rule takes, `NO_ROW` where it leaves too few."""
    rows = texts.trained
    answers = (vectors[rows] * vectors[len(texts.queries) + rows]).sum(dim=1)[:, None].cpu().numpy()
    unknown = np.zeros(len(rows), np.uint64)
    own = (rows + 1).astype(np.uint64)[:, None]
    return select(hits, Queries(unknown, unknown, own, np.zeros_like(own), answers), rule).hits.rows


def by_chance(pool: Rows, rows: Rows, langs: npt.NDArray[np.object_], seed: int) -> Rows:
    """(rows, NEGATIVES) of the pool, which the rows are of: others of the row's language."""
    rng = np.random.default_rng(seed)
    drawn = np.empty((len(rows), NEGATIVES), np.int64)
    for lang in LANGS:
        some, asked = np.sort(pool[langs[pool] == lang]), np.flatnonzero(langs[rows] == lang)
        steps = rng.integers(1, len(some), (len(asked), NEGATIVES))
        drawn[asked] = some[(np.searchsorted(some, rows[asked])[:, None] + steps) % len(some)]
    return drawn


def learned(setting: Setting, dataset: ContrastiveSet, seed: int, guided: bool = False) -> Weights:
    """The student's weights after one pass over the samples."""
    objective = ObjectiveConfig(guide=GuideConfig() if guided else None)
    config = TRAINING.model_copy(update={"seed": seed, "objective": objective})
    model = load_encoder(setting.student, default_device(), config)
    for _ in contrast(start_contrast(model, dataset, config), dataset, config):
        pass
    return weights_of(model)


def variants(setting: Setting, seed: int) -> Iterator[tuple[str, Callable[[Models], Weights]]]:
    """What is trained and merged, the most telling first; each may look at those before it."""
    questions, texts = setting.questions, setting.texts
    chance = by_chance(texts.pool, texts.trained, texts.langs, seed)

    def learn(dataset: ContrastiveSet, guided: bool = False) -> Callable[[Models], Weights]:
        return lambda _: learned(setting, dataset, seed, guided)

    def negatives(rows: Rows) -> ContrastiveSet:
        numbers = len(texts.queries) + np.where(rows == NO_ROW, chance, rows)
        return changed(questions, samples=np.concatenate([questions.samples, numbers], axis=1))

    yield "batch alone", learn(questions)
    yield "random", learn(negatives(chance))
    for name, rows in setting.negatives.items():
        yield name, learn(negatives(rows))
    yield f"{UNFILTERED}, guided", learn(negatives(setting.negatives[UNFILTERED]), guided=True)
    yield "translations", learn(setting.translations)
    parts = ("batch alone", "translations")
    yield "equal weights", lambda made: equal_weights(setting, [made[name] for name in parts])
    yield "Self Positioning", lambda made: self_positioned(setting, [made[name] for name in parts], seed)
    yield "guided", learn(questions, guided=True)
    wrong = with_noise(questions, seed)
    yield "wrong pairs", learn(wrong)
    yield "wrong pairs, guided", learn(wrong, guided=True)


def with_noise(questions: ContrastiveSet, seed: int) -> ContrastiveSet:
    """A share of the questions has another's passage, of its language."""
    samples, rng = questions.samples.copy(), np.random.default_rng(seed)
    for group in np.unique(questions.groups):
        rows = np.flatnonzero(questions.groups == group)
        chosen = rng.choice(rows, round(WRONG * len(rows)), replace=False)
        samples[chosen, 1] = samples[np.roll(chosen, 1), 1]
    return changed(questions, samples=samples)


def weights_of(model: torch.nn.Module) -> Weights:
    """Its parameters by name, as they are now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def untrained(setting: Setting) -> Weights:
    """The student's weights."""
    return weights_of(load_encoder(setting.student, default_device(), TRAINING))


def equal_weights(setting: Setting, models: Sequence[Weights]) -> Weights:
    """The uniform merge."""
    return task_arithmetic(untrained(setting), models, [1 / len(models)] * len(models))


def self_positioned(setting: Setting, models: Sequence[Weights], seed: int) -> Weights:
    """The merge found on the probe, with what jobs/merge.py does if it is told nothing."""
    config = POSITIONING.model_copy(update={"seed": seed})
    model = load_encoder(setting.student, default_device(), config)
    state = start_contrast(model, setting.probe, config)
    rate = config.optimizer.learning_rate
    optimizer = SelfPositioning(dict(model.named_parameters()), weights_of(model), models, rate)
    state.optimizer = optimizer
    for _ in contrast(state, setting.probe, config):
        pass
    print("merge weights", [f"{weight:.3f}" for weight in optimizer.weights.tolist()], flush=True)
    return weights_of(model)


def scored(setting: Setting, weights: Weights) -> dict[str, float]:
    """Means over languages."""
    model = load_encoder(setting.student, default_device(), TRAINING)
    model.load_state_dict(weights, strict=False)  # weights know no buffers
    encoder = Encoder.of(model.model)
    return {name: float(np.mean([ndcg(encoder, each) for each in some])) for name, some in setting.searches.items()}


def prepared(options: Namespace) -> Setting:
    """Texts in tokens, what is mined, and the guide's vectors."""
    share = QUICK_SHARE if options.quick else 1.0
    texts = read_texts(options.questions, share)
    sides = [("query", texts.queries), ("document", texts.passages)]
    encoders = {"student": Encoder.load(options.student), "teacher": Encoder.load(options.teacher)}
    tokens = {name: tokens_of(encoder, sides) for name, encoder in encoders.items()}
    vectors = {name: unit(encoder, tokens[name]) for name, encoder in encoders.items()}
    depth = max(rule.depth(1) for _, rule in MINERS.values())
    hits = {name: candidates(of_all, texts, depth) for name, of_all in vectors.items()}
    negatives = {name: mined(hits[by], vectors[by], texts, rule) for name, (by, rule) in MINERS.items()}
    trained, probe = (samples_of(tokens["student"], texts.langs, rows) for rows in (texts.trained, texts.probe))
    translations, probe_translations = read_translations(options.pairs, encoders["student"], share)
    print(f"{len(trained):,} questions, {len(texts.pool):,} passages, {len(translations):,} translations")
    for name, rows in negatives.items():
        print(f"{name}: {(rows == NO_ROW).mean():.1%} of the negatives are by chance, since the rule leaves too few")
    return Setting(
        options.student,
        texts,
        changed(trained, vectors={"guide": vectors["teacher"].cpu().numpy().astype(np.float16)}),
        joined(probe, probe_translations),
        translations,
        negatives,
        searches_of(texts, encoders["student"], options.root, share),
    )


def gains(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Points of nDCG@10 on the questions kept apart, by the seeds that both have."""

    def mean(name: str, num_seeds: int) -> float:
        return float(np.mean([scores["Questions"] for scores in runs[name][:num_seeds]]))

    both = {gain: min(len(runs.get(name, [])) for name in names) for gain, names in GAINS.items()}
    return {gain: mean(GAINS[gain][0], most) - mean(GAINS[gain][1], most) for gain, most in both.items() if most}


def main() -> None:
    """Train, merge, score, print and write."""
    options = parse()
    torch.backends.cuda.matmul.allow_tf32 = True
    end = time.monotonic() + 60 * options.minutes
    machine, setting = describe_machine(), prepared(options)
    runs: dict[str, list[dict[str, float]]] = {"untrained": [scored(setting, untrained(setting))]}
    for seed in range(options.seeds or (1 if options.quick else 3)):
        made: Models = {}
        for name, make in variants(setting, seed):
            if time.monotonic() > end:
                break
            made[name] = make(made)
            runs.setdefault(name, []).append(scored(setting, made[name]))
            print(f"seed {seed} · {name}: {runs[name][-1]}", flush=True)
            write_result(options.json, {"machine": machine, "runs": runs, "ratios": gains(runs)})
    Console(width=110).print(table_of("Over hundreds of steps", runs))
    Console().print_json(json.dumps(gains(runs)))


if __name__ == "__main__":
    main()
