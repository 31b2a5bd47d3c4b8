"""The heads of real models: hidden size, vocabulary, soft cap, and where each is written down."""

from __future__ import annotations

from typing import NamedTuple


class HeadShape(NamedTuple):
    d: int
    vocab: int
    source: str
    softcap: float | None = None


# Hidden size and vocabulary are `hidden_size` and `vocab_size` of the named config.json on huggingface.co.
HEADS = {
    "smollm2-135m": HeadShape(576, 49152, "HuggingFaceTB/SmolLM2-135M config.json"),
    "smollm2-1.7b": HeadShape(2048, 49152, "HuggingFaceTB/SmolLM2-1.7B config.json"),
    "qwen2.5-0.5b": HeadShape(896, 151936, "Qwen/Qwen2.5-0.5B config.json"),
    "qwen2.5-7b": HeadShape(3584, 152064, "Qwen/Qwen2.5-7B config.json"),
    "llama-3-8b": HeadShape(4096, 128256, "meta-llama/Meta-Llama-3-8B config.json; arXiv 2407.21783 table 3"),
    "llama-3-70b": HeadShape(8192, 128256, "meta-llama/Meta-Llama-3-70B config.json; arXiv 2407.21783 table 3"),
    "liger-1370": HeadShape(4096, 131072, "the shape of the figures in linkedin/Liger-Kernel pull request 1370"),
    "llama-3.2-1b": HeadShape(2048, 128256, "meta-llama/Llama-3.2-1B config.json"),
    "gemma-2-2b": HeadShape(2304, 256000, "google/gemma-2-2b config.json; soft cap: arXiv 2408.00118 section 2", 30.0),
    "gemma-3-1b": HeadShape(1152, 262144, "google/gemma-3-1b-pt config.json"),
    "gemma-3-4b": HeadShape(2560, 262208, "google/gemma-3-4b-pt config.json, text_config"),
}
