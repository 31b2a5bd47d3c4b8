"""Axolotl: put this into the configuration, and its TRL trainers run on fastpref (see `fastpref.integrations.trl`).

plugins:
  - fastpref.integrations.axolotl.FastprefPlugin
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from fastpref.integrations import trl

if TYPE_CHECKING or importlib.util.find_spec("axolotl") is None:
    BasePlugin = object
else:
    from axolotl.integrations.base import BasePlugin


class FastprefPlugin(BasePlugin):
    """Patches TRL before Axolotl loads its model and builds its trainer."""

    def pre_model_load(self, cfg: Any) -> None:
        trl.patch()
