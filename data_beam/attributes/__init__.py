"""What one worker can say of one document on its own: one file a signal."""
