"""`tracebook-conformance` qualifies our matcher: its fixed cases and its generated traces, compared event by event."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tracebook.conformance import run_conformance_suite
from tracebook.conformance.campaign import campaign_profile_names
from tracebook.conformance.external import ExternalProcessAdapterFactory
from tracebook.conformance.suite import copy_bundled_conformance_suite

ADAPTER = [sys.executable, "-m", "tests.conformance.tracebook_adapter"]


@pytest.mark.parametrize("profile", campaign_profile_names())
def test_the_matcher_qualifies_for_every_profile(profile: str, tmp_path: Path) -> None:
    output = tmp_path / "qualification"
    command = [sys.executable, "-m", "tracebook.conformance.cli", "qualify", "--profile", profile, "--seed", "42"]
    command += ["--traces", "10", "--events-per-trace", "200", "--output-dir", str(output), "--candidate", *ADAPTER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Qualification: PASS" in done.stdout
    report = json.loads((output / "qualification.json").read_text())
    assert report["qualified"] is True
    assert report["checks"]["generated_campaign"]["completed_traces"] == 10
    assert report["checks"]["semantic_coverage"]["uncovered"] == []


def test_the_matcher_conforms_in_every_case_of_the_suite_but_pro_rata(tmp_path: Path) -> None:
    suite = copy_bundled_conformance_suite(tmp_path / "suite")
    fifo = tuple(case for case in suite.cases if case.config.matching_algorithm == "fifo")
    report = run_conformance_suite(replace(suite, cases=fifo), ExternalProcessAdapterFactory(ADAPTER))
    assert [case["name"] for case in report["cases"] if not case["report"]["conformant"]] == []
    assert report["conformant_cases"] == len(fifo) == len(suite.cases) - 1
