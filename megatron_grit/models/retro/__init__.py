"""A decoder that reads neighbors: chunked cross-attention (RETRO, arXiv 2112.04426) over packed rows."""
