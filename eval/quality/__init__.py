"""How good are the images: feature networks, distances between sets of images, protocols, the report."""
