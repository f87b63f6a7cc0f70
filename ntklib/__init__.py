"""Dynamics of the empirical neural tangent kernel of finite-width networks.

Importing the package imports no torch; public names load their module when first used.
"""

import os
from importlib import import_module
from typing import Any

# large tensors in large pages: entering new memory page by page would take up to a third of a kernel's time
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

_HOMES = {
    "ntklib.alignment": ["alignment_change", "at_loss", "block_bootstrap", "network_modes", "target_modes"],
    "ntklib.averaging": [
        "GradientBound",
        "average_path",
        "average_speed",
        "descent_cosine",
        "descent_defect",
        "filter_gain",
        "gradient_bound",
        "mode_average",
        "mode_speed",
        "probability_error",
        "steady_lag",
        "training_pairs",
    ],
    "ntklib.chapters": ["Chapter", "Provenance"],
    "ntklib.claims": ["Measured", "Verdicts", "over_seeds"],
    "ntklib.cone": [
        "angle_speed",
        "angles_from_distances",
        "angles_to_axis",
        "classical_scaling",
        "lag_exponent",
        "lag_steps",
        "mean_by_lag",
        "path_lengths",
        "phase_boundary",
        "power_law",
    ],
    "ntklib.curvature": ["hessian_operator", "sharpness"],
    "ntklib.edge": ["EdgeSettings", "edge_loop", "edge_measures", "edge_network", "edge_task", "edge_windows", "matched"],
    "ntklib.estimators": ["TraceEstimate", "ntk_trace"],
    "ntklib.fourier": [
        "cosine_power",
        "excluded_logits",
        "fourier_basis",
        "fourier_power",
        "key_frequencies",
        "logit_variance",
        "progress_losses",
        "restricted_logits",
        "sum_waves",
    ],
    "ntklib.fixmatch_probe": ["FixMatchProbe"],
    "ntklib.fixmatch_settings": ["FixMatchSettings"],
    "ntklib.functional": ["functional_model"],
    "ntklib.grid_settings": ["FactorizationSettings", "TwoLayerSettings"],
    "ntklib.grokking_settings": ["GrokkingSettings"],
    "ntklib.input_noise": ["logit_perturbation"],
    "ntklib.kernels": ["empirical_ntk", "flatten_kernel", "ntk_by_layer", "ntk_diagonal"],
    "ntklib.large": ["LargeKernel", "large_ntk"],
    "ntklib.large_estimate": ["LargeEstimate", "gemm_rate", "large_ntk_estimate"],
    "ntklib.lazy": ["LazySettings", "lazy_problem"],
    "ntklib.lazy_history": [
        "decay_rate",
        "drift_while_learning",
        "first_stable",
        "forecast_errors",
        "mode_rates",
        "scale_share",
        "seed_exponents",
    ],
    "ntklib.infinite": ["infinite_nngp", "infinite_ntk"],
    "ntklib.linear_curvature": ["aligned_hessian_eigenvalues", "minimum_curvature", "transverse_multiplier"],
    "ntklib.linear_networks": ["aligned_descent", "balancing_gap", "factorization_network", "matrix_descent"],
    "ntklib.linearized": ["constant_kernel_flow", "continue_linearized", "kernel_regression", "linearize"],
    "ntklib.margin": [
        "TangentMargin",
        "block_means",
        "homogeneity",
        "kink_share",
        "margin_growth",
        "rescale_layers",
        "tangent_features",
        "tangent_margin",
    ],
    "ntklib.operator": ["NTKOperator"],
    "ntklib.perturbation": [
        "batch_trace",
        "layer_rms",
        "perturbation_response",
        "plateau",
        "relu_response",
        "response_ratio",
        "trace_by_layer",
    ],
    "ntklib.models": ["calibrate_batch_norm"],
    "ntklib.modular_settings": ["ModularSettings"],
    "ntklib.period_doubling": ["doublings", "mode_sharpness", "two_period_orbit"],
    "ntklib.phases": ["rank_correlation"],
    "ntklib.probes": ["Gauges", "followed_sharpness", "log_probes", "measure_probes", "task_accuracy", "task_measures"],
    "ntklib.reference": ["load_reference"],
    "ntklib.runs": ["Run", "RunResult", "combine", "with_quantity"],
    "ntklib.scenarios": ["Scenario", "Scene", "scenario", "stage"],
    "ntklib.settings": [
        "ConeSettings",
        "FullBatchSettings",
        "LargeSettings",
        "MarginSettings",
        "SupervisedSettings",
        "TaskSettings",
    ],
    "ntklib.similarity": [
        "centered_kernel_alignment",
        "distances_to_earlier",
        "kernel_alignment",
        "kernel_angle",
        "kernel_change",
        "kernel_distance",
        "kernel_drift",
        "kernel_target_alignment",
        "kernel_velocity",
        "target_alignment",
    ],
    "ntklib.sketch": ["ntk_sketch", "sketched_frobenius_norm", "sketched_inner_product", "sketched_kernel_distance"],
    "ntklib.spectra": [
        "condition_number",
        "effective_dimension",
        "effective_rank",
        "participation_ratio",
        "stable_rank",
        "top_eigenpairs",
    ],
    "ntklib.svm": ["SVMSolution", "svm_dual"],
    "ntklib.sweeps": ["distinct", "gather", "sweep", "variants"],
    "ntklib.synthesis": [
        "chance_share",
        "coincidence",
        "coincidences",
        "cone_entry",
        "event_times",
        "probe_table",
        "rest_time",
        "rest_times",
        "shuffle_test",
    ],
    "ntklib.training": [
        "ExponentialAverages",
        "accuracy",
        "adamw",
        "central_flow",
        "fixmatch",
        "full_batch_adamw",
        "gradient_descent",
        "gradient_flow",
        "log_steps",
        "loop_by_optimizer",
        "measured_steps",
        "normalized_descent",
        "parameter_norm",
        "precise_cross_entropy",
        "replicated_gradient_descent",
        "replicated_minibatches",
        "sgd",
        "steps_per_epoch",
    ],
}
_MODULES = ("data", "models", "plots")
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"ntklib.{name}")
    msg = f"module 'ntklib' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
