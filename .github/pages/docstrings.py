"""Converts docstrings in the Hugging Face format to Markdown, since griffe does not know that format."""

import re
from collections.abc import Iterator
from inspect import cleandoc
from textwrap import dedent, indent

from griffe import Class, Extension, Module, Object, get_logger

logger = get_logger(__name__)

SECTION = re.compile(
    r"^(Args|Attributes|Returns|Yields|Raises|Example):\n((?:\n| {4}.*\n?)*)",
    re.MULTILINE,
)
ENTRY = re.compile(r"(?=^\S)", re.MULTILINE)
ARGUMENT = re.compile(
    r"(?P<names>\*{0,2}[\w.]+(?:,\s+\w+)*)(?: \((?P<type>.*?)\))?:(?:\s|\Z)(?P<text>.*)",
    re.DOTALL,
)
ERROR = re.compile(r"(?P<names>\w+):\s+(?P<text>.*)", re.DOTALL)
LINK = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


class HuggingFaceDocstrings(Extension):
    """
    Rewrites the docstrings of a package's public names when the package is loaded: sections, entries, and links such as
    [`set_mask`]. Warns about entries that are not in the format.
    """

    def on_package(self, *, pkg: Module, **kwargs) -> None:
        public = set(map(str, pkg.exports or ()))
        shown = public.union(*(map(str, pkg[name].exports) for name in public if pkg[name].exports))
        for obj in objects(pkg):
            if obj.docstring and shown.intersection(obj.path.split(".")):
                obj.docstring.value = to_markdown(obj.docstring.value, public, obj.path)


def objects(parent: Object) -> Iterator[Object]:
    """A module or class and all objects in it, except imported ones."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from (objects(member) if isinstance(member, Module | Class) else [member])


def to_markdown(docstring: str, public: set[str], path: str) -> str:
    """
    Args:
        docstring (`str`): A docstring in the Hugging Face format.
        public (`set[str]`): Names of the package that can be linked to.
        path (`str`): The object that the docstring belongs to, for warnings.
    """

    def section(match: re.Match[str]) -> str:
        title, body = match[1], dedent(match[2]).strip()
        if title in ("Args", "Attributes", "Raises"):
            form = ERROR if title == "Raises" else ARGUMENT
            body = "\n".join(bullet(entry.rstrip(), form, path) for entry in ENTRY.split(body) if entry.strip())
        return f"**{title}:**\n\n{body}\n\n"

    def link(match: re.Match[str]) -> str:
        is_short, name = match.groups()
        name = name.removeprefix("hf_dynmask.")
        shown = name.rpartition(".")[2] if is_short else name
        return f"[`{shown}`][hf_dynmask.{name}]" if name.partition(".")[0] in public else f"`{shown}`"

    text = SECTION.sub(section, cleandoc(docstring) + "\n")
    return LINK.sub(link, text.replace("```python\n>>>", "```pycon\n>>>"))


def bullet(entry: str, form: re.Pattern[str], path: str) -> str:
    match = form.fullmatch(entry)
    if match is None:
        logger.warning(f"{path}: not an entry in the Hugging Face format: {entry!r}")
        return entry
    names = ", ".join(f"`{name}`" for name in re.split(r",\s+", match["names"]))
    kind = match.groupdict().get("type")
    text = f"**{names}**{f' ({kind})' if kind else ''}: {cleandoc(match['text'])}"
    return indent(text, "    ").replace("    ", "-   ", 1)
