"""A table of a machine's TOML file, and errors that name file, line and key."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAY_BE_ZERO = ("latency", "cards", "call", "nodes_per_rack", "launch", "overhead", "eager")


@dataclasses.dataclass
class Table:
    """A table of a TOML file, of which keys are taken one by one, so that none is left unread.

    Attributes
    ----------
    values : dict
        What is left to take.
    text, where : str
        The whole file, and its name.
    section : str
        Name of the table; empty: what stands above all tables.
    """

    values: dict[str, Any]
    text: str
    where: str
    section: str = ""

    @classmethod
    def parse(cls, text: str, where: str) -> Table:
        """Return the table of a whole file."""
        try:
            return cls(tomllib.loads(text), text, where)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"{where}: {error}") from None

    def wrong(self, key: str, what: str) -> InputError:
        """Return an error that names file, line and key; the line of the table where the key isn't there."""
        section, line = "", 0
        for number, content in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[\s*([^\]]*?)\s*\]", content):
                section = header[1]
            if section != self.section:
                continue
            line = line or number
            if re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", content):
                line = number
                break
        return InputError(f"{self.where}, line {line or 1}: {self._name(key)} {what}")

    def _name(self, key: str) -> str:
        return f"{self.section}.{key}" if self.section else key

    def table(self, key: str) -> Table:
        """Take a table."""
        value = self.values.pop(key, None)
        if not isinstance(value, dict):
            raise self.wrong(key, f"must be a table, [{self._name(key)}]")
        return Table(value, self.text, self.where, self._name(key))

    def fields(self, kind: type) -> dict[str, Any]:
        """Take the numbers, texts and truths that a dataclass has; what has a default may be left out."""
        takes: dict[str, Callable[[str], Any]] = {
            "float": self._number,
            "int": self._integer,
            "bool": partial(self._one, bool, "true or false"),
            "str": partial(self._one, str, "a text"),
        }
        return {
            field.name: takes[str(field.type)](field.name)
            for field in dataclasses.fields(kind)
            if field.type in takes and (field.name in self.values or field.default is dataclasses.MISSING)
        }

    def numbers(self, key: str) -> tuple[float, ...]:
        """Take a list of positive numbers."""
        value = self.values.pop(key, None)
        if not isinstance(value, list) or not value:
            raise self.wrong(key, "must be a list of numbers")
        return tuple(self._checked(key, entry) for entry in value)

    def end(self) -> None:
        """Refuse what nobody took: a misspelt key would pass for its default."""
        for key in self.values:
            raise self.wrong(key, "is not a key of a machine description")

    def _number(self, key: str) -> float:
        if key not in self.values:
            raise self.wrong(key, "is missing")
        return self._checked(key, self.values.pop(key))

    def _checked(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, f"must be a number, not {value!r}")
        if not math.isfinite(value):
            raise self.wrong(key, f"must be a finite number, not {value!r}")
        zero = key in MAY_BE_ZERO
        if value < 0 or (value == 0 and not zero):
            raise self.wrong(key, f"must be {'zero or more' if zero else 'more than zero'}, not {value!r}")
        return float(value)

    def _integer(self, key: str) -> int:
        value = self._number(key)
        if value != int(value):
            raise self.wrong(key, f"must be a whole number, not {value!r}")
        return int(value)

    def _one(self, kind: type, name: str, key: str) -> Any:
        value = self.values.pop(key)
        if not isinstance(value, kind):
            raise self.wrong(key, f"must be {name}, not {value!r}")
        return value
