"""Scores, intervals and paired tests on arrays.

Knows no ensemble, recipe or run.
"""
