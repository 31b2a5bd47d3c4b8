"""The formula of a long step counts what a model has and what a step keeps."""

import argparse
import warnings

import torch
from support_zoo import tiny_model

from benchmarks import long_context
from benchmarks.long_context import Shape, Step, memory, recipe
from fastpref.commands.demo.comparison import Failed
from fastpref.data.packing import Scored, pack
from fastpref.trainers.forward import hidden_rows
from fastpref.trainers.layout import choose_layout


def test_shapes_are_the_models():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    shape = Shape.of(model.config, rank=4)
    matrices = [p for name, p in model.model.layers.named_parameters() if p.dim() == 2]
    assert shape.linear == sum(p.numel() for p in matrices)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    assert shape.adapter == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_checkpointing_keeps_a_layers_input_for_each_node():
    model = tiny_model("llama")
    choose_layout(model, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train().gradient_checkpointing_enable()
    step = Step.of(60, 0.5)
    prompt = list(range(step.prompt))
    responses = [[3 + (7 * i + 5 * side) % 90 for i in range(step.response)] for side in (0, 1)]
    batch = pack([Scored(prompt + response, step.prompt) for response in responses], "shared")
    assert batch["input_ids"].numel() == step.nodes
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (1, step.nodes, model.config.hidden_size) and tensor.requires_grad:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = hidden_rows(model, batch)
    found, wanted = sum(kept.values()), memory(Shape.of(model.config), step, 4)["checkpoints"]
    one = wanted // model.config.num_hidden_layers
    assert hidden.requires_grad and wanted <= found <= wanted + 2 * one  # the last norm keeps two


def test_the_recipe_has_both_lengths():
    text = recipe()
    assert "| 32,768 | 16,384 | bf16 |" in text and "| 131,072 | 4,096 | 4 bit |" in text


def test_a_length_that_stops_is_listed_with_its_last_line(monkeypatch):
    def stops(*_, **__):
        raise Failed("MemoryError: so much")

    monkeypatch.setattr(long_context, "result_of", stops)
    args = argparse.Namespace(model="tiny", lengths=[64, 128], prompt_share=0.5, rank=4)
    assert "- absent: 64 tokens: MemoryError: so much" in long_context.table(long_context.measure(args))
