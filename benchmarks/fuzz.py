"""The tests that make up requests, asked for many more of them than a test run makes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from benchmarks.results import ROOT, Check

FILE = "tests/test_openapi_fuzz.py"
SHARE = 6  # of GENREC_FUZZ_CASES, what one of the tests of conversations or item texts tries


def failures(chosen: str, cases: int) -> int:
    """Run the tests whose names hold `chosen`; how many failed."""
    command = [sys.executable, "-m", "pytest", "-q", FILE, "-k", chosen, "-p", "no:cacheprovider", "--timeout=0"]
    environment = {**os.environ, "GENREC_FUZZ_CASES": str(cases), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().rsplit("\n", 1)[-1]
    passed = re.search(r"(\d+) passed", summary)
    failed = re.search(r"(\d+) (failed|error)", summary)
    if failed:
        sys.stderr.write(done.stdout[-20_000:])
    if not passed and not failed:
        raise RuntimeError(f"{' '.join(command)} ran no test: {summary or done.stderr[-500:]}")
    return int(failed[1]) if failed else 0


def fuzz(document: int, words: int) -> tuple[list[Check], dict[str, str]]:
    """Requests made from the OpenAPI document by schemathesis; conversations and item texts by hypothesis."""
    of_document = failures("document or wishes", document)
    of_words = failures("conversation or item_text", words * SHARE)
    checks = [
        Check(f"schemathesis, {document} requests: routes that failed", of_document, None, "0", of_document == 0),
        Check(f"fuzz, {words} conversations, {words} item texts: failed", of_words, None, "0", of_words == 0),
    ]
    return checks, {}
