"""Packed rows with shared prefixes give every model family its own hidden states and gradients."""

import math
import shutil
import types

import pytest
import torch
import transformers
from counting import Operators
from support_zoo import tiny_model
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from fastpref.common.gather import add_by_row
from fastpref.data.packing import Scored, in_order, pack
from fastpref.models import attention
from fastpref.models import segments as segments_module
from fastpref.models.segments import Segment, Segments
from fastpref.trainers.forward import hidden_rows, scored_hidden
from fastpref.trainers.layout import choose_layout

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SLIDING = {"sliding_window": 5}
FAMILIES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {}, "Mistral sliding": SLIDING, "Gemma": {}, "Gemma2": SLIDING,
    "Gemma3Text": SLIDING, "SmolLM3": {}, "Olmo2": {}, "Phi3": {}, "Granite": {},
}  # fmt: skip
PAIRS = [([5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]), ([20, 21], [22, 23, 24, 25], [26])]


def family(name: str):
    config = getattr(transformers, f"{name.split()[0]}Config")(**(SMALL | FAMILIES[name]))
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"} if name == "Gemma2" else {}  # of transformers 5.17 it gets sdpa
    model = transformers.AutoModelForCausalLM.from_config(config, **eager).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at std 0.02 attention would hardly matter
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def sequences() -> list[Scored]:
    return in_order([[Scored(p + c, len(p)), Scored(p + r, len(p))] for p, c, r in PAIRS])


def gradients(model, batch) -> tuple[Tensor, list[Tensor]]:
    hidden = scored_hidden(model, batch)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return hidden.detach(), found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_rows_are_the_separate_sequences(name, checkpointing):
    model = family(name)
    if checkpointing:
        if name not in ("Llama", "Gemma2"):
            pytest.skip("one with sdpa and one with eager attention")
        model.gradient_checkpointing_enable()
        model.train()
    wanted, wanted_gradients = gradients(model, pack(sequences(), "padded"))
    assert choose_layout(model, "auto") == ("shared", True)
    for layout in ("shared", "packed"):
        found, found_gradients = gradients(model, pack(sequences(), layout))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for one, other in zip(found_gradients, wanted_gradients, strict=True):
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * max(scale, 1.0))


def test_without_segments_the_model_is_what_it_was():
    model = family("Gemma2")
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
    mask = (ids != 0).long()
    before = model(input_ids=ids, attention_mask=mask).logits
    attention.enable(model)
    assert model.config._attn_implementation == "fastpref_eager"
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    generated = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 8)
    attention.disable(model)
    assert model.config._attn_implementation == "eager"
    assert "fastpref" not in str(model.config.to_dict())


@pytest.mark.parametrize("wanted", ["auto", "padded"])
def test_a_soft_cap_of_attention_was_left_out_by_sdpa(wanted):
    model = family("Gemma2")
    model.config.attn_logit_softcapping = 1.0
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 1.0
    want = scored_hidden(model, pack(sequences(), "padded"))
    model.config._attn_implementation = "sdpa"  # as transformers 5.17 chooses
    layout, ours = choose_layout(model, wanted)
    assert (layout, ours) == (("shared", True) if wanted == "auto" else ("padded", False))
    torch.testing.assert_close(scored_hidden(model, pack(sequences(), layout)), want, rtol=1e-5, atol=1e-5)


def dense(query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, scale: float) -> Tensor:
    """The definition: each query row sees its segment's prefix and its own rows up to itself."""
    rows = query.shape[2]
    seen = torch.zeros(rows, rows, dtype=torch.bool)
    for segment in segments.table:
        keys = [row for start, end in segment.ranges for row in range(start, end)]
        length = segment.keys() - segment.queries()
        for i in range(segment.end - segment.start):
            last = length + i + 1
            seen[segment.start + i, keys[0 if window is None else max(0, last - window) : last]] = True
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ value.repeat_interleave(groups, 1)


SEGMENTS = Segments.of([Segment(0, 7), Segment(7, 11, ((0, 4),)), Segment(11, 12, ((0, 4), (7, 9))), Segment(12, 15)])


def tensors(requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(1, h, 15, 8, dtype=torch.float64, requires_grad=requires_grad) for h in (4, 2, 2)]


@pytest.mark.parametrize("queries", [256, 3])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_by_segment_is_the_definition(window, queries, monkeypatch):
    """Whether its masks are of all queries of a segment or of some."""
    monkeypatch.setattr(attention, "QUERIES", queries)
    monkeypatch.setattr(segments_module, "QUERIES", queries)
    segments = Segments.of(list(SEGMENTS.table))  # its own: they keep masks, of so many queries
    query, key, value = tensors()
    found = attention.by_segment(query, key, value, segments, 0.3, window)
    torch.testing.assert_close(found, dense(query, key, value, segments, window, 0.3))


def test_by_segment_gradients():
    def run(q, k, v):
        return attention.by_segment(q, k, v, SEGMENTS, 0.3)

    assert torch.autograd.gradcheck(run, tensors(requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keys_that_many_segments_see_add_up_their_gradients_alike_on_every_device(dtype):
    table = [Segment(0, 4), *(Segment(4 + i, 5 + i, ((0, 3),)) for i in range(40))]
    segments = Segments.of(table)
    gradient = torch.ones(1, 2, len(segments.key_rows), 8, dtype=dtype) / 3
    found = add_by_row(gradient.movedim(2, 0), *segments.by_row()).movedim(0, 2)
    assert torch.equal(segments_module._add_ranges(gradient, segments, 2), found)
    wanted = 41 * gradient[0, 0, 0, 0].double()  # rounded once
    torch.testing.assert_close(found[0, 0, 0, 0], wanted.to(dtype), rtol=1e-14, atol=0)
    assert found.shape == (1, 2, 44, 8)


def varlen_like(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn, by its documentation."""
    assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    out = torch.empty_like(query)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        groups = q.shape[0] // k.shape[0]
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale
        at = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]  # bottom right
        seen = torch.arange(k.shape[1])
        hidden = (seen > at + window_size[1]) | ((window_size[0] >= 0) & (seen < at - window_size[0]))
        scores = scores.masked_fill(hidden, float("-inf"))
        out[a:b] = (torch.softmax(scores, -1) @ v.repeat_interleave(groups, 0)).transpose(0, 1)
    return out


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_by_varlen_is_the_definition(window, asked, monkeypatch):
    """Key heads go in as few as they are, whether or not this torch asks for leave."""
    names = frozenset(("scale", "window_size", "enable_gqa") if asked else ("scale", "window_size"))
    monkeypatch.setattr(attention, "_varlen", lambda: (varlen_like, names))
    query, key, value = tensors()
    found = attention.by_varlen(query, key, value, SEGMENTS, 0.3, window)
    torch.testing.assert_close(found, dense(query, key, value, SEGMENTS, window, 0.3))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3])
def test_by_flex_is_the_definition(window, softcap):
    """Forward only: FlexAttention has no backward on a CPU."""
    given = tensors()
    found = attention.by_flex(*given, SEGMENTS, 0.3, window, softcap)
    torch.testing.assert_close(found, attention.by_segment(*given, SEGMENTS, 0.3, window, softcap))
    if softcap is None:
        torch.testing.assert_close(found, dense(*given, SEGMENTS, window, 0.3))


@pytest.mark.parametrize("window", [None, 300])
def test_block_masks_are_those_of_every_query_and_key(window):
    """Whole blocks, partial ones and none, without a number for every query and key, and without a wait."""
    table = [Segment(0, 600), Segment(600, 701, ((0, 530),)), Segment(701, 702, ((0, 530), (600, 640))),
             Segment(702, 1024, ((0, 128),)), Segment(1024, 1100)]  # fmt: skip
    segments = Segments.of(table)
    with Operators() as operators:
        found = segments.block_mask(window)
    wanted = create_block_mask(found.mask_mod, None, None, 1100, len(segments.key_rows), "cpu")
    assert found.shape == wanted.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        count, indices = getattr(wanted, name), name.replace("num_blocks", "indices")
        for row in range(count.shape[-1]):
            kept = slice(int(count[0, 0, row]))
            assert torch.equal(getattr(found, indices)[0, 0, row, kept], getattr(wanted, indices)[0, 0, row, kept])
    assert int(wanted.kv_num_blocks.sum()) > 0 and int(wanted.full_kv_num_blocks.sum()) > 0
    assert operators.waits == []
    assert max(math.prod(x.shape) for x in operators.touched) <= 2 * 1100 * len(segments.key_rows) // 100


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor on a CPU wants a C++ compiler")
def test_flex_attention_is_compiled_inside_of_a_model_that_is_not(monkeypatch):
    """By Inductor, as on a GPU. Not run as the whole score matrix, and not for every length and window anew."""
    from torch._inductor.compile_fx import compile_fx
    from torch.nn.attention.flex_attention import flex_attention

    compiled = []

    def inductor(graph, inputs):
        compiled.append(graph)
        return compile_fx(graph, inputs)

    flex = torch.compile(flex_attention, backend=inductor, dynamic=True)
    monkeypatch.setattr(attention, "_flex", lambda device: flex)
    monkeypatch.setattr(attention, "_can_flex", lambda *_: True)
    for n in range(5):
        segments = Segments.of(
            [Segment(0, 7 + n), Segment(7 + n, 11 + 2 * n, ((0, 4),)), Segment(11 + 2 * n, 15 + 3 * n)]
        )
        given = [torch.randn(1, h, 15 + 3 * n, 16) for h in (4, 2, 2)]
        for window in (None, 3):
            found = attention.packed_attention(*given, segments, 0.3, window, 0.7, 0.0)
            torch.testing.assert_close(found, attention.by_segment(*given, segments, 0.3, window, 0.7))
    assert 0 < len(compiled) <= 2


def test_large_heads_fit_the_shared_memory_of_a_gpu(monkeypatch):
    """FlexAttention's own choice for more than 256, three stages, takes 256 KiB: no H100 starts it."""
    asked = []
    monkeypatch.setattr(attention, "_flex", lambda device: lambda query, *_, **options: asked.append(options) or query)
    for head in (256, 512):
        attention.by_flex(*[torch.randn(1, 2, 15, head) for _ in range(3)], SEGMENTS, None)
    assert [options["kernel_options"] for options in asked] == [None, {"num_stages": 1}]


def test_no_call_a_segment_in_half_precision_on_a_gpu():
    """Which way queries go, by what the fused calls can do."""
    for head, softcap, dropout, way in ((64, None, 0.0, "varlen"), (256, None, 0.0, "varlen"), (64, 50.0, 0.0, "flex"),
                                        (512, None, 0.0, "flex"), (64, None, 0.1, "segment")):  # fmt: skip
        query = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 4, 9, head), device="cuda:0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
            found = "varlen" if attention._can_varlen(query, 5, softcap, dropout) else None
            found = found or ("flex" if attention._can_flex(query, dropout) else "segment")
        assert found == way


def test_the_installed_varlen_attention_has_the_parameters_that_we_pass():
    found = attention._varlen()
    assert found is not None
    assert "scale" in found[1] and {"window_size", "is_causal"} & found[1]


def test_what_packed_attention_does_not_know_is_refused():
    query, key, value = tensors()
    module = torch.nn.Module()
    for kwargs in ({"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match=f"{next(iter(kwargs))}: got one in packed attention, want none"):
            attention.attention(module, query, key, value, None, fastpref_segments=SEGMENTS, **kwargs)
    with pytest.raises(ValueError, match="attention_mask"):
        attention.attention(module, query, key, value, torch.ones(1), fastpref_segments=SEGMENTS)


class TestFallback:
    def test_recurrent_layers_are_padded_and_it_is_said(self):
        config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        with pytest.warns(UserWarning, match="layout: MambaForCausalLM runs 'padded' batches"):
            assert choose_layout(model, "auto") == ("padded", False)

    def test_learnt_positions_share_too(self):
        config = transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        layout, ours = choose_layout(model, "auto")
        batch = pack(sequences(), layout)
        if not ours:
            batch.pop(attention.KWARG, None)
        wanted = scored_hidden(model, pack(sequences(), "padded"))
        torch.testing.assert_close(scored_hidden(model, batch), wanted, rtol=1e-4, atol=1e-4)

    def test_attention_that_ignores_the_segments_is_found_out(self, monkeypatch):
        model = family("Llama")
        original = attention.by_segment

        def careless(query, key, value, segments, *args):
            whole = Segments.of([Segment(0, query.shape[2])])
            return original(query, key, value, whole, *args)

        monkeypatch.setattr(attention, "by_segment", careless)
        with pytest.warns(UserWarning, match="runs 'packed' batches .*depend on those of other sequences"):
            assert choose_layout(model, "auto") == ("packed", False)
        assert model.config._attn_implementation == "sdpa"

    def test_positions_that_do_not_begin_anew_are_found_out_in_half_precision_too(self, monkeypatch):
        """At the scale of new weights bfloat16 hides them."""
        config = transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()
        original = model.transformer.forward

        def careless(*args, position_ids=None, **kwargs):
            return original(*args, **kwargs)

        assert choose_layout(model, "auto") == ("shared", True)
        attention.disable(model)
        monkeypatch.setattr(model.transformer, "forward", careless)
        with pytest.warns(UserWarning, match="runs 'padded' batches .*hidden states differ"):
            assert choose_layout(model, "auto") == ("padded", False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    def test_a_layer_type_that_is_not_attention_is_read_off_the_config(self):
        """On a few tokens attention in chunks is full attention."""
        model = tiny_model("llama4_text", attention_chunk_size=64)
        with pytest.warns(UserWarning, match="runs 'padded' batches .chunked_attention layers would carry"):
            assert choose_layout(model, "auto") == ("padded", False)


def test_packed_rows_are_not_looked_for_on_the_host(monkeypatch):
    model = family("Llama")
    layout, ours = choose_layout(model, "auto")
    assert ours
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda *_: pytest.fail("asked"))
    hidden_rows(model, pack(sequences(), layout))


def test_hidden_rows_of_a_padded_batch():
    model = family("Llama")
    batch = pack(sequences(), "padded")
    assert hidden_rows(model, batch).shape == (batch["input_ids"].numel(), 32)
