"""What the repository's own files promise each other: the two READMEs, and the lock and pyproject.toml."""

import re
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_FENCE: Final = re.compile(r"^```(?P<language>\S*).*?^```$", re.MULTILINE | re.DOTALL)
_HEADING: Final = re.compile(r"^(#+) ", re.MULTILINE)


def outline(name: str) -> list[str]:
    """List the headings' levels and the code blocks' languages of a page, in order."""
    text = (ROOT / name).read_text()
    blocks = {match.start(): f"```{match['language']}" for match in _FENCE.finditer(text)}
    # Comments of shell blocks look like headings; blanks of equal length keep the places.
    prose = _FENCE.sub(lambda match: " " * len(match[0]), text)
    headings = {match.start(): match[1] for match in _HEADING.finditer(prose)}
    return [mark for _, mark in sorted((blocks | headings).items())]


def commands(name: str) -> list[str]:
    """List the lines of a page's shell blocks, less comments."""
    blocks = [match[0] for match in _FENCE.finditer((ROOT / name).read_text()) if match["language"] in {"sh", "bash"}]
    lines = [line.split(" #")[0].rstrip() for block in blocks for line in block.splitlines()[1:-1]]
    return [line for line in lines if line and not line.startswith("#")]


def test_both_readmes_have_the_same_parts() -> None:
    assert outline("README.md") == outline("README.zh-CN.md")


def test_both_readmes_give_the_same_commands() -> None:
    assert commands("README.md") == commands("README.zh-CN.md")


def locked() -> dict[str, str]:
    """Return the lock's entries by project name."""
    entries = re.split(r"\n(?=\w)", (ROOT / "requirements.lock").read_text())
    return {re.split(r"[=\[]", entry)[0]: entry for entry in entries if not entry.startswith("#")}


def test_the_lock_names_versions_and_hashes_and_no_addresses() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()
    for name, entry in locked().items():
        assert re.match(r"[a-z0-9-]+==\S+( ; .+)? \\\n    --hash=sha256:[0-9a-f]{64}", entry), name


def test_the_lock_has_everything_that_pyproject_asks_for() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, dev = pyproject["project"], pyproject["dependency-groups"]["dev"]
    groups = [project["dependencies"], *project["optional-dependencies"].values(), dev]
    asked = {re.split(r"[^\w.-]", requirement)[0] for group in groups for requirement in group}
    assert asked <= locked().keys(), "run `make lock`"
