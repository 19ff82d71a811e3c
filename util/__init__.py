"""Ground floor: knows nothing of the project."""
