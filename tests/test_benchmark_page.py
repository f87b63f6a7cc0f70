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
            assert f"({row['repeats']}) |" in line
            if row["repeats"] > 1:
                least, *_, most = sorted(row["all_cpu_seconds"])
                assert f"| {least:.3g}–{most:.3g} (" in line


def test_a_range_is_shown_of_the_clock_that_counts(stored, tmp_path, monkeypatch):
    (tmp_path / "book" / "reference").mkdir(parents=True)
    workload = stored["workloads"][0]
    row = workload["methods"][0] | {"repeats": 3, "all_cpu_seconds": [0.2, 0.1, 0.3], "wall_seconds": 0.15, "ratio": 1234.5}
    workload["methods"] = [row]
    monkeypatch.setattr(benchmark_page, "project_root", lambda: tmp_path)
    for device, shown in (("cuda", "| 0.15 | (3) | 1234 |"), ("cpu", "| 0.1–0.3 (3) | 1234 |")):
        kept = stored | {"workloads": [workload | {"device": device}], "probes": None}
        storage.write_json(tmp_path / "book" / "reference" / "benchmarks.json", kept)
        assert shown in benchmark_page.benchmarks_page()


def test_a_target_that_was_missed_is_called_so(stored):
    page = benchmark_page.benchmarks_page()
    first = page.split("## On another processor")[0]
    for target in stored["targets"]:
        (line,) = (line for line in first.splitlines() if line.startswith(f"| {target['text']} |"))
        assert ("not&nbsp;met" in line) == (target["met"] is False)
        assert ("not measured" in line) == (target["met"] is None)


def test_a_further_processor_has_a_section_with_what_was_measured_on_it(stored, tmp_path, monkeypatch):
    folder = tmp_path / "book" / "reference"
    folder.mkdir(parents=True)
    only = [w for w in stored["workloads"] if w["name"] == "W1"]
    only[0]["machine"]["cpu"] = "A machine"
    unmeasured, measured = stored["targets"][0] | {"text": "one", "met": None}, stored["targets"][1] | {"text": "two", "met": False}
    storage.write_json(folder / "benchmarks_small.json", stored | {"workloads": only, "targets": [unmeasured, measured]})
    monkeypatch.setattr(benchmark_page, "project_root", lambda: tmp_path)
    page = benchmark_page.benchmarks_page()
    head, section = page.split("## On another processor: A machine with AVX512")
    assert "No CPU measurement is stored." in head
    assert "### W1: " in section
    assert "### One draw of each trace estimator" in section
    assert "| two |" in section
    assert "**not&nbsp;met**" in section
    assert "| one |" not in section


def test_without_measurements_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_page, "project_root", lambda: tmp_path)
    assert "No CPU measurement is stored." in benchmark_page.benchmarks_page()
