"""Contract factors of per-example gradients to kernels, in the cheapest order, without ever holding the Jacobian.

With J[n,k,:,:] = sum_t G[n,k,t,:] U[n,t,:]^T (o x d numbers) the product of two gradients can be formed

- *explicit*: J in blocks, then its Gram matrix;
- *contracted*: C = U U'^T (t x t' numbers, from pixels in ``positions``) first, then G' C, then its product with G: for small t;
- *ghost*: (U U'^T) times (G G'^T), entry by entry, summed over t, t': always for t = 1, and where outputs are summed anyway;
- *rank one*: where G[n,k,t,o] = W[k,o] M[n,t,o], as below a pooled linear head, one Gram matrix per channel serves all k.

Multiply-adds are counted before choosing; ``reductions`` has the products themselves. Sums over pairs of
examples are formed above the diagonal only, then mirrored.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod

from torch import Tensor

from ntklib.kernels import positions, winograd
from ntklib.kernels.blocks import (
    Scratch,
    alike,
    channel_blocks,
    may_be_rank_one,
    rank_one,
    used_positions,
    write_out,
    write_out_groups,
)
from ntklib.kernels.operations import Factor, Outer, Rows
from ntklib.kernels.positions import PixelProducts, Products, Windows

_BEGIN = 2**19  # multiply-adds in whose time the small products of one group and example are begun


class Accumulator(ABC):
    """Sum over factors of the kernel between two sets of examples, in one of five shapes.

    A factor holds the examples of the first set followed by those of the second (``n1`` given), or one set only (``n1=None``: the
    kernel is symmetric). ``K`` output directions.

    Args:
        n: Number of examples, of both sets together.
        k: Number of output directions.
        n1: Size of the first set, or None.
        like: Dtype and device of the result.
        scratch: Memory for blocks, that several accumulators may share.
    """

    total: Tensor

    def __init__(self, n: int, k: int, n1: int | None, like: Tensor, scratch: Scratch | None = None) -> None:
        self.scratch = scratch if scratch is not None else Scratch(like)
        self.symmetric = n1 is None
        self.n1, self.n2, self.k = (n, n, k) if n1 is None else (n1, n - n1, k)
        self.half = 0.55 if self.symmetric else 1.0  # share of pairs formed
        self.total = like.new_zeros(self.shape())

    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the sum, as it is kept."""

    def add(self, factor: Factor) -> None:
        """Add the contribution of one factor."""
        dtype = self.total.dtype  # part of the model may be in another precision
        if isinstance(factor, Rows):
            self.rows(*self._sets(factor.j.to(dtype)))
            return
        if factor.windows is not None and factor.source is not None and self._windowed(factor, factor.source, factor.windows):
            return
        (u1, u2), (g1, g2) = self._sets(factor.u.to(dtype)), self._sets(factor.g.to(dtype))
        self._outer(*_used(u1, g1, u2, g2), bias=factor.bias)

    def _windowed(self, factor: Outer, source: Tensor, windows: Windows) -> bool:
        """Whether a convolution was added from its inputs, without what its positions see of them: by tiles or by pixels."""
        dtype, space = self.total.dtype, source.shape[-len(windows.taps) :]
        x, g = source.reshape(len(source), -1, source.shape[-len(space) - 1], *space).to(dtype), factor.g[..., 0, :].to(dtype)
        t, o = g.shape[2:]
        d, entry = prod(windows.taps) * x.shape[2], positions.multiply_adds(windows, x.shape[2], g)
        explicit = self._cheaper_explicit(t, d, o, entry=float(min(d, entry)))
        if not (winograd.gradients_worthwhile(x, g, windows) if explicit else entry < d):
            return False
        if may_be_rank_one(g) or used_positions(g) is not None:
            return False
        if factor.bias:
            self.rows(*self._sets(g.sum(2)))
        if explicit:
            for j in winograd.write_out(x, g, windows, self.scratch):
                self.rows(*self._sets(j.flatten(2)))
        else:
            (v1, v2), (g1, g2) = self._sets(x.movedim(2, -1).flatten(1, -2)), self._sets(g)
            self.contracted(v1, g1, v2, g2, PixelProducts(windows, tuple(space)))
        return True

    def _sets(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Parts of the two sets; the same tensor twice where there is one set."""
        return (x, x) if self.symmetric else (x[: self.n1], x[self.n1 :])

    def _outer(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, *, bias: bool) -> None:
        """A factor as in ``Outer``, of the first and of the second set."""
        t, groups = u1.shape[1:3]
        if bias and (t > 1 or groups > 1):
            self.rows(*alike(lambda g: g.sum(2).flatten(2), g1, g2))
        if groups > 1 and self.explicit(u1, g1):
            for j1, j2 in write_out_groups(u1, g1, u2, g2):
                self.rows(j1, j2)
            return
        for v1, h1, v2, h2 in _groups(u1, g1, u2, g2):
            if t == 1:
                self.single(v1[:, 0], h1[:, :, 0], v2[:, 0], h2[:, :, 0], bias and groups == 1)
            else:
                self._positions(v1, h1, v2, h2, explicit=groups == 1 and self.explicit(u1, g1))

    def _positions(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, *, explicit: bool) -> None:
        """A factor with several positions, ``u [n, t, d]`` and ``g [n, k, t, o]``."""
        splits = alike(rank_one, g1, g2)
        if splits[0] is not None and splits[1] is not None:
            for blocks in channel_blocks(*splits[0], u1, *splits[1], u2, self.scratch):
                self.channels(*blocks)
        elif explicit:
            for j1, j2 in write_out(u1, g1, u2, g2, self.scratch):
                self.rows(j1, j2)
        else:
            self.contracted(u1, g1, u2, g2, Products())

    def explicit(self, u: Tensor, g: Tensor) -> bool:
        """Whether gradients of each group are written out, for ``u`` and ``g`` as in ``Outer``, of some of the examples."""
        begin = _BEGIN * self.n1 if u.shape[2] > 1 else 0  # of several groups, gradients are written out together
        return self._cheaper_explicit(u.shape[1], u.shape[3], g.shape[4], begin)

    def _cheaper_explicit(self, t: int, d: int, o: int, begin: int = 0, entry: float | None = None) -> bool:
        """``entry``: multiply-adds of a product between positions, of d numbers unless given."""
        n = self.n1 if self.symmetric else self.n1 + self.n2
        explicit, _ = self.costs(n, self.k, t, d, o)
        _, contracted = self.costs(n, self.k, t, d if entry is None else entry, o)
        return explicit <= contracted + begin

    @abstractmethod
    def rows(self, j1: Tensor, j2: Tensor) -> None:
        """Add for gradients ``[n, k, p]``."""

    @abstractmethod
    def single(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, ones: bool) -> None:
        """Add for one position, ``u [n, d]`` and ``g [n, k, o]``; ``ones`` counts a bias too."""

    @abstractmethod
    def channels(self, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor) -> None:
        """Add for J[n,k,o] = w[k,o] s[o,n]."""

    @abstractmethod
    def contracted(self, v1: Tensor, g1: Tensor, v2: Tensor, g2: Tensor, products: Products) -> None:
        """Add for several positions, ``g [n, k, t, o]``, without writing gradients out; ``products`` makes C from v."""

    @abstractmethod
    def costs(self, n: int, k: int, t: int, d: float, o: int) -> tuple[float, float]:
        """Multiply-adds of the explicit and of the contracted order."""

    def result(self) -> Tensor:
        return self.total


def _groups(u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """One group after the other, without its axis; of one set the same tensors twice."""
    us, gs = alike(lambda u: u.unbind(2), u1, u2), alike(lambda g: g.unbind(3), g1, g2)
    for i in range(u1.shape[2]):
        yield us[0][i], gs[0][i], us[1][i], gs[1][i]


def _used(u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The positions at which some gradient is not 0."""
    if u1.shape[1] == 1:
        return u1, g1, u2, g2
    used = used_positions(g1) if g1 is g2 else used_positions(g1, g2)
    if used is None:
        return u1, g1, u2, g2
    (u1, u2), (g1, g2) = alike(lambda u: u[:, used], u1, u2), alike(lambda g: g[:, :, used], g1, g2)
    return u1, g1, u2, g2
