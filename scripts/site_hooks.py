"""What mkdocs.yml adds to the pages of docs/: the command line, the notebooks, and the files of the checkout's top.

MkDocs calls the functions whose names begin with ``on_``; mkdocstrings loads :class:`Readable`.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gradindex.cli import main

TOP = Path(__file__).resolve().parents[1]
# Pages that lie at the top of the checkout, where people look for them first, and what they are called on the site.
FROM_TOP = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)((?:#[^)\s]*)?)(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made: dict[str, str | bytes] = {"commands.md": command_reference(main)}
    for name, uri in FROM_TOP.items():
        made[uri] = (TOP / name).read_text()
    for path in sorted((TOP / "docs" / "notebooks").glob("*.ipynb")):
        made |= notebook_page(path)
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Send links that leave docs/ to the site's own pages, or else to the repository."""
    return redirected(markdown, page.file.src_uri, config.extra["repository"])


def redirected(markdown: str, uri: str, repository: str) -> str:
    """The text of the page ``uri`` with links as the site needs them; what leads nowhere stays, for MkDocs to tell."""
    folder = "" if uri in FROM_TOP.values() else posixpath.dirname(f"docs/{uri}")

    def of_site(match: re.Match[str]) -> str:
        target, anchor = posixpath.normpath(posixpath.join(folder, match[1])), match[2]
        if (TOP / target).is_dir():
            return f"{repository}/tree/main/{target}"
        if target.endswith(".ipynb") and uri != f"notebooks/{Path(target).stem}.md":  # whose link is for the file
            target = f"{target.removesuffix('.ipynb')}.md"
        if target in FROM_TOP or target.startswith("docs/"):
            return posixpath.relpath(FROM_TOP.get(target, target[5:]), posixpath.dirname(uri) or ".") + anchor
        return f"{repository}/blob/main/{target}{anchor}" if (TOP / target).is_file() else match[0]

    return LINK.sub(of_site, markdown)


def command_reference(group: click.Group) -> str:
    """A page with the help of each command of a group."""
    parts = [
        "# Commands\n\nWhat `gradindex --help` and `gradindex COMMAND --help` print.\n",
        *described(group, "gradindex", "## Options of every command"),
    ]
    for name in sorted(group.commands):
        parts += described(group.commands[name], f"gradindex {name}", f"## {name}")
    return "\n".join(parts)


def described(command: click.Command, path: str, heading: str) -> Iterator[str]:
    """Usage, text, examples and options of one command."""
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield f"{heading}\n\n```text\n{usage}\n```\n"
    for paragraph in (command.help or "").split("\n\n"):
        text = " ".join(line.strip() for line in paragraph.replace("\b", "").splitlines())
        example = re.fullmatch(r"Examples?: (gradindex .*)", text.strip())
        yield f"```sh\n{example[1]}\n```\n" if example else f"{text}\n"
    options = [option for option in command.params if isinstance(option, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    if records:
        cells = [tuple(text.replace("|", r"\|") for text in record) for record in records]
        yield "\n".join(["| option | |", "| --- | --- |", *(f"| `{names}` | {words} |" for names, words in cells), ""])


def notebook_page(path: Path) -> dict[str, str | bytes]:
    """A notebook as a page of Markdown and the pictures that it shows, by their places on the site."""
    stem, pictures = f"notebooks/{path.stem}", {}
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            shown = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in shown:
                uri = f"{stem}-{len(pictures) + 1}.png"
                pictures[uri] = base64.b64decode("".join(shown["image/png"]))
                parts.append(f"![{cell['metadata'].get('alt', 'What the cell above draws')}]({Path(uri).name})")
            elif "text/html" in shown:
                lines = "".join(shown["text/html"]).splitlines()
                parts.append("\n".join(["<div>", *(line.strip() for line in lines if line.strip()), "</div>"]))
            else:
                parts.append(f"```text\n{''.join(shown['text/plain']).rstrip()}\n```")
    title, *rest = parts
    download = f"[Download this notebook]({path.name}){{download}}"
    return {f"{stem}.md": "\n\n".join([title, download, *rest]) + "\n", **pictures}


class Readable(griffe.Extension):
    """Shows docstrings and defaults as people read them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Names that are marked for Sphinx, as ``:class:`~package.Name```, become code."""
        if obj.docstring:
            marked = re.compile(r":(?:class|func|meth|mod|attr):`(?:~[\w.]*\.)?([^`]+)`")
            obj.docstring.value = marked.sub(r"`\1`", obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Of a field that is made by ``option(default, help)``, the default."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
            attr.value = value.arguments[0]
