"""Which special tokens begin and end a text: decided here for training, generation, scores and evaluation alike.

A sequence begins with what the tokenizer begins texts with: a BOS token, or nothing. It has that once, even if the text
brings it along. It ends with one EOS token where a response ends, and with none elsewhere: a tokenizer that ends every
text with EOS would also end prompts with it. For messages, the chat template writes all of this.
"""

from __future__ import annotations

from typing import Any


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without any that the tokenizer adds."""
    return list(tokenizer(text=text, add_special_tokens=False)["input_ids"])


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, after those that the tokenizer begins texts with."""
    ids, beginning = bare_ids(tokenizer, text), _beginning(tokenizer)
    return ids if ids[: len(beginning)] == beginning else beginning + ids


def with_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """After a BOS token, if the tokenizer has one, as in TRL's reference-free and process reward trainers."""
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def with_eos(text: str, tokenizer: Any) -> str:
    """The text with EOS at its end. A text from a chat template may already end in EOS and a newline."""
    eos = _eos(tokenizer, "eos_token")
    return text if text.rstrip().endswith(eos.rstrip()) else text + eos


def ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens with EOS as the very last one."""
    eos = _eos(tokenizer, "eos_token_id")
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _beginning(tokenizer: Any) -> list[int]:
    probe = bare_ids(tokenizer, "a")
    whole = list(tokenizer(text="a")["input_ids"])
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(probe)] == probe), [])


def _eos(tokenizer: Any, attribute: str) -> Any:
    value = getattr(tokenizer, attribute)
    if value is None:
        raise ValueError(f"tokenizer: got no {attribute}, want one, which ends responses")
    return value
