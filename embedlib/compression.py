"""Make the student: fewer layers, a smaller vocabulary with byte fallback, everything else the teacher's."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel

from embedlib.compress.growth import grow_tokenizer, spelling_rows
from embedlib.compress.layers import (
    LayerChoice,
    LayerConfig,
    Layers,
    LayerScore,
    body_layers,
    choose_layers,
    keep_layers,
    only_layers,
)
from embedlib.compress.positions import extend_positions, position_table
from embedlib.compress.tokenizer import fallback_texts, prune_tokenizer, read_pieces
from embedlib.compress.vocab import (
    ByteMethod,
    KeptVocabulary,
    VocabularyConfig,
    byte_rows,
    choose_pieces,
    remap_rows,
    similar_rows,
)
from embedlib.config import Config
from embedlib.encoder import Encoder, with_prompts
from embedlib.metrics import mean_cosine, similarity_spearman
from embedlib.model_directory import copy_head, write_body, write_tokenizer
from embedlib.torch_model import body_of

SEARCH_TEXTS, PROBE_TEXTS = 20_000, 200


class CompressionConfig(Config):
    """What the student keeps of the teacher."""

    layers: LayerConfig = LayerConfig()
    """Which layers stay."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    """Which pieces stay."""
    max_texts_per_language: int = Field(default=100_000, ge=1)
    """Texts counted for the vocabulary, of each language, chosen by the seed."""
    prompts: list[str] = Field(default=["query", "passage"], min_length=1)
    """Prompts put before the texts in turn, where the teacher has them, while counting and probing."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens that the student reads; past the teacher's positions there come further ones, and those there were stay;
    none: as many as the teacher."""
    seed: int = 0
    """Decides which texts are counted and probed."""


class Compressed(NamedTuple):
    """An untrained student and what its making measured."""

    body: PreTrainedModel
    tokenizer: Tokenizer
    layers: LayerChoice
    vocabulary: KeptVocabulary
    byte_scores: dict[str, float]
    """Mean cosine to the teacher on texts spelt with bytes, by way of making the byte rows."""
    new_scores: dict[str, float]
    """Mean cosine to the teacher on texts spelt with new pieces, by way of making their rows; empty without any."""

    @property
    def measurements(self) -> dict[str, Any]:
        """What belongs in the manifest and the report."""
        return {
            "layers": list(self.layers.best),
            "layer_scores": {str(list(layers)): score._asdict() for layers, score in self.layers.scores.items()},
            "vocabulary_size": self.vocabulary.size,
            "vocabulary_mandatory": self.vocabulary.num_mandatory,
            "vocabulary_new": self.vocabulary.num_new,
            "vocabulary_growth": self.vocabulary.growth,
            "vocabulary_coverage": self.vocabulary.coverage,
            "byte_rows": self.byte_scores,
            "new_rows": self.new_scores,
            "params": sum(parameter.numel() for parameter in self.body.parameters()),
        }


def known_prompts(teacher: Encoder, names: Sequence[str]) -> list[str]:
    """The prefixes called `names`, for those the teacher has; one empty prefix where it has none."""
    return [teacher.prompt(name) for name in names if name in teacher.model.prompts] or [""]


def compress(
    teacher: Encoder,
    texts_by_language: Mapping[str, Sequence[str]],
    config: CompressionConfig,
    rank_distilled: Callable[[list[PreTrainedModel], Tokenizer], int] | None = None,
) -> Compressed:
    """Choose layers and pieces for `texts_by_language` (without prompts; all count) and cut the teacher down to them.

    `rank_distilled` returns the index of the best of several students after a short distillation of each.
    """
    prompts = known_prompts(teacher, config.prompts)
    sampled = {language: with_prompts(texts, prompts) for language, texts in sorted(texts_by_language.items())}
    pool = [text for texts in sampled.values() for text in texts]
    probe = Random(config.seed).sample(pool, min(config.layers.probe_texts, len(pool)))
    full_body = body_of(teacher.model)
    # What cannot be is refused here, before the layers are searched for minutes.
    if config.max_length:
        position_table(full_body, config.max_length)
    new_pieces = config.vocabulary.new_pieces
    grown = grow_tokenizer(teacher.tokenizer, texts_by_language, new_pieces) if new_pieces else teacher.tokenizer

    choice = choose_layers(len(body_layers(full_body)), config.layers, layer_scorer(teacher, probe))
    vocabulary = choose_pieces(teacher.tokenizer, sampled, config.vocabulary, grown)
    tokenizer = prune_tokenizer(grown, vocabulary.ids)
    rows_of_new, new_scores = choose_new_rows(
        teacher, tokenizer, vocabulary, [text for language in new_pieces for text in sampled[language]], prompts[0]
    )
    rows, byte_scores = choose_rows(teacher, tokenizer, vocabulary, rows_of_new, pool)
    students = []
    num_students = 1 if config.layers.keep else max(1, config.layers.distil_candidates)
    for layers in list(choice.scores)[:num_students]:
        students.append(keep_layers(full_body, layers).float())
        replace_rows(students[-1], rows)
        if config.max_length:
            extend_positions(students[-1], config.max_length)
    best = rank_distilled(students, tokenizer) if rank_distilled and len(students) > 1 else 0
    scores = list(choice.scores.items())
    choice = LayerChoice(dict([scores.pop(best), *scores]))
    return Compressed(students[best], tokenizer, choice, vocabulary, byte_scores, new_scores)


def layer_scorer(teacher: Encoder, texts: Sequence[str]) -> Callable[[Layers], LayerScore]:
    """A function from a choice of layers to its agreement with the whole teacher on `texts` (prompts included)."""
    tokens = teacher.tokenise(texts)
    body = body_of(teacher.model)
    whole = teacher.encode_tokens(tokens)

    def score(layers: Layers) -> LayerScore:
        with only_layers(body, layers):
            vectors = teacher.encode_tokens(tokens)
        return LayerScore(mean_cosine(vectors, whole), similarity_spearman(vectors, whole))

    return cache(score)


def replace_rows(body: PreTrainedModel, rows: torch.Tensor) -> None:
    """Give `body` the word embedding `rows` (vocabulary, hidden)."""
    padding = body.get_input_embeddings().padding_idx
    body.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows.clone(), freeze=False, padding_idx=padding))
    body.config.vocab_size = len(rows)


def choose_new_rows(
    teacher: Encoder, tokenizer: Tokenizer, vocabulary: KeptVocabulary, pool: Sequence[str], prompt: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """Rows (new, hidden) float32 of the pieces that the teacher lacks, made in the way that measures best.

    The measure is the cosine, with the teacher's own layers, of texts of `pool` to their vectors before.
    """
    if not vocabulary.num_new:
        return _old_rows(teacher)[:0], {}
    candidates = new_rows(teacher, tokenizer, vocabulary, prompt)
    searched = Random(0).sample(pool, min(len(pool), SEARCH_TEXTS))
    new_ids = set(range(len(vocabulary.old_ids), len(vocabulary.ids)))
    encodings = tokenizer.encode_batch_fast(searched)
    probe = [text for text, encoding in zip(searched, encodings, strict=True) if not new_ids.isdisjoint(encoding.ids)]
    tables = {method: whole_embedding(teacher, vocabulary, rows, "mean") for method, rows in candidates.items()}
    scores = agreement(teacher, tokenizer, tables, probe[:PROBE_TEXTS] or pool[:1])
    return candidates[max(scores, key=scores.__getitem__)], scores


def new_rows(
    teacher: Encoder, tokenizer: Tokenizer, vocabulary: KeptVocabulary, prompt: str = ""
) -> dict[str, torch.Tensor]:
    """Rows (new, hidden) float32 of the pieces that the teacher lacks, by way of making them.

    - `mean`: the mean row of the teacher's pieces that spell it.
    - `similar`: a mix of the ten kept rows whose pieces are most like it (`similar_rows`). OFA asks static multilingual
      word vectors how alike pieces are, which few languages have; here the teacher's own vectors of the pieces as texts
      tell, less their mean, which all have in common. Rows are not factorised: the student keeps the teacher's width.
    """
    old_rows, num_old = _old_rows(teacher), len(vocabulary.old_ids)
    num_specials = len(read_pieces(tokenizer).specials)
    texts = read_pieces(tokenizer).texts[: len(vocabulary.ids)]
    spoken = [prompt + text.replace("▁", " ").strip() for text in texts[num_specials:]]
    vectors = torch.from_numpy(teacher.encode(spoken))
    known, new = (vectors - vectors.mean(0)).tensor_split([num_old - num_specials])
    return {
        "mean": spelling_rows(old_rows, teacher.tokenizer, texts[num_old:]),
        "similar": similar_rows(new, known, remap_rows(old_rows, vocabulary.old_ids[num_specials:])),
    }


def choose_rows(
    teacher: Encoder, tokenizer: Tokenizer, vocabulary: KeptVocabulary, rows_of_new: torch.Tensor, pool: Sequence[str]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The student's word embedding (vocabulary, hidden) float32, its byte rows made in the way that measures best.

    The measure is the cosine, with the teacher's own layers, between a text's vector and that of its spelling with
    bytes, over texts whose characters lost their piece.
    """
    if not vocabulary.num_bytes:
        return remap_rows(_old_rows(teacher), vocabulary.ids), {}
    candidates = {method: whole_embedding(teacher, vocabulary, rows_of_new, method) for method in get_args(ByteMethod)}
    scores = agreement(teacher, tokenizer, candidates, byte_probe(teacher.tokenizer, tokenizer, pool))
    return candidates[max(scores, key=scores.__getitem__)], scores


def whole_embedding(
    teacher: Encoder, vocabulary: KeptVocabulary, rows_of_new: torch.Tensor, method: ByteMethod
) -> torch.Tensor:
    """A Unigram student's word embedding (vocabulary, hidden) float32: kept rows, those of new pieces, byte rows."""
    old_rows = _old_rows(teacher)
    bytes_ = byte_rows(method, old_rows, teacher.tokenizer, vocabulary.old_ids)
    return torch.cat([remap_rows(old_rows, vocabulary.old_ids), rows_of_new, bytes_])


def _old_rows(teacher: Encoder) -> torch.Tensor:
    embeddings = body_of(teacher.model).get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)  # noqa: S101 (narrows the type)
    return embeddings.weight.detach().float()


def agreement(
    teacher: Encoder, tokenizer: Tokenizer, tables: Mapping[str, torch.Tensor], probe: Sequence[str]
) -> dict[str, float]:
    """Mean cosine of the teacher's vectors of `probe` to those that its layers give on each of the tables of rows."""
    body = body_of(teacher.model)
    embeddings = body.get_input_embeddings()
    known = teacher.encode_tokens(teacher.tokenise(probe))
    encodings = tokenizer.encode_batch_fast(list(probe))
    spelt = [np.array(encoding.ids[: teacher.max_seq_length], dtype=np.int32) for encoding in encodings]
    scores = {}
    try:
        for method, rows in tables.items():
            body.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows.to(body.dtype)))
            scores[method] = mean_cosine(teacher.encode_tokens(spelt), known)
    finally:
        body.set_input_embeddings(embeddings)
    return scores


def byte_probe(old: Tokenizer, new: Tokenizer, pool: Sequence[str]) -> list[str]:
    """Texts that `new` spells with bytes: real ones of `pool` first, then ones with a lost character put into them."""
    random = Random(0)
    searched = random.sample(pool, min(len(pool), SEARCH_TEXTS))
    probe = [searched[index] for index in fallback_texts(old, new, searched)][:PROBE_TEXTS]
    lost = [text for text in read_pieces(old).texts if len(text) == 1 and new.token_to_id(text) is None]
    missing = min(PROBE_TEXTS - len(probe), len(pool)) if lost else 0
    return probe + [f"{text} {random.choice(lost)}" for text in random.sample(pool, missing)] or list(pool[:1])


def write_student(
    directory: Path, body: PreTrainedModel, tokenizer: Tokenizer, teacher_directory: Path, max_seq_length: int
) -> None:
    """Write a plain sentence-transformers directory with the teacher's pooling and prompts."""
    write_body(directory, body)
    named = AutoTokenizer.from_pretrained(teacher_directory, local_files_only=True).special_tokens_map
    special_tokens = {
        role: token
        for role, token in named.items()
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None
    }
    write_tokenizer(directory, tokenizer, max_seq_length, special_tokens)
    copy_head(teacher_directory, directory)
