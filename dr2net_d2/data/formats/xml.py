"""XML elements that know their line, which those of the standard library do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat


class XmlError(ValueError):
    """What is wrong in a line of an XML file."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


@dataclass
class Element:
    """An element; one that is missing has line 0, no text and no children.

    Attributes:
        tag: its name.
        line: where it begins, from 1.
        marks: its XML attributes.
        text: without surrounding spaces.
        children: in order.
    """

    tag: str
    line: int = 0
    marks: dict[str, str] = field(default_factory=dict)
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, tag: str) -> Element:
        """The first child of that name, or a missing one."""
        return next((child for child in self.children if child.tag == tag), Element(tag))

    def all(self, tag: str) -> list[Element]:
        return [child for child in self.children if child.tag == tag]

    def as_json(self, *without: str) -> Any:
        """The text; or a dict of children by name (a list where one occurs twice) and "@" marks.

        Args:
            without: names of children that are left out; then it is a dict in any case.
        """
        content: dict[str, Any] = {f"@{key}": value for key, value in self.marks.items()}
        if not self.children and not without:
            return {**content, "#": self.text} if content else self.text
        for child in self.children:
            if child.tag in without:
                continue
            value = child.as_json()
            if child.tag not in content:
                content[child.tag] = value
            elif isinstance(content[child.tag], list):
                content[child.tag].append(value)
            else:
                content[child.tag] = [content[child.tag], value]
        return content


def read_xml(file: Path) -> Element:
    """The outermost element.

    Raises:
        OSError: the file cannot be read.
        XmlError: it is not well-formed.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    document = Element("")
    opened = [document]

    def start(tag: str, marks: dict[str, str]) -> None:
        element = Element(tag, parser.CurrentLineNumber, marks)
        opened[-1].children.append(element)
        opened.append(element)

    def end(tag: str) -> None:
        element = opened.pop()
        element.text = element.text.strip()

    def characters(text: str) -> None:
        opened[-1].text += text

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    try:
        parser.Parse(file.read_bytes(), True)
    except expat.ExpatError as error:
        what = expat.ErrorString(error.code)
        last = opened[-1]
        still = f", while <{last.tag}> of line {last.line} is open" if last.tag else ""
        raise XmlError(error.lineno, f"not well-formed XML: {what}{still}") from None
    return document.children[0]
