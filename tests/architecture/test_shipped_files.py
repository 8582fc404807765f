"""Every config that the project ships loads, and every field that its documents name exists."""

import json
import re
from pathlib import Path

import pytest

from megatron_intuitor.config import all_fields, all_sections, check_config, load_config
from tests.architecture.source_tree import ROOT

CONFIGS = sorted(path for folder in ("examples", "slurm", "docs", "tools") for path in (ROOT / folder).rglob("*.y*ml"))
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "slurm/*", "examples/**/*.md", "Makefile")
    for path in ROOT.glob(pattern)
    if path.is_file()
)


def test_the_quickstart_is_shipped() -> None:
    command = re.search(r"megatron_intuitor train (\S+\.yaml)", (ROOT / "Makefile").read_text())
    assert command
    assert ROOT / command[1] in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_config(path: Path, tmp_path: Path) -> None:
    run = load_config(path, ["--output_dir", str(tmp_path / "out")])
    if (run.model.path / "config.json").is_file():
        check_config(run, run.parallel.tensor * run.parallel.pipeline)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_fields_that_exist(path: Path) -> None:
    """``--section.field`` anywhere, and ```section.field``` where the first name is a section."""
    text = path.read_text(encoding="utf-8")
    known = {*all_fields(), *all_sections()}
    named = set(re.findall(r"--([a-z]\w*(?:\.\w+)+)", text)) - {"section.field"}
    first = {name.partition(".")[0] for name in all_sections()}
    named |= {name for name in re.findall(r"`([a-z]\w*(?:\.\w+)+)`", text) if name.partition(".")[0] in first}
    maps = tuple(f"{name}." for name, field in all_fields().items() if field.type_text.startswith("map"))
    files = (".json", ".jsonl", ".py", ".md", ".yaml", ".html", ".sbatch")
    assert {name for name in named if not name.startswith(maps) and not name.endswith(files)} <= known


def test_shipped_problems_are_json_lines() -> None:
    for path in ROOT.glob("examples/**/*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert isinstance(json.loads(line), dict), path
