"""The reward head on transformers backbones: their folders, padding on either side, packing, training."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from support import DEVICE

from fastpref import BradleyTerryLoss, RewardHead


def _config(name: str):
    import transformers

    return getattr(transformers, f"{name}Config")(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_labels=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
class TestRewardHead:
    def test_reads_and_writes_transformers_folders(self, name, tmp_path):
        from transformers import AutoConfig, AutoModelForSequenceClassification

        theirs = AutoModelForSequenceClassification.from_config(_config(name)).to(DEVICE).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        ours = RewardHead.from_pretrained(tmp_path / "theirs").to(DEVICE).eval()
        assert list(ours.state_dict()) == list(theirs.state_dict()) and "score.weight" in ours.state_dict()
        tokens = torch.randint(1, 31, (3, 7), device=DEVICE)
        with torch.no_grad():
            want = theirs(tokens).logits[:, 0]
            torch.testing.assert_close(ours(tokens), want, rtol=1e-5, atol=1e-6)
            ours.score.weight.mul_(2)
            ours.save_pretrained(tmp_path / "ours")
            assert AutoConfig.from_pretrained(tmp_path / "ours").num_labels == 1
            back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").to(DEVICE).eval()
            assert type(back) is type(theirs)
            torch.testing.assert_close(back(tokens).logits[:, 0], 2 * want, rtol=1e-5, atol=1e-6)
            again = RewardHead.from_pretrained(tmp_path / "ours").to(DEVICE).eval()
            assert torch.equal(again(tokens), ours(tokens))

    def test_padding_and_packing_change_nothing(self, name):
        from transformers import AutoModel

        head = RewardHead(AutoModel.from_config(_config(name)).to(DEVICE).eval())
        lengths = [5, 2, 7]
        sequences = [torch.randint(1, 31, (n,), device=DEVICE) for n in lengths]
        for sequence in sequences:
            sequence[-1] = 0  # the end is the pad id
        with torch.no_grad():
            want = torch.cat([head(s[None]) for s in sequences])
            right, left = torch.zeros(2, 3, 7, dtype=torch.long, device=DEVICE)
            right_mask, left_mask = torch.zeros_like(right), torch.zeros_like(right)
            for i, s in enumerate(sequences):
                right[i, : len(s)], right_mask[i, : len(s)] = s, 1
                left[i, 7 - len(s) :], left_mask[i, 7 - len(s) :] = s, 1
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(head(right, right_mask), want, **close)
            torch.testing.assert_close(head(right, last_index=right_mask.sum(1) - 1), want, **close)
            positions = (left_mask.cumsum(1) - 1).clamp(min=0)
            torch.testing.assert_close(head(left, left_mask, position_ids=positions), want, **close)
            edges = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
            torch.testing.assert_close(head(torch.cat(sequences)[None], cu_seqlens=edges), want, **close)

    def test_starts_from_a_language_model_and_trains(self, name, tmp_path):
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        lm = AutoModelForCausalLM.from_config(_config(name)).to(DEVICE)
        head = RewardHead.from_causal_lm(lm)
        assert head.backbone is lm.model and head.config.num_labels == 1
        tokens = torch.randint(1, 31, (4, 6), device=DEVICE)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            out = BradleyTerryLoss()(*head(tokens).chunk(2))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        assert losses[-1] < losses[0] / 2
        head.save_pretrained(tmp_path)
        back = AutoModelForSequenceClassification.from_pretrained(tmp_path).to(DEVICE).eval()
        with torch.no_grad():
            torch.testing.assert_close(back(tokens).logits[:, 0], head.eval()(tokens), rtol=1e-5, atol=1e-6)


def test_reward_head_refuses_several_labels(tmp_path):
    from transformers import AutoModelForSequenceClassification

    config = _config("Llama")
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        RewardHead.from_pretrained(tmp_path)
    assert str(error.value) == f"{tmp_path}: got a model with num_labels=3, want 1, as a reward model has"
    with pytest.raises(TypeError, match="model: got Linear, want a model with a backbone"):
        RewardHead.from_causal_lm(torch.nn.Linear(2, 2))


def test_transformers_is_imported_lazily():
    code = "import sys, fastpref; fastpref.RewardHead; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
