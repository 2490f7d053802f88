"""Text to packed rows: records, templates, tokenizers, indexed files, samplers and packing."""
