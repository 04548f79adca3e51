"""When a device loads speculatively within its steps: for the device, and for replays of what it would do."""

DISTANCE = 3
"""Layers from where an expert is chosen to where it is used: as far as heads are trained to see. By arithmetic, records
of today's models take two to five layers' time through PCIe 4 and 5."""
THRESHOLD = 0.5
"""Probability above which an expert is loaded."""
MOST_ROWS = 4
"""Of a step with speculative loads: more rows use so many experts that one more does not count."""
