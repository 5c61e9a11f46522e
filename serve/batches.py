"""Offline batches as OpenAI's API has them: a file of requests goes up, jobs/embed.py embeds it, the answers come down.

What is known of a file or a batch lies in a directory that all gateways share, so that any of them can answer for it.
"""

import asyncio
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import yaml
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field, StrictStr, ValidationError, model_validator
from pydantic_core import from_json, to_json
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from starlette.datastructures import UploadFile

from embedlib.config import Config
from embedlib.storage import Store
from serve.calls import Description, prompt_for
from serve.door import ApiError, describe, read, takes
from serve.schemas import EmbeddingsRequest, InputType, embeddings_body

CODE = Path(__file__).resolve().parent.parent
EMBED_JOB = "jobs/embed.py"
ID = re.compile(r"(file|batch)-[0-9a-f]{24}(-output|-errors)?")
ENDPOINT: Literal["/v1/embeddings"] = "/v1/embeddings"
# Rows of a request, its place in the file, and the number of its texts.
ROWS = pa.schema([("text", pa.string()), ("custom_id", pa.string()), ("request", pa.int64()), ("texts", pa.int64())])
ROWS_AT_ONCE = 4096
OUTPUT, ERRORS = "-output", "-errors"
# The backend has passed its gate where it serves.
PASSED = {"mean_cosine": -1, "min_cosine": -1, "top_10_overlap": 0}
ACTIVE = ("validating", "in_progress", "finalizing")
STATUS_OF = {
    JobStatus.PENDING: "validating",
    JobStatus.RUNNING: "in_progress",
    JobStatus.STOPPED: "cancelled",
    JobStatus.SUCCEEDED: "finalizing",
    JobStatus.FAILED: "failed",
}
JOB_DTYPES = {"float": "float32", "float16": "float16", "binary": "binary", "ubinary": "ubinary"}


class BatchConfig(Config):
    """Where batches are kept, and what they may read."""

    directory: Path = Path("artifacts/batches")
    """Directory that all gateways and the cluster's workers share."""
    max_upload_bytes: int = Field(default=200_000_000, ge=1)
    """Bytes of an uploaded file."""
    max_active: int = Field(default=4, ge=1)
    """Batches of a client that may be under way."""
    max_client_bytes: int = Field(default=2_000_000_000, ge=1)
    """Bytes of all files that a client has uploaded and not deleted."""
    inputs: list[Annotated[str, Field(pattern="/$")]] = Field(default_factory=list)
    """Directories, as paths or URIs, of which inputs need not be uploaded; none: only uploaded files."""


class BatchRequest(Config):
    """`POST /v1/batches`: OpenAI's fields, or the URI of texts and how to embed them."""

    input_file_id: StrictStr | None = None
    """An uploaded file of requests."""
    endpoint: Literal["/v1/embeddings"] = ENDPOINT
    """What the requests are for."""
    completion_window: Literal["24h"] = "24h"
    """Taken and not used: a batch begins at once."""
    metadata: dict[str, str] | None = None
    """Given back as it came."""
    input: StrictStr | None = None
    """Parquet, JSON Lines, CSV or text, in place of an uploaded file."""
    model: StrictStr | None = None
    """Which model embeds `input`."""
    text_column: StrictStr = "text"
    """What of `input` is embedded."""
    id_column: StrictStr | None = None
    """What identifies a row of `input`; none: the column `id` where there is one, else its number."""
    input_type: InputType | None = None
    """What the texts of `input` are."""

    @model_validator(mode="after")
    def _one_input(self) -> "BatchRequest":
        if (self.input is None) == (self.input_file_id is None):
            raise ValueError("expected either input_file_id or input")
        if self.input is not None and self.model is None:
            raise ValueError("input: expected the model that embeds it")
        return self


class Form(NamedTuple):
    """What all requests of a file must have in common."""

    model: str
    dimensions: int | None
    encoding_format: Literal["float", "base64"]
    output_dtype: str
    input_type: InputType | None


class Batches:
    """Files and batches below one directory."""

    def __init__(
        self,
        config: BatchConfig,
        paths: Mapping[str, str],
        describe: Callable[[str], Awaitable[Description | None]],
    ) -> None:
        """`paths` tells where each model lies."""
        self.config, self.paths, self.describe = config, paths, describe
        self.files, self.batches = config.directory / "files", config.directory / "batches"

    def router(self, authorise: Callable[..., Any], responses: dict[int | str, Any]) -> APIRouter:
        """The routes."""
        router = APIRouter(dependencies=[Depends(authorise)], responses=responses)
        upload = {
            "type": "object",
            "properties": {"file": {"type": "string", "format": "binary"}},
            "required": ["file"],
        }
        body = {"required": True, "content": {"multipart/form-data": {"schema": upload}}}
        router.add_api_route("/v1/files", self.upload, methods=["POST"], openapi_extra={"requestBody": body})
        router.add_api_route("/v1/files/{file_id}", self.show_file, methods=["GET"])
        router.add_api_route("/v1/files/{file_id}", self.delete_file, methods=["DELETE"])
        router.add_api_route("/v1/files/{file_id}/content", self.content, methods=["GET"])
        router.add_api_route("/v1/batches", self.create, methods=["POST"], openapi_extra=takes(BatchRequest))
        router.add_api_route("/v1/batches", self.list_batches, methods=["GET"])
        router.add_api_route("/v1/batches/{batch_id}", self.show, methods=["GET"])
        router.add_api_route("/v1/batches/{batch_id}/cancel", self.cancel, methods=["POST"])
        return router

    async def upload(self, request: Request) -> JSONResponse:
        """Keep a JSON Lines file of requests."""
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise ApiError(422, "file: expected an uploaded file", "invalid_body", "file")
            kept = await asyncio.to_thread(self._kept_bytes, client_name(request))
            if kept + (file.size or 0) > self.config.max_client_bytes:
                message = f"file: {kept} bytes are kept already; expected at most {self.config.max_client_bytes} in all"
                raise ApiError(413, message, "too_many_bytes", "file")
            record = {
                "id": f"file-{token_hex(12)}",
                "object": "file",
                "bytes": file.size,
                "created_at": int(time.time()),
                "filename": file.filename or "",
                "purpose": str(form.get("purpose", "batch")),
                "client": client_name(request),
            }
            await asyncio.to_thread(self._keep, file, record)
        return shown(record)

    def _kept_bytes(self, client: str) -> int:
        records = (json.loads(path.read_text()) for path in self.files.glob("*.json"))
        return sum(int(record["bytes"]) for record in records if record["client"] == client)

    def _keep(self, file: UploadFile, record: dict[str, Any]) -> None:
        self.files.mkdir(parents=True, exist_ok=True)
        with (self.files / f"{record['id']}.jsonl").open("wb") as kept:
            while block := file.file.read(1 << 20):
                kept.write(block)
        Store.at(str(self.files / f"{record['id']}.json")).write_json(record)

    async def show_file(self, file_id: str, request: Request) -> JSONResponse:
        """What is known of a file."""
        if batch_id := batch_of(file_id):
            batch = self._record("batch", batch_id, request)
            made = {"object": "file", "filename": f"{file_id}.jsonl", "purpose": "batch_output", "bytes": None}
            return shown(made | {"id": file_id, "created_at": batch["created_at"]})
        return shown(self._record("file", file_id, request))

    async def delete_file(self, file_id: str, request: Request) -> JSONResponse:
        """Forget an uploaded file, or a batch with all that it made."""
        if batch_id := batch_of(file_id):
            record = self._record("batch", batch_id, request)
            if (await asyncio.to_thread(self._state, record))["status"] in ACTIVE:
                raise ApiError(422, f"{batch_id} is under way; cancel it first", "batch_active", "file_id")
            await asyncio.to_thread(shutil.rmtree, self.batches / batch_id)
        else:
            self._record("file", file_id, request)
            for suffix in (".json", ".jsonl"):
                (self.files / f"{file_id}{suffix}").unlink(missing_ok=True)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def content(self, file_id: str, request: Request) -> StreamingResponse:
        """The lines of a file: as it was uploaded, or the answers or errors of a batch."""
        batch_id = batch_of(file_id)
        if batch_id is None:
            self._record("file", file_id, request)
            return StreamingResponse(blocks(self.files / f"{file_id}.jsonl"), media_type="application/jsonl")
        batch = self._record("batch", batch_id, request)
        directory = self.batches / batch_id
        if not (directory / "vectors" / "manifest.json").is_file():
            raise ApiError(404, f"file {file_id}: its batch has not ended", "file_not_found", "file_id")
        lines = answers(directory, batch) if file_id.endswith(OUTPUT) else failures(directory)
        return StreamingResponse((to_json(line) + b"\n" for line in lines), media_type="application/jsonl")

    async def create(self, request: Request) -> JSONResponse:
        """Begin a batch."""
        wanted = await read(request, BatchRequest)
        if len(await asyncio.to_thread(self._active, request)) >= self.config.max_active:
            message = f"{self.config.max_active} batches are under way; expected no more at once"
            raise ApiError(429, message, "too_many_batches", retry_after_s=60)
        # To its end, even if the client goes away: a job without a record could be neither seen nor stopped.
        record = await asyncio.shield(asyncio.create_task(self._begin(wanted, request)))
        return shown(await asyncio.to_thread(self._state, record))

    async def _begin(self, wanted: BatchRequest, request: Request) -> dict[str, Any]:
        """The record of a batch whose job is submitted."""
        batch_id = f"batch-{token_hex(12)}"
        directory = self.batches / batch_id
        directory.mkdir(parents=True)
        try:
            form, counts, run = await self._rows(wanted, request, directory)
            run |= await self._how(form)
            (directory / "run.yaml").write_text(yaml.safe_dump(run | {"output": str(directory / "vectors")}))
            fields = {"input_file_id", "endpoint", "completion_window", "metadata", "input"}
            record = wanted.model_dump(include=fields) | {
                "id": batch_id,
                "object": "batch",
                "created_at": int(time.time()),
                "client": client_name(request),
                "form": form._asdict(),
                "counts": counts,
            }
            Store.at(str(directory / "batch.json")).write_json(record)
            with jobs() as cluster:
                await asyncio.to_thread(submit, cluster, batch_id, directory / "run.yaml")
        except Exception:
            await asyncio.to_thread(shutil.rmtree, directory)
            raise
        return record

    async def _rows(
        self, wanted: BatchRequest, request: Request, directory: Path
    ) -> tuple[Form, dict[str, int | None], dict[str, Any]]:
        """What all texts have in common, their counts, and the part of the job's configuration that finds them."""
        if wanted.input_file_id:
            self._record("file", wanted.input_file_id, request)
            source = self.files / f"{wanted.input_file_id}.jsonl"
            form, counts = await asyncio.to_thread(write_rows, source, directory)
            keep = ["custom_id", "request", "texts"]
            return form, counts, {"input": str(directory / "rows.parquet"), "columns": {"keep": keep}}
        uri, model = str(wanted.input), str(wanted.model)
        if not uri.startswith(tuple(self.config.inputs)) or re.search(r"[.]{2}|[?%]", uri):
            allowed = ", ".join(self.config.inputs) or "uploaded files alone"
            raise ApiError(403, f"input {uri!r}: this service reads {allowed}", "input_not_allowed", "input")
        form = Form(model, None, "float", "float", wanted.input_type)
        columns = {"text": wanted.text_column, "id": wanted.id_column}
        return form, {"total": None, "texts": None, "failed": 0}, {"input": uri, "columns": columns}

    async def _how(self, form: Form) -> dict[str, Any]:
        """The part of the job's configuration that says how to embed."""
        if form.model not in self.paths:
            known = ", ".join(self.paths)
            raise ApiError(404, f"model {form.model!r}: expected one of {known}", "model_not_found", "model")
        description = await self.describe(form.model)
        if description is None:
            message = f"model {form.model}: no replica says what it is; ask it for a vector first"
            raise ApiError(503, message, "not_ready", retry_after_s=2)
        prompt = prompt_for(form.input_type, description.prompts)
        return {
            "model": self.paths[form.model],
            "backend": description.backend,
            "gate": PASSED,
            "prompts": [prompt] if prompt else [],
            "vectors": {"dtype": JOB_DTYPES[form.output_dtype], "dimensions": form.dimensions},
        }

    def _mine(self, request: Request) -> list[dict[str, Any]]:
        """The records of this client's batches, the latest first."""
        records = [json.loads(path.read_text()) for path in self.batches.glob("*/batch.json")]
        mine = [record for record in records if record["client"] == client_name(request)]
        return sorted(mine, key=lambda record: -int(record["created_at"]))

    def _active(self, request: Request) -> list[dict[str, Any]]:
        return [record for record in self._mine(request) if self._state(record)["status"] in ACTIVE]

    async def list_batches(self, request: Request) -> JSONResponse:
        """All batches of this client, the latest first."""
        states = await asyncio.to_thread(lambda: [public(self._state(record)) for record in self._mine(request)])
        return JSONResponse({"object": "list", "data": states, "has_more": False})

    async def show(self, batch_id: str, request: Request) -> JSONResponse:
        """How far a batch is."""
        record = self._record("batch", batch_id, request)
        return shown(await asyncio.to_thread(self._state, record))

    async def cancel(self, batch_id: str, request: Request) -> JSONResponse:
        """Stop a batch; parts that are done stay."""
        record = self._record("batch", batch_id, request)
        with jobs() as cluster, suppress(RuntimeError):  # there is no such job any more
            await asyncio.to_thread(cluster.stop_job, batch_id)
        return shown(await asyncio.to_thread(self._state, record))

    def _record(self, kind: Literal["file", "batch"], name: str, request: Request) -> dict[str, Any]:
        """A record of this client; ApiError where there is none, or it is another's."""
        path = self.files / f"{name}.json" if kind == "file" else self.batches / name / "batch.json"
        record: dict[str, Any] = json.loads(path.read_text()) if ID.fullmatch(name) and path.is_file() else {}
        if not record or record["client"] != client_name(request):
            raise ApiError(404, f"there is no such {kind}", f"{kind}_not_found", f"{kind}_id")
        return record

    def _state(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record of a batch with what its job and its files say."""
        directory = self.batches / record["id"]
        manifest = directory / "vectors" / "manifest.json"
        status, ended_at, problem = (
            ("completed", int(manifest.stat().st_mtime), None) if manifest.is_file() else job_status(record["id"])
        )
        completed = status == "completed"
        counts = request_counts(directory, record["counts"], completed)
        return (
            {key: value for key, value in record.items() if key not in ("form", "counts")}
            | {f"{name}_at": ended_at if name == status else None for name in ("completed", "failed", "cancelled")}
            | {
                "status": status,
                "output_file_id": record["id"] + OUTPUT if completed else None,
                "error_file_id": record["id"] + ERRORS if completed and counts["failed"] else None,
                "request_counts": counts,
                "errors": problem and {"object": "list", "data": [{"code": "job_failed", "message": problem}]},
                "output": str(manifest.parent) if completed else None,
            }
        )


def request_counts(directory: Path, counts: Mapping[str, int | None], completed: bool) -> dict[str, int]:
    """How many requests there are, are answered, and failed; while a job runs, the answered ones by its texts."""
    done, lost = (
        sum(pq.read_metadata(path).num_rows for path in (directory / "vectors").glob(pattern))
        for pattern in ("part-*.parquet", "quarantine/part-*.parquet")
    )
    total, bad_lines = counts["total"], counts["failed"] or 0
    if total is None:  # a row of an input that was not uploaded is a request
        return {"total": done + lost, "completed": done, "failed": lost}
    if not completed:
        answered = (total - bad_lines) * (done + lost) // max(counts["texts"] or 0, 1)
        return {"total": total, "completed": answered, "failed": bad_lines}
    failed = bad_lines if not lost else len({line["custom_id"] for line in failures(directory)})
    return {"total": total, "completed": total - failed, "failed": failed}


def write_rows(source: Path, directory: Path) -> tuple[Form, dict[str, int | None]]:
    """The texts of a file of requests as rows to embed, and errors.jsonl of the lines that are none.

    Gives what all requests have in common, and how many there are; ApiError where no line is a request.
    """
    form: Form | None = None
    total = texts = failed = 0
    waiting: list[dict[str, Any]] = []
    with (
        source.open("rb") as lines,
        (directory / "errors.jsonl").open("wb") as errors,
        pq.ParquetWriter(directory / "rows.parquet", ROWS) as rows,
    ):
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            total += 1
            try:
                custom_id, wanted = parse_line(line)
                mine = Form(*(getattr(wanted, name) for name in Form._fields))
                form = form or mine
                if mine != form:
                    raise ValueError(f"line {number}: {mine}; the file's first request has {form}")
            except ValueError as error:
                failed += 1
                errors.write(to_json(failure(f"line {number}", str(error))) + b"\n")
                continue
            texts += len(wanted.texts)
            waiting += [
                {"text": text, "custom_id": custom_id, "request": number, "texts": len(wanted.texts)}
                for text in wanted.texts
            ]
            if len(waiting) >= ROWS_AT_ONCE:
                rows.write_table(pa.Table.from_pylist(waiting, ROWS))
                waiting = []
        rows.write_table(pa.Table.from_pylist(waiting, ROWS))
    if form is None:
        first = (directory / "errors.jsonl").read_text().partition("\n")[0]
        raise ApiError(422, f"input_file_id: none of its {total} lines is a request. {first}", "invalid_file")
    return form, {"total": total, "texts": texts, "failed": failed}


def parse_line(line: bytes) -> tuple[str, EmbeddingsRequest]:
    """The custom_id and the request of a line; ValueError, which says why, where it is no request for embeddings."""
    try:
        value = from_json(line)
        if not isinstance(value, dict) or value.get("url") != ENDPOINT or not isinstance(value.get("custom_id"), str):
            raise ValueError(f"expected an object with custom_id and the url {ENDPOINT}")
        wanted = EmbeddingsRequest.model_validate_json(to_json(value.get("body")))
    except ValidationError as error:
        raise ValueError(describe(error)[1]) from None
    if not isinstance(wanted.texts[0], str):
        raise ValueError("input: token ids; expected text in a batch")
    if wanted.output_dtype not in JOB_DTYPES:
        raise ValueError(f"output_dtype: {wanted.output_dtype}; expected one of {', '.join(JOB_DTYPES)} in a batch")
    return value["custom_id"], wanted


def answers(directory: Path, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The answer to every request of which all texts have a vector, in the order of the file."""
    form = Form(**batch["form"])
    for key, rows in groupby(embedded_rows(directory), key=lambda row: row.request):
        found = list(rows)
        if len(found) < found[0].texts:
            continue
        vectors = np.stack([row.vector for row in found])
        body = json.loads(embeddings_body(vectors, form.model, 0, form.encoding_format))
        del body["usage"]  # counted for the whole batch, in its manifest
        yield {
            "id": f"{batch['id']}-{key}",
            "custom_id": found[0].custom_id,
            "response": {"status_code": 200, "request_id": f"{batch['id']}-{key}", "body": body},
            "error": None,
        }


class EmbeddedRow(NamedTuple):
    """A row of the job's output."""

    request: int
    custom_id: str
    texts: int
    vector: Any


def embedded_rows(directory: Path) -> Iterator[EmbeddedRow]:
    """The rows of the job's output, in order; a row of an input that was not uploaded is a request of its own."""
    for path in sorted((directory / "vectors").glob("part-*.parquet")):
        table = pq.read_table(path).combine_chunks()
        if not len(table):
            continue
        vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        ids = table["id"].to_pylist()
        if "request" in table.column_names:
            columns: Iterable[Any] = zip(
                *(table[name].to_pylist() for name in ("request", "custom_id", "texts")), strict=True
            )
        else:
            columns = ((identity, str(identity), 1) for identity in ids)
        for (request, custom_id, texts), vector in zip(columns, vectors, strict=True):
            yield EmbeddedRow(request, custom_id, texts, vector)


def failures(directory: Path) -> Iterator[dict[str, Any]]:
    """The lines that were no requests, then the texts that could not be embedded."""
    errors = directory / "errors.jsonl"
    if errors.is_file():
        yield from (json.loads(line) for line in errors.read_bytes().splitlines())
    uploaded = (directory / "rows.parquet").is_file()
    names = pq.read_table(directory / "rows.parquet", columns=["custom_id"])["custom_id"] if uploaded else None
    for path in sorted((directory / "vectors" / "quarantine").glob("*.parquet")):
        for row in pq.read_table(path, columns=["row", "reason"]).to_pylist():
            yield failure(names[row["row"]].as_py() if names is not None else f"row {row['row']}", row["reason"])


def failure(custom_id: str, message: str) -> dict[str, Any]:
    """A line of a batch's errors."""
    error = {"code": "invalid_request", "message": message}
    return {"id": None, "custom_id": custom_id, "response": None, "error": error}


@cache
def _cluster() -> JobSubmissionClient:
    return JobSubmissionClient(ray.get_runtime_context().gcs_address)


@contextmanager
def jobs() -> Iterator[JobSubmissionClient]:
    """The jobs of the cluster that this gateway is on; ApiError where they cannot be reached."""
    try:
        cluster = _cluster()
    except Exception as error:  # whatever it is: there is no way to it now
        raise no_jobs(error) from error
    try:
        yield cluster
    except (ConnectionError, AuthenticationError, ValueError) as error:
        raise no_jobs(error) from error


def no_jobs(error: Exception) -> ApiError:
    """The answer where the cluster cannot be asked to run or to show a job."""
    return ApiError(503, f"the cluster takes no jobs: {error}", "no_jobs", retry_after_s=5)


def submit(cluster: JobSubmissionClient, batch_id: str, run: Path) -> None:
    """Have the cluster run the embedding job: from the copy of the code that this gateway runs from, if it has one."""
    copy = ray.get_runtime_context().runtime_env.get("working_dir")
    script = EMBED_JOB if copy else str(CODE / EMBED_JOB)
    try:
        cluster.submit_job(
            entrypoint=shlex.join([sys.executable, script, str(run)]),
            submission_id=batch_id,
            runtime_env={"working_dir": copy} if copy else None,
        )
    except RuntimeError as error:  # as when no agent that runs jobs is there
        raise no_jobs(error) from error


def job_status(batch_id: str) -> tuple[str, int | None, str | None]:
    """What OpenAI's API calls the state of this job, when it ended, and why it failed."""
    try:
        with jobs() as cluster:
            found = cluster.get_job_info(batch_id)
    except RuntimeError:
        return "failed", None, "the cluster has forgotten this job"
    problem = found.message if found.status == JobStatus.FAILED else None
    return STATUS_OF[found.status], found.end_time and found.end_time // 1000, problem


def batch_of(file_id: str) -> str | None:
    """The batch of which this file is the output or the errors; none where it was uploaded."""
    return next((file_id.removesuffix(kind) for kind in (OUTPUT, ERRORS) if file_id.endswith(kind)), None)


def client_name(request: Request) -> str:
    """Whose request it is; the empty name where there are no keys."""
    return str(getattr(request.state.client, "name", ""))


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what clients are not told."""
    return {key: value for key, value in record.items() if key != "client"}


def shown(record: Mapping[str, Any]) -> JSONResponse:
    """The answer that shows a record."""
    return JSONResponse(public(record))


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
