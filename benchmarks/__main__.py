"""Measure kernels and traces beside other packages: ``python -m benchmarks``."""

import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

from benchmarks import report, targets, workloads
from benchmarks.children import Workers
from benchmarks.install import install_neural_tangents
from benchmarks.measure import HELPER, Options, Race
from benchmarks.targets import Result

PROBES = "probes"


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--quick", is_flag=True, help="Tiny sizes, under half a minute: shows that everything runs, says nothing on speed.")
@click.option("--only", default="", help=f"Workloads, by comma: {', '.join(w.name for w in workloads.WORKLOADS)}, {PROBES}.")
@click.option("--repeats", default=5, show_default=True, help="Measured rounds over all methods.")
@click.option("--peers", default="", help=f"Packages, by comma: {', '.join(workloads.PEERS)}; 'none' for ours alone.")
@click.option("--budget", default=150.0, show_default=True, help="Seconds after which a method gets no further round.")
@click.option("--timeout", default=900.0, show_default=True, help="Seconds that one call may take.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute.")
@click.option("--save", is_flag=True, help="Keep the results in book/reference.")
@click.option("--beside", default="", help="With --save: in a file of this name, beside those of another processor.")
@click.pass_context
def main(
    context: click.Context,
    quick: bool,
    only: str,
    repeats: int,
    peers: str,
    budget: float,
    timeout: float,
    device: str,
    save: bool,
    beside: str,
) -> None:
    """Time methods in turn on one thread, with agreement in float64, peak memory and the fraction of the floor."""
    if context.invoked_subcommand:
        return
    if save and quick:
        msg = "--save keeps measurements at full size. Leave out --quick."
        raise click.UsageError(msg)
    if beside and not (save and beside.isidentifier() and beside not in ("cpu", "cuda")):
        msg = f"--beside requires --save and a name of letters, digits and _, not of a device. Got {beside!r}."
        raise click.UsageError(msg)
    chosen = names(only, [*(w.name for w in workloads.WORKLOADS), PROBES]) or [
        *(w.name for w in workloads.WORKLOADS if device in (w.device or device)), PROBES
    ]  # fmt: skip
    packages = () if peers == "none" else tuple(names(peers, list(workloads.PEERS))) or workloads.PEERS
    if device == "cuda":
        packages = tuple(p for p in packages if p != "neural-tangents")  # its JAX knows only the CPU
        require_cuda()
    options = Options(packages, quick, 0 if quick else repeats, budget, timeout, device)
    console = Console()
    measure(chosen, options, console if console.is_terminal else Console(width=124), save=(beside or device) if save else "")


@main.command("install-neural-tangents")
@click.option("--python", default=sys.executable, help="Interpreter, of version 3.9 to 3.12.")
def install(python: str) -> None:
    """Make .venv-nt, the environment of neural-tangents with the JAX of its time."""
    try:
        install_neural_tangents(python)
    except (OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(f"neural-tangents could not be installed: {error}") from error  # noqa: EM102
    click.echo("neural-tangents is ready; python -m benchmarks will use it.")


def names(given: str, allowed: list[str]) -> list[str]:
    """Split a list by commas.

    Raises:
        click.UsageError: If a name is unknown.
    """
    found = [name.strip() for name in given.split(",") if name.strip()]
    for name in found:
        if name not in allowed:
            msg = f"Unknown name {name!r}. Known: {', '.join(allowed)}."
            raise click.UsageError(msg)
    return found


def require_cuda() -> None:
    """Stop where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        msg = "--device cuda needs a GPU that PyTorch sees. Got none."
        raise click.UsageError(msg)


def measure(chosen: list[str], options: Options, console: Console, *, save: str = "") -> tuple[list[Result], Result | None]:
    """Run the chosen workloads, print tables, keep results under the name ``save`` as they come; return them."""
    results: list[Result] = []
    probes, workers = None, Workers()
    with tempfile.TemporaryDirectory() as folder, console.status("starting") as status:
        try:
            for name in chosen:
                if name == PROBES:
                    status.update("trace estimators")
                    probes = run_probes(options, workers)
                    report.print_probes(console, probes)
                else:
                    workload = workloads.find(name, is_quick=options.quick)
                    found = Race(workload, options, workers, Path(folder), status.update).run()
                    results.append(targets.completed(found) | report.origin(found["versions"], options.repeats))
                    report.print_workload(console, results[-1])
                if not options.quick:
                    workers.close()
                if save:
                    report.save(results, probes, save)
        finally:
            workers.close()
    if options.device == "cpu" and not options.quick:
        report.print_targets(console, targets.judge({r["name"]: r for r in results}, probes))
    if save:
        console.print(f"kept in {report.path(save).relative_to(workloads.ROOT)}")
    return results, probes


def run_probes(options: Options, workers: Workers) -> Result:
    """Scatter and cost of the trace estimators on W2.

    Raises:
        RuntimeError: If the measurement fails.
    """
    workload = workloads.find("W2", is_quick=options.quick)
    workers.start({HELPER: "benchmarks.torch_worker"})
    job = {"do": "probes", "workload": "W2", "quick": options.quick, "device": options.device, "dtype": "float32", "n": workload.n}
    answer = workers.ask(HELPER, job | {"draws": 4 if options.quick else 24}, options.timeout)
    if "error" in answer:
        msg = f"the trace estimators could not be measured: {answer['error']}"
        raise RuntimeError(msg)
    about = {"title": workload.title, "n": workload.n}
    return about | answer | report.origin(workers.versions(), 1)


if __name__ == "__main__":
    main()
