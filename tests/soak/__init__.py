"""A long run in which everything goes wrong that can; __main__.py says how to start it."""
