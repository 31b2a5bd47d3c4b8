"""A prompt and its samples as a tree: for loops of one's own, and for what scores and evaluates."""

import pytest
import torch
from support_zoo import tiny_model

import fastpref
from fastpref.online.sequences import TokenSequence, policy_scores, rewards
from fastpref.trainers import PromptTrees
from tests.support_trainers import tiny

PROMPT, OTHER = [5, 6, 7, 8, 9], [30, 31]
SAMPLES = [[11, 12, 13], [11, 14], [15], [11, 12, 13]]


def of_logits(model, prompt, response) -> torch.Tensor:
    ids = torch.tensor([*prompt, *response])
    logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[1:, None])[len(prompt) - 1 :, 0]


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_a_policy_gradient_over_samples_is_that_of_separate_sequences(layout):
    model = tiny_model("llama", 3.0)
    prompts, responses = [PROMPT] * 4 + [OTHER], [*SAMPLES, [3, 4]]
    advantages = torch.tensor([1.0, -0.5, 0.25, 1.0, 2.0])
    trees = PromptTrees(model, layout)
    found = trees(prompts, responses, entropy=True)
    assert trees.batch(prompts, responses)["input_ids"].numel() == (5 + 3 + 1 + 1 + 4 if layout == "auto" else 40)
    alone = torch.cat([of_logits(model, p, r) for p, r in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(found.logps, alone, rtol=1e-5, atol=1e-5)
    assert found.labels.tolist() == [token for response in responses for token in response]
    assert found.entropy is not None and found.entropy.shape == alone.shape
    loss_fn = fastpref.PolicyGradientLoss(loss_type="grpo")
    gradients = []
    for logps in (found.logps, alone):
        out = loss_fn(logps, found.labels, advantages, old_logps=alone.detach() - 0.05, cu_seqlens=found.cu_seqlens)
        gradient = torch.autograd.grad(out.loss, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    assert (gradients[0] - gradients[1]).norm() <= 2e-6 * gradients[1].norm()


def test_masked_tokens_are_context():
    model = tiny_model("llama", 3.0)
    found = PromptTrees(model)([PROMPT], [[11, 12, 13]], [[1, 0, 1]])
    assert found.labels.tolist() == [11, 13]
    torch.testing.assert_close(found.logps, of_logits(model, PROMPT, [11, 12, 13])[[0, 2]], rtol=1e-5, atol=1e-5)


def test_a_prompt_for_each_response_is_wanted():
    with pytest.raises(ValueError, match="responses: got 2 with 1 prompts, want one prompt for each"):
        PromptTrees(tiny_model("llama"))([PROMPT], [[1], [2]])


@pytest.mark.parametrize("architecture", ["llama", "mamba2"])
def test_scores_of_responses_run_their_prompt_once(architecture):
    """And where a model cannot, it gives the same scores."""
    model, reference = tiny_model(architecture, 3.0), tiny_model("llama", 2.0)
    if architecture == "mamba2":
        reference = tiny_model(architecture, 2.0)
    _, tokenizer = tiny()
    sequences = [TokenSequence(p, r) for r, p in zip([*SAMPLES, [3, 4]], [PROMPT] * 4 + [OTHER], strict=True)]
    sequences = [*sequences[2:], *sequences[:2]]
    tokens = []
    handle = fastpref.models.backbone(model).register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append((args or [kwargs["input_ids"]])[0].numel()), with_kwargs=True
    )
    found = policy_scores(model, sequences, tokenizer, reference=reference, batch_size=4)
    handle.remove()
    if architecture == "llama":  # a batch is a prompt's responses
        assert tokens[-2:] == [5 + 3 + 1 + 1, 4]
    wanted = [
        torch.stack([of_logits(m, s.prompt, s.response).sum() for s in sequences]).double() for m in (model, reference)
    ]
    torch.testing.assert_close(found.logps, wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.ref_logps, wanted[1], rtol=1e-5, atol=1e-5)
    assert found.tokens.tolist() == [len(s.response) for s in sequences]
    head = fastpref.RewardHead.from_causal_lm(model).eval()
    alone = [head(torch.tensor([[*s.prompt, *s.response]])).double() for s in sequences]
    torch.testing.assert_close(
        rewards(head, sequences, tokenizer, batch_size=3), torch.cat(alone).detach(), rtol=1e-5, atol=1e-6
    )
