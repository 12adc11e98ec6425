"""The honest protocol on arrays: fit, choose, score cross-fitted, compare.

Also measures the optimism of every choice, suspect labels, prediction sets and the savings of a
cascade.
"""
