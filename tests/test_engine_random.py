"""Networks drawn at random from everything that has a rule, against gradients by definition."""

import math

import pytest
import torch
from engine_case import Case, assert_kernel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import reduce_by_definition
from torch import nn

from ntklib.estimators import ntk_trace
from ntklib.kernels import empirical_ntk, evaluate, ntk_by_layer, ntk_diagonal
from ntklib.kernels.evaluate import Request, prepared
from ntklib.kernels.plan import Plan
from ntklib.kernels.streaming import Structured

ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.Identity, lambda: nn.LeakyReLU(0.1, inplace=True))
drawn = settings(derandomize=True, deadline=None, database=None, max_examples=30, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, about the model


@st.composite
def convolutional(draw) -> tuple[list[nn.Module], tuple[int, ...]]:
    """Convolutions and normalisations of one, two or three axes, then a head."""
    dims = draw(st.integers(1, 3))
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    size = draw(st.integers(3, 6 - dims))
    channels = draw(st.integers(1, 3))
    shape, layers = (channels, *[size] * dims), []
    space = [size] * dims
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        out = groups * draw(st.integers(1, 2))
        kernel = [draw(st.integers(1, min(3, s))) for s in space]
        same = draw(st.booleans())
        stride = [1 if same else draw(st.integers(1, 3)) for _ in space]
        dilation = [draw(st.integers(1, 2)) if (k - 1) * 2 < s else 1 for k, s in zip(kernel, space, strict=True)]
        padding = "same" if same else [draw(st.integers(0, k - 1)) for k in kernel]
        mode = draw(st.sampled_from(["zeros", "circular", "replicate"] if dims < 3 else ["zeros", "circular"]))
        options = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans()), "padding_mode": mode}
        layers.append(convolution(channels, out, kernel, stride, padding, **options))
        channels = out
        if not same:
            reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
            space = [(s + 2 * p - r) // t + 1 for s, p, r, t in zip(space, padding, reach, stride, strict=True)]
        layers += draw(normalisation(dims, channels, space))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
    layers.append(nn.Flatten())
    numbers = channels * math.prod(space)
    if numbers > 4 or draw(st.booleans()):
        layers.append(nn.Linear(numbers, draw(st.integers(1, 4)), bias=draw(st.booleans())))
    return layers, shape


@st.composite
def normalisation(draw, dims: int, channels: int, space: list[int]) -> list[nn.Module]:
    kind = draw(st.sampled_from(["none", "batch", "group", "layer", "instance", "rms"]))
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    affine = draw(st.booleans())
    if kind in ("instance", "group") and math.prod(space) == 1:
        return []  # torch refuses to normalise a single number
    made = {
        "batch": lambda: batch(channels, affine=affine),
        "instance": lambda: instance(channels, eps=0.1, affine=affine, track_running_stats=draw(st.booleans())),
        "group": lambda: nn.GroupNorm(1 if channels % 2 else 2, channels, eps=0.1, affine=affine),
        "layer": lambda: nn.LayerNorm(space[-1:], eps=0.1, elementwise_affine=affine),
        "rms": lambda: nn.RMSNorm([channels, *space], eps=0.1, elementwise_affine=affine),
    }
    return [made[kind]()] if kind in made else []


@st.composite
def sequential(draw) -> tuple[list[nn.Module], tuple[int, ...]]:
    """Linear layers and normalisations on vectors, sequences or grids, then a head."""
    lead = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    d = draw(st.integers(1, 4))
    shape, layers = (*lead, d), []
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.integers(2, 4))
        layers.append(nn.Linear(d, out, bias=draw(st.booleans())))
        d = out
        made = [nn.LayerNorm(d, eps=0.1), nn.LayerNorm(d, eps=0.1, bias=False), nn.RMSNorm(d, eps=0.1), nn.Identity()]
        layers += [draw(st.sampled_from(made)), draw(st.sampled_from(ACTIVATIONS))()]
        if len(lead) == 1 and draw(st.booleans()):
            layers.append(nn.TransformerEncoderLayer(d, 1, 3, batch_first=True, norm_first=draw(st.booleans())))
    layers += [nn.Flatten(), nn.Linear(d * math.prod(lead), draw(st.integers(1, 4)))]
    return layers, shape


@st.composite
def tokens(draw) -> tuple[list[nn.Module], tuple[int, ...]]:
    padding = draw(st.sampled_from([None, 0, 2, -1]))
    length, d = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    layers = [nn.Embedding(4, d, padding_idx=padding), nn.Linear(d, 3), draw(st.sampled_from(ACTIVATIONS))(), nn.Flatten()]
    return [*layers, nn.Linear(3 * length, draw(st.integers(1, 3)))], (length,)


@st.composite
def cases(draw) -> tuple[Case, int, int]:
    kind = draw(st.sampled_from([convolutional, convolutional, sequential, tokens]))
    layers, shape = draw(kind())
    model = nn.Sequential(*layers)
    for _, w in model.named_parameters():
        w.requires_grad_(draw(st.integers(0, 4)) > 0)
    if not any(w.requires_grad for w in model.parameters()):
        next(model.parameters()).requires_grad_(True)
    case = Case(lambda: model, shape, tokens=4 if kind is tokens else 0)
    return case, draw(st.integers(1, 4)), draw(st.integers(1, 3))


OPTIONS = st.fixed_dictionaries(
    {}, optional={"chunk_size": st.integers(1, 3), "method": st.sampled_from(["structured", "jacobian"])}
)


@drawn
@given(cases(), st.sampled_from([None, "trace", "diagonal"]), OPTIONS)
def test_the_kernel_of_a_random_network_holds_the_inner_products_of_its_gradients(drawing, reduce, options):
    case, n1, n2 = drawing
    t = case.truth(n1, n2)
    assert_kernel(empirical_ntk(t.model, t.x1, reduce=reduce, **options), reduce_by_definition(t.kernel(), reduce))
    cross = empirical_ntk(t.model, t.x1, t.x2, reduce=reduce, **options)
    scale = float(t.kernel(cross=True).abs().max())
    assert_kernel(cross, reduce_by_definition(t.kernel(cross=True), reduce), scale)


@drawn
@given(cases(), st.integers(1, 3), st.integers(1, 3))
def test_a_random_network_is_streamed_layer_by_layer_and_in_any_tiles(drawing, examples, outputs):
    case, n1, _ = drawing
    t = case.truth(n1, 1)
    with prepared(Request(t.model, t.x1, None, None)) as (program, _, _):
        assert isinstance(program, Structured)
        assert not program.leaves
    whole = t.kernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_plan", lambda *_args, **_options: Plan(examples, outputs, needed=0))
        assert_kernel(empirical_ntk(t.model, t.x1), whole)
        assert_kernel(ntk_diagonal(t.model, t.x1), torch.stack([whole[i, i] for i in range(n1)]))
        layers = ntk_by_layer(t.model, t.x1, reduce="trace")
    assert_kernel(torch.stack(list(layers.values())).sum(0), reduce_by_definition(whole, "trace"))
    squares = sum(float(g.square().sum()) for g in t.gradients1.values())
    assert ntk_trace(t.model, t.x1, normalize=False).mean == pytest.approx(squares, rel=1e-12)  # reordered sum
