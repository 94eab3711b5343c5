"""Shards of packed pixels, format 2: how they are made, kept and read; which images a pack holds is `packing`'s part.

A pack's folder has

    <split>-00000.uint8   pixels of consecutive rows, `(n, H, W, 3)` uint8 RGB without a header, 8 to 256 MB
    <split>-00000.jpeg    or JPEGs of quality 90, one after another
    <split>.targets.npy   (N,) int64, or (N, C) float32 of 0, 1 and NaN (unknown) for multi-label
    <split>.rows.parquet  path, sha256 and stored bytes of each row
    packed.json           the index, written last: shape, shards, sizes and sha256 of the files above
    verified.json         which of them were found to be those, by size, time and inode, and need no hashing again

A pack of another machine, taken from central storage (`sharing`), has `origin.json`, and a shard when it is first used.

Only what was written whole has its name in the index. Shards of a killed packing stay in its unfinished folder and are
taken over by the next one. Importing this package is cheap, as each process that decodes does it.
"""
