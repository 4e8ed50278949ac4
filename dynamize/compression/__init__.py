"""Static compression of dynamic networks: fewer channels, and layers in factors."""
