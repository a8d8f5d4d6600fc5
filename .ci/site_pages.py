"""MkDocs hooks: pages and files from outside docs/, and the API pages that mkdocs.yml lists.

Links in Markdown are written for the checkout, where GitHub and editors follow them. Here they are resolved against
the checkout and written again for the site.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

LOG = get_plugin_logger("site_pages")
ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # in the checkout: on the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "studies/README.md": "study.md",
    "studies/first/README.md": "first_study.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
HREF = re.compile(r'href="(?![a-z]+:|#)([^"#]+)')
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


RULE = re.compile(r"Annotated\[([^,\[\]]+(?:\[[^]]*\])?), .*\]")  # a type, and what its values may be
RULES = {  # names for such types
    name: base
    for file in ("limits.py", "images/rules.py")
    for name, base in re.findall(
        r"^(\w+) = Annotated\[([^,]+),", (ROOT / "src/pgt_hf" / file).read_text(), re.MULTILINE
    )
}


class Docstrings(griffe.Extension):
    """What Griffe has to be told: our sections ``Example:``, lazy imports in their order, types without rules."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        for parameter in func.parameters:
            parameter.annotation = without_rules(parameter.annotation)

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        attr.annotation = without_rules(attr.annotation)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for module in [pkg, *pkg.modules.values()]:
            stub = Path(str(module.filepath)).with_suffix(".pyi")
            if stub.exists():
                module.exports = imported_names(stub)


def on_files(files: Any, config: Any) -> Any:
    reference = next(group["Reference"] for group in config.nav if "Reference" in group)
    for module, uri in (entry for item in reference for entry in item.items()):
        if uri.startswith("reference/"):
            files.append(File.generated(config, uri, content=f"# {module}\n\n::: {module}\n"))
    for page, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / page).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        if file.src_uri.endswith(".md"):
            for path in LINK.findall(prose(file.content_string)):
                target = in_checkout(file.src_uri, path)
                uri = site_uri(target)
                if not target.startswith("docs/") and (ROOT / target).is_file() and uri not in files.src_uris:
                    files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    uri = page.file.src_uri

    def rewrite(match: re.Match[str]) -> str:
        return posixpath.relpath(site_uri(in_checkout(uri, match[1])), posixpath.dirname(uri) or ".")

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))


def on_page_content(html: str, page: Any, files: Any, **kwargs: Any) -> str:
    """Links of notebooks, which arrive here as HTML, unseen by MkDocs."""
    uri = page.file.src_uri

    def rewrite(match: re.Match[str]) -> str:
        target = files.get_file_from_path(site_uri(in_checkout(uri, match[1])))
        if target is None:
            LOG.warning(f"{uri} contains a link to {match[1]}, which is not on the site")
            return match[0]
        return f'href="{target.url_relative_to(page.file)}'

    return HREF.sub(rewrite, html) if uri.endswith(".ipynb") else html


def imported_names(stub: Path) -> list[str]:
    """In the order of the modules that they come from, and of their definitions there."""
    places = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            home = stub.parents[node.level - 1] / f"{str(node.module).replace('.', '/')}.py"
            lines = home.read_text(encoding="utf-8").splitlines()
            for name in node.names:
                start = re.compile(rf"(def|class) {name.name}\b|{name.name}\b.* = ")
                line = next(line for line, text in enumerate(lines) if start.match(text))
                places[name.asname or name.name] = (str(node.module), line)
    return sorted(places, key=places.__getitem__)


def without_rules(annotation: Any) -> Any:
    """A type as people write it: ``float`` for ``Positive``, ``str`` for ``Annotated[str, OneOf(...)]``."""
    text = str(annotation)
    plain = re.sub(r"\b\w+\b", lambda match: RULES.get(match[0], match[0]), RULE.sub(r"\1", text))
    return annotation if plain == text else plain


def prose(markdown: str) -> str:
    return FENCE.sub("", markdown)


def in_checkout(uri: str, path: str) -> str:
    """What a link on a page of the site means, as a path from the root of the checkout."""
    page = next((page for page, at in PAGES.items() if at == uri), f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def site_uri(path: str) -> str:
    return PAGES.get(path) or path.removeprefix("docs/")
