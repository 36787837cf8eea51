"""Where images come from: a module for each value of `data.source`."""
