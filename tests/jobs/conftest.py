"""An object store: a server that speaks S3, with one bucket."""

import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from embedlib.storage import Store


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of an object in a bucket, to format with its key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(["moto_server", "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output) as server,
    ):
        while not answers(port):
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        uri = f"s3://user:secret@bucket/{{}}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        Store.at(uri.format("") + "&allow_bucket_creation=true").filesystem.create_dir("bucket")
        yield uri
        server.terminate()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
