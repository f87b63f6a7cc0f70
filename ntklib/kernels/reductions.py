"""The five shapes in which kernels are summed: all of it, its trace and diagonal over outputs, and examples with themselves."""

import torch
from torch import Tensor

from ntklib.kernels.blocks import alike, block_slices, mirror
from ntklib.kernels.contract import Accumulator
from ntklib.kernels.positions import Products

_ROWS = 160  # rows of a kernel formed at a time: enough for a full-speed product, few enough for triangles
_CACHE = 2**18  # numbers that are worth working on at a time, on a CPU


class Full(Accumulator):
    """Theta[n,a,n',b], as a matrix ``[n1 k, n2 k]``, filled above the diagonal until ``result``."""

    def shape(self) -> tuple[int, ...]:
        return self.n1 * self.k, self.n2 * self.k

    def costs(self, n: int, k: int, t: int, d: float, o: int) -> tuple[float, float]:
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

    def contracted(self, v1: Tensor, g1: Tensor, v2: Tensor, g2: Tensor, products: Products) -> None:
        k, t, o = g2.shape[1:]
        left, right = alike(lambda g: g.transpose(2, 3).reshape(len(g), k * o, t), g1, g2)
        step = max(1, _CACHE // (k * o * t)) if g2.device.type == "cpu" else self.n2
        for i in range(self.n1):
            start = i if self.symmetric else 0
            c = products.between(v2[start:], v1[i : i + 1])[:, :, 0]  # U' U^T, [n2, t', t]
            rows = left[i].reshape(k, o * t)
            for part, seen in zip(right[start:].split(step), c.split(step), strict=True):
                h = torch.bmm(part, seen, out=self.scratch(*part.shape)).view(-1, o * t)  # G' C, [n2 k, o t]
                self.total[i * k : (i + 1) * k, start * k : start * k + len(h)].addmm_(rows, h.T)
                start += len(part)

    def result(self) -> Tensor:
        if self.symmetric:
            mirror(self.total)
        return self.total.view(self.n1, self.k, self.n2, self.k)


class Trace(Accumulator):
    """sum_a Theta[n,a,n',a], ``[n1, n2]``."""

    def shape(self) -> tuple[int, ...]:
        return self.n1, self.n2

    def costs(self, n: int, k: int, t: int, d: float, o: int) -> tuple[float, float]:
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

    def contracted(self, v1: Tensor, g1: Tensor, v2: Tensor, g2: Tensor, products: Products) -> None:
        g1, g2 = alike(lambda g: g.transpose(1, 2).flatten(2), g1, g2)
        self._ghost([(self.total, g1, g2)], v1, v2, products)

    def _ghost(self, parts: list[tuple[Tensor, Tensor, Tensor]], v1: Tensor, v2: Tensor, products: Products) -> None:
        """Add sum_tt' C_tt' (G G'^T)_tt' to each total, of ``(total, g1 [n, t, p], g2)``."""
        step = max(1, _ROWS // parts[0][1].shape[1])
        for i in range(0, self.n1, step):
            start = i if self.symmetric else 0
            c = products.between(v1[i : i + step], v2[start:])
            for total, g1, g2 in parts:
                both = g1[i : i + step].flatten(0, 1) @ g2[start:].flatten(0, 1).T
                total[i : i + step, start:] += both.reshape(c.shape).mul_(c).sum(3).sum(1)

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

    def contracted(self, v1: Tensor, g1: Tensor, v2: Tensor, g2: Tensor, products: Products) -> None:
        g1, g2 = alike(lambda g: g.transpose(0, 1).contiguous(), g1, g2)
        self._ghost(list(zip(self.total, g1, g2, strict=True)), v1, v2, products)

    def costs(self, n: int, k: int, t: int, d: float, o: int) -> tuple[float, float]:
        pairs = self.half * self.n1 * self.n2
        return float(n * k * t * d * o + self.n1 * self.n2 * k * d * o), pairs * t * t * (d + k * o)

    def result(self) -> Tensor:
        if self.symmetric:
            for total in self.total:
                mirror(total)
        return self.total.permute(1, 2, 0)


class Blocks(Accumulator):
    """Theta[n,a,n,b], ``[n, k, k]``, of example n of the first set with example n of the second."""

    def shape(self) -> tuple[int, ...]:
        return self.n1, self.k, self.k

    def costs(self, n: int, k: int, t: int, d: float, o: int) -> tuple[float, float]:
        return float(n * k * t * d * o + self.n1 * k * k * d * o), float(self.n1 * (t * t * d + k * o * t * t + k * k * o * t))

    def rows(self, j1: Tensor, j2: Tensor) -> None:
        self.total.baddbmm_(j1, j2.mT)

    def single(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, ones: bool) -> None:
        a = (u1 * u2).sum(1) + float(ones)
        self.total.baddbmm_(g1 * a[:, None, None], g2.mT)

    def channels(self, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor) -> None:
        h = (s1 * s2).sum(2).T  # [n, o]
        self.total += (w1 * h[:, None]) @ w2.T

    def contracted(self, v1: Tensor, g1: Tensor, v2: Tensor, g2: Tensor, products: Products) -> None:
        left, right = alike(lambda g: g.transpose(2, 3).reshape(len(g), -1, g.shape[2]), g1, g2)
        h = right @ products.paired(v2, v1)
        self.total.baddbmm_(left.reshape(self.n1, self.k, -1), h.reshape(self.n1, self.k, -1).mT)

    def result(self) -> Tensor:
        if self.symmetric:
            self.total.copy_((self.total + self.total.mT) / 2)
        return self.total


class Norms(Accumulator):
    """Theta[n,a,n,a], ``[n, k]``, of example n of the first set with example n of the second: ||J_na||^2 where these are one."""

    def shape(self) -> tuple[int, ...]:
        return self.n1, self.k

    def costs(self, n: int, k: int, t: int, d: float, o: int) -> tuple[float, float]:
        return float(n * k * t * d * o), float(n * t * t * (d + k * o))

    def rows(self, j1: Tensor, j2: Tensor) -> None:
        self.total += (j1 * j2).sum(2)

    def single(self, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, ones: bool) -> None:
        self.total.addcmul_((u1 * u2).sum(1, keepdim=True) + float(ones), (g1 * g2).sum(2))

    def channels(self, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor) -> None:
        self.total += (s1 * s2).sum(2).T @ (w1 * w2).T

    def contracted(self, v1: Tensor, g1: Tensor, v2: Tensor, g2: Tensor, products: Products) -> None:
        step = max(1, _CACHE // g1.shape[2] ** 2)
        for i in range(0, self.n1, step):
            c = products.paired(v1[i : i + step], v2[i : i + step])
            for j, c_j in enumerate(c, start=i):
                self.total[j] += ((c_j @ g2[j]) * g1[j]).sum((1, 2))


ACCUMULATORS: dict[str | None, type[Accumulator]] = {
    None: Full,
    "trace": Trace,
    "diagonal": Diagonal,
    "blocks": Blocks,
    "norms": Norms,
}
