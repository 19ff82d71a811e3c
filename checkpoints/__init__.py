"""From files to models: downloads, published layouts, the model that a file and settings describe."""
