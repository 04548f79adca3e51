"""Engines compared on one machine, each in a process of its own.

It must never hide a failure, an arm that was left out, or a result that speaks against offloading.
"""
