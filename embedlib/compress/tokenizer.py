"""Prune a fast tokenizer to chosen pieces; a Unigram one falls back to bytes, so that no text becomes `<unk>`.

The new vocabulary is the kept pieces in the order given, then, for Unigram, `<0x00>` … `<0xFF>`. Scores are copied
unchanged, so a text whose pieces were all kept is cut as before. Fallback is all or nothing: with one byte missing,
characters that need it become `<unk>` again.

Traps that this file answers, each with its test:

- The text `<0x41>` would match the byte piece of that name, and `</s>` the special token. A last pre-tokenizer isolates
  the `<` of such literals, so that they are cut into ordinary pieces.
- The library takes special tokens out of a text *before* any pre-tokenizer, as the teacher's does. To have them read as
  text set `tokenizer.encode_special_tokens = True`; in `tokenizer_config.json` that is `"split_special_tokens": true`.
- An unknown character costs ten less than the lowest score, so a path of several rare pieces can lose to it. Byte
  pieces have so low a score that a known path always wins.
- `unk_id` must stay set: the library refuses to encode without it, though the token is never emitted.
- WordPiece has no byte fallback: a word with an uncovered character is one `[UNK]`, as in the teacher.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import Model, Unigram, WordPiece

from embedlib.errors import ArtifactError

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# f64 keeps teacher scores exact beside it, and it outweighs 5,000 characters of the lowest score (about -20) in XLM-R.
BYTE_SCORE = -1e5


class Pieces(NamedTuple):
    """What a tokenizer's model knows, by id."""

    kind: str
    """`Unigram` or `WordPiece`."""
    texts: list[str]
    """Every piece by id; WordPiece continuations begin with `continuation`."""
    scores: list[float]
    """Log-probabilities by id; zeros for WordPiece."""
    unknown: int
    """Id of `<unk>` or `[UNK]`."""
    specials: tuple[int, ...]
    """Ids of the added tokens, ascending."""
    continuation: str
    """What marks a piece inside a word: `##` for WordPiece, nothing for Unigram."""
    max_word_length: int
    """Longer words are unknown to WordPiece; 0 is no limit."""

    @property
    def falls_back_to_bytes(self) -> bool:
        """Whether pruning gives this kind of model 256 byte pieces."""
        return self.kind == "Unigram"


@lru_cache(maxsize=4)
def read_pieces(tokenizer: Tokenizer) -> Pieces:
    """The pieces of a Unigram or WordPiece tokenizer; ArtifactError for any other model or a damaged vocabulary.

    Remembered by tokenizer, whose pieces do not change: parsing 250,000 of them takes seconds.
    """
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    specials = tuple(sorted(token["id"] for token in state["added_tokens"]))
    if model["type"] == "Unigram":
        texts = [text for text, _ in model["vocab"]]
        scores = [score for _, score in model["vocab"]]
        continuation, longest, unknown = "", 0, model["unk_id"]
        if unknown is None:
            raise ArtifactError("tokenizer model Unigram: unk_id is null; expected the id of the unknown piece")
    elif model["type"] == "WordPiece":
        texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
        if [model["vocab"][text] for text in texts] != list(range(len(texts))):
            raise ArtifactError("tokenizer model WordPiece: ids have gaps; expected 0 … n-1")
        scores = [0.0] * len(texts)
        continuation, longest = model["continuing_subword_prefix"], model["max_input_chars_per_word"]
        unknown = model["vocab"].get(model["unk_token"])
        if unknown is None:
            raise ArtifactError(f"tokenizer model WordPiece: unk_token {model['unk_token']!r} is not in the vocabulary")
    else:
        raise ArtifactError(f"tokenizer model {model['type']}: cannot be pruned; expected Unigram or WordPiece")
    beyond = [token["content"] for token in state["added_tokens"] if token["id"] >= len(texts)]
    if beyond:
        raise ArtifactError(
            f"tokenizer added_tokens {beyond}: not in the model's vocabulary; expected them among its pieces"
        )
    return Pieces(model["type"], texts, scores, unknown, specials, continuation, longest)


def build_model(pieces: Pieces, kept_ids: Sequence[int]) -> Model:
    """The model with only `kept_ids`, renumbered in their order; Unigram ends with the 256 byte pieces."""
    texts = [pieces.texts[index] for index in kept_ids]
    unknown = texts.index(pieces.texts[pieces.unknown])
    if pieces.kind == "WordPiece":
        return WordPiece(
            {text: index for index, text in enumerate(texts)},
            unk_token=pieces.texts[pieces.unknown],
            continuing_subword_prefix=pieces.continuation,
            max_input_chars_per_word=pieces.max_word_length,
        )
    vocabulary = [(pieces.texts[index], pieces.scores[index]) for index in kept_ids]
    return Unigram(vocabulary + [(piece, BYTE_SCORE) for piece in BYTE_PIECES], unknown, byte_fallback=True)


def prune_tokenizer(tokenizer: Tokenizer, kept_ids: Sequence[int]) -> Tokenizer:
    """The tokenizer with only `kept_ids`, renumbered in their order, then for Unigram the 256 byte pieces.

    Added tokens outside `kept_ids` (such as `<mask>`) are gone. Raises ArtifactError for a model other than Unigram or
    WordPiece, or where `kept_ids` lacks the unknown token or one that the post-processor inserts.
    """
    pieces = read_pieces(tokenizer)
    new_ids = {pieces.texts[old]: new for new, old in enumerate(kept_ids)}
    if pieces.texts[pieces.unknown] not in new_ids:
        raise ArtifactError(f"kept_ids: lacks {pieces.texts[pieces.unknown]!r}, the model's unknown token")
    state = json.loads(tokenizer.to_str())
    state["model"] = json.loads(Tokenizer(build_model(pieces, kept_ids)).to_str())["model"]
    state["added_tokens"] = sorted(
        (token | {"id": new_ids[token["content"]]} for token in state["added_tokens"] if token["content"] in new_ids),
        key=lambda token: int(token["id"]),
    )
    state["post_processor"] = _renumber(state["post_processor"], new_ids)
    state["padding"] = state["truncation"] = None
    if pieces.falls_back_to_bytes:
        literals = [re.escape(token["content"][1:]) for token in state["added_tokens"] if token["content"][0] == "<"]
        split = {
            "type": "Split",
            "pattern": {"Regex": f"<(?={'|'.join(['0x', *literals])})"},
            "behavior": "Isolated",
            "invert": False,
        }
        before = [state["pre_tokenizer"]] if state["pre_tokenizer"] else []
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*before, split]}
        after = [state["decoder"]] if state["decoder"] else [{"type": "Fuse"}]
        state["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, *after]}
    return Tokenizer.from_str(json.dumps(state))


def _renumber(processor: Any, new_ids: dict[str, int]) -> Any:
    """The post-processor's JSON with the special tokens' new ids, through any Sequence."""
    if processor is None:
        return None
    try:
        if processor["type"] == "Sequence":
            return processor | {"processors": [_renumber(inner, new_ids) for inner in processor["processors"]]}
        if processor["type"] == "TemplateProcessing":
            specials = {
                name: token | {"ids": [new_ids[text] for text in token["tokens"]]}
                for name, token in processor["special_tokens"].items()
            }
            return processor | {"special_tokens": specials}
        pairs = {
            role: [processor[role][0], new_ids[processor[role][0]]] for role in ("cls", "sep") if role in processor
        }
        return processor | pairs
    except KeyError as error:
        raise ArtifactError(f"kept_ids: lacks {error}, which the post-processor inserts") from error


def fallback_texts(teacher: Tokenizer, pruned: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Positions of the texts that `teacher` knows wholly and `pruned` can only spell with bytes or as unknown."""
    unknown = read_pieces(teacher).unknown
    unspelt = {pruned.token_to_id(piece) for piece in BYTE_PIECES} | {read_pieces(pruned).unknown}
    return [
        position
        for position, (old, new) in enumerate(
            zip(teacher.encode_batch_fast(list(texts)), pruned.encode_batch_fast(list(texts)), strict=True)
        )
        if unknown not in old.ids and not unspelt.isdisjoint(new.ids)
    ]
