"""Experiments for images of one's own: a look at the images, the experiments of all methods, and their folder."""
