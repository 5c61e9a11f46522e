"""Vectors of `SentenceTransformer.encode` that the encoder must meet, and the models they are of.

    python -m tests.golden.vectors

writes vectors.npz anew; do so only where a model below is meant to change.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import XLMRobertaConfig, XLMRobertaModel

from embedlib.compress.layers import LayerConfig
from embedlib.compress.vocab import VocabularyConfig
from embedlib.compression import CompressionConfig, compress, write_student
from embedlib.encoder import Encoder
from embedlib.model_directory import write_body, write_head, write_tokenizer
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from tests.conftest import SENTENCES

VECTORS = Path(__file__).with_suffix(".npz")
PROMPTS = {"none": None, "query": "query"}
TEXTS = [*SENTENCES[::12], "", "byte fallback: ☃ 𒀀 ꙮ", " ".join(SENTENCES)]  # the last is longer than any model reads
VOCABULARY = 4096


def make_models(folder: Path) -> dict[str, Path]:
    """The models by name: what is not the embedded teacher itself is made below `folder`."""
    teacher = pretrained_directory(EMBEDDED_TEACHER)
    student = write_untrained_student(folder / "student", teacher)
    return {"teacher": teacher, "student": student, "xlmr_1024": write_xlmr(folder / "xlmr_1024", student)}


def write_untrained_student(directory: Path, source: Path) -> Path:
    """Four of the teacher's layers and few of its pieces."""
    directory.mkdir()
    teacher = Encoder.load(source, torch.device("cpu"), torch.float32)
    vocabulary = VocabularyConfig(size=VOCABULARY, character_coverage=0.9)
    config = CompressionConfig(layers=LayerConfig(keep=(0, 3, 7, 11)), vocabulary=vocabulary)
    made = compress(teacher, {"und": SENTENCES}, config)
    write_student(directory, made.body, made.tokenizer, source, teacher.max_seq_length)
    return directory


def write_xlmr(directory: Path, tokenizer_source: Path) -> Path:
    """The shape of bge-m3: XLM-R, 1024 wide, CLS pooling; two layers of random weights."""
    directory.mkdir()
    tokenizer = Tokenizer.from_file(str(tokenizer_source / "tokenizer.json"))
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=258,
        type_vocab_size=1,
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )
    torch.manual_seed(0)
    write_body(directory, XLMRobertaModel(config, add_pooling_layer=False))
    write_tokenizer(directory, tokenizer, 256)
    write_head(directory, 1024, "cls_token", {"query": "query: ", "document": "passage: "})
    return directory


def main() -> None:
    """Write what sentence-transformers says."""
    vectors = {}
    with TemporaryDirectory() as folder:
        for name, directory in make_models(Path(folder)).items():
            model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
            for prompt, prompt_name in PROMPTS.items():
                vectors[f"{name}/{prompt}"] = model.encode(TEXTS, prompt_name=prompt_name, batch_size=4)
    np.savez_compressed(VECTORS, **vectors)


if __name__ == "__main__":
    main()
