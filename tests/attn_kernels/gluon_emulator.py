"""Runs the Python source of a Gluon kernel for Hopper, which Triton's interpreter does not know.

What a block of threads does at once is one torch operation. What runs side by side takes turns in a
random order that a seed decides: the partitions of a kernel, and the copy engine. As on the chip,

- a copy arrives at any time after it was asked for, and until then its place holds NaN;
- a product reads its operands at any time between its call and what waits for it, and its result
  cannot be used before;
- a barrier lets through who waits for a phase that is complete, and a phase is complete when all
  that were counted have arrived and all bytes that were expected are there;
- what threads write to shared memory is seen by products only behind a fence.

An access out of bounds, one arrival or byte too many, and a standstill raise `EmulatedError`. Not
emulated: layouts, what the threads of one partition need to wait for one another (the compiler sees
to both), rounding inside a product.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attn_kernels.triton.hopper import copy_tile


class EmulatedError(Exception):
    """The kernel does what it may not, or stands still."""


def check(right: Any, message: str) -> None:
    if not right:
        raise EmulatedError(message)


class Value(torch.Tensor):
    """Numbers in registers: `x += y` makes new ones."""

    __iadd__ = torch.Tensor.__add__
    __isub__ = torch.Tensor.__sub__
    __imul__ = torch.Tensor.__mul__


def value(x: Any, dtype: torch.dtype | None = None) -> Any:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


class Pointer:
    """Addresses in a tensor's memory, `[...]`."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, value(at)
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        offset = x.storage_offset()
        size = x.untyped_storage().nbytes() // x.itemsize - offset
        return cls(torch.as_strided(x, (size,), (1,), offset))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.at.long() + other)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.at[index])

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Return where it points to, 0 where it is masked, and the mask of the same shape."""
        at, mask = torch.broadcast_tensors(self.at.long(), value(True if mask is None else mask))
        at = torch.where(mask, at, 0)
        check(((at >= 0) & (at < len(self.memory))).all(), "an address is out of bounds")
        return at, mask


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    at, mask = pointer.places(mask)
    return value(torch.where(mask, pointer.memory[at], other).to(pointer.memory.dtype))


def store(pointer: Pointer, what: Tensor, mask: Any = None) -> None:
    at, mask = pointer.places(mask)
    check(what.dtype == pointer.memory.dtype, f"{what.dtype} stored as {pointer.memory.dtype}")
    pointer.memory[at[mask]] = what.broadcast_to(at.shape)[mask].as_subclass(Tensor)


class Shared:
    """Shared memory, or a part of it. `unfenced` holds its name while threads have written what
    products do not see yet."""

    def __init__(self, data: Tensor, unfenced: set[int]) -> None:
        self.data, self.unfenced, self.dtype = data, unfenced, data.dtype

    def view(self, data: Tensor) -> Shared:
        return Shared(data, self.unfenced)

    def index(self, i: Any) -> Shared:
        check(0 <= int(i) < len(self.data), "a place of a ring that there is not")
        return self.view(self.data[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return self.view(self.data.narrow(0, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self.view(self.data.permute(order))

    def load(self, layout: Any) -> Any:
        return value(self.data.clone())

    def store(self, what: Tensor) -> None:
        self.data.copy_(what)
        self.unfenced.add(self.data.untyped_storage().data_ptr())

    def read_by_product(self) -> Tensor:
        there = self.data.untyped_storage().data_ptr()
        check(there not in self.unfenced, "a product reads what was written without a fence")
        return self.data.float().clone()


class Barrier:
    """An mbarrier: `phase` counts those that are complete."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals: int, num_bytes: int) -> None:
        check(self.count, "a barrier is used before it is made")
        self.pending -= arrivals
        self.bytes += num_bytes
        check(self.pending >= 0, "more arrive at a barrier than it counts")
        check(self.bytes >= 0 or self.pending, "a barrier gets more bytes than it expects")
        if self.pending == self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Product:
    """An asynchronous product, and its result once it is computed."""

    def __init__(self, a: Any, b: Any, acc: Any) -> None:
        self.operands: Any = a, b
        self.acc, self.result = acc, None

    def read(self) -> None:
        """Read the operands, if that was not done."""
        self.operands = tuple(
            x.read_by_product() if isinstance(x, Shared) else x for x in self.operands
        )

    def compute(self) -> None:
        self.read()
        a, b = self.operands
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        self.result = value(a.float() @ b.float() + (0 if acc is None else acc))


class Partition:
    """A part of a kernel that runs in warps of its own: a thread that runs when it has its turn."""

    def __init__(self, machine: Machine, function: Callable[..., Any], args: Any) -> None:
        self.name, self.machine = function.__name__, machine
        self.turn = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Product] = []
        self.done = self.stopped = False
        self.thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self.thread.start()

    def _run(self, function: Callable[..., Any], args: Any) -> None:
        self.turn.acquire()
        try:
            if not self.stopped:
                function(*args)
                check(not self.products, f"{self.name} ends before its products")
        except BaseException as error:  # raised by the machine
            self.error = error
        self.done = True
        self.machine.back.release()

    def give_turn(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, at least until it is ready."""
        self.ready = ready
        self.machine.back.release()
        self.turn.acquire()
        if self.stopped:
            raise SystemExit


class Machine:
    """One program of a kernel."""

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...], seed: int) -> None:
        self.program, self.grid, self.random = program, grid, random.Random(seed)
        self.back = threading.Semaphore(0)
        self.copies: list[Callable[[], None]] = []
        self.unfenced: set[int] = set()
        self.running: Partition | None = None
        # Who is slow differs from one program to the next.
        self.weights = [self.random.choice((1, 20)) for _ in range(3)]

    def give_turn(self, ready: Callable[[], bool] = lambda: True) -> None:
        if self.running is not None:
            self.running.give_turn(ready)

    def specialize(self, partitions: list[tuple[Any, Any]], *_: Any) -> None:
        actors = [Partition(self, *each) for each in partitions]
        try:
            while not all(actor.done for actor in actors):
                self._turn(actors)
        finally:
            self.running = None
            for actor in actors:
                if not actor.done:
                    actor.stopped = True
                    actor.turn.release()
                actor.thread.join()
        check(not self.copies, "copies that nobody waits for")

    def _turn(self, actors: list[Partition]) -> None:
        able: list[Any] = [actor for actor in actors if not actor.done and actor.ready()]
        weights = [self.weights[actors.index(actor)] for actor in able]
        if self.copies:
            able, weights = [*able, None], [*weights, self.weights[-1]]
        check(able, f"standstill: {[actor.name for actor in actors if not actor.done]} wait")
        (self.running,) = self.random.choices(able, weights)
        if self.running is None:
            self.copies.pop(self.random.randrange(len(self.copies)))()
            return
        self.running.turn.release()
        self.back.acquire()
        if self.running.error is not None:
            raise self.running.error


machine: Machine
"""The program that runs."""


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
    if pred:
        machine.give_turn(lambda: barrier.phase & 1 != int(phase))


def expect(barrier: Barrier, num_bytes: int) -> None:
    barrier.change(1, num_bytes)
    machine.give_turn()


def arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        barrier.change(count, 0)
    machine.give_turn()


def copy(pages: TensorDescriptor, place: list[Any], barrier: Barrier, to: Shared) -> None:
    rows = torch.as_strided(pages.base, pages.shape, pages.strides, pages.base.storage_offset())
    (row, column), (height, width) = map(int, place), pages.block_shape
    inside = 0 <= row <= len(rows) - height and 0 <= column <= rows.shape[1] - width
    check(inside, "a copy from outside of the cache")
    check(to.data.shape == (height, width), "a copy of another size than its place")
    to.data.fill_(torch.nan)

    def arrives() -> None:
        to.data.copy_(rows[row : row + height, column : column + width])
        barrier.change(0, -to.data.nbytes)

    machine.copies.append(arrives)
    machine.give_turn()


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    check(is_async, "only asynchronous products are emulated")
    assert machine.running is not None
    product = Product(a, b, acc if use_acc else None)
    if machine.random.random() < 0.5:
        product.read()
    machine.running.products.append(product)
    machine.give_turn()
    return product


def warpgroup_mma_init(x: Any) -> Product:
    product = Product(None, None, None)
    product.result = x
    return product


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = ()) -> Any:
    assert machine.running is not None
    machine.give_turn()
    products = machine.running.products
    while len(products) > num_outstanding:
        products.pop(0).compute()
    results = [x.result if isinstance(x, Product) else x for x in deps]
    check(all(x is not None for x in results), "a result is used before its product is done")
    return results[0] if len(results) == 1 else tuple(results)


def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:  # barriers
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[int(i)])
    return Shared(torch.full(shape, torch.nan, dtype=dtype), machine.unfenced)


def of_two(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y: function(*torch.broadcast_tensors(*map(value, (x, y))))


language = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("float32", "int32", "int64", "exp2", "log2", "log")},
    **{name: getattr(torch, name) for name in ("where", "sqrt", "abs", "zeros_like")},
    **{f"{name}Layout": lambda *_: None for name in ("NVMMADistributed", "DotOperand", "Slice")},
    BlockedLayout=lambda *_: None,
    int1=torch.bool,
    load=load,
    store=store,
    maximum=of_two(torch.maximum),
    minimum=of_two(torch.minimum),
    max=torch.amax,
    sum=torch.sum,
    cdiv=lambda a, b: (a + b - 1) // b,
    arange=lambda start, end, *_: value(torch.arange(start, end, dtype=torch.int32)),
    full=lambda shape, x, dtype, layout: value(torch.full(shape, x, dtype=dtype)),
    convert_layout=lambda x, layout: x,
    static_range=range,
    program_id=lambda axis: value(machine.program[axis], torch.int32),
    num_programs=lambda axis: value(machine.grid[axis], torch.int32),
    allocate_shared_memory=allocate,
    warp_specialize=lambda *given: machine.specialize(*given),
)
barriers = SimpleNamespace(init=init, wait=wait, expect=expect, arrive=arrive)
barriers.MBarrierLayout = lambda: None


def replacements() -> Iterator[tuple[Any, Any]]:
    yield from ((gl, language), (tl, language), (hopper.mbarrier, barriers))
    for function in (warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait):
        yield getattr(hopper, function.__name__), function
    yield hopper.fence_async_shared, lambda: machine.unfenced.clear()
    yield copy_tile, copy


def emulated(x: Any) -> Any:
    """Return what a kernel sees in place of what it refers to."""
    for known, ours in replacements():
        if x is known:
            return ours
    if isinstance(x, tl.constexpr):
        return emulated(x.value)
    return python_of(x.fn) if callable(x) and hasattr(x, "fn") else x


@functools.cache
def python_of(source: FunctionType) -> Any:
    """Return the source of a function of Triton or Gluon as a function of Python."""
    names: dict[str, Any] = {"__builtins__": __builtins__}
    found = FunctionType(
        source.__code__, names, source.__name__, source.__defaults__, source.__closure__
    )
    given = source.__globals__
    names |= {name: emulated(given[name]) for name in source.__code__.co_names if name in given}
    return found


def argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer.to(x)
    if isinstance(x, int):
        return value(x, torch.int32 if abs(x) < 2**31 else torch.int64)
    return value(x, torch.float32) if isinstance(x, float) else x


def run(kernel: Any, grid: tuple[int, ...], *args: Any, seed: int = 0, **constants: Any) -> None:
    """Run all programs of a kernel, one after the other.

    Raises:
        EmulatedError: it does what it may not, or stands still.
    """
    global machine
    given = {name: emulated(x) for name, x in constants.items()}
    for y in range(grid[1]):
        for x in range(grid[0]):
            machine = Machine((x, y), grid, hash((seed, x, y)))
            emulated(kernel)(*map(argument, args), **given)
