"""Conformance of implementations that are not this package's: ordinary mpi4py programs, right and wrong ones."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from launch import mpiexec

import mpiattn
from mpiattn.arrays import FLOAT_NAMES, FLOATS
from mpiattn.commands.conformance import command
from mpiattn.conformance.case import MASKS, Case, fast
from mpiattn.conformance.check import check
from mpiattn.conformance.differences import compare, runs
from mpiattn.conformance.player import Player, Refused
from mpiattn.conformance.selection import select
from mpiattn.costs import COSTS
from mpiattn.costs.traffic import Traffic
from mpiattn.problems.layout import LAYOUTS

if TYPE_CHECKING:
    from mpi4py import MPI

FULL = Case(layout="contiguous", mask="full", tokens=12, kv_heads=4)
CAUSAL = Case(layout="contiguous", tokens=12, kv_heads=4)


def player(name: str, **options: Any) -> Player:
    import broken_rings

    return Player(getattr(broken_rings, name), foreign=True, **options)


def found(comm: Any, name: str, case: Case, **options: Any) -> str:
    """Return what is found wrong with a broken ring."""
    with pytest.raises(AssertionError) as caught:
        check(player(name, **options), comm, case)
    return str(caught.value)


@pytest.mark.mpi(max_size=4)
def test_a_sound_ring_passes_in_every_layout_and_mask(comm: MPI.Intracomm) -> None:
    for layout in LAYOUTS:
        for mask in MASKS:
            received = check(player("sound"), comm, Case(layout=layout, mask=mask, kv_heads=4))
            assert received.passes["forward"].messages == comm.size - 1
            assert received.uncounted == {"allgather": 1, "Reduce": comm.size}


@pytest.mark.mpi(sizes=[3])
def test_stale_keys_in_backward_are_found_and_explained(comm: MPI.Intracomm) -> None:
    text = found(comm, "stale", FULL)
    assert "error of out" not in text and "error of lse" not in text
    for rank in range(3):
        stale = (rank + 1) % 3  # whose K/V come last, and are not used
        block = rf"rank {rank}'s queries \({4 * rank}-{4 * rank + 3}\) and rank {stale}'s keys"
        assert re.search(rf"rank {rank}: error of d_q [^:]*; first, of token {4 * rank}: d_q\[0, 0, 0, 0\] is", text)
        assert re.search(rf"{block} \(\d+-\d+\) were left out, and the keys of rank {rank} taken twice instead", text)
        assert re.search(rf"rank {rank}: error of d_k .*\n    tokens {4 * rank}-{4 * rank + 3} \(all\)", text)


@pytest.mark.mpi(min_size=2, max_size=4)
def test_blocks_normalised_each_on_its_own_are_found(comm: MPI.Intracomm) -> None:
    text = found(comm, "normalised", FULL)
    for rank in range(comm.size):
        assert re.search(
            rf"rank {rank}: error of out \d\.\de-0\d exceeds 1e-10\n    tokens \d+-\d+ \(all\); first", text
        )
    assert "error of lse" not in text and "as if" not in text


@pytest.mark.mpi(sizes=[3])
def test_a_mask_by_local_positions_is_found(comm: MPI.Intracomm) -> None:
    check(player("local"), comm, FULL)  # where it does not matter
    text = found(comm, "local", CAUSAL)
    # The last token of the last rank sees all keys, as it should; on rank 0 the first one sees some of other ranks.
    assert re.search(
        r"rank 2: error of out .*\n    tokens 8-10 \(3 of its 4\); first, of token 8: out\[0, 0, 0, 0\]", text
    )
    assert re.search(r"rank 0: error of out .*\n    tokens 0-3 \(all\)", text)


@pytest.mark.mpi(sizes=[3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "array", "said"),
    [("left_out", "out", "left out"), ("twice", "out", "taken twice"), ("sum_left_out", "d_k", "left out")],
)
def test_the_block_that_explains_it_is_named(
    comm: MPI.Intracomm, layout: str, name: str, array: str, said: str
) -> None:
    text = found(comm, name, Case(layout=layout, mask="full", tokens=13, kv_heads=4, dtype="float32"))
    for rank in range(3):
        before, after = (rank - 1) % 3, (rank + 1) % 3
        block = (rank, before) if array == "out" else (after, rank)
        words = (
            rf"as if the block of rank {block[0]}'s queries \([^)]+\) and rank {block[1]}'s keys \([^)]+\) were {said}"
        )
        assert re.search(rf"rank {rank}: error of {array} [^:]*:[^\n]*\n    {words}", text), text


@pytest.mark.mpi(sizes=[3])
def test_only_the_forward_pass_is_judged_where_that_is_asked_for(comm: MPI.Intracomm) -> None:
    received = check(player("stale", backward=False), comm, FULL)
    assert list(received.passes) == ["forward"]


@pytest.mark.mpi(sizes=[3])
def test_bytes_of_a_foreign_ring_against_the_formula(comm: MPI.Intracomm) -> None:
    ring: dict[str, Any] = {"traffic": COSTS["ring"], "backward": False}
    kv = 2 * 4 * 4 * 8 * 8  # two arrays of 4 heads, 4 tokens, 8 numbers of 8 bytes
    assert check(player("sound", **ring), comm, FULL).passes["forward"] == Traffic(2, 2 * kv)
    assert "the formula says" in found(comm, "sound", CAUSAL, **ring)  # it sends what the mask empties


@pytest.mark.mpi(max_size=3)
def test_what_it_refuses_is_named_and_clean(comm: MPI.Intracomm) -> None:
    with pytest.raises(Refused, match=r"heads=4.*: as many K/V heads as query heads|: as many K/V heads"):
        check(player("sound"), comm, Case())
    for case in (Case(softcap=2.0), Case(dropout=0.3), Case(sinks=True), Case(partials="narrow", dtype="float16")):
        with pytest.raises(Refused):
            check(player("sound"), comm, case)
    check(player("sound"), comm, FULL)


class Says:
    """An implementation that raises when it is built, or on one rank only."""

    def __init__(self, comm: Any, error: Exception, rank: int | None = None, **options: Any) -> None:
        if rank in (None, comm.Get_rank()):
            raise error

    def forward(self, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        return np.zeros(q.shape[:3] + v.shape[3:], q.dtype), object()

    def backward(self, d_out: Any, saved: Any) -> Any:
        raise NotImplementedError("inference only")


@pytest.mark.mpi(max_size=3)
@pytest.mark.parametrize("error", [NotImplementedError("no windows"), mpiattn.InputError("no windows")])
def test_a_refusal_is_none_where_it_is_a_mistake(comm: MPI.Intracomm, error: Exception) -> None:
    with pytest.raises(Refused, match="no windows"):
        check(Player(partial(Says, error=error), foreign=True), comm, CAUSAL)
    with pytest.raises(AssertionError, match="raised ValueError: shapes"):  # of NumPy, say
        check(Player(partial(Says, error=ValueError("shapes")), foreign=True), comm, CAUSAL)
    with pytest.raises(Refused, match="inference only"):
        check(Player(partial(Says, error=error, rank=-1), foreign=True), comm, CAUSAL)
    if comm.size > 1:
        with pytest.raises(AssertionError, match=r"rank 1: refused what other ranks did not: .*no windows"):
            check(Player(partial(Says, error=error, rank=1), foreign=True, backward=False), comm, CAUSAL)
    with pytest.raises(mpiattn.InputError) if isinstance(error, mpiattn.InputError) else pytest.raises(type(error)):
        check(partial(Says, error=error), comm, CAUSAL)  # an algorithm of this package has no such excuse


@pytest.mark.mpi(max_size=3)
def test_results_of_the_wrong_shape_and_dtype_are_said(comm: MPI.Intracomm) -> None:
    class Wrong(Says):
        def forward(self, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
            return super().forward(q, k, v[:, :, :, :3])

    with pytest.raises(AssertionError, match=r"rank 0: out is \(1, 4, \d+, 3\) instead of \(1, 4, \d+, 8\)"):
        check(Player(partial(Wrong, error=ValueError(), rank=-1), foreign=True, backward=False), comm, CAUSAL)


def test_differences_in_words() -> None:
    reference = np.zeros((1, 3, 6, 2))
    reference[..., 0] = 1
    result = reference.copy()
    result[0, 1:, [0, 1, 4], 1] = 0.5
    result[0, 2, 5, 0] = np.nan
    tokens = np.array([3, 4, 5, 20, 21, 22])
    (text,) = compare("out", result, reference, reference, "float64", tokens=tokens)
    assert text == (
        "error of out nan exceeds 1e-10\n"
        "    tokens 3-4, 21-22 (4 of its 6), heads 1-2; first, of token 3: out[0, 1, 0, 1] is 0.5, right is 0"
    )
    assert compare("out", reference, reference, reference, "float64", tokens=tokens) == []
    assert runs([1, 3, 5, 6, 9, 11]) == "1, 3, 5-6 and 2 more"
    lse, right = np.full((1, 1, 2), -np.inf), np.zeros((1, 1, 2))
    (text,) = compare("lse", lse, right, right, "float64", tokens=np.array([7, 9]))
    assert text.startswith("lse is -inf elsewhere than it should be\n    tokens 7, 9 (all); first, of token 7")


def test_cases_are_chosen_by_their_values() -> None:
    chosen = select(fast(), {"layout": ["striped"], "mask": ["full", "window=100"], "dtype": ["float32"]})
    assert {(case.layout, case.mask, case.dtype) for case in chosen} == {
        ("striped", mask, "float32") for mask in ("full", "window=100")
    }
    assert len(set(chosen)) == len(chosen) > 20
    assert not any(case.peak for case in chosen)  # float32 has not the digits
    sizes = select(fast(), {"tokens": [16, 24], "head_dim": [32]})
    assert {case.tokens for case in sizes} == {16, 24}
    assert {(case.head_dim, case.v_head_dim) for case in sizes} == {(32, 32)}
    assert not any("documents" in case.mask for case in sizes)  # of 37 tokens
    assert select(fast(), {"heads": [3]}) == [
        case for case in select(fast(), {"heads": [3]}) if case.kv_heads in (1, 3)
    ]
    assert select(fast(), {}) == list(dict.fromkeys(fast()))


# On the command line

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def conformance(ranks: int, *words: str, cwd: Path = HERE, **options: Any) -> subprocess.CompletedProcess[str]:
    script = shutil.which("mpiattn", path=str(Path(sys.executable).parent))  # unlike -m, it has no current folder
    start = [script] if script else [sys.executable, "-c", "from mpiattn.commands.cli import main; exit(main())"]
    return mpiexec(ranks, *start, "conformance", *words, cwd=cwd, **options)


@pytest.mark.any_mpi
def test_the_example_passes_from_its_folder() -> None:
    """As `--help` and docs/conformance.md say."""
    example = re.search(r"mpiexec -n 3 mpiattn conformance (--module foreign_ring.*)", str(command.__doc__))
    assert example and example[1] in (EXAMPLES / "foreign_ring.py").read_text()
    done = conformance(3, *example[1].split(), cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr
    passed, failed, refused = map(int, re.findall(r"(\d+) (?:passed|failed|refused)\b", done.stdout))
    told = re.findall(r"foreign_ring:attention refused (\d+) cases?: \w", done.stdout)
    assert passed >= 2 and not failed and refused == sum(map(int, told)) and len(told) >= 4
    assert (
        "forward 2 messages" not in done.stdout
        and "backward" in done.stdout
        and "not counted: allgather" in done.stdout
    )


def test_results_alone_are_judged_without_a_communicator() -> None:
    words = ("--mask", "full", "--kv-heads", "4", "--tokens", "12", "--dtype", "float64", "--layout", "contiguous")
    done = conformance(3, "--module", "broken_rings:elsewhere", "--results-only", *words)
    assert done.returncode == 0 and re.search(r"^[1-9]\d* passed, 0 failed", done.stdout, re.MULTILINE), (
        done.stdout,
        done.stderr,
    )
    assert "received" not in done.stdout
    done = conformance(3, "--module", "broken_rings:ignores", *words)
    assert done.returncode == 0 and "received: unknown" in done.stdout, (done.stdout, done.stderr)


def test_torch_is_judged_by_its_results(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "gloo.py").write_text(TORCH)
    words = (
        "--module",
        "gloo:Gathered",
        "--results-only",
        "--mask",
        "causal",
        "--layout",
        "contiguous",
        "--heads",
        "4",
    )
    done = conformance(2, *words, "--kv-heads", "4", "--dtype", "float64,float32", "--tokens", "12", cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"^[1-9]\d* passed, 0 failed", done.stdout, re.MULTILINE), (
        done.stdout,
        done.stderr,
    )
    assert "not checked: saved.lse, which there is not" in done.stdout


TORCH = """
import torch
import torch.distributed as dist


class Gathered:
    def __init__(self, layout, mask, scale):
        if layout != "contiguous" or str(mask) != "causal" or scale is not None:
            raise NotImplementedError("contiguous and causal only")
        if not dist.is_initialized():
            dist.init_process_group("gloo")

    def forward(self, *arrays):
        q, k, v = (torch.tensor(array, requires_grad=True) for array in arrays)
        sizes = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, (q.shape, k.shape, v.shape))
        if len(set(sizes)) > 1 or not q.shape == k.shape == v.shape:
            raise NotImplementedError("equal shapes only")
        keys, values = (self.gathered(tensor) for tensor in (k, v))
        first = dist.get_rank() * q.shape[2]
        seen = torch.arange(keys.shape[2]) <= torch.arange(first, first + q.shape[2])[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        return out.detach().numpy(), (q, k, v, keys, values, out)

    def backward(self, d_out, saved):
        q, k, v, keys, values, out = saved
        d_q, *sums = torch.autograd.grad(out, (q, keys, values), torch.tensor(d_out))
        for total in sums:
            dist.all_reduce(total)
        mine = slice(dist.get_rank() * q.shape[2], (dist.get_rank() + 1) * q.shape[2])
        return [d_q.numpy(), *(total[:, :, mine].numpy() for total in sums)]

    def gathered(self, tensor):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts, dim=2).requires_grad_()
"""


@pytest.mark.parametrize(
    ("name", "patience", "said"),
    [
        ("raises", "3", "rank 1 failed, and others still run 3 s later:"),
        ("hangs", "2", "is not done with .* after 2 s; it is here:"),
    ],
)
def test_nothing_hangs(name: str, patience: str, said: str) -> None:
    words = ("--case", str(FULL), "--patience", patience)
    done = conformance(3, "--module", f"broken_rings:{name}", *words, timeout=100)
    assert done.returncode != 0 and re.search(said, done.stderr), done.stderr
    assert "broken_rings.py" in done.stderr


def run(comm: Any, *words: str) -> int:
    """Run the command in this process; return its exit status."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(words), comm)


@pytest.mark.mpi(sizes=[2])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--module", "nowhere:ring"), "--module nowhere:ring: No module named 'nowhere'"),
        (("--module", "broken_rings"), "say MODULE:FACTORY"),
        (("--module", "broken_rings:sounder"), "has no attribute 'sounder'"),
        (("--results-only",), "--results-only goes with --module"),
        (("--formula", "ring"), "--formula goes with --module"),
        (("--module", "broken_rings:sound", "--formula", "mesh"), "choose from 'mesh:1x2', 'mesh:2x1'"),
        (("--module", "broken_rings:sound", "--formula", "ring", "--results-only"), "does not go with --results-only"),
        (("--mask", "round"), "unknown mask 'round'"),
        (("--case", "tokens=4", "--tokens", "5"), "--tokens and --case exclude each other"),
        (("--heads", "3", "--kv-heads", "2"), "no case is left"),
    ],
)
def test_what_does_not_go_is_said(comm: MPI.Intracomm, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(mpiattn.InputError, match=re.escape(said)):
        run(comm, *words)


def test_names_that_there_are_not_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in {("--layout", "round"): LAYOUTS, ("--dtype", "int8"): FLOAT_NAMES}.items():
        with pytest.raises(SystemExit):
            run(None, *words)
        assert f"{words[1]!r} is none of {', '.join(said)}" in capsys.readouterr().err


@pytest.mark.mpi(sizes=[2])
def test_a_run_in_which_all_is_refused_is_no_success(comm: MPI.Intracomm, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(comm, "--module", "broken_rings:sound", "--case", "kv_heads=2 tokens=8") == 1
    if comm.rank == 0:
        assert "every case was refused: nothing was checked" in capsys.readouterr().err


@pytest.mark.mpi(sizes=[2])
def test_the_formula_is_asked_for_by_its_name(comm: MPI.Intracomm, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--module", "broken_rings:sound", "--case", str(FULL), "--forward-only", "--formula")
    assert run(comm, *words, "ring") == 0
    assert run(comm, *words, "ulysses") == 1
    if comm.rank == 0:
        text = capsys.readouterr().err
        assert "the formula says" in text and "--formula ulysses --forward-only" in text  # in what runs it alone


def test_help_names_what_there_is() -> None:
    text = str(command.__doc__)
    assert {dtype.name for dtype in FLOATS} == set(FLOAT_NAMES)
    for name in (
        "MyRing",
        "__init__(self, comm, layout, mask, scale)",
        "forward(self, q, k, v)",
        "NotImplementedError",
    ):
        assert name in text
