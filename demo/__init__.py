"""The demo on handwritten digits, its web page and its studies."""
