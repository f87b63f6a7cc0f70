"""Datasets by name as tensors, seeded class-balanced subsets and probe sets."""

from ntklib.data.datasets import NAMES, Dataset, DatasetNotFoundError, check_name, data_root, load, locate
from ntklib.data.inventory import Presence, look
from ntklib.data.modular import ModularPairs, check_modular_task, modular_addition
from ntklib.data.partial import PartlyLabelled, WeakAndStrong, hide_labels, shrink
from ntklib.data.stored import STORAGES, ByteImages, StoredImages, StreamedImages
from ntklib.data.subsets import balanced_indices, probe_set, two_classes

__all__ = [
    "NAMES", "STORAGES", "ByteImages", "Dataset", "DatasetNotFoundError", "ModularPairs", "PartlyLabelled", "Presence",
    "StoredImages", "StreamedImages", "WeakAndStrong", "balanced_indices", "check_modular_task", "check_name", "data_root",
    "hide_labels", "load", "locate", "look", "modular_addition", "probe_set", "shrink", "two_classes",
]  # fmt: skip
