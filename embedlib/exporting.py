"""Export a sentence-transformers model to the format of another runtime, with all that an encoder needs besides."""

import warnings
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from embedlib.artifact import whole_directory
from embedlib.torch_model import load_model, sentence_vectors, tokenizer_of, traits_of
from embedlib.traits import TOKENIZER_NAME, TRAITS_NAME


def export_model(directory: Path, runtime: str, int8: bool, home: Path) -> None:
    """Write the model of `directory` for `runtime`, openvino or onnx, its tokenizer and its traits to `home`, whole."""
    model = load_model(directory, torch.device("cpu"))
    export = export_openvino if runtime == "openvino" else export_onnx
    with whole_directory(home) as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export and torch.onnx warn of their own parts
        tokenizer_of(model).save(str(scratch / TOKENIZER_NAME))
        (scratch / TRAITS_NAME).write_text(traits_of(model).model_dump_json(indent=2))
        export(model, scratch, int8)


class PooledVectors(nn.Module):
    """A sentence-transformers model from padded ids to pooled vectors, as a graph to export."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`input_ids` and `attention_mask` (batch, seq) int64 to vectors (batch, embedding_dim) float32."""
        return sentence_vectors(self.model, {"input_ids": input_ids, "attention_mask": attention_mask})


def _example(model: SentenceTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((2, 8), int(model.tokenizer.pad_token_id))
    ids[0], ids[1, :5] = 5, 6
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


def exported(model: SentenceTransformer) -> torch.export.ExportedProgram:
    """The graph from padded ids to pooled vectors, for batches of any size and length."""
    batch, seq = torch.export.Dim("batch", min=1), torch.export.Dim("seq", min=2, max=model.max_seq_length)
    shapes = ({0: batch, 1: seq}, {0: batch, 1: seq})
    with torch.no_grad():
        return torch.export.export(
            PooledVectors(model.eval().requires_grad_(False)), _example(model), dynamic_shapes=shapes, strict=False
        )


def export_openvino(model: SentenceTransformer, directory: Path, int8: bool) -> None:
    """Write model.xml and model.bin; `int8` stores the linear layers' weights in eight bits."""
    import nncf
    import openvino as ov

    graph = ov.convert_model(exported(model))
    if int8:
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(graph, directory / "model.xml", compress_to_fp16=False)


def export_onnx(model: SentenceTransformer, directory: Path, int8: bool) -> None:
    """Write model.onnx; `int8` stores the linear layers' weights in eight bits, a scale a column."""
    path = directory / ("float.onnx" if int8 else "model.onnx")
    torch.onnx.export(
        exported(model), (), path, input_names=["input_ids", "attention_mask"], output_names=["vectors"], verbose=False
    )
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(path, directory / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
        for left in directory.glob("float.onnx*"):
            left.unlink()
