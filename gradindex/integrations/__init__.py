"""Callbacks that record checkpoints in the training loops of other libraries.

``gradindex.integrations.hf`` is for transformers' ``Trainer`` and TRL's trainers, ``gradindex.integrations.lightning``
for Lightning. Each imports its library, so this package imports neither.
"""
