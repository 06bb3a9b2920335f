"""Records that cannot be used: counted with their place, never skipped silently."""

from __future__ import annotations

from dataclasses import dataclass, field

_MAX_NAMED = 10  # bad records named in a message


@dataclass
class BadRecords:
    """Count of unusable records, and where the first of them stand."""

    limit: int
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one. Raises: ValueError once there are more than `limit`."""
        self.count += 1
        if len(self.places) < _MAX_NAMED:
            self.places.append(f"{place}: {reason}")
        if self.count > self.limit:
            raise ValueError(
                f"{self.count} bad records are more than --max-bad-records {self.limit}; repair "
                "them or raise the limit; nothing was published:\n  " + "\n  ".join(self.places)
            )
