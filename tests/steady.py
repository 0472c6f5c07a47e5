"""How property tests run: the same examples each time, a few of them, without a clock."""

from hypothesis import HealthCheck, settings


steady = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    # the fixture around all tests sets seeds, which each example can do without
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
