"""How much Hypothesis searches: a short random look at a desk, a repeatable one elsewhere."""

import os

from hypothesis import settings

# No deadlines: a test's time is the machine's affair, and a busy machine is no bug of ours.
settings.register_profile("quick", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "quick")
