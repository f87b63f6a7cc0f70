"""What a chapter needs that this machine may lack, said before anything is started."""

from collections.abc import Iterator, Mapping
from typing import Any

CARRIED = ("digits", "mnist5k")  # datasets that come with packages, for which nothing has to be imported here


def datasets_of(parameters: Mapping[str, Any]) -> list[str]:
    """Datasets that parameters name, ``dataset`` and the like, each once; those that packages carry are left out."""
    named = [value for name, value in parameters.items() if "dataset" in name]
    each = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return [name for name in dict.fromkeys(each) if name not in CARRIED]


def missing(parameters: Mapping[str, Any], preset: str) -> Iterator[str]:
    """Sentences on what a chapter would do better with; an absent dataset is downloaded, if it can be.

    Args:
        parameters: Of the chapter.
        preset: Preset that they start from.

    Raises:
        DatasetNotFoundError: If a dataset is neither there nor to be had; the message says where to place which files.
    """
    from ntklib.data import datasets

    for name in datasets_of(parameters):
        if name in datasets.NAMES and not any(folder.exists() for folder in datasets.locate(name)):
            yield f"dataset {name} is not here yet: downloading it to {datasets.data_root()}"
            datasets.LOADERS[name]()
    if preset == "paper" and parameters.get("device") == "auto":
        import torch

        if not torch.cuda.is_available():
            yield (
                f"the paper preset is made for a GPU, and torch {torch.__version__} sees none: on this machine's CPU some chapters "
                "take days. Stop with Ctrl-C, and go on at any time; -p device cpu hides this message."
            )
