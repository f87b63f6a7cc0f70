"""One-layer transformer for modular arithmetic: the definition, and the same function in a cheaper order."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ntklib.random import stream

POSITIONS = 3  # "a b ="


class ModularTransformer(nn.Module):
    r"""One-layer ReLU transformer that reads "a b =" and gives a logit for every residue, without layer normalisation.

    .. math::
        h_i &= W_E x_i + p_i , \qquad i = 0, 1, 2 \\
        r &= h_2 + W_O \, \mathrm{concat}_{k} \sum_i \alpha_i^{(k)} W_V^{(k)} h_i , \qquad
        \alpha^{(k)} = \operatorname{softmax}_i \bigl( \langle W_Q^{(k)} h_2 , W_K^{(k)} h_i \rangle / \sqrt{d_k} \bigr) \\
        f(x) &= W_U \bigl( r + W_{\mathrm{out}} \operatorname{relu}(W_{\mathrm{in}} r + b_{\mathrm{in}}) + b_{\mathrm{out}} \bigr)

    The network of Nanda et al. 2023 (arXiv:2301.05217v3, section 3), whose logits are read at the last position. Only that position
    needs a query, and only it goes through the perceptron: leaving the others out changes no output, as one causal layer has no
    way from them to the last logits. Of the embedding's p + 1 rows the last is the token "=".

    Weights are normal with variance 1/width, those of the unembedding with variance 1/p, biases zero, as in the reference code
    of that paper. (Its standard deviation is 1/sqrt(width) also for the second layer of the perceptron.)

    Args:
        p: Modulus, the number of residues and of outputs.
        width: Dimension d of the residual stream.
        heads: Attention heads, a divisor of the width; each has dimension width/heads.
        hidden: Units of the perceptron.
        seed: Weights are drawn from ``stream(seed, "init")``.

    Raises:
        ValueError: If p is below 2, a size below 1, or the width not a multiple of the heads.
    """

    def __init__(self, *, p: int, width: int = 128, heads: int = 4, hidden: int = 512, seed: int = 0) -> None:
        super().__init__()
        if p < 2 or min(width, heads, hidden) < 1:
            msg = f"p must be at least 2 and width, heads and hidden at least 1. Got {p}, {width}, {heads} and {hidden}."
            raise ValueError(msg)
        if width % heads:
            msg = f"width must be a multiple of heads = {heads}. Got {width}."
            raise ValueError(msg)
        self.p, self.heads = p, heads
        with torch.random.fork_rng([]):  # layers draw PyTorch's default weights from the global generator when they are made
            self.embed = nn.Embedding(p + 1, width)
            self.position = nn.Parameter(torch.empty(POSITIONS, width))
            self.query, self.key, self.value, self.project = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
            self.unembed = nn.Linear(width, p, bias=False)
        self._draw(stream(seed, "init"))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        for name, w in self.named_parameters():
            if name.endswith("bias"):
                w.zero_()
            else:
                variance = 1 / (self.p if name == "unembed.weight" else self.position.shape[1])
                w.normal_(std=math.sqrt(variance), generator=generator)

    def forward(self, x: Tensor) -> Float[Tensor, "n p"]:
        """Logits of tokens ``[n, 3]`` (integers) or of one-hot vectors ``[n, 3, p + 1]`` (real; need not be one-hot)."""
        h = (x @ self.embed.weight if x.is_floating_point() else self.embed(x)) + self.position  # [n, 3, d]
        last = h[:, -1]
        split = lambda w: w.unflatten(-1, (self.heads, -1))  # noqa: E731 [..., d] -> [..., k, d/k]
        q, keys, values = split(self.query(last)), split(self.key(h)), split(self.value(h))
        scores = (q[:, None] * keys).sum(-1) / math.sqrt(q.shape[-1])  # [n, 3, k]
        mixed = (scores.softmax(1)[..., None] * values).sum(1).flatten(1)
        r = last + self.project(mixed)
        return self.unembed(r + self.outer(self.inner(r).relu()))

    def folded(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n p"]:
        r"""Logits of "a b =" for pairs (a, b): ``forward`` with the sums in another order, for training.

        The token "=" is the same in all inputs, so the query and the residual :math:`h_2` are one vector each, and scores and
        values of the other positions are tables of p rows. Matrices that follow each other are multiplied first:
        :math:`W_{\mathrm{in}} W_O`, :math:`W_U W_{\mathrm{out}}` and :math:`W_U W_O`, so that an example costs
        :math:`d m + m p + d p` products and never returns to the residual stream. Equal to ``forward`` up to rounding, with the
        same gradients; it has no rule in the engine, so kernels are measured on ``forward``.
        """
        table, k = self.embed.weight, self.heads  # [p + 1, d]
        last = table[-1] + self.position[-1]
        h = torch.cat([table[:-1] + self.position[0], table[:-1] + self.position[1], last[None]])  # [2p + 1, d]
        query = self.query(last).unflatten(0, (k, -1)) / math.sqrt(len(last) // k)
        keys, values = self.key(h).unflatten(1, (k, -1)), self.value(h)
        scores = (keys * query).sum(-1)  # [2p + 1, k]
        rows = torch.cat([pairs[:, 0], pairs[:, 1] + self.p]).view(2, -1)
        n = len(pairs)
        picked = torch.cat([scores[rows.flatten()].view(2, n, k), scores[-1].expand(1, n, k)])
        alpha = picked.softmax(0)  # [3, n, k]
        first, second = values[rows[0]].unflatten(1, (k, -1)), values[rows[1]].unflatten(1, (k, -1))
        third = values[-1].unflatten(0, (k, -1))
        mixed = (alpha[0, ..., None] * first + alpha[1, ..., None] * second + alpha[2, ..., None] * third).flatten(1)
        w_o, w_u = self.project.weight, self.unembed.weight
        before = F.linear(mixed, self.inner.weight @ w_o, self.inner(last))  # [n, m]
        direct = F.linear(mixed, w_u @ w_o, w_u @ (last + self.outer.bias))
        return torch.addmm(direct, before.relu(), (w_u @ self.outer.weight).T)
