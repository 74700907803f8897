"""How fast a model reads and writes, and the memory that it takes, in each engine."""
