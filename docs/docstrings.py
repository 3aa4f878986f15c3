"""Turns the docstrings of the library into Markdown for the site: lists of arguments, and examples."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

ITEM = re.compile(r"(?P<names>[a-z_][\w.*]*(?:, [a-z_][\w.*]*)*): (?P<text>.*)")


def markdown(text: str) -> str:
    """The text with `name: what it is` as list items, and what a Python prompt shows as code."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"^(.+)\n-{3,}\n", r"**\1**\n\n", text, flags=re.MULTILINE)):
        lines = paragraph.splitlines()
        if lines[0].startswith(">>>"):
            parts.append("```pycon\n" + paragraph + "\n```")
        elif ITEM.match(lines[0]):
            parts.append(items(lines))
        else:
            parts.append(paragraph)
    return "\n\n".join(parts)


def items(lines: list[str]) -> str:
    """One list item for each name; a line without one goes on with the item above."""
    found: list[str] = []
    for line in lines:
        match = ITEM.fullmatch(line)
        if match:
            names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
            found.append(f"- {names}: {match['text']}")
        else:
            found[-1] += " " + line.strip()
    return "\n".join(found)


class Docstrings(Extension):
    """Called by mkdocstrings for every object that it has read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = markdown(obj.docstring.value)
