"""The embedded default data: images, autoencoder, classifier, and what scoring makes of them."""
