"""One member on many devices: the processes that torchrun starts train it together."""
