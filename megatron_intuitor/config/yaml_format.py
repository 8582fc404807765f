"""YAML as configs use it: the safe subset, the number and word rules of YAML 1.2, and no key twice.

PyYAML follows YAML 1.1, where ``1e-6`` is a text, ``no`` is false, ``1:30`` is 90 and ``010`` is 8, and where the last
of two equal keys wins in silence.  Reader and writer share one table of rules, so what is written reads back equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

_DEEPEST_SECTION = 8
"""How deep line numbers are looked for; an alias that contains itself would otherwise never end."""

_UNICODE_BREAKS = "\x85\u2028\u2029"

_RULES = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Reads a config; see the module's docstring."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # PyYAML's own protocol; filled below

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read one mapping and refuse a key that it has twice."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, line) != line:
                twice = f"the key {key.value!r} is given twice, first on line {first[key.value]}; keep one"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads; texts that either version of YAML would take for something else are quoted."""


for _name, _pattern, _first in _RULES:
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Line breaks of Unicode are written as escapes: unquoted or in single quotes they would be read as a plain one."""
    style = '"' if any(mark in text for mark in _UNICODE_BREAKS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """The document in ``text`` and the line of each key by its full name (``rollout.sampling.top_p``).

    Raises:
        yaml.YAMLError: for what is not YAML, has a key twice or needs a Python object.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return loader.construct_document(node), dict(_key_lines(node, "", 0))
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """``value`` (plain Python) as YAML, keys in their given order, no line folded."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """One sentence for an error of `parse_yaml`, with the line where there is one."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {reason}" if mark is not None else reason


def _key_lines(node: yaml.Node, prefix: str, depth: int) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode) or depth > _DEEPEST_SECTION:
        return
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            yield prefix + key.value, key.start_mark.line + 1
            yield from _key_lines(value, f"{prefix}{key.value}.", depth + 1)
