"""What keeps the code readable: lengths, docstrings, no print, quiet room fronts, nothing about where it was made."""

import ast
import subprocess

import pytest

from tests.architecture.source_tree import PACKAGE, ROOT, Module, modules, where

LONGEST_FUNCTION = 80
LONGEST_FILE = 400
SHIPPED = [folder for folder in (PACKAGE, "checkpoint_convert", "tools", "examples") if (ROOT / folder).is_dir()]

# In two parts, so that this file does not hold what it forbids.
FORBIDDEN = [a + b for a, b in [("/work", "/"), ("/opt/", "wheels"), ("proto", "types/"), ("sha", "red/findings")]]
FORBIDDEN += [a + b for a, b in [("py", "pi.org"), ("python", "hosted.org"), ("find", "ings/"), ("/root", "/")]]
TEXT_FILES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".sbatch", ".html", ".js", ".css", ""}


def test_functions_and_files_are_short() -> None:
    breaches = []
    for module in modules(*SHIPPED, "tests"):
        lines = module.text.count("\n")
        if lines > LONGEST_FILE:
            breaches.append(f"{where(module, 1)}: {lines} lines, at most {LONGEST_FILE}")
        for function in module.functions:
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > LONGEST_FUNCTION:
                breaches.append(f"{where(module, function.lineno)} {function.name}: {length} lines")
    assert not breaches, "\n".join(breaches)


def undocumented(module: Module) -> list[str]:
    """Public classes, functions and methods without a docstring; what is inside a function is not public."""
    missing = [] if ast.get_docstring(module.tree) else [where(module, 1)]

    def walk(body: list[ast.stmt]) -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            overload = any("overload" in ast.unparse(d) or "setter" in ast.unparse(d) for d in node.decorator_list)
            if not ast.get_docstring(node) and not overload:
                missing.append(f"{where(module, node.lineno)} {node.name}")
            if isinstance(node, ast.ClassDef):
                walk(node.body)

    walk(module.tree.body)
    return missing


def test_everything_public_has_a_docstring() -> None:
    missing = [line for module in modules(*SHIPPED) for line in undocumented(module)]
    assert not missing, "\n".join(missing)


def test_every_test_file_says_what_it_is() -> None:
    assert [str(m.path) for m in modules("tests") if m.text.strip() and not ast.get_docstring(m.tree)] == []


def test_the_package_never_prints() -> None:
    calls = [
        where(module, node.lineno)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls, "\n".join(calls)


def swallows_everything(node: ast.AST) -> bool:
    """Whether a handler catches every error and neither raises nor does anything with what it caught."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    named = node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException")
    inside = [inner for statement in node.body for inner in ast.walk(statement)]
    raises = any(isinstance(inner, ast.Raise) for inner in inside)
    used = any(isinstance(inner, ast.Name) and inner.id == node.name for inner in inside)
    return not (named or raises or used)


def test_nothing_swallows_every_error() -> None:
    broad = [
        where(module, node.lineno)
        for module in modules(*SHIPPED)
        for node in ast.walk(module.tree)
        if swallows_everything(node)
    ]
    assert not broad, "\n".join(broad)


def test_room_fronts_only_re_export() -> None:
    breaches = []
    for module in modules():
        if not module.is_package or not module.room:
            continue
        for node in module.tree.body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            exports = isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]
            if not (docstring or exports or isinstance(node, ast.Import | ast.ImportFrom)):
                breaches.append(where(module, node.lineno))
    assert not breaches, "\n".join(breaches)


def test_all_names_in_all_exist() -> None:
    for module in modules():
        exported = next(
            (
                ast.literal_eval(n.value)
                for n in module.tree.body
                if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
            ),
            [],
        )
        bound = {
            alias.asname or alias.name
            for n in module.tree.body
            if isinstance(n, ast.ImportFrom | ast.Import)
            for alias in n.names
        }
        bound |= {n.name for n in module.tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        bound |= {ast.unparse(t) for n in module.tree.body if isinstance(n, ast.Assign) for t in n.targets}
        assert set(exported) <= bound, module.name


def test_no_word_of_where_it_was_made() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the list of the project's own files is git's")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [ROOT / name for name in names if (ROOT / name).suffix in TEXT_FILES and (ROOT / name).is_file()]
    breaches = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in paths
        for word in FORBIDDEN
        if word in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert not breaches, "\n".join(breaches)
