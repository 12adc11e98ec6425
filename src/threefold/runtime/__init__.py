"""Run an exported model file: images in, probabilities out.

Needs numpy, Pillow and onnxruntime only.
"""
