"""How ranks come to be: their place in the environment, the guard beside each, and where a launcher's store listens."""
