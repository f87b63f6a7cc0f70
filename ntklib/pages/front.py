"""The generated parts of the front page: the picture, the counts, and the sources with what they claim."""

from ntklib import claims
from ntklib.pages.ledger import count_table, counts, filtered
from ntklib.pages.picture import Story

PHRASES = {claims.HOLDS: "hold", claims.FAILS: "fail", claims.INCONCLUSIVE: "are inconclusive", claims.NOT_JUDGED: "are not judged"}
PICTURE = "_generated/story.svg"  # counted from book/
SAYS = {  # what each source claims, and where it is put to the test
    "trace": (
        "The trace of the kernel rises while a network learns and comes to rest when the training accuracy has reached its "
        "maximum. It also tells of inner layers, grokking and semi-supervised training, and why averaged parameters are better.",
        ("trace_estimators", "trace_evolution", "trace_sweeps", "kernel_distance", "layerwise", "kernel_svm",
         "grokking_modular_addition", "grokking_mnist", "fixmatch", "ema"),
    ),
    "eos": (
        "At the same loss, training with a larger learning rate leaves a kernel whose leading eigenvectors point more towards the "
        "targets; at the edge of stability this happens while the sharpness falls.",
        ("eos_alignment", "two_layer_linear"),
    ),
    "stability": (
        "With a constant kernel training is a linear system whose eigenvalues decide its stability; at finite width the kernel "
        "drifts, and width and output scale decide by how much.",
        ("lazy_regime",),
    ),
    "cone": (
        "After an early phase of large changes the kernel keeps moving to the end of training, but within a narrow cone, and what "
        "it does there is worth more than linearized training.",
        ("cone_effect",),
    ),
    "deep_linear": (
        "Beyond a threshold of the learning rate deep linear networks oscillate in their largest modes, with period two and then "
        "in a cascade to chaos; shallow networks and simple tasks may never get there.",
        ("deep_linear_networks",),
    ),
}  # fmt: skip


def summary(story: Story) -> str:
    """Markdown that the front page includes."""
    entries = claims.ledger()
    found = ", ".join(f"{n} {said}" for v, said in PHRASES.items() if (n := counts(entries)[v]))
    lines = [
        f"```{{figure}} {PICTURE}", ":name: fig-story", f":alt: {story.alt}", "", story.caption, "```", "",
        f"Of {len(entries)} claims, {found}. Every number leads to the claims behind it.\n",
        count_table(entries),
    ]  # fmt: skip
    return "\n".join([*lines, "## What the five sources claim\n", *map(_source, SAYS)])


def _source(source: str) -> str:
    says, chapters = SAYS[source]
    tested = ", ".join(f"{{doc}}`executed/{c}`" for c in chapters)
    link = filtered("Its claims and verdicts", source=source)
    return f"- {{cite:t}}`{source}`: {says} {link}; put to the test in {tested}.\n"
