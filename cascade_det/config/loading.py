"""YAML files and command-line options into a configuration, loudly and safely.

A layer is one file or the options; later layers win. Each value is checked as it is merged, so
that an error names the very file that it stands in, not the one that was asked for.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY, CfgNode

from cascade_det.config.defaults import get_cfg
from cascade_det.config.keys import flat
from cascade_det.errors import ConfigError

# Keys that may be null, with the type of their values otherwise.
_NULLABLE: dict[str, type] = {"SOLVER.WEIGHT_DECAY_BIAS": float}

_EXAMPLES: dict[type, str] = {
    bool: "Write True or False.",
    int: "Write a whole number, such as 90000.",
    float: "Write a number, such as 0.02.",
    str: "Put quotes around it if it is text.",
}


def load_config(config_file: str | Path | None, opts: Sequence[Any] = ()) -> CfgNode:
    """The default configuration with a file and command-line options merged into it.

    Args:
        config_file: a YAML file, ours or one that Detectron2 dumped. Its ``_BASE_`` (a path or
            a list of paths, relative to the file) is merged before it. ``None`` for no file.
        opts: ``KEY VALUE`` pairs in one flat sequence, as they come from the command line.

    Returns:
        The configuration, not frozen. Keys are not checked against each other: see
        ``check_config``.

    Raises:
        ConfigError: a file cannot be read or is not a mapping, a key is unknown, or a value has
            the wrong type. The message names file, key, value and remedy.
    """
    cfg = get_cfg()
    merge_config(cfg, config_file, opts)
    return cfg


def merge_config(cfg: CfgNode, config_file: str | Path | None, opts: Sequence[Any] = ()) -> None:
    """Merge a file and options into ``cfg`` in place; see ``load_config``."""
    if config_file is not None:
        _merge_file(cfg, Path(config_file).expanduser(), including=())
    if len(opts) % 2:
        raise ConfigError(
            f"Options come as pairs, KEY VALUE, but there are {len(opts)} items: {list(opts)}. "
            "Separate key and value by a space, and quote a value that contains spaces."
        )
    for key, value in zip(opts[0::2], opts[1::2], strict=True):
        _merge_value(cfg, str(key), value, "command line")


def _merge_file(cfg: CfgNode, path: Path, including: tuple[Path, ...]) -> None:
    if path.resolve() in including:
        raise ConfigError(f"{path}: {BASE_KEY} leads back to this file. Remove one of the links.")
    content = _read_yaml(path)
    for base in _bases(content, path):
        _merge_file(cfg, base, (*including, path.resolve()))
    version = content.get("VERSION", cfg.VERSION)
    if version != cfg.VERSION:
        raise ConfigError(
            f"{path}: VERSION is {version!r}, but only {cfg.VERSION} is read. "
            "Let Detectron2 load the file and dump it again to upgrade it."
        )
    for key, value in _leaves(content, "", path):
        _merge_value(cfg, key, value, str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file ({error}).") from error
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"{path}: {error}\nOnly plain YAML is read: no tag is ever executed. Write the value "
            "itself in place of the tag."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not valid YAML: {error}") from error
    if content is None:
        raise ConfigError(f"{path}: the file is empty. It needs at least one KEY: value.")
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(f"{path}: holds a {kind}, not a mapping of keys to values.")
    return content


def _bases(content: dict[str, Any], path: Path) -> list[Path]:
    """Take ``_BASE_`` out of ``content``: the files to merge before it, in order."""
    named = content.pop(BASE_KEY, [])
    bases = [named] if isinstance(named, str) else named
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: {BASE_KEY} is {named!r}; give a path or a list of paths.")
    found = [path.parent / Path(base).expanduser() for base in bases]
    for base in found:
        if not base.is_file():
            raise ConfigError(
                f"{path}: {BASE_KEY} names {base}, which does not exist. "
                "The path is relative to the file that it stands in."
            )
    return found


def _leaves(content: dict[str, Any], prefix: str, path: Path) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if not isinstance(key, str) or "." in key:
            raise ConfigError(
                f"{path}: {prefix}{key} is not a key. Nest the parts: 'MODEL:' and, indented "
                "below it, 'DEVICE: cpu'."
            )
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.", path)
        else:
            yield f"{prefix}{key}", value


def _merge_value(cfg: CfgNode, full_key: str, raw: object, source: str) -> None:
    *parents, name = full_key.split(".")
    node: Any = cfg
    for part in parents:
        node = node.get(part) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or name not in node:
        raise _unknown_key(cfg, full_key, source)
    if isinstance(node[name], CfgNode):
        raise ConfigError(
            f"{source}: {full_key} is {raw!r}, but it is a group of keys: "
            f"{', '.join(node[name])}. Set one of them."
        )
    wanted = _NULLABLE.get(full_key, type(node[name]))
    value = _converted(raw, wanted)
    # Not isinstance: to Python a bool is an int, but "MAX_ITER: yes" is a mistake.
    if type(value) is not wanted and not (value is None and full_key in _NULLABLE):
        raise _wrong_type(full_key, value, wanted, source)
    node[name] = value


def _converted(raw: object, wanted: type) -> object:
    value = _literal(raw) if isinstance(raw, str) else raw
    if wanted is str and isinstance(raw, str) and not isinstance(value, str):
        return raw  # a folder may be called 2024
    if wanted is float and type(value) is int:
        return float(value)
    if wanted in (list, tuple) and isinstance(value, (list, tuple)):
        return wanted(value)
    return value


def _literal(text: str) -> object:
    """The Python value that ``text`` spells, such as ``(640, 800)``, or ``text`` itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _wrong_type(full_key: str, value: object, wanted: type, source: str) -> ConfigError:
    is_list = wanted in (list, tuple)
    remedy = "Write [a, b], or [a] for a single value." if is_list else _EXAMPLES[wanted]
    return ConfigError(
        f"{source}: {full_key} is {value!r}, of type {type(value).__name__}, "
        f"but a {'list' if is_list else wanted.__name__} is expected. {remedy}"
    )


def _unknown_key(cfg: CfgNode, full_key: str, source: str) -> ConfigError:
    known = {key.upper(): key for key in flat(cfg)}
    nearest = difflib.get_close_matches(full_key.upper(), known, n=1, cutoff=0.5)
    hint = f"Did you mean {known[nearest[0]]}?" if nearest else "No known key resembles it."
    return ConfigError(f"{source}: there is no key {full_key}. {hint}")
