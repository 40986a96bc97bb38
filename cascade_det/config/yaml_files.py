"""A YAML file as a flat list of full keys, each with its value and its line.

Configurations come from strangers too, so a file may be broken or hostile. Only plain YAML is read
(text, numbers, booleans, null, lists and mappings); whatever would run code, never end or fill the
memory is refused before a value is made of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cascade_det.errors import ConfigError

# Far more than a dumped configuration has (10 KB, 400 values), and still read at once.
_MAX_BYTES = 256 * 1024
_MAX_VALUES = 10_000

_YAML = "tag:yaml.org,2002:"
_TEXT, _MAPPING = f"{_YAML}str", f"{_YAML}map"
_KINDS = ("bool", "float", "int", "merge", "null", "seq")
_PLAIN = {_TEXT, _MAPPING, *(f"{_YAML}{kind}" for kind in _KINDS)}
_OPEN_TUPLE = re.compile(r"\((?!.*\)$)", re.DOTALL)
_UNCLOSED = re.compile(r"expected ',' or '[]}]'")
_NO_TUPLES = (
    "inside {...} and [...] a comma ends a value, so that (a, b) falls apart. Write [a, b], or "
    "give the key a line of its own."
)


@dataclass(frozen=True)
class Entry:
    """A value in a file.

    Attributes:
        key: full name, such as ``SOLVER.BASE_LR``.
        value: anything plain; a mapping only where it is empty or inside a list.
        line: of the key, from 1 on.
    """

    key: str
    value: Any
    line: int


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, is too large or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8") if len(content) <= _MAX_BYTES else ""
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: cannot be read as a configuration file ({error.reason} at byte "
            f"{error.start}). Save it as UTF-8 text."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ConfigError(f"{path}: cannot be read as a configuration file ({error}).") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(
            f"{path}: has more than {_MAX_BYTES // 1024} KiB, which no configuration needs. "
            "Is it another kind of file?"
        )
    return text


def read_entries(text: str, path: Path) -> list[Entry]:
    """The values of a file in their order; those of a merge key (``<<``) before the others.

    Args:
        text: of the file.
        path: of the file, for messages.

    Raises:
        ConfigError: it is not one YAML mapping of nested text keys, has a key twice in one
            mapping, or holds a tag, a date, binary data, or aliases that make very many values.
            The message begins with file and line, and quotes what stands there.
    """
    loader = None
    try:
        loader = _Loader(text)
        loader.name = str(path)  # the marks of all nodes carry it
        return _entries(loader, loader.get_single_node(), path)
    except ConfigError:  # a ValueError too
        raise
    except yaml.YAMLError as error:
        raise ConfigError(_invalid(path, error)) from error
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply for a configuration.") from None
    except (ValueError, OverflowError) as error:  # of escapes and directives that PyYAML converts
        where = path if loader is None else _at(loader.get_mark())
        raise ConfigError(
            f"{where}: this is not valid YAML: the number in an escape or a directive is too large."
        ) from error


class _Loader(yaml.SafeLoader):
    """Refuses any node that is not plain as soon as it is read, before values are made of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        # Values at and below each node that is complete, its aliases written out.
        self._sizes: dict[yaml.Node, float] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if not is_alias:
            self._check(node)
        return node

    def _check(self, node: yaml.Node) -> None:
        if node.tag not in _PLAIN:
            tag = node.tag.replace(_YAML, "!!")[:200]
            raise ConfigError(
                f"{_at(node.start_mark)}: {_name(node)} has the tag {tag}. Only plain YAML is "
                "read: no tag is ever executed. Write the value itself in place of the tag, and "
                "put quotes around it if it is text."
            )
        values: list[yaml.Node] = []
        keys: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys, values = [key for key, _ in node.value], [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            values = node.value
        _refuse_duplicates(keys)
        if isinstance(node, yaml.CollectionNode) and node.flow_style:
            _refuse_tuples(values)
        # A child that is not complete is a node inside itself, which has no end.
        size = 1 + sum(self._sizes.get(child, math.inf) for child in (*keys, *values))
        if size > _MAX_VALUES:
            raise ConfigError(
                f"{_at(node.start_mark)}: makes more than {_MAX_VALUES} values, which no "
                "configuration needs. Aliases (*name) repeat what they stand for: use fewer."
            )
        self._sizes[node] = size


def _refuse_duplicates(keys: list[yaml.Node]) -> None:
    """Refuse duplicate keys; YAML would take the last one."""
    first: dict[str, int] = {}
    for key in keys:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in first:
            raise ConfigError(
                f"{_at(key.start_mark)}: {_name(key)} is set here and in line "
                f"{first[key.value]} already. Remove one of the two."
            )
        first[key.value] = line


def _refuse_tuples(values: list[yaml.Node]) -> None:
    """Refuse Python tuples in flow style, where a comma ends a value."""
    for value in values:
        is_bare = isinstance(value, yaml.ScalarNode) and value.style is None
        if is_bare and _OPEN_TUPLE.match(value.value):
            raise ConfigError(f"{_at(value.start_mark)}: {_NO_TUPLES}")


def _invalid(path: Path, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        where = f"character #x{error.character:04x} at position {error.position}"
        return f"{path}: this is not valid YAML: {where}: {error.reason}."
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: this is not valid YAML: {error}"
    reason = str(error.problem)
    if error.context and error.context_mark:
        reason = f"{error.context} (line {error.context_mark.line + 1}): {reason}"
    hint = " Indent with spaces, not with tabs." if "\\t" in reason else ""
    if _UNCLOSED.search(reason):
        hint = f" If a value there is in round brackets: {_NO_TUPLES}"
    return f"{_at(mark)}: this is not valid YAML: {reason[:400]}.{hint}"


def _at(mark: yaml.Mark) -> str:
    return f"{mark.name}:{mark.line + 1}"


def _entries(loader: _Loader, root: yaml.Node | None, path: Path) -> list[Entry]:
    if root is not None and not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "single value"
        raise ConfigError(f"{path}: holds a {kind}, not a mapping of keys to values.")
    entries = [] if root is None else list(_leaves(loader, root, ""))
    if not entries:
        raise ConfigError(f"{path}: the file is empty. It needs at least one KEY: value.")
    return entries


def _leaves(loader: _Loader, node: yaml.MappingNode, prefix: str) -> Iterator[Entry]:
    loader.flatten_mapping(node)  # merge keys; an earlier value of the same key is overridden
    for key, value in node.value:
        if key.tag != _TEXT or "." in key.value or not isinstance(key, yaml.ScalarNode):
            raise ConfigError(
                f"{_at(key.start_mark)}: {prefix}{_name(key)} is not a key. Nest the parts: "
                "'MODEL:' and, indented below it, 'DEVICE: cpu'."
            )
        full_key = prefix + key.value
        if isinstance(value, yaml.MappingNode) and value.tag == _MAPPING and value.value:
            yield from _leaves(loader, value, f"{full_key}.")
        else:
            yield Entry(full_key, _value(loader, full_key, value), key.start_mark.line + 1)


def _name(node: yaml.Node) -> str:
    return node.value[:200] or "''" if isinstance(node, yaml.ScalarNode) else f"a {node.id}"


def _value(loader: _Loader, full_key: str, node: yaml.Node) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, LookupError) as error:  # of 0x_, !!bool maybe, or a million digits
        raise ConfigError(
            f"{_at(node.start_mark)}: the value of {full_key} is not a number or word that YAML "
            "can read. Put quotes around it if it is text."
        ) from error
