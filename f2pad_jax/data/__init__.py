"""Images from folders, synthetic defects, and the demonstration's textures."""
