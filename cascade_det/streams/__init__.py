"""Images, videos and cameras as streams of frames, and their way through a detector."""
