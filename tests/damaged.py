"""Read damaged files: each is read, or refused with an error; none ends the process, hangs, or takes its memory.

usage: python tests/damaged.py [--files 10000] [--seed 0]

Bits are flipped, pieces are cut out, doubled or swapped, numbers become others, of the four kinds of files that
mpiattn reads. The reader may take SECONDS and MEMORY, no more.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mpiattn import machines
from mpiattn.commands.files import read
from mpiattn.commands.trace import command as trace
from mpiattn.machines.writing import write_json
from mpiattn.trace.events import Event, Trace
from mpiattn.trace.file import document

SECONDS = 10
MEMORY = 2**29  # bytes beside what the process has before
NUMBERS = (b"-1", b"0", b"1e308", b"-7.5", b"NaN", b"Infinity", b"99999999999999999999", b"2147483648", b'"x"', b"[]")
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    5,
    10**9,
    2**63,
    1e308,
    -7.5,
    math.nan,
    math.inf,
    "",
    "x",
    [],
    [1],
    [[]],
    {},
    "1",
)
SHAPES = (
    "(2147483648, 2, 6, 4)",
    "(1, 2, 6, 9223372036854775807)",
    "(-1, 2, 6, 4)",
    "(4294967296, 4294967296, 6, 4)",
    "()",
)
HEADER = "\x93NUMPY\x01\x00\x76\x00{{'descr': '<f4', 'fortran_order': False, 'shape': {0}, }}".ljust(100) + "\n"
LENGTHS = (0, 1, 7, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)


def samples(folder: Path) -> dict[str, bytes]:
    """Return whole files, by suffix."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.random((1, 2, 6, 4), np.float32) for name in ("q", "k", "v", "d_out")}
    np.savez(folder / "whole.npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(folder / "small.npz", **arrays)  # type: ignore[arg-type]
    save_file(arrays, folder / "whole.safetensors")
    events = [
        Event("phase", "forward", -1, 0, 0.0, 5.0),
        Event("compute", "forward", -1, 0, 0.1, 1.0, (0, 3)),
        Event("send", "KV", 1, 80, 0.2, 2.0),
        Event("receive", "KV", 1, 80, 0.2, 2.0),
        Event("wait", "", -1, 0, 1.0, 2.0),
    ]
    others = [Event(e.kind, e.name, 0 if e.peer >= 0 else -1, e.nbytes, e.start, e.end) for e in events]
    write_json(folder / "whole.json", document([Trace(events), Trace(others)]))
    machines.write(machines.load("laptop"), folder / "whole.toml")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damage(file: str, whole: bytes, rng: random.Random) -> bytes:
    """Return a file that differs from a whole one: anywhere, or in what it says of itself."""
    if rng.random() < 0.5:
        return scratch(whole, rng)
    if file.endswith(".json"):
        content = json.loads(whole)
        for _ in range(rng.randint(1, 3)):
            alter(content, rng)
        return json.dumps(content).encode()
    if file.endswith(".safetensors"):
        size = int.from_bytes(whole[:8], "little")
        header = scratch(whole[8 : 8 + size], rng)
        return len(header).to_bytes(8, "little") + header + whole[8 + size :]
    if file.endswith(".npz"):
        return repack(whole, rng)
    return scratch(whole, rng)


def scratch(whole: bytes, rng: random.Random) -> bytes:
    """Return bytes that differ in one to four places."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        size = min(rng.choice((1, 1, 4, 8, 64, len(data) // 2)), len(data) - start)
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[start % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start : start + size] = rng.randbytes(size)
        elif kind == 2:
            del data[start : start + size]
        elif kind == 3:
            data[start:start] = data[start : start + size]
        elif kind == 4:
            data[start : start + 8] = rng.choice(LENGTHS).to_bytes(8, "little")
        elif kind == 5:
            data[start : start + 4] = (rng.choice(LENGTHS) % 2**32).to_bytes(4, "little")
        elif numbers := list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?(e[+-]?\d+)?", data)):
            found = rng.choice(numbers)
            data[found.start() : found.end()] = rng.choice(NUMBERS)
    return bytes(data)


def alter(content: Any, rng: random.Random) -> None:
    """Change one value somewhere in what JSON holds."""
    while True:
        key = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
        if not isinstance(content[key], dict | list) or not content[key] or rng.random() < 0.1:
            content[key] = copy.deepcopy(rng.choice(VALUES))
            return
        content = content[key]


def repack(whole: bytes, rng: random.Random) -> bytes:
    """Return an archive that is sound, of arrays of which one is not, or is other than it says, or larger by far."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            data = old.read(name)
            if name == chosen:
                kind = rng.randrange(4)
                if kind == 0:
                    data = scratch(data, rng)
                elif kind == 1:
                    data = HEADER.format(rng.choice(SHAPES)).encode("latin1") + bytes(rng.choice((0, 64)))
                elif kind == 2:
                    buffer = io.BytesIO()
                    np.save(buffer, np.array([{"a": 1}, print], object), allow_pickle=True)
                    data = buffer.getvalue()
                else:
                    data = data[:128] + scratch(data[128:], rng)
            new.writestr(name, data)
    return result.getvalue()


def show_trace(path: Path) -> Any:
    """Do all that `mpiattn trace` does with a file."""
    parser = argparse.ArgumentParser()
    trace.add_arguments(parser)
    return trace.main(parser.parse_args([str(path), "--width", "80"]))


READERS: dict[str, Callable[[Path], Any]] = {
    ".npz": lambda path: read(path, ("q", "k", "v", "d_out")),
    ".safetensors": lambda path: read(path, ("q", "k", "v", "d_out")),
    ".json": show_trace,
    ".toml": lambda path: machines.load(str(path)),
}


def attempt(path: Path) -> str:
    """Return how a reader takes a file: read or refused; anything else is wrong."""
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            READERS[path.suffix](path)
        return "read"
    except (ValueError, OSError) as error:  # an InputError is a ValueError
        if isinstance(error.__cause__ or error.__context__, MemoryError):
            return "TOOK ALL MEMORY"
        return "refused" if str(error).strip() else "REFUSED WITHOUT A WORD"
    finally:
        signal.alarm(0)


def late(*_: object) -> None:
    raise RuntimeError(f"still reading after {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("error")
    signal.signal(signal.SIGALRM, late)
    rng, counts, wrong, begun = random.Random(args.seed), Counter[tuple[str, str]](), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = samples(folder)
        for file in whole:  # also loads all that readers load, before memory is limited
            assert attempt(folder / file) == "read", file
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for number in range(args.files):
            file = list(whole)[number % len(whole)]
            path = folder / f"damaged{number}{Path(file).suffix}"
            path.write_bytes(damage(file, whole[file], rng))
            try:
                outcome = attempt(path)
            except BaseException:
                outcome = "WRONG"
                kept = Path(tempfile.gettempdir(), f"mpiattn-{path.name}")
                kept.write_bytes(path.read_bytes())
                print(f"{kept}, made of {file}:\n{traceback.format_exc(limit=-3)}", file=sys.stderr)
            wrong += outcome not in ("read", "refused")
            counts[file, outcome] += 1
            path.unlink()
    for file in whole:
        print(f"{file:20}" + ", ".join(f"{count} {what}" for (of, what), count in sorted(counts.items()) if of == file))
    print(f"{args.files} damaged files, seed {args.seed}: {wrong} wrong, in {time.monotonic() - begun:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
