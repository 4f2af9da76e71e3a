"""The page: everything in a browser."""
