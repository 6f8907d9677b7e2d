"""Settings of every test."""

from hypothesis import settings

# A shared machine stalls for longer than Hypothesis' deadline; time is measured in benchmarks, not in tests.
settings.register_profile("dgpo-fast", deadline=None)
settings.load_profile("dgpo-fast")
