"""What to load ahead of its use: the predictor is asked between layers, and the loads start that are worth their cost.

Pure decisions: clock and pools come from outside. It must never delay what a layer waits for, nor end a step: what
raises here is switched off.
"""
