"""Hypothesis profiles, and the figures of the property suite below pytest's summary."""

from hypothesis import HealthCheck, settings

from tests.core import property_figures

for name, count in (("default", 150), ("full", 2000)):
    settings.register_profile(
        name,
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile("default")


def pytest_terminal_summary(terminalreporter):
    property_figures.report(terminalreporter)
