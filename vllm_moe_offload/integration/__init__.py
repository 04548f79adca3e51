"""The only room that imports vLLM: puts the runtime into its engine. It must never change vLLM when switched off.

Importing the room alone imports nothing, so that ``doctor`` can probe a vLLM whose parts have moved.
"""
