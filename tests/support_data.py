"""Messages and data sets in few words."""

from __future__ import annotations

from typing import Any

import datasets


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def dataset(*records: dict[str, Any]) -> Any:
    return datasets.Dataset.from_list(list(records))
