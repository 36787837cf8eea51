"""From an encoded image to a uint8 array of the network's size, on the host."""
