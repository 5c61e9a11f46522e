"""Choose which of a teacher's pieces a student keeps, and make the student's embedding rows from the teacher's.

The choice is the Unigram trainer's pruning loop, on the texts the student is for. Dropping a piece costs its count
times the tokens that spelling it otherwise adds. The cheapest goes first and hands its count to the pieces that spell
it, so that `organ` and `ization` grow dear while rarer words made of them go. Everything is counted again after each
round, since words shift more than a piece's own spelling tells.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from tokenizers import Tokenizer
from tokenizers.models import Model

from embedlib.compress.tokenizer import BYTE_PIECES, BYTE_SCORE, Pieces, build_model, read_pieces
from embedlib.config import Config
from embedlib.errors import ArtifactError, ConfigError, DataError

ByteMethod = Literal["mean", "characters", "fit", "similar"]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
RIDGE = 1e-3


class VocabularyConfig(Config):
    """How large the student's vocabulary is and what it is chosen for."""

    size: int = Field(default=15_424, gt=0)
    """Pieces in all: specials, the 256 byte pieces of a Unigram tokenizer, characters and longer pieces."""
    character_coverage: float = Field(default=0.999, gt=0, le=1)
    """Share of each language's characters, by occurrence, that must keep a piece of their own."""
    temperature: float = Field(default=0.3, ge=0, le=1)
    """A language weighs (share of tokens)**temperature: 0 is the same for all, 1 as the texts have them."""
    prior: float = Field(default=0.2, ge=0, lt=1)
    """Weight of the teacher's own log-probabilities against the counts, for a small or narrow corpus."""
    rounds: int = Field(default=3, ge=1)
    """Prune-and-recount rounds, each closing the same ratio between the used pieces and `size`."""
    dropped_specials: tuple[str, ...] = ("<mask>",)
    """Added tokens that an encoder of texts has no use for."""
    new_pieces: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Languages that the teacher splits badly, and how many pieces a Unigram model of each one's texts may have. Those
    the teacher lacks stand for choice beside its own; `size` stays what it is. Said in no manifest where there are
    none."""


class KeptVocabulary(NamedTuple):
    """The chosen pieces, and what the choice costs on the texts it was made for."""

    ids: tuple[int, ...]
    """Teacher ids in the student's order: specials, then ascending; new pieces' ids are past the teacher's last. The
    byte pieces follow and are not listed."""
    num_bytes: int
    """Byte pieces after the ids: 256 for Unigram, 0 for WordPiece."""
    num_mandatory: int
    """Pieces that no budget may drop: specials, bytes and covering characters."""
    num_new: int
    """Pieces that the teacher lacks, the last of `ids`."""
    growth: dict[str, float]
    """Tokens relative to the teacher's, minus one, by language."""
    coverage: dict[str, float]
    """Share of characters, by occurrence, with a piece of their own, by language."""
    unknown: dict[str, float]
    """Share of words, by occurrence, with bytes or an unknown token, by language."""

    @property
    def size(self) -> int:
        """Rows of the student's embedding."""
        return len(self.ids) + self.num_bytes

    @property
    def old_ids(self) -> tuple[int, ...]:
        """Those of `ids` that the teacher has."""
        return self.ids[: len(self.ids) - self.num_new]

    @property
    def mean_growth(self) -> float:
        """Growth averaged over the languages."""
        return sum(self.growth.values()) / len(self.growth)


class _Words(NamedTuple):
    """Every distinct pre-tokenized word, and how often each language has it."""

    words: list[str]
    counts: dict[str, tuple[Ints, Floats]]
    """Per language: indices of its words, and their occurrences."""

    def per_language(self, values: Floats | Ints) -> dict[str, float]:
        """Sum over each language's words of `values` (words,), by occurrence."""
        return {language: float(values[at] @ count) for language, (at, count) in self.counts.items()}


def choose_pieces(
    teacher: Tokenizer,
    texts_by_language: Mapping[str, Sequence[str]],
    config: VocabularyConfig,
    grown: Tokenizer | None = None,
) -> KeptVocabulary:
    """The `config.size` pieces that keep the texts short; prompts must be in the texts already.

    `grown` is the teacher's tokenizer with further pieces after its own (`growth.py`), from which to choose as well.
    Raises DataError where a language has no text, ConfigError where `size` is below what must be kept or above what
    the teacher has, ArtifactError where the tokenizer's model is neither Unigram nor WordPiece.
    """
    tokenizer = grown or teacher
    pieces = read_pieces(tokenizer)
    counted = _count_words(teacher, texts_by_language)
    specials = [index for index in pieces.specials if pieces.texts[index] not in config.dropped_specials]
    occurrences = _count_characters(counted)
    characters = _covering_characters(pieces, occurrences, config.character_coverage)
    mandatory = [*specials, *sorted(characters.difference(specials))]
    num_bytes = len(BYTE_PIECES) if pieces.falls_back_to_bytes else 0
    minimum = len(mandatory) + num_bytes
    removable = sorted(set(range(len(pieces.texts))).difference(mandatory, pieces.specials, _byte_ids(pieces).values()))
    if not minimum <= config.size <= minimum + len(removable):
        raise ConfigError(
            f"vocabulary.size: {config.size}; expected {minimum} to {minimum + len(removable)}: {len(specials)} "
            f"specials, {num_bytes} bytes and {len(mandatory) - len(specials)} characters must be kept "
            f"for character_coverage {config.character_coverage}"
        )

    prior_words, prior_weights = _prior(pieces, characters, config.prior)
    words = counted.words + prior_words
    lengths, ids_in_words = _segment(tokenizer.model, words)
    teacher_tokens = counted.per_language(lengths if tokenizer is teacher else _segment(teacher.model, words)[0])
    weights = _word_weights(counted, teacher_tokens, config.temperature)
    weights = np.concatenate([weights * (1 - prior_weights.sum()), prior_weights])
    counts = _count_pieces(lengths, ids_in_words, weights, len(pieces.texts))
    budget = config.size - minimum
    excess = max(1.0, np.count_nonzero(counts[removable]) / max(1, budget))
    chosen = removable
    for remaining in reversed(range(config.rounds)):
        chosen = _prune(pieces, mandatory, chosen, counts, round(budget * excess ** (remaining / config.rounds)))
        kept = [*specials, *sorted({*mandatory, *chosen}.difference(specials))]
        lengths, ids_in_words = _segment(build_model(pieces, kept), words)
        counts = np.zeros(len(pieces.texts))
        counts[kept] = _count_pieces(lengths, ids_in_words, weights, len(kept) + num_bytes)[: len(kept)]

    lost = (ids_in_words >= len(kept)) | (ids_in_words == kept.index(pieces.unknown))
    lost_words = np.bincount(np.repeat(np.arange(len(words)), lengths), lost, len(words)) > 0
    student_tokens = counted.per_language(lengths)
    num_words, num_lost = counted.per_language(np.ones(len(words))), counted.per_language(lost_words.astype(np.float64))
    single = {pieces.texts[index] for index in kept}
    return KeptVocabulary(
        ids=tuple(kept),
        num_bytes=num_bytes,
        num_mandatory=minimum,
        num_new=sum(index >= len(read_pieces(teacher).texts) for index in kept),
        growth={language: student_tokens[language] / teacher_tokens[language] - 1 for language in counted.counts},
        coverage={
            language: sum(count for text, count in seen.items() if text in single) / seen.total()
            for language, seen in occurrences.items()
        },
        unknown={language: num_lost[language] / num_words[language] for language in counted.counts},
    )


def _count_words(tokenizer: Tokenizer, texts_by_language: Mapping[str, Sequence[str]]) -> _Words:
    """Count whitespace words, then pre-tokenize each distinct one, which is many times cheaper than every text."""
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    index: dict[str, int] = {}
    counts = {}
    for language, texts in texts_by_language.items():
        chunks = Counter(
            chunk for text in texts for chunk in (normalizer.normalize_str(text) if normalizer else text).split()
        )
        if not chunks:
            raise DataError(f"texts: none for language {language!r}; expected at least one for every language")
        occurrences: Counter[str] = Counter()
        for chunk, count in chunks.items():
            for word, _ in pre_tokenizer.pre_tokenize_str(chunk) if pre_tokenizer else [(chunk, None)]:
                occurrences[word] += count
        at = np.array([index.setdefault(word, len(index)) for word in occurrences], np.int64)
        counts[language] = at, np.array(list(occurrences.values()), np.float64)
    return _Words(list(index), counts)


def _segment(model: Model, words: list[str]) -> tuple[Ints, Ints]:
    """Number of pieces of every word (words,) and all ids, one word after another."""
    encodings = Tokenizer(model).encode_batch_fast(words, add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    return np.array([len(word) for word in ids], np.int64), np.fromiter((i for word in ids for i in word), np.int64)


def _count_pieces(lengths: Ints, ids_in_words: Ints, weights: Floats, size: int) -> Floats:
    """Weighted occurrences of every piece (size,)."""
    return np.bincount(ids_in_words, np.repeat(weights, lengths), size).astype(np.float64)


def _word_weights(counted: _Words, tokens: Mapping[str, float], temperature: float) -> Floats:
    """Weight of every word (words,): with these, all pieces' counts sum to 1 and languages are smoothed."""
    weights = np.zeros(len(counted.words))
    for language, (at, count) in counted.counts.items():
        weights[at] += count * tokens[language] ** (temperature - 1)
    smoothed: Floats = weights / sum(total**temperature for total in tokens.values())
    return smoothed


def _prior(pieces: Pieces, characters: set[int], share: float) -> tuple[list[str], Floats]:
    """The teacher's pieces as words of a general corpus, as often as its log-probabilities say; weights sum to `share`.

    Only pieces spelt with the languages' characters count: the teacher's probabilities are of all its languages.
    """
    if not share or not any(pieces.scores):
        return [], np.zeros(0)
    alphabet = {pieces.texts[index] for index in characters}
    known = [
        index for index, text in enumerate(pieces.texts) if index not in pieces.specials and alphabet.issuperset(text)
    ]
    weights = np.exp(np.array([pieces.scores[index] for index in known]))
    return [pieces.texts[index] for index in known], share * weights / weights.sum()


def _count_characters(counted: _Words) -> dict[str, Counter[str]]:
    """Occurrences of every character, by language."""
    characters: dict[str, Counter[str]] = {}
    for language, (at, count) in counted.counts.items():
        seen = characters[language] = Counter()
        for position, times in zip(at.tolist(), count.tolist(), strict=True):
            for character in counted.words[position]:
                seen[character] += times
    return characters


def _covering_characters(pieces: Pieces, occurrences: Mapping[str, Counter[str]], share: float) -> set[int]:
    """Ids of the single characters (WordPiece: and their continuations) that cover `share` of what has a piece."""
    ids = {text: index for index, text in enumerate(pieces.texts)}
    kept: set[int] = set()
    for seen in occurrences.values():
        known = [(text, count) for text, count in seen.most_common() if text in ids]
        missing = share * sum(count for _, count in known)
        for text, count in known:
            if missing <= 0:
                break
            missing -= count
            kept.update(ids[form] for form in (text, pieces.continuation + text) if form in ids)
    return kept


def _prune(pieces: Pieces, mandatory: list[int], candidates: list[int], counts: Floats, budget: int) -> list[int]:
    """The `budget` candidates left when the piece whose loss costs the fewest tokens goes first, again and again.

    Unused candidates are no burden and stay as spellings until one is handed a count, when they compete too.
    """
    known = {pieces.texts[index]: index for index in (*mandatory, *candidates)}
    worth = counts.tolist()
    removable = set(candidates)
    spell = _spell_unigram if pieces.falls_back_to_bytes else _spell_wordpiece
    used = [index for index in candidates if worth[index] > 0]
    num_used = len(used)
    heap = [(0.0, index) for index in used]
    while num_used > budget:
        cost, index = heapq.heappop(heap)
        spelling, num_tokens = spell(pieces, known, pieces.texts[index])
        current = worth[index] * (num_tokens - 1)
        if current > cost and heap and current > heap[0][0]:
            heapq.heappush(heap, (current, index))
            continue
        del known[pieces.texts[index]]
        removable.discard(index)
        num_used -= 1
        for part in spelling:
            if worth[part] == 0 and part in removable:
                heapq.heappush(heap, (0.0, part))
                num_used += 1
            worth[part] += worth[index]
    return sorted(removable, key=lambda index: (worth[index] == 0, -pieces.scores[index]))[:budget]


def _spell_unigram(pieces: Pieces, known: Mapping[str, int], text: str) -> tuple[list[int], int]:
    """The likeliest other spelling of `text` by known pieces: their ids, and the tokens with bytes for what is left."""
    scores, length = pieces.scores, len(text)
    best = [0.0] + [-np.inf] * length
    origin: list[tuple[int, int | None]] = [(0, None)] * (length + 1)
    for end in range(1, length + 1):
        for start in range(end == length and length > 1, end):
            index = known.get(text[start:end]) if length > 1 else None
            if index is None and start < end - 1:
                continue
            score = best[start] + (BYTE_SCORE if index is None else scores[index])
            if score > best[end]:
                best[end], origin[end] = score, (start, index)
    spelling, num_tokens, end = [], 0, length
    while end:
        start, index = origin[end]
        if index is None:
            num_tokens += len(text[start:end].encode())
        else:
            spelling.append(index)
            num_tokens += 1
        end = start
    return spelling, num_tokens


def _spell_wordpiece(pieces: Pieces, known: Mapping[str, int], text: str) -> tuple[list[int], int]:
    """The longest-first other spelling of `text`; what cannot be spelt costs its bytes."""
    mark = pieces.continuation
    prefix, rest = (mark, text.removeprefix(mark)) if text.startswith(mark) else ("", text)
    spelling: list[int] = []
    start, end = 0, len(rest) - 1
    while start < len(rest):
        index = next(
            (known[form] for stop in range(end, start, -1) if (form := prefix + rest[start:stop]) in known), None
        )
        if index is None:
            return [], 1 + len(rest.encode())
        spelling.append(index)
        start += len(pieces.texts[index]) - len(prefix)
        prefix, end = mark, len(rest)
    return spelling, len(spelling)


def _byte_ids(pieces: Pieces) -> dict[int, int]:
    """Byte to teacher id, for a Unigram teacher that has byte pieces already."""
    bytes_by_piece = {piece: byte for byte, piece in enumerate(BYTE_PIECES)} if pieces.falls_back_to_bytes else {}
    return {bytes_by_piece[text]: index for index, text in enumerate(pieces.texts) if text in bytes_by_piece}


def remap_rows(embedding: torch.Tensor, kept_ids: Sequence[int]) -> torch.Tensor:
    """Rows (kept, dim) of a teacher's `embedding` (rows, dim), as `kept_ids` order them; ArtifactError if too short."""
    if max(kept_ids) >= len(embedding):
        raise ArtifactError(
            f"embedding: {len(embedding)} rows; expected more than {max(kept_ids)}, the largest kept id"
        )
    return embedding[torch.tensor(kept_ids)]


def byte_rows(
    method: ByteMethod, embedding: torch.Tensor, tokenizer: Tokenizer, kept_ids: Sequence[int], seed: int = 0
) -> torch.Tensor:
    """Rows (256, dim) for the byte pieces, from a Unigram teacher's `embedding` (rows, dim); its own byte rows win.

    - `mean`: the kept rows' mean, with noise of a tenth of their spread so that bytes differ.
    - `characters`: the mean row of the dropped characters whose UTF-8 has the byte, by the teacher's probability.
    - `fit`: rows whose mean over a dropped character's bytes comes nearest to its row (ridge towards the mean).
    - `similar`: a mix of the ten kept rows most like the `characters` row, by similarity (`similar_rows`).
    """
    pieces = read_pieces(tokenizer)
    kept = remap_rows(embedding, kept_ids)
    mean, spread = kept.mean(0), kept.std(0)
    generator = torch.Generator().manual_seed(seed)
    if method == "mean":
        rows = mean + 0.1 * spread * torch.randn(len(BYTE_PIECES), len(mean), generator=generator)
    else:
        shares, weights, targets = _dropped_characters(pieces, embedding, set(kept_ids))
        weighted = shares * weights[:, None]
        if method == "fit":
            gram = shares.T @ weighted + RIDGE * torch.eye(len(BYTE_PIECES))
            rows = mean + torch.linalg.solve(gram, weighted.T @ (targets - mean))
        else:
            total = weighted.sum(0)[:, None]
            rows = torch.where(total > 0, weighted.T @ targets / total.clamp_min(1e-30), mean)
        if method == "similar":
            rows = similar_rows(rows, kept, kept)
    for byte, index in _byte_ids(pieces).items():
        rows[byte] = embedding[index]
    return rows


def similar_rows(queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """For each of `queries` (queries, features) a mix (queries, dim) of those of `rows` (known, dim) most like it.

    Likeness is the cosine with `keys` (known, features); the ten nearest count by its softmax at a temperature of 0.1,
    as in OFA (Liu et al. 2024, arXiv:2311.08849).
    """
    unit = torch.nn.functional.normalize
    similarity, nearest = (unit(queries, dim=1) @ unit(keys, dim=1).T).topk(min(10, len(keys)))
    return (similarity.div(0.1).softmax(1)[:, :, None] * rows[nearest]).sum(1)


def _dropped_characters(
    pieces: Pieces, embedding: torch.Tensor, kept: set[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each dropped character: shares of its UTF-8 bytes (chars, 256), weight (chars,), row (chars, dim)."""
    ids = [index for index, text in enumerate(pieces.texts) if len(text) == 1 and index not in kept]
    shares = torch.zeros(len(ids), len(BYTE_PIECES))
    for row, index in enumerate(ids):
        utf8 = pieces.texts[index].encode()
        for byte in utf8:
            shares[row, byte] += 1 / len(utf8)
    weights = torch.tensor([pieces.scores[index] for index in ids]).softmax(0)
    return shares, weights, embedding[torch.tensor(ids, dtype=torch.long)].float()
