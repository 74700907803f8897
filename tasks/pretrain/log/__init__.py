"""What a run records: JSON lines, trackers, the display."""
