"""A first run of a kernel that may not end."""

from __future__ import annotations

import multiprocessing

from attn_kernels.triton.tuned import Kind
from attn_kernels.triton.tuning import Tile
from attnserve.tune.compiling import LONGEST, Place
from attnserve.tune.search import Bench, wrong


def trial(kind: Kind, tile: Tile, place: Place, seconds: float = LONGEST) -> str:
    """Compare a tile's outputs with the reference in a process of its own, which is ended after so
    many seconds: warps that wait for one another may wait for ever. Return what is wrong."""
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply_async(fault, (kind, tile, place)).get(seconds)
    except multiprocessing.TimeoutError:
        return f"does not end within {seconds:.0f} s"
    except Exception as error:  # of a compiler or a driver
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    finally:
        pool.terminate()


def fault(kind: Kind, tile: Tile, place: Place) -> str:
    """Return what is wrong with a tile's outputs, in words; empty: nothing."""
    bench = Bench(place.device, place.num_kv_heads, 0, place.tiny)
    return wrong(tile, tile, [], bench.checked(kind))
