"""What one rank does in a test over real processes, and how ranks are started."""
