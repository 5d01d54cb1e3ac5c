"""The parts every stage shares, one idea per file; the entry scripts put them together."""
