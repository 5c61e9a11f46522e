"""The base of every configuration: frozen, no unknown keys, the docstring under a field is its description."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen set of values that refuses unknown keys, so that a misspelt option cannot pass unseen."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
