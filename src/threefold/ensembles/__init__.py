"""Combine the members' probabilities (m, n, k) into one calibrated answer (n, k).

Combiners, cross-fitting, calibration, prediction sets and the rule of the cascade. Ensembles have
scikit-learn's interface: `fit`, `predict_proba`, `predict`; fitted state ends in an underscore.
"""
