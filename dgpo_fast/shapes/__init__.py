"""A synthetic world of coloured shapes: captions, the scenes they describe, images of them, and their verifier."""
