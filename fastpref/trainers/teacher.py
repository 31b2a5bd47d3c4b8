"""The teacher of a distillation: which model it is, whether its vocabulary is the student's, and its output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.models import Head, adapters, inner_model
from fastpref.trainers.config import unsupported
from fastpref.trainers.loading import with_dtype

WANT = "a causal language model, a name or an adapter's folder (or None with adapters on the student: itself without)"


def load_teacher(teacher: Any, args: Any) -> Any:
    """The teacher from a model, a name or an adapter's folder, and the name of its tokenizer or None.

    A teacher that is loaded by name has the dtype of its own files unless `teacher_model_init_kwargs` says otherwise.

    Returns:
        (model or None, name or None).

    Raises:
        ValueError, TypeError: it is something else, or `teacher_model_init_kwargs` are for a model that is loaded.
    """
    from transformers import AutoModelForCausalLM

    if teacher is None:
        teacher = args.teacher_model_name_or_path
    if isinstance(teacher, str):
        kwargs = {"trust_remote_code": args.trust_remote_code} | (args.teacher_model_init_kwargs or {})
        if args.teacher_model_revision is not None:
            kwargs["revision"] = args.teacher_model_revision
        kwargs = with_dtype(kwargs, "auto", "teacher_model_init_kwargs")
        return adapters.load(AutoModelForCausalLM, teacher, **kwargs), adapters.tokenizer_source(teacher)
    if args.teacher_model_init_kwargs:
        raise ValueError("teacher_model_init_kwargs: got some with a loaded teacher, want them only with its name")
    if teacher is not None and not isinstance(teacher, torch.nn.Module):
        raise TypeError(f"teacher_model: got {type(teacher).__name__}, want {WANT}")
    return teacher, None if teacher is None else inner_model(teacher).config._name_or_path or None


def common_vocabulary(student: Head, teacher: Head, tokenizer: Any, source: str | None, trust: bool) -> int:
    """How many tokens both models have: the smaller vocabulary, where they differ by padding alone.

    Args:
        student, teacher: the heads.
        tokenizer: the student's.
        source: where the teacher's tokenizer is, or None. One that cannot be read counts as unknown, and then the
            sizes must be equal.
        trust: run Python code that comes with the teacher's tokenizer.

    Raises:
        ValueError: the tokenizers differ, or the smaller vocabulary lacks tokens of the tokenizer.
    """
    sizes = student.weight.shape[0], teacher.weight.shape[0]
    other = _vocabulary(source, trust)
    if other is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"teacher_model: got a vocabulary of {sizes[1]} tokens, want the student's {sizes[0]}, or the teacher's "
            "tokenizer beside it, to see that they differ by padding alone"
        )
    own = tokenizer.get_vocab()
    if other is not None and other != own:
        token = min(t for t in own.keys() | other.keys() if own.get(t) != other.get(t))
        raise ValueError(
            f"teacher_model: got a teacher whose tokenizer has {token!r} as {other.get(token)}, the student's as "
            f"{own.get(token)}; want a teacher with the same tokenizer"
        )
    if min(sizes) < len(tokenizer):
        raise ValueError(
            f"teacher_model: got vocabularies of {sizes[0]} (student) and {sizes[1]} tokens, want at least "
            f"{len(tokenizer)} in both: those of the tokenizer"
        )
    return min(sizes)


def _vocabulary(source: str | None, trust: bool) -> dict[str, int] | None:
    from transformers import AutoTokenizer

    if source is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust).get_vocab()
    except (OSError, ValueError, KeyError, TypeError):  # a folder without one, in any form
        return None


def check_transform(student: Head, teacher: Head) -> None:
    """The soft caps of both heads must be one: it is applied to both logits in one pass.

    Raises:
        ValueError: they differ.
    """
    if student.softcap != teacher.softcap:
        raise unsupported("teacher_model", f"a soft cap of {teacher.softcap}", f"the student's is {student.softcap}")


def cut(head: Head, vocabulary: int) -> Head:
    """The head without the tokens from `vocabulary` on."""
    if head.weight.shape[0] == vocabulary:
        return head
    return head._replace(weight=head.weight[:vocabulary], bias=None if head.bias is None else head.bias[:vocabulary])


def kept_head(head: Head) -> Head:
    """The head by itself, so that the rest of its model can be freed."""
    weight, bias = head.weight.detach().clone(), head.bias
    return head._replace(weight=weight, bias=None if bias is None else bias.detach().clone())


def matched(hidden: Tensor, teacher: Head, student: Head, cast: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden states, weight, bias) of the teacher for `linear_token_kl`, which scales both logits as the student's.

    `cast`: autocast gives all of them its dtype. Otherwise the hidden states take that of the weight.
    """
    ratio = teacher.logit_scale / student.logit_scale
    if ratio != 1:
        hidden = hidden * ratio
    bias = teacher.bias if teacher.bias is None or ratio == 1 else teacher.bias * ratio
    return hidden if cast else hidden.to(teacher.weight.dtype), teacher.weight, bias


def stored_dtype(name: str, autocast: torch.dtype | None, weight: Tensor) -> torch.dtype:
    """The dtype of cached hidden states: the one asked for, or the one that the head's product takes."""
    if name != "auto":
        return getattr(torch, name)
    return autocast or weight.dtype
