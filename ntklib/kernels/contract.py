"""Contract factors of per-example gradients to kernels, in the cheapest order, without ever holding the Jacobian.

With J[n,k,:,:] = sum_t G[n,k,t,:] U[n,t,:]^T (o x d numbers) the product of two gradients can be formed

- *explicit*: J in blocks, then its Gram matrix;
- *contracted*: C = U U'^T (t x t' numbers) first, then G' C, then its product with G: cheaper where t is small;
- *ghost*: (U U'^T) times (G G'^T), entry by entry, summed over t, t': always for t = 1, and where outputs are summed anyway;
- *rank one*: where G[n,k,t,o] = W[k,o] M[n,t,o], as below a pooled linear head, one Gram matrix per channel serves all k.

Multiply-adds are counted before choosing. Sums over pairs of examples are formed above the diagonal only, then mirrored.
"""

from torch import Tensor

from ntklib.kernels.blocks import (
    Scratch,
    block_slices,
    channel_blocks,
    mirror,
    rank_one,
    used_positions,
    write_out,
    write_out_groups,
)
from ntklib.kernels.operations import Factor, Outer, Rows

_ROWS = 160  # rows of a kernel formed at a time: enough for a full-speed product, few enough for triangles


class Accumulator:
    """Sum over factors of the kernel between two sets of examples, in one of five shapes.

    The examples of every factor are those of the first set followed by those of the second (``n1`` given), or one set only
    (``n1=None``: the kernel is symmetric). ``K`` output directions.

    Args:
        n: Number of examples in the factors.
        k: Number of output directions.
        n1: Size of the first set, or None.
        like: Dtype and device of the result.
        scratch: Memory for blocks, that several accumulators may share.
    """

    total: Tensor

    def __init__(self, n: int, k: int, n1: int | None, like: Tensor, scratch: Scratch | None = None) -> None:
        self.scratch = scratch if scratch is not None else Scratch(like)
        self.symmetric = n1 is None
        self.first = slice(0, n if n1 is None else n1)
        self.second = slice(0 if n1 is None else n1, n)
        self.n1, self.n2, self.k = self.first.stop, n - self.second.start, k
        self.half = 0.55 if self.symmetric else 1.0  # share of pairs formed
        self.total = like.new_zeros(self.shape())

    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def add(self, factor: Factor) -> None:
        """Add the contribution of one factor."""
        if isinstance(factor, Rows):
            self.rows(factor.j.to(self.total.dtype))  # of a part of the model in another precision
            return
        if factor.g.dtype != self.total.dtype:
            factor = Outer(factor.u.to(self.total.dtype), factor.g.to(self.total.dtype), factor.bias)
        used = used_positions(factor.g) if factor.u.shape[1] > 1 else None
        if used is not None:
            factor = Outer(factor.u[:, used], factor.g[:, :, used], factor.bias)
        t = factor.u.shape[1]
        if factor.bias and (t > 1 or factor.u.shape[2] > 1):
            self.rows(factor.g.sum(2).flatten(2))
        groups = factor.u.shape[2]
        if groups > 1 and self._explicit(factor.u[:, :, 0], factor.g[..., 0, :]):
            for j in write_out_groups(factor.u, factor.g):
                self.rows(j)
            return
        for i in range(groups):
            u, g = factor.u[:, :, i], factor.g[..., i, :]
            if t == 1:
                self.single(u[:, 0], g[:, :, 0], factor.bias and groups == 1)
            else:
                self._positions(u, g)

    def _positions(self, u: Tensor, g: Tensor) -> None:
        """A factor with several positions, ``u [n, t, d]`` and ``g [n, k, t, o]``."""
        split = rank_one(g)
        if split is not None:
            for w, s in channel_blocks(*split, u, self.scratch):
                self.channels(w, s)
            return
        if self._explicit(u, g):
            for j in write_out(u, g, self.scratch):
                self.rows(j)
        else:
            self.contracted(u, g)

    def _explicit(self, u: Tensor, g: Tensor) -> bool:
        explicit, contracted = self.costs(len(u), self.k, u.shape[1], u.shape[2], g.shape[3])
        return explicit <= contracted

    def rows(self, j: Tensor) -> None:
        """Add for gradients ``[n, k, p]``."""
        raise NotImplementedError

    def single(self, u: Tensor, g: Tensor, ones: bool) -> None:
        """Add for one position, ``u [n, d]`` and ``g [n, k, o]``; ``ones`` counts a bias too."""
        raise NotImplementedError

    def channels(self, w: Tensor, s: Tensor) -> None:
        """Add for J[n,k,o] = w[k,o] s[o,n]."""
        raise NotImplementedError

    def contracted(self, u: Tensor, g: Tensor) -> None:
        raise NotImplementedError

    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
        """Multiply-adds of the explicit and of the contracted order."""
        raise NotImplementedError

    def result(self) -> Tensor:
        return self.total


class Full(Accumulator):
    """Theta[n,a,n',b], as a matrix ``[n1 k, n2 k]``, filled above the diagonal until ``result``."""

    def shape(self) -> tuple[int, ...]:
        return self.n1 * self.k, self.n2 * self.k

    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
        pairs = self.half * self.n1 * self.n2
        explicit = n * k * t * d * o + pairs * k * k * d * o
        return explicit, pairs * (t * t * d + k * o * t * t + k * k * o * t)

    def rows(self, j: Tensor) -> None:
        j1, j2 = j[self.first].flatten(0, 1), j[self.second].flatten(0, 1)
        step = max(64, min(_ROWS, len(j1) // 4)) if self.symmetric else len(j1)
        for i in range(0, len(j1), step):
            start = i if self.symmetric else 0
            self.total[i : i + step, start:].addmm_(j1[i : i + step], j2[start:].T)

    def single(self, u: Tensor, g: Tensor, ones: bool) -> None:
        a = u[self.first] @ u[self.second].T + float(ones)
        k, g1, g2 = self.k, g[self.first].flatten(0, 1), g[self.second].flatten(0, 1)
        for i, j in block_slices(self.n1, self.n2, max(1, _ROWS // k), symmetric=self.symmetric):
            rows, columns = slice(i.start * k, i.stop * k), slice(j.start * k, j.stop * k)
            block = (g1[rows] @ g2[columns].T).unflatten(0, (-1, k))
            self.total[rows, columns].unflatten(0, (-1, k)).addcmul_(block, a[i, j].repeat_interleave(k, 1)[:, None])

    def channels(self, w: Tensor, s: Tensor) -> None:
        h = (s[:, self.first] @ s[:, self.second].mT).flatten(1)  # [o, n1 n2]
        pairs = (w[:, None] * w[None]).flatten(0, 1)  # [k k, o]
        block = (pairs @ h).view(self.k, self.k, self.n1, self.n2)
        self.total.view(self.n1, self.k, self.n2, self.k).add_(block.permute(2, 0, 3, 1))

    def contracted(self, u: Tensor, g: Tensor) -> None:
        n, t, d = u.shape
        k, o = g.shape[1], g.shape[3]
        flat = g.transpose(2, 3).reshape(n, k * o, t)
        v, right = u[self.second].reshape(-1, d), flat[self.second]
        for i in range(self.n1):
            start = i if self.symmetric else 0
            c = (v[start * t :] @ u[i].T).view(-1, t, t)  # U' U^T
            h = (right[start:] @ c).reshape(-1, o * t)  # G' C, [n2 k, o t]
            self.total[i * k : (i + 1) * k, start * k :].addmm_(flat[i].reshape(k, o * t), h.T)

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

    def rows(self, j: Tensor) -> None:
        j1, j2 = j[self.first].flatten(1), j[self.second].flatten(1)
        step = _ROWS if self.symmetric else len(j1)
        for i in range(0, len(j1), step):
            start = i if self.symmetric else 0
            self.total[i : i + step, start:].addmm_(j1[i : i + step], j2[start:].T)

    def single(self, u: Tensor, g: Tensor, ones: bool) -> None:
        g = g.flatten(1)
        for i in range(0, self.n1, _ROWS):
            start = i if self.symmetric else 0
            a = u[self.first][i : i + _ROWS] @ u[self.second][start:].T + float(ones)
            self.total[i : i + _ROWS, start:].addcmul_(a, g[self.first][i : i + _ROWS] @ g[self.second][start:].T)

    def channels(self, w: Tensor, s: Tensor) -> None:
        s = (s * w.norm(dim=0)[:, None, None]).transpose(0, 1).flatten(1)
        self.rows(s[:, None])

    def contracted(self, u: Tensor, g: Tensor) -> None:
        n, t, _ = u.shape
        self._ghost(self.total, u.flatten(0, 1), g.transpose(1, 2).reshape(n * t, -1), t)

    def _ghost(self, total: Tensor, u: Tensor, g: Tensor, t: int) -> None:
        """Add sum_tt' (U U'^T)_tt' (G G'^T)_tt' for ``u [n t, d]`` and ``g [n t, p]``."""
        step = max(1, _ROWS // t)
        u1, u2, g1, g2 = (x[s.start * t : s.stop * t] for x in (u, g) for s in (self.first, self.second))
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

    def rows(self, j: Tensor) -> None:
        self.total.baddbmm_(j[self.first].transpose(0, 1), j[self.second].permute(1, 2, 0))

    def single(self, u: Tensor, g: Tensor, ones: bool) -> None:
        a = u[self.first] @ u[self.second].T + float(ones)
        for k in range(self.k):
            self.total[k].addcmul_(a, g[self.first, k] @ g[self.second, k].T)

    def channels(self, w: Tensor, s: Tensor) -> None:
        h = s[:, self.first] @ s[:, self.second].mT
        self.total += (w.square() @ h.flatten(1)).view_as(self.total)

    def contracted(self, u: Tensor, g: Tensor) -> None:
        t = u.shape[1]
        for k in range(self.k):
            self._ghost(self.total[k], u.flatten(0, 1), g[:, k].flatten(0, 1), t)

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

    def rows(self, j: Tensor) -> None:
        self.total.baddbmm_(j[self.first], j[self.second].mT)

    def single(self, u: Tensor, g: Tensor, ones: bool) -> None:
        a = (u[self.first] * u[self.second]).sum(1) + float(ones)
        self.total.baddbmm_(g[self.first] * a[:, None, None], g[self.second].mT)

    def channels(self, w: Tensor, s: Tensor) -> None:
        h = (s[:, self.first] * s[:, self.second]).sum(2).T  # [n, o]
        self.total += (w * h[:, None]) @ w.T

    def contracted(self, u: Tensor, g: Tensor) -> None:
        n, t, _ = u.shape
        flat = g.transpose(2, 3).reshape(n, -1, t)
        h = flat[self.second] @ (u[self.second] @ u[self.first].mT)
        self.total.baddbmm_(flat[self.first].reshape(self.n1, self.k, -1), h.reshape(self.n1, self.k, -1).mT)

    def result(self) -> Tensor:
        if self.symmetric:
            self.total.copy_((self.total + self.total.mT) / 2)
        return self.total


class Norms(Accumulator):
    """Theta[n,a,n,a] = ||J_na||^2, ``[n, k]``."""

    def shape(self) -> tuple[int, ...]:
        return self.n1, self.k

    def costs(self, n: int, k: int, t: int, d: int, o: int) -> tuple[float, float]:
        return float(n * k * t * d * o), float(n * t * t * (d + k * o))

    def rows(self, j: Tensor) -> None:
        self.total += j.square().sum(2)

    def single(self, u: Tensor, g: Tensor, ones: bool) -> None:
        self.total.addcmul_(u.square().sum(1, keepdim=True) + float(ones), g.square().sum(2))

    def channels(self, w: Tensor, s: Tensor) -> None:
        self.total += s.square().sum(2).T @ w.square().T

    def contracted(self, u: Tensor, g: Tensor) -> None:
        c = u @ u.mT
        for i in range(len(u)):
            self.total[i] += ((c[i] @ g[i]) * g[i]).sum((1, 2))


ACCUMULATORS: dict[str | None, type[Accumulator]] = {
    None: Full,
    "trace": Trace,
    "diagonal": Diagonal,
    "blocks": Blocks,
    "norms": Norms,
}
