"""A pytest plugin (-p mmlm_benchmarks.gpu.pytest_facts): failures and counts as facts, while the tests still run."""

import os
import time

from mmlm_benchmarks.gpu.facts import Facts
from mmlm_benchmarks.gpu.job import FACTS

COUNTS_EVERY_SECONDS = 3.0


class _Reporter:
    def __init__(self) -> None:
        self.facts = Facts(os.environ[FACTS], stage="tests", job="pytest")
        self.files: dict[str, dict[str, int]] = {}  # what each file's tests came to
        self.written = time.monotonic()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            path = report.nodeid.partition("::")[0]
            counts = self.files.setdefault(path, {"passed": 0, "failed": 0, "skipped": 0})
            counts[report.outcome] += 1
        if report.failed:
            self.facts.write("test failed", test=report.nodeid, when=report.when, text=str(report.longrepr)[-1500:])
        if time.monotonic() - self.written > COUNTS_EVERY_SECONDS:
            self.write_counts(finished=False)

    def write_counts(self, finished: bool) -> None:
        self.written = time.monotonic()
        self.facts.write("tests", files=self.files, finished=finished)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.facts.write("test failed", test=report.nodeid, when="collect", text=str(report.longrepr)[-1500:])

    def pytest_sessionfinish(self) -> None:
        self.write_counts(finished=True)


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist, the process that gathers what the workers report
        config.pluginmanager.register(_Reporter(), "mmlm_gpu_facts")
