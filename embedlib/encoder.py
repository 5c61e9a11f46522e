"""Encoder: tokenise → token-budget batches → forward → pool → normalise.

PyTorch, transformers and sentence-transformers, whose import takes most of a process' start, are imported where they
compute the model; an exported model does without.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from embedlib.batching import TokenIds, padded_size, token_budget_batches
from embedlib.errors import ConfigError
from embedlib.memory import keep_freed_memory
from embedlib.threads import cores
from embedlib.traits import Traits

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

# Texts whose lengths are sorted together: enough to fill batches of one length, few enough to stream.
WINDOW = 8192
# Tokens a forward. On CPUs larger batches fall out of the caches; on GPUs smaller ones leave it idle.
CPU_BATCH_TOKENS = 1536
CUDA_BATCH_TOKENS = 65536
# Fewer tokens than that are not worth a thread of their own.
LEAST_BATCH_TOKENS = 256
CPU_DESCRIPTION = Path("/proc/cpuinfo")
# How the tokenizer tells of truncation that keeps the beginning.
WHOLE_START = {"stride": 0, "strategy": "longest_first", "direction": "right"}

Vectors = npt.NDArray[np.float32]


class Backend(Protocol):
    """What multiplies: the forward of a model in some runtime and arithmetic."""

    @property
    def name(self) -> str:
        """Runtime and arithmetic, as in `torch-bfloat16`."""
        ...

    @property
    def max_threads(self) -> int:
        """How many calls at once are worth making."""
        ...

    @property
    def pads(self) -> bool:
        """Whether the sequences of a batch are filled up to the longest, and not laid end to end."""
        ...

    def pooled(self, batches: Sequence[Sequence[TokenIds]]) -> Vectors:
        """Vectors (sequences, embedding_dim) before normalisation, batch after batch, each sorted by length."""
        ...


def device_type(device: "torch.device | str") -> str:
    """Its kind: cpu, cuda."""
    return str(device).partition(":")[0]


def fast_dtype(device: "torch.device | str") -> "torch.dtype":
    """The arithmetic of `fast_arithmetic`."""
    import torch

    dtype: torch.dtype = getattr(torch, fast_arithmetic(device))
    return dtype


def fast_arithmetic(device: "torch.device | str") -> str:
    """bfloat16 where the hardware multiplies it faster than float32, else float16 on GPUs and float32 on CPUs.

    On Linux's CPUs it is found without PyTorch, which takes seconds and memory to import.
    """
    if device_type(device) == "cuda":
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if cpu_features() & {"avx512_bf16", "amx_bf16"} else "float32"


def cpu_features() -> set[str]:
    """The instructions that this machine's CPU has beyond the basic ones, as Linux and PyTorch name them."""
    if CPU_DESCRIPTION.exists():
        return set(CPU_DESCRIPTION.read_text().split())
    import torch

    # Sizes of caches and the architecture's name are among them.
    return {name for name, there in torch.cpu.get_capabilities().items() if there is True}


def default_device() -> "torch.device":
    """The CUDA device where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_prompts(texts: Sequence[str], prefixes: Sequence[str], first: int = 0) -> list[str]:
    """Each text with one of the prefixes before it, in turn; `first` is the number of the first text."""
    return (
        [prefixes[number % len(prefixes)] + text for number, text in enumerate(texts, first)]
        if prefixes
        else list(texts)
    )


class Encoder:
    """A sentence-transformers model that encodes many texts with little padding, on one device."""

    def __init__(self, tokenizer: Tokenizer, traits: Traits, backend: Backend, device: "torch.device | str") -> None:
        """`tokenizer` may be that of a model which others call as well, at other times."""
        self.on_gpu, self.backend, self.tokenizer = device_type(device) == "cuda", backend, tokenizer
        if not self.on_gpu:
            keep_freed_memory()
        self.prompts, self.unknown_token_id = traits.prompts, traits.unknown_token_id
        self.embedding_dim, self.max_seq_length = traits.embedding_dim, traits.max_seq_length
        self.num_parameters, self.normalises = traits.num_parameters, traits.normalises
        self.batch_tokens = CUDA_BATCH_TOKENS if self.on_gpu else CPU_BATCH_TOKENS
        self.tokenizer.encode_special_tokens = traits.splits_special_tokens
        self._ready_tokenizer()

    @classmethod
    def of(cls, model: "SentenceTransformer", dtype: "torch.dtype | None" = None) -> Self:
        """An encoder that computes `model`, on its device, in PyTorch; `dtype` defaults to float32."""
        from embedlib.torch_model import TorchBackend, tokenizer_of, traits_of

        return cls(tokenizer_of(model), traits_of(model), TorchBackend(model, dtype), model.device)

    @classmethod
    def load(
        cls, directory: Path, device: "torch.device | str | None" = None, dtype: "torch.dtype | None" = None
    ) -> Self:
        """Load a sentence-transformers directory of safetensors weights; `dtype` defaults to the fast one."""
        from embedlib.torch_model import load_model

        device = device or default_device()
        return cls.of(load_model(directory, device), dtype or fast_dtype(device))

    @property
    def model(self) -> "SentenceTransformer":
        """The model that PyTorch computes; other backends have none."""
        return self.backend.model  # type: ignore[attr-defined,no-any-return]

    @property
    def body(self) -> "PreTrainedModel":
        """Its transformer body."""
        from embedlib.torch_model import body_of

        return body_of(self.model)

    @cached_property
    def whole_texts(self) -> Tokenizer:
        """The tokenizer that cuts nothing; a large one takes memory, so it is made where long texts are looked at."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self.tokenizer.encode_special_tokens  # which no string keeps
        return tokenizer

    def prompt(self, name: str | None) -> str:
        """The prefix called `name`; ConfigError where the model has no such prompt."""
        if name is None:
            return ""
        if name not in self.prompts:
            raise ConfigError(f"prompt {name!r}: this model has {sorted(self.prompts)}")
        return self.prompts[name]

    def _ready_tokenizer(self) -> None:
        """Cut at the model's length and do not pad: states of the tokenizer, which the model's own call sets, too."""
        if self.tokenizer.padding is not None:
            self.tokenizer.no_padding()
        if self.tokenizer.truncation != WHOLE_START | {"max_length": self.max_seq_length}:
            self.tokenizer.enable_truncation(self.max_seq_length)

    def tokenise(self, texts: Sequence[str], prompt_name: str | None = None) -> list[TokenIds]:
        """Token ids of each text with the prompt before it, cut at the model's length."""
        prefix = self.prompt(prompt_name)
        self._ready_tokenizer()
        encodings = self.tokenizer.encode_batch_fast([prefix + text for text in texts])
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode(self, texts: Sequence[str], prompt_name: str | None = None) -> Vectors:
        """Vectors (len(texts), embedding_dim) float32 in the order of the texts, as `SentenceTransformer.encode` gives.

        Equal texts are computed once.
        """
        unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        vectors = np.empty((len(unique), self.embedding_dim), dtype=np.float32)
        start = 0
        for tokens in self._tokenised_windows(list(unique), prompt_name):
            vectors[start : start + len(tokens)] = self.encode_tokens(tokens)
            start += len(tokens)
        return vectors if len(unique) == len(texts) else vectors[[unique[text] for text in texts]]

    def _tokenised_windows(self, texts: Sequence[str], prompt_name: str | None) -> Iterator[list[TokenIds]]:
        windows = [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)]
        if not self.on_gpu:
            # Nothing would overlap: both want the same cores.
            yield from (self.tokenise(window, prompt_name) for window in windows)
            return
        with ThreadPoolExecutor(max_workers=1) as ahead:
            following = ahead.submit(self.tokenise, windows[0] if windows else [], prompt_name)
            for window in [*windows[1:], []]:
                tokens, following = following.result(), ahead.submit(self.tokenise, window, prompt_name)
                yield tokens

    def encode_tokens(self, tokens: Sequence[TokenIds], normalise: bool | None = None) -> Vectors:
        """Vectors (len(tokens), embedding_dim) float32 of token sequences that hold their prompt already.

        `normalise=False` gives them as pooled, before normalisation, True as unit vectors, None as the model does.
        """
        normalise = self.normalises if normalise is None else normalise
        if not tokens:
            return np.empty((0, self.embedding_dim), np.float32)
        batches = self._batches(lengths_of(tokens))
        pooled = self.backend.pooled([[tokens[row] for row in batch] for batch in batches])
        if normalise:
            pooled /= np.linalg.norm(pooled, axis=1, keepdims=True).clip(1e-12)
        return np.asarray(pooled[np.argsort(np.concatenate(batches))])

    def num_computed(self, tokens: Sequence[TokenIds]) -> int:
        """Tokens that `encode_tokens` computes for these, padding included."""
        lengths = lengths_of(tokens)
        return padded_size(lengths, self._batches(lengths)) if self.backend.pads else int(lengths.sum())

    def _batches(self, lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        share = int(lengths.sum()) // min(self.backend.max_threads, cores())
        budget = min(self.batch_tokens, max(LEAST_BATCH_TOKENS, share))
        return list(token_budget_batches(lengths, budget))


def lengths_of(tokens: Sequence[TokenIds]) -> npt.NDArray[np.int64]:
    """Tokens of each sequence."""
    return np.array([len(sequence) for sequence in tokens], np.int64)
