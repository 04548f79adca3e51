"""Predictors: which experts the layers ahead will use, as probabilities.

Pure: arrays in, arrays out. They must never read a clock, a file, or what is resident.
"""
