"""What DVC tracks in place of a version's images: tars of very many, or a list of those that stay where they are.

An import writes it into the folder that DVC is to track, and a check-out puts the images in its place.
"""
