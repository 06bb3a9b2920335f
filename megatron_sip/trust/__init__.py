"""Whether judges can be believed: canaries, a second judge, an alarm."""
