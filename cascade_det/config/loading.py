"""Merging YAML files and command-line options into a configuration.

A layer is one file or the options; later layers win. The type of each value is checked as it is
merged, so that an error names its line, and its source is kept for ``cascade-det print-config``.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import BASE_KEY, CfgNode

from cascade_det.config.key import shown
from cascade_det.config.shipped import SCHEME, config_path
from cascade_det.config.tree import KEYS, add_model_nodes, flat, get_cfg
from cascade_det.config.yaml_files import Entry, read_entries, read_text
from cascade_det.errors import ConfigError

_REMEDIES = {
    "bool": "Write True or False.",
    "int": "Write a whole number, such as 90000.",
    "float": "Write a number, such as 0.02.",
    "str": "Put quotes around it if it is text.",
    "list": "Write ['a', 'b'] or [1, 2], and ['a'] or [1] for a single value.",
}

COMMAND_LINE = "command line"
_LENGTHS = ("SOLVER.MAX_ITER", "CASCADE.EPOCHS")
_MAX_FILES = 100  # per configuration: bases of bases can name each other without end


@dataclass(frozen=True)
class Setting:
    """A value that a key had during the merge.

    Attributes:
        value: as in the configuration.
        source: ``default``, ``<file>:<line>`` or ``command line``.
    """

    value: Any
    source: str


History = dict[str, list[Setting]]
ConfigFiles = str | Path | Sequence[str | Path] | None


def load_config(config_files: ConfigFiles, opts: Sequence[Any] = ()) -> CfgNode:
    """The default configuration with files and command-line options merged into it.

    Args:
        config_files: a YAML file, ours or one that Detectron2 dumped, or several, each put on top
            of those before it; ``cascade_det://COCO-Detection/x.yaml`` is a file that comes with
            the package. The ``_BASE_`` of a file (a path or a list of paths, relative to the file)
            is merged right before it. ``None`` for no file.
        opts: ``KEY VALUE`` pairs in one flat sequence, as they come from the command line.

    Returns:
        The configuration, not frozen. Keys are not checked against each other: see
        ``check_config``.

    Raises:
        ConfigError: a file cannot be read, is Python or is not a mapping, a key is unknown or set
            twice in one file, a value has the wrong type, or SOLVER.MAX_ITER is set on top of a
            CASCADE.EPOCHS that would overrule it. The message names file, line, key, value and
            remedy.
    """
    cfg = get_cfg()
    merge_config(cfg, config_files, opts)
    return cfg


def merge_config(cfg: CfgNode, config_files: ConfigFiles, opts: Sequence[Any] = ()) -> History:
    """Merge files and options into ``cfg`` in place; see ``load_config``.

    Returns:
        For each key that was set, its value before (as ``default``) and every value that it was
        given, in order. The last one holds.
    """
    merge = _Merge(cfg)
    if isinstance(config_files, (str, Path)):
        config_files = [config_files]
    for file in config_files or ():
        merge.file(_path(str(file)), including=())
    if len(opts) % 2:
        raise ConfigError(
            f"Options come as pairs, KEY VALUE, but there are {len(opts)} items: {list(opts)}. "
            "Separate key and value by a space, and quote a value that contains spaces."
        )
    for key, value in zip(opts[0::2], opts[1::2], strict=True):
        merge.value(str(key), value, COMMAND_LINE)
    merge.check_length()
    return merge.history


def with_cascade_keys(cfg: CfgNode) -> CfgNode:
    """A copy of ``cfg`` with the complete node ``MODEL.CASCADE``.

    A configuration of Detectron2 that allows new keys accepts any, and keeps their values as a YAML
    file spells them: ``(0.9, 0.9)`` is text there.

    Raises:
        ConfigError: a key in that node is unknown, or its value has the wrong type.
    """
    own = {key: value for key, value in flat(cfg).items() if key.startswith("MODEL.CASCADE.")}
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.pop("CASCADE", None)
    add_model_nodes(cfg)
    merge = _Merge(cfg)
    for key, value in own.items():
        merge.value(key, value, "configuration")
    return cfg


class _Merge:
    """A configuration that is being merged, with the history of its keys."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.history: History = {}
        self._files = 0
        self._last_set = ""  # of _LENGTHS

    def file(self, path: Path, including: tuple[str, ...]) -> None:
        """Merge the bases of a file, then the file; ``including`` are the files that led to it."""
        self._files += 1
        if self._files > _MAX_FILES:
            raise ConfigError(f"{path}: is one of more than {_MAX_FILES} files. Use fewer bases.")
        entries = read_entries(read_text(path), path) if not including else _base(path, including)
        real = os.path.realpath(path)
        if real in including:
            raise ConfigError(
                f"{path}: {BASE_KEY} leads back to this file. Remove one of the links."
            )
        if os.path.realpath(os.path.normpath(path)) == real:
            path = Path(os.path.normpath(path))  # configs/base.yaml, not configs/sub/../base.yaml
        for entry in entries:
            if entry.key == BASE_KEY:
                self._bases(entry, path, (*including, real))
        for entry in sorted(entries, key=lambda entry: entry.key != "VERSION"):
            if entry.key != BASE_KEY:  # VERSION first: it explains why other keys are unknown
                self.value(entry.key, entry.value, f"{path}:{entry.line}", including[-1:])

    def _bases(self, entry: Entry, path: Path, including: tuple[str, ...]) -> None:
        bases = [entry.value] if isinstance(entry.value, str) else entry.value
        where = f"{path}:{entry.line}: {BASE_KEY}"
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError(f"{where} is {shown(entry.value)}; give a path or a list of paths.")
        for base in bases:
            try:
                file = path.parent / _path(base)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
            self.file(file, including)

    def value(
        self, full_key: str, raw: object, source: str, included_by: tuple[str, ...] = ()
    ) -> None:
        """Set a key; text is read as a Python literal where the key takes no text."""
        *parents, name = full_key.split(".")
        node: Any = self.cfg
        for part in parents:
            node = node.get(part) if isinstance(node, CfgNode) else None
        if not isinstance(node, CfgNode) or name not in node:
            raise _unknown_key(self.cfg, full_key, source, included_by)
        if isinstance(node[name], CfgNode):
            if raw == {}:
                return
            raise ConfigError(
                f"{source}: {full_key} is {shown(raw)}, but it is a group of keys: "
                f"{', '.join(node[name])}. Set one of them."
            )
        key = KEYS.get(full_key)
        nullable = key.type_if_set if key else None
        wanted = nullable or type(node[name])
        value = _converted(
            raw,
            wanted,
            nullable is not None,
            f"{source}: {full_key}",
            mappings=key is not None and key.mappings,
        )
        if full_key == "VERSION" and value != node[name]:
            raise ConfigError(
                f"{source}: VERSION is {value!r}, but only {node[name]} is read. Let Detectron2 "
                "load the file and dump it again to upgrade it."
            )
        settings = self.history.setdefault(full_key, [Setting(node[name], "default")])
        settings.append(Setting(value, source))
        node[name] = value
        if full_key in _LENGTHS:
            self._last_set = full_key

    def check_length(self) -> None:
        """Refuse SOLVER.MAX_ITER on top of a layer with CASCADE.EPOCHS, which would overrule it."""
        if self._last_set != "SOLVER.MAX_ITER" or "CASCADE.EPOCHS" not in self.history:
            return
        iterations, epochs = (self.history[key][-1] for key in _LENGTHS)
        # In one layer, MAX_ITER is what the rest of the schedule is relative to.
        if epochs.value and _layer(iterations) != _layer(epochs):
            raise ConfigError(
                f"{iterations.source}: SOLVER.MAX_ITER is {iterations.value}, but CASCADE.EPOCHS "
                f"is {epochs.value:g} ({epochs.source}), from which the iterations follow. Set "
                "CASCADE.EPOCHS instead, or to 0 as well."
            )


def _path(name: str) -> Path:
    path = config_path(name) if name.startswith(SCHEME) else Path(os.path.expanduser(name))
    if path.suffix == ".py":
        raise ConfigError(
            f"{path}: is a Python file, such as a LazyConfig, which only Detectron2's "
            "LazyConfig.load reads. Give a YAML file."
        )
    return path


def _layer(setting: Setting) -> str:
    return setting.source.rpartition(":")[0]


def _base(path: Path, including: tuple[str, ...]) -> list[Entry]:
    """The values of a base; errors do not quote it.

    Otherwise a stranger's configuration could name any file of this machine as its base and have it
    printed into a log.
    """
    named = f"It is a {BASE_KEY} of {including[-1]}."
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{path}: is not a file. {named}")
    try:
        text = read_text(path)
    except ConfigError as error:
        raise ConfigError(f"{error} {named}") from error
    try:
        return read_entries(text, path)
    except ConfigError as error:
        found = re.match(rf"{re.escape(str(path))}(:\d+)?", str(error))
        where = found[0] if found else path
        raise ConfigError(
            f"{where}: this cannot be read as a configuration. {named} Give it as --config-file "
            "itself to see why."
        ) from None


def _converted(
    raw: object, wanted: type, is_nullable: bool, where: str, *, mappings: bool
) -> object:
    """``raw`` as a value of type ``wanted``, or a ``ConfigError`` that begins with ``where``."""
    value = _literal(raw) if isinstance(raw, str) else raw
    if wanted is str and isinstance(raw, str) and not isinstance(value, str):
        value = raw  # a folder may be called 2024
    oddity = _oddity(value, mappings) if isinstance(value, (int, str, list, tuple)) else ""
    if oddity:
        raise ConfigError(
            f"{where} holds {oddity}. Write text, numbers, True, False, or lists of them."
        )
    if value is None and is_nullable:
        return value
    # Not isinstance: to Python a bool is an int, but "MAX_ITER: yes" is a mistake.
    if wanted is float and type(value) is int:
        return float(value)
    if wanted in (list, tuple) and isinstance(value, (list, tuple)):
        return wanted(value)
    if type(value) is not wanted:
        raise _wrong_type(where, value, wanted, is_nullable)
    return value


def _literal(text: str) -> object:
    """The Python value that ``text`` spells, such as ``(640, 800)``, or ``text`` itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's remarks about text that is not code
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _oddity(value: object, mappings: bool) -> str:
    """Describe a value, or list item, that no configuration can hold; "" if all are plain."""
    if mappings and isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return next(filter(None, (_oddity(item, mappings) for item in value)), "")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a whole number that is too large for 64 bits"
    if isinstance(value, str) and "\0" in value:
        return "text with a null character"
    if value is None or isinstance(value, (bool, int, float, str)):
        return ""
    return f"a value of type {type(value).__name__} inside a list"


def _wrong_type(where: str, value: object, wanted: type, is_nullable: bool) -> ConfigError:
    kind = "list" if wanted in (list, tuple) else wanted.__name__
    remedy = _REMEDIES[kind]
    if kind == "list" and where.startswith(COMMAND_LINE):
        remedy += " The shell leaves it as it is inside double quotes: \"['a', 'b']\"."
    if kind in ("int", "float") and isinstance(value, (list, tuple)):
        remedy += " A comma makes a list of it."
    return ConfigError(
        f"{where} is {shown(value)}, of type {type(value).__name__}, "
        f"but {'an' if kind == 'int' else 'a'} {kind}{' or None' * is_nullable} is expected. "
        f"{remedy}"
    )


def _unknown_key(
    cfg: CfgNode, full_key: str, source: str, included_by: tuple[str, ...]
) -> ConfigError:
    known = {key.upper(): key for key in flat(cfg)}
    nearest = difflib.get_close_matches(full_key.upper(), known, n=1, cutoff=0.5)
    if included_by and not nearest:  # not quoted, see _base
        return ConfigError(
            f"{source}: no key of a configuration stands here. It is a {BASE_KEY} of "
            f"{included_by[0]}. Give it as --config-file itself to see more."
        )
    hint = f"Did you mean {known[nearest[0]]}?" if nearest else "No known key resembles it."
    if full_key.startswith("-"):
        hint = "Options that begin with - come before the keys."
    return ConfigError(f"{source}: there is no key {full_key[:200]}. {hint}")
