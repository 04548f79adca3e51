"""Traces: recording what requests were routed to, and keeping it in memory and in files.

It must never look at what is resident, make a step wait for a disk, or trust a file it has not checked.
"""
