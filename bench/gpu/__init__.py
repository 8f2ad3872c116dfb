"""What a GPU does, in parts that each end within minutes: see __main__.py."""
