"""The main job on a real guest, side by side with the conventional way."""
