"""TensorRT engines of a bundle's step graph."""
