"""A YAML file and dotted overrides to a validated configuration: `python jobs/x.py run.yaml --section.key value`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from embedlib.config import Config
from embedlib.errors import ConfigError, EmbedlibError

C = TypeVar("C", bound=Config)


def read_config(
    config_type: type[C], arguments: Sequence[str], default_run: Path | None = None, first: str | None = None
) -> C:
    """The configuration of `arguments`: an optional YAML file first, then overrides, which win.

    With `first`, a first word that is no option is the value of this field, and there are no YAML files.

    Raises ConfigError naming each key that is unknown or cannot hold its value.
    """
    overrides = list(arguments)
    if first and overrides and not overrides[0].startswith("-"):
        overrides.insert(0, f"--{first}")
    run = Path(overrides.pop(0)) if overrides and not overrides[0].startswith("-") else default_run
    values = read_run(run) if run else {}
    settings_type: Any = type(
        config_type.__name__,
        (config_type, BaseSettings),
        {
            "__doc__": config_type.__doc__,
            # A variable of the environment that happens to be called `seed` or `output` is no option.
            "settings_customise_sources": classmethod(lambda cls, settings_cls, init_settings, **_: (init_settings,)),
            "model_config": SettingsConfigDict(
                cli_prog_name=f"python jobs/{Path(sys.argv[0]).name} [{first.upper() if first else 'RUN.yaml'}]",
                cli_implicit_flags=True,
                cli_avoid_json=True,
                cli_hide_none_type=True,
                nested_model_default_partial_update=True,
            ),
        },
    )
    try:
        settings = CliApp.run(settings_type, cli_args=overrides, **values)
        return config_type.model_validate(settings.model_dump())
    except ValidationError as error:
        raise ConfigError(describe(error)) from error
    except SettingsError as error:
        raise ConfigError(str(error)) from error


def read_run(path: Path) -> dict[str, Any]:
    """The values of a run file; ConfigError where it is missing or not a YAML mapping."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"run file {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"run file {path}: holds {type(values).__name__}; expected a mapping of keys to values")
    return values


def describe(error: ValidationError) -> str:
    """One line a problem: key, value and what was expected. What concerns several keys names them itself."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['input']!r}: {problem['msg']}"
        if problem["loc"]
        else str(problem["msg"])
        for problem in error.errors()
    )


def run_job(
    config_type: type[C], main: Callable[[C], Any], default_run: Path | None = None, first: str | None = None
) -> None:
    """Run `main` with the command line's configuration; an embedlib error ends the process with one clear line."""
    try:
        main(read_config(config_type, sys.argv[1:], default_run, first))
    except EmbedlibError as error:
        sys.exit(f"{type(error).__name__}: {error}")
