"""The live page: a server that lets a person walk in a dream, and the same dream for agents."""
