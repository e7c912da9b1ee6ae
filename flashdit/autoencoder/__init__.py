"""Training an autoencoder of one's own, where no ready one fits the pictures."""
