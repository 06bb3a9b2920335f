"""Properties are checked on any machine, however busy: no example has a deadline."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")
