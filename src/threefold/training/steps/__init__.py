"""What a training step is made of: augmentation, loss, optimizer, precision, memory."""
