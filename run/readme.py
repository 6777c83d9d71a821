"""Make the transcripts of README.md and of docs/*.md by running their commands, or check that they still hold.

In a block with <!-- transcript: NAME --> before it, each line that begins with $ is a command, and what it prints
follows. A block with <!-- file: NAME --> before it is a file that the commands of its page find beside them. They run
in a temporary folder, with the caller's environment: PATH must lead to an mpiexec and to a Python with mpiattn.
Commands that install something are left as they are, and so are blocks with <!-- commands: NAME -->, which are for
run/first_hour.sh alone.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- (transcript|commands|file): (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n", re.MULTILINE)  # with its continuation lines
INSTALLS = re.compile(r"(pip|git|cd|bash|apt|sudo|module|source|python3? -m venv)\b|\. ")
PROGRESS = re.compile(r"^\w+ \d+ of \d+: .*\n", re.MULTILINE)  # a bar that goes away where there is a terminal
# What MPICH's launcher says at the end of a job that a rank has ended with an abort: one of these, several or none. It
# depends on whether the ranks are gone before the launcher has heard of the abort.
LAUNCHER = re.compile(
    r"(Abort\(\d+\) on node |=+$|=   \S|\[(mpiexec|proxy)[@:]|YOUR APPLICATION TERMINATED WITH THE EXIT STRING: "
    r"|This typically refers to a problem with your application|Please see the FAQ page for debugging suggestions)"
)
# What changes what is printed. Without a buffer the ranks' lines mix. pytest shows colours and, with CI=true or a
# BUILD_NUMBER, the whole of each failure once more at the end.
OTHERWISE = ("PYTHONUNBUFFERED", "PYTEST_ADDOPTS", "FORCE_COLOR", "PY_COLORS", "CI", "BUILD_NUMBER")
SECONDS = 120
WIDTH = 200  # of a line of difference


def main() -> None:
    """Make or check transcripts, or print a block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="README.md and docs/*.md if not given")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a command now prints "
                        "something else, but for numbers, widths and the order of lines")  # fmt: skip
    parser.add_argument("--print", metavar="NAME", help="print the commands of a block, or a file, and exit")
    arguments = parser.parse_args()
    pages = arguments.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if arguments.print:
        print(block(pages, arguments.print), end="")
        return
    differences: list[str] = []
    for page in pages:
        before = page.read_text()
        after = remade(before)
        found = list(difflib.unified_diff(structure(before), structure(after), str(page), "as run now", "", "", 1, ""))
        print(f"{page}: {len(found)} lines of difference" if found else f"{page}: as run now", flush=True)
        differences += found
        if not arguments.check:
            page.write_text(after)
    # Last: of a long log, often only the end is kept.
    sys.stdout.writelines(f"{line[:WIDTH]}\n" for line in differences)
    sys.exit(bool(differences and arguments.check))


def block(pages: list[Path], name: str) -> str:
    """Return the commands of a transcript, or the text of a file."""
    found = {match[2]: match for page in pages for match in BLOCK.finditer(page.read_text())}
    if name not in found:
        sys.exit(f"no block is marked {name!r}; there are {', '.join(found) or 'none'}")
    kind, _, text = found[name].groups()
    return text if kind == "file" else "".join(f"{command}\n" for command in COMMAND.findall(text))


def remade(page: str) -> str:
    """Return a page with what its commands print now."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for shared in ("examples", "hostfiles"):
            (folder / shared).symlink_to(ROOT / shared)
        for kind, file, text in BLOCK.findall(page):
            if kind == "file":
                (folder / file).write_text(text)

        def run(match: re.Match[str]) -> str:
            if match[1] != "transcript":
                return match[0]
            head, text = match[0][: match.start(3) - match.start()], match[3]
            parts = COMMAND.split(text)  # what is before the first command, then commands and what they print
            for number in range(1, len(parts), 2):
                if not INSTALLS.match(parts[number]):
                    parts[number + 1] = printed(parts[number], folder)
                parts[number] = f"$ {parts[number]}\n"
            return f"{head}{''.join(parts)}```"

        return BLOCK.sub(run, page)


def printed(command: str, folder: Path) -> str:
    """Return what a command prints: standard error, then standard output.

    They have pipes of their own: through one, a launcher hands both on in any order, and one within the other's line.
    """
    environ = {name: value for name, value in os.environ.items() if name not in OTHERWISE} | {"COLUMNS": "110"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, errors="replace", timeout=SECONDS,
    )  # fmt: skip
    text = PROGRESS.sub("", f"{done.stderr}{done.stdout}".replace(f"{folder}/", ""))
    return re.sub(r"\s*\n", "\n", f"{text}\n").lstrip("\n")  # no blank lines, no blanks at the end of a line


def structure(page: str) -> list[str]:
    """Return the lines of the transcripts without what differs from run to run and from machine to machine.

    That is numbers, widths, the order of lines, as ranks print when they come to it, and what a launcher adds.
    """
    lines = []
    for kind, name, text in BLOCK.findall(page):
        if kind == "transcript":
            text = "".join(line for line in text.splitlines(keepends=True) if not LAUNCHER.match(line))
            text = re.sub(r"0x[0-9a-f]+", "0", text)
            text = re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "0", text)
            text = re.sub(r"([-=_.])\1+|[ \t]+", lambda match: match[0][0], text)
            commands = [line for line in text.splitlines() if line.startswith("$")]
            others = sorted(line.strip() for line in text.splitlines() if not line.startswith("$"))
            lines += [f"[{name}]", *commands, *others]
    return lines


if __name__ == "__main__":
    main()
