"""run/readme.py: it makes the transcripts of a page, and finds those that no longer hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "run" / "readme.py"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
PAGE = """# A page

<!-- file: three.py -->
```python
print("three: 3.25 s")
```

<!-- transcript: first -->
```console
$ pip install nothing-of-the-kind
$ python three.py \\
    --quiet
three: 1.5 s
$ ls
three.py
```
"""


def readme(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # Debian has no python without a 3
    words = [sys.executable, str(README), *map(str, arguments)]
    return subprocess.run(words, env=os.environ | {"PATH": path} | environ, capture_output=True, text=True)


def test_check(tmp_path: Path) -> None:
    """Numbers may differ; words and commands may not."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("$ ls\nthree.py", "$ ls *.py\nthree.py"))
    done = readme("--check", page)
    assert done.returncode == 0, done.stdout
    assert "1.5 s" in page.read_text()  # not changed
    page.write_text(page.read_text().replace("three: 1.5", "four: 1.5"))
    done = readme("--check", page)
    assert done.returncode == 1 and "-four: 0 s" in done.stdout and "+three: 0 s" in done.stdout


def test_what_may_differ(tmp_path: Path) -> None:
    """What MPICH's launcher adds after an abort, and what pytest does where CI=true; a difference is printed last."""
    said = "Abort(1) on node 1 (rank 1 in comm 0): application called MPI_Abort"
    banner = r"\n=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n".center(140, "=")
    command = f'$ printf "{banner}\\n" >&2; echo "${{CI-none}}"\n'
    page, later = tmp_path / "page.md", tmp_path / "later.md"
    page.write_text(f"<!-- transcript: abort -->\n```console\n{command}none\n{said}\n```\n")
    later.write_text("Nothing to run.\n")
    done = readme("--check", page, later, CI="true")
    assert done.returncode == 0, done.stdout
    page.write_text(page.read_text().replace("none\nAbort", "some\nAbort"))
    done = readme("--check", page, later, CI="true")
    assert done.returncode == 1 and done.stdout.splitlines()[-2:] == ["-some", "+none"], done.stdout


def test_make(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("three: 1.5 s\n", "").replace("$ ls", "$ ls *.py"))
    assert readme(page).returncode == 0
    assert "    --quiet\nthree: 3.25 s\n$ ls *.py\nthree.py\n```\n" in page.read_text()
    assert "$ pip install nothing-of-the-kind\n$ python" in page.read_text()


def anchors(page: Path) -> set[str]:
    """Return what links into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links() -> None:
    """A link to a file or a heading leads there."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    links = [(page, *link) for page in pages for link in LINK.findall(page.read_text())]
    wrong = []
    for page, path, heading in links:
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            wrong.append(f"{page.relative_to(ROOT)}: {path}#{heading}")
    assert links and not wrong


def test_print(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert readme(page, "--print", "three.py").stdout == 'print("three: 3.25 s")\n'
    commands = "pip install nothing-of-the-kind\npython three.py \\\n    --quiet\nls\n"
    assert readme(page, "--print", "first").stdout == commands
    done = readme(page, "--print", "second")
    assert done.returncode != 0 and "there are three.py, first" in done.stderr
