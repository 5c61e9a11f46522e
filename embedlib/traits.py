"""What an encoder has to know of a model besides its weights and its tokenizer."""

from embedlib.config import Config

# Where an exported model has them.
TOKENIZER_NAME, TRAITS_NAME = "tokenizer.json", "traits.json"


class Traits(Config):
    """Traits of a sentence-transformers model."""

    embedding_dim: int
    """Elements of a vector."""
    max_seq_length: int
    """Tokens that are read of a text."""
    num_parameters: int
    """Weights, embeddings included."""
    normalises: bool
    """Whether its vectors have length one."""
    prompts: dict[str, str]
    """Prefixes of texts by name."""
    pad_token_id: int
    """What fills up short sequences."""
    unknown_token_id: int | None
    """What stands for what the vocabulary lacks."""
    splits_special_tokens: bool
    """Whether a special token that is typed in a text is text."""
