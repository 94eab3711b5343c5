"""What single commands of `cv-platform` do, a module each; `cli` reads their arguments."""
