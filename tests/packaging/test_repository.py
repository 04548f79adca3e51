"""What GitHub runs is what anybody can run, and what it asks for exists."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from vllm_moe_offload.cli import app

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
REQUIRED = {"name", "description", "body"}


def commands(job: str) -> list[str]:
    return [step["run"] for step in WORKFLOW["jobs"][job]["steps"] if "run" in step]


def test_github_runs_what_the_projects_own_ci_runs() -> None:
    assert commands("test") == [".ci/run"]
    others = [command.split()[-1] for job in WORKFLOW["jobs"] for command in commands(job)]
    assert sorted(others) == sorted(f".ci/{path.name}" for path in (ROOT / ".ci").iterdir())
    assert all((ROOT / command).stat().st_mode & 0o111 for command in others)


def test_every_python_that_the_package_admits_is_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = WORKFLOW["jobs"]["package"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={pythons[0]}"
    assert [f"Programming Language :: Python :: {python}" for python in pythons] == [
        name for name in project["classifiers"] if "Python :: 3." in name
    ]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_issue_template_asks_what_can_be_answered(path: Path) -> None:
    template: dict[str, Any] = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert template == {"blank_issues_enabled": True}
        return
    assert template.keys() >= REQUIRED
    for field in template["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown")
        assert "value" in field["attributes"] if field["type"] == "markdown" else "label" in field["attributes"]
    known = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"vllm-moe-offload (\w+)", path.read_text())) <= known


def test_the_changelog_names_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in (ROOT / "CHANGELOG.md").read_text()


def test_pages_that_documents_of_the_repository_link_to_exist() -> None:
    for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", "examples/README.md"):
        page = ROOT / name
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{name} links to {target}"
