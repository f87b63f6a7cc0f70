"""Operations without parameters, between two layers: gradients must pass through whatever torch's batching rules make of them."""

import math

import torch
import torch.nn.functional as F
from engine_case import Case, Net
from torch import Tensor
from torch.nn import Conv2d, Linear


def pairs(h: Tensor) -> Tensor:
    return h.view(-1, 2, 2)


def positive_definite(h: Tensor) -> Tensor:
    return pairs(h) @ pairs(h).mT + torch.diag(torch.tensor([1.0, 2.0])).to(h)


def set_entry(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = 2 * h[:, 1]
    return h


def ramp(h: Tensor, *shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape).to(h)


VECTORS = {  # on [n, 4]
    "frozen prelu": lambda h: F.prelu(h, torch.full((4,), 0.3).to(h)),
    "one frozen slope": lambda h: F.prelu(h, torch.full((1,), 0.3).to(h)),
    "glu": lambda h: F.glu(torch.cat([h, h.tanh()], 1)),
    "softplus": F.softplus,
    "hard activations": lambda h: F.hardswish(h) + F.hardtanh(h) + F.hardsigmoid(h) + F.softshrink(h),
    "smooth activations": lambda h: F.silu(h) + F.mish(h) + F.celu(h) + F.selu(h) + F.logsigmoid(h),
    "softmax": lambda h: h.softmax(1) + h.log_softmax(-1) - h.logsumexp(1, keepdim=True),
    "normalize": lambda h: F.normalize(h) + h / h.std(1, keepdim=True) + h / h.norm(dim=1, keepdim=True),
    "cumulative": lambda h: h.cumsum(1) + h.cumprod(1) + h.logcumsumexp(1),
    "sort": lambda h: h.sort(1)[0] * ramp(h, 4),
    "top and middle": lambda h: h.topk(4, 1)[0] * ramp(h, 4) + h.amax(1, keepdim=True) - h.median(1, keepdim=True)[0],
    "gather": lambda h: h.gather(1, h.argsort(1)).tanh() + h[:, [3, 1, 2, 2]] * h.index_select(1, torch.tensor([0, 0, 1, 2])),
    "masks": lambda h: torch.where(h > 0, h, h.sin()).masked_fill(h > 0.5, 0.0) + h.clamp(-0.5, 0.5),
    "scatter": lambda h: torch.zeros_like(h).scatter_add(1, torch.tensor([[0, 0, 1, 3]]).expand(len(h), -1), h.sin()),
    "set entry": set_entry,
    "flip and roll": lambda h: h.flip(1).roll(1, 1) * h,
    "distances": lambda h: torch.cdist(pairs(h), pairs(h).sin() + 1).flatten(1),
    "products": lambda h: torch.bmm(pairs(h), pairs(h)).flatten(1) + torch.einsum("nij,nkj->nik", pairs(h), pairs(h)).flatten(1),
    "similarity": lambda h: h * F.cosine_similarity(h, h.sin() + 1, dim=1)[:, None],
    "inverse": lambda h: torch.linalg.inv(pairs(h) + 3 * torch.eye(2).to(h)).flatten(1),
    "solve": lambda h: torch.linalg.solve(pairs(h) + 3 * torch.eye(2).to(h), h[:, :2]).repeat(1, 2),
    "determinant": lambda h: h * torch.linalg.det(pairs(h))[:, None],
    "cholesky": lambda h: torch.linalg.cholesky(positive_definite(h)).flatten(1),
    "eigenvalues": lambda h: torch.linalg.eigvalsh(positive_definite(h)).repeat(1, 2),
    "qr": lambda h: torch.linalg.qr(pairs(h))[1].flatten(1),
    "matrix exponential": lambda h: torch.matrix_exp(pairs(h)).flatten(1),
    "fft": lambda h: torch.fft.fft(h).real + torch.fft.irfft(torch.fft.rfft(h) * 1j),
    "complex numbers": lambda h: torch.view_as_complex(pairs(h).contiguous()).abs().repeat(1, 2),
    "powers": lambda h: h.abs() ** h + torch.atan2(h, h.flip(1)),
    "constant norms": lambda h: F.layer_norm(h, (4,), ramp(h, 4), ramp(h, 4)) + F.group_norm(h, 2, ramp(h, 4)),
    "attention": lambda h: F.scaled_dot_product_attention(*[h.view(-1, 1, 2, 2)] * 3).flatten(1),
    "constant bilinear": lambda h: F.bilinear(h, h, ramp(h, 4, 4, 4)),
    "losses": lambda h: h * F.cross_entropy(h, torch.ones(len(h), dtype=torch.long), reduction="none")[:, None],
    "quantile": lambda h: h - torch.quantile(h, 0.3, dim=1, keepdim=True),
}
IMAGES = {  # on [n, 2, 4, 4]
    "max pooling": lambda h: F.max_pool2d(h, 3, 1, 1) + F.adaptive_max_pool2d(h, 4),
    "average pooling": lambda h: F.avg_pool2d(h, 3, 2, 1).repeat(1, 1, 2, 2) + F.adaptive_avg_pool2d(h, 4),
    "unpooling": lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
    "nearest": lambda h: F.interpolate(F.interpolate(h, scale_factor=2), size=(4, 4), mode="area"),
    "bilinear": lambda h: (
        F.interpolate(h, size=(4, 4), mode="bilinear", antialias=True) + F.interpolate(h, size=(4, 4), mode="bicubic")
    ),
    "pixel shuffle": lambda h: F.pixel_shuffle(F.pixel_unshuffle(h, 2), 2) + F.channel_shuffle(h, 2),
    "unfold and fold": lambda h: F.fold(F.unfold(h, 2, stride=1), (4, 4), 2),
    "grid sample": lambda h: F.grid_sample(h, ramp(h, 1, 4, 4, 2).expand(len(h), -1, -1, -1), align_corners=False),
    "local response": lambda h: F.local_response_norm(h, 2),
    "padding": lambda h: F.pad(h, (1, -1, 2, -2)) + F.pad(h, (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1],
    "instance statistics": lambda h: F.instance_norm(h),
    "constant convolutions": lambda h: F.conv2d(h, ramp(h, 2, 2, 3, 3), padding=1) + F.conv_transpose2d(h, ramp(h, 2, 2, 1, 1)),
    "constant batch norm": lambda h: F.batch_norm(h, ramp(h, 2), ramp(h, 2) + 2, ramp(h, 2)),
    "frozen prelu of channels": lambda h: F.prelu(h, torch.tensor([0.2, 0.4]).to(h)),
    "channel attention": lambda h: torch.einsum("nchw,ndhw->ncd", h, h).softmax(-1).sum(2)[..., None, None] * h,
    "cross product": lambda h: F.pad(torch.linalg.cross(h[..., :3], h[..., 1:]), (0, 1)),
    "fft of images": lambda h: torch.fft.fft2(h).abs(),
}


def between_linear(operation) -> Case:
    return Case(lambda: Net(lambda m, x: m.b(operation(m.a(x))), a=Linear(3, 4), b=Linear(4, 3)), (3,))


def between_convolution_and_linear(operation) -> Case:
    return Case(
        lambda: Net(lambda m, x: m.b(operation(m.a(x)).flatten(1)), a=Conv2d(1, 2, 3, padding=1), b=Linear(32, 3)), (1, 4, 4)
    )


OPERATIONS = {
    **{name: between_linear(operation) for name, operation in VECTORS.items()},
    **{name: between_convolution_and_linear(operation) for name, operation in IMAGES.items()},
}
