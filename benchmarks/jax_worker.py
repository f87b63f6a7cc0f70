"""Child process for neural-tangents, in an environment of its own: the same networks written in JAX."""

import os
import sys
import types
from functools import cache

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XLA starts no second computing thread on one core

_stub = types.ModuleType("neural_tangents.experimental.empirical_tf.empirical")  # the real one imports TensorFlow
_stub.empirical_ntk_fn_tf = _stub.get_apply_fn_and_params = None  # pyright: ignore[reportAttributeAccessIssue]
sys.modules[_stub.__name__] = _stub

import jax  # noqa: E402 # pyright: ignore[reportMissingImports]
import neural_tangents as nt  # noqa: E402 # pyright: ignore[reportMissingImports]
import numpy as np  # noqa: E402
from jax import numpy as jnp  # noqa: E402 # pyright: ignore[reportMissingImports]

from benchmarks.worker import Call, Job, Memory, corner, measured, serve  # noqa: E402

jax.config.update("jax_enable_x64", True)  # all arrays below have an explicit dtype
METHODS = {
    "nt-structured": nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    "nt-jacobian": nt.NtkImplementation.JACOBIAN_CONTRACTION,
}


def mlp(p, _, x):
    """Weights are stored transposed: with ``x @ w.T`` the package finds no structure."""
    for i in (1, 3, 5):
        x = x @ p[f"layers.{i}.weight"] + p[f"layers.{i}.bias"]
        x = jax.nn.relu(x) if i < 5 else x
    return x


def conv(x, w, stride, padding):
    """Convolution of ``[n, h, w, c]`` with ``[h, w, c_in, c_out]``."""
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def small_cnn(p, _, x):
    """Convolutions at 0, 2 and 4 of the sequence, head at 8."""
    for i, stride in ((0, 1), (2, 2), (4, 2)):
        x = jax.nn.relu(conv(x, p[f"{i}.weight"], stride, 1) + p[f"{i}.bias"])
    return x.mean((1, 2)) @ p["8.weight"] + p["8.bias"]


def resnet18(p, buffers, x):
    """Batch normalisation as the affine map of eval mode."""

    def conv_norm(x, conv_name, norm, stride):
        w = p[f"{conv_name}.weight"]
        x = conv(x, w, stride, w.shape[0] // 2)
        scale = 1 / np.sqrt(buffers[f"{norm}.running_var"] + np.asarray(1e-5, w.dtype))
        return (x - buffers[f"{norm}.running_mean"]) * scale * p[f"{norm}.weight"] + p[f"{norm}.bias"]

    x = jax.nn.relu(conv_norm(x, "stem.0", "stem.1", 1))
    for stage in range(1, 5):
        for i in range(2):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = jax.nn.relu(conv_norm(x, f"{name}.body.0", f"{name}.body.1", stride))
            y = conv_norm(y, f"{name}.body.3", f"{name}.body.4", 1)
            projected = f"{name}.shortcut.0.weight" in p
            x = jax.nn.relu(y + (conv_norm(x, f"{name}.shortcut.0", f"{name}.shortcut.1", stride) if projected else x))
    return x.mean((1, 2)) @ p["head.weight"] + p["head.bias"]


NETWORKS = {"mlp": mlp, "small_cnn": small_cnn, "resnet18": resnet18}


def loaded(path: str, dtype: str):
    """Parameters, buffers and inputs, with channels last and weights as ``[..., inputs, outputs]``."""
    arrays = {name: value.astype(dtype) for name, value in np.load(path).items() if not name.endswith("num_batches_tracked")}
    x = arrays.pop("inputs")
    buffers = {name: value for name, value in arrays.items() if "running_" in name}
    params = {}
    for name in arrays.keys() - buffers.keys():
        w = arrays[name]
        params[name] = jnp.asarray(w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T)
    return params, buffers, x


@cache
def prepared(method: str, network: str, kind: str, path: str, n: int, dtype: str) -> Call:
    """Return the compiled kernel; compilation is not measured."""
    params, buffers, x = loaded(path, dtype)
    x = jnp.asarray(x[:n].reshape(n, -1) if network == "mlp" else x[:n].transpose(0, 2, 3, 1))
    axes = {"trace_axes": (), "diagonal_axes": ()} if kind == "kernel" else {"trace_axes": (-1,), "diagonal_axes": (0,)}
    f = lambda p, x: NETWORKS[network](p, buffers, x)  # noqa: E731
    kernel_fn = nt.empirical_ntk_fn(f, vmap_axes=0, implementation=METHODS[method], **axes)
    c = jax.eval_shape(f, params, x[:1]).shape[1]
    reduce = (lambda k: k) if kind == "kernel" else (lambda k: c * jnp.sum(k))  # its traces are means over outputs
    compiled = jax.jit(lambda p, x: reduce(kernel_fn(x, None, p))).lower(params, x).compile()
    return lambda: compiled(params, x).block_until_ready()


def run(job: Job) -> Job:
    """Time one call; store the block that is compared."""
    call = prepared(*(job[key] for key in ("method", "network", "kind", "inputs", "n", "dtype")))
    result, found = measured(call, Memory())
    np.save(job["path"], corner(np.asarray(result), job["compared"]))
    return found


if __name__ == "__main__":
    serve({"run": run}, lambda: {"neural-tangents": nt.__version__, "jax": jax.__version__})
