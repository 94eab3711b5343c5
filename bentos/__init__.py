"""Services that BentoML builds and serves; each folder is one."""
