"""From a folder of images to versioned, split, packed pixels.

`importing` and `digits` make git + DVC repositories, `versions` checks a tag out, `manifest` and `splits` describe its
images, `packing` decodes them once. Nothing here knows models, and nothing above imports DVC.
"""
