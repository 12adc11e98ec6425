"""HTTP and a web page over an exported model file.

Imports `threefold.runtime`, the image decoder and the ground modules only.
"""
