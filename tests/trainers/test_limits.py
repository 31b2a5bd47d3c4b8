"""Sequences beyond a model's positions and tokens beyond its embeddings are errors that name the record."""

from __future__ import annotations

import pytest
from support_trainers import config, pairs, tiny
from support_zoo import tiny_model

from fastpref import models, trainers
from fastpref.models import Limits

pytestmark = pytest.mark.filterwarnings("ignore")


def trainer(model, tmp_path, dataset=None, **options):
    args = config(trainers.DPOConfig, tmp_path, **options)
    return trainers.DPOTrainer(model, args=args, train_dataset=dataset or pairs(), processing_class=tiny()[1])


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [("gpt2", 48), ("opt", 48), ("biogpt", 48), ("gpt_bigcode", 48), ("gptj", 48), ("llama", None), ("bloom", None)],
)
def test_positions(architecture, positions):
    assert models.limits(tiny_model(architecture, max_position_embeddings=48)) == Limits(97, positions)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_record_that_is_too_long_was_an_index_error(architecture, tmp_path):
    model = tiny_model(architecture, vocab_size=len(tiny()[1]), max_position_embeddings=48)
    with pytest.raises(ValueError, match=r"max_length: got a sequence in record \d+ of train_dataset of \d+ tokens"):
        trainer(model, tmp_path)
    trainer(model, tmp_path, max_length=48, max_steps=1).train()


def test_a_token_without_an_embedding_was_an_index_error(tmp_path):
    model = tiny_model("llama", vocab_size=700)
    with pytest.raises(ValueError, match=r"processing_class: got token \d+ in a sequence in record \d+ of"):
        trainer(model, tmp_path)


def test_what_a_stream_brings_is_checked_in_its_batches(tmp_path):
    model = tiny_model("llama", vocab_size=700)
    built = trainer(model, tmp_path, pairs().to_iterable_dataset(), max_steps=1)
    with pytest.raises(ValueError, match=r"processing_class: got token \d+ in a sequence, want ids below 700"):
        built.train()
