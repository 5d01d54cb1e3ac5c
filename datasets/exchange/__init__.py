"""Masks to and from annotation tools: `python -m datasets.exchange --help`."""
