"""What all tests share: property tests draw the same examples everywhere, and a slow machine fails none of them."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("silotune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("silotune")
