"""One table, its notes and its figure, in a folder: Markdown, JSON and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from tabulate import tabulate

from ...machines import writing
from .. import charts


class Report:
    """A report in the making.

    Parameters
    ----------
    folder : Path
    name, title, command : str
        Of the files, of the text, and what makes it.
    """

    def __init__(self, folder: Path, name: str, title: str, command: str) -> None:
        self.stem = folder / name
        self.text = [f"# {title}", "", f"`{command}`", ""]
        self.data: dict[str, Any] = {"title": title, "command": command}
        self.drawing: Any = None

    def table(self, rows: Sequence[Sequence[object]], headers: Sequence[str], name: str = "rows") -> None:
        """Add a table."""
        self.text += [tabulate(rows, headers, tablefmt="github", disable_numparse=True), ""]
        self.data[name] = [dict(zip(headers, row, strict=True)) for row in rows]

    def note(self, *paragraphs: str) -> None:
        """Add paragraphs."""
        for paragraph in paragraphs:
            self.text += [paragraph, ""]

    def reason(self, text: str) -> None:
        """Add why the documents say something else, which holds for the default machine and lengths."""
        command, *options = self.data["command"].split(" --")
        self.note(
            text if not options else f"Why it differs from the documents: `{command}` says it of its own numbers."
        )

    def figure(self, panels: int = 1, width: float = 7) -> list[Axes]:
        """Add a figure, so many inches wide, and return the axes of its panels, side by side."""
        self.drawing, axes = charts.figure(width, 4.5, panels)
        self.note(f"![{self.stem.name}]({self.stem.name}.png)")
        return axes

    def write(self) -> None:
        """Write all files, and print the text."""
        writing.write_text(self.stem.with_suffix(".md"), "\n".join(self.text).rstrip() + "\n")
        writing.write_json(self.stem.with_suffix(".json"), self.data)
        if self.drawing:
            charts.save(self.drawing, self.stem.with_suffix(".png"))
        print("\n".join(self.text))
