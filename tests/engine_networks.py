"""Cases of attention, of parameters used in unusual ways, and of whole networks."""

import torch
import torch.nn.functional as F
from engine_case import Case, Net
from engine_layers import frozen
from torch import nn
from torch.nn import Conv2d, Flatten, Linear, Sequential, Tanh
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


def attend(m, x, **options):
    """Embed a sequence of pairs, attend, and read off outputs at its end."""
    h = m.embed(x)
    return m.attn(h, h, h, need_weights=False, **options)[0][:, -1].tanh() @ m.head


def attention(forward=attend, *leaves: str, **options) -> Case:
    options = {"batch_first": True, **options}
    return Case(
        lambda: Net(forward, embed=Linear(2, 4), attn=nn.MultiheadAttention(4, 2, **options), other=Linear(2, 3), head=(4, 3)),
        (3, 2),
        tuple(f"attn.{name}" for name in leaves),
    )


def cross(m, x):
    memory = m.other(x)
    return m.attn(m.embed(x[:, :1]), memory, memory.tanh())[0].flatten(1) @ m.head


def sequence_first(m, x):
    h = m.embed(x).transpose(0, 1)
    return m.attn(h, h.flip(0), h)[0][-1] @ m.head


def causal(m, x):
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
    return attend(m, x, attn_mask=mask, is_causal=True)


ATTENTION = {
    "self attention": attention(),
    "self attention without bias": attention(bias=False),
    "causal attention": attention(causal),
    "cross attention": attention(cross, "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", kdim=3, vdim=3),
    "attention, sequence first": attention(sequence_first, "in_proj_weight", "in_proj_bias", batch_first=False),
    "attention with extra tokens": attention(attend, "bias_k", "bias_v", add_bias_kv=True),
    "encoder layer": Case(
        lambda: Sequential(
            Linear(2, 4), nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True), Flatten(), Linear(12, 3)
        ),
        (3, 2),
    ),
    "encoder layer, norm last": Case(
        lambda: Sequential(Linear(2, 4), nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), Flatten(), Linear(12, 3)), (3, 2)
    ),
    "decoder layer": Case(
        lambda: Net(
            lambda m, x: m.head(m.layer(m.embed(x), m.other(x[:, :2])).flatten(1)),
            embed=Linear(2, 4),
            other=Linear(2, 4),
            layer=nn.TransformerDecoderLayer(4, 2, 6, batch_first=True),
            head=Linear(12, 3),
        ),
        (3, 2),
        ("layer.multihead_attn.in_proj_weight", "layer.multihead_attn.in_proj_bias"),
    ),
}


class Square(torch.autograd.Function):
    """x^2 W as a function of the user's own, without a rule for vmap."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.square() @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * x * (g @ w.T), x.square().T @ g


class BatchedSquare(torch.autograd.Function):
    """x^2 W, with a rule for vmap: a use of W that no torch function shows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x.square() @ w

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * x * (g @ w.T), x.square().T @ g


def tied(model: nn.Module, name: str, other: str) -> nn.Module:
    """The same network, in which the parameter ``other`` is the parameter ``name``."""
    owner, _, attribute = other.rpartition(".")
    setattr(model.get_submodule(owner), attribute, model.get_parameter(name))
    return model


def reused(times: int) -> Case:
    def forward(m, x):
        for _ in range(times):
            x = torch.tanh(m.a(x))
        return m.b(x)

    return Case(lambda: Net(forward, a=Linear(4, 4), b=Linear(4, 3)), (4,), ("a.weight", "a.bias"))


def parametrized(parametrize, leaves: tuple[str, ...], **options) -> Case:
    return Case(lambda: Sequential(Linear(4, 4), Tanh(), parametrize(Linear(4, 4)), Tanh(), Linear(4, 3)), (4,), leaves, **options)


def own_statistics(m, x):
    rows = []
    for h in m.a(x).split(1):
        mean = h.detach().mean((0, 2))
        rows.append(F.batch_norm(h, mean, torch.ones_like(mean), m.w).flatten(1))
    return m.b(torch.cat(rows))


def positive(x):
    return x.flatten(1)[:, :1] > 0


SHARED = {
    "module used twice": reused(2),
    "module used three times": reused(3),
    "tied layers": Case(
        lambda: tied(Sequential(Linear(4, 4), Tanh(), Linear(4, 4), Tanh(), Linear(4, 3)), "0.weight", "2.weight"),
        (4,),
        ("0.weight", "0.bias", "2.bias"),
    ),
    "tied embedding and unembedding": Case(
        lambda: tied(
            Net(lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), a=nn.Embedding(4, 3), b=Linear(3, 4, bias=False)),
            "a.weight",
            "b.weight",
        ),
        (3,),
        ("a.weight",),
        tokens=4,
    ),
    "W and W^T": Case(lambda: Net(lambda m, x: m.b(torch.tanh(x @ m.w) @ m.w.T), w=(4, 5), b=Linear(4, 3)), (4,), ("w",)),
    "weight norm": parametrized(
        parametrizations.weight_norm, ("2.bias", "2.parametrizations.weight.original0", "2.parametrizations.weight.original1")
    ),
    "spectral norm": parametrized(parametrizations.spectral_norm, ("2.bias", "2.parametrizations.weight.original")),
    "orthogonal": parametrized(parametrizations.orthogonal, ("2.bias", "2.parametrizations.weight.original")),
}
USES = {
    "functional linear": Case(
        lambda: Net(
            lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.a.weight, bias=m.a.bias), w=(5, 4), b=(5,), a=Linear(5, 3)
        ),
        (4,),
    ),
    "einsum, addmm, bilinear and outer products": Case(
        lambda: Net(
            lambda m, x: (
                torch.einsum("ni,ij->nj", x, m.e) + torch.addmm(m.b, x, m.m) + m.bi(x, x.tanh()) + torch.outer(x.sum(1), m.o)
            ),
            e=(4, 3),
            b=(3,),
            m=(4, 3),
            o=(3,),
            bi=nn.Bilinear(4, 4, 3),
        ),
        (4,),
        ("e", "b", "m", "o", "bi.weight", "bi.bias"),
    ),
    "function of the user's own": Case(
        lambda: Net(lambda m, x: Square.apply(m.a(x), m.w), a=Linear(4, 4), w=(4, 3)), (4,), streams=False
    ),
    "batched function of the user's own": Case(
        lambda: Net(lambda m, x: m.a(x) + positive(x) * BatchedSquare.apply(x, m.w), a=Linear(4, 3), w=(4, 3)), (4,), ("w",)
    ),
    "a weight with a rule that is also used unseen": Case(
        lambda: Net(lambda m, x: x @ m.w + positive(x) * BatchedSquare.apply(x, m.w), w=(4, 3)), (4,), ("w",)
    ),
    "a parameter as the input of a layer": Case(
        lambda: Net(lambda m, x: m.a(x) + positive(x) * m.b(m.p), a=Linear(4, 3), b=Linear(4, 3), p=(4,)), (4,), ("p",)
    ),
    "a weight as the input of a layer": Case(
        lambda: Net(lambda m, x: m.a(x) + positive(x) * m.b(m.a.weight.T).sum(0), a=Linear(4, 3), b=Linear(3, 3)),
        (4,),
        ("a.weight", "a.bias"),
    ),
    "statistics of the example": Case(
        lambda: Net(own_statistics, a=nn.Conv1d(1, 2, 2), w=(2,), b=Linear(6, 3)), (1, 4), streams=False
    ),
    "lstm": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)[0][:, -1]), a=nn.LSTM(2, 3, batch_first=True), b=Linear(3, 3)), (3, 2), streams=False
    ),
    "gru": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)[1][-1]), a=nn.GRU(2, 3, batch_first=True), b=Linear(3, 3)), (3, 2), streams=False
    ),
    "control flow that looks at the data": Case(
        lambda: Net(lambda m, x: m.b(m.a(x) if x[0, 0] > 0 else x), a=Linear(4, 4), b=Linear(4, 3)), (4,), streams=False
    ),
    "an example that uses no parameter": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)) if x[0, 0] > 0 else x[:, :3], a=Linear(4, 4), b=Linear(4, 3)), (4,), streams=False
    ),
    "an operation that vmap runs wrongly": Case(
        lambda: Net(
            lambda m, x: m.b(torch.cdist(m.a(x).view(-1, 2, 2), m.a(x).sin().view(-1, 2, 2)).flatten(1)),
            a=Linear(4, 4),
            b=Linear(4, 3),
        ),
        (4,),
        streams=False,
    ),
    "choice between layers by example": Case(
        lambda: Net(lambda m, x: torch.where(positive(x), m.a(x), m.b(x).tanh()), a=Linear(4, 3), b=Linear(4, 3)), (4,)
    ),
    "masked tokens": Case(
        lambda: Net(
            lambda m, x: m.b((torch.tanh(m.a(x)) * (x > 0)[..., None]).sum(1) / (1 + (x > 0).sum(1, keepdim=True))),
            a=nn.Embedding(4, 3),
            b=Linear(3, 3),
        ),
        (4,),
        tokens=4,
    ),
    "unused parameters": Case(lambda: Net(lambda m, x: m.a(x), a=Linear(4, 3), unused=Linear(4, 3), w=(2,)), (4,)),
    "frozen layer": Case(
        lambda: frozen(Sequential(Linear(4, 5), Tanh(), Linear(5, 5), Tanh(), Linear(5, 3)), "2.weight", "2.bias"), (4,)
    ),
    "frozen biases": Case(
        lambda: frozen(Sequential(Conv2d(1, 2, 2), Tanh(), Flatten(), Linear(8, 3)), "0.bias", "3.bias"), (1, 3, 3)
    ),
    "frozen weights": Case(
        lambda: frozen(Sequential(Conv2d(1, 2, 2), Tanh(), Flatten(), Linear(8, 3)), "0.weight", "3.weight"), (1, 3, 3)
    ),
    "checkpoint": Case(
        lambda: Net(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=Sequential(Linear(4, 5), Tanh()), b=Linear(5, 3)),
        (4,),
    ),
    "checkpoint of a function without a rule": Case(
        lambda: Net(
            lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=Sequential(Linear(4, 5), nn.Softsign()), b=Linear(5, 3)
        ),
        (4,),
        streams=False,
    ),
    "prelu": Case(lambda: Sequential(Linear(4, 5), nn.PReLU(5), Linear(5, 3)), (4,), ("1.weight",)),
    "in-place activations": Case(
        lambda: Sequential(Conv2d(1, 2, 2), nn.ReLU(inplace=True), Flatten(), Linear(8, 5), nn.ELU(inplace=True), Linear(5, 3)),
        (1, 3, 3),
    ),
    "in-place work on the input": Case(lambda: Net(lambda m, x: m.a(x.mul_(2).add_(1)), a=Linear(4, 3)), (4,)),
    "detached branch": Case(lambda: Net(lambda m, x: m.a(x).detach() * m.b(x), a=Linear(4, 3), b=Linear(4, 3)), (4,)),
    "detached weight": Case(
        lambda: Net(
            lambda m, x: F.linear(m.b(x), m.a.weight.detach()) + F.linear(x, m.b.weight.detach()), a=Linear(4, 4), b=Linear(4, 4)
        ),
        (4,),
        ("a.weight", "b.weight", "b.bias"),
    ),
    "data of a weight": Case(
        lambda: Net(lambda m, x: F.linear(m.b(x), m.a.weight.data), a=Linear(4, 3), b=Linear(4, 4)), (4,), streams=False
    ),
    "rounded numbers": Case(lambda: Net(lambda m, x: m.b(torch.round(m.a(x)) + x), a=Linear(4, 4), b=Linear(4, 3)), (4,)),
    "complex numbers inside": Case(
        lambda: Net(lambda m, x: m.b(torch.fft.rfft(m.a(x)).abs()), a=Linear(4, 4), b=Linear(3, 3)), (4,)
    ),
    "loop over examples' positions": Case(
        lambda: Net(lambda m, x: torch.stack([m.a(x[:, i]) for i in range(2)], 1).flatten(1), a=Linear(3, 2)),
        (2, 3),
        ("a.weight", "a.bias"),
    ),
    "scalar parameters": Case(
        lambda: Net(
            lambda m, x: m.scale * F.log_softmax(m.a(x) / m.temperature.exp(), -1), a=Linear(4, 3), scale=(), temperature=(1,)
        ),
        (4,),
        ("scale", "temperature"),
    ),
}


class Block(nn.Module):
    """A residual block with batch normalisation and an in-place activation."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), Conv2d(out, out, 3, 1, 1)
        self.skip = Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.relu(self.skip(x) + self.b(self.relu(self.norm(self.a(x)))))


def vit(m, x):
    h = m.patch(x).flatten(2).mT
    h = torch.cat([m.token.expand(len(x), -1, -1), h], 1) + m.position
    h = m.norm(m.block(h))
    return m.head(h[:, 0])


def grokker(m, x):
    """One-layer transformer of modular addition: bare parameters, no biases, no normalisation."""
    h = m.embed(x) + m.position
    q, k, v = (torch.einsum("hde,nte->nhtd", w, h) for w in (m.q, m.k, m.v))
    h = h + (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2) @ m.o
    return (h + torch.relu(h @ m.up) @ m.down)[:, -1] @ m.unembed


NETWORKS = {
    "residual net": Case(
        lambda: Sequential(
            Conv2d(1, 2, 3, padding=1), Block(2, 2, 1), Block(2, 3, 2), nn.AdaptiveAvgPool2d(1), Flatten(), Linear(3, 3)
        ),
        (1, 4, 4),
    ),
    "vision transformer": Case(
        lambda: Net(
            vit,
            patch=Conv2d(1, 4, 2, 2),
            token=(1, 1, 4),
            position=(5, 4),
            block=nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True, norm_first=True),
            norm=nn.LayerNorm(4),
            head=Linear(4, 3),
        ),
        (1, 4, 4),
        ("token", "position"),
    ),
    "separable convolutions": Case(
        lambda: Sequential(
            Conv2d(1, 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2),
            nn.ReLU6(),
            Conv2d(2, 2, 3, 1, 1, groups=2, bias=False),
            nn.BatchNorm2d(2),
            nn.Hardswish(),
            Conv2d(2, 3, 1),
            nn.AvgPool2d(2),
            nn.Dropout(0.5),
            Flatten(),
            Linear(3, 3),
        ),
        (1, 4, 4),
    ),
    "modular addition transformer": Case(
        lambda: Net(
            grokker,
            embed=nn.Embedding(4, 4),
            position=(3, 4),
            q=(2, 2, 4),
            k=(2, 2, 4),
            v=(2, 2, 4),
            o=(4, 4),
            up=(4, 5),
            down=(5, 4),
            unembed=(4, 4),
        ),
        (3,),
        ("position", "q", "k", "v"),
        tokens=4,
    ),
    "modules in a dict": Case(
        lambda: Net(
            lambda m, x: sum(part(x).tanh() for part in m.parts.values()),
            parts=nn.ModuleDict({"a": Linear(4, 3), "b": Linear(4, 3)}),
        ),
        (4,),
    ),
    "parameters in a list": Case(
        lambda: Net(lambda m, x: (x @ m.ws[0]).tanh() @ m.ws[1], ws=nn.ParameterList([torch.zeros(4, 5), torch.zeros(5, 3)])), (4,)
    ),
}
