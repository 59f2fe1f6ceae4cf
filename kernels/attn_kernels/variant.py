"""What an attention variant is, and the registry of all of them.

A variant is one folder in `attn_kernels/variants/` (or a package of its own that names itself in
the entry-point group `attnserve.variants`): `__init__.py` says its name, its parameters, and how a
row of raw scores becomes a row of weights; `kernel.hpp` says the same to CPUs
(`attn_kernels/cpu/variant.hpp`) and `kernel.py` to GPUs (`attn_kernels.triton.variant`). Everything
else iterates the registry.

Notation, as in the papers: query `i` sees `n_i` keys; `x_ij = scale * q_i . k_j` is a raw score.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import pkgutil
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


class VariantError(ValueError):
    """A variant's name or parameters are wrong; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a variant may know of the rows of scores, `[..., num_heads, num_queries, num_keys]`,
    beside the scores. All of it broadcasts to them; numbers are in the scores' dtype.

    Args:
        mask: bool, True where the query sees the key.
        n: `[..., num_queries, 1]`: how many keys the query sees.
        learned: the tensors that the variant's `learned` names, `[num_heads, 1, 1]` each.
        positions: what `position` is.
        gates: `[..., num_heads, num_keys]`: of each key's token, of a gated variant.
    """

    mask: Tensor
    n: Tensor
    learned: Mapping[str, Tensor]
    positions: Tensor | None = None
    gates: Tensor | None = None

    @classmethod
    def of(
        cls,
        mask: Tensor,
        learned: Mapping[str, Tensor],
        dtype: torch.dtype,
        positions: Tensor | None = None,
        gates: Tensor | None = None,
    ) -> Rows:
        """Make them of a mask and tensors `[num_heads]`; `n` is what the mask says."""
        learned = {name: tensor[:, None, None].to(dtype) for name, tensor in learned.items()}
        n = mask.sum(-1, keepdim=True).to(dtype)
        return cls(mask, n, learned, None if positions is None else positions.to(dtype), gates)

    @property
    def position(self) -> Tensor:
        """`[..., num_queries, 1]`: where the query is in its sequence, from 0; unless given, key j
        is at position j, and a query where the last key is that it sees."""
        if self.positions is not None:
            return self.positions
        keys = torch.arange(self.mask.shape[-1], device=self.mask.device)
        return (self.mask * keys).amax(-1, keepdim=True).to(self.n.dtype)

    @property
    def distance(self) -> Tensor:
        """`[..., num_queries, num_keys]`: how far before the query the key is, 0 for its own, of a
        query that sees consecutive keys up to its own; anything finite where it sees none."""
        later = self.mask.flip(-1).cumsum(-1).flip(-1) - self.mask.int()
        return later.to(self.n.dtype)

    @property
    def decay(self) -> Tensor:
        """`[..., num_heads, num_queries, num_keys]`, of a gated variant: the sum of the gates of
        the tokens after the key, up to the query's own, which is the last key that it sees;
        anything where it does not see the key. The sums are taken in float64: those of a long
        context are large, and their differences matter."""
        assert self.gates is not None
        sums = self.gates.double().cumsum(-1)
        keys = torch.arange(self.mask.shape[-1], device=self.mask.device)
        own = (self.mask * keys).amax(-1)
        shape = torch.broadcast_shapes(own.shape[:-1], sums.shape[:-1])
        own = own.expand(*shape, -1)
        at_query = sums.expand(*shape, -1).gather(-1, own)
        return (at_query.unsqueeze(-1) - sums.unsqueeze(-2)).to(self.n.dtype)


@dataclasses.dataclass(frozen=True)
class Variant(ABC):
    """One attention function. Subclasses are frozen dataclasses: their fields are the parameters
    that `config.json` may set.

    Class attributes:
        name: lower-case name, used in `config.json` and by `--attention-backend`.
        paper: where the formula comes from.
        uses_scale: raw scores are multiplied by the model's scale (usually 1/sqrt(head_size)).
        stateful: keeps a float32 accumulator for each cached token and defines `selection`.
        gated: the layer gives each head and token a gate, computed from its input (`gate`), and
            `score_bias` uses `rows.decay`, what the gates after a key add up to. The cache holds
            their running sums.
        prunable: is a `PrunableVariant`, whose layers can keep a fixed number of tokens.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    uses_scale: ClassVar[bool] = True
    stateful: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    prunable: ClassVar[bool] = False

    @classmethod
    def folder(cls) -> Path:
        """Return where its kernels lie: beside the module that defines it."""
        return Path(inspect.getfile(cls)).parent

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the per-head tensors, each `[num_heads]`, that a checkpoint must carry in every
        layer (`model.layers.N.self_attn.<name>`)."""
        return ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all that a checkpoint must carry in every layer for it, behind `self_attn.`."""
        return self.learned + ("f_proj.weight", "f_proj.bias") * self.gated

    @property
    def takes_modifiers(self) -> bool:
        """Whether a model's soft cap and ALiBi may change the scores: where they are the products
        of queries and keys, times the model's scale, and nothing else depends on them."""
        return self.plain_scores and self.uses_scale and not self.stateful

    @property
    def plain_scores(self) -> bool:
        """Whether queries and keys are multiplied as they are."""
        return type(self).transform is Variant.transform

    @property
    def kv_budgets(self) -> tuple[int, ...]:
        """Tokens of a request that each layer keeps, in the layers' order; empty: all."""
        return ()

    def numbers(self) -> list[float]:
        """Return the parameters in the fields' order, as kernels take them: None is NaN, lists are
        left out."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [
            math.nan if value is None else float(value)
            for value in values
            if not isinstance(value, tuple)
        ]

    def initial(self, learned_name: str) -> float:
        """Return the value a learned per-head tensor starts from when a model is trained from
        scratch."""
        raise KeyError(learned_name)

    def transform(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Change queries and keys before the product (after RoPE).

        Args:
            q: `[..., num_heads, num_queries, head_size]`. What is returned may have the wider dtype
                of the numbers of `rows`: who calls it converts it.
            k: `[..., num_kv_heads, num_keys, head_size]`.
            rows: of the scores; it has nothing for each key.
        """
        return q, k

    def score_bias(self, rows: Rows) -> Tensor | None:
        """Return what is added to the raw scores, broadcastable to them; None: nothing."""
        return None

    @abstractmethod
    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        """Turn raw scores into weights: what the paper calls its attention function.

        Args:
            scores: `[..., num_heads, num_queries, num_keys]`, finite.
            rows: of the scores.

        Returns:
            Weights of the shape and dtype of `scores`, 0 where masked. A row that sees no key is 0.
        """

    def gate(self, projected: Tensor) -> Tensor:
        """Return the gates of tokens, float32 (gated variants).

        Args:
            projected: `[..., num_heads]`, what the layer's `f_proj` makes of its input.

        Returns:
            Finite numbers of the same shape, at most 0.
        """
        raise NotImplementedError(f"{self.name} is not gated")

    def selection(self, scores: Tensor) -> Tensor:
        """Return what a query adds to the accumulators of the keys it sees (stateful variants).

        Args:
            scores: head 0's raw scores, before any penalty is subtracted.

        Returns:
            Numbers of the same shape, at least 0.
        """
        raise NotImplementedError(f"{self.name} is not stateful")

    def select(
        self, q: Tensor, k: Tensor, selectable: Tensor, scale: float, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what each query subtracts from its scores, and the new state (stateful variants).

        Args:
            q, k: as in `transform`; the selecting head must be head 0 of both.
            selectable: bool `[..., num_queries, num_keys]`, True where the query may add to the
                key's accumulator (see `dense.selectable_mask`).
            scale: factor of the raw scores.
            state: `[..., num_keys]` accumulators before the first of these queries.

        Returns:
            `(penalty [..., num_queries, num_keys], state [..., num_keys])`.
        """
        scores = (q[..., 0, :, :] * scale) @ k[..., 0, :, :].mT
        added = self.selection(scores).masked_fill(~selectable, 0.0)
        after = state.unsqueeze(-2) + added.cumsum(-2)
        return after - added, after[..., -1, :]


LEAST_BUDGET, MOST_BUDGET = 2, 2**30
"""Tokens that a layer keeps at least: the first, which is never evicted, and the newest; at most:
kernels count them in 32 bits."""


@dataclasses.dataclass(frozen=True)
class PrunableVariant(Variant):
    """A stateful variant whose layers can each keep a fixed number of tokens of a request: the
    token with the largest accumulator is evicted (`attn_kernels.pruning`).

    Args:
        kv_budgets: how many tokens of a request each layer keeps, in the layers' order; none: all.
    """

    stateful: ClassVar[bool] = True
    prunable: ClassVar[bool] = True

    kv_budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kv_budgets and min(self.kv_budgets) < LEAST_BUDGET:
            raise VariantError(
                f"{self.name}'s kv_budgets must be at least {LEAST_BUDGET} tokens a layer, the "
                f"first and the newest, not {min(self.kv_budgets)}"
            )
        if self.kv_budgets and max(self.kv_budgets) > MOST_BUDGET:
            raise VariantError(
                f"{self.name}'s kv_budgets must be at most {MOST_BUDGET} tokens a layer, not "
                f"{reprlib.repr(max(self.kv_budgets))}"
            )


_REGISTRY: dict[str, type[Variant]] = {}
V = TypeVar("V", bound=type[Variant])


def register(cls: V) -> V:
    """Add a variant to the registry (class decorator).

    Raises:
        VariantError: another class has the name already, or it is no lower-case identifier.
    """
    name = cls.name
    if not (name.isidentifier() and name == name.lower()):
        raise VariantError(f"variant name {name!r} must be a lower-case identifier")
    if _REGISTRY.setdefault(name, cls) is not cls:
        raise VariantError(f"two attention variants are named {name!r}")
    return cls


@functools.cache
def _load_all() -> None:
    """Import every variant once, on first use: importing a variant file registers it."""
    package = importlib.import_module("attn_kernels.variants")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for entry_point in entry_points(group="attnserve.variants"):
        entry_point.load()


def variant_names() -> tuple[str, ...]:
    """Return the names of all registered variants, sorted."""
    _load_all()
    return tuple(sorted(_REGISTRY))


FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def _is_a(value: Any, hint: Any) -> bool:
    """Return whether a value from `config.json` fits a parameter's annotation; a float may be a
    whole number, and `tuple[X, ...]` stands for a list."""
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_is_a(x, get_args(hint)[0]) for x in value)
    kinds = get_args(hint) or (hint,)
    if float in kinds and type(value) in (int, float):
        return abs(value) <= FLOAT32_MAX  # kernels compute in it; NaN is not, either
    return type(value) in kinds


def get_variant(name: str, /, **parameters: Any) -> Variant:
    """Return the variant called `name`, with its default parameters unless some are given.

    Raises:
        VariantError: unknown name or parameter, or a parameter of the wrong type or out of range.
    """
    _load_all()
    if name not in _REGISTRY:
        close = difflib.get_close_matches(str(name).lower(), _REGISTRY, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(variant_names())}"
        raise VariantError(f"unknown attention variant {name!r}; {hint}")
    cls = _REGISTRY[name]
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(parameters) - known):
        takes = ", ".join(sorted(known)) or "no parameters"
        raise VariantError(
            f"attention variant {name!r} has no parameter {unknown[0]!r}; it has {takes}"
        )
    hints = get_type_hints(cls)
    for parameter, value in parameters.items():
        hint = hints[parameter]
        if not _is_a(value, hint):
            kind = f"finite {hint if get_args(hint) else hint.__name__}"
            if get_origin(hint) is tuple:
                kind = f"list of {get_args(hint)[0].__name__}s"
            raise VariantError(f"{name}'s {parameter} must be a {kind}, not {reprlib.repr(value)}")
        if isinstance(value, list):
            parameters[parameter] = tuple(value)
    return cls(**parameters)


def variant_from_config(config: Any) -> Variant | None:
    """Return the variant that a checkpoint's configuration names.

    Args:
        config: a mapping or a transformers config. Its `attention_variant` is a mapping
            `{"name": ..., **parameters}`; absent or None means that the checkpoint names none.

    Raises:
        VariantError: the entry is malformed or names an unknown variant or parameter.
    """
    get = config.get if isinstance(config, Mapping) else functools.partial(getattr, config)
    entry = get("attention_variant", None)
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise VariantError(
            f"attention_variant in config.json must look like {{'name': 'softpick'}}, not {entry!r}"
        )
    try:
        return get_variant(entry["name"], **{k: v for k, v in entry.items() if k != "name"})
    except VariantError as error:
        raise VariantError(f"attention_variant in config.json: {error}") from None
