"""Write plain sentence-transformers directories: body, tokenizer, head modules and prompts as files any peer reads."""

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS_NAME = "config_sentence_transformers.json"
DIMENSIONS = "matryoshka_dims"
# What models call the prompt of a side, the usual name first.
QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def write_body(directory: Path, body: "PreTrainedModel") -> None:
    """Write weights and config; a body without pooler says so, so that loading it does not invent one."""
    with disk_errors(directory):
        body.save_pretrained(directory)
    has_pooler = getattr(body, "pooler", None) is not None
    write_json(
        directory / "sentence_bert_config.json", {} if has_pooler else {"model_args": {"add_pooling_layer": False}}
    )


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, max_seq_length: int, special_tokens: dict[str, str] | None = None
) -> None:
    """Write a fast tokenizer under the one class that keeps it as it is.

    Model-specific classes rebuild the tokenizer from its pieces and so switch byte fallback off (XLM-R) or take it
    for WordPiece (`model_type: bert`). A special token typed in a text is not to be taken for one; an unpruned Unigram
    model still is free to, since its pieces include the special tokens.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with disk_errors(directory):
        tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_length,
        "split_special_tokens": True,
    }
    write_json(directory / "tokenizer_config.json", config | (special_tokens or SPECIAL_TOKENS))


def write_head(directory: Path, embedding_dim: int, pooling_mode: str, prompts: dict[str, str]) -> None:
    """Write pooling, normalisation and prompts.

    A `document` prompt must be among the prompts: sentence-transformers would otherwise invent an empty one.
    """
    modules = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    listing = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{module}"}
        for index, (module, path) in enumerate(zip(modules, paths, strict=True))
    ]
    write_json(directory / "modules.json", listing)
    for path in paths[1:]:
        (directory / path).mkdir()
    pooling = {"word_embedding_dimension": embedding_dim, f"pooling_mode_{pooling_mode}": True}
    write_json(directory / "1_Pooling" / "config.json", pooling)
    write_json(
        directory / PROMPTS_NAME,
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def copy_head(source: Path, directory: Path) -> None:
    """Give `directory` the modules after the body, and the prompts, of the model in `source`."""
    listing = json.loads((source / "modules.json").read_text())
    for module in listing[1:]:
        shutil.copytree(source / module["path"], directory / module["path"], dirs_exist_ok=True)
    for name in ("modules.json", PROMPTS_NAME):
        if (source / name).is_file():
            shutil.copy(source / name, directory / name)


def read_prompts(directory: Path) -> dict[str, str]:
    """The prompts of a model directory by name."""
    path = directory / PROMPTS_NAME
    values = json.loads(path.read_text()) if path.is_file() else {}
    return dict(values.get("prompts") or {})


def prompts_of(model: Path, named: str | None, usual: Sequence[str]) -> list[str]:
    """The prompt before some texts: the one that was named, else the first of the usual ones that the model has."""
    known = read_prompts(model)
    return [named] if named else [name for name in usual if name in known][:1]


def trained_dimensions(directory: Path) -> list[int]:
    """The sizes to which a model's vectors may be cut, as matryoshka training notes them; empty where it had none."""
    path = directory / PROMPTS_NAME
    values = json.loads(path.read_text()) if path.is_file() else {}
    return [int(size) for size in values.get(DIMENSIONS) or []]


def write_trained_dimensions(directory: Path, sizes: Collection[int]) -> None:
    """Note the sizes to which the vectors of a model may be cut; with none, what was noted before goes."""
    path = directory / PROMPTS_NAME
    values = json.loads(path.read_text()) if path.is_file() else {}
    noted = {key: value for key, value in values.items() if key != DIMENSIONS}
    noted |= {DIMENSIONS: sorted(set(sizes), reverse=True)} if sizes else {}
    if noted != values:
        write_json(path, noted)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Raise what safetensors and tokenizers raise when they cannot write, as the OSError it is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise OSError(f"{directory}: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
