"""Slots in device memory: a window of them for each layer, shown to kernels as one row per expert of the layer.

It must never give a kernel an id that is not below the layer's number of experts, nor let a slot be written before
its last reader is done.
"""
