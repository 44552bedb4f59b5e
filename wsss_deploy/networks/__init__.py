"""The torch modules: encoder, decoder and the network that joins them."""
