"""What newcomers and tools look for: the site, the notebooks, the workflow, the citation, the changelog."""

import configparser
import datetime
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import griffe
import pytest
import yaml
from places import TOP

import gradindex
from gradindex.cli import main

REPOSITORY = "https://github.com/gradindex/gradindex"
NOTEBOOKS = sorted((TOP / "docs" / "notebooks").glob("*.ipynb"))
CONFIG = configparser.ConfigParser()
CONFIG.read(TOP / "setup.cfg")


def loaded(name):
    return yaml.safe_load((TOP / name).read_text())


def pages_of(nav):
    """The pages of a navigation, from top to bottom."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


@pytest.fixture(scope="module")
def hooks():
    specification = importlib.util.spec_from_file_location("site_hooks", TOP / "scripts" / "site_hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_page_of_docs_is_in_the_navigation_once(hooks):
    docs = TOP / "docs"
    files = {str(path.relative_to(docs).with_suffix(".md")) for path in [*docs.rglob("*.md"), *NOTEBOOKS]}
    in_nav = pages_of(loaded("mkdocs.yml")["nav"])
    assert len(in_nav) == len(set(in_nav))
    assert set(in_nav) == files | set(hooks.FROM_TOP.values()) | {"commands.md"}


def test_the_site_fetches_nothing_from_elsewhere():
    site = loaded("mkdocs.yml")
    assert site["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript", "extra_css"} & set(site)


def test_every_public_name_has_a_place_in_the_reference():
    text = "\n".join(path.read_text() for path in (TOP / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    public = {f"gradindex.{name}" for name in gradindex.__all__} - {"gradindex.__version__", "gradindex.GradIndexError"}
    assert public <= shown
    assert "gradindex.errors" in shown
    for name in shown:
        *module, last = name.split(".")
        owner = importlib.import_module(".".join(module)) if module else None
        assert owner is None or hasattr(owner, last), name


def test_the_command_reference_has_every_command_with_its_options_and_example(hooks):
    page = hooks.command_reference(main)
    for name, command in main.commands.items():
        _, _, section = page.partition(f"\n## {name}\n")
        section = section.partition("\n## ")[0]
        assert f"gradindex {name} [OPTIONS]" in section
        assert f"```sh\ngradindex {name} " in section
        for option in command.params:
            assert not isinstance(option, click.Option) or option.opts[0] in section


@pytest.mark.parametrize(
    ("page", "link", "target"),
    [
        ("tasks.md", "../README.md", "index.md"),
        ("results/store.md", "../format.md#shards", "../format.md#shards"),
        ("api/index.md", "../../CHANGELOG.md", "../changelog.md"),
        ("index.md", "docs/format.md", "format.md"),
        ("contributing.md", "README.md#install", "index.md#install"),
        ("explain.md", "notebooks/prediction.ipynb", "notebooks/prediction.md"),
        ("notebooks/prediction.md", "prediction.ipynb", "prediction.ipynb"),
        ("paper.md", "results/paper", f"{REPOSITORY}/tree/main/docs/results/paper"),
        ("search.md", "../scripts/test.sh", f"{REPOSITORY}/blob/main/scripts/test.sh"),
        ("search.md", "../nowhere.md", "../nowhere.md"),
        ("search.md", "https://arxiv.org/abs/2002.08484", "https://arxiv.org/abs/2002.08484"),
        ("search.md", "#recall", "#recall"),
    ],
)
def test_links_on_the_site_lead_to_its_own_pages_or_to_the_repository(hooks, page, link, target):
    assert hooks.redirected(f"[text]({link})", page, REPOSITORY) == f"[text]({target})"


def test_a_notebook_becomes_a_page_with_its_code_outputs_and_pictures(hooks, tmp_path):
    code = {"cell_type": "code", "source": ["f(\n", ")"], "metadata": {}, "outputs": []}
    code["outputs"] = [
        {"output_type": "stream", "text": ["a\n", "b\n"]},
        {"output_type": "execute_result", "data": {"text/plain": "<x>", "text/html": ["<p>\n", "\n", "  x</p>"]}},
        {"output_type": "display_data", "data": {"image/png": "UE5H", "text/plain": "Figure"}},
    ]
    cells = [{"cell_type": "markdown", "source": ["# Title\n", "Text"]}, code | {"metadata": {"alt": "A curve"}}]
    (tmp_path / "some.ipynb").write_text(json.dumps({"cells": cells}))
    made = hooks.notebook_page(tmp_path / "some.ipynb")
    assert made["notebooks/some-1.png"] == b"PNG"
    assert made["notebooks/some.md"].splitlines() == [
        "# Title", "Text", "", "[Download this notebook](some.ipynb){download}", "", "```python", "f(", ")", "```", "",
        "```text", "a", "b", "```", "", "<div>", "<p>", "x</p>", "</div>", "", "![A curve](some-1.png)",
    ]  # fmt: skip


def test_the_reference_shows_names_as_code_and_the_defaults_of_options(hooks):
    code = """
class Options:
    '''See :func:`~gradindex.store.remove` and :class:`Task`.'''

    count: int = option(3, "How many.", flags="-n")
"""
    read = griffe.visit("room", Path("room.py"), code, extensions=griffe.load_extensions(hooks.Readable))
    assert read["Options"].docstring.value == "See `remove` and `Task`."
    assert str(read["Options.count"].value) == "3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_the_outputs_of_one_run_without_an_error(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert {output.get("name") for output in outputs} <= {None, "stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "import gradindex" in "".join(code[0]["source"])
    assert not re.search(r"gradindex\.\w+\._|import _", "".join(line for cell in code for line in cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_again_and_shows_what_it_holds(path, tmp_path):
    code = f"""
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
notebook = nbformat.read({str(path)!r}, as_version=4)
NotebookClient(notebook, km=AsyncKernelManager(transport="ipc"), timeout=600, record_timing=False).execute()
nbformat.write(notebook, "again.ipynb")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def kinds(notebook):
        cells = [cell.get("outputs", []) for cell in json.loads(notebook.read_text())["cells"]]
        shown = [[output for output in outputs if not is_bar(output)] for outputs in cells]
        return [[sorted(output.get("data", {"text": 0})) for output in outputs] for outputs in shown]

    def is_bar(output):
        """A state of a bar of progress, of which there are as many as time allows, or the end of its line."""
        text = "".join(output.get("text", "-"))
        return output.get("name") == "stderr" and (text.startswith("\r") or not text.strip())

    assert kinds(tmp_path / "again.ipynb") == kinds(path)


def test_the_workflow_runs_the_checks_on_every_python_that_the_package_names():
    (job,) = loaded(".github/workflows/checks.yml")["jobs"].values()
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    assert (TOP / ".ci" / "run").exists()
    named = re.findall(r"Python :: (3\.\d+)", CONFIG["metadata"]["classifiers"])
    assert job["strategy"]["matrix"]["python"] == named


def test_templates_of_issues_are_forms():
    for path in (TOP / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = loaded(path)
        if path.name != "config.yml":
            assert {"name", "description", "labels", "body"} == set(form)
            assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])


def test_commits_are_checked_by_the_tools_of_the_checks():
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", TOP / ".pre-commit-config.yaml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    checks = (TOP / "scripts" / "test.sh").read_text()
    (repository,) = loaded(".pre-commit-config.yaml")["repos"]
    tools = [Path(hook["entry"].split()[0]) for hook in repository["hooks"]]
    assert [tool.name for tool in tools] == ["ruff", "ruff", "mypy", "lint-imports"]
    for tool in tools:
        assert tool.parent == Path(".venv/bin")
        assert f'"$venv/{tool.name}"' in checks


def test_the_citation_names_this_version_by_keys_that_the_format_knows():
    citation = loaded("CITATION.cff")
    required = {"cff-version", "message", "title", "authors"}
    optional = {
        "abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license", "license-url",
        "preferred-citation", "references", "repository", "repository-artifact", "repository-code", "type", "url",
        "version",
    }  # fmt: skip
    assert required <= set(citation) <= required | optional
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == gradindex.__version__
    assert citation["license"] == CONFIG["metadata"]["license"]
    assert [set(author) <= {"name", "family-names", "given-names", "orcid"} for author in citation["authors"]] == [True]
    (paper,) = citation["references"]
    assert paper["title"] in (TOP / "README.md").read_text().replace("\n", " ")


def test_the_repository_has_one_address():
    named = [line.partition("=")[2].strip() for line in CONFIG["metadata"]["project_urls"].strip().splitlines()]
    named += [
        CONFIG["metadata"]["url"],
        loaded("CITATION.cff")["repository-code"],
        loaded("mkdocs.yml")["extra"]["repository"],
    ]
    assert {address[: len(REPOSITORY)] for address in named} == {REPOSITORY}


def test_the_changelog_keeps_the_form():
    text = (TOP / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    dates = []
    for version in versions[1:]:
        match = re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d)", version)
        assert match, version
        dates.append(datetime.date.fromisoformat(match[1]))
    assert dates == sorted(dates, reverse=True)
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.+)$", part, re.MULTILINE)
        assert kinds == [kind for kind in order if kind in kinds]
        assert kinds
    for version in re.findall(r"^## (\[[^\]]+\])", text, re.MULTILINE):
        assert f"\n{version}: {REPOSITORY}" in text


def test_each_errand_says_where_it_goes_what_it_registers_and_what_tests_and_tells_it():
    _, _, errands = (TOP / "CONTRIBUTING.md").read_text().partition("\n## Eight errands\n")
    sections = re.split(r"^### ", errands, flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == [
        "A projection", "A layer rule", "An index kind", "A command", "A geometry", "A checkpoint source",
        "A benchmark", "An experiment",
    ]  # fmt: skip
    for section in sections:
        assert re.findall(r"^- \*\*(\w+)\*\*:", section, re.MULTILINE) == [
            "Room", "File", "Registration", "Test", "Docs",
        ]  # fmt: skip
