"""Contract factors of per-example gradients to kernels, in the cheapest order, without ever holding the Jacobian.

With J[n,k,:,:] = sum_t G[n,k,t,:] U[n,t,:]^T (o x d numbers) the product of two gradients can be formed

- *explicit*: J in blocks, then its Gram matrix;
- *contracted*: C = U U'^T (t x t' numbers) first, then G' C, then its product with G: cheaper where t is small;
- *ghost*: (U U'^T) times (G G'^T), entry by entry, summed over t, t': always for t = 1, and where outputs are summed anyway;
- *rank one*: where G[n,k,t,o] = W[k,o] M[n,t,o], as below a pooled linear head, one Gram matrix per channel serves all k.

Multiply-adds are counted before choosing. Sums over pairs of examples are formed above the diagonal only, then mirrored.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from ntklib.kernels import winograd
from ntklib.kernels.blocks import (
    Scratch,
    alike,
    block_slices,
    channel_blocks,
    may_be_rank_one,
    mirror,
    rank_one,
    used_positions,
    write_out,
    write_out_groups,
)
from ntklib.kernels.operations import Factor, Outer, Rows

_ROWS = 160  # rows of a kernel formed at a time: enough for a full-speed product, few enough for triangles
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
        if factor.images is not None and factor.source is not None and self._in_tiles(factor, factor.source, factor.images):
            return
        (u1, u2), (g1, g2) = self._sets(factor.u.to(dtype)), self._sets(factor.g.to(dtype))
        self._outer(*_used(u1, g1, u2, g2), bias=factor.bias)

    def _in_tiles(self, factor: Outer, source: Tensor, images: winograd.Images) -> bool:
        """Whether the gradients of a convolution were written out by tiles, and added."""
        dtype = self.total.dtype
        x, g = source.reshape(len(source), -1, *source.shape[-3:]).to(dtype), factor.g[..., 0, :].to(dtype)
        sizes = x.shape[2] * winograd.TAPS, g.shape[3]
        if not winograd.gradients_worthwhile(x, g, images) or not self._cheaper_explicit(g.shape[2], *sizes):
            return False
        if may_be_rank_one(g) or used_positions(g) is not None:
            return False
        if factor.bias:
            self.rows(*self._sets(g.sum(2)))
        for j in winograd.write_out(x, g, images, self.scratch):
            self.rows(*self._sets(j.flatten(2)))
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
            self.contracted(u1, g1, u2, g2)

    def explicit(self, u: Tensor, g: Tensor) -> bool:
        """Whether gradients of each group are written out, for ``u`` and ``g`` as in ``Outer``, of some of the examples."""
        begin = _BEGIN * self.n1 if u.shape[2] > 1 else 0  # of several groups, gradients are written out together
        return self._cheaper_explicit(u.shape[1], u.shape[3], g.shape[4], begin)

    def _cheaper_explicit(self, t: int, d: int, o: int, begin: int = 0) -> bool:
        n = self.n1 if self.symmetric else self.n1 + self.n2
        explicit, contracted = self.costs(n, self.k, t, d, o)
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
    def contracted(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> None:
        """Add for several positions, ``u [n, t, d]`` and ``g [n, k, t, o]``, without writing gradients out."""

    @abstractmethod
    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
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


class Full(Accumulator):
    """Theta[n,a,n',b], as a matrix ``[n1 k, n2 k]``, filled above the diagonal until ``result``."""

    def shape(self) -> tuple[int, ...]:
        return self.n1 * self.k, self.n2 * self.k

    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
        pairs = self.half * self.n1 * self.n2
        explicit = n * k * t * d * o + pairs * k * k * d * o
        return explicit, pairs * (t * t * d + k * o * t * t + k * k * o * t)

    def rows(self, j1: Tensor, j2: Tensor) -> None:
        j1, j2 = alike(lambda j: j.flatten(0, 1), j1, j2)
        step = max(64, min(_ROWS, len(j1) // 4)) if self.symmetric else len(j1)
        for i in range(0, len(j1), step):
            start = i if self.symmetric else 0
            self.total[i : i + step, start:].addmm_(j1[i : i + step], j2[start:].T)

    def single(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, ones: bool) -> None:
        a = u1 @ u2.T + float(ones)
        k, (g1, g2) = self.k, alike(lambda g: g.flatten(0, 1), g1, g2)
        for i, j in block_slices(self.n1, self.n2, max(1, _ROWS // k), symmetric=self.symmetric):
            rows, columns = slice(i.start * k, i.stop * k), slice(j.start * k, j.stop * k)
            block = (g1[rows] @ g2[columns].T).unflatten(0, (-1, k))
            self.total[rows, columns].unflatten(0, (-1, k)).addcmul_(block, a[i, j].repeat_interleave(k, 1)[:, None])

    def channels(self, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor) -> None:
        h = (s1 @ s2.mT).flatten(1)  # [o, n1 n2]
        pairs = (w1[:, None] * w2[None]).flatten(0, 1)  # [k k, o]
        block = (pairs @ h).view(self.k, self.k, self.n1, self.n2)
        self.total.view(self.n1, self.k, self.n2, self.k).add_(block.permute(2, 0, 3, 1))

    def contracted(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> None:
        t, d = u2.shape[1:]
        k, o = g2.shape[1], g2.shape[3]
        left, right = alike(lambda g: g.transpose(2, 3).reshape(len(g), k * o, t), g1, g2)
        v = u2.reshape(-1, d)
        for i in range(self.n1):
            start = i if self.symmetric else 0
            c = (v[start * t :] @ u1[i].T).view(-1, t, t)  # U' U^T
            h = (right[start:] @ c).reshape(-1, o * t)  # G' C, [n2 k, o t]
            self.total[i * k : (i + 1) * k, start * k :].addmm_(left[i].reshape(k, o * t), h.T)

    def result(self) -> Tensor:
        if self.symmetric:
            mirror(self.total)
        return self.total.view(self.n1, self.k, self.n2, self.k)


class Trace(Accumulator):
    """sum_a Theta[n,a,n',a], ``[n1, n2]``."""

    def shape(self) -> tuple[int, ...]:
        return self.n1, self.n2

    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
        pairs = self.half * self.n1 * self.n2
        return n * k * t * d * o + pairs * k * d * o, pairs * t * t * (d + k * o)

    def rows(self, j1: Tensor, j2: Tensor) -> None:
        j1, j2 = alike(lambda j: j.flatten(1), j1, j2)
        step = _ROWS if self.symmetric else len(j1)
        for i in range(0, len(j1), step):
            start = i if self.symmetric else 0
            self.total[i : i + step, start:].addmm_(j1[i : i + step], j2[start:].T)

    def single(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, ones: bool) -> None:
        g1, g2 = alike(lambda g: g.flatten(1), g1, g2)
        for i in range(0, self.n1, _ROWS):
            start = i if self.symmetric else 0
            a = u1[i : i + _ROWS] @ u2[start:].T + float(ones)
            self.total[i : i + _ROWS, start:].addcmul_(a, g1[i : i + _ROWS] @ g2[start:].T)

    def channels(self, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor) -> None:
        weighted = s1 * (w1 * w2).sum(0)[:, None, None]
        self.rows(weighted.transpose(0, 1), s2.transpose(0, 1))

    def contracted(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> None:
        t = u1.shape[1]
        g1, g2 = alike(lambda g: g.transpose(1, 2).reshape(len(g) * t, -1), g1, g2)
        self._ghost(self.total, u1.flatten(0, 1), g1, u2.flatten(0, 1), g2, t)

    def _ghost(self, total: Tensor, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, t: int) -> None:
        """Add sum_tt' (U U'^T)_tt' (G G'^T)_tt' for ``u [n t, d]`` and ``g [n t, p]``."""
        step = max(1, _ROWS // t)
        for i in range(0, self.n1, step):
            start = i if self.symmetric else 0
            rows = slice(i * t, (i + step) * t)
            product = (u1[rows] @ u2[start * t :].T).mul_(g1[rows] @ g2[start * t :].T)
            total[i : i + step, start:] += product.unflatten(1, (-1, t)).sum(2).unflatten(0, (-1, t)).sum(1)

    def result(self) -> Tensor:
        if self.symmetric:
            mirror(self.total)
        return self.total


class Diagonal(Trace):
    """Theta[n,a,n',a], ``[k, n1, n2]`` until ``result``."""

    def shape(self) -> tuple[int, ...]:
        return self.k, self.n1, self.n2

    def rows(self, j1: Tensor, j2: Tensor) -> None:
        self.total.baddbmm_(j1.transpose(0, 1), j2.permute(1, 2, 0))

    def single(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, ones: bool) -> None:
        a = u1 @ u2.T + float(ones)
        for k in range(self.k):
            self.total[k].addcmul_(a, g1[:, k] @ g2[:, k].T)

    def channels(self, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor) -> None:
        self.total += ((w1 * w2) @ (s1 @ s2.mT).flatten(1)).view_as(self.total)

    def contracted(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> None:
        t = u1.shape[1]
        v1, v2 = u1.flatten(0, 1), u2.flatten(0, 1)
        for k in range(self.k):
            self._ghost(self.total[k], v1, g1[:, k].flatten(0, 1), v2, g2[:, k].flatten(0, 1), t)

    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
        pairs = self.half * self.n1 * self.n2
        return float(n * k * t * d * o + self.n1 * self.n2 * k * d * o), pairs * t * t * k * (d + o)

    def result(self) -> Tensor:
        if self.symmetric:
            for total in self.total:
                mirror(total)
        return self.total.permute(1, 2, 0)


class Blocks(Accumulator):
    """Theta[n,a,n,b], ``[n, k, k]``, of example n of the first set with example n of the second."""

    def shape(self) -> tuple[int, ...]:
        return self.n1, self.k, self.k

    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
        return float(n * k * t * d * o + self.n1 * k * k * d * o), float(self.n1 * (t * t * d + k * o * t * t + k * k * o * t))

    def rows(self, j1: Tensor, j2: Tensor) -> None:
        self.total.baddbmm_(j1, j2.mT)

    def single(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, ones: bool) -> None:
        a = (u1 * u2).sum(1) + float(ones)
        self.total.baddbmm_(g1 * a[:, None, None], g2.mT)

    def channels(self, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor) -> None:
        h = (s1 * s2).sum(2).T  # [n, o]
        self.total += (w1 * h[:, None]) @ w2.T

    def contracted(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> None:
        t = u1.shape[1]
        left, right = alike(lambda g: g.transpose(2, 3).reshape(len(g), -1, t), g1, g2)
        h = right @ (u2 @ u1.mT)
        self.total.baddbmm_(left.reshape(self.n1, self.k, -1), h.reshape(self.n1, self.k, -1).mT)

    def result(self) -> Tensor:
        if self.symmetric:
            self.total.copy_((self.total + self.total.mT) / 2)
        return self.total


class Norms(Accumulator):
    """Theta[n,a,n,a], ``[n, k]``, of example n of the first set with example n of the second: ||J_na||^2 where these are one."""

    def shape(self) -> tuple[int, ...]:
        return self.n1, self.k

    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
        return float(n * k * t * d * o), float(n * t * t * (d + k * o))

    def rows(self, j1: Tensor, j2: Tensor) -> None:
        self.total += (j1 * j2).sum(2)

    def single(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, ones: bool) -> None:
        self.total.addcmul_((u1 * u2).sum(1, keepdim=True) + float(ones), (g1 * g2).sum(2))

    def channels(self, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor) -> None:
        self.total += (s1 * s2).sum(2).T @ (w1 * w2).T

    def contracted(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> None:
        c = u1 @ u2.mT
        for i in range(len(u1)):
            self.total[i] += ((c[i] @ g2[i]) * g1[i]).sum((1, 2))


ACCUMULATORS: dict[str | None, type[Accumulator]] = {
    None: Full,
    "trace": Trace,
    "diagonal": Diagonal,
    "blocks": Blocks,
    "norms": Norms,
}
