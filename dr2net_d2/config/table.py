"""The form of the table of config keys: default, meaning and allowed values of each key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dr2net_d2.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """The values that a key may have: ``value in at_least(1)``.

    Attributes:
        text: the values in words; completes "it must be".
        test: whether a value is one of them.
    """

    text: str
    test: Callable[[Any], bool]

    def __contains__(self, value: Any) -> bool:
        try:
            return bool(self.test(value))
        except TypeError:  # such as None < 1
            return False

    def __and__(self, other: Range) -> Range:
        return Range(
            f"{self.text} and {other.text}", lambda value: value in self and value in other
        )


anything = Range("any value", lambda value: True)
nothing = Range("nothing: remove the key", lambda value: False)


def at_least(low: float) -> Range:
    return Range(f"at least {low}", lambda value: value >= low)


def at_most(high: float) -> Range:
    return Range(f"at most {high}", lambda value: value <= high)


def above(low: float) -> Range:
    return Range(f"above {low}", lambda value: value > low)


def below(high: float) -> Range:
    return Range(f"below {high}", lambda value: value < high)


def between(low: float, high: float) -> Range:
    """Both ends included."""
    return Range(f"from {low} to {high}", lambda value: low <= value <= high)


def one_of(*values: Any) -> Range:
    """The values themselves; a tuple counts as the list of its elements."""
    *others, last = map(repr, values)
    text = f"{', '.join(others)} or {last}" if others else last
    return Range(text, lambda value: _as_list(value) in map(_as_list, values))


def numbers(count: int) -> Range:
    text = f"a list of {count} number{'s' if count > 1 else ''}"
    return Range(text, lambda value: len(value) == count and all(map(_is_number, value)))


def list_of(each: Range, minimum: int = 0) -> Range:
    """A list of ``minimum`` or more values, every one of them in ``each``."""
    text = f"a list of {f'{minimum} or more ' if minimum else ''}values, each {each.text}"
    return Range(
        text, lambda value: len(value) >= minimum and all(element in each for element in value)
    )


@dataclass(frozen=True)
class Key:
    """One row of the table.

    Attributes:
        default: None for a key that is left unset.
        meaning: one or two sentences in Markdown for docs/keys.md, without the range.
        allowed: the values that make sense.
        torchvision: the values among them that the torchvision engine takes.
    """

    default: Any
    meaning: str
    allowed: Range = anything
    torchvision: Range = anything


@dataclass(frozen=True)
class Section:
    """Keys under one name, such as "MODEL.VIT"; "" is the top level."""

    name: str
    keys: dict[str, Key]
    meaning: str = ""

    def full_names(self) -> Iterator[tuple[str, Key]]:
        """Each key with its name in a config, such as "MODEL.VIT.DEPTH"."""
        for name, key in self.keys.items():
            yield f"{self.name}.{name}".lstrip("."), key


def by_full_name(sections: Iterable[Section]) -> dict[str, Key]:
    return {name: key for section in sections for name, key in section.full_names()}


def check_value(name: str, value: Any, key: Key) -> None:
    """Refuse a value that makes no sense.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    if value not in key.allowed:
        raise ConfigError(f"{name} is {value!r}; it must be {key.allowed.text}")


def check_value_for_torchvision(name: str, value: Any, key: Key) -> None:
    """Refuse a value that makes no sense, or that only Detectron2 can honour.

    Raises:
        ConfigError: names the key, its value, what is allowed, and Detectron2 where it would help.
    """
    check_value(name, value, key)
    if value not in key.torchvision:
        raise ConfigError(
            f"{name} is {value!r}; the torchvision engine takes {key.torchvision.text}. For other "
            "values install Detectron2 and pass --engine detectron2"
        )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
