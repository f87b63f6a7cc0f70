"""Laws of networks, initialization and calibration."""

import math

import pytest
import torch
import torchvision
from reference import assert_sample_mean, ntk_by_definition
from torch import nn

from ntklib import empirical_ntk
from ntklib.models import (
    LAYERS,
    MLP,
    NAMES,
    VGG,
    ResNet,
    ViT,
    WideResNet,
    build,
    calibrate_batch_norm,
    check_name,
    initialize,
    recalibrated,
)
from ntklib.random import stream


def make(name: str, *, width: int = 4, init: str = "standard", seed: int = 0) -> nn.Module:
    return build(name, input_shape=(3, 32, 32), num_classes=10, width=width, init=init, seed=seed)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, "data"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet50", 23_520_842), ("resnet101", 42_512_970)]
)
def test_residual_networks_have_the_standard_number_of_parameters(name, count):
    with torch.device("meta"):
        model = ResNet(name, in_channels=3, num_classes=10, width=64)
    assert sum(w.numel() for w in model.parameters()) == count


@pytest.mark.parametrize(("name", "count"), [("wrn28_2", 1_467_610), ("wrn16_2", 691_674), ("wrn10_2", 303_706)])
def test_wide_networks_have_the_number_of_parameters_of_public_code(name, count):
    with torch.device("meta"):
        model = WideResNet(name, in_channels=3, num_classes=10, width=32)
    assert sum(w.numel() for w in model.parameters()) == count


def test_a_wide_network_is_normalisations_leaky_rectifiers_and_convolutions_by_hand():
    model, h = make("wrn10_2").double().eval(), normal(2, 3, 8, 8)
    conv = torch.nn.functional.conv2d
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, generator=stream(1, "w"))
            m.running_mean.normal_(generator=stream(2, "w"))
    a = lambda z, m: (lambda u: torch.where(u > 0, u, 0.1 * u))(  # noqa: E731
        (z - m.running_mean[:, None, None]) / (m.running_var[:, None, None] + m.eps).sqrt() * m.weight[:, None, None]
        + m.bias[:, None, None]
    )
    x = h
    h = conv(h, model.stem.weight, padding=1)
    for k, block in enumerate((model.stage1[0], model.stage2[0], model.stage3[0])):
        stride = 1 if k == 0 else 2
        inner = a(h, block.norm1)
        start = inner if k == 0 else h
        inner = conv(a(conv(inner, block.conv1.weight, stride=stride, padding=1), block.norm2), block.conv2.weight, padding=1)
        h = inner + conv(start, block.shortcut.weight, stride=stride)
    expected = a(h, model.norm).mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)  # reordered sums
    assert len(model.stage1) == 1
    assert [len(s) for s in (make("wrn28_2").stage1, make("wrn16_2").stage3)] == [4, 2]
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


def test_the_kernel_of_a_wide_network_is_that_of_the_definition():
    model = build("wrn10_2", input_shape=(1, 5, 5), num_classes=2, width=2).double()
    x = normal(3, 1, 5, 5)
    calibrate_batch_norm(model, x).eval()
    torch.testing.assert_close(empirical_ntk(model, x), ntk_by_definition(model, x, x), rtol=1e-10, atol=1e-12)


def test_the_small_residual_network_has_a_quarter_of_a_million_parameters():
    count = sum(w.numel() for w in make("resnet20", width=16).parameters())
    # 0.27 M in He et al. 2016, Table 6; two convolutions with normalisation as shortcuts
    assert count == 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_maps_images_to_outputs(name):
    out = make(name).eval()(torch.ones(2, 3, 32, 32))
    assert out.shape == (2, 10)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_residual_networks_halve_the_image_at_every_stage_but_the_first(name):
    model, sizes = make(name).eval(), []
    stages = [getattr(model, f"layer{number}") for number in range(1, 1 + len(LAYERS[name]))]
    for stage in (model.stem, *stages):
        stage.register_forward_hook(lambda _module, _inputs, out: sizes.append(tuple(out.shape[2:])))
    model(torch.ones(1, 3, 32, 32))
    assert sizes == [(32, 32), (32, 32), (16, 16), (8, 8), (4, 4)][: 1 + len(stages)]


def test_a_residual_block_adds_its_input():
    model = make("resnet18").eval()
    block, x = model.layer1[0], torch.rand(2, 4, 6, 6)
    nn.init.zeros_(block.body[-1].weight)
    assert torch.equal(block(x), x)  # g = 0 and x >= 0


def test_a_strided_block_adds_a_strided_convolution_of_its_input():
    block = ResNet("resnet18", in_channels=3, num_classes=2, width=4).double().eval().layer2[0]
    x = torch.randn(5, 4, 7, 8, generator=stream(0, "x"), dtype=torch.float64)
    conv, norm = block.shortcut
    expected = torch.relu(block.body(x) + norm(torch.conv2d(x, conv.weight, stride=2)))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)  # reordered sums


@pytest.mark.parametrize("name", LAYERS)
def test_no_convolution_of_single_pixels_has_a_stride(name):
    """Its backward pass in float32 on narrow layers crashes on processors without AVX-512."""
    layers = [m for m in ResNet(name, in_channels=3, num_classes=2, width=4).modules() if isinstance(m, nn.Conv2d)]
    assert not [m for m in layers if m.kernel_size == (1, 1) and m.stride != (1, 1)]


@pytest.mark.parametrize(
    ("activation", "by_hand"), [("relu", lambda z: z.clamp(min=0)), ("tanh", torch.tanh), ("identity", lambda z: z)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_perceptron_is_products_and_activations(activation, by_hand, bias):
    model, z = MLP(6, [4, 5], 3, activation=activation, bias=bias).double(), normal(7, 2, 3)
    out = model(z)
    h = z.reshape(7, 6)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [m.bias is not None for m in layers] == [bias] * 3
    for k, layer in enumerate(layers):
        h = h @ layer.weight.T + (layer.bias if bias else 0)
        h = by_hand(h) if k < 2 else h
    torch.testing.assert_close(out, h, rtol=1e-12, atol=1e-12)  # reordered sums


@pytest.mark.parametrize("name", ["vgg11", "vgg16"])
def test_plain_networks_have_the_convolutions_of_torchvision(name):
    with torch.device("meta"):
        ours, theirs = VGG(name, in_channels=3, num_classes=10, width=64), getattr(torchvision.models, f"{name}_bn")().features
    sizes = [[(m.in_channels, m.out_channels) for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, theirs)]
    kinds = [[type(m) for m in net.modules() if not list(m.children())] for net in (ours.stages, theirs)]
    assert sizes[0] == sizes[1]
    assert kinds[0] == kinds[1]


def test_the_plain_network_is_convolutions_rectifiers_maxima_and_a_mean():
    model, x = make("cnn").double(), normal(2, 3, 32, 32)
    h = x
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        windows = nn.functional.unfold(h, 3, padding=1)  # [n, channels 9, positions]
        h = (layer.weight.flatten(1) @ windows + layer.bias[:, None]).clamp(min=0).unflatten(2, h.shape[2:])
        h = torch.stack([h[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
    expected = h.flatten(2).sum(2) / 16 @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)  # reordered sums


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (2, 9, 13)])
def test_small_and_uneven_images_pass(name, shape):
    model = build(name, input_shape=shape, num_classes=3, width=4).eval()
    assert model(torch.ones(2, *shape)).isfinite().all()


def attention_by_loops(block: nn.Module, x: torch.Tensor, heads: int = 4) -> torch.Tensor:
    """Weighted means of values, token by token and head by head."""
    tokens, width = x.shape
    q, k, v = (x @ block.query_key_value.weight.T + block.query_key_value.bias).split(width, dim=1)
    out, size = torch.zeros_like(x), width // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(tokens):
            scores = torch.stack([q[i, part] @ k[j, part] / math.sqrt(size) for j in range(tokens)])
            weights = scores.exp() / scores.exp().sum()
            out[i, part] = sum(w * v[j, part] for j, w in enumerate(weights))
    return out @ block.project.weight.T + block.project.bias


def test_attention_is_weighted_means_by_loops():
    attention = make("vit", width=8).double().blocks[1].attention
    x = normal(2, 5, 8)
    expected = torch.stack([attention_by_loops(attention, row) for row in x])
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)  # reordered sums


def test_the_transformer_reads_a_token_that_has_seen_every_patch():
    model = make("vit", width=8).double().eval()
    x = normal(1, 3, 32, 32).requires_grad_()
    assert model.position.shape == (1, 65, 8)  # 8 x 8 patches of 4 pixels and the class token
    (gradient,) = torch.autograd.grad(model(x)[0, 0], x)
    patches = gradient.unflatten(3, (8, 4)).unflatten(2, (8, 4)).abs().amax((0, 1, 3, 5))
    assert (patches > 0).all()


def test_a_transformer_whose_blocks_add_nothing_does_not_see_the_image():
    model = make("vit", width=8).double().eval()
    for block in model.blocks:
        for layer in (block.attention.project, block.mlp[2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    token = model.norm(model.token[0] + model.position[0, :1])
    expected = (token @ model.head.weight.T + model.head.bias).expand(2, -1)
    torch.testing.assert_close(model(normal(2, 3, 32, 32)), expected, rtol=1e-12, atol=1e-12)


def test_parameters_of_no_layer_are_small_normals():
    draws = ViT(input_shape=(1, 28, 28), num_classes=2, width=2000)
    initialize(draws, "he", stream(0, "init"))
    assert_sample_mean(draws.position.detach().double().square(), 0.02**2)
    assert draws.token.abs().max() > 0.02


# fan_in = 300 and 900, fan_out = 420 and 1350: more than 1e5 weights each, so that the standard error is under 0.5 %
WIDE = {"linear": lambda: nn.Linear(300, 420), "conv": lambda: nn.Conv2d(100, 150, 3)}
FANS = {"linear": (300, 420), "conv": (900, 1350)}
VARIANCES = {
    "standard": lambda fan_in, _: 1 / (3 * fan_in),
    "he": lambda fan_in, _: 2 / fan_in,
    "xavier": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
}
WEIGHTS = [(kind, scheme, VARIANCES[scheme](*FANS[kind])) for kind in WIDE for scheme in VARIANCES]
WEIGHTS += [("linear", "kaiming", 1 / 900), ("conv", "kaiming", 2 / 1350)]  # the linear layer as in "standard"


@pytest.mark.parametrize(("kind", "scheme", "variance"), WEIGHTS)
def test_weights_have_the_variance_of_the_scheme(kind, scheme, variance):
    w = initialize(WIDE[kind](), scheme, stream(0, "init")).weight.detach()
    assert_sample_mean(w.double().square(), variance)
    assert abs(float(w.mean())) < 4 * math.sqrt(variance / w.numel())
    uniform = scheme in ("standard", "xavier") or (scheme, kind) == ("kaiming", "linear")
    assert (float(w.abs().max()) <= math.sqrt(3 * variance) * (1 + 1e-6)) == uniform  # float32; normals of this number go beyond


def test_standard_biases_have_the_variance_of_the_weights():
    assert_sample_mean(initialize(nn.Linear(2, 100_000), "standard", stream(0, "init")).bias.detach().square(), 1 / 6)


@pytest.mark.parametrize("scheme", ["he", "kaiming", "xavier", "orthogonal"])
def test_other_biases_are_zero(scheme):
    layer = nn.Conv2d(3, 4, 3)  # for linear layers kaiming is standard
    assert not initialize(layer, scheme, stream(0, "init")).bias.any()


@pytest.mark.parametrize("layer", [nn.Linear(7, 4), nn.Linear(4, 7), nn.Conv2d(3, 8, 3), nn.Conv2d(2, 40, 3)])
def test_orthogonal_weights_have_orthonormal_rows_or_columns(layer):
    w = initialize(layer, "orthogonal", stream(0, "init")).weight.detach().flatten(1)
    gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3)])
def test_initialization_makes_normalisation_layers_the_identity_map(norm):
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    initialize(norm, "he", stream(0, "init"))
    assert torch.equal(norm.weight, torch.ones(3))
    assert torch.equal(norm.bias, torch.zeros(3))


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet18", "resnet50", "vit"])
@pytest.mark.parametrize("init", ["standard", "he", "orthogonal"])
def test_the_seed_alone_decides_the_weights(name, init):
    state = torch.get_rng_state()
    first, again, other = (make(name, init=init, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was not touched
    assert all(torch.equal(again[k], w) for k, w in first.items())
    assert all(not torch.equal(other[k], w) for k, w in first.items() if w.ndim > 1)


@pytest.mark.parametrize("n", [16, 50])
def test_after_calibration_on_one_batch_eval_mode_normalises_by_its_statistics(n):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double(), 3 + 2 * normal(n, 4)
    nn.init.normal_(model[1].weight)
    calibrate_batch_norm(model, x, batch_size=64).eval()
    h = model[0](x)
    # eval mode divides by the running variance, which PyTorch takes with n - 1; training mode divides by the one with n
    mean = sum(h) / n
    variance = sum((row - mean) ** 2 for row in h) / (n - 1)
    by_hand = model[2]((h - mean) / (variance + model[1].eps).sqrt() * model[1].weight + model[1].bias)
    torch.testing.assert_close(model(x), by_hand, rtol=1e-12, atol=1e-12)  # reordered sums


def test_statistics_are_averages_over_full_batches_with_all_layers_normalising_by_the_batch():
    norms = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)).double()
    x = normal(10, 3)
    calibrate_batch_norm(norms, x, batch_size=4)
    expected = []
    for batch in (x[:4], x[4:8]):  # the last two examples are left out
        inner = torch.tanh((batch - batch.mean(0)) / (batch.var(0, correction=0) + norms[0].eps).sqrt())
        expected.append(torch.stack([batch.mean(0), batch.var(0), inner.mean(0), inner.var(0)]))
    got = torch.stack([v for m in (norms[0], norms[2]) for v in (m.running_mean, m.running_var)])
    torch.testing.assert_close(got, (expected[0] + expected[1]) / 2, rtol=1e-12, atol=1e-12)  # reordered sums


@pytest.mark.parametrize("training", [True, False])
def test_calibration_forgets_old_statistics_and_restores_modes_and_momentum(training):
    x, model = normal(8, 3), nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm1d(3)).double()
    model.train(training)[2].eval()
    first = {k: v.clone() for k, v in calibrate_batch_norm(model, x).state_dict().items()}
    model[0].running_mean += 5
    model[2].running_var *= 7
    calibrate_batch_norm(model, x)
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == [training, training, training, False]
    assert [m.momentum for m in (model[0], model[2])] == [0.3, 0.1]


def test_a_recalibrated_copy_is_the_calibrated_model_and_the_model_stays():
    model, x = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double(), normal(8, 3)
    copy = recalibrated(model, x)
    assert model.training
    assert not model[0].running_mean.any()
    assert torch.equal(copy(x), calibrate_batch_norm(model, x).eval()(x))


def test_calibration_changes_nothing_without_batch_normalisation():
    model = MLP(3, [4], 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert calibrate_batch_norm(model, torch.ones(4, 3)) is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_name("resnet19"), "Unknown model 'resnet19'. Did you mean 'resnet1"),
        (lambda: make("mpl"), "Unknown model 'mpl'. Did you mean 'mlp'.*Known: cnn, mlp, resnet101"),
        (lambda: make("wrn28_2", width=5), "width of wrn28_2 must be a multiple of its widening factor 2. Got 5"),
        (lambda: make("vit", width=6), "width of vit must be a multiple of its 4 heads. Got 6"),
        (lambda: build("vit", input_shape=(8, 8), num_classes=2, width=4), r"images of shape.*\(8, 8\)"),
        (lambda: make("mlp", init="xavjer"), "Unknown initialization 'xavjer'. Did you mean 'xavier'"),
        (lambda: MLP(3, [2], 1, activation="rellu"), "Unknown activation 'rellu'. Did you mean 'relu'"),
        (lambda: make("mlp", width=0), "width must be at least 1. Got 0"),
        (
            lambda: build("resnet18", input_shape=(64,), num_classes=2, width=2),
            r"images of shape \(channels, height, width\).*\(64,\)",
        ),
    ],
)
def test_names_and_sizes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
