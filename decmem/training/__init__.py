"""Training: tasks (what is learned), the trainer (how), caches of rendered walks (from what)."""
