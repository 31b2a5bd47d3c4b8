"""The configuration of on-policy distillation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastpref.common import checks
from fastpref.trainers.config import PolicyConfig, option, unsupported

STORED = ("auto", "bfloat16", "float16", "float32")
OWN_SAMPLER = "the student samples with transformers"
# field of TRL -> why nothing but its default is possible
REFUSED = {
    "use_vllm": OWN_SAMPLER,
    "cache_implementation": OWN_SAMPLER,
    "generation_kwargs": "want temperature, top_p, top_k, min_p and repetition_penalty",
    "max_tool_calling_iterations": "there are no tool calls",
    "log_completions": "want `fastpref generate` with the student",
    "seq_kd": "want the teacher's completions in the data, by `fastpref generate`",
}


@dataclass
class DistillationConfig(PolicyConfig):
    """The fields of TRL 1.16's `DistillationConfig`, and `lmbda` of its `GKDConfig`.

    Raises:
        ValueError: a field has a value that is not possible, or that fastpref does not support. The message names it.
    """

    learning_rate: float = option(1e-6, "Peak learning rate.")
    max_length: int | None = option(None, "Tokens of a prompt and its completion; longer ones are cut (None: never).")
    disable_dropout: bool = option(False, "Switch the student's dropout off. The teacher never has any.")
    beta: float = option(
        1.0,
        "The divergence: 1 is the reverse KL(student || teacher), 0 the forward KL(teacher || student), between them "
        "the generalised Jensen-Shannon divergence with the teacher's weight beta (arXiv 2306.13649, eq. 1).",
    )
    lmbda: float = option(
        1.0, "Share of batches whose completions the student samples; the others are trained on the data's."
    )
    temperature: float = option(1.0, "Of the softmax that is sampled from, and of both models' in the divergence.")
    num_generations: int = option(1, "Completions that the student samples to each prompt of a batch.")
    max_completion_length: int = option(512, "Most tokens of a sampled completion.")
    top_p: float = option(1.0, "Nucleus; 1 is everything.")
    top_k: int = option(0, "Most likely tokens to sample from; 0 is everything.")
    min_p: float | None = option(None, "Least probability of a token, relative to the most likely one.")
    repetition_penalty: float = option(1.0, "1 is none.")
    teacher_model_name_or_path: str | None = option(
        None,
        "The teacher, where the trainer gets none: a folder, a hub id or an adapter's folder. Without one, a student "
        "with adapters learns from itself without them.",
        aliases=["--teacher"],
    )
    teacher_model_revision: str | None = option(None, "Its revision on the hub.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(None, "For from_pretrained of the teacher.")
    cache_teacher: bool = option(
        False,
        "Keep the teacher's hidden states of the data's completions on disk, and read them instead of running it. They "
        "take 2 or 4 bytes for each scored token and unit of the teacher's hidden size.",
    )
    teacher_cache: str | None = option(
        None, "Folder of the teacher's hidden states (default: fastpref/teacher in the user's cache folder)."
    )
    teacher_cache_dtype: str = option(
        "auto", "What they are stored in. 'auto' is what the head's product takes, so nothing is lost.", choices=STORED
    )
    teacher_tokens: int = option(8192, "Tokens of one forward of the teacher when its hidden states are cached.")
    # TRL's, kept or refused
    shuffle_dataset: bool | None = option(True, "Take records in another order in each epoch.")
    ds3_gather_for_generation: bool = option(True, "Kept for TRL's scripts.")
    use_vllm: bool = option(False, "Not supported.")
    cache_implementation: str | None = option(None, "Not supported.")
    generation_kwargs: dict[str, Any] | str | None = option(None, "Not supported.")
    max_tool_calling_iterations: int | None = option(None, "Not supported.")
    log_completions: bool = option(False, "Not supported.")
    seq_kd: bool = option(False, "Not supported.")

    def __post_init__(self) -> None:
        if isinstance(self.teacher_model_init_kwargs, str):
            self.teacher_model_init_kwargs = json.loads(self.teacher_model_init_kwargs)
        if not self.shuffle_dataset:
            self.train_sampling_strategy = "sequential"
        super().__post_init__()
        for name in ("beta", "lmbda"):
            checks.within(name, getattr(self, name), 0, 1, closed=True)
        for name in ("num_generations", "max_completion_length", "teacher_tokens", "temperature"):
            checks.positive(name, getattr(self, name))
        checks.choice("teacher_cache_dtype", self.teacher_cache_dtype, STORED)
        self.refuse_changed(REFUSED)
        if self.router_aux_loss_coef:
            raise unsupported("router_aux_loss_coef", self.router_aux_loss_coef, "as in TRL, there is none")
        if self.cache_teacher and self.lmbda == 1:
            raise ValueError("cache_teacher: got True with lmbda=1.0, want lmbda below 1: no completion comes twice")

    @property
    def divergence(self) -> tuple[str, float]:
        """(direction, beta) as `fastpref.linear_token_kl` takes them."""
        return {0.0: "forward", 1.0: "reverse"}.get(float(self.beta), "jsd"), self.beta
