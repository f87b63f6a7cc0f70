"""Datasets by name as tensors, seeded class-balanced subsets and probe sets."""

from ntklib.data.datasets import NAMES, Dataset, DatasetNotFoundError, check_name, data_root, load, locate
from ntklib.data.partial import PartlyLabelled, WeakAndStrong, hide_labels, shrink
from ntklib.data.subsets import balanced_indices, probe_set, two_classes

__all__ = [
    "NAMES", "Dataset", "DatasetNotFoundError", "PartlyLabelled", "WeakAndStrong", "balanced_indices", "check_name", "data_root",
    "hide_labels", "load", "locate", "probe_set", "shrink", "two_classes",
]  # fmt: skip
