"""How much a worker takes on at once: places, memory, threads, images per minute."""
