"""The demonstration, on the bundled model: quality, then speed."""
