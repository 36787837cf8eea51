"""From the bytes of an encoded image to pixels of the network's size, on the host."""
