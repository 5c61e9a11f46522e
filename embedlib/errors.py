"""Every error embedlib raises on purpose.

EmbedlibError
├── ConfigError     a value the user chose cannot work: names the key, the value and what was expected
├── DataError       a corpus, vector file or text cannot be used: names the file, the column or row, and the reason
├── GateError       a model does not reach what was required of it: names the requirement, the score and the model
└── ArtifactError   a model or data directory is missing, foreign, damaged or of another fingerprint
"""


class EmbedlibError(Exception):
    """Base of every error embedlib raises on purpose."""


class ConfigError(EmbedlibError):
    """A value the user chose cannot work."""


class DataError(EmbedlibError):
    """A corpus, vector file or text cannot be used."""


class GateError(EmbedlibError):
    """A model does not reach what was required of it."""


class ArtifactError(EmbedlibError):
    """A model or data directory is missing, foreign, damaged or of another fingerprint."""
