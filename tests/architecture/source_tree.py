"""The package as syntax trees: read once, asked by every architecture test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_intuitor"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: Path
    name: str
    tree: ast.Module
    text: str

    @property
    def room(self) -> str:
        """The first name below the package: ``config``, ``contracts``, ``__main__``; empty for the package itself."""
        return self.name.partition(".")[2].partition(".")[0]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def functions(self) -> list[Function]:
        return [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]

    def imports(self, *, at_import_time: bool = False) -> Iterator[tuple[str, int]]:
        """Full names of imported modules with their lines; relative imports made absolute.

        ``from a import b`` gives ``a.b``, which is a module or something in ``a``.
        """
        for node in self._nodes(self.tree, at_import_time):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, node.lineno
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = self.name.split(".")[: None if self.is_package and node.level == 1 else -node.level]
                    base = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield f"{base}.{alias.name}", node.lineno

    def _nodes(self, tree: ast.AST, at_import_time: bool) -> Iterator[ast.AST]:
        for node in ast.iter_child_nodes(tree):
            if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            yield node
            yield from self._nodes(node, at_import_time)


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    """All modules below the named folders of the project; the package where none is named."""
    found = []
    for folder in folders or (PACKAGE,):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            found.append(Module(path, name, ast.parse(text), text))
    return tuple(found)


def where(module: Module, line: int) -> str:
    """``path:line`` for messages."""
    return f"{module.path.relative_to(ROOT)}:{line}"
