"""`attn_implementation="dynmask"` for models of transformers."""
