"""Vision-language models: what takes images, where text tokens with three positions lie, and how their decoder alone
runs a packed row.

The model's own forward reads the images and puts their features among the embeddings. Its decoder then runs the row as
any language model does (`packed_decoder`), so the vision tower never sees a packed row's masks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastpref.models.layers import base, decoder
from fastpref.models.wrappers import inner_model

WHERE = ("cache_dir", "revision", "subfolder", "token", "trust_remote_code")  # to find a config


def config_of(name: Any, **options: Any) -> Any:
    """The configuration of a model in a folder or on the hub.

    Raises:
        OSError: there is none. The message has the name, which transformers' own lacks where the hub is not reached.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **options)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise OSError(
            f"model: got {os.fspath(name)!r}, which is no folder here; looked for on the hub: {error}"
        ) from error


def with_images(auto_class: Any, name: Any, **options: Any) -> Any:
    """`auto_class`, or in its place the class that reads a vision-language model's checkpoint.

    `AutoModelForCausalLM` does not know most of them. `AutoModelForSequenceClassification` knows fewer: such a class is
    made here, in transformers' own layout, with a head `score` on the backbone.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    if options.get("gguf_file"):
        return auto_class
    loading = {key: value for key, value in options.items() if key in WHERE}
    config = options.get("config") or config_of(name, **loading)
    kinds = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind: Any = type(config)
    if kind not in kinds:
        return auto_class
    if auto_class.__name__ == "AutoModelForCausalLM":
        own: Any = kinds[kind]
        known = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and own.__name__ not in (config.architectures or ())
        return auto_class if known else AutoModelForImageTextToText
    if auto_class.__name__ == "AutoModelForSequenceClassification":
        known = kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        return auto_class if known else sequence_classifier(kind)
    return auto_class


@functools.cache
def sequence_classifier(config_class: type) -> Any:
    """A class of models for sequence classification on the backbone of a vision-language model.

    Args:
        config_class: of the vision-language model, such as `Qwen2VLConfig`.

    Raises:
        ValueError: transformers has no backbone for it.
    """
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if config_class not in MODEL_MAPPING:
        raise ValueError(f"model: got {config_class.__name__}, which has no backbone of its own; want another model")
    body: Any = MODEL_MAPPING[config_class]
    name = config_class.__name__.removesuffix("Config") + "ForSequenceClassification"
    found: Any = type(name, (GenericForSequenceClassification, body.__mro__[1]), {"__module__": __name__})
    found.from_config = found._from_config  # as the auto classes have it
    return found


def processing_class(model: Any, name: Any, **options: Any) -> Any:
    """The processor of a model that takes images, the tokenizer of another, from a folder or the hub.

    Also the tokenizer, with a warning, where the processor needs what is not installed: texts do not.
    """
    from transformers import AutoProcessor, AutoTokenizer

    if takes_images(model):
        try:
            return AutoProcessor.from_pretrained(name, **options)
        except ImportError as error:
            reason = " ".join(str(error).split()).partition(". ")[0]
            warnings.warn(
                f"processing_class: {name} gives its tokenizer only, and images cannot be read: {reason}", stacklevel=3
            )
    return AutoTokenizer.from_pretrained(name, **options)


def takes_images(model: Any) -> bool:
    """Whether the model or its backbone has an argument for pixels."""
    return takes_pixels(inner_model(model)) or takes_pixels(base(inner_model(model)))


def takes_pixels(module: nn.Module) -> bool:
    """Whether the module's own forward names them. A classifier's may pass them on without a name."""
    return _names_pixels(type(module).forward)


@functools.cache  # asked in every forward, and a signature takes longer than all else that is asked there
def _names_pixels(forward: Callable[..., Any]) -> bool:
    return "pixel_values" in inspect.signature(forward).parameters


def axis_positions(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """For a model whose tokens have three positions (M-RoPE): a function that gives them for one sequence.

    It takes token ids `[1, T]`, what kind of token each is `[1, T]`, and the grids `[images, 3]`; it returns
    `[3, 1, T]`. It is the model's own, and needs none of its weights. None for other models.
    """
    body = base(inner_model(model))
    if not hasattr(body, "get_rope_index"):
        return None
    kind: Any = type(body)
    bare = kind.__new__(kind)  # the method reads the config only
    nn.Module.__init__(bare)
    bare.config = body.config
    return functools.partial(_axis_positions, bare)


def _axis_positions(body: Any, input_ids: Tensor, kinds: Tensor, grids: Tensor) -> Tensor:
    options = {"input_ids": input_ids, "mm_token_type_ids": kinds, "image_grid_thw": grids}
    known = inspect.signature(body.get_rope_index).parameters
    return body.get_rope_index(**{name: value for name, value in options.items() if name in known})[0]


def in_dtype(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Pixels in the model's dtype. Some families leave that to who calls them; Llama 4's processor makes bf16 ones."""
    dtype = inner_model(model).dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:  # quantised
        return dict(inputs)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


class Headless:
    """Runs a model's own forward, with nothing for its output layer to do: for models without a backbone of their own,
    such as Llama 4's with images."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        """The output of a backbone: `last_hidden_state`, and `router_logits` where the model gives them."""
        from transformers.utils import ModelOutput

        seen: list[Tensor] = []

        def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0])
            return (args[0][:, :0], *args[1:])

        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            output = self.model(**inputs)
        finally:
            hook.remove()
        return ModelOutput(last_hidden_state=seen[-1], router_logits=output.get("router_logits"))


@contextlib.contextmanager
def packed_decoder(model: Any, segments: Any) -> Iterator[None]:
    """For a `with` block around the forward of a model with images: its decoder runs the segments of a packed row."""
    from fastpref.models import attention  # late: it imports torch._dynamo, for which `fastpref pairs` need not wait

    rows = contextlib.ExitStack()

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        like = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        rows.enter_context(attention.packed_rows())
        return args, kwargs | {"attention_mask": attention.prepared_mask(like), attention.KWARG: segments}

    def end(*_: Any) -> None:
        rows.close()

    body = decoder(model)
    hooks = [
        body.register_forward_pre_hook(begin, with_kwargs=True),
        body.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        rows.close()
        for hook in hooks:
            hook.remove()
