"""How fast replicas follow the load: nothing, then more than one replica can do, then nothing again.

    python -m benchmarks.serve_scaling --student artifacts/demo/student [--quick] [--json OUT] [--plot OUT.png]

Every second the number of replicas and the tokens that wait are read from the endpoint's own metrics.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.command import benchmark_parser, read_texts, write_result
from benchmarks.machine import describe_machine
from benchmarks.serve import ROOT, Server, application, running

HIGH_S, QUICK_HIGH_S = 40.0, 20.0
CALM_S = 60.0
DOWNSCALE_DELAY_S = 10.0
UNDER_WAY, TEXTS = 32, 64
NUM_TEXTS, SAMPLE_TEXTS = 2000, 500
MAX_REPLICAS, TARGET_TOKENS = 2, 1024
URL = "http://127.0.0.1:8000"


def main() -> None:
    """Run the steps and draw them."""
    parser = benchmark_parser("Replicas of a model while load comes and goes.", "a short step")
    parser.add_argument("--student", type=Path, required=True, help="the model, as artifacts/demo/student")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="where to draw replicas and waiting tokens by time")
    options = parser.parse_args()
    high_s = QUICK_HIGH_S if options.quick else HIGH_S
    with tempfile.TemporaryDirectory() as folder:
        texts, config = Path(folder) / "texts.json", Path(folder) / "serve.yaml"
        lines = read_texts(options.corpus, NUM_TEXTS + SAMPLE_TEXTS)
        texts.write_text(json.dumps(lines[:NUM_TEXTS]))
        sample = Path(folder) / "sample.parquet"
        pq.write_table(pa.table({"text": lines[NUM_TEXTS:]}), sample)
        model = {"path": str(options.student.absolute()), "num_threads": 1, "max_replicas": MAX_REPLICAS}
        model |= {"target_tokens": TARGET_TOKENS, "downscale_delay_s": DOWNSCALE_DELAY_S}
        config.write_text(
            yaml.safe_dump(
                application(
                    "serve.app:build_app", {"models": {"compressed": model}, "sample": str(sample), "gateways": 1}
                )
            )
        )
        command = [str(ROOT / "cluster" / "local.sh"), "serve", "run", str(config)]
        with running(Server("scaling", command, 8000, {}, "/ready")):
            samples = watch(texts, high_s)
    ups = [at for at, replicas, _ in samples if at > 0 and replicas >= MAX_REPLICAS]
    downs = [at for at, replicas, _ in samples if at > high_s and replicas <= 1]
    ratios = {
        "seconds_to_scale_up": ups[0] if ups else None,
        "seconds_to_scale_down": downs[0] - high_s if downs else None,
    }
    print(json.dumps(ratios, indent=2))
    if options.plot:
        draw(samples, high_s, options.plot)
    write_result(options.json, {"machine": describe_machine(), "runs": samples, "ratios": ratios})


def watch(texts: Path, high_s: float) -> list[tuple[float, int, float]]:
    """Seconds since the load began, replicas and waiting tokens, before, during and after it."""
    begun = time.monotonic() + 5.0

    def load() -> None:
        time.sleep(5.0)
        command = [sys.executable, "-m", "benchmarks.load", f"{URL}/v1/embeddings", str(texts)]
        command += ["--seconds", str(high_s), "--under-way", str(UNDER_WAY), "--texts", str(TEXTS)]
        command += ["--body", json.dumps({"model": "compressed", "encoding_format": "base64"})]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # noqa: S603

    thread = threading.Thread(target=load)
    thread.start()
    samples = []
    while time.monotonic() < begun + high_s + CALM_S:
        waiting = queued_tokens()
        samples.append((time.monotonic() - begun, len(waiting), sum(waiting)))
        time.sleep(1.0)
    thread.join()
    return samples


def queued_tokens() -> list[float]:
    """The tokens that wait at each replica."""
    with urllib.request.urlopen(f"{URL}/metrics", timeout=30) as response:  # noqa: S310
        families = text_string_to_metric_families(response.read().decode())
    return [sample.value for family in families if family.name == "embedlib_queued_tokens" for sample in family.samples]


def draw(samples: list[tuple[float, int, float]], high_s: float, path: Path) -> None:
    """Replicas and waiting tokens by time, the loaded part shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    seconds = [at for at, _, _ in samples]
    above.step(seconds, [replicas for _, replicas, _ in samples], where="post")
    above.set_ylabel("replicas")
    above.set_yticks(range(MAX_REPLICAS + 2))
    below.plot(seconds, [waiting for _, _, waiting in samples])
    below.set_ylabel("waiting tokens")
    below.set_xlabel("seconds since the load began")
    for axes in (above, below):
        axes.axvspan(0, high_s, alpha=0.15)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
