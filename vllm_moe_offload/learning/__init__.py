"""Training the learned predictor beside a serving engine: in a process of its own, at the lowest priority.

It must never take time from a step, nor use a file of heads that is not entirely right.
"""
