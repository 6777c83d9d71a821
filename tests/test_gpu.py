"""On GPUs: the kernels block by block, and every algorithm with messages of device memory and through the host.

On one GPU or several, with as many ranks as there are, or more::

    mpiexec -n 4 python -m mpi4py -m pytest -m gpu
"""

from __future__ import annotations

import gc
import math
import shlex
from functools import partial
from typing import Any

import numpy as np
import pytest
import test_large_scores as large

from mpiattn import ALGORITHMS, RingAttention, arrays, kernels
from mpiattn.arrays import accumulator
from mpiattn.arrays.operations import on_host
from mpiattn.arrays.softmax import LSE, delta, merge
from mpiattn.commands import cli
from mpiattn.commands.compare.held import on_gpu
from mpiattn.conformance.case import Case, fast, problem
from mpiattn.conformance.check import check
from mpiattn.conformance.differences import compare
from mpiattn.conformance.user_masks import parse
from mpiattn.costs import COSTS
from mpiattn.costs.peak import peak
from mpiattn.errors import InputError
from mpiattn.kernels.contract import Kernel
from mpiattn.kernels.flash4.library import STEP, generation, unusable
from mpiattn.messages.device.channel import Channel
from mpiattn.messages.device.comm import DeviceComm
from mpiattn.messages.device.probe import takes_device_memory
from mpiattn.messages.message import Tag, Waitall
from mpiattn.problems import layout
from mpiattn.problems.block import Block
from mpiattn.problems.mask import Causal
from mpiattn.problems.problem import Problem
from mpiattn.problems.user_mask import UserMask, held
from mpiattn.trace.comm import TracedComm

pytestmark = pytest.mark.gpu

LIBRARIES = [name for name in kernels.KERNELS["cupy"] if name != "cupy"]

SHAPES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("bfloat16", "zigzag", "causal", {"tokens": 1024, "head_dim": 128, "v_head_dim": 128}),
    ("float16", "zigzag", "causal", {"tokens": 515, "head_dim": 64, "v_head_dim": 64, "batch": 2}),
    (
        "bfloat16",
        "striped",
        "causal",
        {"tokens": 768, "head_dim": 128, "v_head_dim": 128, "heads": 6, "kv_heads": 1},
    ),
    ("bfloat16", "contiguous", "full", {"tokens": 300, "kv_tokens": 700, "head_dim": 64, "v_head_dim": 64}),
    ("float16", "contiguous", "window=100", {"tokens": 600, "head_dim": 64, "v_head_dim": 64}),
    ("bfloat16", "zigzag", "window=70,30", {"tokens": 600, "head_dim": 64, "v_head_dim": 64}),
    ("bfloat16", "striped", "window=120", {"tokens": 600, "head_dim": 64, "v_head_dim": 64}),
    ("float16", "contiguous", "documents=100,0,300,112+causal", {"tokens": 512, "head_dim": 64, "v_head_dim": 64}),
    ("bfloat16", "zigzag", "causal", {"tokens": 512, "head_dim": 256, "v_head_dim": 256}),
    ("bfloat16", "zigzag", "causal", {"tokens": 512, "head_dim": 128, "v_head_dim": 64}),
    ("bfloat16", "zigzag", "causal", {"tokens": 512, "head_dim": 192, "v_head_dim": 128, "kv_heads": 4}),
)
HALVES = [Case(dtype=dtype, layout=chosen, mask=mask, **shape) for dtype, chosen, mask, shape in SHAPES]
LARGE = [
    Case(tokens=3000, head_dim=32, v_head_dim=32, layout=chosen, mask="causal", dtype="float32")
    for chosen in layout.LAYOUTS
]


def posed(case: Case, ranks: int) -> Problem:
    """Return the problem of a case."""
    keys = case.tokens if case.kv_tokens is None else case.kv_tokens
    sizes = case.batch, case.heads, case.kv_heads, case.head_dim, case.v_head_dim, case.tokens, keys
    mask = held(parse(case.mask))
    if isinstance(mask, UserMask):  # as the ranks agree on it
        mask = mask.tabulated(np.arange(case.tokens), case.tokens, keys)
    return Problem(ranks, *sizes, arrays.dtype(case.dtype), case.layout, mask)


def chosen_or_skip(name: str, whole: Problem, scale: float | None = None, *needs: Any) -> Kernel:
    """Return the kernel of that name for a problem; skip the test where it can't do it."""
    try:
        return kernels.choose("cupy", whole, scale, name, *needs)
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", [*(case for case in fast() if not case.sinks), *HALVES, *LARGE], ids=str)
@pytest.mark.parametrize("name", kernels.KERNELS["cupy"])
def test_kernel(name: str, case: Case) -> None:
    """All blocks of a problem spread over three ranks, on one."""
    import cupy

    whole = posed(case, 3)
    dropout = case.given.get("dropout")
    kernel = chosen_or_skip(name, whole, case.scale, case.softcap, dropout)
    kernel.drop(dropout)
    given, right = problem(case)
    wide, results = accumulator(whole.dtype), {}
    q, k, v, d_out = (cupy.asarray(given[name]) for name in ("q", "k", "v", "out"))
    out, lse = cupy.zeros(d_out.shape, wide), cupy.full(d_out.shape[:3], -math.inf, LSE)
    for queries in whole.q_positions:
        near_out, near_lse = out[:, :, queries], lse[:, :, queries]  # copies
        for keys in whole.kv_positions:
            near = [cupy.ascontiguousarray(array[:, :, keys]) for array in (k, v)]
            near_q, block = cupy.ascontiguousarray(q[:, :, queries]), Block(whole.mask, queries, keys)
            kernel.forward(near_q, *near, block=block, out=near_out, lse=near_lse)
        out[:, :, queries], lse[:, :, queries] = near_out, near_lse
    rounded = out.astype(q.dtype)
    row_delta = delta(d_out, rounded)
    d_q, d_k, d_v = (cupy.zeros(array.shape, wide) for array in (q, k, v))
    for queries in whole.q_positions:
        near_d_out, near_lse, near_delta = (
            cupy.ascontiguousarray(array[:, :, queries]) for array in (d_out, lse, row_delta)
        )
        near_q, share_q = q[:, :, queries], d_q[:, :, queries]
        for keys in whole.kv_positions:
            near = [array[:, :, keys] for array in (k, v)]
            share_k, share_v = (array[:, :, keys] for array in (d_k, d_v))
            kernel.backward(
                near_q, *near, block=Block(whole.mask, queries, keys), d_out=near_d_out, lse=near_lse,
                delta=near_delta, d_q=share_q, d_k=share_k, d_v=share_v,
            )  # fmt: skip
            d_k[:, :, keys], d_v[:, :, keys] = share_k, share_v
        d_q[:, :, queries] = share_q
    results = {"out": rounded, "lse": lse} | {
        name: total.astype(q.dtype) for name, total in (("d_q", d_q), ("d_k", d_k), ("d_v", d_v))
    }
    wrong = []
    for label, result in results.items():
        wrong += compare(label, on_host(result), right[label], right[label], case.dtype)
    assert not wrong


@pytest.mark.parametrize("dtype", large.BOUND)
@pytest.mark.parametrize("scale", [1.0, 1e4, -1e6, 1e8, 1e13, 1e20])
def test_large_scores(scale: float, dtype: str) -> None:
    """Forward in one block, backward in parts of other shapes; see test_large_scores.py."""
    import cupy

    given = [array.astype(arrays.dtype(dtype)) for array in large.inputs(70)]
    given[0][:, :, :9] = 0
    if abs(scale) < 1e10:  # beyond, lse does not know how many scores are the same
        given[1][:, :, ::3] = given[1][:, :, :1]
    q, k, v, d_out = map(cupy.asarray, given)
    wide, positions = accumulator(q.dtype), np.arange(70)
    kernel = kernels.choose("cupy", posed(Case(tokens=70, heads=4, kv_heads=4, dtype=dtype), 1), scale, "cupy")
    out, lse = cupy.zeros(q.shape, wide), cupy.full(q.shape[:3], -math.inf, LSE)
    kernel.forward(q, k, v, block=Block(Causal(), positions, positions), out=out, lse=lse)
    row_delta = delta(d_out, out.astype(q.dtype))
    d_q, d_k, d_v = (cupy.zeros(q.shape, wide) for _ in "qkv")
    for rows in (slice(31), slice(31, 32), slice(32, 70)):
        part = Block(Causal(), positions[rows], positions, rows)
        kernel.backward(q, k, v, block=part, d_out=d_out, lse=lse, delta=row_delta, d_q=d_q, d_k=d_k, d_v=d_v)
    results = [on_host(array) for array in (out, lse, d_q, d_k, d_v)]
    large.check(results, large.reference(given, scale, True), large.bounds(given, scale), large.BOUND[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_merge_and_delta_are_those_of_the_host(dtype: str) -> None:
    import cupy

    rng = np.random.default_rng(0)
    states = [(rng.standard_normal((2, 3, 50, 20)).astype(dtype), rng.standard_normal((2, 3, 50))) for _ in "ab"]
    states[0][1][:, :, 10:30] = states[1][1][:, :, 20:40] = -np.inf
    states[0][1][:, :, 45:] = 300
    there = [[cupy.asarray(array) for array in state] for state in states]
    for state in (states, there):
        merge(*state[0], *state[1])
    for here, result in zip(states[0], there[0], strict=True):
        np.testing.assert_allclose(on_host(result), here, rtol=1e-5 if dtype == "float32" else 1e-13, atol=1e-7)
    a, b = states[0][0], states[1][0]
    np.testing.assert_allclose(
        on_host(delta(cupy.asarray(a), cupy.asarray(b))),
        delta(a, b),
        rtol=1e-4 if dtype == "float32" else 1e-12,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_kernel_that_can_not_do_it_says_which_can(name: str) -> None:
    with pytest.raises(InputError, match=r"float16 and bfloat16, not float32; kernel 'cupy' can|not installed"):
        kernels.choose("cupy", posed(Case(dtype="float32"), 1), None, name)
    with pytest.raises(InputError, match="choose from cupy, cudnn"):
        kernels.choose("cupy", posed(Case(dtype="float32"), 1), None, "numpy")


@pytest.mark.parametrize("name", LIBRARIES)
def test_sums_that_wait_are_those_that_do_not(name: str) -> None:
    """More shares than one pass adds up, of whole rows and of some; a sum that arrives; narrow and wide results."""
    import cupy

    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        cupy.asarray(rng.standard_normal((1, 2, 640, 64)).astype(arrays.dtype("bfloat16"))) for _ in "qkvo"
    )
    whole = posed(Case(tokens=640, heads=2, head_dim=64, v_head_dim=64, dtype="bfloat16"), 1)
    kernel = chosen_or_skip(name, whole)
    where = [np.arange(start, start + 64) for start in range(0, 640, 64)]
    everything = np.arange(640)
    results = []
    for waits in (False, True):
        out, lse = cupy.zeros(q.shape, np.float32), cupy.full(q.shape[:3], -math.inf, LSE)
        kernel.begin(out, lse) if waits else None
        for keys in where:
            block = Block(whole.mask, everything, keys)
            kernel.forward(q, k[:, :, keys], v[:, :, keys], block=block, out=out, lse=lse)
        out, lse = kernel.complete((out, lse)) if waits else (out, lse)
        d_q, d_k, d_v = (cupy.zeros(q.shape, np.float32) for _ in "qkv")
        for total in (d_q, d_k, d_v) if waits else ():
            kernel.begin(total)
        arrived = cupy.ones(q.shape, np.float32)
        row_delta = delta(d_out, out.astype(q.dtype))
        for part in where:  # views of the sum of the queries
            block = Block(whole.mask, part, everything, slice(part[0], part[-1] + 1))
            kernel.backward(q, k, v, block=block, d_out=d_out, lse=lse, delta=row_delta, d_q=d_q, d_k=d_k, d_v=d_v)
        if waits:
            [d_q], [d_k], [d_v] = kernel.complete([d_q]), kernel.complete([d_k], [arrived]), kernel.complete([d_v])
        else:
            d_k += arrived
        results.append([on_host(array.astype(np.float32)) for array in (out, lse, d_q, d_k, d_v)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(other, one, rtol=0.02, atol=0.02 * np.abs(one).max())


@pytest.mark.parametrize("name", LIBRARIES)
def test_calls_come_one_after_the_other_on_the_current_stream(name: str) -> None:
    """Another stream than the default one, other arrays of the same shapes, and one array as q, k and v."""
    import cupy

    whole = posed(Case(tokens=512, heads=2, kv_heads=2, head_dim=64, v_head_dim=64, dtype="bfloat16"), 1)
    both = [chosen_or_skip(other, whole) for other in (name, "cupy")]
    block = Block(whole.mask, np.arange(512), np.arange(512))
    given = np.random.default_rng(0).standard_normal((3, 3, 1, 2, 512, 64), dtype=np.float32)
    results = []
    for kernel in both:
        with cupy.cuda.Stream(non_blocking=True):
            for wide in map(cupy.asarray, given):
                for _ in range(50):  # a kernel that does not wait for these takes other numbers
                    wide = wide * 1.01
                q, k, v = (array.astype(whole.dtype) for array in wide)
                out, lse = cupy.zeros(q.shape, np.float32), cupy.full(q.shape[:3], -math.inf, LSE)
                kernel.forward(q, k, v, block=block, out=out, lse=lse)
                kernel.forward(q, q, q, block=block, out=out, lse=lse)  # merged with what is there
                results.append([on_host(out), on_host(lse)])
    for one, other in zip(results[:3], results[3:], strict=True):
        for array, right in zip(one, other, strict=True):
            np.testing.assert_allclose(array, right, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_kernel_on_trial(name: str) -> None:
    """Neither at its usual heads nor with few K/V heads is anything wrong."""
    for kv_heads in (1, 4):
        case = Case(heads=4, kv_heads=kv_heads, head_dim=128, v_head_dim=128, dtype="bfloat16")
        assert chosen_or_skip(name, posed(case, 1)).name == name


def test_flash4_is_not_used_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were its wrong head dims not known, a trial would find them."""
    if generation() != 9 or unusable():
        pytest.skip(unusable() or "not on Hopper")
    monkeypatch.setitem(STEP, 9, 8)
    case = Case(head_dim=40, v_head_dim=40, dtype="bfloat16")
    with pytest.raises(InputError, match="its d_q is wrong here"):
        kernels.choose("cupy", posed(case, 1), None, "flash4")
    assert kernels.choose("cupy", posed(case, 1)).name == "cudnn"


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("keys", [64, 192, 200, 256])
@pytest.mark.parametrize("name", LIBRARIES)
def test_scores_far_below_zero(name: str, keys: int, mask: str) -> None:
    """Every score is near -120: exp(-lse) is beyond float32."""
    import cupy

    case = Case(tokens=keys, heads=2, kv_heads=2, head_dim=64, v_head_dim=64, dtype="bfloat16", mask=mask)
    whole = posed(case, 1)
    rng = np.random.default_rng(0)
    q, k, v, d_out = rng.standard_normal((4, 1, 2, keys, 64)) * np.array([0.1, 0.1, 1, 1]).reshape(4, 1, 1, 1, 1)
    q[..., 0], k[..., 0] = 1, -960
    arrays_ = [cupy.asarray(array.astype(whole.dtype)) for array in (q, k, v, d_out)]
    block, results = Block(whole.mask, np.arange(keys), np.arange(keys)), []
    for kernel in (chosen_or_skip(name, whole), chosen_or_skip("cupy", whole)):
        near = dict(zip(("q", "k", "v"), arrays_, strict=False))
        out, lse = cupy.zeros(q.shape, np.float32), cupy.full(q.shape[:3], -math.inf, LSE)
        kernel.forward(**near, block=block, out=out, lse=lse)
        row_delta = delta(arrays_[3], out.astype(whole.dtype))
        sums = {f"d_{each}": cupy.zeros(q.shape, np.float32) for each in near}
        kernel.backward(**near, block=block, d_out=arrays_[3], lse=lse, delta=row_delta, **sums)
        results.append([on_host(array) for array in (out, lse, *sums.values())])
    for number, (one, other) in enumerate(zip(*results, strict=True)):
        assert np.isfinite(one).all()
        if number not in (2, 3):  # d_q and d_k, which are what rounding leaves of large terms
            np.testing.assert_allclose(one, other, rtol=0.03, atol=0.03 * np.abs(other).max())


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_gradients_added_up_in_one_order_are_the_same_bits(mask: str, kv_heads: int) -> None:
    import cupy

    case = Case(tokens=2048, heads=4, kv_heads=kv_heads, head_dim=128, v_head_dim=128, dtype="bfloat16", mask=mask)
    whole = posed(case, 1)
    kernel = chosen_or_skip("flash4", whole, None, None, None, True, True)
    rng = np.random.default_rng(0)
    shapes = [(1, heads, 2048, 128) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, d_out = (cupy.asarray(rng.standard_normal(shape).astype(whole.dtype)) for shape in shapes)
    block = Block(whole.mask, np.arange(2048), np.arange(2048))
    out, lse = cupy.zeros(q.shape, np.float32), cupy.full(q.shape[:3], -math.inf, LSE)
    kernel.forward(q, k, v, block=block, out=out, lse=lse)
    row_delta, bits = delta(d_out, out.astype(q.dtype)), []
    for _ in range(5):
        d_q, d_k, d_v = (cupy.zeros(array.shape, np.float32) for array in (q, k, v))
        kernel.backward(q, k, v, block=block, d_out=d_out, lse=lse, delta=row_delta, d_q=d_q, d_k=d_k, d_v=d_v)
        bits.append([on_host(array).tobytes() for array in (d_q, d_k, d_v)])
    assert all(one == bits[0] for one in bits)


@pytest.fixture(params=["device", "host"])
def messages(request: pytest.FixtureRequest, comm: Any, xp: Any) -> str:
    """How messages go."""
    if request.param == "device" and not takes_device_memory(comm, xp):
        pytest.skip("this MPI library does not take device memory")
    return str(request.param)


@pytest.mark.mpi
@pytest.mark.parametrize("case", [*fast(), *HALVES[:3]], ids=str)
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "shared_ring"])
def test_conformance(comm: Any, xp: Any, messages: str, name: str, case: Case) -> None:
    for arguments in ALGORITHMS[name].variants(comm.Get_size()):
        factory = partial(ALGORITHMS[name], gpu_messages=messages, **arguments)
        check(factory, comm, case, partial(COSTS[name], **arguments), xp)


@pytest.mark.mpi
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "shared_ring"])
def test_scales(comm: Any, xp: Any, messages: str, name: str) -> None:
    """Large scores by every algorithm; see test_large_scores.py."""
    for scale, causal in ((1e4, False), (1e4, True), (-1e7, False), (1e8, True)):
        large.check_algorithm(comm, name, large.inputs(16), scale, causal, xp)


@pytest.mark.mpi(min_size=2)
def test_mixed_arrays_are_refused_on_every_rank(comm: Any, xp: Any) -> None:
    q = np.ones((1, 2, 4, 8), np.float32)
    mine = xp.asarray(q) if comm.Get_rank() == 1 else q
    with (
        RingAttention(comm, layout="contiguous") as attention,
        pytest.raises(InputError, match="rank 1 mixes cupy and numpy"),
    ):
        attention.forward(mine, mine, mine)


@pytest.mark.mpi
@pytest.mark.parametrize("wrong", ["one rank", "all ranks", "gradient"])
def test_arrays_on_another_gpu_are_refused_on_every_rank(comm: Any, xp: Any, wrong: str) -> None:
    if xp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("takes two GPUs")
    here = xp.cuda.Device().id
    near = xp.ones((1, 2, 4, 8), np.float32)
    with xp.cuda.Device((here + 1) % xp.cuda.runtime.getDeviceCount()):
        far = xp.ones((1, 2, 4, 8), np.float32)
    last = comm.Get_rank() == comm.Get_size() - 1
    mine = far if last or wrong == "all ranks" else near
    message = "another GPU than its current one|mixes"
    with RingAttention(comm, layout="contiguous") as attention:
        if wrong == "gradient":
            _, saved = attention.forward(near, near, near)
            with pytest.raises(InputError, match=message):
                attention.backward(mine, saved)
        else:
            with pytest.raises(InputError, match=message):
                attention.forward(mine, mine, mine)


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore:.* ranks share .* GPUs")
@pytest.mark.parametrize(
    "command",
    [
        "compare --arrays cupy --algorithms ring,mesh,ulysses --layout zigzag --iterations 1 --tokens 300 --sinks",
        *(
            f"compare --kernel {name} --algorithms ring,mesh --iterations 1 --tokens 300 --dtype bfloat16 "
            "--partials narrow"
            for name in LIBRARIES
        ),
        "conformance --arrays cupy --algorithms ring,mesh --gpu-messages host --case seed=3",
        *(
            f"conformance --kernel {name} --algorithms ring --case "
            "'dtype=bfloat16 tokens=300 head_dim=64 v_head_dim=64'"
            for name in LIBRARIES
        ),
        "run --kernel cupy --algorithm mesh --backward --tokens 300 --output {folder}/out.npz",
        "calibrate --arrays cupy --tokens 256,1024 --bytes 1000000 --rounds 2 --output {folder}/here.toml",
    ],
)
def test_commands(comm: Any, xp: Any, mpi_tmp_path: Any, command: str) -> None:
    name, *words = shlex.split(command.format(folder=mpi_tmp_path))
    if "flash4" in words and unusable():
        pytest.skip(unusable())
    assert cli.COMMANDS[name][0].main(cli.parser().parse_args([name, *words]), comm) == 0


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_messages_beyond_2_gib(comm: Any, xp: Any, messages: str) -> None:
    other, size = 1 - comm.Get_rank(), 2**31 + 12345
    around = DeviceComm(comm, Channel(comm, xp, messages))
    sent, got = (xp.arange(size, dtype=np.uint32) % 251).astype(np.uint8), xp.zeros(size, np.uint8)
    sent[-1] = 77
    Waitall([around.Irecv(got, other, Tag.KV), around.Isend(sent, other, Tag.KV)])
    assert bool((sent == got).all())


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "shared_ring"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpus_hold_the_bytes_of_the_formula(comm: Any, xp: Any, name: str, dtype: str) -> None:
    """What an algorithm takes of CuPy's pool at most, the kernel's workspace apart; and nothing after its end."""
    case = Case(
        layout="zigzag", mask="causal", tokens=256, heads=4, kv_heads=2, head_dim=64, v_head_dim=64, dtype=dtype
    )
    for arguments in ALGORITHMS[name].variants(comm.Get_size()):
        traced = TracedComm(comm)
        with ALGORITHMS[name](traced, **case.options, **arguments) as attention:
            wholes = {key: np.broadcast_to(np.empty(1), shape) for key, shape in case.shapes.items()}
            q, k, v, d_out = (
                xp.ones(
                    whole[attention.owned(key, case.shapes)(whole.shape, comm.Get_rank())].shape,
                    dtype=arrays.dtype(dtype),
                )
                for key, whole in wholes.items()
            )
            with on_gpu(traced.trace) as counted:
                out, saved = attention.forward(q, k, v)
                gradients = attention.backward(d_out, saved)
            formula = peak(name, saved.problem, comm.Get_rank(), queued=True, **arguments)
        del out, saved, gradients, traced
        assert counted.most[0] == max(formula.forward, formula.backward), arguments
        before = xp.get_default_memory_pool().used_bytes()
        gc.collect()
        assert xp.get_default_memory_pool().used_bytes() == before, "only a collection of garbage gave memory back"
