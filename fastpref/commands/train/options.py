"""The options of `fastpref train`: a run's own and those of a method's configuration, from YAML and arguments."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from fastpref.commands.train.adapters import AdapterOptions, checked
from fastpref.commands.train.served import ServerOptions
from fastpref.trainers.config import PreferenceConfig
from fastpref.trainers.rl_config import OnlineConfig

LAST = "last"


@dataclass
class RunOptions(AdapterOptions):
    """What to train, on which data, and with which adapters."""

    _argument_group_name = "model, data and adapters"

    config: str | None = field(
        default=None, metadata={"help": "A YAML file with any of these options; those given here win."}
    )
    model: str = field(
        default="smollm2",
        metadata={
            "help": "A folder, a hub id, smollm2, or tiny (random weights, to try things out). An adapter goes on "
            "training, compared with what it is now."
        },
    )
    data: list[str] | None = field(
        default=None, metadata={"help": "Files or folders: JSON lines, JSON, Parquet, CSV, datasets (else a sample)."}
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "The same for held-out data: evaluated before and after training."}
    )
    eval_split: float | None = field(default=None, metadata={"help": "Hold out this share of --data instead."})
    resume: str | None = field(
        default=None, metadata={"help": f"A checkpoint, or {LAST}: of --output_dir.", "nargs": "?", "const": LAST}
    )


@dataclass
class OnlineOptions(ServerOptions, RunOptions):
    """The same, and what samples and what rewards responses."""

    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "What rewards responses, one or several: a reward model's folder or hub id; a function, as "
            "module:name or file.py:name, called with (prompt, responses), or as TRL does if it has `completions`; or "
            "judge:FILE.json, a language model with its server and rubric."
        },
    )
    heldout_reward: list[str] | None = field(
        default=None, metadata={"help": "The same, but nothing is learnt from it: it shows a reward that is exploited."}
    )
    stop_at_kl: float | None = field(
        default=None, metadata={"help": "Stop where the exact KL of a response is above this, in nats."}
    )
    stop_patience: int | None = field(
        default=None,
        metadata={"help": "Stop where the held-out reward was below its best for so many logs while --reward rose."},
    )


def read_options(
    method: str, configs: Mapping[str, type[PreferenceConfig]], argv: Sequence[str]
) -> tuple[RunOptions, dict[str, Any]]:
    """(options of the run, fields of the configuration that were given).

    Args:
        method: of `configs`.
        configs: every method's configuration, to say whose an option is that this one lacks.
        argv: the arguments.

    Raises:
        ValueError: names the option, or the file and its key.
    """
    kind = _kind(configs[method])
    parser = _Parser([kind, configs[method]], prog=f"fastpref train {method}", allow_abbrev=False)
    parser.owners = {name: _names(config) for name, config in configs.items()}
    given = parser.given(argv)
    if "config" in given:
        given = _from_yaml(parser, Path(given["config"])) | given
    own = {known.name for known in fields(kind)}
    options = kind(**{name: value for name, value in given.items() if name in own})
    return _checked(options), {name: value for name, value in given.items() if name not in own}


def _kind(config_class: type[PreferenceConfig]) -> type[RunOptions]:
    return OnlineOptions if issubclass(config_class, OnlineConfig) else RunOptions


def _names(config_class: type[PreferenceConfig]) -> set[str]:
    return {known.name for owner in (_kind(config_class), config_class) for known in fields(owner) if known.init}


class _Parser(HfArgumentParser):
    """An argument parser that raises errors, and knows which options were given."""

    owners: Mapping[str, set[str]]  # the options of every method

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:  # `bool | None`: true without a value, as others
                action.nargs, action.const = "?", True
            if action.dest != "help" and action.help:
                action.help = action.help.replace("%%", "%").replace("%", "%%")  # some of transformers' have a bare one

    @property
    def names(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help"]

    def dest(self, name: object) -> str:
        """The option that a file names, by any of its names, with hyphens or without."""
        text = str(name).replace("_", "-")
        spelt = {option.lstrip("-").replace("_", "-"): a.dest for a in self._actions for option in a.option_strings}
        return spelt.get(text, str(name).replace("-", "_"))

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        unset = object()
        found, rest = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(self.names, unset)))
        if rest:
            known = [text for action in self._actions for text in action.option_strings]
            name = rest[0].partition("=")[0]
            raise ValueError(f"{name}: {self.unknown(name, known)}")
        return {name: value for name, value in vars(found).items() if value is not unset}

    def unknown(self, name: str, known: Sequence[str]) -> str:
        """What to say of an option that is none: whose it is, or which are like it."""
        dest = name.lstrip("-").replace("-", "_")
        others = [method for method, options in self.owners.items() if dest in options]
        return f"an option of {', '.join(others)}, not of this" if others else f"no such option{near(name, known)}"


def near(name: str, known: Sequence[str]) -> str:
    """The names closest to an unknown one, for its error message."""
    matches = difflib.get_close_matches(name, known, n=3)
    return f", want {' or '.join(matches)}" if matches else ""


def _from_yaml(parser: _Parser, path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{error}; run `pip install pyyaml`") from error
    try:
        text = path.read_text(encoding="utf-8")
        found, written = yaml.safe_load(text) or {}, yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"--config: {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: got {type(found).__name__}, want options as `name: value`")
    found, written = ({parser.dest(name): value for name, value in read.items()} for read in (found, written or {}))
    known = [name for name in parser.names if name != "config"]
    for name in written:
        if name not in known:
            raise ValueError(f"{path}: {name}: {parser.unknown(name, known)}")
    # what can be an argument is read like one: to YAML 1e-6 is a text, and `no` is false
    arguments = [text for name, value in found.items() for text in _arguments(name, value, written[name])]
    try:
        return found | parser.given(arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _arguments(name: str, value: Any, written: Any) -> list[str]:
    if isinstance(value, str | int | float):
        return [f"--{name}={written}"]
    if isinstance(value, list) and value and all(isinstance(item, str | int | float) for item in value):
        return [f"--{name}", *written]
    return []


def _checked(options: RunOptions) -> RunOptions:
    if options.eval_split is not None and not 0 < options.eval_split < 1:
        raise ValueError(f"eval_split: got {options.eval_split}, want a share between 0 and 1")
    if options.eval_split is not None and options.eval_data is not None:
        raise ValueError("eval_split: got one beside eval_data, want one of them")
    checked(options)
    return options
