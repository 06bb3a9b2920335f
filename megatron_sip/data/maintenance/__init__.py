"""Work on indexed datasets that exist: inspect, verify, merge, split, adopt."""
