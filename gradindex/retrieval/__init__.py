"""Retrieval: questions about queries in, the training examples behind them out.

Modules are imported one by one (tables and columns need no torch); ``gradindex`` itself exports what users need.
"""
