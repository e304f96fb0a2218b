"""Places on the sky: HEALPix cells, the sphere, neighbours."""
