"""Dashboards and alerts ask for what is exported, each query parses, and the alerts fire when they should."""

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from jobs.metrics import COUNTERS, GAUGES
from serve.metrics import GatewayMetrics, ModelMetrics
from tests.cluster.conftest import CLUSTER, REPOSITORY, Started
from tests.cluster.test_kuberay import SECRETS

MONITORING = CLUSTER / "monitoring"
# The head writes it: who exports, for Prometheus. In /tmp/ray lies a link to that of the machine's youngest cluster.
DISCOVERY = "/tmp/ray/{session}/prom_metrics_service_discovery.json"  # noqa: S108
# Prometheus' own, of every target.
OWN = {"up"}
WORKLOAD = """
import ray, time
ray.init()
@ray.remote
class Counter:
    def one(self): return 1
counter = Counter.remote()
ray.get([counter.one.remote(), ray.remote(lambda: ray.put(bytes(10**7))).remote()])
time.sleep(12)
print("session:", ray.get_runtime_context().get_session_name())
"""


def metric_names(query: str) -> set[str]:
    """The metrics that a query asks for; an error where it does not parse."""
    return set(selected(promql_parser.parse(query)))


def selected(node: Any) -> Iterator[str]:
    """Names of all selectors below a node of the syntax tree."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector.name
    for name in ("lhs", "rhs", "expr", "args", "param"):
        below = getattr(node, name, None)
        for each in below if isinstance(below, list) else [below] if below is not None else []:
            yield from selected(each)


def dashboard_queries() -> list[str]:
    found = []
    for path in sorted((MONITORING / "dashboards").glob("*.json")):
        page = json.loads(path.read_text())
        found += [target["expr"] for panel in page["panels"] for target in panel.get("targets", [])]
    return found


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def sample_names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture(scope="module")
def exported(local_cluster: Started) -> set[str]:
    """Names that a running cluster exports, the endpoint's registries have, and jobs/metrics.py declares.

    tests/jobs/test_job_metrics.py shows that Ray exports the last, tests/serve that the endpoint has its own.
    """
    done = local_cluster.run("ray", "job", "submit", "--", "python", "-c", WORKLOAD)
    assert done.returncode == 0, done.stdout + done.stderr
    session = re.search(r"session: (session_[\w-]+)", done.stdout)
    assert session, done.stdout
    names = set(OWN)
    for target in json.loads(Path(DISCOVERY.format(session=session[1])).read_text())[0]["targets"]:
        names |= sample_names(httpx2.get(f"http://{target}/metrics", timeout=10).text)
    models, gateway = ModelMetrics(CollectorRegistry()), GatewayMetrics(CollectorRegistry())
    for metric in [*models.collect(), *gateway.collect()]:
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        names |= {metric.name + suffix for suffix in suffixes}
    names |= {f"ray_embedlib_job_{name}" for name in GAUGES} | {f"ray_embedlib_job_{name}_total" for name in COUNTERS}
    return names | occasional_names()


def occasional_names() -> set[str]:
    """What Ray's agents export of GPUs, which this machine may not have, and of nodes when one has failed."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {f"ray_{name}" for name in METRICS_GAUGES if any(word in name for word in ("gpu", "gram", "failed"))}


@pytest.mark.ray
def test_every_query_asks_for_what_is_exported(exported: set[str]) -> None:
    queries = dashboard_queries() + [rule["expr"] for rule in alert_rules()]
    assert len(queries) > 40
    asked = set().union(*map(metric_names, queries))
    assert asked - exported == set()


@pytest.mark.ray
def test_a_metric_that_nobody_exports_is_seen(exported: set[str]) -> None:
    assert metric_names("sum(rate(embedlib_request_total[5m])) / ray_nodes") - exported == {
        "embedlib_request_total",
        "ray_nodes",
    }


def test_a_query_that_does_not_parse_is_seen() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        metric_names("sum(rate(embedlib_requests_total[5m])")


def test_dashboards_are_what_their_code_writes() -> None:
    pages = runpy.run_path(str(MONITORING / "dashboards.py"))["pages"]()
    assert {path: path.read_text() for path in pages} == pages


@pytest.mark.parametrize("path", sorted((MONITORING / "dashboards").glob("*.json")), ids=lambda path: path.stem)
def test_panels_do_not_overlap_and_variables_exist(path: Path) -> None:
    page = json.loads(path.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in page["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
    known = {variable["name"] for variable in page["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(page["panels"]))) <= known


def test_every_alert_leads_to_what_to_do() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for rule in alert_rules():
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert path == "docs/operations.md"
        assert anchor in headings, rule["alert"]


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("no promtool (Debian's package prometheus has it): that alerts fire is not tested")
    shutil.copy(MONITORING / "alerts.yaml", tmp_path / "alerts-under-test.yaml")
    shutil.copy(Path(__file__).parent / "alerts.yaml", tmp_path)
    subprocess.run(["promtool", "test", "rules", "alerts.yaml"], cwd=tmp_path, check=True)
    subprocess.run(["promtool", "check", "config", MONITORING / "prometheus.yaml"], check=True)


def test_the_operator_gets_the_same_rules_and_the_same_names() -> None:
    written = runpy.run_path(str(MONITORING / "dashboards.py"))["rule"]()
    assert (MONITORING / "prometheus-rule.yaml").read_text() == written
    rule = yaml.safe_load(written)
    assert rule["kind"] == "PrometheusRule"
    assert [each for group in rule["spec"]["groups"] for each in group["rules"]] == alert_rules()
    monitors = list(yaml.safe_load_all((MONITORING / "pod-monitor.yaml").read_text()))
    names = [
        each["replacement"]
        for monitor in monitors
        for endpoint in monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
        for each in endpoint["relabelings"]
        if each["targetLabel"] == "job"
    ]
    assert names == ["ray", "embedlib-endpoint"]
    (endpoint,) = monitors[1]["spec"]["endpoints"]
    wanted = endpoint["authorization"]["credentials"]
    assert wanted["key"] in SECRETS[wanted["name"]], "an endpoint with keys tells strangers nothing"


def test_scraping_covers_every_port_that_exports() -> None:
    scraped = {
        job["job_name"] for job in yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    }
    asked = {name for rule in alert_rules() for name in re.findall(r'up\{job="([^"]+)"\}', rule["expr"])}
    assert asked == scraped
