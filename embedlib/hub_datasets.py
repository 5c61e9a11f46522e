"""Files of a hub's datasets, fetched once into the hub's own cache: `hub:OWNER/NAME@REVISION/PATTERN`."""

import re
from pathlib import Path

from embedlib.errors import ConfigError

SCHEME = "hub:"
ADDRESS = re.compile(r"hub:(?P<name>[\w.\-]+/[\w.\-]+)(@(?P<revision>[\w.\-]+))?(/(?P<pattern>.+))?")
# Scripts that build a dataset are code, and no code of a hub is run.
DATA_FILES = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.csv", "*.csv.gz", "*.tsv", "*.txt", "*.txt.gz", "*.tmx")


def downloaded(address: str) -> str:
    """The path, or glob, of the files that `address` names, downloaded if they are not there.

    Raises ConfigError for an address of another form, and where the hub does not give the dataset or has no such files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise ConfigError(
            f"path: {address!r}; expected hub:OWNER/NAME, hub:OWNER/NAME/PATTERN or hub:OWNER/NAME@REVISION/…"
        )
    pattern = parts["pattern"]
    try:
        folder = snapshot_download(
            parts["name"],
            repo_type="dataset",
            revision=parts["revision"],
            allow_patterns=[pattern] if pattern else list(DATA_FILES),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"path: {address!r}: no dataset that the hub gives ({type(error).__name__}); without a hub use local files"
        ) from error
    found = [file for file in Path(folder).rglob("*") if file.is_file()]
    if not found:
        raise ConfigError(f"path: {address!r}: the dataset has no file {pattern or ' or '.join(DATA_FILES)}")
    return str(Path(folder) / pattern) if pattern else folder
