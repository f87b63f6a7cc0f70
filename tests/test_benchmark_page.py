"""The book's page of benchmarks says what the stored measurements say."""

import pytest

from ntklib import benchmark_page, paths, storage


@pytest.fixture
def stored():
    return storage.read_json(paths.project_root() / "book" / "reference" / "benchmarks.json")


def test_every_method_of_every_workload_has_a_line_with_its_numbers(stored):
    page = benchmark_page.benchmarks_page()
    for workload in stored["workloads"]:
        section = page.split(f"## {workload['name']}: ")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
        assert len(lines) == len(workload["methods"])
        for line, row in zip(lines, workload["methods"], strict=True):
            assert row["label"] in line
            assert (f"{row['cpu_seconds']:.3g}" if row["cpu_seconds"] is not None else "–") in line.replace("\u2011", "-")


def test_a_target_that_was_missed_is_called_so(stored):
    page = benchmark_page.benchmarks_page()
    for target in stored["targets"]:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {target['text']} |"))
        assert ("not&nbsp;met" in line) == (target["met"] is False)
        assert ("not measured" in line) == (target["met"] is None)


def test_without_measurements_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_page, "project_root", lambda: tmp_path)
    assert "No CPU measurement is stored." in benchmark_page.benchmarks_page()
