"""A model's tags and its card (`README.md`): what it was trained from, how, and with which versions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("fastpref", "transformers", "torch", "datasets", "peft")


class Method(NamedTuple):
    """A training method, as the card names it."""

    name: str
    tag: str  # TRL's, where it has the method
    paper: str
    arxiv: str


METHODS = {
    "DPO": Method(
        "DPO", "dpo", "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "2305.18290"
    ),
    "IPO": Method(
        "IPO", "ipo", "A General Theoretical Paradigm to Understand Learning from Human Preferences", "2310.12036"
    ),
    "KTO": Method("KTO", "kto", "KTO: Model Alignment as Prospect Theoretic Optimization", "2402.01306"),
    "ORPO": Method("ORPO", "orpo", "ORPO: Monolithic Preference Optimization without Reference Model", "2403.07691"),
    "CPO": Method(
        "CPO", "cpo",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        "2401.08417",
    ),
    "SimPO": Method(
        "SimPO", "simpo", "SimPO: Simple Preference Optimization with a Reference-Free Reward", "2405.14734"
    ),
    "RLOO": Method(
        "RLOO", "rloo",
        "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
        "2402.14740",
    ),
    "GRPO": Method(
        "GRPO", "grpo", "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "2402.03300",
    ),
    "Distillation": Method(
        "on-policy distillation", "distillation",
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", "2306.13649",
    ),
    "Reward": Method(
        "Reward", "reward-trainer", "Training language models to follow instructions with human feedback", "2203.02155"
    ),
    "PRM": Method(
        "PRM", "prm", "Solving math word problems with process- and outcome-based feedback", "2211.14275"
    ),
}  # fmt: skip


def tags_of(method: Method) -> list[str]:
    """The tags of a model that was trained by this method."""
    return ["fastpref", method.tag]


def base_model(model: Any) -> str | None:
    """The hub id that a model came from. None for a folder, whose path means nothing elsewhere."""
    name = getattr(model.config, "_name_or_path", None)
    return name if name and not Path(name).is_dir() else None


def write_card(
    path: Path, method: Method, *, model_name: str, base: str | None, dataset: str | None, tags: Iterable[str]
) -> None:
    """Writes a model card to `path`. `base` and `dataset` are hub ids, or None."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base, model_name=model_name, datasets=[dataset] if dataset else None, library_name="transformers",
        tags=sorted({*tags, *tags_of(method), "generated_from_trainer"}),
    )  # fmt: skip
    origin = f"a fine-tuned version of [{base}](https://huggingface.co/{base})" if base else "a fine-tuned model"
    data_of = f" on [{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else ""
    versions = "\n".join(f"- {name}: {version}" for name, version in _versions())
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {model_name}\n\nThis model is {origin}{data_of}, trained with "
        f"`fastpref.trainers` by {method.name}: [{method.paper}](https://huggingface.co/papers/{method.arxiv}).\n\n"
        f"## Versions\n\n{versions}\n"
    )
    ModelCard(text).save(path)


def _versions() -> Iterable[tuple[str, str]]:
    from importlib import metadata

    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
