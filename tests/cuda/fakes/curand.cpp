// Linked, and never called.
