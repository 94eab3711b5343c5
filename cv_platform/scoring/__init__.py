"""Batch scoring: what a published model says of the images of a folder, an archive or a bucket, a row for each.

Each answer is the service's own: the same function on the same bytes, one image in a call.
"""
