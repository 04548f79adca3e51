"""What becomes of the maps of requests outside of the forward pass: files, threads and the process that learns.

It must never make a step wait for a disk.
"""
