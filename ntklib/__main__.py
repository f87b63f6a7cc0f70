"""Command line: run chapters, build the book, print the ledger, list data."""

import os
import signal
import sys
from typing import Any

import click
import yaml
from rich.console import Console

from ntklib import chapters, torchrun

PRESET = click.option("--preset", default="default", show_default=True, help=f"One of: {', '.join(chapters.PRESETS)}.")
JOBS = click.option("-j", "--jobs", default=min(2, os.cpu_count() or 1), show_default=True, help="Chapters at a time.")
PARAMETERS = click.option(
    "-p", "--parameter", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="Change a parameter."
)
FORCE = click.option("--force", is_flag=True, help="Execute even what is up to date (cached runs are still found).")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ntklib")
@click.pass_context
def cli(context: click.Context) -> None:
    """Reproduce the dynamics of empirical neural tangent kernels."""
    if torchrun.size() > 1 and context.invoked_subcommand != "run":
        msg = f"Of ntklib's commands torchrun starts run alone, for one chapter. Got {context.invoked_subcommand!r}."
        raise chapters.ParameterError(msg)


@cli.command()
@click.argument("chapter")
@PRESET
@FORCE
@PARAMETERS
@click.option("--share", default="", metavar="K/N", help="Work on the chapter's runs as the K-th of N processes.")
def run(chapter: str, preset: str, force: bool, parameters: tuple[tuple[str, str], ...], share: str) -> None:
    """Execute one CHAPTER through papermill.

    Started by torchrun, several processes train each of its runs together.
    """
    from ntklib import runner

    overrides = {name: _value(value) for name, value in parameters}
    task = runner.make_task(chapter, preset, overrides, share)
    if runner.run([task], force=force):
        sys.exit(1)


@cli.command("run-all")
@PRESET
@JOBS
@FORCE
def run_all(preset: str, jobs: int, force: bool) -> None:
    """Execute all chapters that are out of date."""
    from ntklib import book, runner

    tasks = [runner.make_task(chapter, preset) for chapter in book.contents()]
    if runner.run(tasks, jobs=jobs, force=force):
        sys.exit(1)


@cli.command("book")
@PRESET
@JOBS
def build_book(preset: str, jobs: int) -> None:
    """Execute what is out of date and build the HTML pages."""
    from ntklib import book

    page = book.run_and_build(preset, jobs, Console(stderr=True))
    click.echo(f"The book is built. Open {page.as_uri()}")


@cli.command()
@PRESET
def pdf(preset: str) -> None:
    """Print the book from the chapters that are executed, as one PDF (needs Chromium)."""
    from ntklib import printing

    click.echo(f"The book is printed. Open {printing.print_book(preset).as_uri()}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def claims(as_json: bool) -> None:
    """Print the claims ledger; exit status 1 when an identity fails."""
    from ntklib import claims as ledger_module
    from ntklib.pages import export

    entries = ledger_module.ledger()
    if as_json:
        click.echo(export.as_json())
    else:
        for e in entries:
            measured = ledger_module.Measured(e["value"], e["sem"]) if e["value"] is not None else None
            shown = f"{ledger_module.number(measured)} ({e['threshold']}; {e['seeds']} seed(s))" if measured else ""
            click.echo(f"{e['id']:4} {e['verdict']:12} {shown:60} {e['chapter']}")
    if any(e["verdict"] == ledger_module.FAILS and e["kind"] == "identity" for e in entries):
        sys.exit(1)


@cli.command()
def data() -> None:
    """List the datasets: where their files are, how large, and whether they are whole."""
    from ntklib import data as datasets

    click.echo(f"folder of datasets: {datasets.data_root()} (set NTKLIB_DATA to change it)")
    for name in datasets.NAMES:
        click.echo(f"{name:14} {datasets.look(name)}")


@cli.command()
@click.argument("name")
@click.argument("chapter", required=False)
@PRESET
@FORCE
@PARAMETERS
def reference(name: str, chapter: str | None, preset: str, force: bool, parameters: tuple[tuple[str, str], ...]) -> None:
    """Execute CHAPTER and keep its training histories with the book as NAME; without a chapter, the planned run of this name."""
    from ntklib import reference as references
    from ntklib import runner

    changed = {key: _value(value) for key, value in parameters}
    if chapter is None:
        plan = references.find_planned(name)
        chapter, preset, changed = plan.chapter, plan.preset, {**plan.parameters, **changed}
    task = runner.make_task(chapter, preset, changed)
    if runner.run([task], force=force):
        sys.exit(1)
    command = references.command(name, chapter, preset, changed)
    click.echo(f"kept as {references.save_reference(name, chapter, task.preset, command)}")


@cli.command("references")
def list_references() -> None:
    """List the larger runs that are planned or kept, with the command of each."""
    from ntklib import reference as references

    kept = references.names()
    for plan in references.planned():
        click.echo(f"{'kept' if plan.name in kept else 'not computed':14} {plan.command}")
    for name in sorted(set(kept) - {plan.name for plan in references.planned()}):
        click.echo(f"{'kept':14} {references.load_reference(name).about['command']}")


def _value(text: str) -> Any:
    """Read a value as YAML: 64, 0.05, true, [1, 2], cifar10; 1e-3 is a number too, which YAML 1.1 takes for text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def main() -> None:
    """Run the command line; expected mistakes end with one sentence and status 2, failures of work with status 1."""
    from ntklib.book import BuildError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception, which ends what was started, too
    try:
        cli(standalone_mode=True)
    except (chapters.ParameterError, FileNotFoundError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except BuildError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
