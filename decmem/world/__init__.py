"""The procedural block world: terrain, motion, camera, rendering, walks, visibility, episodes."""
