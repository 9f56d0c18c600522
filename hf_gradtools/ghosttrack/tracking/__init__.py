"""Features tracked through the layers: arrays in, arrays out."""
