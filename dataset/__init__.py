"""Images and cached latents as training data: one listing of class folders, decoding, shards, encoding."""
