"""The commands, one module each. Heavy packages are imported inside the functions that need them."""
