"""The shipped sentence vectors are the model's. `python tests/test_task_embeddings.py` writes them anew."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from common.envs import TASK_DESCRIPTIONS
from ssde import EMBEDDINGS, load_encoder


def model_vectors() -> tuple[list[str], np.ndarray]:
    """All task descriptions and their vectors, computed by all-MiniLM-L6-v2: (50, 384), rows of norm 1."""
    sentences = list(TASK_DESCRIPTIONS.values())
    return sentences, load_encoder("bundled").encode(sentences, normalize_embeddings=True)


def write() -> None:
    sentences, vectors = model_vectors()
    np.savez_compressed(EMBEDDINGS, sentences=np.array(sentences), vectors=vectors)


if __name__ == "__main__":
    write()
