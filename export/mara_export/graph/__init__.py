"""From a traced decoder to the step graph."""
