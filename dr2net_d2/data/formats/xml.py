"""A parser for XML whose elements know their line; those of the standard library do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat


class XmlError(ValueError):
    """A problem, and the line of the XML file that has it."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


@dataclass
class Element:
    """An element. A missing one is an element too, with line 0 and without text and children.

    Attributes:
        tag: its name.
        line: the line where it begins, from 1.
        attributes: its XML attributes.
        text: its text, without surrounding spaces.
        children: the elements directly inside it.
    """

    tag: str
    line: int = 0
    attributes: dict[str, str] = field(default_factory=dict)
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, tag: str) -> Element:
        """The first child with this name, or a missing element."""
        return next((child for child in self.children if child.tag == tag), Element(tag))

    def all(self, tag: str) -> list[Element]:
        """All children with this name."""
        return [child for child in self.children if child.tag == tag]

    def as_json(self, *without: str) -> Any:
        """The element as JSON: its text, or a dict if it has children or attributes.

        In the dict, a child's name leads to the child, or to a list if the name occurs twice;
        "@" and an attribute's name lead to the attribute; "#" leads to the text.

        Args:
            without: names of children to leave out; if there are any, the result is a dict.
        """
        content: dict[str, Any] = {f"@{key}": value for key, value in self.attributes.items()}
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
    """Read the outermost element of a file.

    Raises:
        OSError: the file cannot be read.
        XmlError: the file is not well-formed.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    document = Element("")
    opened = [document]

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, parser.CurrentLineNumber, attributes)
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
        problem = expat.ErrorString(error.code)
        last = opened[-1]
        if last.tag:
            problem += f", while <{last.tag}> of line {last.line} is open"
        raise XmlError(error.lineno, f"not well-formed XML: {problem}") from None
    return document.children[0]
