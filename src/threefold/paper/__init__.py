"""The paper's tables and figures, run again.

Phong and Ribeiro, Rethinking Recurrent Neural Networks and Other Improvements for Image
Classification, arXiv:2007.15161.
"""
