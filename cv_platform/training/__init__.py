"""Trains a Keras model on packed images: architectures, augmentation, batches, the loop and its callbacks."""
