"""Grafana's dashboards: `python cluster/monitoring/dashboards.py` writes dashboards/*.json, which are kept with it, and
alerts.yaml once more as prometheus-rule.yaml, the object that Prometheus' operator reads.

A panel is a title, a unit and its queries; where it stands and how it is drawn is the same for all.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

DIRECTORY = Path(__file__).parent / "dashboards"
WIDTH, HEIGHT, COLUMNS = 8, 7, 3
SOURCE = {"type": "prometheus", "uid": "${source}"}


class Panel(NamedTuple):
    """A graph."""

    title: str
    unit: str
    """As Grafana names it."""
    queries: dict[str, str]
    """PromQL by legend."""
    description: str = ""


class Dashboard(NamedTuple):
    """A page of graphs."""

    title: str
    variables: dict[str, str]
    """Label by name of the variable, whose values the metric after it has."""
    rows: dict[str, list[Panel]]


RUN = '{task=~"$task", run=~"$run"}'


def of_stage(metric: str) -> dict[str, str]:
    """What each stage of a run says of itself last."""
    return {"{{task}} {{stage}} {{run}}": f"max by (task, stage, run) (ray_embedlib_job_{metric}{RUN})"}


JOBS = Dashboard(
    "embedlib: jobs",
    {"task": "ray_embedlib_job_progress", "run": "ray_embedlib_job_progress"},
    {
        "Runs": [
            Panel("Done", "percentunit", of_stage("progress")),
            Panel("Time left", "s", of_stage("seconds_left"), "Of the stage."),
            Panel("Tokens", "tps", of_stage("tokens_per_second")),
            Panel("Loss", "none", of_stage("loss")),
            Panel("Validation", "none", of_stage("validation")),
            Panel("Recall of the index", "percentunit", of_stage("recall")),
            Panel("Padding", "percentunit", of_stage("padding_waste"), "Share of the tokens that models compute."),
            Panel(
                "Found in caches",
                "percentunit",
                of_stage("cache_hits"),
                "Share of the texts, or of a judge's pairs, not computed: an equal one was, or they were kept.",
            ),
            Panel(
                "Steps, texts or blocks",
                "ops",
                {
                    "{{task}} {{stage}} {{run}}": (
                        f"sum by (task, stage, run) (rate(ray_embedlib_job_steps_total{RUN}[5m]))"
                    )
                },
            ),
            Panel(
                "Found done",
                "short",
                {"{{task}} {{stage}} {{run}}": f"sum by (task, stage, run) (ray_embedlib_job_reused_total{RUN})"},
                "Work of an earlier run that this one did not do again.",
            ),
        ],
        "Cluster": [
            Panel("Nodes", "none", {"{{node_type}}": "sum by (node_type) (ray_cluster_active_nodes)"}),
            Panel("Tasks", "none", {"{{State}}": "sum by (State) (ray_tasks)"}),
            Panel("Actors", "none", {"{{State}}": "sum by (State) (ray_actors)"}),
            Panel("CPU", "percent", {"{{ip}}": "max by (ip) (ray_node_cpu_utilization)"}),
            Panel("GPU", "percent", {"{{ip}} {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gpus_utilization)"}),
            Panel("GPU memory", "decmbytes", {"{{ip}} {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gram_used)"}),
            Panel("Memory", "percentunit", {"{{ip}}": "max by (ip) (ray_node_mem_used / ray_node_mem_total)"}),
            Panel("Object store", "bytes", {"{{Location}}": "sum by (Location) (ray_object_store_memory)"}),
            Panel("Disk free", "bytes", {"{{ip}}": "min by (ip) (ray_node_disk_free)"}),
            Panel(
                "Network",
                "Bps",
                {
                    "{{ip}} sent": "max by (ip) (ray_node_network_send_speed)",
                    "{{ip}} received": "max by (ip) (ray_node_network_receive_speed)",
                },
            ),
            Panel("Spilled", "bytes", {"{{State}}": "sum by (State) (ray_spill_manager_objects_bytes)"}),
            Panel(
                "Scheduling, 99th percentile",
                "ms",
                {"": "histogram_quantile(0.99, sum by (le) (rate(ray_scheduler_placement_time_ms_bucket[5m])))"},
            ),
        ],
    },
)

MODEL = '{deployment=~"$deployment"}'


def quantiles(metric: str, of: str = "") -> dict[str, str]:
    """Median and 99th percentile of a histogram."""
    return {
        name: f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{of}[5m])))"
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


ENDPOINT = Dashboard(
    "embedlib: endpoint",
    {"deployment": "embedlib_tokens_total"},
    {
        "Requests": [
            Panel("Requests", "reqps", {"{{status}}": "sum by (status) (rate(embedlib_requests_total[5m]))"}),
            Panel("Time to answer", "s", quantiles("embedlib_request_seconds")),
            Panel("By client", "reqps", {"{{client}}": "sum by (client) (rate(embedlib_requests_total[5m]))"}),
            Panel(
                "Turned away", "reqps", {"{{deployment}}": "sum by (deployment) (rate(embedlib_overloaded_total[5m]))"}
            ),
            Panel(
                "Answered by another model",
                "reqps",
                {"{{model}}": "sum by (model) (rate(embedlib_fallbacks_total[5m]))"},
            ),
        ],
        "Models": [
            Panel("Replicas", "none", {"{{deployment}}": f"count by (deployment) (embedlib_queued_tokens{MODEL})"}),
            Panel(
                "Tokens that wait", "none", {"{{deployment}}": f"sum by (deployment) (embedlib_queued_tokens{MODEL})"}
            ),
            Panel("Tokens", "tps", {"{{deployment}}": f"sum by (deployment) (rate(embedlib_tokens_total{MODEL}[5m]))"}),
            Panel(
                "Texts", "ops", {"{{deployment}}": f"sum by (deployment) (rate(embedlib_sequences_total{MODEL}[5m]))"}
            ),
            Panel("Batches, full by", "percentunit", quantiles("embedlib_batch_fill", MODEL)),
            Panel("Batches, padding", "percentunit", quantiles("embedlib_padding_waste", MODEL)),
            Panel("Wait in the queue", "s", quantiles("embedlib_queue_age_seconds", MODEL)),
            Panel("Time of a batch", "s", quantiles("embedlib_batch_seconds", MODEL)),
            Panel("Time of a call", "s", quantiles("embedlib_latency_seconds", MODEL)),
        ],
        "Compressed against full": [
            Panel("Cosine of the two vectors", "none", quantiles("embedlib_drift_cosine")),
            Panel("Agreement of similarities", "none", {"Spearman": "avg(embedlib_drift_spearman)"}),
        ],
    },
)


def page(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in dashboard.rows.items():
        panels.append({"type": "row", "title": title, "gridPos": {"h": 1, "w": 24, "x": 0, "y": top}, "panels": []})
        for place, panel in enumerate(row):
            x, y = WIDTH * (place % COLUMNS), top + 1 + HEIGHT * (place // COLUMNS)
            panels.append(graph(panel) | {"gridPos": {"h": HEIGHT, "w": WIDTH, "x": x, "y": y}})
        top += 1 + HEIGHT * -(-len(row) // COLUMNS)
    return {
        "uid": dashboard.title.replace(": ", "-"),
        "title": dashboard.title,
        "tags": ["embedlib"],
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [datasource(), *(variable(*named) for named in dashboard.variables.items())]},
        "panels": [panel | {"id": number} for number, panel in enumerate(panels, 1)],
    }


def graph(panel: Panel) -> dict[str, Any]:
    """A panel without its place."""
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0 if panel.unit != "none" else None}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for number, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def datasource() -> dict[str, Any]:
    """Which Prometheus."""
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def variable(label: str, metric: str) -> dict[str, Any]:
    """A choice of the values of a label."""
    return {
        "name": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": f"label_values({metric}, {label})", "refId": label},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def pages() -> dict[Path, str]:
    """What is kept, by file."""
    return {
        DIRECTORY / name: json.dumps(page(dashboard), indent=1) + "\n"
        for name, dashboard in {"jobs.json": JOBS, "endpoint.json": ENDPOINT}.items()
    }


def rule() -> str:
    """alerts.yaml as the operator's object."""
    groups = yaml.safe_load((DIRECTORY.parent / "alerts.yaml").read_text())
    head = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "embedlib"}}
    return "# Written by dashboards.py out of alerts.yaml.\n" + yaml.safe_dump(head | {"spec": groups}, sort_keys=False)


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content)
    (DIRECTORY.parent / "prometheus-rule.yaml").write_text(rule())
