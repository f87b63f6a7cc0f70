"""One training step of the modular-addition transformer, ours against the way it is usually written.

``python -m benchmarks.transformer_step`` prints both, with the agreement of their losses. Both start from the same weights, take
the same full-batch AdamW steps in turn on one thread, and differ in the order of their sums alone:

====== ============================================================== =====================================================
part   usual                                                          ours
====== ============================================================== =====================================================
net    every position, every head by einsum, one-hot or index lookup   last position, tables of p rows, products of weights
loss   log-softmax in float64                                         the same number from float32 (``precise_cross_entropy``)
step   ``torch.optim.AdamW`` as it comes                              the same, fused
====== ============================================================== =====================================================
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntklib import provenance
from ntklib.data import modular_addition
from ntklib.models import ModularTransformer
from ntklib.training import full_batch_adamw

Step = Callable[[], float]  # takes one step and returns the loss before it


class Eager(nn.Module):
    """The transformer written out for all positions and all heads, with the weights of a ``ModularTransformer``."""

    def __init__(self, ours: ModularTransformer) -> None:
        super().__init__()
        heads = lambda w: nn.Parameter(w.detach().clone().unflatten(0, (ours.heads, -1)))  # noqa: E731 [k, d/k, d]
        own = lambda w: nn.Parameter(w.detach().clone())  # noqa: E731
        self.w_e, self.w_pos, self.w_u = own(ours.embed.weight), own(ours.position), own(ours.unembed.weight)
        self.w_q, self.w_k, self.w_v = (heads(layer.weight) for layer in (ours.query, ours.key, ours.value))
        self.w_o = own(ours.project.weight)
        self.w_in, self.b_in = own(ours.inner.weight), own(ours.inner.bias)
        self.w_out, self.b_out = own(ours.outer.weight), own(ours.outer.bias)
        self.register_buffer("mask", torch.tril(torch.ones(3, 3)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.w_e[tokens] + self.w_pos  # [n, 3, d]
        q, k, v = (torch.einsum("khd,bpd->bkph", w, x) for w in (self.w_q, self.w_k, self.w_v))
        scores = torch.einsum("bkph,bkqh->bkqp", k, q)
        masked = torch.tril(scores) - 1e10 * (1 - self.mask)
        pattern = F.softmax(masked / math.sqrt(q.shape[-1]), dim=-1)
        z = torch.einsum("bkph,bkqp->bkqh", v, pattern)
        flat = z.transpose(1, 2).flatten(2)  # [n, 3, d]
        x = x + torch.einsum("df,bqf->bqd", self.w_o, flat)
        hidden = F.relu(torch.einsum("md,bpd->bpm", self.w_in, x) + self.b_in)
        x = x + torch.einsum("dm,bpm->bpd", self.w_out, hidden) + self.b_out
        return x @ self.w_u.T


def eager_steps(model: Eager, tokens: Tensor, y: Tensor, lr: float, weight_decay: float) -> Step:
    """Return the usual training step: all positions, loss in float64, AdamW as it comes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 10, 1))

    def step() -> float:
        logits = model(tokens)[:, -1]
        log_probabilities = F.log_softmax(logits.to(torch.float64), dim=-1)
        loss = -log_probabilities.gather(1, y[:, None]).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def our_steps(model: ModularTransformer, pairs: Tensor, y: Tensor, lr: float, weight_decay: float) -> Step:
    """Return our training step, from the loop that the chapter uses."""
    states = full_batch_adamw(model, pairs, y, lr=lr, weight_decay=weight_decay, steps=10**9, forward=model.folded)
    return lambda: next(states).loss  # the generator takes the step when it is resumed: between yields lies one whole step


@dataclass(frozen=True)
class Comparison:
    """What was found at one size.

    Attributes:
        p: Modulus.
        n: Training pairs.
        width: Dimension of the residual stream.
        hidden: Units of the perceptron.
        ours: Median CPU seconds of our step over rounds.
        eager: The same of the usual step.
        ratio: Median over rounds of the quotient of the two.
        spread: Smallest and largest quotient.
        disagreement: Largest relative difference of the losses of all steps, in float32.
        disagreement64: The same over the first ``CHECKED`` steps in float64, where only a different function would show.
    """

    p: int
    n: int
    width: int
    hidden: int
    ours: float
    eager: float
    ratio: float
    spread: tuple[float, float]
    disagreement: float
    disagreement64: float


def runners(p: int, fraction: float, hidden: int, width: int, dtype: torch.dtype) -> dict[str, Step]:
    """Both ways of training, from the same weights on the same pairs."""
    data = modular_addition(p, fraction)
    y, tokens = data.sums(data.train), data.tokens(data.train)
    ours = ModularTransformer(p=p, width=width, heads=4, hidden=hidden).to(dtype)
    usual = Eager(copy.deepcopy(ours)).to(dtype)
    return {"ours": our_steps(ours, data.train, y, 1e-3, 1.0), "eager": eager_steps(usual, tokens, y, 1e-3, 1.0)}


def disagreement(losses: dict[str, list[float]]) -> float:
    """Largest relative difference of the losses of the same steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["eager"], strict=True))


def compare(p: int, fraction: float, hidden: int, *, width: int = 128, rounds: int = 7, steps: int = 20) -> Comparison:
    """Take the same training steps both ways, in turn, and time each block of ``steps`` in CPU seconds of one thread."""
    racing = runners(p, fraction, hidden, width, torch.float32)
    seconds: dict[str, list[float]] = {name: [] for name in racing}
    losses: dict[str, list[float]] = {name: [] for name in racing}
    for _ in range(rounds + 1):
        for name, step in racing.items():
            start = time.process_time()
            losses[name] += [step() for _ in range(steps)]
            seconds[name].append((time.process_time() - start) / steps)
    a, b = (seconds[name][1:] for name in ("ours", "eager"))  # the first round is a warm-up
    ratios = [usual / own for own, usual in zip(a, b, strict=True)]
    precise = {k: [step() for _ in range(CHECKED)] for k, step in runners(p, fraction, hidden, width, torch.float64).items()}
    return Comparison(
        p, int(fraction * p * p), width, hidden, median(a), median(b), median(ratios), (min(ratios), max(ratios)),
        disagreement(losses), disagreement(precise),
    )  # fmt: skip


CHECKED = 20  # steps in float64
SIZES = {"chapter": (37, 0.45, 256), "paper": (113, 0.3, 512)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", type=click.Choice([*SIZES, "all"]), default="all", show_default=True, help="Of task and network.")
@click.option("--rounds", default=7, show_default=True, help="Measured rounds.")
@click.option("--steps", default=20, show_default=True, help="Steps per block.")
@click.option("--quick", is_flag=True, help="A tiny task: shows that it runs, says nothing on speed.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the results here.")
def main(size: str, rounds: int, steps: int, quick: bool, path: Path | None) -> None:
    """Time a training step of the modular-addition transformer, ours and the usual one, in turn on one thread."""
    torch.set_num_threads(1)
    chosen = {"quick": (7, 0.5, 16)} if quick else SIZES if size == "all" else {size: SIZES[size]}
    found = {}
    for name, (p, fraction, hidden) in chosen.items():
        c = found[name] = compare(p, fraction, hidden, rounds=rounds, steps=steps)
        click.echo(
            f"{name}: p = {c.p}, {c.n} pairs, d = {c.width}, m = {c.hidden}: usual {1e3 * c.eager:.2f} ms, ours "
            f"{1e3 * c.ours:.2f} ms, {c.ratio:.2f} times faster ({c.spread[0]:.2f} to {c.spread[1]:.2f}); losses agree to "
            f"{c.disagreement:.1e} (float64: {c.disagreement64:.1e})"
        )
    if path is not None:
        about = {"written": provenance.utc_now(), "git": provenance.git_state(), "machine": provenance.machine("cpu")}
        path.write_text(json.dumps(about | {k: asdict(c) for k, c in found.items()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
