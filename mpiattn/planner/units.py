"""Numbers of tokens, bytes and seconds, as people write and read them."""

from __future__ import annotations

import argparse
import re


def count(text: str, least: int = 1) -> int:
    """Read a number of tokens, such as 4096, 128K or 1M (of 1024)."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    if not match or int(match[1]) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, such as 4096, 128K or 1M")
    return int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]


def counts(text: str) -> list[int]:
    """Read numbers of tokens between commas."""
    return [count(part) for part in text.split(",")]


def size(text: str) -> float:
    """Read a size of memory, such as 80GB or 512MB (of 1000) or 80GiB (of 1024), in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[kKMGT](i?))[bB]?", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of memory, such as 80GB or 80GiB")
    power = " KMGT".index(match[2][:1].upper() or " ")
    return float(match[1]) * float((1024 if match[3] else 1000) ** power)


def in_bytes(number: float) -> str:
    """Write a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def in_seconds(number: float) -> str:
    """Write a time."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if number * factor >= 1:
            return f"{number * factor:.3g} {unit}"
    return f"{number * 1e6:.3g} us"
